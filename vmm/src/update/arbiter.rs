//! Who runs the guest after an update: one atomic word that both images and the parked helper see.
//!
//! ```text
//!   PENDING --new image, before the first KVM_RUN--------------------------> COMMITTED
//!      |----new image that failed---> RETURNING --old binary, same PID-----> COMMITTED
//!      |                                  |
//!      '----helper------------------------'---> TAKEN --old binary, new PID-> COMMITTED
//! ```
//!
//! Each arrow is one compare-and-exchange: of two that want the guest one gets it, and the other never touches it again.

use std::sync::atomic::{AtomicU32, Ordering};

const PENDING: u32 = 0;
const COMMITTED: u32 = 1;
const RETURNING: u32 = 2;
const TAKEN: u32 = 3;

/// By which way an image has come to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The update as it was asked for.
    Forward,
    /// The new image failed, and became the old binary again.
    Back,
    /// The new image died or hung, and the helper became the old binary.
    BackByHelper,
}

impl Way {
    /// On a way back there is nobody left who would know better: what a guest can live without is logged, and it goes on.
    pub fn bear<E: std::fmt::Display>(self, done: Result<(), E>) -> Result<(), E> {
        match done {
            Err(error) if self != Self::Forward => {
                log::error!("on the way back: {error}");
                Ok(())
            }
            done => done,
        }
    }

    fn word(self) -> u32 {
        match self {
            Self::Forward => PENDING,
            Self::Back => RETURNING,
            Self::BackByHelper => TAKEN,
        }
    }
}

/// See the module. All zero is the start of an update.
#[repr(transparent)]
pub struct Arbiter(AtomicU32);

impl Arbiter {
    fn go(&self, from: u32, to: u32) -> bool {
        self.0.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// None once somebody has committed: such a state must not be used again.
    pub fn way(&self) -> Option<Way> {
        match self.0.load(Ordering::SeqCst) {
            PENDING => Some(Way::Forward),
            RETURNING => Some(Way::Back),
            TAKEN => Some(Way::BackByHelper),
            _ => None,
        }
    }

    /// By an image that has come by `way`, right before the guest runs. If false, the guest must not be touched.
    pub fn commit(&self, way: Way) -> bool {
        self.go(way.word(), COMMITTED)
    }

    /// By a new image that has failed. If false, somebody else has the guest, or it runs.
    pub fn go_back(&self) -> bool {
        self.go(PENDING, RETURNING)
    }

    /// By the helper. If false, the guest runs.
    pub fn take(&self) -> bool {
        self.go(PENDING, TAKEN) || self.go(RETURNING, TAKEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new() -> Arbiter {
        Arbiter(AtomicU32::new(0))
    }

    #[test]
    fn one_side_wins() {
        let arbiter = new();
        assert_eq!(arbiter.way(), Some(Way::Forward));
        assert!(arbiter.commit(Way::Forward));
        assert!(!arbiter.take() && !arbiter.go_back() && !arbiter.commit(Way::Forward));
        assert_eq!(arbiter.way(), None);

        let arbiter = new();
        assert!(arbiter.take());
        assert!(!arbiter.commit(Way::Forward) && !arbiter.go_back() && !arbiter.commit(Way::Back));
        assert!(arbiter.commit(Way::BackByHelper));
    }

    #[test]
    fn the_helper_can_take_what_fails_on_its_way_back() {
        let arbiter = new();
        assert!(arbiter.go_back());
        assert_eq!(arbiter.way(), Some(Way::Back));
        assert!(!arbiter.commit(Way::Forward), "the image that has given up");
        assert!(arbiter.take());
        assert!(!arbiter.commit(Way::Back));
    }
}
