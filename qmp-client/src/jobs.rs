// SPDX-License-Identifier: MIT OR Apache-2.0
//! The upstream commands for block jobs, with the members that a live restore uses.
//!
//! Jobs are made to wait before they change the graph (`auto-finalize: false`) and stay until they are
//! dismissed, so that whoever comes later finds out what became of them.

use qapi_spec::Empty;
use serde::{Deserialize, Serialize};

use crate::open_enum::open_enum;
use crate::wire_command::commands;

commands! {
    BlockStream = "block-stream" -> Empty;
    BlockdevMirror = "blockdev-mirror" -> Empty;
    BlockJobSetSpeed = "block-job-set-speed" -> Empty;
    JobComplete = "job-complete" -> Empty;
    JobFinalize = "job-finalize" -> Empty;
    JobCancel = "job-cancel" -> Empty;
    JobDismiss = "job-dismiss" -> Empty;
    QueryJobs = "query-jobs" -> Vec<JobInfo>;
    HumanMonitor = "human-monitor-command" -> String;
}

/// Copies what an image's backing has into the image, and takes the backing away.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockStream {
    /// Id of the job.
    pub job_id: String,
    /// Node name of the image.
    pub device: String,
    /// Most bytes per second.
    #[serde(rename = "speed", skip_serializing_if = "Option::is_none")]
    pub speed_bytes_per_s: Option<u64>,
    /// Whether it changes the graph without being told to.
    pub auto_finalize: bool,
    /// Whether it goes away without being dismissed.
    pub auto_dismiss: bool,
}

/// Copies all of a node to another one, and keeps both equal until it is completed.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevMirror {
    /// Id of the job.
    pub job_id: String,
    /// Node name of the source, whose users get the target when the job is finalized.
    pub device: String,
    /// Node name of the target.
    pub target: String,
    /// What is copied at first.
    pub sync: MirrorSync,
    /// When the guest's writes are copied.
    pub copy_mode: MirrorCopyMode,
    /// Most bytes per second.
    #[serde(rename = "speed", skip_serializing_if = "Option::is_none")]
    pub speed_bytes_per_s: Option<u64>,
    /// Whether it changes the graph without being told to.
    pub auto_finalize: bool,
    /// Whether it goes away without being dismissed.
    pub auto_dismiss: bool,
}

/// What a mirror copies at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSync {
    /// Everything, zeroes too.
    Full,
}

/// When a mirror copies the guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorCopyMode {
    /// Before they are acknowledged.
    WriteBlocking,
}

/// Changes the limit of a job.
#[derive(Debug, Clone, Serialize)]
pub struct BlockJobSetSpeed {
    /// The job.
    pub device: String,
    /// Most bytes per second; 0 means no limit.
    #[serde(rename = "speed")]
    pub speed_bytes_per_s: u64,
}

/// Tells a mirror that is ready to come to its end.
#[derive(Debug, Clone, Serialize)]
pub struct JobComplete {
    /// The job.
    pub id: String,
}

/// Lets a job that is pending change the graph.
#[derive(Debug, Clone, Serialize)]
pub struct JobFinalize {
    /// The job.
    pub id: String,
}

/// Ends a job that has not changed the graph; it is concluded with an error then.
#[derive(Debug, Clone, Serialize)]
pub struct JobCancel {
    /// The job.
    pub id: String,
}

/// Removes a job that is concluded.
#[derive(Debug, Clone, Serialize)]
pub struct JobDismiss {
    /// The job.
    pub id: String,
}

/// All jobs.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryJobs;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// Its state.
    pub status: JobStatus,
    /// How much is done, in units of its own.
    #[serde(default)]
    pub current_progress: u64,
    /// How much there is to be done, as far as is known.
    #[serde(default)]
    pub total_progress: u64,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
}

open_enum! {
    /// State of a job, as far as it matters.
    pub enum JobStatus {
        /// It works.
        Running = "running",
        /// It keeps both sides equal.
        Ready = "ready",
        /// It waits to be finalized.
        Pending = "pending",
        /// It is over, well or not.
        Concluded = "concluded",
    }
}

/// A command of the monitor for people; its output is text that no program should depend on.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HumanMonitor {
    command_line: String,
}

impl HumanMonitor {
    /// Flushes a node and what is below it: QMP has no command for that. It says something only when it fails.
    #[must_use]
    pub fn flush(node: &str) -> Self {
        Self { command_line: format!("qemu-io {node} flush") }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_have_the_form_qemu_expects() {
        let stream = BlockStream {
            job_id: "fill-scsi0".into(),
            device: "drive-scsi0".into(),
            speed_bytes_per_s: Some(1),
            auto_finalize: false,
            auto_dismiss: false,
        };
        let expected = json!({"job-id": "fill-scsi0", "device": "drive-scsi0", "speed": 1,
                              "auto-finalize": false, "auto-dismiss": false});
        assert_eq!(serde_json::to_value(stream).unwrap(), expected);
        let mirror = BlockdevMirror {
            job_id: "j".into(),
            device: "a".into(),
            target: "b".into(),
            sync: MirrorSync::Full,
            copy_mode: MirrorCopyMode::WriteBlocking,
            speed_bytes_per_s: None,
            auto_finalize: false,
            auto_dismiss: false,
        };
        let expected = json!({"job-id": "j", "device": "a", "target": "b", "sync": "full",
                              "copy-mode": "write-blocking", "auto-finalize": false,
                              "auto-dismiss": false});
        assert_eq!(serde_json::to_value(mirror).unwrap(), expected);
        let speed = BlockJobSetSpeed { device: "j".into(), speed_bytes_per_s: 0 };
        assert_eq!(serde_json::to_value(speed).unwrap(), json!({"device": "j", "speed": 0}));
        let flush = serde_json::to_value(HumanMonitor::flush("n")).unwrap();
        assert_eq!(flush, json!({"command-line": "qemu-io n flush"}));
    }

    #[test]
    fn jobs_are_read() {
        let text = r#"{"id":"x","type":"stream","status":"concluded","current-progress":1,
                       "total-progress":2,"error":"Input/output error"}"#;
        let job: JobInfo = serde_json::from_str(text).unwrap();
        assert_eq!(job.status, JobStatus::Concluded);
        assert_eq!(job.error.as_deref(), Some("Input/output error"));
        let text = r#"{"id":"x","status":"waiting"}"#;
        let job: JobInfo = serde_json::from_str(text).unwrap();
        assert_eq!((job.status.as_str(), job.total_progress), ("waiting", 0));
    }
}
