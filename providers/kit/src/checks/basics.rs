// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a provider says of itself, and what it knows of nothing.

use std::time::{Duration, Instant};

use provider_api::{CommitOutcome, Error, Kind, Uuid, check_api_version};

use super::Verdict;
use crate::bench::Ctx;
use crate::fault::{Checked, Fault, clean, ensure};

/// `status` must answer in this time.
pub(super) const STATUS_LIMIT: Duration = Duration::from_secs(1);
/// An archive that nobody has.
const UNKNOWN: &str = "kit-there-is-no-such-archive";
const NAME_BYTES_MAX: usize = 64;
const PROPERTY_BYTES_MAX: usize = 32;

pub(super) async fn describe(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.bare_provider().await?;
    let description = provider.describe();
    let name = &description.name;
    ensure(
        (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control),
        || format!("Its name {:?} cannot be shown: 1 to {NAME_BYTES_MAX} bytes.", clean(name)),
    )?;
    check_api_version(description.api_version).map_err(Fault::new)?;
    let c = description.capabilities;
    ensure(c.vm_nbd || c.vm_file || c.container, || {
        "It backs up neither virtual machines nor containers.".to_owned()
    })?;
    ensure(!c.vm_incremental || c.vm_nbd || c.vm_file, || {
        "It makes increments of virtual machines, but backs up none.".to_owned()
    })?;
    let mut seen = Vec::new();
    for property in provider.properties() {
        let name = property.name;
        let is_good = name.len() <= PROPERTY_BYTES_MAX
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        ensure(is_good, || {
            format!("Its property {:?} is not named [a-z][a-z0-9-]{{0,31}}.", clean(&name))
        })?;
        ensure(!seen.contains(&name), || format!("It has the property {name} twice."))?;
        if property.description.is_empty() {
            ctx.remark(format!("Its property {name} has no description."));
        }
        seen.push(name);
    }
    Ok(Verdict::Passed)
}

pub(super) async fn activate(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let again = ctx.call();
    ctx.expect("activate, once more", provider.activate(&again)).await?;
    let other = ctx.bare_provider().await?;
    let (first, second) = (ctx.call(), ctx.call());
    let both = futures_util::future::join(provider.activate(&first), other.activate(&second));
    let both = async { Ok::<_, Error>(both.await) };
    let (first, second) = ctx.expect("activate", both).await?;
    for result in [first, second] {
        let at_once = async { result };
        ctx.expect("activate, of two objects at once", at_once).await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn status(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    for _ in 0..5 {
        ask_status(ctx, provider.as_ref()).await?;
    }
    Ok(Verdict::Passed)
}

/// Asks for the space, and checks time and numbers.
pub(super) async fn ask_status(ctx: &Ctx, provider: &dyn provider_api::Provider) -> Checked {
    let mut slowest = Duration::ZERO;
    // One slow answer may be a busy machine's.
    for _ in 0..3 {
        let begin = Instant::now();
        let call = ctx.call();
        let status = ctx.expect("status", provider.status(&call)).await?;
        let elapsed = begin.elapsed();
        ensure(status.used_bytes <= status.total_bytes, || {
            format!("status says {} of {} bytes are used.", status.used_bytes, status.total_bytes)
        })?;
        if elapsed <= STATUS_LIMIT {
            return Ok(());
        }
        slowest = slowest.max(elapsed);
    }
    let fault = Fault::new(format!("status takes {} ms, three times.", slowest.as_millis()));
    Err(fault.advise("It is polled: answer within a second, from what is known."))
}

fn must_be_not_found<T>(what: &str, result: Result<T, Error>) -> Checked {
    match result {
        Ok(_) => Err(Fault::new(format!("{what} works for an archive that is not there."))),
        Err(error) if error.kind == Kind::NotFound => Ok(()),
        Err(error) => Err(Fault::new(format!(
            "{what} of an archive that is not there fails as {:?}, not as NotFound: {}",
            error.kind,
            clean(&error.message)
        ))),
    }
}

pub(super) async fn unknown(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let can = provider.describe().capabilities;
    let call = ctx.call();
    let config = ctx.answer("guest_config", provider.guest_config(UNKNOWN, &call)).await?;
    must_be_not_found("guest_config", config)?;
    if can.vm_restore {
        let restore = provider.restore_vm_init(UNKNOWN, &call);
        match ctx.answer("restore_vm_init", restore).await? {
            Ok(restore) => {
                ctx.expect("cleanup", restore.cleanup(&call)).await?;
                return Err(Fault::new("restore_vm_init works for an archive that is not there."));
            }
            Err(error) => must_be_not_found::<()>("restore_vm_init", Err(error))?,
        }
    }
    if can.notes {
        let notes = ctx.answer("notes", provider.notes(UNKNOWN, &call)).await?;
        must_be_not_found("notes", notes)?;
        let set = ctx.answer("set_notes", provider.set_notes(UNKNOWN, "x", &call)).await?;
        must_be_not_found("set_notes", set)?;
    }
    if can.protect {
        let set = provider.set_protected(UNKNOWN, true, &call);
        must_be_not_found("set_protected", ctx.answer("set_protected", set).await?)?;
    }
    if can.log {
        let kept = ctx.answer("keep_log", provider.keep_log(UNKNOWN, "x", &call)).await?;
        must_be_not_found("keep_log", kept)?;
    }
    if can.remove {
        let removed = ctx.answer("remove", provider.remove(UNKNOWN, &call)).await?;
        must_be_not_found("remove", removed)?;
    }
    let id = Uuid::new_v4();
    for _ in 0..2 {
        let outcome = ctx.outcome(provider.as_ref(), id).await?;
        ensure(outcome == CommitOutcome::NotCommitted, || {
            format!("commit_outcome of an id that it never saw is {outcome:?}.")
        })?;
    }
    Ok(Verdict::Passed)
}
