// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that a run of the fleecing benchmark has measured so far: kept in a file, from which a run that was
//! interrupted goes on.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cases::Case;
use crate::goals::{Verdict, judge};
use crate::report::CaseResult;
use crate::sample::Sample;
use crate::setup_time::SetupTimes;
use crate::timeline::Line;

/// What of the machine's description changes from one part of a run to the next and does not matter.
const MAY_DIFFER: &str = "load before the last run";

/// All that was measured.
#[derive(Debug, Default)]
pub struct Results {
    /// By case, in the order in which they ran.
    pub cases: Vec<CaseResult>,
    /// How long guest I/O is held by a setup.
    pub setup: Option<SetupTimes>,
    /// Latency over time.
    pub timeline: Vec<Line>,
    /// What failed beside single cases.
    pub errors: Vec<String>,
}

/// The part of a file that is read again.
#[derive(Deserialize)]
struct Stored {
    machine: Value,
    cases: Vec<StoredCase>,
    setup: Option<SetupTimes>,
    timeline: Vec<Line>,
}

#[derive(Deserialize)]
struct StoredCase {
    case: StoredName,
    samples: Vec<Vec<Option<Sample>>>,
    rates: Vec<u32>,
    errors: Vec<String>,
}

#[derive(Deserialize)]
struct StoredName {
    name: String,
}

impl Results {
    /// What is in a file of [`Self::save`], of the cases among `known`; nothing if there is none. A case that
    /// failed is left out, to be measured again.
    ///
    /// # Errors
    /// It cannot be read, or was measured on another machine or with other settings.
    pub fn load(path: &Path, machine: &Value, known: &[Case]) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let stored: Stored = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a result of this benchmark", path.display()))?;
        same_machine(&stored.machine, machine)
            .with_context(|| format!("{}: cannot go on from it", path.display()))?;
        let mut results =
            Self { setup: stored.setup, timeline: stored.timeline, ..Self::default() };
        for stored in stored.cases {
            if let Some(case) = known.iter().find(|case| case.name == stored.case.name) {
                results.cases.extend(stored.complete(case)?);
            }
        }
        Ok(results)
    }

    /// Whether a case has been measured.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.cases.iter().any(|result| result.case.name == name)
    }

    /// Which goals are reached.
    #[must_use]
    pub fn verdicts(&self) -> Vec<Verdict> {
        judge(&self.cases, self.setup.as_ref())
    }

    /// Writes everything, in the place of what was in the file.
    ///
    /// # Errors
    /// It cannot be written; what was there stays.
    pub fn save(&self, path: &Path, machine: &Value) -> Result<()> {
        let all = json!({ "machine": machine, "cases": self.cases, "setup": self.setup,
                          "timeline": self.timeline, "goals": self.verdicts(),
                          "errors": self.errors });
        let mut name = path.file_name().context("the results' file has no name")?.to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        fs::write(&new, serde_json::to_string_pretty(&all)?)
            .and_then(|()| fs::rename(&new, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl StoredCase {
    /// Its result, unless something failed.
    fn complete(self, case: &Case) -> Result<Option<CaseResult>> {
        ensure!(self.samples.len() == case.modes.len(), "{} has other modes now", case.name);
        let complete = self.errors.is_empty()
            && self.samples.iter().flatten().all(Option::is_some)
            && self.samples.iter().all(|rounds| !rounds.is_empty());
        Ok(complete.then(|| CaseResult {
            case: case.clone(),
            samples: self.samples,
            rates: self.rates,
            errors: Vec::new(),
        }))
    }
}

/// Numbers of two machines or settings do not belong in one table.
fn same_machine(stored: &Value, now: &Value) -> Result<()> {
    let (Some(stored), Some(now)) = (stored.as_object(), now.as_object()) else {
        bail!("it does not say what it was measured on");
    };
    for name in stored.keys().chain(now.keys()).filter(|name| *name != MAY_DIFFER) {
        let [before, after] = [stored, now].map(|of| of.get(name).unwrap_or(&Value::Null));
        ensure!(before == after, "{name} was {before}, and is {after}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;
    use crate::sample::Outcome;

    fn machine() -> Value {
        json!({ "rounds": 1, "fio": "fio-3.33", MAY_DIFFER: "0.5" })
    }

    fn measured(case: &Case) -> CaseResult {
        let mut result = CaseResult::new(case.clone());
        for mode in 0..case.modes.len() {
            let guest = Outcome { ios: 7 + mode as u64, seconds: 0.1, ..Outcome::default() };
            let access = Some(json!({ "state": "active" }));
            result.add(mode, Some(Sample { guest, access, ..Sample::default() }));
        }
        result.rates.push(1234);
        result
    }

    #[test]
    fn a_run_goes_on_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.json");
        let known = cases::all();
        assert!(Results::load(&path, &machine(), &known).unwrap().cases.is_empty());

        let mut results = Results { cases: vec![measured(&known[0])], ..Results::default() };
        let mut failed = CaseResult::new(known[1].clone());
        failed.errors.push("round 0: it failed".into());
        results.cases.push(failed);
        results.timeline.push(Line { mode: "none".into(), points: vec![(0.1, 42.5)] });
        results.save(&path, &machine()).unwrap();

        let mut later = machine();
        later[MAY_DIFFER] = json!("1.5");
        let loaded = Results::load(&path, &later, &known).unwrap();
        assert!(loaded.has(&known[0].name) && !loaded.has(&known[1].name));
        let json = |results: &CaseResult| serde_json::to_value(results).unwrap();
        assert_eq!(json(&loaded.cases[0]), json(&results.cases[0]));
        assert_eq!(loaded.timeline[0].points, [(0.1, 42.5)]);
    }

    #[test]
    fn a_file_of_other_settings_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.json");
        Results::default().save(&path, &machine()).unwrap();
        let mut other = machine();
        other["rounds"] = json!(5);
        let error = Results::load(&path, &other, &cases::all()).unwrap_err();
        assert!(format!("{error:#}").ends_with("rounds was 1, and is 5"), "{error:#}");
        fs::write(&path, "{}").unwrap();
        let error = Results::load(&path, &machine(), &cases::all()).unwrap_err();
        assert!(format!("{error:#}").contains("is not a result of this benchmark"), "{error:#}");
    }
}
