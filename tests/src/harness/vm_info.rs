//! The answer of vm.info as Cloud Hypervisor's own type reads it: what is required there is required here.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
pub struct VmInfo {
    pub config: Config,
    pub state: State,
    pub memory_actual_size: u64,
    pub device_tree: Option<HashMap<String, Node>>,
}

#[derive(Debug, PartialEq, Deserialize)]
pub enum State {
    Created,
    Running,
    Shutdown,
    Paused,
}

#[derive(Deserialize)]
pub struct Config {
    pub cpus: Cpus,
    pub memory: Memory,
    pub serial: Serial,
    pub devices: Option<Vec<Device>>,
}

#[derive(Deserialize)]
pub struct Cpus {
    pub boot_vcpus: u32,
    pub max_vcpus: u32,
}

#[derive(Deserialize)]
pub struct Memory {
    pub size: u64,
    pub shared: bool,
}

#[derive(Deserialize)]
pub struct Serial {
    pub file: Option<String>,
    pub mode: String,
}

#[derive(Deserialize)]
pub struct Device {
    pub path: String,
}

#[derive(Deserialize)]
pub struct Node {
    pub id: String,
    pub resources: Vec<Resource>,
    pub children: Vec<String>,
    // Where a key must be there, but may be null: an `Option` alone would let it be absent.
    #[serde(deserialize_with = "Option::deserialize")]
    pub pci_bdf: Option<String>,
}

#[derive(Debug, PartialEq, Deserialize)]
pub enum Resource {
    PioAddressRange { base: u16, size: u16 },
    PciBar { index: usize, base: u64, size: u64, type_: BarType, prefetchable: bool },
}

#[derive(Debug, PartialEq, Deserialize)]
pub enum BarType {
    Io,
    Mmio32,
    Mmio64,
}

impl VmInfo {
    /// Reads an answer, and looks whether its parts agree.
    pub fn read(answer: &Value) -> Result<Self> {
        let info: Self = serde_json::from_value(answer.clone()).with_context(|| format!("vm.info: {answer}"))?;
        for (id, node) in info.device_tree.iter().flatten() {
            let bdf = node.pci_bdf.as_deref().unwrap_or("0000:00:01.0");
            ensure!(*id == node.id && bdf.len() == 12 && node.children.is_empty(), "{id}: {answer}");
        }
        let Config { cpus, memory, serial: _, devices: _ } = &info.config;
        ensure!(cpus.max_vcpus == cpus.boot_vcpus && memory.shared, "what was accepted is not said to be so: {answer}");
        ensure!(info.memory_actual_size == memory.size, "{answer}");
        Ok(info)
    }

    pub fn node(&self, id: &str) -> Result<&Node> {
        self.device_tree.as_ref().and_then(|tree| tree.get(id)).with_context(|| format!("no device {id}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer() -> Value {
        json!({
            "config": {
                "cpus": {"boot_vcpus": 1, "max_vcpus": 1}, "memory": {"size": 4096, "shared": true},
                "serial": {"mode": "Pty", "file": "/dev/pts/1"}
            },
            "state": "Running", "memory_actual_size": 4096,
            "device_tree": {"nic": {"id": "nic", "resources": [], "children": [], "pci_bdf": null}}
        })
    }

    #[test]
    fn what_is_required_is() {
        VmInfo::read(&answer()).unwrap();
        for (at, key) in [
            ("/config/cpus", "max_vcpus"),
            ("/config/serial", "mode"),
            ("", "memory_actual_size"),
            ("/device_tree/nic", "id"),
            ("/device_tree/nic", "resources"),
            ("/device_tree/nic", "children"),
            ("/device_tree/nic", "pci_bdf"),
        ] {
            let mut without = answer();
            without.pointer_mut(at).unwrap().as_object_mut().unwrap().remove(key).unwrap();
            let error = format!("{:#}", VmInfo::read(&without).err().unwrap());
            assert!(error.contains(key), "{at}/{key}: {error}");
        }
    }
}
