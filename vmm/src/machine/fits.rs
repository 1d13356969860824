//! Whether the guest's RAM can be had: what this process may have, and what the host has, before any of it is taken.
//!
//! Small pages are taken when the guest first touches them, so more of them than are free now is legal; never all there
//! are. How many huge pages are free the kernel says itself, when they are reserved (`theseus_resources::ram`).

use std::{fs, io};

use rustix::process::{Resource, getrlimit};
use theseus_resources::Pages;

use super::spec::MachineSpec;
use crate::available_memory::{AvailableMemory, field};

/// For the VMM itself beside the guest's RAM: binary, stacks, heap, BARs of devices not counted.
const OWN: u64 = 64 << 20;

struct Wanted {
    ram: u64,
    huge: bool,
    /// Why all of it is needed at the start.
    at_once: Option<&'static str>,
}

/// Bytes. None: no limit.
#[derive(Clone)]
struct Available {
    /// All memory that is not set aside for huge pages, and swap.
    total: u64,
    swap: u64,
    room: AvailableMemory,
    /// What a cgroup leaves of huge pages.
    huge_room: Option<AvailableMemory>,
    max_file: Option<u64>,
    max_mapped: Option<u64>,
    mapped: u64,
}

/// Why it cannot be had. Bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lack {
    #[error(
        "RLIMIT_FSIZE is {} MiB, and the guest's RAM is a file (in memory) of {} MiB: ulimit -f unlimited, or \
         LimitFSIZE=infinity",
        mib(*limit), mib(*ram)
    )]
    FileSize { limit: u64, ram: u64 },
    #[error(
        "RLIMIT_AS is {} MiB, less than the guest's {} MiB of RAM and the VMM: ulimit -v unlimited, or \
         LimitAS=infinity",
        mib(*limit), mib(*ram)
    )]
    AddressSpace { limit: u64, ram: u64 },
    #[error(
        "the guest's {} MiB of RAM are huge pages, and {of} has {} MiB of them left: raise it, or take hugepages=off",
        mib(*ram), mib(*free)
    )]
    HugePages { ram: u64, of: String, free: u64 },
    #[error(
        "the guest's {} MiB of RAM are more than this host has: {} MiB of memory without huge pages, {} MiB of swap",
        mib(*ram), mib(*total), mib(*swap)
    )]
    Host { ram: u64, total: u64, swap: u64 },
    #[error(
        "the guest's {} MiB of RAM are needed at once ({why}), and {of} has {} MiB of free memory: free some, or give \
         the guest less",
        mib(*ram), mib(*free)
    )]
    AtOnce { ram: u64, why: &'static str, of: String, free: u64 },
}

