//! Updates that meet something else: another update, a guest that boots, reboots or ends, and their own deadline.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{
        PATIENCE,
        hooks::{Hold, Switch},
        lab::Nic,
        proc,
        report::{Report, update_body},
        rig::{self, Rig},
        vm::Vm,
        wait_for,
        wire::Wire,
    },
    native::{guest, probes},
    proto::{MemoryStats, Request},
};

/// Of an update that is held while a guest boots or ends, which may take long.
const HELD_DEADLINE_MS: u64 = 2 * PATIENCE.as_millis() as u64;

/// The second of two updates, and whatever else comes meanwhile, is told at once that it has to wait; the first is not
/// disturbed.
pub(super) fn two_updates_at_once() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    let mut hold = Hold::arm(&vm.dir, "prepare")?;
    let request = update_body(&vm.other_build()?);
    let mut first = vm.api.connect()?;
    first.send("PUT", "vm.update", &request)?;
    hold.wait_held()?;
    let refused = vm.api.put("vm.update", &request)?;
    ensure!(refused.status == 429, "{refused:?}");
    ensure!(refused.causes()?.join(" ").contains("update is under way"), "{refused:?}");
    ensure!(vm.api.put("vm.pause", "")?.status == 429, "a request in the middle of an update");
    ensure!(vm.state()? == "Running", "what changes nothing is served");
    hold.release()?;
    let answer = first.receive()?;
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    ensure!(report.outcome == "updated", "{report:?}");
    vm.note_update();
    drop(hold);
    vm.update()?;
    vm.agent()?.ping()
}

/// Updates one after the other while the guest's kernel boots; so many at most, as they take most of its time.
pub(super) fn guest_boots() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).start()?;
    let started = Instant::now();
    let mut updates = 0;
    while vm.agent()?.wait_ready(Duration::from_millis(50)).is_err() {
        ensure!(started.elapsed() < PATIENCE, "the guest does not come up; {updates} updates so far");
        if updates < 30 {
            vm.update().with_context(|| format!("update {updates}"))?;
            updates += 1;
        }
    }
    ensure!(updates >= 3, "only {updates} updates while the guest booted");
    note(format_args!("{updates} updates in {:?} of booting", started.elapsed()));
    vm.update()?;
    vm.agent()?.ping()
}

/// The guest's driver turns MSI-X on when an update is about to pause it: the eventfds that are made for that go over
/// too.
pub(super) fn driver_probes() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).device(Nic::IgbA, None)?.start()?;
    let (before, old) = (vm.ping()?, vm.vmm()?);
    let mut hold = Hold::arm(&vm.dir, "freeze")?;
    let mut caller = vm.api.connect()?;
    let body = serde_json::json!({ "binary": vm.other_build()?, "deadline_ms": HELD_DEADLINE_MS });
    caller.send("PUT", "vm.update", &body.to_string())?;
    hold.wait_held()?;
    let eventfds = || proc::fds_to(old, "anon_inode:[eventfd]").map(|fds| fds.len());
    let early = eventfds()?;
    vm.agent()?.wait_ready(PATIENCE)?;
    ensure!(eventfds()? >= early + 2, "the driver has not turned MSI-X on while the update was held: {early} eventfds");
    hold.release()?;
    let answer = caller.receive()?;
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    vm.check_updated(&before, &report)?;
    vm.note_update();
    drop(hold);
    let wires = vec![Wire::set_up(Nic::IgbA, vm.agent()?)?];
    Rig { vm, wires }.update_under_traffic()
}

/// What changes the VM's state on one connection, an update on another, at once: each is done, one after the other.
pub(super) fn other_requests() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    let orders = [
        ("vm.pause", "Paused"),
        ("vm.resume", "Running"),
        ("vm.reboot", "Running"),
        ("vm.shutdown", "Shutdown"),
        ("vm.boot", "Running"),
        ("vm.shutdown", "Shutdown"),
    ];
    for (order, state) in orders {
        let before = vm.ping()?;
        let (mut one, mut other) = (vm.api.connect()?, vm.api.connect()?);
        one.send("PUT", order, "")?;
        other.send("PUT", "vm.update", &update_body(&vm.other_build()?))?;
        // Which of them is first is open: the other may be told to wait for the update's end.
        let (ordered, updated) = (one.receive()?, other.receive()?);
        ensure!(ordered.status == 204 || ordered.status == 429, "{order}: {ordered:?}");
        ensure!(updated.status == 200, "{updated:?}");
        vm.note_update();
        ensure!(vm.ping()?.build_id != before.build_id, "not updated");
        if ordered.status == 429 {
            vm.api.order(order)?;
        }
        ensure!(vm.state()? == state, "{order}: {}", vm.info()?);
    }
    let answer = vm.ask_update(&vm.other_build()?)?;
    ensure!(answer.status == 200, "an update of a VM that is shut down: {answer:?}");
    vm.note_update();
    vm.api.order("vm.boot")?;
    ensure!(vm.state()? == "Running", "{}", vm.info()?);
    vm.update()?;
    Ok(())
}

