//! Bodies of vm.create as those write them who know Cloud Hypervisor: each with all the keys that they always send.

use serde_json::{Value, json};
use theseus_api::Request;
use theseus_api::types::{SerialMode, VmConfig};

fn create(body: &Value) -> Result<VmConfig, String> {
    match Request::parse("PUT", "/api/v1/vm.create", body.to_string().as_bytes()) {
        Ok(Request::Create(config)) => Ok(*config),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

/// `base` with `value` at the JSON pointer `at`, whose parents are there.
fn with(base: &Value, at: &str, value: Value) -> Value {
    let (parent, key) = at.rsplit_once('/').unwrap();
    let mut body = base.clone();
    body.pointer_mut(parent).unwrap_or_else(|| panic!("{at}")).as_object_mut().unwrap().insert(key.into(), value);
    body
}

/// The answer of vm.info, or what is stored with a snapshot: all there is, with null for what is not set.
fn cloud_hypervisor() -> Value {
    json!({
        "cpus": {
            "boot_vcpus": 2, "max_vcpus": 8, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46,
            "affinity": null, "features": {"amx": false}, "nested": true, "core_scheduling": "Vm"
        },
        "memory": {
            "size": 1_073_741_824, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null,
            "hotplugged_size": null, "shared": false, "hugepages": false, "hugepage_size": null, "prefault": false,
            "reserve": false, "zones": null, "thp": true
        },
        "payload": {
            "firmware": null, "kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0", "initramfs": null, "igvm": null,
            "host_data": null
        },
        "rate_limit_groups": null, "disks": null, "net": null, "generic_vhost_user": null,
        "rng": {"src": "/dev/urandom", "iommu": false, "id": null, "pci_segment": 0, "pci_device_id": null},
        "balloon": null, "fs": null, "pmem": null,
        "serial": {"file": null, "mode": "Tty", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Off", "iommu": false, "socket": null},
        "debug_console": {"file": null, "mode": "Off", "iobase": 233},
        "devices": [{
            "path": "/sys/bus/pci/devices/0000:01:00.0", "iommu": false, "id": "_vfio0", "pci_segment": 0,
            "pci_device_id": null, "x_nv_gpudirect_clique": null, "x_exclude_mmap_bars": []
        }],
        "user_devices": null, "vdpa": null, "vsock": null, "pvpanic": false, "iommu": false, "numa": null,
        "watchdog": false, "pci_segments": null,
        "platform": {
            "num_pci_segments": 1, "iommu_segments": null, "iommu_address_width_bits": 64, "serial_number": null,
            "uuid": null, "oem_strings": null, "tdx": false, "sev_snp": false, "iommufd": false, "vfio_p2p_dma": true
        },
        "rtc": null, "tpm": null, "landlock_enable": false, "landlock_rules": null
    })
}

/// Kata's runtime-rs, with a VM for an initrd; it leaves out most of what is not set.
fn kata() -> Value {
    json!({
        "cpus": {
            "boot_vcpus": 1, "max_vcpus": 32, "kvm_hyperv": false, "max_phys_bits": 46, "features": {"amx": false},
            "topology": {"threads_per_core": 1, "cores_per_die": 32, "dies_per_package": 1, "packages": 1}
        },
        "memory": {
            "size": 2_147_483_648_u64, "mergeable": false, "hotplug_method": "Acpi", "shared": true,
            "hugepages": false, "prefault": false
        },
        "payload": {"firmware": null, "kernel": "/boot/vmlinuz", "cmdline": "quiet", "initramfs": "/boot/initrd"},
        "rng": {"src": "/dev/urandom", "iommu": false},
        "serial": {"file": null, "mode": "Off", "iommu": false},
        "console": {"file": null, "mode": "Off", "iommu": false},
        "iommu": false, "watchdog": false,
        "platform": {
            "num_pci_segments": 1, "iommu_segments": null, "serial_number": null, "uuid": null, "oem_strings": null,
            "tdx": false
        }
    })
}

/// libvirt's ch driver.
fn libvirt() -> Value {
    json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
        "memory": {"size": 1_073_741_824},
        "payload": {"kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0", "initramfs": "/boot/initrd"},
        "console": {"mode": "Off"},
        "serial": {"mode": "Pty"},
        "rng": {"src": "/dev/urandom"},
        "disks": [], "net": [],
        "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0/"}]
    })
}

