//! A page of shared memory that both VMMs of an update and the keeper see: the word, the deadline, when each phase
//! ended, and why the new VMM gave up. What passes it can be met by a test there ([`Seams`]).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use theseus_api::types::PhaseTime;
use theseus_resources::Mapping;

use crate::seams::{Injected, Seams};
use word::Word;

mod word;

/// The moments that are written down; each names the phase that it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Phase {
    /// The request was taken up. Ends nothing.
    Start,
    Prepare,
    /// The keeper is the new image, and has started the new VMM.
    Exec,
    /// The new VMM has all that can be had before the guest stands still.
    Prewarm,
    /// The API stands still and the last vCPU is about to be stopped: the guest's pause begins here.
    Freeze,
    Pause,
    Save,
    Invalidate,
    /// The new VMM has read the state.
    Claim,
    Vcpus,
    Passthrough,
    Devices,
    Remap,
    /// Only where the new VMM failed: when it gave up, or was given up.
    Failed,
    /// The last vCPU has gone into the guest again: the guest's pause ends here.
    Commit,
}

const PHASES: [(Phase, &str); 15] = [
    (Phase::Start, "start"),
    (Phase::Prepare, "prepare"),
    (Phase::Exec, "exec"),
    (Phase::Prewarm, "prewarm"),
    (Phase::Freeze, "freeze"),
    (Phase::Pause, "pause"),
    (Phase::Save, "save"),
    (Phase::Invalidate, "invalidate"),
    (Phase::Claim, "claim"),
    (Phase::Vcpus, "vcpus"),
    (Phase::Passthrough, "passthrough"),
    (Phase::Devices, "devices"),
    (Phase::Remap, "remap"),
    (Phase::Failed, "failed"),
    (Phase::Commit, "commit"),
];

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        PHASES[self as usize].1
    }
}

const CAUSE: usize = 2048;

/// Why a phase is the last of its update.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotPassed {
    #[error("the update has taken {late:.1?} longer than its deadline of {all:?} (deadline_ms)")]
    Late { late: Duration, all: Duration },
    #[error(transparent)]
    Test(#[from] Injected),
}

/// All zero at the start. Two builds read it: what is there stays where it is, and what is new comes last. Atomics
/// only: it is shared with processes that may be killed at any moment.
#[repr(C)]
pub(crate) struct Page {
    word: Word,
    cause_len: AtomicU32,
    /// CLOCK_MONOTONIC, ns; 0 before the guest is paused.
    deadline: AtomicU64,
    /// From the pause to the deadline, ns.
    patience: AtomicU64,
    /// CLOCK_MONOTONIC, ns; 0 where the phase was not reached.
    stamps: [AtomicU64; PHASES.len()],
    cause: [AtomicU8; CAUSE],
}

const SIZE: usize = 4096;
const _: () = assert!(size_of::<Page>() <= SIZE);

/// See the module.
pub(crate) struct Timeline {
    page: Mapping,
    seams: Arc<dyn Seams>,
}

