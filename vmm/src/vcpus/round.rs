//! What is done with all vCPUs while they stand still, shared among threads.
//!
//! Any thread may do it: KVM only has to load the vCPU on another CPU. And to wake a thread takes about as long as to
//! save a vCPU. So where the host has fewer CPUs than the guest, only as many threads are woken as there are CPUs, and
//! the commander is one of them. Each begins with the vCPUs that its CPU had last, and then helps the others
//! (docs/adr/0020).

use std::iter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::VcpuError;
use super::checks::Checks;
use super::processor::Processor;
use super::saved::{EncodedVcpu, SavedVcpu};
use crate::panics::panic_text;
use crate::seams::Seams;

/// Where a vCPU is.
pub(super) struct Seat {
    /// Whoever does something with it has it locked.
    pub processor: Mutex<Processor>,
    /// The host's CPU that had it last.
    cpu: AtomicUsize,
}

impl Seat {
    /// By the thread that has just made it.
    pub(super) fn new(processor: Processor) -> Self {
        Self { processor: Mutex::new(processor), cpu: AtomicUsize::new(this_cpu()) }
    }

    /// By the thread that has just had it.
    pub(super) fn was_here(&self) {
        self.cpu.store(this_cpu(), Ordering::Relaxed);
    }

    pub(super) fn cpu(&self) -> usize {
        self.cpu.load(Ordering::Relaxed)
    }
}

/// That the calling thread is on.
pub(super) fn this_cpu() -> usize {
    rustix::thread::sched_getcpu()
}

/// What is done with each.
pub(super) enum Job {
    Save,
    /// From these, in order of their index.
    RestoreEarly(Vec<EncodedVcpu>),
    RestoreLate,
}

/// Of one vCPU.
pub(super) struct Done {
    pub index: usize,
    /// None after a restore.
    pub result: Result<Option<SavedVcpu>, VcpuError>,
}

/// One job for all vCPUs.
pub(super) struct Round {
    /// The answer to one that was given up may come later.
    pub number: u64,
    pub job: Job,
    seats: Arc<[Arc<Seat>]>,
    checks: Arc<Checks>,
    seams: Arc<dyn Seams>,
    left: Left,
}

impl Round {
    pub(super) fn new(
        number: u64,
        seats: &Arc<[Arc<Seat>]>,
        job: Job,
        checks: &Arc<Checks>,
        seams: &Arc<dyn Seams>,
    ) -> Self {
        let left = Left::all(seats.len());
        Self { number, job, seats: seats.clone(), checks: checks.clone(), seams: seams.clone(), left }
    }

    /// Does the job for all vCPUs that nobody else has begun with. `own`: the one whose thread calls this.
    pub(super) fn take_part(&self, own: Option<u32>) -> Vec<Done> {
        let here = this_cpu();
        let own = own.map(|index| index as usize);
        let mine = self.left.take(own, |index| self.seats[index].cpu() == here);
        mine.map(|index| Done { index, result: self.work(index) }).collect()
    }

    /// Nobody begins with another one.
    pub(super) fn give_up(&self) {
        self.left.take(None, |_| true).for_each(drop);
    }

    fn work(&self, index: usize) -> Result<Option<SavedVcpu>, VcpuError> {
        // Its own thread gives it back before it says that it stands still. If it has it again this round was given up.
        let Some(mut processor) = self.seats[index].processor.try_lock() else { return Err(VcpuError::Run) };
        let work = || match &self.job {
            Job::Save => {
                self.checks.deliver(&processor.vcpu);
                let mut saved = processor.save()?;
                self.seams.saved_vcpu(&mut saved.refused);
                Ok(Some(saved))
            }
            Job::RestoreEarly(states) => {
                self.seams.restores_vcpu();
                processor.restore_early(&states[index]).map(|()| None)
            }
            Job::RestoreLate => processor.restore_late().map(|()| None),
        };
        let result = catch_unwind(AssertUnwindSafe(work));
        self.seats[index].was_here();
        result.unwrap_or_else(|panic| Err(VcpuError::Panicked { index: index as u32, panic: panic_text(&*panic) }))
    }
}

/// Which vCPUs nobody has begun with.
struct Left(Box<[AtomicBool]>);

impl Left {
    fn all(count: usize) -> Self {
        Self(iter::repeat_with(|| AtomicBool::new(true)).take(count).collect())
    }

    /// Takes one after the other: `own`, then those that are near.
    fn take(&self, own: Option<usize>, is_near: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
        let near = (0..self.0.len()).filter(move |index| is_near(*index));
        // From the end: who is woken for those begins in front.
        let far = (0..self.0.len()).rev();
        let all = own.into_iter().chain(near).chain(far);
        all.filter(|index| self.0.get(*index).is_some_and(|left| left.swap(false, Ordering::Relaxed)))
    }
}

/// Whose threads are woken to help one that is on the CPU `here`, where the vCPUs were on the CPUs `of` last: one for
/// each other CPU, and so many that all `cpus` have something to do.
pub(super) fn helpers(here: usize, of: impl Iterator<Item = usize>, cpus: usize) -> Vec<usize> {
    let mut seen = vec![here];
    let (mut helpers, others): (Vec<_>, Vec<_>) = of.enumerate().partition(|(_, cpu)| {
        let is_new = !seen.contains(cpu);
        if is_new {
            seen.push(*cpu);
        }
        is_new
    });
    helpers.extend(others.into_iter().take(cpus.saturating_sub(1 + helpers.len())));
    helpers.into_iter().map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_is_somebodys_once() {
        const VCPUS: usize = 1000;
        let left = Left::all(VCPUS);
        let mut taken: Vec<_> = std::thread::scope(|scope| {
            let take = |thread| left.take(Some(thread), move |index| index % 4 == thread).collect::<Vec<_>>();
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(move || take(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        taken.sort_unstable();
        assert_eq!(taken, (0..VCPUS).collect::<Vec<_>>());
        assert_eq!(left.take(Some(VCPUS), |_| true).next(), None);
    }

    #[test]
    fn the_own_one_is_first_and_then_those_of_the_same_cpu() {
        let left = Left::all(6);
        assert_eq!(left.take(Some(3), |index| index < 2).collect::<Vec<_>>(), [3, 0, 1, 5, 4, 2]);
    }

    #[test]
    fn as_many_are_woken_as_there_are_cpus() {
        let woken = |here, of: &[usize], cpus| helpers(here, of.iter().copied(), cpus);
        // With one CPU who commands does it alone.
        assert!(woken(0, &[0, 0, 0], 1).is_empty());
        assert_eq!(woken(0, &[1], 2), [0]);
        assert_eq!(woken(0, &[0, 1, 0, 1], 2), [1]);
        // All were on the commander's CPU: they are shared all the same.
        assert_eq!(woken(0, &[0, 0, 0, 0], 2), [0]);
        assert_eq!(woken(0, &[0, 0, 2, 2, 0], 4), [2, 0, 1]);
        // vCPUs pinned to where their commander may not be.
        assert_eq!(woken(0, &[5, 6, 7, 7], 1), [0, 1, 2]);
    }
}
