//! A page of shared memory that both images of an update and the parked helper see: the arbiter, the deadline, when each phase ended, and
//! why the new image gave up.
//!
//! The saved state is sealed before the last phases of the old image begin, so none of this can be in it.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use theseus_api::types::PhaseTime;
use theseus_resources::{KeptFd, Purpose, Vault};

use super::arbiter::{Arbiter, Way};

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
    /// Only where the new image failed: from the exec to the moment it gave up, or was given up.
    Failed,
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

const PHASES: [(Phase, &str); 16] = [
    (Phase::Start, "start"),
    (Phase::Prepare, "prepare"),
    (Phase::Freeze, "freeze"),
    (Phase::Pause, "pause"),
    (Phase::Save, "save"),
    (Phase::Invalidate, "invalidate"),
    (Phase::Park, "park"),
    (Phase::Failed, "failed"),
    (Phase::Exec, "exec"),
    (Phase::Claim, "claim"),
    (Phase::Vm, "vm"),
    (Phase::Passthrough, "passthrough"),
    (Phase::Vcpus, "vcpus"),
    (Phase::Devices, "devices"),
    (Phase::Remap, "remap"),
    (Phase::Commit, "commit"),
];

impl Phase {
    pub fn name(self) -> &'static str {
        PHASES[self as usize].1
    }
}

const CAUSE: usize = 2048;

/// All zero at the start. Two builds read it: what is there stays where it is, and what is new comes last. Atomics only: it is shared with processes that may be killed at any moment.
#[repr(C)]
pub struct Page {
    pub arbiter: Arbiter,
    /// PID of the parked helper, 0 if there is none.
    pub helper: AtomicU32,
    /// 1: the helper found the image dead; 2: it found the deadline over.
    pub taken_because: AtomicU32,
    cause_len: AtomicU32,
    /// CLOCK_MONOTONIC, ns; 0 before the guest is paused.
    pub deadline: AtomicU64,
    /// From the pause to the deadline, ns.
    pub patience: AtomicU64,
    /// CLOCK_MONOTONIC, ns; 0 where the phase was not reached.
    stamps: [AtomicU64; PHASES.len()],
    cause: [AtomicU8; CAUSE],
}

pub const TAKEN_DEAD: u32 = 1;
pub const TAKEN_LATE: u32 = 2;

impl Page {
    /// `at`: see [`now_ns`].
    pub fn stamp(&self, phase: Phase, at: u64) {
        self.stamps[phase as usize].store(at, Ordering::Relaxed);
    }
}

const SIZE: usize = 4096;
const _: () = assert!(size_of::<Page>() <= SIZE);

/// See the module.
pub struct Timeline(NonNull<Page>);

// SAFETY: the page holds atomics only.
unsafe impl Send for Timeline {}
// SAFETY: as above.
unsafe impl Sync for Timeline {}

