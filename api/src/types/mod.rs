//! What travels over the API: the configuration of a VM, and the answers.
//!
//! What comes in refuses unknown keys that say something: a misspelt or unsupported option must not be taken for
//! granted. What goes out may grow, so the answers tolerate keys they do not know.

mod config;
mod event;
pub(crate) mod foreign;
mod json;
mod tree;
mod update;
mod validate;

pub use config::{
    CpuAffinity, CpusConfig, DEFAULT_CONTAINER, DeviceConfig, HOST_CPUS_MAX, HUGEPAGE_SIZE, LandlockConfig,
    MemoryConfig, PayloadConfig, SerialConfig, SerialMode, VmConfig,
};
pub use event::{Event, EventLine, Threads, Timestamp, UpdateEvent, VmEvent, VmmEvent};
pub(crate) use json::from_body;
pub use update::{BuildInfo, PhaseTime, UpdateMode, UpdateOutcome, UpdateReport, UpdateRequest};
pub use validate::{MAX_VCPUS, MIN_MEMORY, SERIAL_ID, SOCKET_PATH_MAX};

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Answer of `vmm.ping`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PingInfo {
    /// Version with the details of the build (commit), for people.
    pub build_version: String,
    /// Version of the package.
    pub version: String,
    /// Linker build id, lower-case hex: what tells two builds apart.
    pub build_id: String,
    /// That of the process that everybody knows, over all updates.
    pub pid: u32,
    /// That of the process below it that runs the guest now, for gdb, strace and perf.
    pub vmm_pid: u32,
    /// What the build has beside, such as hooks for tests; none in a released one.
    pub features: Vec<String>,
}

/// Answer of `vm.counters`: what had to be dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Counters {
    /// Output of the guest's serial port that had to be dropped.
    pub serial: DroppedBytes,
    /// Output of the VMM's log that had to be dropped, since the last update.
    pub log: DroppedBytes,
    /// Events that had to be dropped, since the last update.
    pub events: LostEvents,
}

/// Of an output that is not waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DroppedBytes {
    /// How many were not written.
    pub dropped_bytes: u64,
}

/// Of the event stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct LostEvents {
    /// How many events were not written, as the reader did not keep up.
    pub lost: u64,
}

/// State of the VM as `vm.info` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum VmState {
    /// It has a configuration, and was not booted yet.
    Created,
    /// The guest runs.
    Running,
    /// The guest stands still, until vm.resume.
    Paused,
    /// The guest was stopped; it can be booted again.
    Shutdown,
}

/// Answer of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct VmInfo {
    /// As it was created with, and what was made of that.
    pub config: VmConfig,
    /// It decides which calls are served.
    pub state: VmState,
    /// Bytes of guest memory.
    pub memory_actual_size: u64,
    /// By id.
    #[serde(default)]
    pub device_tree: BTreeMap<String, DeviceNode>,
    /// The threads of the vCPUs, in order, for whoever places them from outside. Others after each update, in the same
    /// places.
    #[serde(default)]
    pub vcpu_threads: Vec<i32>,
}

/// A device in the answer of `vm.info`, with what Cloud Hypervisor's type has of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DeviceNode {
    /// As in the configuration, or chosen by the VMM.
    pub id: String,
    /// What it has on the guest's buses at present.
    pub resources: Vec<Resource>,
    /// There are no buses below the root one.
    pub parent: Option<String>,
    /// Always empty: there are no buses below the root one.
    pub children: Vec<String>,
    /// In the guest; null for what is not on its PCI bus.
    pub pci_bdf: Option<String>,
    /// Of a passed-through device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_bdf: Option<String>,
    /// The terminal of a serial port in mode Pty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<PathBuf>,
}

/// What a device has on the guest's buses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum Resource {
    /// I/O ports that are always there.
    PioAddressRange {
        /// The first port.
        base: u16,
        /// How many ports.
        size: u16,
    },
    /// As long as the guest lets it decode.
    PciBar {
        /// Which of its base address registers, from 0; the first of two that make one of 64 bits.
        index: usize,
        /// Address in the guest, or first port.
        base: u64,
        /// Bytes, or ports.
        size: u64,
        /// Ports or memory, and of how many bits.
        type_: PciBarType,
        /// As the device says in the register.
        prefetchable: bool,
    },
}

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum PciBarType {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mmio32,
    /// Memory anywhere.
    Mmio64,
}
