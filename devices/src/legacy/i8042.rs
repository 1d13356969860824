//! As much of the keyboard controller as a reset needs (ports 0x60 and 0x64), and system control port B, which lies
//! between the two (0x61).

use std::sync::Arc;

use acpi_tables::AmlSink;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use theseus_resources::state::Format;
use theseus_resources::{Claims, layout};

use crate::bus::LockedDevice;
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, on_board};
use crate::interrupt::{GuestRequest, GuestRequests};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::spec::Spec;

/// Its name in a [`crate::set::DeviceSet`].
pub(crate) const NAME: &str = "i8042";

/// Ports 0x60 to 0x64: the bus range.
pub(crate) const I8042_SIZE: u64 = 5;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;
/// Output buffer full, input buffer empty. Always: Linux then finds after 16 reads that there is no controller
/// (`i8042_flush`), where an empty buffer would make it wait for answers; and its reset does not wait (`kb_wait`).
const STATUS: u8 = 0x01;
/// Pulse output line 0, the CPU's reset.
const COMMAND_RESET: u8 = 0xFE;

/// Port B: the gate of timer 2, the speaker, and whether PCI SERR# and IOCHK# are to be told, as written.
const WRITABLE: u8 = 0x0F;
/// Changes with every refresh of a memory that needs that: here with every read.
const REFRESH: u8 = 1 << 4;
/// The output of timer 2, which is not there: as of one that has run out, or whoever measures time by it would wait for
/// ever (pit_calibrate_tsc).
const TIMER_2_OUT: u8 = 1 << 5;
// Bits 6 and 7, which say that IOCHK# or SERR# was the cause of an NMI, are never set: there is neither.

pub struct I8042 {
    requests: Arc<dyn GuestRequests>,
    /// What of port B keeps its value.
    port_b: u8,
}

impl I8042 {
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests, port_b: 0 }
    }

    fn read_port_b(&mut self) -> u8 {
        self.port_b ^= REFRESH;
        self.port_b | TIMER_2_OUT
    }
}

impl LockedDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = match port {
                0 => 0,
                PORT_B => self.read_port_b(),
                COMMAND => STATUS,
                _ => 0xFF,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&COMMAND_RESET) {
            self.requests.notify(GuestRequest::Reset);
        }
        for (_, byte) in (offset..=u64::MAX).zip(data).filter(|(port, _)| *port == PORT_B) {
            self.port_b = self.port_b & !WRITABLE | byte & WRITABLE;
        }
    }
}

/// The controller itself has no state, and a request once made is the machine's.
#[derive(Debug, Serialize, Deserialize)]
pub struct I8042State {
    /// Not in the states of earlier builds, whose guests read port B as all ones.
    #[serde(default)]
    port_b: u8,
}

impl Migratable for I8042 {
    const FORMAT: Format = Format::new("i8042", 1);
    type State = I8042State;
    type Handles = NoHandles;
    type Parts<'a> = Arc<dyn GuestRequests>;

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { requests: _, port_b } = self;
        let state = I8042State { port_b: *port_b };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, requests: Arc<dyn GuestRequests>) -> Result<Self, MigrateError> {
        let Saved { state: I8042State { port_b }, handles: NoHandles } = saved;
        Ok(Self { requests, port_b: port_b & (WRITABLE | REFRESH) })
    }
}

impl Catalogued for I8042 {
    fn boot(_: &Spec, around: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        Ok(vec![(NAME.to_owned(), Self::new(around.requests.clone()))])
    }

    fn parts<'a>(around: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {
        around.requests.clone()
    }

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Mutex::new(self))
    }
}

impl Device for Mutex<I8042> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pio { base: layout::I8042_PORT.into(), len: I8042_SIZE, device: self }]
    }

    /// Does nothing by itself.
    fn quiesce(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn resume(&self) {}

    fn reset(&self) {
        self.lock().port_b = 0;
    }

    fn blockers(&self, operation: Operation) -> Vec<String> {
        on_board(operation)
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of_locked(self, name)
    }

    fn describe(&self, _: &mut dyn AmlSink) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_parts::Asked;

    fn read(device: &mut I8042, port: u64) -> u8 {
        let mut byte = [0xEE];
        device.read(port, &mut byte);
        byte[0]
    }

    #[test]
    fn only_the_reset_command_resets() {
        let asked = Arc::new(Asked::default());
        let mut device = I8042::new(asked.clone());
        device.write(0, &[COMMAND_RESET]);
        device.write(PORT_B, &[COMMAND_RESET]);
        device.write(COMMAND, &[0xAA]);
        device.write(COMMAND, &[]);
        assert_eq!(asked.take(), []);
        assert_eq!(read(&mut device, COMMAND), STATUS);
        let mut device = I8042::restore(device.save().unwrap(), asked.clone()).unwrap();
        device.write(COMMAND, &[COMMAND_RESET]);
        assert_eq!(asked.take(), [GuestRequest::Reset]);
    }

    #[test]
    fn port_b_blames_no_bus_for_an_nmi() {
        let asked = Arc::new(Asked::default());
        let mut device = I8042::new(asked.clone());
        device.write(PORT_B, &[0xF3]);
        let first = read(&mut device, PORT_B);
        let mut device = I8042::restore(device.save().unwrap(), asked.clone()).unwrap();
        let second = read(&mut device, PORT_B);
        assert_eq!((first & !REFRESH, second & !REFRESH), (TIMER_2_OUT | 3, TIMER_2_OUT | 3));
        assert_eq!(first ^ second, REFRESH);
        // As part of an access to its neighbours, too.
        device.write(0, &[0, 0x0C]);
        assert_eq!(read(&mut device, PORT_B) & WRITABLE, 0x0C);
        device.write(u64::MAX, &[1, 1]);
    }
}
