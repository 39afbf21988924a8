// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is to be reached, and whether it is.

use serde::Serialize;

use crate::report::CaseResult;
use crate::sample::Metric;
use crate::setup_time::SetupTimes;
use crate::stats::Estimate;

/// How slow ours may be nowhere, within confidence.
const NOWHERE_BELOW: f64 = 0.95;

/// Confidence below which nothing is called slower: that of two rounds is less.
const SURE: f64 = 0.7;

/// A bound of a median ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// At least.
    Least(f64),
    /// At most.
    Most(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::Least(bound) => value >= bound,
            Self::Most(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Least(bound) => format!("≥ {}", short(bound)),
            Self::Most(bound) => format!("≤ {}", short(bound)),
        }
    }
}

fn short(number: f64) -> String {
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// One ratio that is to be reached.
#[derive(Debug, Clone, Copy)]
struct Goal {
    case: &'static str,
    metric: Metric,
    mode: &'static str,
    against: &'static str,
    bound: Bound,
}

const fn goal(
    case: &'static str,
    metric: Metric,
    (mode, against): (&'static str, &'static str),
    bound: Bound,
) -> Goal {
    Goal { case, metric, mode, against, bound }
}

/// A reached or missed goal.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// What was compared.
    pub goal: String,
    /// What is asked for.
    pub bound: String,
    /// What was measured; `None` if it was not.
    pub measured: Option<Estimate>,
    /// Whether it is reached.
    pub reached: Option<bool>,
}

const OURS_C: (&str, &str) = ("ours", "c");
const OURS_NONE: (&str, &str) = ("ours", "none");

const GOALS: &[Goal] = {
    use Bound::{Least, Most};
    use Metric::{Cpu, FleecingPerWrite, Iops, Mean, P99, Reader};
    &[
        goal("4k-qd16/direct/raw/limited/1g", Iops, ("ours-gen", "ceiling"), Least(0.9)),
        goal("4k-qd16/default/raw/limited/1g", Iops, OURS_C, Least(5.0)),
        goal("4k-qd16/default/raw/limited/1g", Iops, OURS_NONE, Least(0.55)),
        goal("rate-4k/direct/raw/limited", P99, OURS_NONE, Most(2.0)),
        goal("rate-4k/direct/raw/limited", P99, OURS_C, Most(0.4)),
        goal("rate-4k/direct/raw/absent", P99, OURS_NONE, Most(2.0)),
        goal("rate-4k/direct/raw/absent", P99, OURS_C, Most(0.4)),
        goal("rate-4k/default/raw/limited", P99, OURS_NONE, Most(2.0)),
        goal("rate-4k/default/raw/limited", P99, OURS_C, Most(0.4)),
        goal("rate-4k/default/raw/absent", P99, OURS_NONE, Most(2.0)),
        goal("rate-4k/default/raw/absent", P99, OURS_C, Most(0.4)),
        goal("64k-qd16/direct/raw/limited", Iops, OURS_C, Least(1.5)),
        goal("64k-qd16/default/raw/limited", Iops, OURS_C, Least(1.5)),
        goal("1m-seq-qd4/direct/raw/limited", Iops, OURS_C, Least(1.0)),
        goal("1m-seq-qd4/default/raw/limited", Iops, OURS_C, Least(1.4)),
        goal("zipf-4k-qd16/direct/raw/limited", Iops, OURS_NONE, Least(0.9)),
        goal("zipf-4k-qd16/direct/raw/limited", Iops, OURS_C, Least(1.5)),
        goal("zipf-4k-qd16/default/raw/limited", Iops, OURS_NONE, Least(0.9)),
        goal("zipf-4k-qd16/default/raw/limited", Iops, OURS_C, Least(1.5)),
        goal("rewrite-4k-qd1/direct/raw/absent", Mean, OURS_NONE, Most(1.05)),
        goal("rewrite-4k-qd1/default/raw/absent", Mean, OURS_NONE, Most(1.05)),
        goal("null-rewrite-4k-qd32/default/null/absent", Cpu, OURS_C, Most(0.8)),
        goal("nbdcopy-idle/direct/raw/absent", Reader, OURS_NONE, Least(0.97)),
        goal("nbdcopy-idle/default/raw/absent", Reader, OURS_NONE, Least(0.97)),
        goal("nbdcopy-2000iops/direct/raw/absent", Reader, OURS_C, Least(1.15)),
        goal("nbdcopy-2000iops/default/raw/absent", Reader, OURS_C, Least(1.15)),
        goal("few-4k-qd16/direct/raw/absent/1m", FleecingPerWrite, OURS_C, Most(1.0 / 15.0)),
    ]
};

