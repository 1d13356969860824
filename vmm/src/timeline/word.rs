//! Who runs the guest after an update: one atomic word that both VMMs and the keeper see.
//!
//! ```text
//!   PENDING --new VMM, before its first KVM_RUN---> COMMITTED
//!      '-----old VMM (deadline, or the new one's death); the keeper, if the old one dies---> TAKEN
//! ```
//!
//! Each arrow is one compare-and-exchange: of two that want the guest one gets it, and the other never touches it
//! again.

use std::sync::atomic::{AtomicU32, Ordering};

const PENDING: u32 = 0;
const COMMITTED: u32 = 1;
const TAKEN: u32 = 2;

/// See the module. All zero is the start of an update.
#[repr(transparent)]
pub(crate) struct Word(AtomicU32);

impl Word {
    fn set(&self, to: u32) -> bool {
        self.0.compare_exchange(PENDING, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The guest is the new VMM's. False: it is not, for ever.
    #[must_use]
    pub(crate) fn commit(&self) -> bool {
        self.set(COMMITTED)
    }

    /// The guest is not the new VMM's. False: it is.
    #[must_use]
    pub(crate) fn take(&self) -> bool {
        self.set(TAKEN) || !self.is_committed()
    }

    pub(crate) fn is_committed(&self) -> bool {
        self.0.load(Ordering::SeqCst) == COMMITTED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_gets_the_guest() {
        let word = Word(AtomicU32::new(PENDING));
        assert!(word.commit());
        assert!(!word.commit() && !word.take() && word.is_committed());
        let word = Word(AtomicU32::new(PENDING));
        assert!(word.take() && word.take(), "the old VMM, and the keeper after it");
        assert!(!word.commit() && !word.is_committed());
    }
}
