//! What travels over the API: the configuration of a VM, and the answers.
//!
//! What comes in refuses unknown keys: a misspelt or unsupported option must not be taken for granted. What goes out may
//! grow, so the answers tolerate keys they do not know.

mod config;
mod json;
mod update;
mod validate;

pub use config::{
    CpusConfig, DEFAULT_CONTAINER, DeviceConfig, HUGEPAGE_SIZE, MemoryConfig, PayloadConfig, SerialConfig, SerialMode,
    VmConfig,
};
pub(crate) use json::from_body;
pub use update::{BuildInfo, PhaseTime, UpdateMode, UpdateOutcome, UpdateReport, UpdateRequest};
pub use validate::{MAX_VCPUS, MIN_MEMORY};

use serde::{Deserialize, Serialize};

/// Answer of `vmm.ping`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PingInfo {
    /// Version with the details of the build (commit), for people.
    pub build_version: String,
    /// Version of the package.
    pub version: String,
    /// Linker build id, lower-case hex: what tells two builds apart.
    pub build_id: String,
    pub pid: u32,
    pub features: Vec<String>,
}

/// State of the VM as `vm.info` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    Created,
    Running,
    Paused,
    Shutdown,
}

/// Answer of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    pub config: VmConfig,
    pub state: VmState,
    /// Bytes of guest memory.
    pub memory_actual_size: u64,
    #[serde(default)]
    pub device_tree: serde_json::Value,
}
