//! Bodies to typed values, with errors that name the key.

use serde::de::DeserializeOwned;
use serde_ignored::Path;
use serde_json::Value;

use super::{foreign, tree};

/// A client may send as many as a body holds.
const NOTES_MAX: usize = 16;

/// Parses a whole body. A key that the type does not know is an error here, whatever the type says, unless its value
/// says nothing.
///
/// # Errors
/// A sentence with what is wrong and the path of the key, or, where it is not JSON, line and column; or one for each
/// unknown key.
pub(crate) fn from_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, Vec<String>> {
    let tree = tree::without_nulls(tree::parse(body).map_err(|error| vec![error])?);
    let (mut track, mut refused, mut notes) = (serde_path_to_error::Track::new(), Vec::new(), Vec::new());
    let tracked = serde_path_to_error::Deserializer::new(&tree, &mut track);
    let parsed = serde_ignored::deserialize(tracked, |path| {
        let name = path.to_string();
        if !locate(&tree, &path).is_some_and(|value| foreign::says_nothing(&name, value, &mut notes)) {
            refused.push(foreign::refusal(&name));
        }
    });
    let value = parsed.map_err(|error| {
        let path = track.path().to_string();
        vec![if path == "." { error.to_string() } else { format!("{path}: {error}") }]
    })?;
    if !refused.is_empty() {
        return Err(refused);
    }
    notes.iter().take(NOTES_MAX).for_each(|note| log::warn!("{note}"));
    Ok(value)
}

/// What stands at `path`.
fn locate<'a>(tree: &'a Value, path: &Path<'_>) -> Option<&'a Value> {
    match path {
        Path::Root => Some(tree),
        Path::Seq { parent, index } => locate(tree, parent)?.get(index),
        Path::Map { parent, key } => locate(tree, parent)?.get(key),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            locate(tree, parent)
        }
    }
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
            (
                "{\n \"cpus\": {\"boot_vcpus\": 1,},\n}",
                "trailing comma at line 2 column 27: nothing follows the comma: remove it",
            ),
            (r#"{"memory":{"size":"512M"}}"#, "memory.size: invalid type: string \"512M\", expected u64"),
            (r#"{"cpus":{"boot_vcpus":-1}}"#, "cpus.boot_vcpus: invalid value"),
            (r#"{"cpus":{}}"#, "missing field `boot_vcpus`"),
            (r#"{"cpus":{"boot_vcpus":null}}"#, "missing field `boot_vcpus`"),
            (r#"{"serial":{"mode":"tty"}}"#, "serial.mode: unknown variant `tty`"),
            (r#"{"colour":1}"#, "key `colour` is unknown"),
            (r#"{"disks":[{}]}"#, "key `disks` is not supported by this build: pass a storage controller"),
            (r#"{"devices":[{"path":"/x","iommu":true}]}"#, "key `devices.0.iommu` is not supported by this build"),
            (r#"{"devices":[{"path":"/x","pci_segment":1}]}"#, "key `devices.0.pci_segment` is not supported"),
            (
                r#"{"rng":{"src":"/dev/hwrng"}}"#,
                "key `rng` is not supported by this build: leave it out: a guest has RDRAND",
            ),
            (r#"{"console":{"mode":"Tty"}}"#, "key `console` is not supported by this build: use the serial port"),
            (r#"{"watchdog":true}"#, "key `watchdog` is not supported"),
            (r#"{"platform":{"num_pci_segments":2}}"#, "key `platform` is not supported"),
            (r#"{"memory":{"size":1,"hotplug_size":1}}"#, "key `memory.hotplug_size` is not supported"),
            (r#"{"cpus":{"boot_vcpus":1,"topology":{"threads_per_core":2}}}"#, "key `cpus.topology` is not supported"),
            (
                r#"{"payload":{"firmware":"/f"}}"#,
                "key `payload.firmware` is not supported by this build: give a kernel",
            ),
            (r#"{"cpus":{"boot_vcpus":1},"cpus":{"boot_vcpus":1}}"#, "duplicate field `cpus`"),
        ];
        for (body, expected) in table {
            let errors = from_body::<VmConfig>(body.as_bytes()).unwrap_err();
            assert!(matches!(&errors[..], [error] if error.contains(expected)), "{body}: {errors:?}");
        }
        let two = from_body::<VmConfig>(br#"{"colour":1,"cpus":{"boot_vcpus":1,"topology":[1]}}"#).unwrap_err();
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
