//! Updates that meet something else: another update, a guest that boots, reboots or ends, and their own deadline.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::note,
    harness::{
        hooks::Switch,
        rig::{self, Rig},
        vm::{Report, Vm, update_body},
        wait_for,
    },
    proto::{MemoryStats, Request},
};

/// Holds the next update in its prepare phase for that many seconds, with the guest running.
fn slow_prepare(vm_dir: &Path, seconds: u32) -> Result<Switch> {
    Switch::with(vm_dir, "fault", &format!("prepare:hang:{seconds}"))
}

/// The second of two updates, and whatever else comes meanwhile, is told at once that it has to wait; the first is not disturbed.
pub fn two_updates_at_once() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    let slow = slow_prepare(&vm.dir, 2)?;
    let request = update_body(&vm.other_build()?);
    let mut first = vm.api.connect()?;
    first.send("PUT", "vm.update", &request)?;
    // The first has been taken up once somebody else is refused.
    let refused = wait_for("another request to be refused", Duration::from_secs(10), || {
        let answer = vm.api.put("vm.update", &request)?;
        Ok((answer.status == 429).then_some(answer))
    })?;
    drop(slow);
    ensure!(refused.causes()?.join(" ").contains("update is under way"), "{refused:?}");
    ensure!(vm.api.get("vm.info")?.status == 429, "a request in the middle of an update");
    vm.agent()?.ping()?;
    let answer = first.receive()?;
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    ensure!(report.outcome == "updated", "{report:?}");
    vm.note_update();
    vm.update()?;
    vm.agent()?.ping()
}

/// Updates all the time while the guest's kernel boots.
pub fn guest_boots() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).start()?;
    let started = Instant::now();
    let mut updates = 0;
    while vm.agent()?.wait_ready(Duration::from_millis(50)).is_err() {
        ensure!(started.elapsed() < Duration::from_secs(180), "the guest does not come up; {updates} updates so far");
        vm.update().with_context(|| format!("update {updates}"))?;
        updates += 1;
    }
    ensure!(updates >= 3, "only {updates} updates while the guest booted");
    note(format_args!("{updates} updates in {:?} of booting", started.elapsed()));
    vm.update()?;
    vm.agent()?.ping()
}

/// vm.reboot and vm.shutdown on one connection, an update on another, at once: each is done, one after the other.
pub fn reboot_and_shutdown() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    for order in ["vm.reboot", "vm.shutdown"] {
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
        ensure!(vm.state()? == if order == "vm.reboot" { "Running" } else { "Shutdown" }, "{order}: {}", vm.info()?);
    }
    let answer = vm.ask_update(&vm.other_build()?)?;
    ensure!(answer.status == 200, "an update of a VM that is shut down: {answer:?}");
    vm.note_update();
    vm.api.order("vm.boot")?;
    ensure!(vm.state()? == "Running", "{}", vm.info()?);
    vm.update()?;
    Ok(())
}

/// A guest that ends itself in the middle of an update has ended: the update says so, and the VMM ends as without it.
pub fn guest_ends() -> Result<()> {
    for (request, code) in [(Request::PowerOff, 0), (Request::Reboot, 3)] {
        let mut vm = Vm::builder().boot()?;
        let _slow = slow_prepare(&vm.dir, 4)?;
        let mut caller = vm.api.connect()?;
        caller.send("PUT", "vm.update", &update_body(&vm.other_build()?))?;
        vm.agent()?.call::<()>(&request)?;
        let answer = caller.receive()?;
        ensure!(answer.status == 200, "{answer:?}");
        let report: Report = answer.json()?;
        let reasons = report.reasons.join(" ");
        ensure!(report.outcome == "rolled_back" && reasons.contains("power-off or reset"), "{report:?}");
        let status = vm.wait_exit(Duration::from_secs(30))?;
        ensure!(status.code() == Some(code), "{request:?}: {status}");
    }
    Ok(())
}

/// What became of an update with a deadline of its own.
fn update_within(rig: &Rig, deadline_ms: u64) -> Result<Report> {
    let body = serde_json::json!({ "binary": rig.vm.other_build()?, "deadline_ms": deadline_ms });
    let answer = rig.vm.api.put("vm.update", &body.to_string())?;
    ensure!(answer.status == 200, "{answer:?}");
    answer.json()
}

/// The new image is ready at about the moment its deadline is over: whoever gets the arbiter, one process runs the guest, and runs it right.
pub fn deadline_race() -> Result<()> {
    rig::shared(|rig| {
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 5 })?;
        let mut outcomes = Vec::new();
        for round in 0..12 {
            let traffic = rig.traffic()?;
            traffic.moves_on(rig.agent()?, 25, Duration::from_secs(20))?;
            // The rest of the pause takes some 30 to 60 ms.
            let fault = Switch::with(&rig.vm.dir, "fault", &format!("commit:sleep:{}", 330 + round * 7))?;
            let report = update_within(rig, 400)?;
            drop(fault);
            let same = report.pid == rig.vm.pid();
            rig.vm.follow(report.pid)?;
            if report.outcome == "updated" {
                rig.vm.note_update();
            }
            outcomes.push((report.outcome, if same { "same PID" } else { "new PID" }));
            traffic.moves_on(rig.agent()?, 25, Duration::from_secs(20))?;
            traffic.finish_clean(rig.agent()?)?;
            rig.vm.settled_facts()?;
        }
        let memory: MemoryStats = rig.agent()?.call_within(&Request::MemoryStop, Duration::from_secs(60))?;
        ensure!(memory.pages_wrong == 0, "{memory:?}");
        let count = |what: &str, pid: &str| outcomes.iter().filter(|(o, p)| o == what && *p == pid).count();
        note(format_args!(
            "updated {}, rolled back by the new image {}, by the helper {}",
            count("updated", "same PID"),
            count("rolled_back", "same PID"),
            count("rolled_back", "new PID")
        ));
        ensure!(count("updated", "new PID") == 0, "{outcomes:?}");
        rig.vm.update()?;
        Ok(())
    })
}

/// Deadlines that vCPUs cannot keep: each update is given up at once, and what a late vCPU still does confuses no later one.
pub fn short_deadlines() -> Result<()> {
    rig::shared(|rig| {
        let traffic = rig.traffic()?;
        let (mut late, mut longest) = (0, 0);
        for round in 0..60 {
            let report = update_within(rig, 1 + round % 3)?;
            ensure!(report.outcome == "rolled_back", "{report:?}");
            rig.vm.follow(report.pid)?;
            late += usize::from(report.reasons.join(" ").contains("did not stop"));
            longest = report.pause_us.max(longest);
        }
        note(format_args!("vCPUs were late {late} times of 60; the longest pause {longest} us"));
        ensure!(longest < 5_000_000, "the guest stood still for {longest} us");
        traffic.moves_on(rig.agent()?, 25, Duration::from_secs(20))?;
        rig.vm.update()?;
        traffic.moves_on(rig.agent()?, 25, Duration::from_secs(20))?;
        traffic.finish_clean(rig.agent()?)?;
        Ok(())
    })
}
