//! Every mode of the serial port but the socket, which all other tests use: the guest's words come out, before an update and after it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::harness::{lab, vm::Vm, wait_for};

/// Said by every kernel early, and late in its start.
const EARLY: &str = "Linux version";
const LATE: &str = "Freeing unused kernel image";
const START: Duration = Duration::from_secs(120);

/// Starts a guest whose kernel says what it does.
fn guest(mode: &str) -> Result<Vm> {
    let (kernel, initramfs) = (lab::kernel()?.display().to_string(), lab::initramfs()?.display().to_string());
    let cmdline = "console=ttyS0 panic=-1";
    let args = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", cmdline, "--memory", "size=256M"];
    Vm::with_args(&[&args[..], &["--serial", mode]].concat())
}

/// Updates `vm` between two lines that its kernel says, which `heard` gives so far.
fn speaks_over_update(vm: &mut Vm, mut heard: impl FnMut() -> Result<String>) -> Result<()> {
    wait_for("the kernel to start", START, || Ok(heard()?.contains(EARLY).then_some(())))?;
    ensure!(!heard()?.contains(LATE), "the guest was faster than the update");
    vm.update()?;
    wait_for("the kernel to go on", START, || Ok(heard()?.contains(LATE).then_some(())))?;
    let text = heard()?;
    ensure!(text.matches(EARLY).count() == 1 && text.matches(LATE).count() == 1, "words came twice: {text}");
    Ok(())
}

pub fn modes() -> Result<()> {
    let path = std::env::temp_dir().join(format!("serial-{}", std::process::id()));
    let mut vm = guest(&format!("file={}", path.display()))?;
    let read = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    speaks_over_update(&mut vm, || Ok(read(&path).unwrap_or_default())).context("file")?;
    fs::remove_file(&path)?;

    // Standard output of the VMM, which the tests collect in its log.
    let mut vm = guest("tty")?;
    let log = vm.log.clone();
    speaks_over_update(&mut vm, || Ok(read(&log)?)).context("tty")?;

    let mut vm = guest("pty")?;
    let info = vm.info()?;
    let slave = info["device_tree"]["serial"]["pty"].as_str().context("vm.info does not say which pty it is")?;
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
        let mut vm = guest(mode)?;
        vm.update().context(mode)?;
        ensure!(vm.state()? == "Running", "{mode}: {}", vm.info()?);
    }
    Ok(())
}
