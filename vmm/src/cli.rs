//! The command line of the VMM, as Cloud Hypervisor has it.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use theseus_api::access::{ApiListen, api_listen};
use theseus_api::args::{self, ApiSocket, ForeignOptions};
use theseus_api::types::{
    CpusConfig, DeviceConfig, LandlockConfig, MemoryConfig, PayloadConfig, SerialConfig, SerialMode, VmConfig,
};

use crate::sandbox::{Confinement, Place, Use, ceiling, landlock, seccomp};
use crate::update;

/// A VMM that can be replaced under its running guest.
#[derive(Parser, Debug)]
#[command(name = "theseus", disable_version_flag = true)]
pub(crate) struct Cli {
    /// Unix socket of the REST API: a path, path=PATH or fd=N, with ,mode=0660 and ,group=GROUP behind it.
    #[arg(long, value_parser = api_listen)]
    pub api_socket: Option<ApiListen>,
    /// A user who may use the API beside root and the VMM's own; may be given several times.
    #[arg(long, requires = "api_socket", value_name = "UID")]
    pub api_uid: Vec<u32>,
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
    /// path=/sys/bus/pci/devices/DDDD:BB:DD.F (or DDDD:BB:DD.F)[,id=ID][,container=NAME]; several at once or one after
    /// the other.
    #[arg(long, requires = "kernel", num_args = 1.., value_parser = args::device)]
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
    /// The only folder (with those below it) that a build to update to may be in; default: where this program is.
    #[arg(long)]
    pub update_dir: Option<PathBuf>,
    /// A public key of minisign: a build to update to must be signed by it (BINARY.minisig). Given several times, by
    /// any of them.
    #[arg(long, value_name = "FILE")]
    pub update_key: Vec<PathBuf>,
    /// An older build may be updated to in spite of --update-key, where the request says allow_downgrade.
    #[arg(long, requires = "update_key")]
    pub allow_downgrade: bool,
    /// What a guest's reset is: the guest is booted again in this process, or the process ends with exit code 3.
    #[arg(long, value_enum, default_value_t)]
    pub on_reset: OnReset,
    /// What becomes of a thread that makes a system call which its role does not need: the VMM dies by SIGSYS, there
    /// are no filters, or the kernel logs the call.
    #[arg(long, value_enum, value_name = "true|false|log", default_value_t)]
    pub seccomp: seccomp::Mode,
    /// Refuses system calls to this image and all later ones that no build makes.
    #[arg(long)]
    pub ceiling: bool,
    /// Lets the VMM, in this image and all later ones, write a core when it crashes, and be looked into by its user.
    #[arg(long)]
    pub core_dumps: bool,
    /// Opens nothing but what the other options name and every VMM needs, in this image and all later ones (Landlock).
    #[arg(long, num_args = 0..=1, default_value_t, default_missing_value = "true", value_name = "true|false")]
    pub landlock: bool,
    /// path=PATH,access=r|w|rw: what else may be opened; several at once or one after the other.
    #[arg(long, requires = "landlock", num_args = 1.., value_parser = args::landlock_rule)]
    pub landlock_rules: Vec<LandlockConfig>,
    #[command(flatten)]
    pub foreign: ForeignOptions,
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnReset {
    #[default]
    Reboot,
    Exit,
}

impl Cli {
    /// The VM that the command line describes, if it names a kernel.
    pub(crate) fn vm_config(&self) -> Option<VmConfig> {
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
            landlock_enable: self.landlock,
            landlock_rules: Some(self.landlock_rules.clone()).filter(|rules| !rules.is_empty()),
        })
    }

    /// Confines this process as its options ask, before it has a second thread or process. Returns what the log has to
    /// say of it, too.
    pub(crate) fn confine(&self) -> anyhow::Result<(Confinement, Vec<String>)> {
        let places = || self.places().into_iter().chain(self.default_folder()).collect::<Vec<_>>();
        let notes = if self.landlock { landlock::restrict(&places(), &self.landlock_rules)? } else { Vec::new() };
        if self.ceiling {
            ceiling::install()?;
        }
        let &Self { ceiling, core_dumps, .. } = self;
        Ok((Confinement { ceiling, core_dumps, landlock: self.landlock.then(|| self.landlock_rules.clone()) }, notes))
    }

    /// Where builds to update to are where no option says so (`Supervisor::fence`); not, if that is everywhere.
    fn default_folder(&self) -> Option<Place> {
        let name = update::target::started_from().filter(|_| self.update_dir.is_none())?;
        let folder = name.parent().filter(|folder| folder.parent().is_some())?;
        Some(Place { option: "--update-dir", path: folder.into(), will: Use::Runs })
    }

    /// What it will open in its life, as far as the options say.
    fn places(&self) -> Vec<Place> {
        let serial = self.serial.clone().unwrap_or_default();
        let path_of = |socket: &ApiSocket| match socket {
            ApiSocket::Path(path) => Some(path.clone()),
            ApiSocket::Fd(_) => None,
        };
        let api = self.api_socket.as_ref().and_then(|listen| path_of(&listen.socket));
        let terminals = match serial.mode {
            SerialMode::Tty => landlock::terminals().collect(),
            SerialMode::Pty => vec!["/dev/ptmx".into(), "/dev/pts".into()],
            _ => Vec::new(),
        };
        let named = [
            ("--api-socket", api, Use::Serves),
            ("--event-monitor", self.event_monitor.as_ref().and_then(path_of), Use::Streams),
            ("--initramfs", self.initramfs.clone(), Use::Reads),
            ("--kernel", self.kernel.clone(), Use::Reads),
            ("--log-file", self.log_file.clone(), Use::Appends),
            ("--pid-file", self.pid_file.clone(), Use::Replaces),
            ("--serial", serial.file, Use::Appends),
            ("--serial", serial.socket, Use::Serves),
            ("--update-dir", self.update_dir.clone(), Use::Runs),
        ];
        let place = |(option, path, will)| Some(Place { option, path: path?, will });
        let terminals = terminals.into_iter().map(|path| ("--serial", Some(path), Use::Drives));
        named.into_iter().chain(terminals).filter_map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Cli, String> {
        Cli::try_parse_from(words.split_whitespace()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_options_are_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_line_of_cloud_hypervisor() {
        let words = "theseus --api-socket path=/run/x --kernel /k --initramfs /i --cmdline quiet
            --cpus boot=2,max=4,max_phys_bits=46 --memory size=1g,shared=on --rng src=/dev/urandom --console off
            --serial tty --seccomp false --log-file /l -v --platform num_pci_segments=1
            --device path=/sys/bus/pci/devices/0000:01:00.0/ path=02:00.0,id=b --device path=0000:03:00.0";
        let cli = parse(words).unwrap();
        let config = cli.vm_config().unwrap().settled();
        config.validate().unwrap();
        let paths: Vec<_> = config.devices.iter().map(|device| device.path.to_str().unwrap()).collect();
        let sysfs = |bdf: &str| format!("/sys/bus/pci/devices/{bdf}");
        assert_eq!(paths, [sysfs("0000:01:00.0"), sysfs("0000:02:00.0"), sysfs("0000:03:00.0")]);
        assert_eq!((config.cpus.max_vcpus, config.memory.size), (Some(2), 1 << 30));
        assert_eq!(cli.seccomp, seccomp::Mode::False);
    }

    #[test]
    fn there_are_filters_unless_somebody_wants_none() {
        assert_eq!(parse("theseus").unwrap().seccomp, seccomp::Mode::True);
        assert_eq!(parse("theseus --seccomp log").unwrap().seccomp, seccomp::Mode::Log);
        assert!(parse("theseus --seccomp maybe").unwrap_err().contains("maybe"));
    }

    #[test]
    fn every_path_of_the_command_line_is_a_place() {
        let words =
            "theseus --ceiling --landlock --api-socket /a --kernel /b --initramfs /c --serial file=/d --log-file /e
            --event-monitor path=/f --pid-file /g --update-dir /h --landlock-rules path=/i,access=r path=/j,access=rw";
        let cli = parse(words).unwrap();
        let mut places: Vec<_> = cli.places().into_iter().map(|place| place.path).collect();
        places.sort();
        assert_eq!(places, ["/a", "/b", "/c", "/d", "/e", "/f", "/g", "/h"].map(PathBuf::from));
        let config = cli.vm_config().unwrap();
        assert!(config.landlock_enable && config.landlock_rules.as_ref().unwrap().len() == 2);
        assert_eq!(parse("theseus --kernel /b --serial pty").unwrap().places()[2].path, PathBuf::from("/dev/pts"));
        assert!(!parse("theseus --landlock false").unwrap().landlock);
        assert!(parse("theseus --landlock-rules path=/i,access=r").unwrap_err().contains("--landlock"));
    }

    #[test]
    fn going_back_in_spite_of_keys_takes_a_key() {
        let both = parse("theseus --update-key /a --update-key /b --allow-downgrade").unwrap();
        assert!(both.allow_downgrade && both.update_key.len() == 2);
        assert!(parse("theseus --allow-downgrade").unwrap_err().contains("--update-key"));
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (words, expected) in [
            ("--disk path=/x", "'--disk <disk>...': not supported by this build: pass a storage controller through"),
            ("--net tap=t0", "pass a NIC"),
            ("--firmware /f", "give a kernel"),
            ("--vsock cid=3,socket=/s", "not supported by this build"),
        ] {
            let error = parse(&format!("theseus --kernel /k {words}")).unwrap_err();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }
}
