//! Checks of a configuration that the types cannot make. All problems are reported at once.

use std::collections::HashSet;
use std::path::Path;

use theseus_resources::state::HANDLES;

use super::config::{
    CpuAffinity, CpusConfig, DeviceConfig, HOST_CPUS_MAX, HUGEPAGE_SIZE, LandlockConfig, MemoryConfig, PayloadConfig,
    SerialConfig, SerialMode, VmConfig,
};

/// The least RAM of a guest, in bytes.
pub const MIN_MEMORY: u64 = 128 << 20;
/// Keeps address arithmetic far from overflow; what the host's address width allows is checked when the VM is made.
pub(super) const MAX_MEMORY: u64 = 4 << 40;
/// The most vCPUs of a guest.
pub const MAX_VCPUS: u32 = 64;
/// Bytes that the address of a unix socket holds of a path (sun_path, without the NUL).
pub const SOCKET_PATH_MAX: usize = 107;
const MAX_NAME: usize = 64;

impl VmConfig {
    /// Checks everything that can be checked without touching the host.
    ///
    /// # Errors
    /// One sentence for every problem, each naming its key and the remedy.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let Self { cpus, memory, payload, serial, devices, landlock_enable, landlock_rules } = self;
        let mut problems = Vec::new();

        if !(1..=MAX_VCPUS).contains(&cpus.boot_vcpus) {
            problems.push(format!("cpus.boot_vcpus is {}: give 1 to {MAX_VCPUS}", cpus.boot_vcpus));
        }
        if let Some(max) = cpus.max_vcpus
            && max < cpus.boot_vcpus
        {
            problems.push(format!("cpus.max_vcpus is {max}, less than cpus.boot_vcpus: leave it out"));
        }
        check_affinity(cpus, &mut problems);
        check_memory(memory, &mut problems);
        check_payload(payload, &mut problems);
        check_serial(serial, &mut problems);
        check_devices(devices, &mut problems);
        let rules = landlock_rules.as_deref().unwrap_or_default();
        if !landlock_enable && !rules.is_empty() {
            problems.push("landlock_rules are set without landlock_enable: set both".into());
        }
        check_landlock(rules, &mut problems);

        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

fn check_affinity(cpus: &CpusConfig, problems: &mut Vec<String>) {
    let mut seen = HashSet::new();
    for CpuAffinity { vcpu, host_cpus } in cpus.affinity.iter().flatten() {
        if *vcpu >= cpus.boot_vcpus || !seen.insert(*vcpu) {
            let last = cpus.boot_vcpus.saturating_sub(1);
            problems.push(format!("cpus.affinity names vCPU {vcpu}: give each of 0 to {last} once at most"));
        }
        if host_cpus.is_empty() || host_cpus.iter().any(|cpu| *cpu >= HOST_CPUS_MAX) {
            problems.push(format!("cpus.affinity of vCPU {vcpu}: give host_cpus, each below {HOST_CPUS_MAX}"));
        }
    }
}

fn check_memory(memory: &MemoryConfig, problems: &mut Vec<String>) {
    let MemoryConfig { size, shared: _, hugepages, hugepage_size, thp: _, prefault: _ } = memory;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(size) {
        problems.push(format!("memory.size is {size} bytes: give 128 MiB to 4 TiB"));
    }
    let (page, name) = if *hugepages { (HUGEPAGE_SIZE, "2 MiB with hugepages") } else { (4096, "4 KiB") };
    if size % page != 0 {
        problems.push(format!("memory.size is {size} bytes: make it a multiple of {name}"));
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
            // vm.info has it so.
            Some(_) if key == "file" && *mode == SerialMode::Pty => {}
            Some(_) if *mode != wanted_by => problems.push(format!(
                "serial.{key} is set but serial.mode is {mode:?}: set the mode to {wanted_by:?} or drop it"
            )),
            Some(path) => check_path(&format!("serial.{key}"), path, problems),
            None => {}
        }
    }
    if socket.as_ref().is_some_and(|path| path.as_os_str().len() > SOCKET_PATH_MAX) {
        problems.push(format!("serial.socket has more than {SOCKET_PATH_MAX} bytes: give a shorter path"));
    }
}

/// The node of vm.info that the serial port has.
pub const SERIAL_ID: &str = "serial";

