// SPDX-License-Identifier: MIT OR Apache-2.0
//! The freeze guard: a small child process that freezes a guest's file systems and thaws them,
//! whatever becomes of the task that asked for it.
//!
//! The guard, not the task, holds the agent's connection for the whole time, so there is no moment
//! in which only a dead or hanging task could thaw. It thaws when it is asked to, when its
//! standard input closes (the task ended, however), when it gets a signal, and when its deadline
//! passes. Should the guard itself die, the task thaws.
//!
//! An agent does one thing after the other: while it freezes it does not answer, and may be done with
//! that long after everybody has given it up. So the guard of a freeze that is in doubt says so
//! (`stuck`) and goes on until the agent answers, QEMU ends or a day has passed.
//!
//! ```text
//!  task                      guard                       agent
//!   │ spawn ───────────────────►│ ping, status, freeze ────►│
//!   │◄─────────── "frozen 2 35" │                           │
//!   │ (point in time)           │                           │
//!   │ "thaw" ──────────────────►│ thaw ────────────────────►│
//!   │◄──── "thawed asked 2 812" │                           │
//! ```

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use qmp_client::Error;
use qmp_client::agent::{Agent, AgentOptions, FreezeStatus};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::tpm_guard;
use crate::job::chain;
use crate::task_log::clean;

/// The hidden subcommand that runs [`run_guard`].
pub const SUBCOMMAND: &str = "__thaw-guard";
const THAW_ATTEMPTS: u32 = 3;
/// How long an agent that does not answer is waited for by the guard alone.
const STUCK_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// What the guard may take for anything beside the agent's own limits.
const MARGIN: Duration = Duration::from_secs(10);
/// For a line that the guard has written already.
const AT_ONCE: Duration = Duration::from_millis(100);
/// Begins the guard's lines, so that nothing else on its output is taken for one.
const PREFIX: &str = "thaw-guard: ";

/// Bounds of all that has to do with a freeze.
#[derive(Debug, Clone, Copy)]
pub struct FreezeLimits {
    /// The longest a guest stays frozen, whatever the task does.
    pub hold: Duration,
    /// An agent that works answers at once.
    pub ping: Duration,
    /// Freezing runs the guest's own hooks and writes its caches out.
    pub freeze: Duration,
    /// For one of three attempts to thaw.
    pub thaw: Duration,
}

impl Default for FreezeLimits {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(30),
            ping: Duration::from_secs(3),
            freeze: Duration::from_secs(60),
            thaw: Duration::from_secs(20),
        }
    }
}

impl FreezeLimits {
    fn to_args(self) -> [String; 4] {
        [self.hold, self.ping, self.freeze, self.thaw].map(|limit| limit.as_millis().to_string())
    }

    fn parse(args: &[OsString]) -> Option<Self> {
        let [hold, ping, freeze, thaw] = args else { return None };
        let limit = |text: &OsString| text.to_str()?.parse().ok().map(Duration::from_millis);
        Some(Self {
            hold: limit(hold)?,
            ping: limit(ping)?,
            freeze: limit(freeze)?,
            thaw: limit(thaw)?,
        })
    }
}

/// How the guard's process is started.
#[derive(Debug, Clone)]
pub struct GuardCommand {
    /// The program.
    pub program: PathBuf,
    /// Arguments in front of the guard's own.
    pub args: Vec<OsString>,
}

impl GuardCommand {
    /// This program with its hidden subcommand.
    ///
    /// # Errors
    /// The path of this program is not known.
    pub fn own_program() -> io::Result<Self> {
        Ok(Self { program: std::env::current_exe()?, args: vec![SUBCOMMAND.into()] })
    }
}

/// What the guard tells the task.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Report {
    /// The guest is frozen.
    Frozen { file_systems: u32 },
    /// It is not, and stays so.
    Failed { why: String },
    /// It is thawed again.
    Thawed { cause: Cause, held_ms: u64 },
    /// It may be frozen, or be so in a moment. The guard goes on if that is of use.
    Stuck { why: String },
}

