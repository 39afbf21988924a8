// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup jobs of `jobs.cfg`, and the pools of `user.cfg`. Both are only read.
//!
//! ```text
//! vzdump: nightly                        pool:web:The web servers:100,101:local:
//!     schedule 21:00
//!     all 1
//!     storage backups
//! ```

use std::path::Path;

use super::backup::id_list;
use super::{ConfigError, read_text};

/// A backup job: its options in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupJob {
    /// Its name.
    pub id: String,
    /// Keys and values.
    pub pairs: Vec<(String, String)>,
}

/// Reads a job of `jobs.cfg`.
///
/// # Errors
/// The file cannot be read or makes no sense, or there is no such job; the text names those that
/// there are.
pub fn read_job(path: &Path, id: &str) -> Result<BackupJob, ConfigError> {
    let jobs = parse_jobs(&read_text(path)?.unwrap_or_default())?;
    let names: Vec<&str> = jobs.iter().map(|job| job.id.as_str()).collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let missing =
        || ConfigError::Invalid(format!("There is no job '{id}' in jobs.cfg; jobs: {known}."));
    jobs.iter().find(|job| job.id == id).cloned().ok_or_else(missing)
}

fn parse_jobs(text: &str) -> Result<Vec<BackupJob>, ConfigError> {
    let mut jobs: Vec<BackupJob> = Vec::new();
    // Sections of other kinds, such as the synchronisation of realms, are none of ours.
    let mut is_ours = false;
    for (index, line) in text.lines().enumerate() {
        let fault = |why: &str| ConfigError::Invalid(format!("jobs.cfg line {}: {why}", index + 1));
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let (key, value) = trimmed.split_once([' ', '\t']).unwrap_or((trimmed, ""));
            match jobs.last_mut() {
                Some(job) if is_ours => {
                    job.pairs.push((key.to_owned(), value.trim_start().to_owned()));
                }
                _ if is_ours => return Err(fault("a property belongs to no job.")),
                _ => {}
            }
            continue;
        }
        let (kind, id) = trimmed.split_once(':').ok_or_else(|| fault("it is no 'type: id'."))?;
        is_ours = kind == "vzdump";
        if is_ours {
            let id = id.trim().to_owned();
            if jobs.iter().any(|job| job.id == id) {
                return Err(fault(&format!("the job '{id}' is there twice.")));
            }
            jobs.push(BackupJob { id, pairs: Vec::new() });
        }
    }
    Ok(jobs)
}

/// The guests of a pool and of the pools within it, from `user.cfg`.
///
/// # Errors
/// The file cannot be read, or has no such pool.
pub fn read_pool(path: &Path, pool: &str) -> Result<Vec<u32>, ConfigError> {
    parse_pool(&read_text(path)?.unwrap_or_default(), pool)
}

fn parse_pool(text: &str, pool: &str) -> Result<Vec<u32>, ConfigError> {
    let mut known = Vec::new();
    let mut found = None;
    for line in text.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let ["pool", name, _, guests, ..] = fields.as_slice() else { continue };
        known.push(*name);
        let is_within = name.strip_prefix(pool).is_some_and(|rest| rest.starts_with('/'));
        if *name == pool || is_within {
            let ids = id_list(guests).map_err(|why| {
                ConfigError::Invalid(format!("user.cfg: the pool '{name}': {why}"))
            })?;
            found.get_or_insert_with(Vec::new).extend(ids);
        }
    }
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    found.ok_or_else(|| {
        ConfigError::Invalid(format!("There is no pool '{pool}' in user.cfg; pools: {known}."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_and_other_sections_are_not() {
        let text = "# made by hand\nvzdump: nightly\n\tall 1\n\tnotes-template {{guestname}} x\n\n\
                    realmsync: r\n\trealm pve\n\nvzdump: weekly\n\tvmid 100,101\n\tquiet\n";
        let jobs = parse_jobs(text).unwrap();
        assert_eq!(jobs.len(), 2);
        assert_eq!(jobs[0].pairs[1], ("notes-template".into(), "{{guestname}} x".into()));
        assert_eq!(jobs[1].pairs, [("vmid".into(), "100,101".into()), ("quiet".into(), "".into())]);
        for bad in ["vzdump: a\nvzdump: a\n", "nonsense\n"] {
            assert!(parse_jobs(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pool_has_the_guests_of_the_pools_within() {
        let text = "user:root@pam:1:0:::::\npool:web:Web: 100,101:local:\npool:web/old::102::\n\
                    pool:webby::103::\n";
        assert_eq!(parse_pool(text, "web").unwrap(), [100, 101, 102]);
        let error = parse_pool(text, "we").unwrap_err().to_string();
        assert!(error.contains("no pool 'we' in user.cfg; pools: web, web/old, webby."), "{error}");
        assert!(parse_pool("pool:web::x::\n", "web").is_err());
    }
}
