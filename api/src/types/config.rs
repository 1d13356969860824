//! The configuration of a VM, with the keys of Cloud Hypervisor.
//!
//! It is part of the saved state too, where a key that only a later build knows is no reason to refuse: that unknown
//! keys are an error in a request is the business of [`super::from_body`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(test)]
use super::validate::{MAX_MEMORY, MAX_VCPUS, MIN_MEMORY};

/// Name of the VFIO container that devices without one of their own share.
pub const DEFAULT_CONTAINER: &str = "default";

/// Where sysfs has all PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices/";

/// The huge page size supported, in bytes.
pub const HUGEPAGE_SIZE: u64 = 2 << 20;

/// A VM. What the types cannot check is checked when it is created, and all problems are reported at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmConfig {
    /// Default: one vCPU.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Default: 512 MiB of small pages.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What is booted; a kernel is required.
    #[serde(default)]
    pub payload: PayloadConfig,
    /// Default: what the guest writes to it is dropped.
    #[serde(default)]
    pub serial: SerialConfig,
    /// Devices of the host that the guest has for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceConfig>,
    /// Whether the VMM has to be confined by Landlock, which it is only where it was started so (`--landlock`). In the
    /// answer of vm.info: whether it is.
    #[serde(default)]
    pub landlock_enable: bool,
    /// What the VMM has to be let do. It is where it was started with rules that say as much (`--landlock-rules`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<LandlockConfig>>,
}

impl VmConfig {
    /// The same, saying what it comes to: what is accepted and not carried out as asked for shows here and in vm.info.
    /// For a valid one.
    pub fn settled(mut self) -> Self {
        self.cpus.max_vcpus = Some(self.cpus.boot_vcpus);
        self.memory.shared = true;
        if self.serial.mode == SerialMode::Pty {
            self.serial.file = None;
        }
        for device in &mut self.devices {
            if let Some(bdf) = device.bdf() {
                device.path = format!("{PCI_DEVICES}{bdf}").into();
            }
        }
        self
    }
}

/// The guest's vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CpusConfig {
    /// How many there are.
    #[cfg_attr(test, schemars(range(min = 1, max = MAX_VCPUS)))]
    pub boot_vcpus: u32,
    /// For those who bring it along: as vCPUs cannot be added later, it is taken to be `boot_vcpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Where the threads of vCPUs run; the others run where the VMM does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
}

/// The host's CPUs that the thread of a vCPU may run on. An update keeps it, and what was set from outside since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CpuAffinity {
    /// Its index, from 0.
    pub vcpu: u32,
    /// Numbers of CPUs, as the host's /proc/cpuinfo has them; at least one.
    pub host_cpus: Vec<u32>,
}

/// What numbers of the host's CPUs are below, as the kernel's masks have them (CONFIG_NR_CPUS).
pub const HOST_CPUS_MAX: u32 = 8192;

impl Default for CpusConfig {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: None, affinity: None }
    }
}

/// The guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MemoryConfig {
    /// Bytes.
    #[cfg_attr(test, schemars(range(min = MIN_MEMORY, max = MAX_MEMORY)))]
    pub size: u64,
    /// Guest memory is always a shared memfd, or it could not be carried through an update: `false` is taken for
    /// `true`.
    #[serde(default = "yes")]
    pub shared: bool,
    /// Back the guest with hugetlbfs pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Bytes; only 2097152 (2 MiB) is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Ask for transparent huge pages; changes nothing where `hugepages` is on.
    #[serde(default)]
    pub thp: bool,
    /// Allocate all of the memory before the guest starts.
    #[serde(default)]
    pub prefault: bool,
}

fn yes() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: 512 << 20, shared: true, hugepages: false, hugepage_size: None, thp: false, prefault: false }
    }
}

/// What the guest boots. The files are read at each boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PayloadConfig {
    /// bzImage, or ELF with a PVH note. Required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The file that the kernel unpacks as its first root file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line; default: empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// Where the bytes of the serial port go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum SerialMode {
    /// The guest has no serial port.
    Off,
    /// The port is there, its output is dropped.
    #[default]
    Null,
    /// Standard input and output of the VMM.
    Tty,
    /// A terminal that is made for it; vm.info says where.
    Pty,
    /// Output is appended to a file.
    File,
    /// A unix socket that is made for it, for one client at a time.
    Socket,
}

/// The guest's serial port, which is at the ports of COM1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SerialConfig {
    /// Where its bytes go.
    #[serde(default)]
    pub mode: SerialMode,
    /// For mode File; in the answer of vm.info also the terminal of mode Pty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// For mode Socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// A PCI device passed through with VFIO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DeviceConfig {
    /// `/sys/bus/pci/devices/DDDD:BB:DD.F`, another path of sysfs that ends in the
    /// address, or the address alone, without its domain too.
    pub path: PathBuf,
    /// Default: chosen by the VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of the VFIO container; default: the shared one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

/// What a VMM that is confined by Landlock may do with a file, or with a folder and all that is below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LandlockConfig {
    /// The file, or the folder.
    pub path: PathBuf,
    /// `r`: read and execute, `w`: write, create and remove, `rw`: both.
    pub access: String,
}

impl LandlockConfig {
    /// (reads, writes); none where `access` has another shape.
    pub fn accesses(&self) -> Option<(bool, bool)> {
        match self.access.as_str() {
            "r" => Some((true, false)),
            "w" => Some((false, true)),
            "rw" | "wr" => Some((true, true)),
            _ => None,
        }
    }
}

/// Bytes of `BB:DD.F`.
const SHORT_BDF: usize = 7;

impl DeviceConfig {
    /// The host address `DDDD:BB:DD.F` of the device, as sysfs writes it. The path may be any of sysfs that ends in it
    /// (also in a slash: libvirt's), or the address alone, without its domain too (lspci's). None where it has another
    /// shape.
    pub fn bdf(&self) -> Option<String> {
        let path = self.path.to_str()?.trim_end_matches('/');
        let name = match path.rsplit_once('/') {
            Some((_, name)) if path.starts_with("/sys/") => name.to_owned(),
            Some(_) => return None,
            None if path.len() == SHORT_BDF => format!("0000:{path}"),
            None => path.to_owned(),
        };
        let b = name.as_bytes();
        let shape = b.len() == 5 + SHORT_BDF
            && b.iter().enumerate().all(|(i, c)| match i {
                4 | 7 => *c == b':',
                10 => *c == b'.',
                // A bus has 32 devices of 8 functions.
                8 => matches!(c, b'0' | b'1'),
                11 => matches!(c, b'0'..=b'7'),
                _ => c.is_ascii_hexdigit(),
            });
        shape.then(|| name.to_ascii_lowercase())
    }

    /// The container's name, [`DEFAULT_CONTAINER`] where none was given.
    pub fn container(&self) -> &str {
        self.container.as_deref().unwrap_or(DEFAULT_CONTAINER)
    }
}
