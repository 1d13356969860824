//! How a VM is to be started.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;

use crate::harness::{
    PATIENCE, lab, proc,
    vm::{Setting, Vm},
};

/// iomem: the agent reaches configuration space through /dev/mem (agent/resets.rs).
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 iomem=relaxed";

/// How a VM is to be started.
#[derive(Debug, Clone)]
pub struct Builder {
    cpus: u32,
    memory: String,
    devices: Vec<(String, Option<String>)>,
    binary: String,
    verbose: bool,
    notify_socket: Option<PathBuf>,
    kernel: Option<PathBuf>,
    fault: Option<String>,
    hooks: bool,
    update_dir: Option<PathBuf>,
    may_lock: Option<u64>,
    ignores_children: bool,
    user: Option<(u32, &'static [u32])>,
    log_file: Option<PathBuf>,
    reboots: bool,
    patience: Duration,
    waits_for_devices: bool,
    words: String,
    confined: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: "size=256M".into(),
            devices: Vec::new(),
            binary: "theseus-a".into(),
            verbose: false,
            notify_socket: None,
            kernel: None,
            fault: None,
            hooks: true,
            update_dir: None,
            may_lock: None,
            ignores_children: false,
            user: None,
            log_file: None,
            reboots: false,
            patience: PATIENCE,
            waits_for_devices: true,
            words: String::new(),
            confined: false,
        }
    }
}

impl Builder {
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Another kernel than the lab's bzImage.
    pub fn kernel(mut self, path: PathBuf) -> Self {
        self.kernel = Some(path);
        self
    }

    /// Which build to start with: a name among the builds, or a path.
    pub fn binary(mut self, name: &str) -> Self {
        self.binary = name.into();
        self
    }

    /// As behind `--memory`.
    pub fn memory(mut self, memory: &str) -> Self {
        self.memory = memory.into();
        self
    }

    /// As systemd does for a service of type notify.
    pub fn notify_socket(mut self, path: &Path) -> Self {
        self.notify_socket = Some(path.into());
        self
    }

    /// Lets the VMM log what it does, not only what went wrong.
    pub fn verbose(mut self) -> Self {
        self.verbose = true;
        self
    }

    /// For a guest that takes longer than others to come up.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Its devices must be free now.
    pub fn at_once(mut self) -> Self {
        self.waits_for_devices = false;
        self
    }

    /// As behind `--fault`: for every update.
    pub fn fault(mut self, fault: &str) -> Self {
        self.fault = Some(fault.into());
        self
    }

    /// For a measurement: the VMM looks for no test hooks, as one that users have does not.
    pub fn without_hooks(mut self) -> Self {
        self.hooks = false;
        self
    }

    /// As behind `--update-dir`.
    pub fn update_dir(mut self, folder: &Path) -> Self {
        self.update_dir = Some(folder.into());
        self
    }

    /// Without CAP_IPC_LOCK, and with RLIMIT_MEMLOCK at so many bytes.
    pub fn may_lock(mut self, bytes: u64) -> Self {
        self.may_lock = Some(bytes);
        self
    }

    /// SIGCHLD is ignored when the VMM starts.
    pub fn ignores_children(mut self) -> Self {
        self.ignores_children = true;
        self
    }

    /// The VMM runs as this user, whose programs have these capabilities.
    pub fn user(mut self, user: u32, capabilities: &'static [u32]) -> Self {
        self.user = Some((user, capabilities));
        self
    }

    /// As behind `--log-file`.
    pub fn log_file(mut self, path: &Path) -> Self {
        self.log_file = Some(path.into());
        self
    }

    /// A guest that resets itself, or crashes, is booted again in its VMM, as without the option `--on-reset exit`.
    /// That is given to all others: their end is seen at once, and by nobody taken for a guest that goes on.
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Passes `nic` through, in the container of that name if one is given.
    pub fn device(mut self, nic: lab::Nic, container: Option<&str>) -> Result<Self> {
        self.devices.push((nic.bdf()?, container.map(Into::into)));
        Ok(self)
    }

    /// Passes the device at `bdf` through, in the container of that name if one is given.
    pub fn device_at(mut self, bdf: String, container: Option<&str>) -> Self {
        self.devices.push((bdf, container.map(Into::into)));
        self
    }

    /// More for the guest kernel's command line.
    pub fn kernel_words(mut self, words: &str) -> Self {
        self.words = words.into();
        self
    }

    /// By Landlock, and a ceiling on its system calls.
    pub fn confined(mut self) -> Self {
        self.confined = true;
        self
    }

    /// Starts the VMM and waits until the guest's agent is ready.
    pub fn boot(self) -> Result<Vm> {
        let patience = self.patience;
        let mut vm = self.start()?;
        if let Err(e) = vm.agent()?.wait_ready(patience) {
            // The VMM's end, if that is what it was, is the better explanation.
            // The serial line may be closed a little before.
            std::thread::sleep(Duration::from_secs(2));
            return if vm.is_running() { Err(e) } else { Err(e.context("the VMM ended before the guest was up")) };
        }
        Ok(vm)
    }

    /// Starts the VMM with a guest, and connects to its serial port.
    pub fn start(self) -> Result<Vm> {
        let memory = self.memory.clone();
        for (bdf, _) in self.devices.iter().filter(|_| self.waits_for_devices) {
            proc::wait_group_free(bdf)?;
        }
        let mut args = vec![
            "--kernel".to_string(),
            self.kernel.clone().map_or_else(lab::kernel, Ok)?.display().to_string(),
            "--initramfs".into(),
            lab::initramfs()?.display().to_string(),
            "--cmdline".into(),
            format!("{CMDLINE} {}", self.words),
            "--cpus".into(),
            format!("boot={}", self.cpus),
            "--memory".into(),
            memory,
        ];
        for (bdf, container) in &self.devices {
            let container = container.as_ref().map(|name| format!(",container={name}")).unwrap_or_default();
            args.extend(["--device".into(), format!("path=/sys/bus/pci/devices/{bdf}{container}")]);
        }
        if self.verbose {
            args.push("-v".into());
        }
        if !self.reboots {
            args.extend(["--on-reset".into(), "exit".into()]);
        }
        if self.confined {
            args.push("--ceiling".into());
        }
        for (option, path) in [("--update-dir", &self.update_dir), ("--log-file", &self.log_file)] {
            args.extend(path.iter().flat_map(|path| [option.into(), path.display().to_string()]));
        }
        args.extend(self.fault.iter().flat_map(|fault| ["--fault".into(), fault.clone()]));
        let setting = Setting {
            serial: true,
            hooks: self.hooks,
            notify_socket: self.notify_socket.as_deref(),
            may_lock: self.may_lock,
            ignores_children: self.ignores_children,
            blocks_signals: false,
            user: self.user,
            terminal: None,
            limit: None,
            confined: self.confined,
            anywhere: true,
        };
        let mut vm = Vm::spawn(&self.binary, &args, &setting)?;
        vm.cpus = self.cpus;
        vm.attach()?;
        Ok(vm)
    }
}
