//! Checks of a configuration that the types cannot make. All problems are reported at once.

use std::collections::HashSet;
use std::path::Path;

use super::config::{DeviceConfig, HUGEPAGE_SIZE, MemoryConfig, PayloadConfig, SerialConfig, SerialMode, VmConfig};

/// Bytes.
pub const MIN_MEMORY: u64 = 128 << 20;
/// Keeps address arithmetic far from overflow; what the host's address width allows is checked when the VM is made.
const MAX_MEMORY: u64 = 4 << 40;
pub const MAX_VCPUS: u32 = 64;
const MAX_NAME: usize = 64;

impl VmConfig {
    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// One sentence for every problem, each naming its key and the remedy.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let Self { cpus, memory, payload, serial, devices } = self;
        let mut problems = Vec::new();

        if !(1..=MAX_VCPUS).contains(&cpus.boot_vcpus) {
            problems.push(format!("cpus.boot_vcpus is {}: give 1 to {MAX_VCPUS}", cpus.boot_vcpus));
        }
        if let Some(max) = cpus.max_vcpus
            && max != cpus.boot_vcpus
        {
            problems.push(format!("cpus.max_vcpus is {max}: vCPUs cannot be added later, leave it out"));
        }
        check_memory(memory, &mut problems);
        check_payload(payload, &mut problems);
        check_serial(serial, &mut problems);
        check_devices(devices, &mut problems);

        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

fn check_memory(memory: &MemoryConfig, problems: &mut Vec<String>) {
    let MemoryConfig { size, shared, hugepages, hugepage_size, thp: _, prefault: _ } = memory;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(size) {
        problems.push(format!("memory.size is {size} bytes: give 128 MiB to 4 TiB"));
    }
    let (page, name) = if *hugepages { (HUGEPAGE_SIZE, "2 MiB with hugepages") } else { (4096, "4 KiB") };
    if size % page != 0 {
        problems.push(format!("memory.size is {size} bytes: make it a multiple of {name}"));
    }
    if !shared {
        problems.push("memory.shared is false, but an update needs shared memory: leave it out".into());
    }
    match hugepage_size {
        Some(_) if !hugepages => problems.push("memory.hugepage_size is set without memory.hugepages: set both".into()),
        Some(s) if *s != HUGEPAGE_SIZE => {
            problems.push(format!("memory.hugepage_size is {s} bytes: only {HUGEPAGE_SIZE} (2 MiB) is supported"))
        }
        _ => {}
    }
}

fn check_payload(payload: &PayloadConfig, problems: &mut Vec<String>) {
    let PayloadConfig { kernel, initramfs, cmdline } = payload;
    match kernel {
        None => problems.push("payload.kernel is missing: give the path of a bzImage or a PVH ELF".into()),
        Some(path) => check_path("payload.kernel", path, problems),
    }
    if let Some(path) = initramfs {
        check_path("payload.initramfs", path, problems);
    }
    if cmdline.as_ref().is_some_and(|c| c.contains('\0')) {
        problems.push("payload.cmdline contains a NUL byte: the kernel would stop reading there; remove it".into());
    }
}

fn check_serial(serial: &SerialConfig, problems: &mut Vec<String>) {
    let SerialConfig { mode, file, socket } = serial;
    for (key, wanted_by, path) in [("file", SerialMode::File, file), ("socket", SerialMode::Socket, socket)] {
        match path {
            None if *mode == wanted_by => problems.push(format!("serial.mode is {mode:?}: give serial.{key} too")),
            Some(_) if *mode != wanted_by => problems.push(format!(
                "serial.{key} is set but serial.mode is {mode:?}: set the mode to {wanted_by:?} or drop it"
            )),
            Some(path) => check_path(&format!("serial.{key}"), path, problems),
            None => {}
        }
    }
}

fn check_devices(devices: &[DeviceConfig], problems: &mut Vec<String>) {
    let (mut paths, mut ids) = (HashSet::new(), HashSet::new());
    for (i, device) in devices.iter().enumerate() {
        let DeviceConfig { path, id, container } = device;
        match device.bdf() {
            None => problems.push(format!(
                "devices[{i}].path is {path:?}: give /sys/bus/pci/devices/DDDD:BB:DD.F (as lspci -D prints it; mdev is not supported)"
            )),
            // sysfs names are lower-case: upper-case would be the same device twice.
            Some(bdf) if !paths.insert(bdf.to_ascii_lowercase()) => {
                problems.push(format!("devices[{i}].path {path:?} is there twice: name each device once"));
            }
            Some(_) => {}
        }
        if let Some(id) = id {
            check_name(&format!("devices[{i}].id"), id, problems);
            if !ids.insert(id) {
                problems.push(format!("devices[{i}].id {id:?} is there twice: ids must differ"));
            }
        }
        if let Some(name) = container {
            check_name(&format!("devices[{i}].container"), name, problems);
        }
    }
}

fn check_path(key: &str, path: &Path, problems: &mut Vec<String>) {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        problems.push(format!("{key} is empty or has a NUL byte in it: give the path of a file"));
    }
}