impl Timeline {
    /// A new page, and the fd by which the next image gets at it.
    pub fn new(vault: &Vault) -> std::io::Result<(Self, KeptFd)> {
        let fd = rustix::fs::memfd_create("update-timeline", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        Ok((Self::map(&fd)?, vault.keep("update timeline", Purpose::State, fd)))
    }

    /// Fails unless the fd is of a file of that size: an access behind its end would be a SIGBUS.
    pub fn map(fd: impl AsFd) -> std::io::Result<Self> {
        if rustix::fs::fstat(&fd)?.st_size != SIZE as i64 {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        // SAFETY: a new shared mapping.
        let page = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        }?;
        Ok(Self(NonNull::new(page.cast::<Page>()).ok_or(std::io::ErrorKind::OutOfMemory)?))
    }

    pub fn page(&self) -> &Page {
        // SAFETY: mapped as long as self, large enough, and all bit patterns of the atomics are valid.
        unsafe { self.0.as_ref() }
    }

    pub fn arbiter(&self) -> &Arbiter {
        &self.page().arbiter
    }

    pub fn stamp(&self, phase: Phase) {
        self.stamp_at(phase, now_ns());
    }

    /// `at`: see [`now_ns`].
    pub fn stamp_at(&self, phase: Phase, at: u64) {
        self.page().stamp(phase, at);
    }

    /// The end of `phase`, which fails if the update has taken too long by now. Not on the way back: nothing would come after it.
    pub fn pass(&self, phase: Phase) -> Result<(), String> {
        self.check(phase)?;
        self.stamp(phase);
        Ok(())
    }

    /// [`Timeline::pass`] for a phase that is not over yet.
    pub fn check(&self, phase: Phase) -> Result<(), String> {
        if self.arbiter().way() != Some(Way::Forward) {
            return Ok(());
        }
        crate::test_hooks::fault(phase.name())?;
        let (deadline, now) = (self.page().deadline.load(Ordering::Relaxed), now_ns());
        if deadline == 0 || now < deadline {
            return Ok(());
        }
        let all = Duration::from_nanos(self.page().patience.load(Ordering::Relaxed));
        let late = Duration::from_nanos(now - deadline);
        Err(format!("the update has taken {late:.1?} longer than its deadline of {all:?} (deadline_ms)"))
    }

    /// From now on the update has `patience`.
    pub fn start_deadline(&self, patience: Duration) {
        let ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        self.page().patience.store(ns, Ordering::Relaxed);
        self.page().deadline.store(now_ns().saturating_add(ns), Ordering::Relaxed);
    }

    pub fn set_helper(&self, pid: u32) {
        self.page().helper.store(pid, Ordering::SeqCst);
    }

    pub fn helper(&self) -> Option<u32> {
        Some(self.page().helper.load(Ordering::SeqCst)).filter(|pid| *pid != 0)
    }

    /// Why this image gives up, for the one that answers the caller.
    pub fn set_cause(&self, cause: &str) {
        let page = self.page();
        let bytes = cause.bytes().take(CAUSE);
        page.cause_len.store(bytes.len() as u32, Ordering::SeqCst);
        bytes.zip(&page.cause).for_each(|(byte, at)| at.store(byte, Ordering::Relaxed));
    }

    /// What the image before failed of, in words.
    pub fn cause(&self) -> String {
        let page = self.page();
        let bytes: Vec<u8> = page.cause.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        let said = bytes.get(..page.cause_len.load(Ordering::SeqCst) as usize).unwrap_or_default();
        let said = String::from_utf8_lossy(said).into_owned();
        let patience = Duration::from_nanos(page.patience.load(Ordering::Relaxed));
        let end = match page.taken_because.load(Ordering::SeqCst) {
            TAKEN_DEAD => "its process died or was killed (why is in the kernel's log, and in this VMM's)".to_owned(),
            TAKEN_LATE => format!("it did not get on within {patience:?} (deadline_ms) and was killed"),
            _ => return said,
        };
        if said.is_empty() { end } else { format!("{said}; then, on the way back, {end}") }
    }

    fn at(&self, phase: Phase) -> Option<u64> {
        Some(self.page().stamps[phase as usize].load(Ordering::Relaxed)).filter(|ns| *ns != 0)
    }

    /// The phase that is not over yet.
    pub fn current(&self) -> Phase {
        let reached = PHASES.iter().rposition(|(phase, _)| *phase != Phase::Failed && self.at(*phase).is_some());
        let mut rest = PHASES[reached.map_or(0, |last| last + 1)..].iter().map(|(phase, _)| *phase);
        rest.find(|phase| *phase != Phase::Failed).unwrap_or(Phase::Commit)
    }

    /// Forgets what the new image did: the old one goes the same way again.
    pub fn forget_new_image(&self) {
        for (phase, _) in &PHASES[Phase::Exec as usize..] {
            self.stamp_at(*phase, 0);
        }
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
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), SIZE) };
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
    fn phases_are_differences() {
        let (timeline, _fd) = Timeline::new(&Vault::new()).unwrap();
        assert_eq!(timeline.current(), Phase::Start);
        for phase in [Phase::Start, Phase::Prepare, Phase::Freeze, Phase::Commit] {
            timeline.pass(phase).unwrap();
        }
        let names: Vec<_> = timeline.phases().into_iter().map(|phase| phase.name).collect();
        assert_eq!(names, ["prepare", "freeze", "commit"]);
        assert!(timeline.pause_us().is_some());
        assert!(PHASES.iter().enumerate().all(|(index, (phase, _))| *phase as usize == index));
    }

    #[test]
    fn a_failure_goes_over_to_the_old_image() {
        let (timeline, fd) = Timeline::new(&Vault::new()).unwrap();
        timeline.stamp(Phase::Park);
        assert_eq!(timeline.current(), Phase::Exec);
        timeline.stamp(Phase::Remap);
        timeline.set_cause(&"é".repeat(CAUSE));
        let old = Timeline::map(&fd).unwrap();
        assert_eq!(old.current(), Phase::Commit);
        assert_eq!(old.cause().len(), CAUSE);
        old.page().taken_because.store(TAKEN_DEAD, Ordering::SeqCst);
        assert!(old.cause().contains("died"));
        old.forget_new_image();
        assert_eq!(old.current(), Phase::Exec);
        let empty = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC).unwrap();
        assert!(Timeline::map(empty).is_err());
    }

    #[test]
    fn the_deadline_counts_on_the_way_there_only() {
        let (timeline, _fd) = Timeline::new(&Vault::new()).unwrap();
        timeline.start_deadline(Duration::ZERO);
        assert!(timeline.pass(Phase::Save).unwrap_err().contains("deadline_ms"));
        assert!(timeline.arbiter().go_back());
        timeline.pass(Phase::Save).unwrap();
    }
}