/// A guest that ends itself in the middle of an update has ended: the update says so, and the VMM ends, or boots it
/// again, as without the update. So it is while the update is prepared, and once the API stands still and the vCPUs are
/// about to be stopped.
pub(super) fn guest_ends() -> Result<()> {
    let kernel = std::env::temp_dir().join(format!("ends-{}", std::process::id()));
    guest::write_image(&kernel, &probes::words())?;
    let path = kernel.display().to_string();
    let (off, reset) = (probes::SWITCH_OFF, probes::RESET);
    let cases =
        [("prepare", off, Some(0)), ("freeze", off, Some(0)), ("freeze", reset, Some(3)), ("freeze", reset, None)];
    for (phase, word, code) in cases {
        let ends = code.map_or(&[][..], |_| &["--on-reset", "exit"]);
        let args = [&["--kernel", &path, "--memory", "size=128M", "-v"], ends].concat();
        let mut vm = Vm::with_args(&args)?.booted()?;
        let mut hold = Hold::arm(&vm.dir, phase)?;
        let mut caller = vm.api.connect()?;
        let body = serde_json::json!({ "binary": vm.other_build()?, "deadline_ms": HELD_DEADLINE_MS });
        caller.send("PUT", "vm.update", &body.to_string())?;
        hold.wait_held()?;
        probes::tell(vm.vmm()?, word)?;
        wait_for("the guest to ask", || Ok(vm.log_text().contains("the guest asks").then_some(())))?;
        hold.release()?;
        let answer = caller.receive()?;
        ensure!(answer.status == 200, "{answer:?}");
        let report: Report = answer.json()?;
        let reasons = report.reasons.join(" ");
        ensure!(report.outcome == "rolled_back" && reasons.contains("power-off or reset"), "{report:?}");
        if code.is_some() {
            let status = vm.wait_exit()?;
            ensure!(status.code() == code, "{phase}: {word:#x}: {status}");
            continue;
        }
        drop(hold);
        vm.wait_event("vm rebooted", 1)?;
        ensure!(vm.ping()?.pid == vm.pid(), "another process");
        vm.update()?;
    }
    std::fs::remove_file(&kernel)?;
    Ok(())
}

/// What became of an update with a deadline of its own.
fn update_within(rig: &Rig, deadline_ms: u64) -> Result<Report> {
    let body = serde_json::json!({ "binary": rig.vm.other_build()?, "deadline_ms": deadline_ms });
    let answer = rig.vm.api.put("vm.update", &body.to_string())?;
    ensure!(answer.status == 200, "{answer:?}");
    answer.json()
}

/// The new VMM is ready at about the moment its deadline is over: whoever gets the word, one process runs the guest,
/// and runs it right.
pub(super) fn deadline_race() -> Result<()> {
    rig::shared(|rig| {
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 5 })?;
        let mut outcomes = Vec::new();
        // What the rest of a pause takes here.
        let pause_ms = rig.vm.update()?.pause_us / 1000;
        for round in 0..8 {
            let traffic = rig.traffic()?;
            traffic.moves_on(rig.agent()?, 25)?;
            // From 40 ms before the deadline to 30 ms after it.
            let fault = Switch::with(&rig.vm.dir, "fault", &format!("commit:sleep:{}", 360 + round * 10))?;
            let report = update_within(rig, 400 + pause_ms)?;
            drop(fault);
            ensure!(report.pid == rig.vm.pid(), "{report:?}");
            if report.outcome == "updated" {
                rig.vm.note_update();
            }
            outcomes.push(report.outcome);
            traffic.moves_on(rig.agent()?, 25)?;
            traffic.finish_clean(rig.agent()?)?;
            rig.vm.settled_facts()?;
        }
        let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(memory.pages_wrong == 0, "{memory:?}");
        note(format_args!("{outcomes:?}"));
        ensure!(outcomes.iter().all(|outcome| outcome == "updated" || outcome == "rolled_back"), "{outcomes:?}");
        rig.vm.update()?;
        Ok(())
    })
}

