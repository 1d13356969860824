//! What drivers, devices and the kernel counted: where packets went that did not come.

use std::{collections::BTreeMap, fs, io, path::Path};

use crate::net::ethtool;

/// Counters of the interface `name` since its start that are not zero: packets as its driver and as the device itself
/// counted them, and whatever tells of loss there or in the machine.
pub fn of(name: &str) -> io::Result<Vec<(String, u64)>> {
    let mut counters = statistics(name)?;
    counters.extend(device(name)?);
    counters.extend(protocols()?);
    counters.extend(drops());
    counters.retain(|(counter, count)| *count > 0 && tells(counter));
    counters.sort();
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

const TRACEFS: &str = "/sys/kernel/tracing";

pub fn mount_tracefs() {
    if !Path::new(TRACEFS).join("trace").exists() {
        // SAFETY: C strings; without data.
        unsafe {
            libc::mount(c"tracefs".as_ptr(), c"/sys/kernel/tracing".as_ptr(), c"tracefs".as_ptr(), 0, std::ptr::null())
        };
    }
}

/// From now on the kernel notes every packet that it drops, why and where (skb:kfree_skb). Without tracefs there are no
/// such notes.
pub fn note_drops() {
    mount_tracefs();
    let tracefs = Path::new(TRACEFS);
    for switch in ["options/stacktrace", "events/skb/kfree_skb/enable"] {
        let _ = fs::write(tracefs.join(switch), "1");
    }
}

/// The notes: how often for which reason and called by whom.
fn drops() -> Vec<(String, u64)> {
    fs::read_to_string(Path::new(TRACEFS).join("trace")).map(|trace| drops_in(&trace)).unwrap_or_default()
}

fn drops_in(trace: &str) -> Vec<(String, u64)> {
    /// Callers that are named.
    const CALLERS: usize = 10;
    let mut drops = BTreeMap::new();
    for event in trace.split("kfree_skb: ").skip(1) {
        let reason =
            event.lines().next().and_then(|line| line.split_once("reason: ")).map_or("?", |(_, reason)| reason);
        let callers: Vec<_> = event.lines().filter_map(|line| line.strip_prefix(" => ")).take(CALLERS).collect();
        *drops.entry(format!("dropped: {reason}, {}", callers.join(" < "))).or_insert(0) += 1;
    }
    drops.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_by_reason_and_caller() {
        let event = "kworker-7 [000] ..s1 1.0: kfree_skb: skbaddr=00000000f00 protocol=2048 location=00000000ba4 \
                     reason: QDISC_DROP\n\
                     kworker-7 [000] ..s1 1.0: <stack trace>\n => kfree_skb_reason\n => fq_codel_dequeue\n";
        let expected = ("dropped: QDISC_DROP, kfree_skb_reason < fq_codel_dequeue".to_string(), 2);
        assert_eq!(drops_in(&format!("# tracer: nop\n{event}{event}")), [expected]);
    }

    #[test]
    fn what_tells_of_loss() {
        assert!(["tx_dropped", "device rx_packets", "Udp: RcvbufErrors", "dropped: ?"].iter().all(|name| tells(name)));
        assert!(!["rx_bytes", "Ip: InReceives", "device tx_queue_0_bytes"].iter().any(|name| tells(name)));
    }
}
