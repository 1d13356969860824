//! The memory-mapped configuration space (PCI Express 5.0, 7.2.2): bus, slot and function are bits of the address.

use std::sync::Weak;

use crate::bus::BusDevice;
use crate::pci::bus::{Address, PciBus};

/// Has no state: the address it answers at is the machine's, and the bus is rebuilt by the devices on it.
pub(super) struct Ecam {
    /// Not a share of it: devices on that bus hold the bus that this is on.
    bus: Weak<PciBus>,
}

impl Ecam {
    pub(super) fn new(bus: Weak<PciBus>) -> Self {
        Self { bus }
    }
}

fn target(offset: u64, len: usize) -> Option<Address> {
    let in_function = offset & 0xFFF;
    // Within one function; wider accesses than a quadword do not exist.
    if !matches!(len, 1 | 2 | 4 | 8) || in_function + len as u64 > 0x1000 {
        return None;
    }
    Some(Address {
        bus: u8::try_from(offset >> 20).ok()?,
        slot: (offset >> 15 & 0x1F) as u8,
        function: (offset >> 12 & 7) as u8,
        offset: in_function as u16,
    })
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match target(offset, data.len()).zip(self.bus.upgrade()) {
            Some((target, bus)) => bus.read(target, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
        let target = target(offset, data.len()).zip(self.bus.upgrade());
        target.is_none_or(|(target, bus)| bus.write(target, data, is_wanted))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::super::config_access::PciConfigAccess;
    use super::*;
    use crate::bus::Bus;
    use crate::pci::PciDevice;
    use crate::pci::bus::tests::bus_with_probe;
    use crate::turn::Turn;

    /// A hang, not a slow machine.
    const PATIENCE: Duration = Duration::from_secs(600);

    #[test]
    fn addresses_and_sizes() {
        let (bus, probe) = bus_with_probe(5);
        let ecam = Ecam::new(Arc::downgrade(&bus));
        let base = 5 << 15;
        let mut data = [0; 8];
        ecam.read(base + 0x104, &mut data);
        assert_eq!(data, [4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(probe.lock().accesses, [(0x104, 4), (0x108, 4)]);
        let mut data = [0; 3];
        ecam.read(base, &mut data);
        assert_eq!(data, [0xFF; 3], "no such size");
        let mut data = [0; 4];
        ecam.read(base + 0xFFE, &mut data);
        assert_eq!(data, [0xFF; 4], "leaves the function");
        for absent in [base + (1 << 12), base + (1 << 15), base + (1 << 20), u64::MAX - 3] {
            data = [0; 4];
            ecam.read(absent, &mut data);
            assert_eq!(data, [0xFF; 4]);
            assert!(ecam.write(absent, &data, &|| true));
        }
        assert!(ecam.write(base + 0xFFC, &[1, 2], &|| true));
        assert_eq!(probe.lock().written, [(0xFFC, vec![1, 2])]);
    }

    /// A function whose accesses end when they are told to.
    struct Slow {
        begun: Sender<()>,
        end: Receiver<()>,
    }

    impl PciDevice for Slow {
        fn config_read(&mut self, _: u16, data: &mut [u8]) {
            data.fill(0);
        }

        fn config_write(&mut self, _: u16, _: &[u8]) {
            self.begun.send(()).unwrap();
            self.end.recv().unwrap();
        }
    }

    /// A reset of a function may keep its vCPU in an access for a minute (pci_dev_wait).
    #[test]
    fn a_long_access_to_one_function_holds_up_no_access_to_another() {
        let (pci, _probe) = bus_with_probe(5);
        let ((begin, begun), (finish, end)) = (channel(), channel());
        pci.add(Some(6), Arc::new(Turn::new(Slow { begun: begin, end }))).unwrap();
        let (mmio, pio) = (Arc::new(Bus::new("MMIO")), Arc::new(Bus::new("port")));
        mmio.insert(0, 1 << 20, Arc::new(Ecam::new(Arc::downgrade(&pci)))).unwrap();
        pio.insert(0xCF8, 8, Arc::new(PciConfigAccess::new(&pci))).unwrap();
        let theirs = mmio.clone();
        let slow = std::thread::spawn(move || theirs.write(6 << 15, &[0; 4]));
        begun.recv().unwrap();
        let (done, answer) = channel();
        std::thread::spawn(move || {
            let (mut ecam, mut port) = ([0; 4], [0; 4]);
            mmio.read(5 << 15, &mut ecam);
            mmio.write(5 << 15, &[1; 4]);
            pio.write(0xCF8, &0x8000_2800u32.to_le_bytes());
            pio.read(0xCFC, &mut port);
            // A guest that moves a BAR meanwhile.
            mmio.insert(1 << 30, 1, Arc::new(Ecam::new(Arc::downgrade(&pci)))).unwrap();
            done.send((ecam, port)).unwrap();
        });
        let seen = answer.recv_timeout(PATIENCE);
        finish.send(()).unwrap();
        slow.join().unwrap();
        assert_eq!(seen, Ok(([0, 1, 2, 3], [0, 1, 2, 3])));
    }
}
