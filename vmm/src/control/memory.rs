//! Pages of the guest's memory that the host has lost: the guest is told, and so is the world, once a page.

use std::collections::BTreeSet;
use std::ops::Deref;

use theseus_api::types::VmEvent;
use vmm_sys_util::eventfd::EventFd;

use super::Control;
use crate::memory_errors;

/// A host that has lost more has other worries.
const KNOWN_MAX: usize = 1024;

pub(crate) struct LostPages {
    wake: EventFd,
    /// Since this image was started.
    known: BTreeSet<u64>,
}

impl LostPages {
    pub(crate) fn new(wake: EventFd) -> Self {
        Self { wake, known: BTreeSet::new() }
    }

    /// Whether it is to be told of: a guest may need one over and over.
    fn is_new(&mut self, gpa: u64) -> bool {
        self.known.len() < KNOWN_MAX && self.known.insert(gpa)
    }
}

impl Deref for LostPages {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.wake
    }
}

impl Control {
    pub(super) fn memory_lost(&mut self) {
        let _ = self.memory_errors.wake.read();
        for memory_errors::Lost { gpa, by_vcpu } in memory_errors::take() {
            let is_new = self.memory_errors.is_new(gpa);
            if let Some(machine) = self.vm.machine().filter(|_| is_new && !by_vcpu) {
                machine.vcpus.memory_lost(gpa);
            }
            if is_new {
                log::error!("the host's memory has an uncorrectable error: the guest has lost its page at {gpa:#x}");
                self.events.emit(VmEvent::MemoryError { gpa, needed: by_vcpu });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_told_of_once_and_so_are_not_more_than_there_may_be() {
        let mut pages = LostPages::new(EventFd::new(0).unwrap());
        assert!(pages.is_new(0x1000) && !pages.is_new(0x1000));
        assert_eq!((2..5000).filter(|page| pages.is_new(page << 12)).count(), KNOWN_MAX - 1);
    }
}
