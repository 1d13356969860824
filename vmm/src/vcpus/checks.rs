//! Machine checks on their way to vCPUs: KVM takes one only from the vCPU's own thread, which any other may ask.

use std::sync::OnceLock;

use parking_lot::{Mutex, MutexGuard};
use theseus_hypervisor::Vcpu;
use theseus_hypervisor::vcpu::ExitFlag;
use theseus_hypervisor::vcpu::mce::Check;
use theseus_resources::survivor::look;

use super::signal;

/// Enough for a bank each; a guest that has not taken one is in no state to take another.
const WAITING_MAX: usize = 8;

#[derive(Default)]
struct Mailbox {
    waiting: Mutex<Vec<Check>>,
    /// None until there is a vCPU.
    wake: OnceLock<(libc::pid_t, ExitFlag)>,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Vec<Check>> {
        self.waiting.lock()
    }
}

/// One mailbox a vCPU.
pub(super) struct Checks(Vec<Mailbox>);

impl Checks {
    pub(super) fn new(vcpus: usize) -> Self {
        Self((0..vcpus).map(|_| Mailbox::default()).collect())
    }

    /// The vCPU `index` is this thread's.
    pub(super) fn introduce(&self, index: u32, tid: libc::pid_t, exit_flag: ExitFlag) {
        if let Some(mailbox) = self.0.get(index as usize) {
            let _ = mailbox.wake.set((tid, exit_flag));
        }
    }

    /// To vCPU `index`, which takes it before its next instruction.
    pub(super) fn post(&self, index: u32, check: Check) {
        let Some(mailbox) = self.0.get(index as usize) else { return };
        let mut waiting = mailbox.lock();
        if waiting.len() < WAITING_MAX && !waiting.contains(&check) {
            waiting.push(check);
        }
        drop(waiting);
        if let Some((tid, exit_flag)) = mailbox.wake.get() {
            exit_flag.raise();
            signal::kick(*tid);
        }
    }

    /// To all but `index`.
    pub(super) fn post_others(&self, index: u32, check: Check) {
        (0..self.0.len() as u32).filter(|other| *other != index).for_each(|other| self.post(other, check));
    }

    /// What waits for vCPU `index`.
    pub(super) fn take(&self, index: u32) -> Vec<Check> {
        self.0.get(index as usize).map(|mailbox| std::mem::take(&mut *mailbox.lock())).unwrap_or_default()
    }

    /// What waits for `vcpu`, which the calling thread has.
    pub(super) fn deliver(&self, vcpu: &Vcpu) {
        for check in self.take(vcpu.index()) {
            inject(vcpu, check);
            if matches!(check, Check::Optional(_)) && vcpu.broadcasts() {
                self.post_others(vcpu.index(), Check::OfOther);
            }
        }
    }

    /// Tells the guest of a page that `vcpu`, which the calling thread has, has just needed, and that is lost.
    pub(super) fn page_lost(&self, vcpu: &Vcpu, gpa: u64) {
        inject(vcpu, Check::Required(gpa));
        if vcpu.broadcasts() {
            self.post_others(vcpu.index(), Check::OfOther);
        }
    }

    /// The same, left where they are.
    pub(super) fn waiting(&self, index: u32) -> Vec<Check> {
        self.0.get(index as usize).map(|mailbox| look(&mailbox.waiting).clone()).unwrap_or_default()
    }
}

fn inject(vcpu: &Vcpu, check: Check) {
    if let Err(error) = vcpu.inject(check) {
        log::error!("vCPU {}: the guest is not told of a memory error: {error}", vcpu.index());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_taken_once_and_by_whom_it_is_meant_for() {
        let checks = Checks::new(3);
        checks.post_others(1, Check::OfOther);
        checks.post(1, Check::Required(0x1000));
        checks.post(1, Check::Required(0x1000));
        checks.post(7, Check::OfOther);
        assert_eq!([0, 1, 2].map(|index| checks.take(index).len()), [1, 1, 1]);
        assert_eq!([0, 1, 2].map(|index| checks.take(index).len()), [0, 0, 0]);
        (0..100).for_each(|page| checks.post(0, Check::Optional(page << 12)));
        assert_eq!(checks.take(0).len(), WAITING_MAX);
    }
}
