// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the checks one after the other, each with guests of its own, and cleans up after each.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use provider_api::{CancellationToken, Capabilities, Description, Kind};

use crate::bench::{Bench, Ctx};
use crate::checks::{CHECKS, Check, Verdict};
use crate::fault::{Checked, Fault, clean, words};
use crate::machine::Offer;
use crate::place::Place;
use crate::report::{CheckResult, Outcome, Report, grade};
use crate::{Factory, KitOptions, Observer, SIZE_BYTES_MAX, SIZE_BYTES_MIN};

/// Names of all checks, with what each is about.
pub fn check_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    CHECKS.iter().map(|check| (check.name, check.title))
}

/// Names of the checks that are made with machines of a [`crate::MachineMaker`], too.
pub fn main_step_names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().filter(|check| check.is_main_step).map(|check| check.name)
}

/// Checks a provider. Should be awaited to its end; cancel it by the token, and the checks that are left
/// are not tested.
pub async fn check(
    factory: Factory,
    mut options: KitOptions,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Report {
    options.size_bytes =
        options.size_bytes.clamp(SIZE_BYTES_MIN, SIZE_BYTES_MAX) / SIZE_BYTES_MIN * SIZE_BYTES_MIN;
    let seed = options.seed;
    match begin(factory, options, cancel).await {
        Ok(kit) => kit.run(observer).await,
        Err(fault) => failed_start(seed, fault, observer),
    }
}

/// A provider that cannot even be asked.
fn failed_start(seed: u64, fault: Fault, observer: &dyn Observer) -> Report {
    let result = CheckResult {
        name: "start".to_owned(),
        title: "it can be made and asked".to_owned(),
        outcome: Outcome::Failed { why: fault.why, advice: fault.advice },
        elapsed_ms: 0,
    };
    observer.ended(&result);
    let checks = vec![result];
    Report {
        provider: "?".to_owned(),
        api_version: 0,
        capabilities: Capabilities::default(),
        seed,
        source: "none".to_owned(),
        grade: grade(&checks, false),
        checks,
        left: Vec::new(),
    }
}

struct Kit {
    bench: Arc<Bench>,
    description: Description,
    source: &'static str,
    _place: Place,
}

async fn begin(factory: Factory, options: KitOptions, cancel: &CancellationToken) -> Checked<Kit> {
    let place = Place::make()
        .map_err(|error| Fault::new(format!("No temporary directory can be made: {error}.")))?;
    let path = place.path().to_owned();
    let taken = options.used_guest_ids.clone();
    let first = Bench::new(
        Arc::clone(&factory),
        options.clone(),
        Offer::Nbd,
        BTreeSet::new(),
        path.clone(),
        cancel.clone(),
    );
    let ctx = Ctx::new(Arc::new(first), 0);
    let provider = ctx.provider().await?;
    let description = provider.describe();
    let list = ctx.list(provider.as_ref()).await?;
    let taken = taken.into_iter().chain(list.values().map(|archive| archive.guest_id)).collect();
    let (offer, source) = offer(&options, description.capabilities);
    let bench = Bench::new(factory, options, offer, taken, path, cancel.clone());
    Ok(Kit { bench: Arc::new(bench), description, source, _place: place })
}

/// How the disks are offered: over NBD if the provider can, as the host does.
fn offer(options: &KitOptions, capabilities: Capabilities) -> (Offer, &'static str) {
    if let Some(machines) = &options.machines {
        let is_file = machines.offers_files();
        let source =
            if is_file { "disks of a real QEMU as files" } else { "disks of a real QEMU over NBD" };
        return (Offer::Nbd, source);
    }
    if options.trees.is_some() {
        return (Offer::Nbd, "trees shown as those of real containers");
    }
    if capabilities.vm_nbd || !capabilities.vm_file {
        return (Offer::Nbd, "simulated disks over NBD");
    }
    let offer = Offer::File { storage_daemon: options.storage_daemon.clone() };
    match options.storage_daemon {
        Some(_) => (offer, "simulated disks as files of QEMU's storage daemon"),
        None => (offer, "simulated disks as sparse files, which cannot notice wrong reads"),
    }
}

impl Kit {
    async fn run(self, observer: &dyn Observer) -> Report {
        let only = &self.bench.options.only;
        let is_real = self.bench.options.is_real();
        let wanted: Vec<&Check> = CHECKS
            .iter()
            .filter(|check| only.is_empty() || only.iter().any(|name| name == check.name))
            .filter(|check| !is_real || check.is_main_step)
            .collect();
        let (mut checks, mut left) = (Vec::new(), BTreeSet::new());
        for (n, check) in wanted.iter().enumerate() {
            observer.begins(check.name, n + 1, wanted.len());
            let begin = Instant::now();
            let outcome = self.one(check, &mut left).await;
            let result = CheckResult {
                name: check.name.to_owned(),
                title: check.title.to_owned(),
                outcome,
                elapsed_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
            };
            observer.ended(&result);
            checks.push(result);
        }
        Report {
            provider: clean(&self.description.name),
            api_version: self.description.api_version,
            capabilities: self.description.capabilities,
            seed: self.bench.options.seed,
            source: self.source.to_owned(),
            grade: grade(&checks, checks.len() == CHECKS.len()),
            checks,
            left: left.into_iter().collect(),
        }
    }

    async fn one(&self, check: &'static Check, left: &mut BTreeSet<String>) -> Outcome {
        if self.bench.cancel.is_cancelled() {
            return Outcome::NotTested { why: "the kit was cancelled".to_owned() };
        }
        if let Some(missing) = check.needs.iter().find(|n| !(n.has)(&self.description.capabilities))
        {
            return Outcome::NotSupported { capability: missing.name.to_owned() };
        }
        if let Some(why) = self.cannot_look(check) {
            return Outcome::NotTested { why };
        }
        // The same disks, whichever checks are run.
        let number = CHECKS.iter().position(|c| c.name == check.name).unwrap_or(0) as u64;
        let seed = self.bench.options.seed.wrapping_mul(1 << 32).wrapping_add(number << 16);
        let ctx = Arc::new(Ctx::new(Arc::clone(&self.bench), seed));
        let task = Arc::clone(&ctx);
        // A task of its own, so that a panic of a provider in this process is a result.
        let done = tokio::spawn(async move { (check.run)(&task).await }).await;
        let cleaned = self.clean_up(&ctx, left).await;
        let verdict = match done {
            Ok(Ok(verdict)) => cleaned.map(|()| verdict),
            Ok(Err(fault)) => Err(fault),
            Err(panic) => Err(Fault::new(format!("It panicked: {}", clean(&panic.to_string())))),
        };
        match verdict {
            Ok(Verdict::Passed) => Outcome::Passed { remarks: ctx.remarks() },
            Ok(Verdict::NotTested(why)) => Outcome::NotTested { why },
            Err(_) if self.bench.cancel.is_cancelled() => {
                Outcome::NotTested { why: "the kit was cancelled".to_owned() }
            }
            Err(Fault { why, advice }) => Outcome::Failed { why, advice },
        }
    }

    /// Why a check cannot be made with what is not simulated.
    fn cannot_look(&self, check: &Check) -> Option<String> {
        let (options, can) = (&self.bench.options, &self.description.capabilities);
        if check.is_of_containers() {
            return options.trees.as_ref()?.unusable();
        }
        let machines = options.machines.as_ref()?;
        let fits = if machines.offers_files() { can.vm_file } else { can.vm_nbd };
        let way = if machines.offers_files() { "as files" } else { "over NBD" };
        (!fits).then(|| {
            format!("the real disks are offered {way} only, which the provider cannot read")
        })
    }

    /// Removes the archives of one check, those first that were made last.
    async fn clean_up(&self, ctx: &Ctx, left: &mut BTreeSet<String>) -> Checked {
        let made = ctx.made();
        if made.is_empty() {
            return Ok(());
        }
        let provider = ctx.provider().await?;
        let listed = ctx.list(provider.as_ref()).await?;
        for archive in made.iter().filter(|name| listed.contains_key(*name)) {
            if !self.description.capabilities.remove {
                left.insert(archive.clone());
                continue;
            }
            let call = ctx.call();
            let removed = ctx.answer("remove", provider.remove(archive, &call)).await?;
            match removed {
                Ok(()) => {}
                Err(error) if error.kind == Kind::NotFound => {}
                Err(error) => {
                    left.insert(archive.clone());
                    return Err(Fault::new(format!(
                        "Archive {archive} cannot be removed after the check: {}",
                        words(&error)
                    )));
                }
            }
        }
        Ok(())
    }
}