/// Who goes on first once the deadline is over, with the new VMM stopped right before it takes the word.
#[derive(Clone, Copy, Debug, PartialEq)]
enum First {
    /// The old VMM, which was never stopped.
    Old,
    /// The new one, and a stopped old one only after it.
    New,
    /// Both at once.
    Open,
}

/// SIGSTOP between the last look at the deadline and the word, until the deadline has passed: exactly one of the two
/// runs the guest.
pub(super) fn stopped_at_the_word() -> Result<()> {
    // Many times what a new VMM needs to come to the word: one that is killed before it never stops there.
    const DEADLINE_MS: u64 = 5000;
    rig::shared(|rig| {
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 6 })?;
        let mut outcomes = Vec::new();
        let rounds = [First::Old, First::New].into_iter().chain([First::Open; 3]);
        for (round, first) in rounds.enumerate() {
            let traffic = rig.traffic()?;
            traffic.moves_on(rig.agent()?, 25)?;
            let fault = Switch::with(&rig.vm.dir, "fault", "word:stop")?;
            let body = serde_json::json!({ "binary": rig.vm.other_build()?, "deadline_ms": DEADLINE_MS });
            let (old, mut caller) = (rig.vm.vmm()?, rig.vm.api.connect()?);
            caller.send("PUT", "vm.update", &body.to_string())?;
            let new = wait_for("the new VMM to stop", || {
                let newest = rig.vm.vmm()?;
                Ok((newest != old && proc::state(newest)? == 'T').then_some(newest))
            })?;
            if first != First::Old {
                proc::signal(old, libc::SIGSTOP)?;
            }
            std::thread::sleep(Duration::from_millis(DEADLINE_MS + 50));
            // What has ended meanwhile may be reaped already.
            let mut order = [new, old];
            if first == First::Open && round % 2 == 1 {
                order.reverse();
            }
            for (place, pid) in order.into_iter().enumerate() {
                let _ = proc::signal(pid, libc::SIGCONT);
                if first == First::New && place == 0 {
                    wait_for("the new VMM to run the guest", || Ok(rig.agent()?.ping().ok()))?;
                }
            }
            let answer = caller.receive()?;
            drop(fault);
            let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
            ensure!(report.pid == rig.vm.pid(), "{report:?}");
            match report.outcome.as_str() {
                "updated" => rig.vm.note_update(),
                "rolled_back" => {}
                other => anyhow::bail!("{first:?}: {other:?}: {report:?}"),
            }
            outcomes.push((first, report.outcome));
            traffic.moves_on(rig.agent()?, 25)?;
            traffic.finish_clean(rig.agent()?)?;
            rig.vm.settled_facts()?;
        }
        let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(memory.pages_wrong == 0, "{memory:?}");
        note(format_args!("{outcomes:?}"));
        let certain = [(First::Old, "rolled_back".to_owned()), (First::New, "updated".to_owned())];
        ensure!(outcomes[..2] == certain, "{outcomes:?}");
        rig.vm.update()?;
        Ok(())
    })
}

/// Deadlines that vCPUs cannot keep: each update is given up at once, and what a late vCPU still does confuses no later
/// one.
pub(super) fn short_deadlines() -> Result<()> {
    const ROUNDS: u64 = 24;
    rig::shared(|rig| {
        let traffic = rig.traffic()?;
        let (mut late, mut longest) = (0, 0);
        for round in 0..ROUNDS {
            let report = update_within(rig, 1 + round % 3)?;
            ensure!(report.outcome == "rolled_back", "{report:?}");
            late += usize::from(report.reasons.join(" ").contains("did not stop"));
            longest = report.pause_us.max(longest);
        }
        note(format_args!("vCPUs were late {late} times of {ROUNDS}; the longest pause {longest} us"));
        ensure!(longest < 60_000_000, "the guest stood still for {longest} us");
        traffic.moves_on(rig.agent()?, 25)?;
        rig.vm.update()?;
        traffic.moves_on(rig.agent()?, 25)?;
        traffic.finish_clean(rig.agent()?)?;
        Ok(())
    })
}