#[test]
fn cloud_hypervisors_own() {
    let config = create(&cloud_hypervisor()).unwrap();
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus), (2, Some(2)));
    assert!(config.memory.shared && config.memory.thp);
    assert_eq!(config.devices[0].id.as_deref(), Some("_vfio0"));
}

#[test]
fn katas() {
    let config = create(&kata()).unwrap();
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus), (1, Some(1)));
    assert_eq!(config.serial.mode, SerialMode::Off);
}

#[test]
fn libvirts() {
    let config = create(&libvirt()).unwrap();
    assert_eq!(config.serial.mode, SerialMode::Pty);
    assert_eq!(config.devices[0].path.to_str(), Some("/sys/bus/pci/devices/0000:01:00.0"));
}

/// null is the same as absent, for what Theseus has too.
#[test]
fn null_is_absent_everywhere() {
    for key in ["cpus", "memory", "serial", "devices"] {
        create(&with(&libvirt(), &format!("/{key}"), Value::Null)).unwrap();
    }
    for key in ["shared", "hugepages", "hugepage_size", "thp", "prefault"] {
        create(&with(&libvirt(), &format!("/memory/{key}"), Value::Null)).unwrap();
    }
    assert!(create(&with(&libvirt(), "/payload", Value::Null)).unwrap_err().contains("payload.kernel is missing"));
}

/// One value that says something, wherever it stands, is refused by the name of its key.
#[test]
fn what_says_something_is_refused_by_name() {
    let table = [
        (
            "/cpus/topology",
            json!({"threads_per_core": 2, "cores_per_die": 1, "dies_per_package": 1, "packages": 1}),
            "cpus.topology",
        ),
        ("/cpus/kvm_hyperv", json!(true), "cpus.kvm_hyperv"),
        ("/cpus/max_phys_bits", json!(39), "cpus.max_phys_bits"),
        ("/cpus/features", json!({"amx": true}), "cpus.features"),
        ("/cpus/core_scheduling", json!("Vcpu"), "cpus.core_scheduling"),
        ("/memory/mergeable", json!(true), "memory.mergeable"),
        ("/memory/hotplug_method", json!("VirtioMem"), "memory.hotplug_method"),
        ("/memory/hotplug_size", json!(4096), "memory.hotplug_size"),
        ("/memory/zones", json!([{"id": "a", "size": 1}]), "memory.zones"),
        ("/payload/firmware", json!("/f"), "payload.firmware"),
        ("/disks", json!([{"path": "/d"}]), "disks"),
        ("/net", json!([{}]), "net"),
        ("/rng", json!({"src": "/dev/hwrng", "iommu": false}), "rng"),
        ("/balloon", json!({"size": 1}), "balloon"),
        ("/vsock", json!({"cid": 3, "socket": "/s"}), "vsock"),
        ("/serial/iommu", json!(true), "serial.iommu"),
        ("/console/mode", json!("Tty"), "console"),
        ("/debug_console/mode", json!("Tty"), "debug_console"),
        ("/watchdog", json!(true), "watchdog"),
        ("/iommu", json!(true), "iommu"),
        ("/platform/num_pci_segments", json!(2), "platform"),
        ("/platform/tdx", json!(true), "platform"),
        ("/platform/iommufd", json!(true), "platform"),
        ("/tpm", json!({"socket": "/s"}), "tpm"),
    ];
    for (at, value, key) in table {
        let error = create(&with(&cloud_hypervisor(), at, value)).unwrap_err();
        assert!(error.contains(&format!("key `{key}` is not supported by this build: ")), "{at}: {error}");
    }
    for (key, value) in [("iommu", json!(true)), ("pci_segment", json!(1)), ("x_exclude_mmap_bars", json!([0]))] {
        let error = create(&with(&cloud_hypervisor(), &format!("/devices/0/{key}"), value)).unwrap_err();
        assert!(error.contains(&format!("key `devices.0.{key}` is not supported")), "{key}: {error}");
    }
}

/// The rule is that of every body.
#[test]
fn other_bodies_too() {
    let update = |body: &str| Request::parse("PUT", "/api/v1/vm.update", body.as_bytes());
    update(r#"{"binary":null,"sha256":null,"dry_run":true,"x":"Off","local":false,"more":{"a":[]}}"#).unwrap();
    let error = update(r#"{"local":true,"colour":"red"}"#).unwrap_err().to_string();
    assert!(error.contains("key `local` is unknown") && error.contains("key `colour` is unknown"), "{error}");
}
