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

/// Parses a whole body. A key that the type does not know is an error here, whatever the type says.
///
/// # Errors
/// A sentence with the path of the key, what is wrong, line and column; or one for each unknown key.
pub(crate) fn from_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, Vec<String>> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let (mut track, mut unknown) = (serde_path_to_error::Track::new(), Vec::new());
    let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let parsed = serde_ignored::deserialize(tracked, |path| unknown.push(unknown_key(&path.to_string())));
    let value = parsed.map_err(|error| {
        let path = track.path().to_string();
        vec![if path == "." { error.to_string() } else { format!("{path}: {error}") }]
    })?;
    json.end().map_err(|error| vec![error.to_string()])?;
    if unknown.is_empty() { Ok(value) } else { Err(unknown) }
}

fn unknown_key(path: &str) -> String {
    let key = path.rsplit('.').next().unwrap_or(path);
    let why = if NOT_YET.contains(&key) { "is not supported by this build" } else { "is unknown" };
    format!("key `{path}` {why}")
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
            (r#"{"colour":1}"#, "key `colour` is unknown"),
            (r#"{"disks":[]}"#, "key `disks` is not supported by this build"),
            (r#"{"devices":[{"path":"/x","iommu":true}]}"#, "key `devices.0.iommu` is not supported by this build"),
            (r#"{"cpus":{"boot_vcpus":1},"cpus":{"boot_vcpus":1}}"#, "duplicate field `cpus`"),
        ];
        for (body, expected) in table {
            let errors = from_body::<VmConfig>(body.as_bytes()).unwrap_err();
            assert!(matches!(&errors[..], [error] if error.contains(expected)), "{body}: {errors:?}");
        }
        let two = from_body::<VmConfig>(br#"{"colour":1,"cpus":{"boot_vcpus":1,"topology":{}}}"#).unwrap_err();
        assert_eq!(two.len(), 2, "{two:?}");
    }

    #[test]
    fn a_config_survives_the_round_trip() {
        let body = r#"{
            "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
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
