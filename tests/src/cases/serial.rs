//! Every mode of the serial port but the socket, which all other tests use: the guest's words come out, before an
//! update and after it.

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
        vm::{Setting, Vm},
        vm_info::{Resource, VmInfo},
        wait_for,
    },
    native::{Counter, guest, probes},
};

/// Fewer than a pty holds that nobody reads (4096 bytes).
const LINES: u32 = 100;

/// Starts a guest that says what it is told to, in a VMM that Landlock confines: each image opens what it has to.
fn speaker(mode: &str) -> Result<Vm> {
    let kernel = std::env::temp_dir().join(format!("speaks-{}", std::process::id()));
    guest::write_image(&kernel, &probes::words())?;
    let args = ["--kernel", &kernel.display().to_string(), "--memory", "size=128M", "--serial", mode];
    let setting = Setting { confined: true, ..Setting::default() };
    let vm = Vm::spawn("theseus-a", &args.map(str::to_owned), &setting)?.booted()?;
    fs::remove_file(&kernel)?;
    Ok(vm)
}

/// None where kernel 7's 9p, on which the tests' logs are, takes a file that grows while it is read for one that has no
/// data (ENODATA).
fn whole(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// Updates `vm` while its guest speaks. `heard` gives all that came so far: every line, once, in order.
fn speaks_over_update(vm: &mut Vm, mut heard: impl FnMut() -> Result<String>) -> Result<()> {
    let line = |n: u32| format!("{n:08x}");
    for round in 0..2 {
        let (from, to) = (round * LINES, (round + 1) * LINES);
        probes::tell(vm.vmm()?, to)?;
        wait_for("the guest to speak", || Ok(heard()?.contains(&line(from)).then_some(())))?;
        vm.update()?;
        wait_for("the last line", || Ok(heard()?.contains(&line(to - 1)).then_some(())))?;
        let text = heard()?;
        // In the log there is more than the guest's words.
        let said = text.lines().filter(|line| line.len() == 8 && line.bytes().all(|byte| byte.is_ascii_hexdigit()));
        ensure!(said.eq((0..to).map(line)), "round {round}: words are lost, or came twice: {text}");
    }
    Ok(())
}

/// The console's terminal has hung up: neither an update nor a way back needs it.
pub(super) fn terminal_gone() -> Result<()> {
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
    let counter = Counter::of(vm.vmm()?)?;
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

pub(super) fn modes() -> Result<()> {
    let path = std::env::temp_dir().join(format!("serial-{}", std::process::id()));
    let mut vm = speaker(&format!("file={}", path.display()))?;
    // Not there before the guest has said anything.
    speaks_over_update(&mut vm, || Ok(whole(&path).ok().flatten().unwrap_or_default())).context("file")?;
    fs::remove_file(&path)?;

    // Standard output of the VMM, which the tests collect in its log.
    let mut vm = speaker("tty")?;
    let log = vm.log.clone();
    speaks_over_update(&mut vm, || wait_for("the log", || whole(&log))).context("tty")?;

    let mut vm = speaker("pty")?;
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
        let mut vm = speaker(mode)?;
        let counter = Counter::of(vm.vmm()?)?;
        for lines in [LINES, 2 * LINES] {
            probes::tell(vm.vmm()?, lines)?;
            wait_for("the guest to speak", || Ok((counter.get() > 0).then_some(())))?;
            vm.update().context(mode)?;
            wait_for(mode, || Ok((counter.get() == u64::from(lines)).then_some(())))?;
        }
    }
    Ok(())
}