/// What may become a problem. Bytes.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has {} MiB of RAM, {of} {} MiB of free memory: it may be short of it once the guest has touched so much",
    mib(*ram), mib(*free)
)]
struct MayLack {
    ram: u64,
    of: String,
    free: u64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum FitError {
    #[error(transparent)]
    Lack(#[from] Lack),
    #[error("the host's memory cannot be read: {0}")]
    Unknown(#[from] io::Error),
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// Whether it can be had. What may become a problem is logged.
pub(super) fn check(spec: &MachineSpec) -> Result<(), FitError> {
    let at_once = match spec {
        _ if !spec.passthrough.is_empty() => Some("the devices may do DMA to all of it"),
        _ if spec.memory.prefault => Some("prefault=on touches all of it"),
        _ => None,
    };
    let wanted = Wanted { ram: spec.memory.size, huge: matches!(spec.memory.pages, Pages::Huge(_)), at_once };
    if let Some(warning) = judge(&wanted, &Available::now()?)? {
        log::warn!("{warning}");
    }
    Ok(())
}

fn judge(wanted: &Wanted, available: &Available) -> Result<Option<MayLack>, Lack> {
    let Wanted { ram, huge, at_once } = *wanted;
    let Available { total, swap, ref room, ref huge_room, max_file, max_mapped, mapped } = *available;
    if let Some(limit) = max_file.filter(|limit| *limit < ram) {
        return Err(Lack::FileSize { limit, ram });
    }
    if let Some(limit) = max_mapped.filter(|limit| *limit < mapped.saturating_add(ram).saturating_add(OWN)) {
        return Err(Lack::AddressSpace { limit, ram });
    }
    if huge {
        return match huge_room.clone().filter(|room| room.free < ram) {
            Some(AvailableMemory { free, of }) => Err(Lack::HugePages { ram, of, free }),
            None => Ok(None),
        };
    }
    if ram > total.saturating_add(swap) {
        return Err(Lack::Host { ram, total, swap });
    }
    let AvailableMemory { free, of } = room.clone();
    match at_once {
        _ if ram <= free => Ok(None),
        Some(why) => Err(Lack::AtOnce { ram, why, of, free }),
        None => Ok(Some(MayLack { ram, of, free })),
    }
}

impl Available {
    fn now() -> io::Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let of = |text: &str, key| Some(field(text, key)?.parse::<u64>().ok()?.saturating_mul(1024));
        let get = |key| of(&meminfo, key).unwrap_or(0);
        let status = fs::read_to_string("/proc/self/status")?;
        Ok(Self {
            total: get("MemTotal:").saturating_sub(get("Hugetlb:")),
            swap: get("SwapTotal:"),
            room: AvailableMemory::of_this_process()?,
            huge_room: AvailableMemory::in_huge_pages(),
            max_file: getrlimit(Resource::Fsize).current,
            max_mapped: getrlimit(Resource::As).current,
            mapped: of(&status, "VmSize:").unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_api::types::VmConfig;

    const GIB: u64 = 1 << 30;

    fn host() -> Available {
        let room = AvailableMemory { free: 8 * GIB, of: "the host".into() };
        Available { total: 16 * GIB, swap: GIB, room, huge_room: None, max_file: None, max_mapped: None, mapped: 0 }
    }

    #[test]
    fn only_what_can_never_be_is_refused_where_pages_come_with_their_use() {
        let wanted = |ram, at_once| Wanted { ram, huge: false, at_once };
        let judge = |wanted: Wanted, host: &Available| judge(&wanted, host);
        assert_eq!(judge(wanted(8 * GIB, None), &host()), Ok(None));
        assert!(judge(wanted(17 * GIB, None), &host()).unwrap().unwrap().to_string().contains("the host 8192 MiB"));
        assert!(judge(wanted(17 * GIB + 1, None), &host()).unwrap_err().to_string().contains("16384 MiB of memory"));
        assert_eq!(judge(wanted(8 * GIB, Some("why")), &host()), Ok(None));
        let error = judge(wanted(9 * GIB, Some("why")), &host()).unwrap_err().to_string();
        assert!(error.contains("9216 MiB of RAM are needed at once (why)"), "{error}");
        let huge = || Wanted { ram: 99 * GIB, huge: true, at_once: Some("why") };
        assert_eq!(judge(huge(), &host()), Ok(None), "the pool says itself what it has");
        let bound = Available { huge_room: Some(AvailableMemory { free: GIB, of: "the cgroup".into() }), ..host() };
        assert!(judge(huge(), &bound).unwrap_err().to_string().contains("the cgroup has 1024 MiB of them left"));
    }

    #[test]
    fn limits_of_the_process_are_named_with_their_remedy() {
        let limit = |max_file, max_mapped| {
            judge(
                &Wanted { ram: GIB, huge: false, at_once: None },
                &Available { max_file, max_mapped, mapped: GIB, ..host() },
            )
        };
        assert_eq!(limit(Some(GIB), Some(2 * GIB + OWN)), Ok(None));
        assert!(limit(Some(GIB - 1), None).unwrap_err().to_string().contains("LimitFSIZE=infinity"));
        assert!(limit(None, Some(2 * GIB)).unwrap_err().to_string().contains("ulimit -v unlimited"));
    }

    #[test]
    fn a_small_guest_fits_here() {
        let mut config = VmConfig::default();
        config.payload.kernel = Some("/boot/vmlinuz".into());
        let mut spec = MachineSpec::of(&config).unwrap();
        check(&spec).unwrap();
        spec.memory.size = 1 << 60;
        assert!(check(&spec).unwrap_err().to_string().contains("more than this host has"));
    }
}
