//! Every mode of the serial port but the socket, which all other tests use: the guest's words come out, before an update and after it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use anyhow::{Context, Result, ensure};

use super::deaths::taken_back;
use crate::{
    harness::{
        hooks::Switch,
        lab,
        vm::Vm,
        vm_info::{Resource, VmInfo},
        wait_for,
    },
    native::{Counter, guest},
};

/// Said by every kernel early, and late in its start.
const EARLY: &str = "Linux version";
const LATE: &str = "Freeing unused kernel image";

/// Starts a guest whose kernel says what it does.
fn linux(mode: &str) -> Result<Vm> {
    let (kernel, initramfs) = (lab::kernel()?.display().to_string(), lab::initramfs()?.display().to_string());
    let cmdline = "console=ttyS0 panic=-1";
    let args = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", cmdline, "--memory", "size=256M"];
    Vm::with_args(&[&args[..], &["--serial", mode]].concat())?.booted()
}

/// None where kernel 7's 9p, on which the tests' logs are, takes a file that grows while it is read for one that has no data (ENODATA).
fn whole(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// Updates `vm` between two lines that its kernel says, which `heard` gives so far.
fn speaks_over_update(vm: &mut Vm, mut heard: impl FnMut() -> Result<String>) -> Result<()> {
    wait_for("the kernel to start", || Ok(heard()?.contains(EARLY).then_some(())))?;
    ensure!(!heard()?.contains(LATE), "the guest was faster than the update");
    vm.update()?;
    wait_for("the kernel to go on", || Ok(heard()?.contains(LATE).then_some(())))?;
    let text = heard()?;
    ensure!(text.matches(EARLY).count() == 1 && text.matches(LATE).count() == 1, "words came twice: {text}");
    Ok(())
}

/// The console's terminal has hung up: neither an update nor the helper's way back needs it.
pub fn terminal_gone() -> Result<()> {
    const MEMORY: u64 = 128 << 20;
    let (mut master, mut slave) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: two ints to fill; nothing else is asked for.
    ensure!(unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) } == 0, "no pty");
    // SAFETY: just opened, and nobody else's.
    let (master, slave) = unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) };
    // Or the VMM would inherit the master, and its terminal never hang up.
    // SAFETY: no memory is involved.
    ensure!(unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } == 0, "no close-on-exec");
    let kernel = std::env::temp_dir().join("counts");
    guest::write(&kernel, MEMORY)?;
    let mut vm = Vm::bare_on(&slave, &kernel, "size=128M")?;
    fs::remove_file(&kernel)?;
    let counter = Counter::of(vm.pid())?;
    let goes_on = |what: &str| {
        let before = counter.get();
        wait_for(&format!("the guest to go on after {what}"), || {
            Ok((counter.get() > before + guest::pages(MEMORY)).then_some(()))
        })
    };
    goes_on("its start")?;
    vm.update().context("with the terminal")?;
    drop((master, slave));
    vm.update().context("without it")?;
    goes_on("an update")?;
    let fault = Switch::with(&vm.dir, "fault", "commit:kill")?;
    taken_back(&mut vm)?;
    drop(fault);
    goes_on("a way back")?;
    vm.update().context("after that")?;
    Ok(())
}

pub fn modes() -> Result<()> {
    let path = std::env::temp_dir().join(format!("serial-{}", std::process::id()));
    let mut vm = linux(&format!("file={}", path.display()))?;
    // Not there before the guest has said anything.
    speaks_over_update(&mut vm, || Ok(whole(&path).ok().flatten().unwrap_or_default())).context("file")?;
    fs::remove_file(&path)?;

    // Standard output of the VMM, which the tests collect in its log.
    let mut vm = linux("tty")?;
    let log = vm.log.clone();
    speaks_over_update(&mut vm, || wait_for("the log", || whole(&log))).context("tty")?;

    let mut vm = linux("pty")?;
    let info = vm.info()?;
    let slave = info["device_tree"]["serial"]["pty"].as_str().context("vm.info does not say which pty it is")?;
    // Where libvirt looks.
    let read = VmInfo::read(&info)?;
    ensure!(read.config.serial.mode == "Pty" && read.config.serial.file.as_deref() == Some(slave), "{info}");
    ensure!(read.node("serial")?.resources == [Resource::PioAddressRange { base: 0x3F8, size: 8 }], "{info}");
    let mut slave = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(slave)?;
    let mut said = Vec::new();
    speaks_over_update(&mut vm, || {
        let mut bytes = [0; 4096];
        match slave.read(&mut bytes) {
            Ok(count) => said.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("the pty"),
        }
        Ok(String::from_utf8_lossy(&said).into_owned())
    })
    .context("pty")?;

    for mode in ["null", "off"] {
        let mut vm = linux(mode)?;
        vm.update().context(mode)?;
        ensure!(vm.state()? == "Running", "{mode}: {}", vm.info()?);
    }
    Ok(())
}