fn check_devices(devices: &[DeviceConfig], problems: &mut Vec<String>) {
    let (mut paths, mut ids) = (HashSet::new(), HashSet::new());
    for (i, device) in devices.iter().enumerate() {
        let DeviceConfig { path, id, container } = device;
        match device.bdf() {
            None => problems.push(format!(
                "devices[{i}].path is {path:?}: give /sys/bus/pci/devices/DDDD:BB:DD.F, or DDDD:BB:DD.F alone (as \
                 lspci -D prints it; mdev is not supported)"
            )),
            Some(bdf) if !paths.insert(bdf.clone()) => {
                problems.push(format!("devices[{i}].path {path:?} is there twice: name each device once"));
            }
            Some(_) => {}
        }
        if let Some(id) = id {
            check_name(&format!("devices[{i}].id"), id, problems);
            if !ids.insert(id) {
                problems.push(format!("devices[{i}].id {id:?} is there twice: ids must differ"));
            }
            if id == SERIAL_ID || id.ends_with(HANDLES) {
                problems.push(format!(
                    "devices[{i}].id is {id:?}, but {SERIAL_ID:?} is the serial port, and no id may end in \
                     {HANDLES:?}: give it another"
                ));
            }
        }
        if let Some(name) = container {
            check_name(&format!("devices[{i}].container"), name, problems);
        }
    }
}

fn check_landlock(rules: &[LandlockConfig], problems: &mut Vec<String>) {
    for (i, rule) in rules.iter().enumerate() {
        check_path(&format!("landlock_rules[{i}].path"), &rule.path, problems);
        if rule.accesses().is_none() {
            problems.push(format!("landlock_rules[{i}].access is {:?}: give r, w or rw", rule.access));
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
            (|c| c.cpus = CpusConfig { boot_vcpus: 4, max_vcpus: Some(2), affinity: None }, "cpus.max_vcpus is 2"),
            (
                |c| c.cpus = crate::args::cpus("boot=2,affinity=[2@[0]]").unwrap(),
                "names vCPU 2: give each of 0 to 1 once",
            ),
            (|c| c.cpus = crate::args::cpus("boot=2,affinity=[1@[0],1@[1]]").unwrap(), "names vCPU 1"),
            (|c| c.cpus.affinity = Some(vec![CpuAffinity { vcpu: 0, host_cpus: vec![] }]), "give host_cpus"),
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
            (
                |c| {
                    c.serial.mode = SerialMode::Socket;
                    c.serial.socket = Some("x".repeat(108).into());
                },
                "serial.socket has more than 107 bytes",
            ),
            (|c| c.devices = vec![device("/dev/vfio/1", None)], "devices[0].path"),
            (|c| c.devices = vec![device("/sys/bus/pci/devices/0000:01:20.0", None)], "devices[0].path"),
            (|c| c.devices = vec![device("/sys/bus/pci/devices/0000:01:00.8", None)], "devices[0].path"),
            (|c| c.devices = vec![device(BDF, None), device(BDF, None)], "devices[1].path"),
            (|c| c.devices = vec![device(BDF, None), device("01:00.0", None)], "devices[1].path"),
            (
                |c| c.devices = vec![device(BDF, Some("n")), device("/sys/bus/pci/devices/0000:02:00.0", Some("n"))],
                "devices[1].id \"n\" is there twice",
            ),
            (|c| c.devices = vec![device(BDF, Some("a/b"))], "devices[0].id"),
            (|c| c.devices = vec![device(BDF, Some("a.handles"))], "no id may end in \".handles\""),
            (|c| c.devices = vec![device(BDF, Some("serial"))], "\"serial\" is the serial port"),
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
    fn a_device_is_named_in_several_ways() {
        const BDF: &str = "0000:3d:1f.7";
        let same = [
            "/sys/bus/pci/devices/0000:3d:1f.7",
            "/sys/bus/pci/devices/0000:3D:1F.7",
            "/sys/bus/pci/devices/0000:3d:1f.7/",
            "/sys/devices/pci0000:3c/0000:3c:01.0/0000:3d:1f.7",
            "/sys/bus/pci/drivers/vfio-pci/0000:3d:1f.7",
            "0000:3d:1f.7",
            "3d:1f.7",
        ];
        for path in same {
            let mut config = good();
            config.devices = vec![device(path, None)];
            config.validate().unwrap();
            let settled = config.settled();
            assert_eq!(settled.devices[0].path, std::path::Path::new("/sys/bus/pci/devices").join(BDF), "{path}");
            assert_eq!(settled.devices[0].bdf().as_deref(), Some(BDF));
        }
        let none =
            ["", "/", "nic", "/dev/vfio/1", "/tmp/0000:3d:1f.7", "/sys/bus/pci/devices/0000:3d:1f.7/net", "é:1f.7"];
        for path in none {
            assert_eq!(device(path, None).bdf(), None, "{path}");
        }
    }

    #[test]
    fn what_is_accepted_is_said_to_be_what_it_comes_to() {
        let mut config = good();
        config.cpus = CpusConfig { boot_vcpus: 2, max_vcpus: Some(200), affinity: None };
        config.memory.shared = false;
        config.serial = SerialConfig { mode: SerialMode::Pty, file: Some("/dev/pts/7".into()), socket: None };
        config.validate().unwrap();
        let settled = config.settled();
        assert_eq!(settled.cpus.max_vcpus, Some(2));
        assert!(settled.memory.shared && settled.serial.file.is_none());
        assert_eq!(good().settled().cpus.max_vcpus, Some(1));
    }
}
