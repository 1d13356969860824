//! What is asked of all vCPUs while they stand still: their states, or to take those of others.

use std::sync::Arc;

use theseus_hypervisor::vcpu::mce::Check;
use theseus_resources::survivor::{self, Look, look};

use super::answers::Command;
use super::processor::Processor;
use super::round::{self, Job, Round};
use super::saved::{EncodedVcpu, SavedVcpu};
use super::{ANSWER, VcpuError, Vcpus};
use crate::spin;

impl Vcpus {
    /// Makes the second stage of `size` bytes from the guest physical address `gpa` on, for all of them: before they run.
    pub(crate) fn fill_second_stage(&self, gpa: u64, size: u64) -> Result<(), VcpuError> {
        let filled = self.seats.first().map_or(Ok(()), |seat| seat.processor.lock().vcpu.fill_second_stage(gpa, size));
        filled.map_err(|source| VcpuError::Hypervisor { index: 0, source })
    }

    /// Begins the first half of a restore, in parallel with the caller: `states` in order of their index, one for each
    /// vCPU.
    pub(crate) fn restore_early(&self, states: Vec<EncodedVcpu>) -> Result<Restoring, VcpuError> {
        if states.len() != self.handles.len() {
            return Err(VcpuError::Count { states: states.len(), vcpus: self.handles.len() });
        }
        Ok(Restoring(self.begin(Job::RestoreEarly(states))?))
    }

    /// Begins the second half of a restore, once the VM's clock is set.
    pub(crate) fn restore_late(&self) -> Result<Restoring, VcpuError> {
        Ok(Restoring(self.begin(Job::RestoreLate)?))
    }

    /// Waits until all vCPUs are restored so far, and takes part in that.
    pub(crate) fn finish(&self, Restoring(begun): Restoring) -> Result<(), VcpuError> {
        self.finish_round(&begun, || ()).map(drop)
    }

    /// Tells as many threads of a round as should take part in it: all where each has a CPU to wait on
    /// ([`crate::spin::Spin`]).
    fn begin(&self, job: Job) -> Result<Begun, VcpuError> {
        let number = self.rounds.get() + 1;
        self.rounds.set(number);
        let begun = Begun(Arc::new(Round::new(number, &self.seats, job, &self.checks, &self.seams)));
        let helpers = if self.answers.spin.is_spinning() {
            (0..self.seats.len()).collect()
        } else {
            round::helpers(round::this_cpu(), self.seats.iter().map(|seat| seat.cpu()), spin::cpus_seen())
        };
        for handle in helpers.into_iter().filter_map(|index| self.handles.get(index)) {
            handle.send(Command::Round(begun.0.clone()))?;
        }
        Ok(begun)
    }

    fn finish_round(&self, Begun(round): &Begun, soon: impl FnOnce()) -> Result<Vec<SavedVcpu>, VcpuError> {
        let done = round.take_part(None);
        self.answers.of_round(round.number, self.seats.len(), done, ANSWER, soon)
    }

    /// Begins to save the states of all (paused) vCPUs, in parallel with the caller. `soon` is called when no more than
    /// one is missing.
    pub(crate) fn begin_save<'a>(&'a self, soon: &'a dyn Fn()) -> Result<Saving<'a>, VcpuError> {
        Ok(Saving { vcpus: self, how: How::InRound { begun: self.begin(Job::Save)?, soon } })
    }

    /// The same, but the caller's thread will do it alone, in [`Saving::finish`].
    #[cfg_attr(not(test), expect(dead_code, reason = "for the rescue after a crash: docs/architecture.md"))]
    pub(crate) fn begin_save_alone(&self) -> Saving<'_> {
        Saving { vcpus: self, how: How::Alone }
    }

    /// Saves the states of all vCPUs by this thread alone: theirs wait for a command, or are dead, with their vCPU in
    /// hand or not. What a vCPU has left to be done was done before, and was completed.
    fn save_alone(&self) -> Result<Vec<SavedVcpu>, VcpuError> {
        if self.running && !survivor::is_alone() {
            return Err(VcpuError::Run);
        }
        let processors: Vec<_> = self.seats.iter().map(|seat| look(&seat.processor)).collect();
        if let Some(processor) = processors.iter().find(|processor| processor.vcpu.has_unhandled_exit()) {
            return Err(VcpuError::Unhandled(processor.index));
        }
        for (index, processor) in (0u32..).zip(&processors) {
            // A survivor leaves them where they are: to take them it would need a lock.
            let checks = if survivor::is_alone() { self.checks.waiting(index) } else { self.checks.take(index) };
            for check in checks {
                // What the guest is not told now it learns when it needs the page.
                let _ = processor.vcpu.inject(check);
                if matches!(check, Check::Optional(_)) && processor.vcpu.broadcasts() {
                    let others = processors.iter().filter(|other| other.index != index);
                    others.for_each(|other| drop(other.vcpu.inject(Check::OfOther)));
                }
            }
        }
        let save = |processor: &Look<'_, Processor>| {
            let mut saved = processor.save()?;
            self.seams.saved_vcpu(&mut saved.refused);
            Ok(saved)
        };
        processors.iter().map(save).collect()
    }

    /// How many threads have their vCPU locked.
    #[cfg(test)]
    pub(crate) fn in_hand(&self) -> usize {
        self.seats.iter().filter(|seat| seat.processor.is_locked()).count()
    }
}

/// A round, which is given up where this is dropped.
struct Begun(Arc<Round>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// vCPUs that are being restored: [`Vcpus::finish`].
pub(crate) struct Restoring(Begun);

/// States that are being saved.
pub(crate) struct Saving<'a> {
    vcpus: &'a Vcpus,
    how: How<'a>,
}

enum How<'a> {
    InRound {
        begun: Begun,
        soon: &'a dyn Fn(),
    },
    /// By whoever calls [`Saving::finish`].
    Alone,
}

impl Saving<'_> {
    /// In order of their index.
    pub(crate) fn finish(self) -> Result<Vec<SavedVcpu>, VcpuError> {
        match self.how {
            How::InRound { begun, soon } => self.vcpus.finish_round(&begun, soon),
            How::Alone => self.vcpus.save_alone(),
        }
    }
}
