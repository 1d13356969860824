//! Writes of the guest that its vCPU still owes.

use theseus_devices::bus::Bus;
use theseus_hypervisor::vcpu::OwedWrite;

/// Writes that this vCPU was taken away from while it waited for its turn at a device. A read waits: KVM cannot
/// complete its instruction without it.
#[derive(Default)]
pub(super) struct Owed(pub Vec<OwedWrite>);

impl Owed {
    pub(super) fn write(&mut self, bus: &Bus, is_port: bool, address: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) {
        // One after the other, as the guest has made them.
        if !self.0.is_empty() || !bus.write_unless(address, data, is_wanted) {
            self.0.push(OwedWrite { is_port, address, data: data.to_vec() });
        }
    }

    /// Carries them out. False: the vCPU was wanted again before that.
    pub(super) fn pay(&mut self, pio: &Bus, mmio: &Bus, is_wanted: &dyn Fn() -> bool) -> bool {
        while let Some(OwedWrite { is_port, address, data }) = self.0.first() {
            let bus = if *is_port { pio } else { mmio };
            if !bus.write_unless(*address, data, is_wanted) {
                return false;
            }
            self.0.remove(0);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;
    use theseus_devices::bus::BusDevice;

    use super::*;

    /// A device that another vCPU is in an access to.
    #[derive(Default)]
    struct Busy {
        busy: AtomicBool,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Busy {
        fn read(&self, _: u64, _: &mut [u8]) {}

        fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
            if self.busy.load(Ordering::SeqCst) && is_wanted() {
                return false;
            }
            self.written.lock().push((offset, data.to_vec()));
            true
        }
    }

    #[test]
    fn what_a_vcpu_is_taken_away_from_it_owes() {
        let (device, pio, mmio) = (Arc::new(Busy::default()), Bus::new("port"), Bus::new("MMIO"));
        pio.insert(0xCF8, 8, device.clone()).unwrap();
        mmio.insert(0x1000, 16, device.clone()).unwrap();
        let mut owed = Owed(Vec::new());
        device.busy.store(true, Ordering::SeqCst);
        owed.write(&pio, true, 0xCFC, &[1], &|| true);
        device.busy.store(false, Ordering::SeqCst);
        // The second half of an access that crosses a page: free by now, but not its turn.
        owed.write(&mmio, false, 0x1008, &[2, 3], &|| true);
        assert!(device.written.lock().is_empty());
        let carried = owed.0.clone();
        device.busy.store(true, Ordering::SeqCst);
        assert!(!owed.pay(&pio, &mmio, &|| true), "wanted again");
        assert_eq!(owed.0, carried);
        device.busy.store(false, Ordering::SeqCst);
        assert!(owed.pay(&pio, &mmio, &|| true));
        assert_eq!(*device.written.lock(), [(4, vec![1]), (8, vec![2, 3])]);
        assert!(owed.0.is_empty());
    }
}
