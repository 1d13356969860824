//! Boots that fail, wait, or are given up: the VMM serves meanwhile, and afterwards.

use std::{fs::File, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    harness::{
        hooks::{Hold, make_fifo},
        http::Answer,
        lab,
        vm::Vm,
        wait_for,
    },
    native::guest,
};

/// jmp to itself.
const STANDS: [u8; 2] = [0xEB, 0xFE];

fn config(kernel: &Path, initramfs: Option<&Path>) -> String {
    json!({ "memory": { "size": 128u64 << 20 }, "payload": { "kernel": kernel, "initramfs": initramfs } }).to_string()
}

/// Creates the VM and boots it. What cannot be booted may be found at once.
fn boot(vm: &Vm, config: &str) -> Result<Answer> {
    let answer = vm.api.put("vm.create", config)?;
    if answer.ok() { vm.api.put("vm.boot", "") } else { Ok(answer) }
}

/// What is no file, or no sensible one, is refused by its name, as kernel and as initramfs, by the API and on the
/// command line; and nobody waits for the other end of a FIFO.
pub fn files_that_are_none() -> Result<()> {
    let mut vm = Vm::api_only()?;
    let [fifo, sparse, kernel] = ["fifo", "sparse", "kernel"].map(|name| vm.dir.join(name));
    make_fifo(&fifo)?;
    File::create(&sparse)?.set_len(1 << 40)?;
    guest::write_image(&kernel, &STANDS)?;
    let cases = [
        (fifo.as_path(), "not a regular file", "not a regular file"),
        (Path::new("/tmp"), "not a regular file", "not a regular file"),
        (Path::new("/dev/zero"), "not a regular file", "not a regular file"),
        (&sparse, "neither a bzImage nor an ELF file", "are free beside the kernel"),
    ];
    for (path, as_kernel, as_initramfs) in cases {
        let name = path.display().to_string();
        for (config, why) in [(config(path, None), as_kernel), (config(&kernel, Some(path)), as_initramfs)] {
            let answer = boot(&vm, &config).with_context(|| name.clone())?;
            let causes = answer.causes()?.join(": ");
            ensure!(causes.contains(&name) && causes.contains(why), "{config}: {answer:?}");
            ensure!(vm.api.get("vmm.ping")?.ok(), "ping after {name}");
            vm.api.put("vm.delete", "")?;
        }
        let output = Command::new(lab::bin("theseus-a")?).arg("--kernel").arg(path).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1) && said.contains(&name) && said.contains(as_kernel), "{output:?}");
    }
    let answer = boot(&vm, &config(&kernel, None))?;
    ensure!(answer.ok() && vm.state()? == "Running", "{answer:?}");
    vm.signal(libc::SIGTERM)?;
    ensure!(vm.wait_exit()?.code() == Some(0), "SIGTERM");
    Ok(())
}

/// A boot that waits, as for a file whose server is gone: the API answers, what needs the machine waits, and the VM can
/// be shut down and the VMM ended.
pub fn served_while_booting() -> Result<()> {
    let mut vm = Vm::api_only()?;
    let kernel = vm.dir.join("kernel");
    guest::write_image(&kernel, &STANDS)?;
    let create = vm.api.put("vm.create", &config(&kernel, None))?;
    ensure!(create.ok(), "{create:?}");

    let mut hold = Hold::arm(&vm.dir, "boot")?;
    let (mut boots, mut pauses) = (vm.api.connect()?, vm.api.connect()?);
    boots.send("PUT", "vm.boot", "")?;
    hold.wait_held()?;
    pauses.send("PUT", "vm.pause", "")?;
    ensure!(vm.api.get("vmm.ping")?.ok(), "ping while a boot waits");
    ensure!(vm.state()? == "Created", "{}", vm.info()?);
    hold.release()?;
    let (booted, paused) = (boots.receive()?, pauses.receive()?);
    ensure!(booted.ok() && paused.ok() && vm.state()? == "Paused", "{booted:?}, {paused:?}");
    drop(hold);

    let mut hold = Hold::arm(&vm.dir, "boot")?;
    boots.send("PUT", "vm.reboot", "")?;
    hold.wait_held()?;
    vm.api.order("vm.shutdown")?;
    let given_up = boots.receive()?;
    ensure!(given_up.status == 409 && given_up.causes()?.join(" ").contains("vm.shutdown"), "{given_up:?}");
    ensure!(vm.state()? == "Shutdown", "{}", vm.info()?);
    for order in ["vm.boot", "vm.update"] {
        let busy = vm.api.put(order, "")?;
        ensure!(busy.status == 429 && busy.causes()?.join(" ").contains("given up"), "{order}: {busy:?}");
    }
    hold.release()?;
    drop(hold);
    wait_for("the boot that was given up to end", || {
        let answer = vm.api.put("vm.boot", "")?;
        ensure!(answer.ok() || answer.status == 429, "{answer:?}");
        Ok(answer.ok().then_some(()))
    })?;
    ensure!(vm.state()? == "Running", "{}", vm.info()?);
    vm.update()?;

    let mut hold = Hold::arm(&vm.dir, "boot")?;
    boots = vm.api.connect()?;
    boots.send("PUT", "vm.reboot", "")?;
    hold.wait_held()?;
    vm.signal(libc::SIGTERM)?;
    ensure!(vm.wait_exit()?.code() == Some(0), "SIGTERM");
    let told = vm.story()?;
    ensure!(told.ends_with(&["vm rebooting", "vm deleted", "vmm shutdown"].map(str::to_owned)), "told: {told:?}");
    Ok(())
}
