//! `l1-tests bench`: the pause of an update by phase, and the start of a VM, as Markdown tables.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context, Result};

use crate::floor;
use crate::harness::{
    clock::kvm_dir,
    lab::{self, Nic},
    logs,
    report::Report,
    rig::Rig,
    table::{Table, ms, percentile},
    traffic,
    vm::Vm,
};
use crate::proto::Request;

const UPDATES: usize = 50;
const STARTS: usize = 10;
/// What docs/performance.md has of QEMU was measured under so many pings a second.
const PEERS_RATE: u32 = 200;

pub fn run() -> Result<()> {
    logs::begin("bench");
    println!("Kernel of L1 and L2: {}. Software emulation: read ratios, not absolutes.\n", lab::kernel_version());
    pause(1, PEERS_RATE)?;
    for cpus in [1, 4] {
        pause(cpus, traffic::RATE)?;
    }
    start()
}

/// Pause over many updates with a NIC passed through and traffic on it: so many packets a second each way.
fn pause(cpus: u32, rate: u32) -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().memory("size=512M").without_hooks().cpus(cpus), &[(Nic::IgbA, None)])?;
    let traffic = rig.traffic_of(rate)?;
    // Both builds once, so that their files are in the page cache.
    rig.vm.update()?;
    rig.vm.update()?;
    let mut reports = Vec::new();
    for _ in 0..UPDATES {
        // The tear-down of the last old image is not part of the next pause.
        rig.vm.settled_facts()?;
        reports.push(rig.vm.update()?);
    }
    let started = traffic.started();
    let packets = traffic.finish_clean(rig.agent()?)?;
    let rate = packets as f64 / 2.0 / started.elapsed().as_secs_f64();
    println!(
        "### Pause of an update: {cpus} vCPU, 512 MiB, igb passed through, {rate:.0} packets/s each way ({packets} \
         packets, none lost)\n"
    );
    println!("{}", phase_table(&reports));
    let (pause, floor) =
        (percentile(&reports.iter().map(|r| r.pause_us).collect::<Vec<_>>(), 50), floor::median(cpus)?);
    println!(
        "KVM gives and takes the state of such vCPUs, right after it: {} ms (p50). The pause is {:.1} times that.\n",
        ms(floor),
        pause as f64 / floor as f64
    );
    Ok(())
}

/// Pause with as many live interrupt vectors as the lab's NVMe controller has (`./dev bench vectors` runs a lab for
/// each number).
pub fn vectors() -> Result<()> {
    logs::begin("bench-vectors");
    let mut vm = Vm::builder().memory("size=512M").without_hooks().device_at(lab::nvme()?, None).boot()?;
    let storage = vm.agent()?.pci()?.into_iter().find(|function| function.config.get(20..24) == Some("0801"));
    let bdf = storage.context("the guest has no NVMe controller")?.bdf;
    let count: u32 = vm.agent()?.call(&Request::VectorsOn { bdf })?;
    vm.update()?;
    vm.update()?;
    let mut reports = Vec::new();
    for _ in 0..UPDATES {
        vm.settled_facts()?;
        reports.push(vm.update()?);
    }
    println!("### Pause of an update: {count} live interrupt vectors of one device, 1 vCPU, 512 MiB, idle\n");
    println!("{}", phase_table(&reports));
    Ok(())
}

/// p50, p99 and max of the pause and of each phase, ms.
pub fn phase_table(reports: &[Report]) -> Table {
    let mut table = Table::new(["ms", "p50", "p99", "max", "n"]);
    let mut row = |name: &str, values: &[u64]| {
        let at = |percent| ms(percentile(values, percent));
        table.row([name.to_string(), at(50), at(99), at(100), values.len().to_string()]);
    };
    row("**pause**", &reports.iter().map(|r| r.pause_us).collect::<Vec<_>>());
    let mut order = Vec::new();
    let mut phases: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for phase in reports.iter().flat_map(|r| &r.phases) {
        if !phases.contains_key(phase.name.as_str()) {
            order.push(phase.name.as_str());
        }
        phases.entry(&phase.name).or_default().push(phase.us);
    }
    for name in order {
        row(name, &phases[name]);
    }
    table
}

/// From exec of the VMM to the first time the guest's CPU comes back out of KVM, and what the VMM itself keeps in
/// memory.
fn start() -> Result<()> {
    let (mut first_exit, mut resident) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let started = Instant::now();
        let vm = Vm::builder().memory("size=512M").without_hooks().start()?;
        let dir = kvm_dir(vm.vmm()?)?;
        // The VM is there before its vCPU runs; its exits are counted from the first on. The guest's first exit is
        // within its kernel's first few hundred instructions.
        while std::fs::read_to_string(dir.join("exits")).context("exits in debugfs")?.trim() == "0" {
            std::thread::yield_now();
        }
        first_exit.push(started.elapsed().as_micros() as u64);
        vm.agent()?.wait_ready(crate::PATIENCE)?;
        resident.push(vm.settled_facts()?.own_rss_kib);
    }
    println!("### Start: 1 vCPU, 512 MiB\n");
    let mut table = Table::new(["", "p50", "max", "n"]);
    let count = first_exit.len().to_string();
    table.row([
        "start of the VMM to the guest's first instructions, ms (upper bound)".to_string(),
        ms(percentile(&first_exit, 50)),
        ms(percentile(&first_exit, 100)),
        count.clone(),
    ]);
    table.row([
        "resident memory of the VMM without the guest's, KiB".to_string(),
        percentile(&resident, 50).to_string(),
        percentile(&resident, 100).to_string(),
        count,
    ]);
    println!("{table}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_keep_their_order() {
        let report: Report = serde_json::from_str(
            r#"{"outcome":"updated","from":{"version":"1","build_id":"a"},"to":{"version":"1","build_id":"b"},
                "pid":1,"pause_us":9000,
                "phases":[{"name":"prepare","us":5},{"name":"exec","us":4000}],"devices":[],"containers":[]}"#,
        )
        .unwrap();
        let text = phase_table(&[report]).to_string();
        let at = |word: &str| text.find(word).unwrap();
        assert!(at("**pause**") < at("prepare") && at("prepare") < at("exec"), "{text}");
        assert!(text.contains("9.0") && text.contains("0.005"), "{text}");
    }
}
