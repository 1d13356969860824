//! Updates under traffic over passed-through NICs.

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};

use crate::{
    cases::{
        MANY,
        failures::{End, unharmed},
        held, note,
    },
    harness::{
        hooks::Switch,
        lab::{self, Nic},
        proc,
        ram::{self, GuestRam},
        rig::{self, Rig},
        traffic::Traffic,
        vm::Vm,
        wait_for,
    },
    native::HugePages,
    proto::{MemoryStats, Request},
};

/// Updates `rig` back and forth under traffic; gives back the pauses, µs.
fn updates_under_traffic(rig: &mut Rig, updates: u32) -> Result<Vec<u64>> {
    let traffic = rig.traffic()?;
    traffic.moves_on(rig.agent()?, 200)?;
    let mut pauses = Vec::new();
    let mut builds = HashSet::new();
    for _ in 0..updates {
        let report = rig.vm.update()?;
        ensure!(report.devices.len() == rig.wires.len(), "not all devices are reported: {report:?}");
        pauses.push(report.pause_us);
        builds.insert(report.to.build_id);
        // Every image must carry traffic, not only the last.
        traffic.moves_on(rig.agent()?, 50)?;
    }
    ensure!(builds.len() == 2, "{builds:?}");
    note(format_args!("pauses, us: {pauses:?}"));
    finish_clean(rig, traffic)?;
    Ok(pauses)
}

/// Ends `traffic`, of which nothing may be lost, and says how much it was.
fn finish_clean(rig: &Rig, traffic: Traffic) -> Result<()> {
    let started = traffic.started();
    let packets = traffic.finish_clean(rig.agent()?)?;
    note(format_args!("{packets} packets ({:.0}/s), none lost", packets as f64 / started.elapsed().as_secs_f64()));
    Ok(())
}

/// The lab itself: what is lost without an update is not the update's.
pub(super) fn without_update() -> Result<()> {
    rig::shared(|rig| {
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 5000)?;
        finish_clean(rig, traffic)
    })
}

pub(super) fn igb() -> Result<()> {
    rig::shared(|rig| {
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 32, seed: 7 })?;
        updates_under_traffic(rig, MANY)?;
        let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(memory.pages_wrong == 0 && memory.passes > 0, "{memory:?}");
        Ok(())
    })
}

/// Two containers, one of them shared by two devices.
pub(super) fn three_nics() -> Result<()> {
    let nics = [(Nic::IgbA, None), (Nic::IgbB, Some("second")), (Nic::E1000e, None)];
    let mut rig = Rig::boot(Vm::builder().cpus(2), &nics)?;
    let report_containers = {
        let report = rig.vm.update()?;
        report.containers
    };
    ensure!(report_containers.len() == 2, "two containers are to be carried: {report_containers:?}");
    updates_under_traffic(&mut rig, 5)?;
    Ok(())
}

/// An NVMe disk and a NIC of one IOMMU group: both go on, and no block is lost or wrong. Two containers cannot share a
/// group.
pub(super) fn disk_and_nic() -> Result<()> {
    let disk = lab::nvme()?;
    let group = |bdf: &str| std::fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group"));
    ensure!(group(&disk)? == group(&Nic::E1000e.bdf()?)?, "the lab's NVMe controller and e1000e are not of one group");
    // The VMM may be gone before anybody can connect to it, or not.
    let apart = Vm::builder().device(Nic::E1000e, None)?.device_at(disk.clone(), Some("second")).start();
    let why = match apart {
        Err(error) => format!("{error:#}"),
        Ok(mut vm) => {
            let status = vm.wait_exit()?;
            ensure!(!status.success(), "one group in two containers: {status}");
            vm.log_text()
        }
    };
    ensure!(why.contains("a group cannot be in"), "{why}");

    let builder = Vm::builder().cpus(2).device_at(disk, None);
    let mut rig = Rig::boot(builder, &[(Nic::E1000e, None)])?;
    rig.agent()?.call::<()>(&Request::DiskStart { path: "/dev/nvme0n1".into(), mib: 1, seed: 11 })?;
    let traffic = rig.traffic()?;
    let mut checked = 0;
    for _ in 0..5 {
        // In every image, not only in the last.
        traffic.moves_on(rig.agent()?, 50)?;
        wait_for("the disk to go on", || {
            let stats: MemoryStats = rig.agent()?.call(&Request::DiskStats)?;
            Ok((stats.pages_checked > checked + 8).then(|| checked = stats.pages_checked))
        })?;
        let report = rig.vm.update()?;
        ensure!(report.devices.len() == 2 && report.containers.len() == 1, "{report:?}");
    }
    traffic.finish_clean(rig.agent()?)?;
    let stats: MemoryStats = rig.agent()?.call(&Request::DiskStop)?;
    note(format_args!("{} blocks of the disk checked, {} passes", stats.pages_checked, stats.passes));
    ensure!(stats.pages_wrong == 0 && stats.passes > 0, "{stats:?}");
    Ok(())
}

