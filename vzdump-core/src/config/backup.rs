// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of a backup, as `vzdump.conf`, a job of `jobs.cfg` or a command line give them.
//!
//! What is not given is `None`, so that several of them can be laid upon each other:
//! command line, then job, then `vzdump.conf`, then the default.

use std::path::PathBuf;

use super::{ConfigError, parse_bool};
use crate::guest::BackupMode;
use crate::retention::Retention;
use crate::vm::backup::FleecingOptions;
use crate::vm::qemu_cmdline::words;

/// The most minutes that can be waited for something: a week.
pub const WAIT_MAX_MINUTES: u32 = 7 * 24 * 60;
/// The most minutes that a guest may take to shut down: a day.
pub const STOP_WAIT_MAX_MINUTES: u32 = 24 * 60;
/// The lowest priority of disk access, `idle`.
pub const IONICE_MAX: u8 = 8;

/// Keys that only a scheduler reads.
const SCHEDULE_KEYS: [&str; 7] =
    ["comment", "dow", "enabled", "id", "next-run", "repeat-missed", "schedule"];

/// Options of vzdump that make no sense here, and why.
const WITHOUT_MEANING: [(&str, &str); 16] = [
    ("dumpdir", "archives go to a storage and its provider; choose it with 'storage'"),
    ("compress", "the provider of the storage decides how data is stored"),
    ("zstd", "the provider of the storage decides how data is stored"),
    ("pigz", "the provider of the storage decides how data is stored"),
    ("stdout", "an archive is not one stream of bytes"),
    ("stop", "a running job ends in order after `kill <its process>`"),
    ("size", "volumes for old data are as large as the disks; see 'fleecing'"),
    ("maxfiles", "it was replaced by 'prune-backups'"),
    ("mailto", "no mail is sent; a hook script can do so, see 'script'"),
    ("mailnotification", "no mail is sent; a hook script can do so, see 'script'"),
    ("notification-mode", "nothing is notified; a hook script can do so, see 'script'"),
    ("notification-policy", "nothing is notified; a hook script can do so, see 'script'"),
    ("notification-target", "nothing is notified; a hook script can do so, see 'script'"),
    ("pbs-change-detection-mode", "it is for containers on a Proxmox Backup Server"),
    ("performance", "disks are read at the same time; 'jobs' and 'bwlimit' bound the load"),
    ("starttime", "it was replaced by 'schedule'"),
];

/// Why an option of vzdump makes no sense here; `None` if it does, or is none of vzdump's.
#[must_use]
pub fn without_meaning(key: &str) -> Option<&'static str> {
    WITHOUT_MEANING.iter().find(|(name, _)| *name == key).map(|(_, why)| *why)
}

/// What vzdump leaves out of every container, unless `stdexcludes` is 0.
const STANDARD_EXCLUDES: [&str; 3] = ["/tmp/?*", "/var/tmp/?*", "/var/run/?*.pid"];

/// Which guests are backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// These.
    Guests(Vec<u32>),
    /// All but some.
    All {
        /// The guests left out.
        exclude: Vec<u32>,
    },
    /// The guests of a pool but some.
    Pool {
        /// The pool.
        pool: String,
        /// The guests left out.
        exclude: Vec<u32>,
    },
}

impl Selection {
    /// Puts together what was given of a selection; `None` if nothing was. To exclude guests means
    /// all others.
    fn of(
        ids: Vec<u32>,
        all: bool,
        exclude: Vec<u32>,
        pool: Option<String>,
    ) -> Result<Option<Self>, String> {
        match (ids.is_empty(), all, pool) {
            (false, false, None) if exclude.is_empty() => Ok(Some(Self::Guests(ids))),
            (false, ..) => {
                Err("Guests are named, so 'all', 'exclude' and 'pool' make no sense.".to_owned())
            }
            (true, true, Some(_)) => {
                Err("Either all guests or those of a pool can be backed up.".to_owned())
            }
            (true, false, Some(pool)) => Ok(Some(Self::Pool { pool, exclude })),
            (true, true, None) => Ok(Some(Self::All { exclude })),
            (true, false, None) if exclude.is_empty() => Ok(None),
            (true, false, None) => Ok(Some(Self::All { exclude })),
        }
    }

    /// What is left of it; `None` if it named guests and all of them are gone.
    fn without(self, gone: &[u32]) -> Option<Self> {
        match self {
            Self::Guests(mut ids) => {
                ids.retain(|id| !gone.contains(id));
                (!ids.is_empty()).then_some(Self::Guests(ids))
            }
            Self::All { exclude } => Some(Self::All { exclude: union(exclude, gone) }),
            Self::Pool { pool, exclude } => {
                Some(Self::Pool { pool, exclude: union(exclude, gone) })
            }
        }
    }
}

