//! What drivers, devices and the kernel counted: where packets went that did not come.

use std::{fs, io};

use crate::net::ethtool;

/// Counters of the interface `name` since its start that are not zero: packets as its driver and as the device itself counted them, and
/// whatever tells of loss there or in the machine.
pub fn of(name: &str) -> io::Result<Vec<(String, u64)>> {
    let mut counters = statistics(name)?;
    counters.extend(device(name)?);
    counters.extend(protocols()?);
    counters.retain(|(counter, count)| *count > 0 && tells(counter));
    counters.sort();
    counters.dedup();
    Ok(counters)
}

fn tells(counter: &str) -> bool {
    let counter = counter.to_ascii_lowercase();
    counter.ends_with("x_packets")
        || ["err", "drop", "discard", "miss", "no_buffer", "fail", "timeout", "noports"]
            .iter()
            .any(|w| counter.contains(w))
}

/// The driver's, in sysfs.
fn statistics(name: &str) -> io::Result<Vec<(String, u64)>> {
    let mut counters = Vec::new();
    for entry in fs::read_dir(format!("/sys/class/net/{name}/statistics"))?.flatten() {
        let count = fs::read_to_string(entry.path())?.trim().parse().unwrap_or(0);
        counters.push((entry.file_name().to_string_lossy().into_owned(), count));
    }
    Ok(counters)
}

/// The device's (`ethtool -S`): the registers of the NIC are among them.
fn device(name: &str) -> io::Result<Vec<(String, u64)>> {
    const ETHTOOL_GDRVINFO: u32 = 0x3;
    const ETHTOOL_GSTRINGS: u32 = 0x1b;
    const ETHTOOL_GSTATS: u32 = 0x1d;
    const ETH_SS_STATS: u32 = 1;
    /// struct ethtool_drvinfo: 196 bytes, n_stats at 180.
    const DRVINFO: (usize, usize) = (49, 45);
    /// ETH_GSTRING_LEN.
    const NAME: usize = 32;

    let mut info = vec![0u32; DRVINFO.0];
    info[0] = ETHTOOL_GDRVINFO;
    // SAFETY: the size of struct ethtool_drvinfo.
    unsafe { ethtool("driver", name, info.as_mut_ptr().cast())? };
    let count = info[DRVINFO.1] as usize;

    // struct ethtool_gstrings: three words, then the names.
    let mut names = vec![0u32; 3 + count * NAME / 4];
    (names[0], names[1], names[2]) = (ETHTOOL_GSTRINGS, ETH_SS_STATS, count as u32);
    // SAFETY: room for as many names as the driver has.
    unsafe { ethtool("names of the counters", name, names.as_mut_ptr().cast())? };
    // struct ethtool_stats: two words, then the counters.
    let mut stats = vec![0u64; 1 + count];
    stats[0] = u64::from(ETHTOOL_GSTATS) | (count as u64) << 32;
    // SAFETY: room for as many counters as the driver has.
    unsafe { ethtool("counters", name, stats.as_mut_ptr().cast())? };

    let bytes: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let names = bytes.chunks(NAME).map(|name| {
        let end = name.iter().position(|&b| b == 0).unwrap_or(NAME);
        format!("device {}", String::from_utf8_lossy(&name[..end]))
    });
    Ok(names.zip(stats[1..].iter().copied()).collect())
}

/// The machine's, of IP and UDP.
fn protocols() -> io::Result<Vec<(String, u64)>> {
    let snmp = fs::read_to_string("/proc/net/snmp")?;
    let mut counters = Vec::new();
    for protocol in ["Ip: ", "Udp: "] {
        let mut lines = snmp.lines().filter_map(|line| line.strip_prefix(protocol));
        if let (Some(names), Some(counts)) = (lines.next(), lines.next()) {
            let counts = counts.split(' ').map(|count| count.parse().unwrap_or(0));
            counters.extend(names.split(' ').map(|name| format!("{protocol}{name}")).zip(counts));
        }
    }
    Ok(counters)
}