/// Why the guard thawed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Asked,
    Alone,
    Deadline,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Frozen { file_systems } => write!(f, "{PREFIX}frozen {file_systems}"),
            Self::Failed { why } => write!(f, "{PREFIX}failed {why}"),
            Self::Thawed { cause, held_ms } => {
                let cause = match cause {
                    Cause::Asked => "asked",
                    Cause::Alone => "alone",
                    Cause::Deadline => "deadline",
                };
                write!(f, "{PREFIX}thawed {cause} {held_ms}")
            }
            Self::Stuck { why } => write!(f, "{PREFIX}stuck {why}"),
        }
    }
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(PREFIX)?.1.split_once(' ')?;
        Some(match word {
            "frozen" => Self::Frozen { file_systems: rest.parse().ok()? },
            "failed" => Self::Failed { why: rest.to_owned() },
            "stuck" => Self::Stuck { why: rest.to_owned() },
            "thawed" => {
                let (cause, held_ms) = rest.split_once(' ')?;
                let cause = match cause {
                    "asked" => Cause::Asked,
                    "alone" => Cause::Alone,
                    "deadline" => Cause::Deadline,
                    _ => return None,
                };
                Self::Thawed { cause, held_ms: held_ms.parse().ok()? }
            }
            _ => return None,
        })
    }
}

/// A guest that is frozen, and its guard. Dropping it makes the guard thaw.
#[derive(Debug)]
pub struct Frozen {
    guard: Guard,
    limits: FreezeLimits,
    file_systems: u32,
    since: Instant,
}

/// A freeze that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFrozen {
    /// Whether it is certain that nothing is frozen, or will be.
    pub is_thawed: bool,
    /// Why, in words.
    pub why: String,
}

/// How a freeze ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thawed {
    /// Whether it is certain that nothing is frozen any more.
    pub is_thawed: bool,
    /// How long the guest was frozen.
    pub held_ms: Option<u64>,
    /// What did not go as it should.
    pub trouble: Option<String>,
}

/// A guard's process.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) child: Child,
    /// Closing it makes the guard undo what it guards.
    pub(super) stdin: Option<ChildStdin>,
    lines: Lines<BufReader<tokio::io::Take<ChildStdout>>>,
}

/// Freezes a guest through a guard.
///
/// # Errors
/// Why the guest is not frozen, and whether that is certain. If it is not, its guard may still be at it.
pub async fn freeze(
    command: &GuardCommand,
    agent_socket: &Path,
    limits: FreezeLimits,
) -> Result<Frozen, NotFrozen> {
    let certain = |why: String| NotFrozen { is_thawed: true, why };
    let doubtful = |why: String| NotFrozen { is_thawed: false, why };
    let limits_args = limits.to_args();
    let args = [agent_socket.as_os_str()].into_iter().chain(limits_args.iter().map(OsStr::new));
    let mut guard = Guard::spawn(command, args)
        .map_err(|error| certain(format!("cannot start the freeze guard: {error}")))?;
    let limit = AgentOptions::default().connect_timeout
        + limits.ping * 2
        + limits.freeze
        + limits.thaw
        + MARGIN;
    match timeout(limit, guard.report(Report::parse)).await {
        Ok(Some(Report::Frozen { file_systems })) => {
            Ok(Frozen { guard, limits, file_systems, since: Instant::now() })
        }
        Ok(Some(Report::Failed { why })) => Err(certain(why)),
        Ok(Some(Report::Stuck { why })) => Err(doubtful(why)),
        Ok(Some(Report::Thawed { .. })) => Err(certain("the freeze guard gave up".to_owned())),
        Ok(None) => {
            // It may have died after freezing.
            Err(match thaw_directly(agent_socket, limits).await {
                Ok(()) => certain("the freeze guard ended".to_owned()),
                Err(error) => {
                    doubtful(format!("the freeze guard ended, and thawing failed: {error}"))
                }
            })
        }
        Err(_) => Err(doubtful("the guest agent did not freeze in time".to_owned())),
    }
}

impl Frozen {
    /// How many file systems are frozen.
    pub fn file_systems(&self) -> u32 {
        self.file_systems
    }

