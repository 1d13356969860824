//! The command line of the VMM, as Cloud Hypervisor has it.

use std::path::PathBuf;

use clap::Parser;
use theseus_api::args::{self, ApiSocket};
use theseus_api::types::{CpusConfig, DeviceConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig};

/// A VMM that can be replaced under its running guest.
#[derive(Parser, Debug)]
#[command(name = "theseus", disable_version_flag = true)]
pub struct Cli {
    /// Unix socket of the REST API: a path, path=PATH or fd=N.
    #[arg(long, value_parser = args::api_socket)]
    pub api_socket: Option<ApiSocket>,
    /// boot=N[,max=N]
    #[arg(long, requires = "kernel", value_parser = args::cpus)]
    pub cpus: Option<CpusConfig>,
    /// size=512M[,hugepages=on][,thp=on][,prefault=on]
    #[arg(long, requires = "kernel", value_parser = args::memory)]
    pub memory: Option<MemoryConfig>,
    /// bzImage, or ELF with a PVH note. Without it, only the API is started.
    #[arg(long)]
    pub kernel: Option<PathBuf>,
    #[arg(long, requires = "kernel")]
    pub initramfs: Option<PathBuf>,
    #[arg(long, requires = "kernel")]
    pub cmdline: Option<String>,
    /// off, null, tty, pty, file=PATH or socket=PATH
    #[arg(long, requires = "kernel", value_parser = args::serial)]
    pub serial: Option<SerialConfig>,
    /// path=/sys/bus/pci/devices/DDDD:BB:DD.F[,id=ID][,container=NAME]; may be given several times.
    #[arg(long, requires = "kernel", value_parser = args::device)]
    pub device: Vec<DeviceConfig>,
    /// Where the log goes; default: standard error.
    #[arg(long)]
    pub log_file: Option<PathBuf>,
    /// Where events are written, a JSON object a line: a file or FIFO as path=PATH, or fd=N.
    #[arg(long, value_parser = args::api_socket)]
    pub event_monitor: Option<ApiSocket>,
    /// Where the PID is written, and written again should an update that failed have changed it.
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// The only folder (with those below it) that a build to update to may be in.
    #[arg(long)]
    pub update_dir: Option<PathBuf>,
    /// What a guest's reset is: the guest is booted again in this process, or the process ends with exit code 3.
    #[arg(long, value_enum, default_value_t)]
    pub on_reset: OnReset,
    /// More log: -v info, -vv debug, -vvv trace.
    #[arg(short, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Prints version and build id.
    #[arg(short = 'V', long)]
    pub version: bool,
    /// PHASE:KIND[:N]: what goes wrong in updates, see src/test_hooks.rs.
    #[cfg(feature = "test-hooks")]
    #[arg(long)]
    pub fault: Option<String>,
    /// Reads a saved state from standard input and says whether this build could take it over. Used by the update.
    #[arg(long, hide = true)]
    pub check_update: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnReset {
    #[default]
    Reboot,
    Exit,
}

impl Cli {
    /// The VM that the command line describes, if it names a kernel.
    pub fn vm_config(&self) -> Option<VmConfig> {
        let kernel = self.kernel.clone()?;
        Some(VmConfig {
            cpus: self.cpus.clone().unwrap_or_default(),
            memory: self.memory.clone().unwrap_or_default(),
            payload: PayloadConfig {
                kernel: Some(kernel),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
            },
            serial: self.serial.clone().unwrap_or_default(),
            devices: self.device.clone(),
        })
    }
}
