//! Updates under traffic over passed-through NICs.

use std::{
    collections::HashSet,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    cases::{MANY, note},
    harness::{
        lab::Nic,
        rig::{self, Rig},
        traffic::Traffic,
        vm::Vm,
    },
    proto::{MemoryStats, Request},
};

/// Updates `rig` back and forth under traffic; gives back the pauses, µs.
fn updates_under_traffic(rig: &mut Rig, updates: u32) -> Result<Vec<u64>> {
    let started = Instant::now();
    let traffic = rig.traffic()?;
    traffic.moves_on(rig.agent()?, 200, Duration::from_secs(20))?;
    let mut pauses = Vec::new();
    let mut builds = HashSet::new();
    for _ in 0..updates {
        let report = rig.vm.update()?;
        ensure!(report.devices.len() == rig.wires.len(), "not all devices are reported: {report:?}");
        pauses.push(report.pause_us);
        builds.insert(report.to.build_id);
        // Every image must carry traffic, not only the last.
        traffic.moves_on(rig.agent()?, 50, Duration::from_secs(20))?;
    }
    ensure!(builds.len() == 2, "{builds:?}");
    note(format_args!("pauses, us: {pauses:?}"));
    finish_clean(rig, traffic, started)?;
    Ok(pauses)
}

/// Ends `traffic`, of which nothing may be lost, and says how much it was.
fn finish_clean(rig: &Rig, traffic: Traffic, started: Instant) -> Result<()> {
    let packets = traffic.finish_clean(rig.agent()?)?;
    note(format_args!("{packets} packets ({:.0}/s), none lost", packets as f64 / started.elapsed().as_secs_f64()));
    Ok(())
}

/// The lab itself: what is lost without an update is not the update's.
pub fn without_update() -> Result<()> {
    rig::shared(|rig| {
        let started = Instant::now();
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 5000, Duration::from_secs(60))?;
        finish_clean(rig, traffic, started)
    })
}

pub fn igb() -> Result<()> {
    rig::shared(|rig| {
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 32, seed: 7 })?;
        updates_under_traffic(rig, MANY)?;
        let memory: MemoryStats = rig.agent()?.call_within(&Request::MemoryStop, Duration::from_secs(60))?;
        ensure!(memory.pages_wrong == 0 && memory.passes > 0, "{memory:?}");
        Ok(())
    })
}

/// Two containers, one of them shared by two devices.
pub fn three_nics() -> Result<()> {
    let nics = [(Nic::IgbA, None), (Nic::IgbB, Some("second")), (Nic::E1000e, None)];
    let mut rig = Rig::boot(Vm::builder().cpus(2), &nics)?;
    let report_containers = {
        let report = rig.vm.update()?;
        report.containers
    };
    ensure!(report_containers.len() == 2, "two containers are to be carried: {report_containers:?}");
    sleep(Duration::from_millis(100));
    updates_under_traffic(&mut rig, 10)?;
    Ok(())
}
