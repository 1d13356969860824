//! What the VMM's API answers, as a caller reads it.

use std::path::Path;

use serde::Deserialize;

/// A build, as the VMM names itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Build {
    pub version: String,
    pub build_id: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Phase {
    pub name: String,
    pub us: u64,
}

/// Answer of `vm.update` where it took place.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    pub outcome: String,
    pub from: Build,
    pub to: Build,
    pub pid: u32,
    /// Of the process that has the guest.
    #[serde(default)]
    pub vmm_pid: u32,
    /// 0 where the guest was not stopped.
    #[serde(default)]
    pub pause_us: u64,
    pub phases: Vec<Phase>,
    pub devices: Vec<String>,
    pub containers: Vec<String>,
    #[serde(default)]
    pub reasons: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Ping {
    pub build_id: String,
    pub version: String,
    pub pid: u32,
    pub features: Vec<String>,
}

/// Body of `vm.update`.
pub fn update_body(binary: &Path) -> String {
    serde_json::json!({ "binary": binary }).to_string()
}
