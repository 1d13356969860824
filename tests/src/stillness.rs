//! What a machine says when nothing moves any more: which interrupts still come, and who waits for what.

use std::{fs, io, thread, time::Duration};

use crate::net::ethtool;

/// Lines of the kernel's log that are kept: what it says when asked of blocked tasks, CPUs and timers is at its end.
const LOG_LINES: usize = 250;

/// Of a guest and the driver of its interface `name`, or of the machine that its VMM runs on.
pub fn report(name: Option<&str>) -> io::Result<Vec<String>> {
    let mut lines = interrupts(&fs::read_to_string("/proc/interrupts")?);
    lines.extend(fs::read_to_string("/proc/softirqs")?.lines().map(str::to_owned));
    match name {
        Some(name) => {
            lines.push(format!("registers of {name}: {:x?}", registers(name)?));
            lines.extend(kernel()?);
        }
        None => lines.extend(threads_of("theseus")?),
    }
    Ok(lines)
}

/// What each thread of the processes whose program's name begins so is doing, or waits for in the kernel.
fn threads_of(program: &str) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let exe = fs::read_link(process.path().join("exe")).unwrap_or_default();
        if !exe.file_name().is_some_and(|name| name.to_string_lossy().starts_with(program)) {
            continue;
        }
        for thread in fs::read_dir(process.path().join("task"))?.flatten() {
            // One that has ended meanwhile has none of these.
            let read = |file: &str| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
            let (stat, stack) = (read("stat"), read("stack"));
            let frames: Vec<_> = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
            lines.push(format!("{} ran {}: {}", stat.trim_end(), read("schedstat").trim_end(), frames.join(" < ")));
        }
    }
    Ok(lines)
}

/// Those that count something.
fn interrupts(all: &str) -> Vec<String> {
    let counts = |line: &&str| {
        let mut words = line.split_whitespace().skip(1).take_while(|word| word.parse::<u64>().is_ok());
        words.any(|count| count != "0")
    };
    all.lines().filter(counts).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// The first of the driver (`ethtool -d`): an igb has its interrupt causes and masks from 0xd on.
fn registers(name: &str) -> io::Result<Vec<u32>> {
    const ETHTOOL_GREGS: u32 = 0x4;
    /// struct ethtool_regs: command, version, length.
    const HEAD: usize = 3;
    const COUNT: usize = 32;
    // Drivers fill in all that they have, whatever the length says.
    let mut regs = vec![0u32; HEAD + (64 << 10)];
    (regs[0], regs[2]) = (ETHTOOL_GREGS, (COUNT * 4) as u32);
    // SAFETY: room for more registers than any driver has.
    unsafe { ethtool("registers", name, regs.as_mut_ptr().cast())? };
    Ok(regs[HEAD..HEAD + COUNT].to_vec())
}

/// Blocked tasks, what each CPU does, and its timers.
fn kernel() -> io::Result<Vec<String>> {
    fs::write("/proc/sys/kernel/sysrq", "1")?;
    for key in ["w", "l", "q"] {
        fs::write("/proc/sysrq-trigger", key)?;
        // Other CPUs write theirs when they are interrupted.
        thread::sleep(Duration::from_millis(500));
    }
    const SYSLOG_ACTION_READ_ALL: libc::c_int = 3;
    let mut log = vec![0u8; 256 << 10];
    // SAFETY: a buffer of that size.
    let read = unsafe { libc::klogctl(SYSLOG_ACTION_READ_ALL, log.as_mut_ptr().cast(), log.len() as libc::c_int) };
    log.truncate(usize::try_from(read).map_err(|_| io::Error::last_os_error())?);
    let log = String::from_utf8_lossy(&log).into_owned();
    let lines: Vec<_> = log.lines().map(str::to_owned).collect();
    Ok(lines[lines.len().saturating_sub(LOG_LINES)..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_interrupts_are_left_out() {
        let all = "           CPU0       CPU1\n  24:          0          0   PCI-MSIX eth0\n 25:   0   7  PCI-MSIX \
                   eth0-TxRx-0\n";
        assert_eq!(interrupts(all), ["25: 0 7 PCI-MSIX eth0-TxRx-0"]);
    }
}
