//! What Cloud Hypervisor has and Theseus does not (yet): its keys and options, which people and orchestrators bring
//! along. Its endpoints are in [`crate::endpoint`].
//!
//! One rule for all of them: where the value says nothing it is accepted, as many clients write every key they know;
//! anything else is refused by name, with what to do instead.

use serde_json::Value;

pub(crate) const DISK: &str = "pass a storage controller through (devices), or put the files into the initramfs";
pub(crate) const NET: &str = "pass a NIC or one of its virtual functions through (devices)";
const SERIAL: &str = "use the serial port (serial; console=ttyS0 on the kernel's command line)";
pub(crate) const HOTPLUG: &str = "give the guest all of it when it boots";
const FLAT: &str = "leave it out: the host's memory policy of the VMM (numactl) decides where the guest's RAM lies";
const NOBODY: &str = "leave it out";
const SEGMENTS: &str = "leave it out: a guest has one PCI segment, 0";
const KERNEL: &str = "give a kernel (payload.kernel): a bzImage, or an ELF with a PVH note";
pub(crate) const SAVED: &str = "the guest lives as long as the host does: vm.update replaces the VMM under it";
pub(crate) const VSOCK: &str = "use the serial port or a passed-through NIC between host and guest";
const SMBIOS: &str = "leave it out: a guest has no SMBIOS tables";

/// By the last part of a key's path.
const INSTEAD: &[(&str, &str)] = &[
    ("balloon", "leave it out, or give the guest less memory"),
    ("console", SERIAL),
    ("core_scheduling", "set it from outside (prctl PR_SCHED_CORE on the VMM's threads)"),
    ("debug_console", SERIAL),
    ("disks", DISK),
    ("fd", "give the device's path: an open file is not taken over"),
    ("features", "leave it out: a guest has the features of the host's CPU that KVM offers"),
    ("firmware", KERNEL),
    ("fs", DISK),
    ("fw_cfg_config", NOBODY),
    ("gdb", "use the kernel's own debugger, over the serial port (kgdboc)"),
    ("generic_vhost_user", NET),
    ("host_data", NOBODY),
    ("hotplug_method", HOTPLUG),
    ("hotplug_size", HOTPLUG),
    ("hotplugged_size", HOTPLUG),
    ("igvm", KERNEL),
    ("iommu", "leave it out: there is no virtual IOMMU"),
    ("iommufd", "leave it out: devices are passed through by VFIO type1"),
    ("ivshmem", NOBODY),
    ("kvm_hyperv", "leave it out: a guest is shown KVM, not Hyper-V"),
    ("max_phys_bits", "leave it out: a guest has as many as KVM can map"),
    ("mergeable", "leave it out: guest memory is shared, which KSM does not merge"),
    ("nested", "leave it out: nested virtualisation is hidden from guests"),
    ("net", NET),
    ("no_shutdown", NOBODY),
    ("num_pci_segments", SEGMENTS),
    ("numa", FLAT),
    ("oem_strings", SMBIOS),
    ("pci_device_id", "leave it out: slots are given out in the order of the devices"),
    ("pci_segment", SEGMENTS),
    ("pci_segments", SEGMENTS),
    ("platform", NOBODY),
    ("pmem", DISK),
    ("pvmemcontrol", NOBODY),
    ("pvpanic", "leave it out, and have the guest's panic on the serial port"),
    ("rate_limit_groups", NOBODY),
    ("reserve", "use prefault to have all memory before the guest starts"),
    ("restore", SAVED),
    ("rng", "leave it out: a guest has RDRAND, and its kernel's own entropy"),
    ("rtc", "leave it out: a guest has a CMOS clock"),
    ("serial_number", SMBIOS),
    ("sgx_epc", NOBODY),
    ("topology", "leave it out: a guest has one package with a core for each vCPU, of one thread"),
    ("tpm", NOBODY),
    ("user_devices", "bind the device to vfio-pci and pass it through (devices)"),
    ("uuid", SMBIOS),
    ("vdpa", NET),
    ("vsock", VSOCK),
    ("watchdog", "leave it out, and watch the guest from outside"),
    ("x_exclude_mmap_bars", "leave it out: which parts of a BAR are mapped follows from the device"),
    ("x_nv_gpudirect_clique", NOBODY),
    ("zones", FLAT),
];

/// Values that Cloud Hypervisor's configurations have where nobody has set anything, and that are not nothing by
/// themselves. The end of the key's path, the value as JSON (None: any), and what to tell the operator who may have
/// meant it.
const DEFAULTS: &[(&str, Option<&str>, Option<&str>)] = &[
    ("console.mode", Some(r#""Null""#), None),
    (
        "cpus.core_scheduling",
        Some(r#""Vm""#),
        Some("core scheduling is not set: set it from outside (prctl PR_SCHED_CORE)"),
    ),
    ("cpus.max_phys_bits", Some("46"), None),
    ("cpus.nested", Some("true"), Some("nested virtualisation is hidden from guests")),
    // What a guest gets, whatever it is asked to be in total: max_vcpus is taken for boot_vcpus too.
    ("cpus.topology.cores_per_die", None, None),
    ("cpus.topology.dies_per_package", Some("1"), None),
    ("cpus.topology.packages", Some("1"), None),
    ("cpus.topology.threads_per_core", Some("1"), None),
    // Port 0xE9.
    ("debug_console.iobase", Some("233"), None),
    ("platform.iommu_address_width_bits", Some("64"), None),
    ("platform.num_pci_segments", Some("1"), None),
    ("platform.vfio_p2p_dma", Some("true"), None),
    ("rng.src", Some(r#""/dev/urandom""#), None),
];

/// Whether `value`, at the key `path` (`cpus.nested`), says nothing. What is to be told of it is appended to `notes`.
pub(crate) fn says_nothing(path: &str, value: &Value, notes: &mut Vec<String>) -> bool {
    let nothing = match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty() || s.eq_ignore_ascii_case("off") || s.eq_ignore_ascii_case("acpi"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.iter().all(|(key, value)| says_nothing(&format!("{path}.{key}"), value, notes)),
    };
    nothing || is_default(path, value, notes)
}

fn is_default(path: &str, value: &Value, notes: &mut Vec<String>) -> bool {
    let ends_with = |key: &str| path.strip_suffix(key).is_some_and(|before| before.is_empty() || before.ends_with('.'));
    // Only of what may be a default: it is asked at every depth of what may be large.
    let is = |default: &Option<&str>| default.is_none_or(|default| default.eq_ignore_ascii_case(&value.to_string()));
    let Some((_, _, note)) = DEFAULTS.iter().find(|(key, default, _)| ends_with(key) && is(default)) else {
        return false;
    };
    notes.extend(note.map(|note| format!("{path} is {value} and changes nothing: {note}")));
    true
}

/// What to do without the key whose path ends in `key`; None for one that Cloud Hypervisor has not either.
pub(crate) fn instead(key: &str) -> Option<&'static str> {
    INSTEAD.iter().find(|(known, _)| *known == key).map(|(_, instead)| *instead)
}

/// Why the key at `path` is refused.
pub(crate) fn refusal(path: &str) -> String {
    match instead(path.rsplit('.').next().unwrap_or(path)) {
        Some(instead) => format!("key `{path}` is not supported by this build: {instead}"),
        None => format!("key `{path}` is unknown"),
    }
}
