//! What the API's configuration of a VM comes to: what a machine is made of, in the machine's own words. None of it is
//! saved, as what of it outlives the boot is in the state or the handles of what was made; the configuration itself is
//! kept by the control side, in the words of the API, for whoever asks and for the next boot.

use std::path::PathBuf;

use theseus_api::types::{
    CpuAffinity, CpusConfig, DeviceConfig, HUGEPAGE_SIZE, MemoryConfig, PayloadConfig, SerialConfig, SerialMode,
    VmConfig,
};
use theseus_devices::spec::ConsoleConfig;
use theseus_resources::Pages;

use super::MachineError;

/// See the module.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MachineSpec {
    pub vcpus: u32,
    /// The host's CPUs that the threads of these vCPUs are to run on.
    pub affinity: Vec<(u32, Vec<u32>)>,
    pub memory: MemorySpec,
    pub payload: PayloadSpec,
    pub console: ConsoleConfig,
    pub passthrough: Vec<PassthroughSpec>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MemorySpec {
    /// In bytes.
    pub size: u64,
    pub pages: Pages,
    /// All of it is touched at the start.
    pub prefault: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PayloadSpec {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub cmdline: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PassthroughSpec {
    /// In sysfs.
    pub path: PathBuf,
    pub id: String,
    pub container: Option<String>,
}

impl MachineSpec {
    /// Of a valid configuration ([`VmConfig::validate`]) that is settled.
    pub(crate) fn of(config: &VmConfig) -> Result<Self, MachineError> {
        let VmConfig { cpus, memory, payload, serial, devices, landlock_enable: _, landlock_rules: _ } = config;
        let CpusConfig { boot_vcpus, max_vcpus: _, affinity } = cpus;
        let PayloadConfig { kernel, initramfs, cmdline } = payload;
        let kernel = kernel.clone().ok_or(MachineError::NoKernel)?;
        let pinned = |CpuAffinity { vcpu, host_cpus }: &CpuAffinity| (*vcpu, host_cpus.clone());
        let ids = ids(devices);
        let device = |(DeviceConfig { path, id: _, container }, id): (&DeviceConfig, String)| PassthroughSpec {
            path: path.clone(),
            id,
            container: container.clone(),
        };
        Ok(Self {
            vcpus: *boot_vcpus,
            affinity: affinity.iter().flatten().map(pinned).collect(),
            memory: MemorySpec::of(memory),
            payload: PayloadSpec { kernel, initramfs: initramfs.clone(), cmdline: cmdline.clone().unwrap_or_default() },
            console: console(serial)?,
            passthrough: devices.iter().zip(ids).map(device).collect(),
        })
    }

    /// Where the thread of this vCPU is to run, if not where the VMM does.
    pub(crate) fn host_cpus(&self, index: u32) -> Option<Vec<u32>> {
        self.affinity.iter().find(|(vcpu, _)| *vcpu == index).map(|(_, host_cpus)| host_cpus.clone())
    }
}

impl MemorySpec {
    fn of(config: &MemoryConfig) -> Self {
        // Always shared.
        let MemoryConfig { size, shared: _, hugepages, hugepage_size, thp, prefault } = *config;
        let pages = match (hugepages, thp) {
            (true, _) => Pages::Huge(hugepage_size.unwrap_or(HUGEPAGE_SIZE)),
            (false, true) => Pages::Transparent,
            (false, false) => Pages::Small,
        };
        Self { size, pages, prefault }
    }
}

fn console(config: &SerialConfig) -> Result<ConsoleConfig, MachineError> {
    let SerialConfig { mode, file, socket } = config;
    let path = |path: &Option<PathBuf>| path.clone().ok_or(MachineError::NoSerialPath);
    Ok(match mode {
        SerialMode::Off => ConsoleConfig::Off,
        SerialMode::Null => ConsoleConfig::Null,
        SerialMode::Tty => ConsoleConfig::Tty,
        SerialMode::Pty => ConsoleConfig::Pty,
        SerialMode::File => ConsoleConfig::File(path(file)?),
        SerialMode::Socket => ConsoleConfig::Socket(path(socket)?),
    })
}

/// The id of each device: its own, or the first `vfioN` from its place on that no other has.
fn ids(configs: &[DeviceConfig]) -> Vec<String> {
    let mut taken: Vec<String> = configs.iter().filter_map(|config| config.id.clone()).collect();
    let mut free = |index: usize| {
        let id = (index..).map(|n| format!("vfio{n}")).find(|id| !taken.contains(id)).unwrap_or_default();
        taken.push(id.clone());
        id
    };
    configs.iter().enumerate().map(|(index, config)| config.id.clone().unwrap_or_else(|| free(index))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_devices_have_one_id() {
        let config = |id: Option<&str>| DeviceConfig { path: "/sys".into(), id: id.map(Into::into), container: None };
        assert_eq!(ids(&[config(None), config(None)]), ["vfio0", "vfio1"]);
        assert_eq!(ids(&[config(Some("vfio1")), config(None), config(None)]), ["vfio1", "vfio2", "vfio3"]);
        assert_eq!(ids(&[config(None), config(Some("vfio0"))]), ["vfio1", "vfio0"]);
    }

    fn spec(json: serde_json::Value) -> Result<MachineSpec, MachineError> {
        let config: VmConfig = serde_json::from_value(json).unwrap();
        MachineSpec::of(&config.settled())
    }

    #[test]
    fn every_key_has_come_to_something() {
        let all = serde_json::json!({
            "cpus": { "boot_vcpus": 3, "affinity": [{ "vcpu": 2, "host_cpus": [5, 6] }] },
            "memory": { "size": 1 << 30, "hugepages": true, "thp": true, "prefault": true },
            "payload": { "kernel": "/k", "initramfs": "/i", "cmdline": "quiet" },
            "serial": { "mode": "Socket", "socket": "/s" },
            "devices": [{ "path": "01:00.0", "id": "nic", "container": "a" }, { "path": "/sys/0000:02:00.0" }],
        });
        let pci = |bdf: &str| PathBuf::from(format!("/sys/bus/pci/devices/{bdf}"));
        let made = spec(all).unwrap();
        assert_eq!((made.host_cpus(1), made.host_cpus(2)), (None, Some(vec![5, 6])));
        let wanted = MachineSpec {
            vcpus: 3,
            affinity: vec![(2, vec![5, 6])],
            memory: MemorySpec { size: 1 << 30, pages: Pages::Huge(2 << 20), prefault: true },
            payload: PayloadSpec { kernel: "/k".into(), initramfs: Some("/i".into()), cmdline: "quiet".into() },
            console: ConsoleConfig::Socket("/s".into()),
            passthrough: vec![
                PassthroughSpec { path: pci("0000:01:00.0"), id: "nic".into(), container: Some("a".into()) },
                PassthroughSpec { path: pci("0000:02:00.0"), id: "vfio1".into(), container: None },
            ],
        };
        assert_eq!(made, wanted);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = |json| spec(json).unwrap_err().to_string();
        assert!(error(serde_json::json!({})).contains("payload.kernel"));
        let no_path = serde_json::json!({ "payload": { "kernel": "/k" }, "serial": { "mode": "File" } });
        assert!(error(no_path).contains("serial: a path is missing"));
    }
}
