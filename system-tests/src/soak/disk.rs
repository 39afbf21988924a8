// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of a soak: what they are made of, what their sectors may hold, and what each target
//! keeps of them. They outlive the process that serves them.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use serde_json::{Value, json};

use crate::storage::{Storage, create_qcow2, raw_node};
use crate::stress::model::{Model, SECTOR};

/// The targets.
pub(super) const TARGETS: [&str; 3] = ["a", "b", "c"];

const MIB: u64 = 1 << 20;

/// What a disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A raw file in the page cache.
    Cached,
    /// A raw file past the page cache.
    Direct,
    /// A qcow2 image.
    Qcow2,
    /// A raw file behind nbdkit, which can be told to fail reads.
    Served,
}

/// What a target keeps of a disk.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Its last committed backup.
    pub(super) copy: Option<Copy>,
    pub(super) bitmap: Bitmap,
}

/// A committed backup: the values of all sectors, and its generation.
#[derive(Debug, Clone)]
pub(super) struct Copy {
    pub(super) values: Vec<u64>,
    pub(super) generation: String,
}

/// Whether QEMU has a bitmap of the target.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bitmap {
    #[default]
    None,
    One,
    /// It may have survived a restart.
    Unknown,
}

/// One disk.
pub(super) struct Disk {
    pub(super) name: &'static str,
    pub(super) form: Form,
    /// The thread of the guest's requests; the main one if there is none.
    pub(super) iothread: Option<&'static str>,
    pub(super) size_bytes: u64,
    pub(super) model: Arc<Model>,
    /// For the one target that may have an access, where only one may.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    kept: [Mutex<Kept>; TARGETS.len()],
}

impl Disk {
    fn new(
        name: &'static str,
        form: Form,
        iothread: Option<&'static str>,
        size_bytes: u64,
    ) -> Self {
        let sectors = size_bytes / SECTOR;
        let model = match form {
            Form::Qcow2 => Model::with_volatile_cache(sectors),
            _ => Model::new(sectors),
        };
        Self {
            name,
            form,
            iothread,
            size_bytes,
            model: Arc::new(model),
            turn: Arc::default(),
            kept: Default::default(),
        }
    }

    /// Those of the process that lives from the beginning to the end.
    pub(super) fn of_the_lasting() -> Vec<Self> {
        vec![
            Self::new("disk0", Form::Cached, Some("io0"), 10 * MIB + 5 * SECTOR),
            // Direct I/O may demand whole blocks of the host's disk.
            Self::new("disk1", Form::Direct, None, 6 * MIB + 4096),
            Self::new("disk2", Form::Qcow2, None, 8 * MIB + 3 * SECTOR),
        ]
    }

    /// Those of the process that is ended again and again.
    pub(super) fn of_the_mortal() -> Vec<Self> {
        vec![
            Self::new("disk0", Form::Cached, None, 6 * MIB + 7 * SECTOR),
            Self::new("disk1", Form::Qcow2, Some("io0"), 8 * MIB),
            Self::new("disk2", Form::Served, None, 6 * MIB + SECTOR),
        ]
    }

    pub(super) fn sectors(&self) -> u64 {
        self.size_bytes / SECTOR
    }

    /// What a target keeps of it.
    pub(super) fn kept(&self, target: usize) -> MutexGuard<'_, Kept> {
        self.kept[target].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Block jobs need a node above the place of our filters.
    pub(super) fn has_top(&self) -> bool {
        matches!(self.form, Form::Cached | Form::Qcow2)
    }

    /// The node that the guest uses.
    pub(super) fn guest_node(&self) -> String {
        if self.has_top() { format!("{}-top", self.name) } else { self.name.to_owned() }
    }

    /// Makes its file.
    pub(super) fn create(&self, folder: &Path) -> Result<()> {
        let path = folder.join(self.name);
        match self.form {
            Form::Qcow2 => create_qcow2(&path, self.size_bytes),
            _ => Ok(File::create(path)?.set_len(self.size_bytes)?),
        }
    }

    /// The description of the node of its file.
    pub(super) fn file_node(&self, storage: &Storage) -> Value {
        let mut node = storage.file_node(&format!("{}-file", self.name), self.name);
        node["cache"] = self.cache();
        node
    }

    fn cache(&self) -> Value {
        json!({ "direct": self.form == Form::Direct })
    }

    /// The description of its own node.
    fn node(&self, below: &str) -> Value {
        let mut node = raw_node(self.name, below);
        node["cache"] = self.cache();
        if self.form == Form::Qcow2 {
            node["driver"] = json!("qcow2");
            // A killed process must not leave a mapping to a cluster that was given to others.
            node["discard-no-unref"] = json!(true);
        }
        node
    }

    /// Adds its nodes and the guest's export; `file` is the lowest one.
    pub(super) async fn add(&self, storage: &Storage, file: Value) -> Result<()> {
        let below = file["node-name"].as_str().unwrap_or_default().to_owned();
        storage.node(file).await?;
        storage.node(self.node(&below)).await?;
        if self.has_top() {
            let group = format!("{}-free", self.name);
            let object = json!({ "qom-type": "throttle-group", "id": group });
            storage.run("object-add", object).await?;
            let top = json!({ "driver": "throttle", "node-name": self.guest_node(),
                              "throttle-group": group, "file": self.name });
            storage.node(top).await?;
        }
        storage.export_disk(&self.guest_node(), self.iothread).await
    }

    /// The process has ended: bitmaps in RAM are gone, those in images may be there. Also that of a
    /// target that had none: the end of its first access by a quit stores one.
    pub(super) fn process_ended(&self) {
        for target in 0..TARGETS.len() {
            self.kept(target).bitmap = match self.form {
                Form::Qcow2 => Bitmap::Unknown,
                _ => Bitmap::None,
            };
        }
    }
}
