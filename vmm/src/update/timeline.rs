//! A page of shared memory that both images of an update see: the arbiter word, and when each phase ended.
//!
//! The saved state is sealed before the last phases of the old image begin, so their times cannot be in it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use theseus_api::types::PhaseTime;
use theseus_resources::{Claims, KeptFd, Purpose, Slot, Vault};

/// The moments that are written down; each names the phase that it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Phase {
    /// The request was taken up. Ends nothing.
    Start,
    Prepare,
    /// The API stands still and the last vCPU is about to be stopped: the guest's pause begins here.
    Freeze,
    Pause,
    Save,
    Invalidate,
    /// The helper exists; what follows is the exec itself.
    Park,
    Exec,
    Claim,
    Vm,
    Passthrough,
    Vcpus,
    Devices,
    Remap,
    /// The vCPUs have been told to run: the guest's pause ends here.
    Commit,
}

const PHASES: [(Phase, &str); 15] = [
    (Phase::Start, "start"),
    (Phase::Prepare, "prepare"),
    (Phase::Freeze, "freeze"),
    (Phase::Pause, "pause"),
    (Phase::Save, "save"),
    (Phase::Invalidate, "invalidate"),
    (Phase::Park, "park"),
    (Phase::Exec, "exec"),
    (Phase::Claim, "claim"),
    (Phase::Vm, "vm"),
    (Phase::Passthrough, "passthrough"),
    (Phase::Vcpus, "vcpus"),
    (Phase::Devices, "devices"),
    (Phase::Remap, "remap"),
    (Phase::Commit, "commit"),
];

/// Values of the arbiter word.
pub const PENDING: u32 = 0;
pub const COMMITTED: u32 = 1;

#[repr(C)]
struct Page {
    arbiter: AtomicU32,
    /// PID of the parked helper, 0 if there is none.
    helper: AtomicU32,
    /// CLOCK_MONOTONIC, ns; 0 where the phase was not reached.
    stamps: [AtomicU64; PHASES.len()],
}

const SIZE: usize = 4096;

/// See the module.
pub struct Timeline {
    page: NonNull<Page>,
    fd: KeptFd,
}

// SAFETY: the page holds atomics only.
unsafe impl Send for Timeline {}
// SAFETY: as above.
unsafe impl Sync for Timeline {}

impl Timeline {
    pub fn new(vault: &Vault) -> std::io::Result<Self> {
        let fd = rustix::fs::memfd_create("update-timeline", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        Self::map(vault.keep("update timeline", Purpose::State, fd))
    }

    pub fn claim(slot: Slot, claims: &mut Claims) -> Result<Self, String> {
        let fd = claims.claim(slot, Purpose::State).map_err(|error| error.to_string())?;
        Self::map(fd).map_err(|error| format!("cannot map the update's timeline: {error}"))
    }

    fn map(fd: KeptFd) -> std::io::Result<Self> {
        // SAFETY: a new shared mapping of our own memfd.
        let page = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        }?;
        let page = NonNull::new(page.cast::<Page>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { page, fd })
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as self, large enough, and all bit patterns of the atomics are valid.
        unsafe { self.page.as_ref() }
    }

    pub fn slot(&self) -> Slot {
        self.fd.slot()
    }

    pub fn stamp(&self, phase: Phase) {
        self.stamp_at(phase, now_ns());
    }

    /// `at`: see [`now_ns`].
    pub fn stamp_at(&self, phase: Phase, at: u64) {
        self.page().stamps[phase as usize].store(at, Ordering::Relaxed);
    }

    pub fn set_helper(&self, pid: u32) {
        self.page().helper.store(pid, Ordering::SeqCst);
    }

    pub fn helper(&self) -> Option<u32> {
        Some(self.page().helper.load(Ordering::SeqCst)).filter(|pid| *pid != 0)
    }

    /// PENDING to COMMITTED; false if the other side was first, and then the guest must not be touched.
    pub fn win(&self) -> bool {
        self.page().arbiter.compare_exchange(PENDING, COMMITTED, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn at(&self, phase: Phase) -> Option<u64> {
        Some(self.page().stamps[phase as usize].load(Ordering::Relaxed)).filter(|ns| *ns != 0)
    }

    /// The time between each moment and the one before it, for those that were reached, in µs.
    pub fn phases(&self) -> Vec<PhaseTime> {
        let mut last = None;
        let mut phases = Vec::new();
        for (phase, name) in PHASES {
            let Some(at) = self.at(phase) else { continue };
            if let Some(last) = last {
                phases.push(PhaseTime { name: name.into(), us: at.saturating_sub(last) / 1000 });
            }
            last = Some(at);
        }
        phases
    }

    /// vCPUs stopped to vCPUs running, in µs.
    pub fn pause_us(&self) -> Option<u64> {
        Some(self.at(Phase::Commit)?.saturating_sub(self.at(Phase::Freeze)?) / 1000)
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, not used afterwards.
        let _ = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), SIZE) };
    }
}

/// CLOCK_MONOTONIC, ns.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_differences_and_one_side_wins() {
        let timeline = Timeline::new(&Vault::new()).unwrap();
        for phase in [Phase::Start, Phase::Prepare, Phase::Freeze, Phase::Commit] {
            timeline.stamp(phase);
        }
        let names: Vec<_> = timeline.phases().into_iter().map(|phase| phase.name).collect();
        assert_eq!(names, ["prepare", "freeze", "commit"]);
        assert!(timeline.pause_us().is_some());
        assert!(timeline.win());
        assert!(!timeline.win());
        assert!(PHASES.iter().enumerate().all(|(index, (phase, _))| *phase as usize == index));
    }
}
