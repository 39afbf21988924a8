// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any directory, shown as the backup of a container shows its tree, with the same namespaces and the same
//! runner of commands: for checks of providers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use provider_api::{ContainerRunner, Excludes, Selection};
use tokio::sync::mpsc;

use crate::CtError;
use crate::runner::Runner;
use crate::runtime::beside;
use crate::sandbox::{LISTS, TREE};
use crate::view::{Origin, Part, View, ViewOptions};

/// Lines of commands that wait to be dropped.
const LOG_LINES: usize = 100;

/// A directory that is shown as the tree of a privileged container.
#[derive(Debug)]
pub struct ShownDirectory {
    runner: Arc<Runner>,
}

impl ShownDirectory {
    /// Shows `root`, of which `excludes` leave something out. `place` is empty, private, and stays until this is closed. `program` is the one whose
    /// [`crate::SANDBOX_SUBCOMMAND`] runs commands. Needs root.
    ///
    /// # Errors
    /// [`CtError`]; nothing is mounted then.
    pub async fn open(
        root: &Path,
        place: &Path,
        excludes: &Excludes,
        program: PathBuf,
    ) -> Result<Self, CtError> {
        let (dir, lists) = (place.join("view"), place.join("lists"));
        let (excludes, target) = (excludes.clone(), lists.clone());
        let part = Part {
            key: "rootfs".to_owned(),
            mount_point: "/".into(),
            path: root.to_owned(),
            is_image: false,
        };
        let options = ViewOptions { writable: false, origin: Origin::Volume, is_plain: false };
        let view = beside(move || {
            vzdump_core::layout::make_private_dir(&dir)?;
            let view = View::open(&dir, &[part], &[], options)?;
            Selection::write(&target, &view.host_tree(), &[], &excludes)
                .map_err(CtError::at("list the files"))?;
            Ok(view)
        });
        let view = Arc::new(view.await?);
        let (log, mut lines) = mpsc::channel(LOG_LINES);
        // Ends with the runner.
        tokio::spawn(async move { while lines.recv().await.is_some() {} });
        Ok(Self {
            runner: Arc::new(Runner { lists: Some(lists), ..Runner::new(view, program, log) }),
        })
    }

    /// Where commands find it.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        TREE.into()
    }

    /// Where this process finds it.
    #[must_use]
    pub fn host_tree(&self) -> PathBuf {
        self.runner.view.host_tree()
    }

    /// Where commands find the lists of what is read of it.
    #[must_use]
    pub fn lists(&self) -> PathBuf {
        LISTS.into()
    }

    /// Where this process finds them.
    #[must_use]
    pub fn host_lists(&self) -> PathBuf {
        self.runner.lists.clone().unwrap_or_default()
    }

    /// Runs commands beside it.
    #[must_use]
    pub fn runner(&self) -> Arc<dyn ContainerRunner> {
        Arc::clone(&self.runner) as _
    }

    /// Withdraws it; false if somebody still holds its runner.
    ///
    /// # Errors
    /// [`CtError`].
    pub async fn close(self) -> Result<bool, CtError> {
        beside(move || crate::runner::close(self.runner)).await
    }
}
