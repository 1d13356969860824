//! What an operator does beside an update: ch-remote, reboots, a supervisor.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::deaths::taken_back;
use crate::{
    harness::{
        PATIENCE,
        builder::CMDLINE,
        hooks::Switch,
        lab::{self, Nic},
        proc,
        rig::Rig,
        vm::Vm,
        vm_info::{Resource, State, VmInfo},
        wire::Wire,
    },
    proto::{PciFunction, Request},
};

/// A VM's life by `ch-remote`, from an empty VMM on; the update is to the file it was started from, as a package
/// upgrade left it.
pub(super) fn ch_remote() -> Result<()> {
    let installed = std::env::temp_dir().join(format!("theseus-installed-{}", std::process::id()));
    fs::copy(lab::bin("theseus-a")?, &installed)?;
    let mut vm = Vm::api_only_from(&installed)?;
    let config = json!({
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 512u64 << 20 },
        "payload": { "kernel": lab::kernel()?, "initramfs": lab::initramfs()?, "cmdline": CMDLINE },
        "serial": { "mode": "Socket", "socket": vm.serial() },
    });
    let file = vm.dir.join("config.json");
    fs::write(&file, config.to_string())?;
    let remote = |vm: &Vm, words: &[&str]| -> Result<Output> {
        let mut command = Command::new(lab::bin("ch-remote")?);
        Ok(command.arg("--api-socket").arg(&vm.api.path).args(words).output()?)
    };
    let done = |vm: &Vm, words: &[&str]| -> Result<String> {
        let output = remote(vm, words)?;
        ensure!(output.status.success(), "ch-remote {words:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let refused = remote(&vm, &["boot"])?;
    ensure!(!refused.status.success() && !refused.stderr.is_empty(), "booted without a VM: {refused:?}");
    done(&vm, &["create", &file.display().to_string()])?;
    done(&vm, &["boot"])?;
    vm.reconnect()?;
    done(&vm, &["pause"])?;
    ensure!(done(&vm, &["info"])?.contains("Paused"), "not paused");
    done(&vm, &["resume"])?;
    vm.agent()?.ping()?;
    // Debian's kernel takes an NMI that it does not know for a line in its log.
    done(&vm, &["nmi"])?;
    vm.agent()?.ping()?;

    let before = vm.ping()?;
    let new = installed.with_extension("new");
    fs::copy(lab::bin("theseus-b")?, &new)?;
    fs::rename(&new, &installed)?;
    ensure!(done(&vm, &["update", "--dry-run"])?.to_lowercase().contains("ready"), "a dry run");
    let table = done(&vm, &["update"])?;
    let after = vm.ping()?;
    ensure!(after.build_id != before.build_id && after.pid == before.pid, "{before:?} -> {after:?}");
    ensure!(
        table.contains("exec") && table.contains(&after.build_id[..8]),
        "the report names no phases and build: {table}"
    );
    vm.note_update();
    vm.agent()?.ping()?;
    let refused = remote(&vm, &["update", "--binary", "/nowhere/theseus"])?;
    ensure!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("/nowhere/theseus"),
        "{refused:?}"
    );

    done(&vm, &["reboot"])?;
    vm.reconnect()?;
    done(&vm, &["shutdown"])?;
    ensure!(done(&vm, &["info"])?.contains("Shutdown"), "not shut down");
    done(&vm, &["delete"])?;
    ensure!(!remote(&vm, &["info"])?.status.success(), "a VM that was deleted");
    done(&vm, &["shutdown-vmm"])?;
    let status = vm.wait_exit()?;
    ensure!(status.success(), "{status}");
    fs::remove_file(&installed)?;
    let told = vm.story()?;
    let story = "vmm starting, vm created, vm booting, vm booted, vm pausing, vm paused, vm resuming, vm resumed, \
                 update ready, update prepared, update updated, update refused, vm rebooting, vm rebooted, \
                 vm shutdown, vm deleted, vmm shutdown";
    ensure!(told.join(", ") == story, "the event stream tells {told:?}");
    Ok(())
}

/// A passed-through device without a wire, as `--hardware` has it where no peer is named: the guest sees it, and sees
/// the same after updates.
pub(super) fn device_without_wire() -> Result<()> {
    let bdf = Nic::IgbA.bdf()?;
    let host = fs::read(format!("/sys/bus/pci/devices/{bdf}/config"))?;
    let id: String = host.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mut vm = Vm::builder().device(Nic::IgbA, None)?.boot()?;
    let device = |vm: &Vm| -> Result<PciFunction> {
        let functions = vm.agent()?.pci()?;
        functions.into_iter().find(|function| function.config.starts_with(&id)).context("the guest has no such device")
    };
    let before = device(&vm)?;
    for _ in 0..2 {
        let report = vm.update()?;
        ensure!(report.devices.len() == 1 && report.containers.len() == 1, "{report:?}");
        let after = device(&vm)?;
        ensure!(after == before, "{before:?} -> {after:?}");
    }
    Ok(())
}

fn holds_no_device(vm: &Vm) -> Result<()> {
    for name in ["/dev/vfio", "anon_inode:[vfio-device]", "anon_inode:kvm-v"] {
        let left = proc::fds_to(vm.vmm()?, name)?;
        ensure!(left.is_empty(), "{} fds of {name} are left", left.len());
    }
    Ok(())
}

