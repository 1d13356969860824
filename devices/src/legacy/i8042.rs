//! As much of the keyboard controller as a reset needs (ports 0x60 and 0x64).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::carried::{Carried, CarryError};
use crate::interrupt::{GuestRequest, GuestRequests};

/// Ports 0x60 to 0x64: the bus range. Those between the two belong to others (0x61 is the PIT's, inside KVM).
pub const I8042_SIZE: u64 = 5;
const COMMAND: u64 = 4;
/// Output buffer full, input buffer empty. Always: Linux then finds after 16 reads that there is no controller
/// (`i8042_flush`), where an empty buffer would make it wait for answers; and its reset does not wait (`kb_wait`).
const STATUS: u8 = 0x01;
/// Pulse output line 0, the CPU's reset.
const COMMAND_RESET: u8 = 0xFE;

pub struct I8042 {
    requests: Arc<dyn GuestRequests>,
}

impl I8042 {
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self { requests }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = match port {
                0 => 0,
                COMMAND => STATUS,
                _ => 0xFF,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&COMMAND_RESET) {
            self.requests.ask(GuestRequest::Reset);
        }
    }
}

/// Nothing: the controller has no state, and a request once made is the machine's.
#[derive(Debug, Serialize, Deserialize)]
pub struct I8042State {}

impl Carried for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
    type State = I8042State;
    type Parts<'a> = Arc<dyn GuestRequests>;

    fn save(&self) -> Result<I8042State, CarryError> {
        let Self { requests: _ } = self;
        Ok(I8042State {})
    }

    fn restore(state: I8042State, requests: Arc<dyn GuestRequests>) -> Result<Self, CarryError> {
        let I8042State {} = state;
        Ok(Self::new(requests))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_parts::Asked;

    #[test]
    fn only_the_reset_command_resets() {
        let asked = Arc::new(Asked::default());
        let mut device = I8042::new(asked.clone());
        device.write(0, &[COMMAND_RESET]);
        device.write(COMMAND, &[0xAA]);
        device.write(COMMAND, &[]);
        assert_eq!(asked.take(), []);
        let mut status = [0];
        device.read(COMMAND, &mut status);
        assert_eq!(status, [STATUS]);
        let mut device = I8042::restore(device.save().unwrap(), asked.clone()).unwrap();
        device.write(COMMAND, &[COMMAND_RESET]);
        assert_eq!(asked.take(), [GuestRequest::Reset]);
    }
}