    /// Thaws.
    pub async fn thaw(mut self, agent_socket: &Path) -> Thawed {
        if let Some(mut stdin) = self.guard.stdin.take() {
            // A guard that is gone shows below.
            let _ = stdin.write_all(b"thaw\n").await;
        }
        let limit = self.limits.thaw * THAW_ATTEMPTS + MARGIN;
        let mut report = timeout(limit, self.guard.report(Report::parse)).await;
        // It may have been said long ago, and the guest be thawed since.
        while matches!(report, Ok(Some(Report::Stuck { .. }))) {
            match timeout(AT_ONCE, self.guard.report(Report::parse)).await {
                Ok(Some(next)) => report = Ok(Some(next)),
                Ok(None) | Err(_) => break,
            }
        }
        let held = || u64::try_from(self.since.elapsed().as_millis()).ok();
        match report {
            Ok(Some(Report::Thawed { cause, held_ms })) => Thawed {
                is_thawed: true,
                held_ms: Some(held_ms),
                trouble: (cause != Cause::Asked).then(|| {
                    format!("the guest was thawed before the point in time, after {held_ms} ms")
                }),
            },
            Ok(Some(Report::Stuck { why })) => Thawed {
                is_thawed: false,
                held_ms: held(),
                trouble: Some(format!("THE GUEST MAY STILL BE FROZEN: {why}")),
            },
            // The guard is gone or hangs: its connection is free, or its deadline will pass.
            Ok(_) | Err(_) => match thaw_directly(agent_socket, self.limits).await {
                Ok(()) => Thawed {
                    is_thawed: true,
                    held_ms: held(),
                    trouble: Some("the freeze guard was lost".to_owned()),
                },
                Err(error) => Thawed {
                    is_thawed: false,
                    held_ms: held(),
                    trouble: Some(format!("THE GUEST MAY STILL BE FROZEN: {error}")),
                },
            },
        }
    }
}

impl Guard {
    /// Starts a guard with these arguments.
    pub(super) fn spawn<I: AsRef<OsStr>>(
        command: &GuardCommand,
        args: impl IntoIterator<Item = I>,
    ) -> io::Result<Self> {
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Out of reach of a Ctrl-C in the task's terminal.
            .process_group(0)
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
        // Its reports are short; what is longer is none.
        let lines = BufReader::new(stdout.take(64 << 10)).lines();
        Ok(Self { child, stdin, lines })
    }

    /// The next line that is a report; `None` if the guard ended.
    pub(super) async fn report<R>(&mut self, parse: impl Fn(&str) -> Option<R>) -> Option<R> {
        while let Ok(Some(line)) = self.lines.next_line().await {
            if let Some(report) = parse(&line) {
                return Some(report);
            }
        }
        // It is a zombie or about to be.
        let _ = timeout(MARGIN, self.child.wait()).await;
        None
    }
}

/// Thaws a guest if it is frozen, without a guard.
///
/// # Errors
/// Why the guest may still be frozen, in words.
pub async fn thaw_directly(agent_socket: &Path, limits: FreezeLimits) -> Result<(), String> {
    let agent = connect(agent_socket, limits).await.map_err(|error| chain(&error))?;
    let status = agent.fsfreeze_status().await.map_err(|error| chain(&error))?;
    if status == FreezeStatus::Thawed {
        return Ok(());
    }
    thaw(&agent).await.map_err(|error| chain(&error))
}

async fn connect(agent_socket: &Path, limits: FreezeLimits) -> Result<Agent, Error> {
    let options = AgentOptions {
        command_timeout: limits.ping,
        freeze_timeout: limits.freeze,
        thaw_timeout: limits.thaw,
        ..AgentOptions::default()
    };
    Agent::connect(agent_socket, options).await
}

async fn thaw(agent: &Agent) -> Result<(), Error> {
    let mut last = Ok(());
    for _ in 0..THAW_ATTEMPTS {
        match thaw_once(agent).await {
            Ok(()) => return Ok(()),
            Err(error) => last = Err(error),
        }
    }
    last
}

async fn thaw_once(agent: &Agent) -> Result<(), Error> {
    match agent.fsfreeze_thaw().await {
        // One that refuses because there is nothing to thaw.
        Err(error @ Error::Qmp { .. }) => match agent.fsfreeze_status().await {
            Ok(FreezeStatus::Thawed) => Ok(()),
            _ => Err(error),
        },
        other => other.map(drop),
    }
}