/// A device is given back when the VM ends or cannot be booted, and used again by the next boot in the same VMM;
/// updates go on as before.
pub(super) fn reboot_with_nic() -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?;
    rig.vm.update()?;
    for orders in [&["vm.reboot"][..], &["vm.shutdown", "vm.boot"]] {
        for order in orders {
            rig.vm.api.order(order)?;
            if *order == "vm.shutdown" {
                holds_no_device(&rig.vm)?;
            }
        }
        works(&mut rig).with_context(|| format!("{orders:?}"))?;
    }
    let info = rig.vm.info()?;
    let read = VmInfo::read(&info)?;
    let path = &read.config.devices.as_deref().and_then(<[_]>::first).context("no device")?.path;
    let bdf = Nic::IgbA.bdf()?;
    ensure!(read.state == State::Running && *path == format!("/sys/bus/pci/devices/{bdf}"), "{info}");
    let node = read.device_tree.iter().flatten().map(|(_, node)| node).find(|node| node.pci_bdf.is_some());
    let bars = &node.context("vm.info has no PCI device")?.resources;
    ensure!(
        bars.iter().any(|bar| matches!(bar, Resource::PciBar { base, size, .. } if *base > 0 && *size > 0)),
        "{info}"
    );

    let mut config = info["config"].clone();
    let kernel = std::mem::replace(&mut config["payload"]["kernel"], json!("/nowhere/vmlinuz"));
    // As lspci names it; libvirt adds a slash.
    config["devices"][0]["path"] = json!(bdf);
    rig.vm.api.order("vm.delete")?;
    let answer = rig.vm.api.put("vm.create", &config.to_string())?;
    ensure!(answer.status == 400 && answer.causes()?.join(" ").contains("cannot open /nowhere/vmlinuz"), "{answer:?}");
    let no_kernel = rig.vm.dir.join("no-kernel");
    fs::write(&no_kernel, "text")?;
    config["payload"]["kernel"] = json!(no_kernel);
    create(&rig.vm, &config)?;
    let answer = rig.vm.api.put("vm.boot", "")?;
    ensure!(answer.status == 500 && answer.causes()?.join(" ").contains("neither a bzImage nor an ELF"), "{answer:?}");
    holds_no_device(&rig.vm)?;
    rig.vm.api.order("vm.delete")?;
    config["payload"]["kernel"] = kernel;
    create(&rig.vm, &config)?;
    rig.vm.api.order("vm.boot")?;
    works(&mut rig)
}

/// A guest with a passed-through NIC that resets itself comes up again in the same process, with the NIC, and updates
/// go on as before.
pub(super) fn reset_with_nic() -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2).reboots().confined(), &[(Nic::IgbA, None)])?;
    for round in 1..=2 {
        rig.agent()?.call::<()>(&Request::Reboot { after_ms: 300 })?;
        rig.vm.wait_event("vm rebooted", round)?;
        works(&mut rig).with_context(|| format!("reset {round}"))?;
        ensure!(rig.vm.ping()?.pid == rig.vm.pid(), "another process");
    }
    Ok(())
}

fn create(vm: &Vm, config: &serde_json::Value) -> Result<()> {
    let answer = vm.api.put("vm.create", &config.to_string())?;
    ensure!(answer.status == 204, "{answer:?}");
    Ok(())
}

/// The guest comes up, its NIC carries traffic, and an update loses none of it.
fn works(rig: &mut Rig) -> Result<()> {
    rig.vm.reconnect()?;
    rig.wires = vec![Wire::set_up(Nic::IgbA, rig.agent()?)?];
    rig.update_under_traffic()
}

/// systemd's notify socket hears that the VMM serves, once, and from the process that systemd has started.
pub(super) fn supervisor_is_told() -> Result<()> {
    let path = std::env::temp_dir().join(format!("notify-{}", std::process::id()));
    let socket = UnixDatagram::bind(&path).with_context(|| format!("{}", path.display()))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let heard = || -> Result<String> {
        let mut text = [0; 256];
        let len = socket.recv(&mut text).context("nothing on the notify socket")?;
        Ok(String::from_utf8_lossy(&text[..len]).into_owned())
    };
    let mut vm = Vm::builder().notify_socket(&path).boot()?;
    ensure!(heard()? == "READY=1", "not ready");
    vm.update()?;
    let fault = Switch::with(&vm.dir, "fault", "commit:kill")?;
    taken_back(&mut vm)?;
    drop(fault);
    vm.agent()?.call::<()>(&Request::Ping)?;
    vm.update()?;
    socket.set_nonblocking(true)?;
    let more = heard();
    ensure!(more.is_err(), "{more:?}");
    fs::remove_file(Path::new(&path))?;
    Ok(())
}

/// Whoever is told that a VM or a VMM has shut down, or sees the VMM end, can give its devices to another at once; soon
/// after an update, too, whose old address space is still being torn down.
pub(super) fn devices_free_at_once() -> Result<()> {
    for end in ["vmm.shutdown", "vm.shutdown", "SIGTERM", "power-off"] {
        let mut vm = Vm::builder().memory("size=512M").device(Nic::IgbA, None)?.boot()?;
        vm.update()?;
        match end {
            "SIGTERM" => {
                vm.signal(libc::SIGTERM)?;
                vm.wait_exit()?;
            }
            "power-off" => {
                vm.agent()?.call::<()>(&Request::PowerOff { after_ms: 0 })?;
                vm.wait_exit()?;
            }
            order => vm.api.order(order)?,
        }
        let next = Vm::builder().at_once().device(Nic::IgbA, None)?.start().and_then(Vm::booted);
        next.with_context(|| format!("after {end}"))?;
    }
    Ok(())
}
