//! Bodies to typed values, with errors that name the key and the line.

use serde::de::DeserializeOwned;

/// Keys of Cloud Hypervisor that people will bring along and that this build does not know.
const NOT_YET: &[&str] = &[
    "affinity",
    "balloon",
    "console",
    "debug_console",
    "disks",
    "firmware",
    "fs",
    "hotplug_size",
    "iommu",
    "landlock_enable",
    "landlock_rules",
    "net",
    "numa",
    "pci_segment",
    "platform",
    "pmem",
    "rng",
    "sgx_epc",
    "topology",
    "tpm",
    "user_devices",
    "vdpa",
    "vsock",
    "watchdog",
    "zones",
];

/// Parses a whole body.
///
/// # Errors
/// One sentence with the path of the key, what is wrong, line and column.
pub(crate) fn from_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        let message = e.into_inner().to_string();
        let message = if path == "." { message } else { format!("{path}: {message}") };
        let unknown = message.split_once("unknown field `").and_then(|(_, rest)| rest.split('`').next());
        match unknown {
            Some(key) if NOT_YET.contains(&key) => format!("`{key}` is not supported by this build: {message}"),
            _ => message,
        }
    })?;
    json.end().map_err(|e| e.to_string())?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::VmConfig;
    use super::*;

    #[test]
    fn errors_name_key_and_place() {
        let table = [
            ("", "EOF while parsing"),
            ("{", "EOF while parsing"),
            ("nonsense", "expected ident"),
            ("{}x", "trailing characters"),
            ("{} {}", "trailing characters"),
            (r#"{"memory":{"size":"512M"}}"#, "memory.size: invalid type: string \"512M\", expected u64 at line 1"),
            (r#"{"cpus":{"boot_vcpus":-1}}"#, "cpus.boot_vcpus: invalid value"),
            (r#"{"cpus":{}}"#, "missing field `boot_vcpus`"),
            (r#"{"serial":{"mode":"tty"}}"#, "serial.mode: unknown variant `tty`"),
            (r#"{"colour":1}"#, "unknown field `colour`"),
            (r#"{"disks":[]}"#, "`disks` is not supported by this build"),
            (r#"{"devices":[{"path":"/x","iommu":true}]}"#, "`iommu` is not supported by this build: devices[0].iommu"),
            (r#"{"cpus":{"boot_vcpus":1},"cpus":{"boot_vcpus":1}}"#, "duplicate field `cpus`"),
        ];
        for (body, expected) in table {
            let error = from_body::<VmConfig>(body.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{body}: {error}");
        }
    }

    #[test]
    fn a_config_survives_the_round_trip() {
        let body = r#"{
            "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
            "memory": {"size": 536870912, "hugepages": true, "thp": true},
            "payload": {"kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0"},
            "serial": {"mode": "File", "file": "/tmp/serial"},
            "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0", "id": "nic", "container": "second"}]
        }"#;
        let config: VmConfig = from_body(body.as_bytes()).unwrap();
        config.validate().unwrap();
        assert!(config.memory.shared);
        assert_eq!(config.devices[0].container(), "second");
        let again: VmConfig = from_body(&serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }
}
