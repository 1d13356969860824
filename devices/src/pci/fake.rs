//! Memslots that keep KVM's rules.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::placed_bar::{AddressSpace, Memslots};
use crate::bus::Bus;

/// slot -> (gpa, size, hva); the next slot; whether all is refused
#[derive(Default)]
pub struct FakeMemslots(Mutex<BTreeMap<u32, (u64, u64, u64)>>, AtomicU32, AtomicBool);

impl FakeMemslots {
    /// (gpa, size) of all of them.
    pub fn all(&self) -> Vec<(u64, u64)> {
        let mut slots: Vec<_> = self.0.lock().values().map(|(gpa, size, _)| (*gpa, *size)).collect();
        slots.sort();
        slots
    }

    pub fn count(&self) -> usize {
        self.0.lock().len()
    }

    pub fn refuse(&self, refused: bool) {
        self.2.store(refused, Ordering::Relaxed);
    }

    fn check(&self) -> std::io::Result<()> {
        if self.2.load(Ordering::Relaxed) { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl Memslots for FakeMemslots {
    unsafe fn add(&self, gpa: u64, size: u64, hva: u64) -> std::io::Result<u32> {
        self.check()?;
        let mut slots = self.0.lock();
        // As in __kvm_set_memory_region.
        let end = gpa.checked_add(size).ok_or_else(|| std::io::Error::from_raw_os_error(libc::EINVAL))?;
        if slots.values().any(|(other, len, _)| gpa < other + len && *other < end) {
            return Err(std::io::Error::from_raw_os_error(libc::EEXIST));
        }
        let slot = self.1.fetch_add(1, Ordering::Relaxed);
        slots.insert(slot, (gpa, size, hva));
        Ok(slot)
    }

    fn remove(&self, slot: u32) -> std::io::Result<()> {
        self.check()?;
        self.0.lock().remove(&slot).map(drop).ok_or(std::io::ErrorKind::NotFound.into())
    }
}

pub(crate) fn space(memslots: Arc<FakeMemslots>) -> AddressSpace {
    let [mmio, pio] = ["mmio", "pio"].map(|name| Arc::new(Bus::new(name)));
    AddressSpace { memslots, mmio, pio }
}
