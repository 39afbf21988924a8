// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs commands beside a container's tree ([`ContainerRunner`]).

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufRead as _, BufReader, Read};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use provider_api::{
    BoxFuture, Call, CommandEnd, ContainerCommand, ContainerRunner, Error, Kind, Result,
    STDERR_TAIL_BYTES, StderrCopy,
};
use tokio::runtime::Handle;
use tokio::sync::mpsc::Sender;
use vzdump_core::bandwidth::DiskShare;

use crate::pace::Passing;
use crate::sandbox::{NOT_BEGUN, NOT_BEGUN_PREFIX, Role, SUBCOMMAND, Spec, TREE, Work};
use crate::tool::{Pauses, command as program, ends_with_us};
use crate::unpack::UnpackSpec;
use crate::view::View;

/// Longest line of a command's output that is taken as one.
const LINE_BYTES_MAX: u64 = 4 << 10;
/// Exit codes that stand for a death by signal.
const SIGNALLED: RangeInclusive<i32> = 129..=192;
/// Packs with all that a restore brings back.
const PACK: [&str; 9] = [
    "tar",
    "--create",
    "--file=-",
    "--format=posix",
    "--numeric-owner",
    "--sparse",
    "--acls",
    "--xattrs",
    "--xattrs-include=*",
];

/// Runs commands in the namespace of a view. Lines they write go to a channel.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) view: Arc<View>,
    /// What is to be read of the tree ([`provider_api::Selection`]).
    pub(crate) lists: Option<PathBuf>,
    pub(crate) program: PathBuf,
    pub(crate) log: Sender<String>,
    /// What the output of commands waits for.
    pub(crate) share: Option<DiskShare>,
    /// How the first command ended that a signal has ended.
    pub(crate) killed: OnceLock<String>,
}

/// What is done in a sandbox, and with what.
struct Task {
    role: Role,
    work: Work,
    paths: Vec<PathBuf>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<StderrCopy>,
}

impl From<ContainerCommand> for Task {
    fn from(command: ContainerCommand) -> Self {
        let ContainerCommand { argv, identity, env, paths, stdin, stdout, stderr } = command;
        let work = Work::Command { argv, env };
        Self { role: identity.into(), work, paths, stdin, stdout, stderr }
    }
}

impl Runner {
    /// Of the whole tree, and as fast as it goes.
    pub(crate) fn new(view: Arc<View>, program: PathBuf, log: Sender<String>) -> Self {
        Self { view, lists: None, program, log, share: None, killed: OnceLock::new() }
    }

    /// Unpacks an archive into the tree. Its reports go to `reports`, line by line.
    pub(crate) async fn unpack(
        &self,
        archive: OwnedFd,
        spec: UnpackSpec,
        reports: OwnedFd,
        call: &Call,
    ) -> Result<CommandEnd> {
        let role = if self.view.is_privileged { Role::Owner } else { Role::MappedRoot };
        let (stdin, stdout) = (Some(archive), Some(reports));
        let work = Work::Unpack(spec);
        self.run(Task { role, work, paths: Vec::new(), stdin, stdout, stderr: None }, call).await
    }

    /// Packs the tree, which nobody vouches for, into an archive. `tar` follows no links in it, and finds
    /// nothing else.
    pub(crate) async fn pack(&self, archive: OwnedFd, call: &Call) -> Result<CommandEnd> {
        let argv = PACK.iter().chain(&["--directory", TREE, "."]).map(Into::into).collect();
        let work = Work::Command { argv, env: Vec::new() };
        let (role, stdout) = (Role::SourceReader, Some(archive));
        self.run(Task { role, work, paths: Vec::new(), stdin: None, stdout, stderr: None }, call)
            .await
    }

    async fn run(&self, task: Task, call: &Call) -> Result<CommandEnd> {
        let view = Arc::clone(&self.view);
        let (program, log, lists) = (self.program.clone(), self.log.clone(), self.lists.clone());
        let pace = self.share.clone().map(|share| (share, Handle::current()));
        let started = vzdump_core::blocking::run(move || {
            Running::start((&view, lists), program, (task, pace), &log)
        });
        let mut running = started.await.map_err(|error| fault(&error))?;
        let status = tokio::select! {
            biased;
            () = call.cancel.cancelled() =>
                return Err(Error::new(Kind::Cancelled, "The command was ended.")),
            status = running.wait(call.deadline) => status?,
        };
        let end = running.end(status).await?;
        if SIGNALLED.contains(&end.exit_code) {
            let text = format!(
                "a command that read the container was ended by signal {}",
                end.exit_code - 128
            );
            // Only the first one is told.
            let _ = self.killed.set(text);
        }
        Ok(end)
    }
}

/// Ends the runner and its view; false if somebody still holds it.
pub(crate) fn close(runner: Arc<Runner>) -> std::result::Result<bool, crate::CtError> {
    let Some(runner) = Arc::into_inner(runner) else { return Ok(false) };
    let Some(view) = Arc::into_inner(runner.view) else { return Ok(false) };
    view.close().map(|()| true)
}

fn fault(error: &io::Error) -> Error {
    Error::new(Kind::Other, format!("Cannot run a command beside the container's files: {error}"))
}

impl ContainerRunner for Runner {
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>> {
        Box::pin(self.run(command.into(), call))
    }
}

