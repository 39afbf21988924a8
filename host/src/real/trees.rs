// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trees for the conformance kit that are shown as the backup of a container shows them: mounted read-only in
//! a namespace of their own, with commands in their sandbox.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lxc_backend::show::ShownDirectory;
use provider_api::{BoxFuture, ContainerRunner, Excludes};
use provider_kit::{ShownTree, TreeMaker};

use crate::chain;

/// Shows directories so.
#[derive(Debug)]
pub(crate) struct RealTrees {
    /// This program, which also is the sandbox.
    program: PathBuf,
}

impl RealTrees {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program }
    }
}

impl TreeMaker for RealTrees {
    fn unusable(&self) -> Option<String> {
        let is_root = rustix::process::geteuid().is_root();
        (!is_root).then(|| "the files of a container are shown by root only".to_owned())
    }

    fn show<'a>(
        &'a self,
        root: &'a Path,
        place: &'a Path,
        excludes: &'a Excludes,
    ) -> BoxFuture<'a, Result<Box<dyn ShownTree>, String>> {
        Box::pin(async move {
            let shown = ShownDirectory::open(root, place, excludes, self.program.clone()).await;
            Ok(Box::new(RealTree(shown.map_err(|error| chain(&error))?)) as Box<dyn ShownTree>)
        })
    }
}

struct RealTree(ShownDirectory);

impl ShownTree for RealTree {
    fn tree(&self) -> PathBuf {
        self.0.tree()
    }

    fn host_tree(&self) -> PathBuf {
        self.0.host_tree()
    }

    fn lists(&self) -> PathBuf {
        self.0.lists()
    }

    fn host_lists(&self) -> PathBuf {
        self.0.host_lists()
    }

    fn runner(&self) -> Arc<dyn ContainerRunner> {
        self.0.runner()
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move {
            match self.0.close().await {
                Ok(true) => Ok(()),
                Ok(false) => Err("its runner is still held".to_owned()),
                Err(error) => Err(chain(&error)),
            }
        })
    }
}
