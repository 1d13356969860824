//! A device that does nothing but count, for the tests: what it takes to add one is this file and a line of the
//! catalogue.

use std::sync::Arc;

use acpi_tables::AmlSink;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use theseus_resources::Claims;
use theseus_resources::state::Format;

use crate::bus::LockedDevice;
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::spec::Spec;

/// Two ports of 4 bytes: a write to the first counts one, and it reads as the count; what the second is written other
/// than 0 blocks every operation.
const PORT: u64 = 0x5F0;
const BLOCK: u64 = 4;

#[derive(Default)]
pub struct Counting {
    count: u32,
    blocks: u32,
    /// Between quiesce and resume, when nothing may count.
    is_quiet: bool,
}

impl LockedDevice for Counting {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = if offset < BLOCK { self.count } else { self.blocks };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match <[u8; 4]>::try_from(data) {
            Ok(value) if offset == BLOCK => self.blocks = u32::from_le_bytes(value),
            // A vCPU that runs before the device was resumed is not counted, which the guest sees.
            _ if !self.is_quiet => self.count = self.count.wrapping_add(1),
            _ => {}
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct CountingState {
    count: u32,
    blocks: u32,
}

impl Migratable for Counting {
    const FORMAT: Format = Format::new("counting", 1);
    type State = CountingState;
    type Handles = NoHandles;
    type Parts<'a> = ();

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { count, blocks, is_quiet: _ } = self;
        let state = CountingState { count: *count, blocks: *blocks };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, (): ()) -> Result<Self, MigrateError> {
        let Saved { state: CountingState { count, blocks }, handles: NoHandles } = saved;
        Ok(Self { count, blocks, is_quiet: true })
    }
}

impl Catalogued for Counting {
    fn boot(spec: &Spec, _: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        Ok(spec
            .counting
            .then(|| (Self::FORMAT.kind.to_owned(), Self { is_quiet: true, ..Self::default() }))
            .into_iter()
            .collect())
    }

    fn parts<'a>(_: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {}

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Mutex::new(self))
    }
}

impl Device for Mutex<Counting> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pio { base: PORT, len: 8, device: self }]
    }

    fn quiesce(&self) -> Result<(), MigrateError> {
        self.lock().is_quiet = true;
        Ok(())
    }

    fn resume(&self) {
        self.lock().is_quiet = false;
    }

    fn reset(&self) {
        let mut counting = self.lock();
        (counting.count, counting.blocks) = (0, 0);
    }

    fn blockers(&self, _: Operation) -> Vec<String> {
        match self.lock().blocks {
            0 => Vec::new(),
            count => vec![format!("it blocks {count}: have the guest write 0 to port {:#x}", PORT + BLOCK)],
        }
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of_locked(self, name)
    }

    fn describe(&self, _: &mut dyn AmlSink) {}
}