fn union(mut ids: Vec<u32>, more: &[u32]) -> Vec<u32> {
    let new: Vec<u32> = more.iter().copied().filter(|id| !ids.contains(id)).collect();
    ids.extend(new);
    ids
}

/// A selection, and [`BackupSettings::only_excludes`].
type Chosen = (Option<Selection>, bool);

/// What `upper` and `lower` choose together. To exclude guests is no choice of its own where `lower` has one:
/// who takes a guest from a job does not want all others of the host.
fn chosen(upper: Chosen, lower: Chosen) -> Chosen {
    match (upper, lower) {
        ((Some(Selection::All { exclude }), true), (Some(lower), only_excludes)) => {
            (lower.without(&exclude), only_excludes)
        }
        ((None, _), lower) => lower,
        (upper, _) => upper,
    }
}

/// Options of a backup; `None` is not given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupSettings {
    /// Which guests.
    pub selection: Option<Selection>,
    /// The selection is nothing but guests that are excluded: what a lower layer chooses counts, without them.
    pub only_excludes: bool,
    /// The storage.
    pub storage: Option<String>,
    /// What happens to a running guest for the point in time.
    pub mode: Option<BackupMode>,
    /// How many guests are worked on at the same time.
    pub jobs: Option<u8>,
    /// Bandwidth limit in KiB/s; 0 is none.
    pub bwlimit_kib_per_s: Option<u64>,
    /// Priority of disk access, 0 (highest) to 8 (idle).
    pub ionice: Option<u8>,
    /// How long a busy guest is waited for, in minutes.
    pub lockwait_minutes: Option<u32>,
    /// How long a guest may take to shut down, in minutes.
    pub stopwait_minutes: Option<u32>,
    /// Whether files of containers that cannot be read are left out; they are an error unless this is true.
    pub skip_unreadable: Option<bool>,
    /// Where files of containers are copied to that cannot be snapshotted.
    pub tmpdir: Option<PathBuf>,
    /// The hook script.
    pub script: Option<PathBuf>,
    /// Template of the notes of the archives.
    pub notes_template: Option<String>,
    /// Whether the archives are protected from removal.
    pub protected: Option<bool>,
    /// Which archives of each guest stay afterwards.
    pub prune_backups: Option<Retention>,
    /// Whether archives are removed by these rules; they are unless this is false.
    pub remove: Option<bool>,
    /// Patterns of what is left out of containers.
    pub exclude_path: Option<Vec<String>>,
    /// Whether what vzdump always leaves out of containers is left out, too; it is unless this is false.
    pub stdexcludes: Option<bool>,
    /// Where and how old data is kept.
    pub fleecing: Option<FleecingOptions>,
    /// Whether only warnings and errors are printed.
    pub quiet: Option<bool>,
    /// The only host that may run the job.
    pub node: Option<String>,
}

