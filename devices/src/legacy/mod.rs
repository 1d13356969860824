//! The devices of a PC that are not on PCI: serial port, clock, reset, ACPI power management.

pub mod cmos;
pub(crate) mod i8042;
pub mod pm;
pub mod serial;

#[cfg(test)]
pub(crate) mod test_parts {
    //! The machine around a legacy device, in its unit tests.

    use std::sync::atomic::{AtomicUsize, Ordering};

    use parking_lot::Mutex;

    use crate::interrupt::{GuestRequest, GuestRequests, IrqLine};

    #[derive(Default)]
    pub(crate) struct Pulses(AtomicUsize);

    impl Pulses {
        /// How many since it was last asked.
        pub(crate) fn take(&self) -> usize {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    impl IrqLine for Pulses {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[derive(Default)]
    pub(crate) struct Asked(Mutex<Vec<GuestRequest>>);

    impl Asked {
        /// What was asked for since it was last asked.
        pub(crate) fn take(&self) -> Vec<GuestRequest> {
            std::mem::take(&mut self.0.lock())
        }
    }

    impl GuestRequests for Asked {
        fn notify(&self, request: GuestRequest) {
            self.0.lock().push(request);
        }

        fn pending(&self) -> bool {
            !self.0.lock().is_empty()
        }
    }
}
