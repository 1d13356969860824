//! What the guest can tell about its machine, and ways to end it.

use std::{
    arch::x86_64::__cpuid_count,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    path::Path,
    time::{Duration, Instant},
};

use crate::proto::{MachineInfo, Nic, PciFunction, Vector};

fn read_trimmed(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_string())
}

fn sorted_names(dir: &str) -> io::Result<Vec<String>> {
    let mut names: Vec<String> =
        fs::read_dir(dir)?.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// PCI network interfaces, in PCI order.
pub(super) fn nics() -> io::Result<Vec<Nic>> {
    let mut nics = Vec::new();
    for name in sorted_names("/sys/class/net")? {
        let device = format!("/sys/class/net/{name}/device");
        let base = |path: String| {
            fs::canonicalize(path).ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()))
        };
        let Some(bdf) = base(device.clone()) else { continue };
        let driver = base(format!("{device}/driver")).unwrap_or_default();
        nics.push(Nic { mac: read_trimmed(format!("/sys/class/net/{name}/address"))?, name, bdf, driver });
    }
    nics.sort_by(|a, b| a.bdf.cmp(&b.bdf));
    Ok(nics)
}

/// Pins the calling thread to `cpu`.
pub(super) fn pin_to(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set; CPU_SET checks its index.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result < 0 {
        return Err(io::Error::other(format!("cannot run on CPU {cpu}: {}", io::Error::last_os_error())));
    }
    Ok(())
}

/// What `body` returns when run on `cpu`.
pub(super) fn on_cpu<T: Send + 'static>(cpu: usize, body: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    std::thread::spawn(move || pin_to(cpu).map(|()| body()))
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

/// Leaves with subleaves; the others ignore ECX.
const INDEXED: [u32; 16] =
    [4, 7, 0xb, 0xd, 0xf, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1d, 0x1e, 0x1f, 0x24, 0x8000_001d, 0x8000_0020];
const SUBLEAVES: u32 = 64;

/// Every leaf that is not all zero, `LEAF.SUB EAX EBX ECX EDX` in hex, as this CPU sees it.
pub(super) fn cpuid_lines() -> Vec<String> {
    let mut lines = Vec::new();
    for first in [0, 0x4000_0000, 0x8000_0000] {
        let last = __cpuid_count(first, 0).eax;
        // KVM's own range says its end in EAX as well, or 0 for "just this one".
        for leaf in first..=last.clamp(first, first + 0x40) {
            let subleaves = if INDEXED.contains(&leaf) { SUBLEAVES } else { 1 };
            let mut previous = None;
            for sub in 0..subleaves {
                let r = __cpuid_count(leaf, sub);
                let values = [r.eax, r.ebx, r.ecx, r.edx];
                if values == [0; 4] {
                    continue;
                }
                // A leaf without so many subleaves may repeat itself.
                if previous == Some(values) && sub > 8 {
                    break;
                }
                previous = Some(values);
                let [a, b, c, d] = values;
                lines.push(format!("{leaf:x}.{sub:x} {a:x} {b:x} {c:x} {d:x}"));
            }
        }
    }
    lines
}

/// [`cpuid_lines`] of every CPU that is online.
pub(super) fn cpuid_of_all() -> io::Result<Vec<Vec<String>>> {
    (0..info()?.cpus_online).map(|cpu| on_cpu(cpu, cpuid_lines)).collect()
}

/// Lines that are in one and not in the other, CPU by CPU.
pub(super) fn changes(before: &[Vec<String>], after: &[Vec<String>]) -> Vec<String> {
    let mut changes = Vec::new();
    for cpu in 0..before.len().max(after.len()) {
        let of = |all: &[Vec<String>]| all.get(cpu).cloned().unwrap_or_default();
        let (old, new) = (of(before), of(after));
        changes.extend(old.iter().filter(|l| !new.contains(l)).map(|l| format!("CPU {cpu} - {l}")));
        changes.extend(new.iter().filter(|l| !old.contains(l)).map(|l| format!("CPU {cpu} + {l}")));
    }
    changes
}

/// Every PCI function of the guest.
pub(super) fn pci() -> io::Result<Vec<PciFunction>> {
    let mut functions = Vec::new();
    for bdf in sorted_names("/sys/bus/pci/devices")? {
        let dir = format!("/sys/bus/pci/devices/{bdf}");
        let mut bytes = Vec::new();
        File::open(format!("{dir}/config"))?.take(256).read_to_end(&mut bytes)?;
        let mut config = String::with_capacity(512);
        for byte in bytes {
            let _ = write!(config, "{byte:02x}");
        }
        functions.push(PciFunction { bdf, config, resources: fs::read_to_string(format!("{dir}/resource"))? });
    }
    Ok(functions)
}

/// The interrupts whose name contains `name`.
pub(super) fn interrupts(name: &str) -> io::Result<Vec<Vector>> {
    Ok(parse_interrupts(&fs::read_to_string("/proc/interrupts")?, name))
}