impl BackupSettings {
    /// Reads `key` and `value` pairs. Also returns a sentence for each key that has no effect.
    /// `origin` is where they are from, for these sentences and errors.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the key whose value makes no sense.
    pub fn parse<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
        origin: &str,
    ) -> Result<(Self, Vec<String>), ConfigError> {
        let mut settings = Self::default();
        let mut notices = Vec::new();
        let (mut ids, mut exclude, mut all, mut pool) = (Vec::new(), Vec::new(), false, None);
        for (key, value) in pairs {
            let invalid = |why: String| ConfigError::Invalid(format!("{origin}: '{key}': {why}"));
            match key {
                "vmid" => ids = id_list(value).map_err(invalid)?,
                "exclude" => exclude = id_list(value).map_err(invalid)?,
                "all" => all = boolean(value).map_err(invalid)?,
                "pool" => pool = Some(value.to_owned()),
                _ if settings.set(key, value).map_err(invalid)? => {}
                _ if SCHEDULE_KEYS.contains(&key) => {}
                _ => notices.push(match without_meaning(key) {
                    Some(why) => format!("{origin}: '{key}' has no effect: {why}"),
                    None => format!("{origin}: the key '{key}' is unknown and has no effect"),
                }),
            }
        }
        settings
            .choose(ids, all, exclude, pool)
            .map_err(|why| ConfigError::Invalid(format!("{origin}: {why}")))?;
        Ok((settings, notices))
    }

    /// Sets which guests, from what was given of that.
    ///
    /// # Errors
    /// A sentence if the parts contradict each other.
    pub fn choose(
        &mut self,
        ids: Vec<u32>,
        all: bool,
        exclude: Vec<u32>,
        pool: Option<String>,
    ) -> Result<(), String> {
        let only_excludes = ids.is_empty() && !all && pool.is_none() && !exclude.is_empty();
        self.selection = Selection::of(ids, all, exclude, pool)?;
        self.only_excludes = only_excludes;
        Ok(())
    }

    /// Sets one option; false if there is none of that name.
    fn set(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key {
            "storage" => self.storage = Some(value.to_owned()),
            "mode" => self.mode = Some(value.parse()?),
            "jobs" => self.jobs = Some(number(value, 1, crate::job::JOBS_MAX as u64)? as u8),
            "bwlimit" => self.bwlimit_kib_per_s = Some(number(value, 0, u64::MAX >> 10)?),
            "ionice" => self.ionice = Some(number(value, 0, IONICE_MAX.into())? as u8),
            "lockwait" => self.lockwait_minutes = Some(minutes(value)?),
            "stopwait" => {
                let minutes = number(value, 1, STOP_WAIT_MAX_MINUTES.into())?;
                self.stopwait_minutes = Some(minutes as u32);
            }
            "skip-unreadable" => self.skip_unreadable = Some(boolean(value)?),
            "tmpdir" => self.tmpdir = Some(value.into()),
            "script" => self.script = Some(value.into()),
            "notes-template" => self.notes_template = Some(value.to_owned()),
            "protected" => self.protected = Some(boolean(value)?),
            "prune-backups" => self.prune_backups = Some(value.parse()?),
            "remove" => self.remove = Some(boolean(value)?),
            "exclude-path" => self.exclude_path = Some(words::split(value)?),
            "stdexcludes" => self.stdexcludes = Some(boolean(value)?),
            "fleecing" => self.fleecing = Some(value.parse()?),
            "quiet" => self.quiet = Some(boolean(value)?),
            "node" => self.node = Some(value.to_owned()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The patterns of what is left out of containers, those of vzdump first.
    #[must_use]
    pub fn excludes(&self) -> Vec<String> {
        let is_standard = self.stdexcludes.unwrap_or(true);
        let standard =
            STANDARD_EXCLUDES.iter().filter(|_| is_standard).map(|&text| text.to_owned());
        standard.chain(self.exclude_path.iter().flatten().cloned()).collect()
    }

    /// These options, and for what they do not say those of `lower`. If guests are excluded and none is left of
    /// those that `lower` names, nothing is selected.
    #[must_use]
    pub fn or(self, lower: Self) -> Self {
        let (selection, only_excludes) =
            chosen((self.selection, self.only_excludes), (lower.selection, lower.only_excludes));
        Self {
            selection,
            only_excludes,
            storage: self.storage.or(lower.storage),
            mode: self.mode.or(lower.mode),
            jobs: self.jobs.or(lower.jobs),
            bwlimit_kib_per_s: self.bwlimit_kib_per_s.or(lower.bwlimit_kib_per_s),
            ionice: self.ionice.or(lower.ionice),
            lockwait_minutes: self.lockwait_minutes.or(lower.lockwait_minutes),
            stopwait_minutes: self.stopwait_minutes.or(lower.stopwait_minutes),
            skip_unreadable: self.skip_unreadable.or(lower.skip_unreadable),
            tmpdir: self.tmpdir.or(lower.tmpdir),
            script: self.script.or(lower.script),
            notes_template: self.notes_template.or(lower.notes_template),
            protected: self.protected.or(lower.protected),
            prune_backups: self.prune_backups.or(lower.prune_backups),
            remove: self.remove.or(lower.remove),
            exclude_path: self.exclude_path.or(lower.exclude_path),
            stdexcludes: self.stdexcludes.or(lower.stdexcludes),
            fleecing: self.fleecing.or(lower.fleecing),
            quiet: self.quiet.or(lower.quiet),
            node: self.node.or(lower.node),
        }
    }
}

fn boolean(value: &str) -> Result<bool, String> {
    parse_bool(value).ok_or_else(|| format!("'{value}' is neither 0 nor 1."))
}

fn number(value: &str, min: u64, max: u64) -> Result<u64, String> {
    let number = value.parse().ok().filter(|number| (min..=max).contains(number));
    number.ok_or_else(|| format!("'{value}' is no number from {min} to {max}."))
}

fn minutes(value: &str) -> Result<u32, String> {
    let minutes = number(value, 0, WAIT_MAX_MINUTES.into())?;
    u32::try_from(minutes).map_err(|error| error.to_string())
}

/// Reads a list of guest numbers, separated as Proxmox VE's files do.
///
/// # Errors
/// A sentence that names what is no guest number.
pub fn id_list(value: &str) -> Result<Vec<u32>, String> {
    let words = value.split([',', ';', ' ', '\t']).filter(|word| !word.is_empty());
    let ids = words.map(|word| {
        let id = word.parse().ok().filter(|&id| crate::layout::check_guest_id(id).is_ok());
        id.ok_or_else(|| format!("'{word}' is not a guest number."))
    });
    ids.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(BackupSettings, Vec<String>), String> {
        let pairs = text.lines().filter_map(|line| line.split_once(": "));
        BackupSettings::parse(pairs, "vzdump.conf").map_err(|error| error.to_string())
    }

    #[test]
    fn the_upper_layer_wins_and_the_lower_fills_in() {
        let (conf, _) = parse("bwlimit: 1000\nstorage: a\nlockwait: 5\nvmid: 100").unwrap();
        let (job, _) = parse("storage: b\nall: 1\nexclude: 101").unwrap();
        let line = BackupSettings { bwlimit_kib_per_s: Some(0), ..BackupSettings::default() };
        let all = line.or(job).or(conf);
        assert_eq!((all.bwlimit_kib_per_s, all.storage.as_deref()), (Some(0), Some("b")));
        assert_eq!(all.lockwait_minutes, Some(5));
        assert_eq!(all.selection, Some(Selection::All { exclude: vec![101] }));
    }

    #[test]
    fn to_exclude_guests_takes_them_from_what_a_lower_layer_chooses() {
        let settings = |text: &str| parse(text).unwrap().0;
        let chosen = |upper: &str, lower: &str| settings(upper).or(settings(lower)).selection;
        let pool = |exclude| Some(Selection::Pool { pool: "web".to_owned(), exclude });
        let all = |exclude| Some(Selection::All { exclude });
        assert_eq!(chosen("exclude: 105", "pool: web"), pool(vec![105]));
        assert_eq!(chosen("exclude: 105,106", "pool: web\nexclude: 106"), pool(vec![106, 105]));
        assert_eq!(chosen("exclude: 105", "all: 1\nexclude: 106"), all(vec![106, 105]));
        assert_eq!(chosen("exclude: 105", "exclude: 106"), all(vec![106, 105]));
        let left = Some(Selection::Guests(vec![104]));
        assert_eq!(chosen("exclude: 105", "vmid: 104,105"), left);
        assert_eq!(chosen("exclude: 104,105", "vmid: 105,104"), None);
        // There is nothing to take them from, or others are chosen, too.
        assert_eq!(chosen("exclude: 105", "storage: a"), all(vec![105]));
        assert_eq!(chosen("all: 1\nexclude: 105", "vmid: 104"), all(vec![105]));
        assert_eq!(chosen("pool: web\nexclude: 105", "vmid: 104"), pool(vec![105]));
        let below = settings("exclude: 106").or(settings("vmid: 104,105,106"));
        assert_eq!(settings("exclude: 105").or(below).selection, left);
    }

    #[test]
    fn what_is_left_out_of_containers_has_vzdump_s_defaults() {
        let excludes = |text: &str| parse(text).unwrap().0.excludes();
        assert_eq!(excludes(""), STANDARD_EXCLUDES);
        let own = "exclude-path: /var/cache '*.bak file'";
        assert_eq!(excludes(own)[3..], ["/var/cache", "*.bak file"]);
        assert_eq!(excludes(&format!("{own}\nstdexcludes: 0")), ["/var/cache", "*.bak file"]);
        assert_eq!(excludes("stdexcludes: 0"), [""; 0]);
    }

    #[test]
    fn keys_without_effect_are_named() {
        let (settings, notices) =
            parse("dumpdir: /x\nschedule: 21:00\nsnurf: 1\nprotected: 1").unwrap();
        assert_eq!(settings.protected, Some(true));
        assert_eq!(
            notices,
            [
                "vzdump.conf: 'dumpdir' has no effect: archives go to a storage and its provider; choose it with 'storage'",
                "vzdump.conf: the key 'snurf' is unknown and has no effect",
            ]
        );
    }

    #[test]
    fn bad_values_are_errors_that_name_key_and_bounds() {
        for (text, fault) in [
            ("ionice: 9", "vzdump.conf: 'ionice': '9' is no number from 0 to 8."),
            ("jobs: 0", "'jobs': '0' is no number from 1 to 64."),
            ("lockwait: -1", "'-1' is no number"),
            ("bwlimit: 99999999999999999999", "is no number"),
            ("mode: fast", "'fast' is not one of snapshot, suspend, stop"),
            ("protected: maybe", "neither 0 nor 1"),
            ("exclude: 100,7", "'7' is not a guest number"),
            ("all: 1\nvmid: 100", "Guests are named"),
            ("all: 1\npool: p", "Either all guests"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(fault), "{error}");
        }
    }
}