impl Timeline {
    /// A new page, and the fd by which others get at it.
    pub(crate) fn new(seams: Arc<dyn Seams>) -> std::io::Result<(Self, OwnedFd)> {
        let fd = rustix::fs::memfd_create("update-timeline", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        Ok((Self::map(&fd, seams)?, fd))
    }

    /// Fails unless the fd is of a file of that size: an access behind its end would be a SIGBUS.
    pub(crate) fn map(fd: impl AsFd, seams: Arc<dyn Seams>) -> std::io::Result<Self> {
        if rustix::fs::fstat(&fd)?.st_size != SIZE as i64 {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        Ok(Self { page: Mapping::new(fd, 0, SIZE)?, seams })
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped as long as self, large enough, and all bit patterns of the atomics are valid.
        unsafe { self.page.start().cast::<Page>().as_ref() }
    }

    pub(crate) fn word(&self) -> &Word {
        &self.page().word
    }

    pub(crate) fn seams(&self) -> &Arc<dyn Seams> {
        &self.seams
    }

    /// Right before the keeper is asked to become the new image.
    pub(crate) fn become_other(&self) -> Result<(), NotPassed> {
        Ok(self.seams.at("become")?)
    }

    /// The guest is this VMM's, the new one, unless it is late or the old one has taken it back. Whether it is.
    pub(crate) fn commit(&self) -> Result<bool, NotPassed> {
        self.check(Phase::Commit)?;
        self.seams.at("word")?;
        if !self.word().commit() {
            return Ok(false);
        }
        self.seams.at("committed")?;
        Ok(true)
    }

    pub(crate) fn stamp(&self, phase: Phase) {
        self.stamp_at(phase, now_ns());
    }

    /// `at`: see [`now_ns`].
    pub(crate) fn stamp_at(&self, phase: Phase, at: u64) {
        self.page().stamps[phase as usize].store(at, Ordering::Relaxed);
    }

    /// The guest runs. `entered`: when its last vCPU went into it; None where one has not yet, and so stands still until
    /// now.
    pub(crate) fn resumed(&self, entered: Option<u64>) {
        // One that never stopped went in long before.
        let since = entered.filter(|at| self.at(Phase::Freeze).is_none_or(|freeze| freeze < *at));
        self.stamp_at(Phase::Commit, since.unwrap_or_else(now_ns));
    }

    /// The end of `phase`, which fails if the update has taken too long by now.
    pub(crate) fn pass(&self, phase: Phase) -> Result<(), NotPassed> {
        self.check(phase)?;
        self.stamp(phase);
        Ok(())
    }

    /// [`Timeline::pass`] for a phase that is not over yet.
    pub(crate) fn check(&self, phase: Phase) -> Result<(), NotPassed> {
        self.seams.at(phase.name())?;
        let (deadline, now) = (self.page().deadline.load(Ordering::Relaxed), now_ns());
        if deadline == 0 || now < deadline {
            return Ok(());
        }
        let all = Duration::from_nanos(self.page().patience.load(Ordering::Relaxed));
        let late = Duration::from_nanos(now - deadline);
        Err(NotPassed::Late { late, all })
    }

    /// From now on the update has `patience`.
    pub(crate) fn start_deadline(&self, patience: Duration) {
        let ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        self.page().patience.store(ns, Ordering::Relaxed);
        self.page().deadline.store(now_ns().saturating_add(ns), Ordering::Relaxed);
    }

    /// How much is left of it.
    pub(crate) fn left(&self) -> Duration {
        Duration::from_nanos(self.page().deadline.load(Ordering::Relaxed).saturating_sub(now_ns()))
    }

    pub(crate) fn patience(&self) -> Duration {
        Duration::from_nanos(self.page().patience.load(Ordering::Relaxed))
    }

    /// Why the new VMM gives up, for the old one, which answers the caller.
    pub(crate) fn set_cause(&self, cause: &str) {
        let page = self.page();
        let bytes = cause.bytes().take(CAUSE);
        page.cause_len.store(bytes.len() as u32, Ordering::SeqCst);
        bytes.zip(&page.cause).for_each(|(byte, at)| at.store(byte, Ordering::Relaxed));
    }

    /// What the new VMM said of why it gave up; empty if it had no time to.
    pub(crate) fn cause(&self) -> String {
        let page = self.page();
        let bytes: Vec<u8> = page.cause.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        let said = bytes.get(..page.cause_len.load(Ordering::SeqCst) as usize).unwrap_or_default();
        String::from_utf8_lossy(said).into_owned()
    }

    fn at(&self, phase: Phase) -> Option<u64> {
        Some(self.page().stamps[phase as usize].load(Ordering::Relaxed)).filter(|ns| *ns != 0)
    }

    /// The phase that is not over yet.
    pub(crate) fn current(&self) -> Phase {
        let reached = PHASES.iter().rposition(|(phase, _)| *phase != Phase::Failed && self.at(*phase).is_some());
        let mut rest = PHASES[reached.map_or(0, |last| last + 1)..].iter().map(|(phase, _)| *phase);
        rest.find(|phase| *phase != Phase::Failed).unwrap_or(Phase::Commit)
    }

    /// The time between each moment and the one before it, for those that were reached, in µs.
    pub(crate) fn phases(&self) -> Vec<PhaseTime> {
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
    pub(crate) fn pause_us(&self) -> Option<u64> {
        Some(self.at(Phase::Commit)?.saturating_sub(self.at(Phase::Freeze)?) / 1000)
    }
}

/// CLOCK_MONOTONIC, ns.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seams::untouched;

    #[test]
    fn phases_are_differences() {
        let (timeline, _fd) = Timeline::new(untouched()).unwrap();
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
    fn a_failure_goes_over_to_the_old_vmm() {
        let (timeline, fd) = Timeline::new(untouched()).unwrap();
        timeline.stamp(Phase::Invalidate);
        let old = Timeline::map(&fd, untouched()).unwrap();
        assert_eq!((old.current(), old.cause()), (Phase::Claim, String::new()));
        timeline.stamp(Phase::Remap);
        timeline.set_cause(&"é".repeat(CAUSE));
        assert_eq!(old.current(), Phase::Commit);
        assert_eq!(old.cause().len(), CAUSE);
        let empty = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC).unwrap();
        assert!(Timeline::map(empty, untouched()).is_err());
    }

    #[test]
    fn a_pause_ends_when_the_last_vcpu_runs_and_not_when_somebody_looks() {
        let (timeline, _fd) = Timeline::new(untouched()).unwrap();
        timeline.stamp_at(Phase::Freeze, 1_000_000);
        timeline.resumed(Some(3_000_000));
        assert_eq!(timeline.pause_us(), Some(2000));
        for entered in [None, Some(500_000)] {
            timeline.resumed(entered);
            assert!(timeline.pause_us() > Some(2000), "{entered:?}: it stands still, or was never stopped");
        }
    }

    #[test]
    fn the_deadline_counts() {
        let (timeline, _fd) = Timeline::new(untouched()).unwrap();
        timeline.start_deadline(Duration::from_secs(600));
        timeline.pass(Phase::Save).unwrap();
        assert!(timeline.left() > Duration::from_secs(500));
        timeline.start_deadline(Duration::ZERO);
        assert!(timeline.pass(Phase::Save).unwrap_err().to_string().contains("deadline_ms"));
        assert_eq!(timeline.left(), Duration::ZERO);
    }
}