fn parse_interrupts(text: &str, name: &str) -> Vec<Vector> {
    let mut lines = text.lines();
    let cpus = lines.next().unwrap_or_default().split_whitespace().count();
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let irq = words.next()?.trim_end_matches(':').to_string();
            let count = words.by_ref().take(cpus).filter_map(|w| w.parse::<u64>().ok()).sum();
            let label = words.last()?.to_string();
            label.contains(name).then_some(Vector { irq, name: label, count })
        })
        .collect()
}

/// Waits until one of those interrupts comes.
pub(super) fn interrupts_wait(name: &str, timeout_ms: u64) -> io::Result<Vec<Vector>> {
    let total = |vectors: &[Vector]| vectors.iter().map(|v| v.count).sum::<u64>();
    let first = total(&interrupts(name)?);
    let started = Instant::now();
    loop {
        let now = interrupts(name)?;
        if total(&now) != first {
            return Ok(now);
        }
        if started.elapsed() > Duration::from_millis(timeout_ms) {
            return Err(io::Error::other(format!("no interrupt of '{name}' within {timeout_ms} ms")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The lines of the kernel's log that hold one of `words`.
pub(super) fn dmesg(words: &[String]) -> io::Result<String> {
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0_u8; 1 << 18];
    // SAFETY: the buffer is as long as said.
    let len = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), buffer.len() as libc::c_int) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let log = String::from_utf8_lossy(&buffer[..len]);
    let told = log.lines().filter(|line| words.iter().any(|word| line.contains(word)));
    Ok(told.map(|line| format!("{line}\n")).collect())
}

const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

pub(super) fn set_clock_source(name: &str) -> io::Result<()> {
    fs::write(CLOCK_SOURCE, name)
}

pub(super) fn info() -> io::Result<MachineInfo> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let memory_kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    // SAFETY: plain query without pointers.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    let uptime = read_trimmed("/proc/uptime")?;
    Ok(MachineInfo {
        kernel: read_trimmed("/proc/sys/kernel/osrelease")?,
        cpus_online: usize::try_from(cpus).unwrap_or(0),
        memory_kib,
        clocksource: read_trimmed(CLOCK_SOURCE).unwrap_or_default(),
        uptime_s: uptime.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0.0),
    })
}

/// The ACPI power button, which is an input device with a key.
pub(super) struct PowerButton(File);

impl PowerButton {
    pub(super) fn open() -> io::Result<Self> {
        let name = sorted_names("/sys/class/input")?
            .into_iter()
            .find(|n| {
                n.starts_with("event")
                    && read_trimmed(format!("/sys/class/input/{n}/device/name"))
                        .is_ok_and(|name| name == "Power Button")
            })
            .ok_or_else(|| io::Error::other("the guest's kernel found no power button"))?;
        Ok(Self(File::open(format!("/dev/input/{name}"))?))
    }

    /// Waits for a press.
    pub(super) fn wait(mut self) -> io::Result<()> {
        const EV_KEY: u16 = 1;
        const KEY_POWER: u16 = 116;
        loop {
            // struct input_event: timeval (16 bytes), type, code, value.
            let mut event = [0; 24];
            self.0.read_exact(&mut event)?;
            let field = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
            if field(16) == EV_KEY && field(18) == KEY_POWER {
                return Ok(());
            }
        }
    }
}

/// Ends the machine after `after_ms`: late enough for the answer to leave the serial port.
pub(super) fn reboot(command: libc::c_int, after_ms: u64) -> io::Result<()> {
    std::thread::Builder::new().spawn(move || {
        std::thread::sleep(Duration::from_millis(after_ms));
        // SAFETY: there is nothing to keep in this machine.
        unsafe { libc::reboot(command) };
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_read() {
        let text = "           CPU0       CPU1\n  4:  10  0  IO-APIC  4-edge  ttyS0\n 25:  3  4  \
                    PCI-MSIX-0000:00:03.0  1-edge  eth0-TxRx-0\nNMI:  0  0  Non-maskable interrupts\n";
        let vectors = parse_interrupts(text, "eth0-");
        assert_eq!(vectors, [Vector { irq: "25".into(), name: "eth0-TxRx-0".into(), count: 7 }]);
    }

    #[test]
    fn cpuid_has_the_vendor_and_ends() {
        let lines = cpuid_lines();
        assert!(lines.iter().any(|l| l.starts_with("0.0 ")) && lines.iter().any(|l| l.starts_with("80000000.0 ")));
        assert!(lines.len() < 2000);
    }

    #[test]
    fn changes_are_told_both_ways() {
        let cpu = |lines: &[&str]| lines.iter().map(|l| l.to_string()).collect::<Vec<_>>();
        let before = [cpu(&["1 a", "2 b"]), cpu(&["1 a"])];
        assert!(changes(&before, &before).is_empty());
        assert_eq!(changes(&before, &[cpu(&["1 a", "2 c"])]), ["CPU 0 - 2 b", "CPU 0 + 2 c", "CPU 1 - 1 a"]);
    }

    #[test]
    fn this_machine_tells_about_itself() {
        let info = info().unwrap();
        assert!(info.cpus_online > 0 && info.memory_kib > 0 && info.uptime_s > 0.0);
    }
}
