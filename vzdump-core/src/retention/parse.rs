// SPDX-License-Identifier: MIT OR Apache-2.0
//! The text form of a retention: the property string `prune-backups`.

use std::fmt;
use std::str::FromStr;

use super::{KeepCounts, Retention, Rule};
use crate::config::{OptionList, parse_bool};

impl FromStr for Retention {
    type Err = String;

    /// Reads `keep-last=3,keep-daily=7` or `keep-all=1`. Rules that all keep nothing mean that
    /// everything is kept, as in Proxmox VE.
    fn from_str(text: &str) -> Result<Self, String> {
        let list = OptionList::parse(text)?;
        if let Some(first) = list.first {
            return Err(format!("'{first}' is no retention rule; write 'keep-last=N'."));
        }
        let mut counts = KeepCounts::default();
        let mut all = None;
        let mut seen = Vec::new();
        for (name, value) in &list.named {
            if seen.contains(&name) {
                return Err(format!("'{name}' is there twice in '{text}'."));
            }
            seen.push(name);
            if name == Rule::All.name() {
                let flag = parse_bool(value);
                all = Some(flag.ok_or_else(|| format!("'{name}={value}' is neither 0 nor 1."))?);
                continue;
            }
            let count = value
                .parse()
                .map_err(|_| format!("'{value}' is not a number of archives ('{name}')."))?;
            *slot(&mut counts, name)? = count;
        }
        match (all, Self::from(counts)) {
            (_, Self::All) if list.named.is_empty() => {
                Err("A retention needs a rule such as 'keep-last=3', or 'keep-all=1'.".to_owned())
            }
            (Some(true), Self::Keep(_)) => {
                Err(format!("'keep-all' cannot be set together with other rules ('{text}')."))
            }
            (Some(false), Self::All) => {
                Err(format!("'{text}' keeps nothing; say what is kept, such as 'keep-last=3'."))
            }
            (_, retention) => Ok(retention),
        }
    }
}

fn slot<'a>(counts: &'a mut KeepCounts, name: &str) -> Result<&'a mut u32, String> {
    Ok(match name {
        "keep-last" => &mut counts.last,
        "keep-hourly" => &mut counts.hourly,
        "keep-daily" => &mut counts.daily,
        "keep-weekly" => &mut counts.weekly,
        "keep-monthly" => &mut counts.monthly,
        "keep-yearly" => &mut counts.yearly,
        _ => {
            return Err(format!(
                "'{name}' is no retention rule; there are keep-all, {}.",
                Rule::COUNTING.map(Rule::name).join(", ")
            ));
        }
    })
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = match self {
            Self::All => return f.write_str("keep-all=1"),
            Self::Keep(counts) => counts,
        };
        let mut separator = "";
        for rule in Rule::COUNTING {
            let count = counts.get(rule);
            if count > 0 {
                write!(f, "{separator}{rule}={count}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_property_string_is_read_and_written() {
        let text =
            "keep-last=3,keep-hourly=24,keep-daily=7,keep-weekly=4,keep-monthly=12,keep-yearly=2";
        let retention: Retention = text.parse().unwrap();
        assert_eq!(retention.to_string(), text);
        let Retention::Keep(counts) = retention else { panic!("not all") };
        assert_eq!(counts.weekly, 4);
        for (text, expected) in [
            ("keep-all=1", "keep-all=1"),
            ("keep-all=0,keep-last=1", "keep-last=1"),
            ("keep-daily=2,keep-last=0", "keep-daily=2"),
            // Nothing to keep is not "remove everything".
            ("keep-last=0", "keep-all=1"),
        ] {
            assert_eq!(text.parse::<Retention>().unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, fault) in [
            ("", "needs a rule"),
            ("3", "'3' is no retention rule"),
            ("keep-lost=3", "'keep-lost' is no retention rule"),
            ("keep-last=-1", "'-1' is not a number of archives"),
            ("keep-last=4294967296", "is not a number of archives"),
            ("keep-last=1,keep-last=2", "twice"),
            ("keep-all=1,keep-last=2", "cannot be set together"),
            ("keep-all=0", "keeps nothing"),
            ("keep-all=0,keep-last=0", "keeps nothing"),
            ("keep-all=maybe", "neither 0 nor 1"),
        ] {
            let error = text.parse::<Retention>().unwrap_err();
            assert!(error.contains(fault), "{text}: {error}");
        }
    }
}