/// Thaws for the guard: says that the guest may be frozen after `patience` attempts, and goes on while
/// the agent does not answer.
async fn thaw_at_last(agent: &Agent, patience: u32, pause: Duration) -> Result<(), String> {
    let begin = Instant::now();
    let (mut attempt, mut refusals) = (0, 0);
    loop {
        attempt += 1;
        let Err(error) = thaw_once(agent).await else { return Ok(()) };
        let why = clean(&chain(&error));
        let is_over = match error {
            // QEMU has ended.
            Error::Disconnected => true,
            // It answers, and is left to the administrator.
            Error::Qmp { .. } => {
                refusals += 1;
                refusals >= THAW_ATTEMPTS
            }
            _ => begin.elapsed() >= STUCK_LIMIT,
        };
        if is_over {
            return Err(why);
        }
        if attempt == patience {
            say(&Report::Stuck { why });
        }
        if attempt >= patience {
            tokio::time::sleep(pause).await;
        }
    }
}

/// Runs the guard: `args` are the agent's socket and the [`FreezeLimits`] in milliseconds. Ends when
/// the guest is thawed. The guard of a TPM, too, which begins with a word of its own.
pub async fn run_guard(args: &[OsString]) -> ExitCode {
    if let Some((_, rest)) = args.split_first().filter(|(first, _)| *first == tpm_guard::WORD) {
        return tpm_guard::run(rest).await;
    }
    let parsed = args.split_first().and_then(|(socket, limits)| {
        FreezeLimits::parse(limits).map(|limits| (PathBuf::from(socket), limits))
    });
    let Some((socket, limits)) = parsed else {
        return ExitCode::from(2);
    };
    let report = guard(&socket, limits).await;
    say(&report);
    match report {
        Report::Thawed { .. } | Report::Failed { .. } => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

async fn guard(socket: &Path, limits: FreezeLimits) -> Report {
    let failed = |why: String| Report::Failed { why: clean(&why) };
    let agent = match connect(socket, limits).await {
        Ok(agent) => agent,
        Err(error) => return failed(chain(&error)),
    };
    match agent.fsfreeze_status().await {
        Ok(FreezeStatus::Thawed) => {}
        Ok(_) => return failed("the guest is frozen already, by somebody else".to_owned()),
        Err(error) => return failed(chain(&error)),
    }
    // Set up before the freeze, so that nothing can end the guard from then on.
    let mut stop = match Stop::new() {
        Ok(stop) => stop,
        Err(error) => return failed(format!("signals: {error}")),
    };
    let file_systems = match agent.fsfreeze_freeze().await {
        Ok(count) => count,
        Err(error) => {
            // It may be frozen all the same, or be so in a moment.
            return match thaw_at_last(&agent, 1, limits.ping).await {
                Ok(()) => failed(chain(&error)),
                Err(why) => Report::Stuck { why },
            };
        }
    };
    let since = Instant::now();
    say(&Report::Frozen { file_systems });
    let cause = tokio::select! {
        cause = stop.wait() => cause,
        () = tokio::time::sleep(limits.hold) => Cause::Deadline,
    };
    let thawed = thaw_at_last(&agent, THAW_ATTEMPTS, limits.ping).await;
    let held_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    match thawed {
        Ok(()) => Report::Thawed { cause, held_ms },
        Err(why) => Report::Stuck { why },
    }
}

/// Whether anybody still reads it does not matter. A line fits into the pipe, so it cannot block.
fn say(report: &Report) {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{report}").and_then(|()| stdout.flush());
}

/// All that ends the wait of a guard before its deadline.
struct Stop {
    /// Not tokio's standard input: its blocked thread would keep the program from ending.
    stdin: pipe::Receiver,
    term: tokio::signal::unix::Signal,
    hup: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Self {
            stdin: pipe::Receiver::from_owned_fd(stdin)?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) -> Cause {
        let mut line = [0; 5];
        tokio::select! {
            read = self.stdin.read_exact(&mut line) => match read {
                Ok(_) if &line == b"thaw\n" => Cause::Asked,
                _ => Cause::Alone,
            },
            _ = self.term.recv() => Cause::Alone,
            _ = self.hup.recv() => Cause::Alone,
            _ = self.int.recv() => Cause::Alone,
        }
    }
}