/// A command under way. Dropping it kills the command with all it started.
struct Running {
    child: Child,
    spec: PathBuf,
    root: PathBuf,
    tail: Arc<Mutex<VecDeque<u8>>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// What it writes goes this way, if that is limited.
    passing: Option<Passing>,
}

impl Running {
    fn start(
        (view, lists): (&Arc<View>, Option<PathBuf>),
        own_program: PathBuf,
        (mut task, pace): (Task, Option<(DiskShare, Handle)>),
        log: &Sender<String>,
    ) -> io::Result<Self> {
        for path in &task.paths {
            crate::sandbox::check_declared(path)?;
        }
        let mut passing = None;
        if let Some((share, runtime)) = pace
            && let Some(to) = task.stdout.take()
        {
            let (writer, started) = Passing::start(to, share, runtime)?;
            task.stdout = Some(writer.into());
            passing = Some(started);
        }
        let number = uuid::Uuid::new_v4().simple().to_string();
        // Beside the directory of the view, which nobody but the holder sees into.
        let (root, spec_path) =
            (view.dir.with_extension(format!("{number}.root")), view.dir.with_extension(number));
        let is_mapped = task.role == Role::MappedRoot;
        let namespace = view.user_namespace.as_raw_fd();
        let spec = Spec {
            root: root.clone(),
            tree: view.dir.join(if is_mapped { "mapped" } else { "host" }),
            lists,
            role: task.role,
            user_namespace: format!("/proc/{}/fd/{namespace}", std::process::id()).into(),
            paths: task.paths,
            work: task.work,
        };
        let text = serde_json::to_vec(&spec)?;
        std::fs::create_dir(&root)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        io::Write::write_all(&mut options.open(&spec_path)?, &text)?;
        let mut unshare =
            program("unshare", ["--mount", "--pid", "--ipc", "--uts", "--kill-child=KILL"]);
        if task.role != Role::Reader {
            // A reader's repository may be anywhere.
            unshare.arg("--net");
        }
        unshare.arg("--").arg(own_program).arg(SUBCOMMAND).arg(&spec_path);
        let mut bound = ends_with_us(&unshare);
        bound.stdin(task.stdin.map_or_else(Stdio::null, Stdio::from)).stderr(Stdio::piped());
        let is_logged = task.stdout.is_none();
        bound.stdout(task.stdout.map_or_else(Stdio::piped, Stdio::from));
        let spawned = view.holder.run(move || bound.spawn())?;
        let mut running = Self {
            child: spawned?,
            spec: spec_path,
            root,
            tail: Arc::default(),
            threads: Vec::new(),
            passing,
        };
        if let Some(stderr) = running.child.stderr.take() {
            running.threads.push(listen(
                stderr,
                log.clone(),
                Some(Arc::clone(&running.tail)),
                task.stderr,
            ));
        }
        if let Some(stdout) = running.child.stdout.take().filter(|_| is_logged) {
            running.threads.push(listen(stdout, log.clone(), None, None));
        }
        Ok(running)
    }

    async fn wait(&mut self, deadline: Option<Instant>) -> Result<ExitStatus> {
        let mut pauses = Pauses::new();
        loop {
            if let Some(status) = self.child.try_wait().map_err(|error| fault(&error))?
                && self.passing.as_ref().is_none_or(Passing::is_over)
            {
                return Ok(status);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(Error::new(Kind::Cancelled, "The command did not end in time."));
            }
            tokio::time::sleep(pauses.next_pause()).await;
        }
    }

    async fn end(mut self, status: ExitStatus) -> Result<CommandEnd> {
        // Everything that could write is gone with its process namespace, so they end when the log
        // has taken their lines.
        let threads = std::mem::take(&mut self.threads);
        let ended = vzdump_core::blocking::run(move || {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            Ok(())
        });
        ended.await.map_err(|error| fault(&error))?;
        if let Some(passing) = self.passing.take() {
            let doing = "Cannot pass on what a command writes.";
            passing.result().map_err(|error| Error::io(doing, error))?;
        }
        let bytes: Vec<u8> =
            self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let stderr_tail = String::from_utf8_lossy(&bytes).into_owned();
        let exit_code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(i32::MAX);
        if exit_code == NOT_BEGUN
            && let Some((_, why)) = stderr_tail.rsplit_once(NOT_BEGUN_PREFIX)
        {
            return Err(fault(&io::Error::other(why.trim().to_owned())));
        }
        Ok(CommandEnd { exit_code, stderr_tail })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its child is told by the kernel, and with that the process namespace ends.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.spec);
        let _ = std::fs::remove_dir(&self.root);
    }
}

/// Takes a command's lines to the log; for the provider the last of them, and all if it wants a copy.
fn listen(
    pipe: impl Read + Send + 'static,
    log: Sender<String>,
    tail: Option<Arc<Mutex<VecDeque<u8>>>>,
    mut copy: Option<StderrCopy>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut lines = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            match lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if let Some(copy) = &mut copy {
                copy.give(&line);
            }
            if let Some(tail) = &tail {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend(&line);
                let over = tail.len().saturating_sub(STDERR_TAIL_BYTES);
                tail.drain(..over);
            }
            // Nobody may be left to read it.
            let _ = log.blocking_send(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    })
}