fn check_name(key: &str, name: &str, problems: &mut Vec<String>) {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(legal) {
        problems.push(format!("{key} is {name:?}: give 1 to {MAX_NAME} letters, digits, '_', '-' or '.'"));
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::CpusConfig;
    use super::*;

    fn good() -> VmConfig {
        VmConfig {
            payload: PayloadConfig { kernel: Some("/boot/vmlinuz".into()), initramfs: None, cmdline: None },
            ..Default::default()
        }
    }

    fn device(path: &str, id: Option<&str>) -> DeviceConfig {
        DeviceConfig { path: path.into(), id: id.map(Into::into), container: None }
    }

    #[test]
    fn each_problem_names_its_key() {
        good().validate().unwrap();
        const BDF: &str = "/sys/bus/pci/devices/0000:01:00.0";
        type Change = fn(&mut VmConfig);
        let table: &[(Change, &str)] = &[
            (|c| c.cpus.boot_vcpus = 0, "cpus.boot_vcpus is 0"),
            (|c| c.cpus.boot_vcpus = 65, "cpus.boot_vcpus is 65"),
            (|c| c.cpus = CpusConfig { boot_vcpus: 4, max_vcpus: Some(2) }, "cpus.max_vcpus is 2"),
            (|c| c.cpus.max_vcpus = Some(64), "cpus.max_vcpus is 64"),
            (|c| c.memory.size = 64 << 20, "memory.size"),
            (|c| c.memory.size = u64::MAX - 4095, "memory.size"),
            (|c| c.memory.size += 512, "multiple of 4 KiB"),
            (
                |c| {
                    c.memory.hugepages = true;
                    c.memory.size += 4096;
                },
                "multiple of 2 MiB",
            ),
            (|c| c.memory.shared = false, "memory.shared"),
            (|c| c.memory.hugepage_size = Some(HUGEPAGE_SIZE), "without memory.hugepages"),
            (
                |c| {
                    c.memory.hugepages = true;
                    c.memory.hugepage_size = Some(1 << 30);
                    c.memory.size = 1 << 30;
                },
                "only 2097152",
            ),
            (|c| c.payload.kernel = None, "payload.kernel is missing"),
            (|c| c.payload.kernel = Some("".into()), "payload.kernel is empty"),
            (|c| c.payload.initramfs = Some("a\0b".into()), "payload.initramfs"),
            (|c| c.payload.cmdline = Some("a\0b".into()), "payload.cmdline"),
            (|c| c.serial.mode = SerialMode::File, "give serial.file"),
            (|c| c.serial.mode = SerialMode::Socket, "give serial.socket"),
            (|c| c.serial.file = Some("/x".into()), "serial.file is set"),
            (|c| c.devices = vec![device("/dev/vfio/1", None)], "devices[0].path"),
            (|c| c.devices = vec![device("/sys/bus/pci/devices/0000:01:20.0", None)], "devices[0].path"),
            (|c| c.devices = vec![device("/sys/bus/pci/devices/0000:01:00.8", None)], "devices[0].path"),
            (|c| c.devices = vec![device(BDF, None), device(BDF, None)], "devices[1].path"),
            (
                |c| c.devices = vec![device(BDF, Some("n")), device("/sys/bus/pci/devices/0000:02:00.0", Some("n"))],
                "devices[1].id \"n\" is there twice",
            ),
            (|c| c.devices = vec![device(BDF, Some("a/b"))], "devices[0].id"),
            (
                |c| c.devices = vec![DeviceConfig { container: Some(String::new()), ..device(BDF, None) }],
                "devices[0].container",
            ),
        ];
        for (i, (change, expected)) in table.iter().enumerate() {
            let mut config = good();
            change(&mut config);
            let problems = config.validate().unwrap_err();
            assert_eq!(problems.len(), 1, "case {i}: {problems:?}");
            assert!(problems[0].contains(expected), "case {i}: {problems:?}");
        }
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut config = good();
        config.cpus.boot_vcpus = 0;
        config.memory.size = 1;
        config.payload.kernel = None;
        assert_eq!(config.validate().unwrap_err().len(), 4);
    }

    #[test]
    fn bdf_is_the_name_in_sysfs() {
        assert_eq!(device("/sys/bus/pci/devices/0000:3d:1f.7", None).bdf(), Some("0000:3d:1f.7"));
        assert_eq!(device("/sys/bus/pci/devices/0000:3d:1f.7/", None).bdf(), None);
    }
}