/// Judges what was measured.
#[must_use]
pub fn judge(results: &[CaseResult], setup: Option<&SetupTimes>) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = GOALS.iter().map(|goal| one(goal, results)).collect();
    let measured = setup.and_then(|setup| setup.difference_ms);
    verdicts.push(Verdict {
        goal: "setup of 8 disks of 1 TiB with bitmaps: ms drained beyond an empty drain".into(),
        bound: Bound::Most(1.0).text(),
        measured,
        reached: measured.map(|found| found.median <= 1.0),
    });
    verdicts.extend(slower_than_c(results));
    verdicts
}

fn one(goal: &Goal, results: &[CaseResult]) -> Verdict {
    let case = results.iter().find(|result| result.case.name == goal.case);
    let measured = case.and_then(|case| case.ratio(goal.metric, goal.mode, goal.against));
    Verdict {
        goal: format!("{}: {}, {} / {}", goal.case, goal.metric.name(), goal.mode, goal.against),
        bound: goal.bound.text(),
        measured,
        reached: measured.map(|found| goal.bound.holds(found.median)),
    }
}

/// Every case in which ours is surely slower than C's filter; one verdict if there is none.
fn slower_than_c(results: &[CaseResult]) -> Vec<Verdict> {
    let verdict = |goal: String, measured, reached| Verdict {
        goal,
        bound: Bound::Least(NOWHERE_BELOW).text(),
        measured,
        reached,
    };
    let mut compared = 0;
    let mut slower = Vec::new();
    for result in results {
        let guest = result.ratio(Metric::Iops, "ours", "c").map(|found| (Metric::Iops, found));
        let client = result.ratio(Metric::Reader, "ours", "c").map(|found| (Metric::Reader, found));
        for (metric, found) in guest.into_iter().chain(client) {
            compared += 1;
            if found.high < NOWHERE_BELOW && found.confidence >= SURE {
                let what = format!("{}: {}, ours / c", result.case.name, metric.name());
                slower.push(verdict(
                    format!("nowhere slower than C: {what}"),
                    Some(found),
                    Some(false),
                ));
            }
        }
    }
    if slower.is_empty() {
        let what = format!("nowhere slower than C: {compared} comparisons, within confidence");
        slower.push(verdict(what, None, (compared > 0).then_some(true)));
    }
    slower
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;
    use crate::sample::{Outcome, Sample};

    fn result(name: &str, iops: &[f64]) -> CaseResult {
        let case = cases::all().into_iter().find(|case| case.name == name).unwrap();
        let mut result = CaseResult::new(case);
        for (mode, iops) in iops.iter().enumerate() {
            for _ in 0..3 {
                let guest = Outcome { ios: *iops as u64, seconds: 1.0, ..Outcome::default() };
                result.add(mode, Some(Sample { guest, ..Sample::default() }));
            }
        }
        result
    }

    #[test]
    fn goals_name_cases_and_modes_that_exist() {
        let cases = cases::all();
        for goal in GOALS {
            let case = cases.iter().find(|case| case.name == goal.case);
            let case = case.unwrap_or_else(|| panic!("{} is no case", goal.case));
            for name in [goal.mode, goal.against] {
                assert!(case.modes.iter().any(|mode| mode.name == name), "{name}, {}", goal.case);
            }
        }
    }

    #[test]
    fn verdicts_follow_the_ratio() {
        let good = result("64k-qd16/direct/raw/limited", &[100.0, 40.0, 80.0]);
        let bad = result("64k-qd16/default/raw/limited", &[100.0, 80.0, 40.0]);
        let verdicts = judge(&[good, bad], None);
        let of = |text: &str| verdicts.iter().find(|v| v.goal.contains(text)).unwrap();
        assert_eq!(of("64k-qd16/direct").reached, Some(true));
        assert_eq!(of("64k-qd16/default").reached, Some(false));
        assert_eq!(of("zipf").reached, None);
        let slower = of("nowhere slower");
        assert!(slower.goal.contains("64k-qd16/default") && slower.reached == Some(false));
    }
}
