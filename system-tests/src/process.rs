// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs programs with a time limit and ends what was started, whatever happens.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How often a wait looks again.
pub const POLL_EVERY: Duration = Duration::from_millis(20);
/// What a program may take to clean up when it is asked to end.
const GRACE: Duration = Duration::from_secs(20);
/// How much output of one program is kept.
const OUTPUT_LIMIT_BYTES: usize = 16 << 20;
/// How much of a failed program's output is shown.
const SHOWN_BYTES: usize = 2000;

/// A request to stop everything (somebody pressed Ctrl-C); every wait looks at it.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks every wait that holds a clone of this to end with an error.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether a stop was requested.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Fails once a stop was requested.
    ///
    /// # Errors
    /// A stop was requested.
    pub fn check(&self) -> Result<()> {
        if self.is_requested() {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Calls `ready` until it returns a value.
    ///
    /// # Errors
    /// A stop was requested, `ready` failed, or `what` did not happen in time.
    pub fn wait_for<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(value) = ready()? {
                return Ok(value);
            }
            self.check()?;
            if Instant::now() >= deadline {
                bail!("{what}: not within {} s", timeout.as_secs());
            }
            std::thread::sleep(POLL_EVERY);
        }
    }
}

/// A child process that is killed and reaped when dropped.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
    name: String,
}

impl Guarded {
    /// Starts a program.
    ///
    /// # Errors
    /// It cannot be started; the text says which Debian package has it where that is known.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        match command.spawn() {
            Ok(child) => Ok(Self { child, name }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let program = name.rsplit('/').next().unwrap_or(&name);
                bail!("{name} is missing{}", advice(program))
            }
            Err(error) => Err(error).with_context(|| format!("cannot start {name}")),
        }
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status once the process has ended.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// It did not end in time, or a stop was requested.
    pub fn wait(&mut self, timeout: Duration, stop: &Stop) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        stop.wait_for(&what, timeout, || self.try_wait())
    }

    /// Waits until the process stands still, as it does after SIGSTOP.
    ///
    /// # Errors
    /// It ended, it did not stop in time, or a stop of the test was requested.
    pub fn wait_until_stopped(&self, timeout: Duration, stop: &Stop) -> Result<()> {
        let stat = format!("/proc/{}/stat", self.id());
        stop.wait_for(&format!("{} to stand still", self.name), timeout, || {
            let text = std::fs::read_to_string(&stat).with_context(|| stat.clone())?;
            let state = text.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            ensure!(state != Some('Z'), "{} ended before it stood still", self.name);
            Ok((state == Some('T')).then_some(()))
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail only when the process has been reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails unless the program ended with 0; `what` names it.
    ///
    /// # Errors
    /// The program failed; the text carries the end of what it printed.
    pub fn success(self, what: &str) -> Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        let how = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        let said = tail(if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr });
        bail!("{what} failed ({how}): {said}")
    }
}

/// A started program whose output is being collected. A test that fails while it runs shows what it said.
#[derive(Debug)]
pub struct Collected {
    guarded: Guarded,
    stdout: Pipe,
    stderr: Pipe,
}

impl Collected {
    /// Starts a program without input and collects what it prints.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut guarded = Guarded::spawn(command)?;
        let stdout = Pipe::collect(guarded.child.stdout.take());
        let stderr = Pipe::collect(guarded.child.stderr.take());
        Ok(Self { guarded, stdout, stderr })
    }

    /// The process, to signal it.
    pub fn process(&mut self) -> &mut Guarded {
        &mut self.guarded
    }

    /// Waits for the end of the program.
    ///
    /// # Errors
    /// It did not end in time, or a stop was requested; it is asked to end then, and killed when
    /// it does not.
    pub fn finish(mut self, timeout: Duration, stop: &Stop) -> Result<Finished> {
        let waited = self.guarded.wait(timeout, stop);
        if waited.is_err() {
            // Both fail only when the program is gone or hangs: dropping it kills it.
            let _ = self.guarded.signal(rustix::process::Signal::TERM);
            let _ = self.guarded.wait(GRACE, &Stop::default());
        }
        let status = waited.with_context(|| self.said())?;
        // A grandchild that inherited the pipes must not keep us here.
        let deadline = Instant::now() + Duration::from_secs(5);
        while !(self.stdout.thread.is_finished() && self.stderr.thread.is_finished()) {
            if Instant::now() >= deadline {
                bail!("{} ended but something it started keeps its output open", self.guarded.name);
            }
            std::thread::sleep(POLL_EVERY);
        }
        Ok(Finished { status, stdout: self.stdout.text(), stderr: self.stderr.text() })
    }

    /// The end of what it has said so far.
    fn said(&self) -> String {
        let [stdout, stderr] = [self.stdout.text(), self.stderr.text()];
        format!("{} said: {}\n{}", self.guarded.name, tail(&stdout), tail(&stderr))
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.said());
        }
    }
}

/// One end of a pipe that is read by a thread of its own.
#[derive(Debug)]
struct Pipe {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Pipe {
    fn collect(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&bytes);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            let Some(mut pipe) = pipe else { return };
            loop {
                let length = match pipe.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => return,
                    Ok(length) => length,
                };
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                // What is beyond the limit is read and dropped, so that the program never blocks on it.
                let length = length.min(OUTPUT_LIMIT_BYTES.saturating_sub(kept.len()));
                kept.extend(buffer.iter().take(length));
            }
        });
        Self { bytes, thread }
    }

    /// What was read so far.
    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Runs a program to its end and fails unless it succeeds.
///
/// # Errors
/// It is missing, failed, or did not end in time.
pub fn run(command: &mut Command, timeout: Duration, stop: &Stop) -> Result<String> {
    let what = command.get_program().to_string_lossy().into_owned();
    Ok(Collected::spawn(command)?.finish(timeout, stop)?.success(&what)?.stdout)
}

/// The end of a text, for error messages.
#[must_use]
pub fn tail(text: &str) -> &str {
    let text = text.trim_end();
    let mut from = text.len().saturating_sub(SHOWN_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

fn advice(program: &str) -> String {
    let package = match program {
        "apt-get" | "apt-cache" => "apt",
        "dpkg-deb" => "dpkg",
        "ldd" => "libc-bin",
        "xz" => "xz-utils",
        "qemu-img" | "qemu-system-x86_64" => return "; run ./x qemu first".into(),
        _ => return String::new(),
    };
    format!("; it comes with the Debian package {package}: run ./x setup")
}