/// RAM in huge pages, reserved and transparent, pinned for a device and carried over updates.
pub(super) fn huge_pages() -> Result<()> {
    let _reserved = HugePages::reserve(300)?;
    let _transparent = Transparent::advise()?;
    ["size=512M,hugepages=on", "size=512M,thp=on"].iter().try_for_each(|memory| {
        let mut rig = Rig::boot(Vm::builder().memory(memory), &[(Nic::IgbA, None)])?;
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 32, seed: 8 })?;
        updates_under_traffic(&mut rig, 3).with_context(|| memory.to_string())?;
        let stats: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(stats.pages_wrong == 0, "{memory}: {stats:?}");
        let mapped = proc::huge_kib(rig.vm.vmm()?)?;
        note(format_args!("{memory}: {mapped} KiB of huge pages"));
        ensure!(mapped >= 512 << 10, "{memory}: {mapped} KiB of huge pages");
        Ok(())
    })
}

/// Memory on both sides of the 32-bit hole is two ranges of DMA. Both are carried over updates, and back when the
/// second is refused after the first was mapped: the guest's packets are behind the hole, as Linux takes from there
/// first, and so is the memory that it checks.
pub(super) fn memory_behind_the_hole() -> Result<()> {
    const MIB: u64 = 64;
    // In huge pages: to pin so much in small ones takes minutes in the lab.
    let _reserved = HugePages::reserve(2048)?;
    let mut rig = Rig::boot(Vm::builder().cpus(2).memory("size=4G,hugepages=on"), &[(Nic::IgbA, None)])?;
    rig.agent()?.call::<()>(&Request::MemoryStart { mib: MIB, seed: 12 })?;
    updates_under_traffic(&mut rig, 3)?;
    let ram = GuestRam::of(rig.vm.vmm()?)?;
    held::send(&rig.wires[0], 0, 0x5e3d)?;
    let packet = wait_for("the packet in guest memory", || Ok(ram.find_filler(0x5e3d)))?;
    ensure!(packet as u64 >= ram::HOLE, "the packet is at {packet:#x}, before the hole");
    drop(ram);
    unharmed(&mut rig, End::RolledBack, &["no memory in this image for the DMA mapping 0x100000000"], |rig| {
        let _fault = Switch::with(&rig.vm.dir, "fault", "remap:refused:1")?;
        rig.vm.ask_update(&rig.vm.other_build()?)
    })?;
    let stats: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;
    ensure!(stats.pages_wrong == 0 && stats.passes > 0, "{stats:?}");
    Ok(())
}

/// Transparent huge pages for shared memory that asks for them, which Debian's kernel does not give by default.
struct Transparent {
    before: String,
}

impl Transparent {
    const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

    fn advise() -> Result<Self> {
        let text = std::fs::read_to_string(Self::SWITCH).context(Self::SWITCH)?;
        let before = text.split(['[', ']']).nth(1).context("no setting in brackets")?.to_string();
        std::fs::write(Self::SWITCH, "advise").context(Self::SWITCH)?;
        Ok(Self { before })
    }
}

impl Drop for Transparent {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::SWITCH, &self.before);
    }
}
