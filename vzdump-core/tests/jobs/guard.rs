// SPDX-License-Identifier: MIT OR Apache-2.0
//! The freeze guard: whatever happens, the guest thaws.

use std::process::Stdio;
use std::time::{Duration, Instant};

use vzdump_core::job::run_backup;
use vzdump_core::task_log::{Level, Progress, TaskSink};
use vzdump_core::vm::freeze_guard::{FreezeLimits, freeze, thaw_directly};

use crate::agent::{Does, FakeAgent};
use crate::peer::Reaction;
use crate::provider::Script;
use crate::world::{ID, World, own_command};

fn world(does: Does) -> (World, FakeAgent) {
    let mut world = World::with("agent: 1\n", Script::default());
    if does != Does::Everything && does != Does::RefusesFreeze {
        let brief = Duration::from_millis(300);
        let limits = FreezeLimits { ping: brief, freeze: brief, thaw: brief, ..Default::default() };
        world.ctx.limits.freeze = limits;
    }
    let agent = FakeAgent::start(&world.ctx.layout.agent_socket(ID), does);
    (world, agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_point_in_time_is_taken_while_the_guest_is_frozen() {
    let (world, agent) = world(Does::Everything);
    let agent = std::sync::Arc::new(agent);
    let seen = std::sync::Arc::clone(&agent);
    world.peer.script(move |_, name| {
        if name == "backup-access-setup" {
            assert!(seen.is_frozen(), "setup without a freeze");
        }
        Reaction::Answer
    });
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(!agent.is_frozen());
    assert!(report.point_in_time.freeze_ms.is_some());
    assert_eq!(report.point_in_time.freeze, "2 file systems frozen");
    let text = world.sink.text();
    assert!(text.contains("issuing guest-agent 'fs-freeze' command"), "{text}");
    assert!(text.contains("issuing guest-agent 'fs-thaw' command"), "{text}");
}

/// Looks whether the guest is frozen whenever a line is written.
struct Watcher<'a>(&'a FakeAgent, std::sync::Mutex<Vec<String>>);

impl TaskSink for Watcher<'_> {
    fn line(&self, _level: Level, text: &str) {
        if self.0.is_frozen() {
            self.1.lock().unwrap().push(text.to_owned());
        }
    }
    fn progress(&self, _progress: &Progress) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_while_the_guest_is_frozen() {
    let (world, agent) = world(Does::Everything);
    let watcher = Watcher(&agent, std::sync::Mutex::default());
    let World { ctx, provider, options, cancel, .. } = &world;
    let report = run_backup(ctx, &[ID], provider, options, &watcher, cancel).await;
    assert!(report.is_success(), "{report:?}");
    assert!(agent.log().iter().any(|command| command == "guest-fsfreeze-freeze"));
    assert_eq!(*watcher.1.lock().unwrap(), Vec::<String>::new(), "written while frozen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_setup_thaws() {
    let (world, agent) = world(Does::Everything);
    world.peer.script(|_, name| {
        if name == "backup-access-setup" { Reaction::Refuse } else { Reaction::Answer }
    });
    assert!(!world.backup().await.is_success());
    assert!(!agent.is_frozen());
    assert_eq!(agent.log().last().map(String::as_str), Some("guest-fsfreeze-thaw"));
    world.assert_clean("setup failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_freeze_is_thawed_and_the_backup_goes_on() {
    let (world, agent) = world(Does::RefusesFreeze);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(!agent.is_frozen());
    assert!(report.point_in_time.freeze.starts_with("not frozen: "), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_there_does_not_stop_the_backup() {
    let world = World::with("agent: 1\n", Script::default());
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(world.sink.text().contains("WARN: guest-agent 'fs-freeze' failed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_freeze_thaws() {
    let (world, agent) = world(Does::Everything);
    let socket = world.ctx.layout.agent_socket(ID);
    let frozen = freeze(&world.ctx.guard, &socket, FreezeLimits::default()).await.unwrap();
    assert!(agent.is_frozen());
    drop(frozen);
    agent.wait_for(false).await;
    // The guard is gone, so its connection is free again.
    thaw_directly(&socket, FreezeLimits::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_thaws_although_nobody_asks() {
    let (world, agent) = world(Does::Everything);
    let mut child = own_command("guard_entry")
        .arg(world.ctx.layout.agent_socket(ID))
        .args(["50", "3000", "3000", "3000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    agent.wait_for(true).await;
    agent.wait_for(false).await;
    // It ends by itself although its input stays open.
    let _stdin = child.stdin.take();
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_job_leaves_no_frozen_guest() {
    let (world, agent) = world(Does::Everything);
    let child = world.spawn_child(crate::provider::Commit::Works);
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    world.peer.script(move |_, name| {
        if name == "backup-access-setup" {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            return Reaction::Silent;
        }
        Reaction::Answer
    });
    let mut child = child;
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    agent.wait_for(false).await;
    world.peer.unscript();
    assert_eq!(world.recover().await, [], "{}", world.sink.text());
    world.assert_clean("killed while frozen");
}

/// Longer than all that an agent is given in these tests, shorter than without its limits.
const BOUND: Duration = Duration::from_secs(25);

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_silent_costs_a_ping_and_not_the_backup() {
    let (world, agent) = world(Does::Nothing);
    let began = Instant::now();
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(report.point_in_time.freeze.contains("did not answer"), "{report:?}");
    assert_eq!(report.point_in_time.freeze_ms, None);
    assert!(!agent.log().iter().any(|command| command == "guest-fsfreeze-freeze"));
    assert!(began.elapsed() < BOUND);
    world.assert_clean("silent agent");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_in_the_freeze_is_thawed_and_the_backup_goes_on() {
    let (world, agent) = world(Does::HangsInFreeze);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(report.point_in_time.freeze.starts_with("not frozen: "), "{report:?}");
    agent.wait_for(false).await;
    assert!(agent.log().iter().any(|command| command == "guest-fsfreeze-thaw"));
    world.assert_clean("hanging freeze");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_while_frozen_is_reported_and_the_backup_goes_on() {
    let (world, agent) = world(Does::DiesFrozen);
    let began = Instant::now();
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(agent.is_frozen(), "nobody could thaw it");
    let text = world.sink.text();
    assert!(text.contains("WARN: THE GUEST MAY STILL BE FROZEN"), "{text}");
    assert!(report.point_in_time.freeze.contains("THE GUEST MAY STILL BE FROZEN"), "{report:?}");
    assert!(began.elapsed() < BOUND);
    assert!(report.warnings.iter().any(|text| text.contains("may be frozen")), "{report:?}");
    // The next task of the guest tries again, and is not kept from its work.
    assert_eq!(world.journals().len(), 1);
    assert_eq!(world.recover().await, []);
    assert!(world.sink.text().contains("WARN: whether VM 100 is thawed is not known"));
    world.assert_clean("dead agent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_that_comes_when_it_was_given_up_is_thawed() {
    let (world, agent) = world(Does::FreezesLate);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    let words = &report.point_in_time.freeze;
    assert!(words.starts_with("THE GUEST MAY BE FROZEN: "), "{words}");
    assert!(report.warnings.iter().any(|text| text.contains("may be frozen")), "{report:?}");
    assert_eq!(world.journals().len(), 1, "nobody would look at it again");
    // The guard alone is left to do it, when the agent has done what came first.
    while !agent.log().iter().any(|command| command == "guest-fsfreeze-thaw") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    agent.wait_for(false).await;
    assert_eq!(world.recover().await, [], "{}", world.sink.text());
    world.assert_clean("late freeze");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_back_thaws() {
    let (world, agent) = world(Does::ThawsLate);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(!agent.is_frozen());
    assert!(report.point_in_time.freeze_ms.is_some_and(|ms| ms >= 300), "{report:?}");
    let text = world.sink.text();
    assert!(text.contains("INFO: guest file systems were frozen for"), "{text}");
    assert!(!text.contains("STILL BE FROZEN"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_was_at_a_loss_goes_on_and_is_asked_what_came_of_it() {
    let (world, agent) = world(Does::ThawsAfterAnError);
    let socket = world.ctx.layout.agent_socket(ID);
    let hold = Duration::from_millis(50);
    let limits = FreezeLimits { hold, ..world.ctx.limits.freeze };
    let frozen = freeze(&world.ctx.guard, &socket, limits).await.unwrap();
    agent.wait_for(false).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let thawed = frozen.thaw(&socket).await;
    assert!(thawed.is_thawed, "{thawed:?}");
    assert!(thawed.trouble.unwrap().contains("thawed before the point in time"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_can_be_switched_off_by_the_job_or_the_guest() {
    for (lines, freeze, why) in [
        ("agent: 1\n", false, "it is disabled"),
        ("agent: 1,freeze-fs=0\n", true, "disabled in VM options"),
        ("agent: enabled=1,freeze-fs-on-backup=0\n", true, "disabled in VM options"),
        ("agent: 0\n", true, "agent not configured in VM options"),
    ] {
        let mut world = World::with(lines, Script::default());
        world.options.freeze = freeze;
        let agent = FakeAgent::start(&world.ctx.layout.agent_socket(ID), Does::Everything);
        let report = world.backup().await;
        assert!(report.is_success(), "{}", world.sink.text());
        assert_eq!(report.point_in_time.freeze, format!("not frozen: {why}"), "{lines}");
        let line = format!("INFO: skipping guest-agent 'fs-freeze', {why}");
        assert!(world.sink.text().contains(&line), "{}", world.sink.text());
        assert_eq!(agent.log(), Vec::<String>::new(), "{lines}");
    }
}
