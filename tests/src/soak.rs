//! `l1-tests soak`: many updates, everything watched at once.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    bench::phase_table,
    clock::slope,
    harness::{
        clock,
        lab::{self, Nic},
        logs,
        rig::Rig,
        table::Table,
        vm::Vm,
    },
    proto::{MemoryStats, Request},
};

const UPDATES: u32 = 100;
/// Growth of the VMM's own resident memory that counts as flat, KiB.
const FLAT_KIB: u64 = 1024;

pub fn run() -> Result<()> {
    logs::begin("soak");
    soak("one igb", &[(Nic::IgbA, None)])?;
    soak(
        "two igb and an e1000e in two containers",
        &[(Nic::IgbA, None), (Nic::IgbB, Some("second")), (Nic::E1000e, None)],
    )
}

fn soak(what: &str, nics: &[(Nic, Option<&str>)]) -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), nics)?;
    rig.agent()?.call::<()>(&Request::MemoryStart { mib: 32, seed: 99 })?;
    let traffic = rig.traffic()?;
    let clock_before = clock::read(&rig.vm)?;
    rig.vm.update()?;
    rig.vm.update()?;
    let first = rig.vm.settled_facts()?;
    let (mut reports, mut errors) = (Vec::new(), Vec::new());
    for update in 1..=UPDATES {
        reports.push(rig.vm.update()?);
        traffic.moves_on(rig.agent()?, 25, Duration::from_secs(20))?;
        if update % 5 == 0 {
            errors.push(clock::error_us(&clock_before, &clock::read(&rig.vm)?)?);
        }
    }
    let last = rig.vm.settled_facts()?;
    let accounts = traffic.finish(rig.agent()?)?;
    let memory: MemoryStats = rig.agent()?.call_within(&Request::MemoryStop, Duration::from_secs(60))?;
    let growth = slope(&errors) * errors.len() as f64;

    println!("### Soak: {UPDATES} updates, {what}, kernel {}\n", lab::kernel_version());
    println!("{}", phase_table(&reports));
    let mut table = Table::new(["", "after the first", "after the last"]);
    for (name, a, b) in [
        ("descriptors", first.fd_count() as u64, last.fd_count() as u64),
        ("threads", first.thread_count() as u64, last.thread_count() as u64),
        ("mappings", first.mapping_count() as u64, last.mapping_count() as u64),
        ("children", first.children as u64, last.children as u64),
        ("resident, without the guest's, KiB", first.own_rss_kib, last.own_rss_kib),
        ("VmLck, KiB", first.locked_kib, last.locked_kib),
    ] {
        table.row([name.to_string(), a.to_string(), b.to_string()]);
    }
    println!("{table}");
    for account in &accounts {
        println!("{} in: {}", account.name, account.to_guest);
        println!("{} out: {}", account.name, account.from_guest);
    }
    println!("guest memory: {memory:?}");
    println!(
        "clock error at the end {:+.1} us, growth over all {growth:+.1} us\n",
        errors.last().copied().unwrap_or(0.0)
    );

    ensure!(
        accounts.iter().all(|a| a.to_guest.is_clean() && a.from_guest.is_clean()),
        "packets were lost: {accounts:?}"
    );
    ensure!(memory.pages_wrong == 0, "guest memory is damaged: {memory:?}");
    ensure!(errors.iter().all(|e| e.abs() < 20.0) && growth.abs() < 20.0, "clock errors, us: {errors:?}");
    let growth = last.growth_since(&first, FLAT_KIB);
    ensure!(growth.is_empty(), "{growth}");
    Ok(())
}
