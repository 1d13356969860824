//! What an update will need of this process's limits and of the host's memory: known before the guest is touched.

use std::io;

use rustix::process::{Resource, getrlimit};

use crate::available_memory::AvailableMemory;
use crate::vcpus::placement::Placement;

/// An update holds at most so many more fds than the process has between updates: the saved state and its copies for
/// the dry run, both programs, timeline, channel and pidfd, and duplicates of the API's connections, of which there are
/// 64 at most.
const MORE_FDS: u64 = 96;
/// For the new image itself beside the guest's page tables.
const IMAGE: u64 = 32 << 20;
/// Threads of the new VMM beside its vCPUs', KVM's worker among them, and what is started for the update itself.
const THREADS: u64 = 16;
/// The saved state of 64 vCPUs and a serial port with all the output that it may keep is a third of it.
const STATE: u64 = 16 << 20;

/// What the guest makes an update need.
#[derive(Clone, Debug, Default)]
pub(super) struct Requirements {
    /// Of each vCPU's thread.
    pub placements: Vec<Placement>,
    /// Bytes of RAM, and whether it is in pages of 4 KiB.
    pub ram: u64,
    pub small_pages: bool,
}

/// What this process may have, in bytes and numbers. None: no limit.
#[derive(Clone, Debug)]
struct Limits {
    open_fds: u64,
    max_fds: Option<u64>,
    max_file: Option<u64>,
    room: AvailableMemory,
    threads: Option<AvailableMemory>,
}

/// Every reason against an update; empty if there is none.
pub(super) fn reasons(needs: &Requirements) -> Vec<String> {
    match Limits::of_this_process() {
        Ok(limits) => judge(needs, limits),
        Err(error) => vec![format!("the limits of this process cannot be read: {error}: {}", remedy(&error))],
    }
}

/// What helps where a file of this process's own could not be opened.
pub(super) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "raise RLIMIT_NOFILE (prlimit --nofile)",
        Some(libc::EFBIG) => "raise RLIMIT_FSIZE (prlimit --fsize)",
        Some(libc::ENOMEM | libc::ENOSPC) => "is the host, or a cgroup, out of memory?",
        _ => "is /proc mounted?",
    }
}

fn judge(needs: &Requirements, limits: Limits) -> Vec<String> {
    let Limits { open_fds, max_fds, max_file, room, threads } = limits;
    let mut reasons = Vec::new();
    if let Some(limit) = max_fds.filter(|limit| *limit < open_fds.saturating_add(MORE_FDS)) {
        reasons.push(format!(
            "RLIMIT_NOFILE is {limit}, {open_fds} fds are open and an update takes up to {MORE_FDS} more: raise it \
             (prlimit --nofile)"
        ));
    }
    if let Some(limit) = max_file.filter(|limit| *limit < STATE) {
        reasons.push(format!(
            "RLIMIT_FSIZE is {} KiB, the saved state is a file (in memory) of up to {} KiB: raise it (prlimit --fsize)",
            limit >> 10,
            STATE >> 10
        ));
    }
    // 8 bytes a page: the new VMM's page tables and its second stage, while the old ones are still there.
    let tables = if needs.small_pages { needs.ram / 512 * 2 } else { 0 };
    let wanted = IMAGE.saturating_add(tables);
    if room.free < wanted {
        reasons.push(format!(
            "{} has {} MiB of free memory, the new image needs up to {} MiB while the old one is still there",
            room.of,
            room.free >> 20,
            wanted >> 20
        ));
    }
    let wanted = THREADS.saturating_add(needs.placements.len() as u64);
    if let Some(threads) = threads.filter(|threads| threads.free < wanted) {
        reasons.push(format!(
            "{} has room for {} more threads, the new VMM has up to {wanted} while the old one is still there: raise \
             pids.max",
            threads.of, threads.free
        ));
    }
    reasons
}

impl Limits {
    fn of_this_process() -> io::Result<Self> {
        Ok(Self {
            open_fds: std::fs::read_dir("/proc/self/fd")?.count() as u64,
            max_fds: getrlimit(Resource::Nofile).current,
            max_file: getrlimit(Resource::Fsize).current,
            room: AvailableMemory::of_this_process()?,
            threads: AvailableMemory::in_threads(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Limits {
        Limits {
            open_fds: 40,
            max_fds: Some(1024),
            max_file: Some(STATE),
            room: room(1 << 30),
            threads: Some(room(18)),
        }
    }

    fn room(free: u64) -> AvailableMemory {
        AvailableMemory { free, of: "the host".into() }
    }

    #[test]
    fn all_reasons_at_once() {
        let needs = &Requirements { placements: vec![Placement::default(); 2], ram: 1 << 30, small_pages: true };
        assert!(judge(needs, good()).is_empty());
        let bad = Limits {
            max_fds: Some(64),
            max_file: Some(1 << 20),
            room: room(1 << 20),
            threads: Some(room(17)),
            ..good()
        };
        let text = judge(needs, bad).join("\n");
        for part in [
            "RLIMIT_NOFILE is 64",
            "RLIMIT_FSIZE is 1024 KiB",
            "the host has 1 MiB of free memory",
            "36 MiB",
            "17 more threads",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(judge(needs, Limits { max_fds: None, threads: None, ..good() }).is_empty());
    }

    #[test]
    fn this_process_has_limits() {
        let limits = Limits::of_this_process().unwrap();
        assert!(limits.open_fds >= 3 && limits.room.free > 0, "{limits:?}");
    }
}
