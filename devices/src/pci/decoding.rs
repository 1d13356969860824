//! Whether a function answers at its BARs: COMMAND (PCI Local Bus 3.0, 6.2.2), its power state (PCI Power Management
//! 1.2, 5.4.1) and the host bridge's windows together.

use super::bar::BarRegister;
use super::placement::Decoded;
use super::regs::{COMMAND, PM_D3HOT, PM_STATE};
use super::saved::DecodingState;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoding {
    /// As the guest last wrote it.
    pub command: u16,
    /// In D3hot, where a function decodes nothing whatever COMMAND says.
    pub in_d3hot: bool,
    pub windows: Decoded,
}

impl Decoding {
    /// As after a reset: awake, and nothing decodes.
    pub(crate) fn new(windows: Decoded) -> Self {
        Self { command: 0, in_d3hot: false, windows }
    }

    pub(crate) fn save(&self) -> DecodingState {
        let Self { command, in_d3hot, windows } = self;
        DecodingState { command: *command, in_d3hot: *in_d3hot, windows: windows.save() }
    }

    pub(crate) fn restore(state: DecodingState) -> Self {
        let DecodingState { command, in_d3hot, windows } = state;
        Self { command, in_d3hot, windows: Decoded::restore(windows) }
    }

    /// Takes what is of its concern of a write by the guest. `power`: where the power management control register is,
    /// if there is one. True if its power state was written: what has come of that is told by
    /// [`Decoding::set_power`].
    pub(crate) fn write(&mut self, power: Option<u16>, offset: u16, data: &[u8]) -> bool {
        self.command = merged(self.command, COMMAND, offset, data);
        let Some(at) = power.filter(|at| covers(*at, offset, data)) else { return false };
        self.set_power(merged(0, at, offset, data) as u8);
        true
    }

    /// The low byte of the power management control register, as it reads now (PCI PM 1.2, 3.2.4).
    pub(crate) fn set_power(&mut self, control: u8) {
        self.in_d3hot = control & PM_STATE == PM_D3HOT;
    }

    /// Where a BAR is that the guest has put at `programmed`, if it is anywhere.
    pub(crate) fn address(&self, bar: &BarRegister, programmed: u64) -> Option<u64> {
        let on = self.command & bar.decode_bit() != 0 && !self.in_d3hot;
        (on && self.windows.covers(bar, programmed)).then_some(programmed)
    }
}

fn covers(register: u16, offset: u16, data: &[u8]) -> bool {
    (offset..offset.saturating_add(data.len() as u16)).contains(&register)
}

/// The 16-bit register at `register` after a write of `data` at `offset`.
fn merged(old: u16, register: u16, offset: u16, data: &[u8]) -> u16 {
    let mut bytes = old.to_le_bytes();
    for (n, byte) in bytes.iter_mut().enumerate() {
        let at = (register + n as u16).checked_sub(offset);
        if let Some(value) = at.and_then(|at| data.get(usize::from(at))) {
            *byte = *value;
        }
    }
    u16::from_le_bytes(bytes)
}
