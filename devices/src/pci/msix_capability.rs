//! The MSI-X capability (PCI Local Bus 3.0, 6.8.2), and the parts of BARs that it speaks of.

use std::ops::Range;

use super::config::{ConfigSpace, PhysicalConfig};
use super::msix::Msix;
use super::regs::*;
use super::saved::MsixLayoutState;

/// Message control, from the start of the capability.
const CONTROL: u16 = 2;
const TABLE: u16 = 4;
const PBA: u16 = 8;

/// What the capability says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsixLayout {
    pub vectors: u16,
    pub table_bar: u8,
    pub table_offset: u32,
    pub pba_bar: u8,
    pub pba_offset: u32,
}

impl MsixLayout {
    /// Of a device whose capability is at `at`. The error is one that makes no sense.
    pub(crate) fn read(device: &dyn PhysicalConfig, at: u16) -> Result<Self, Self> {
        let dword = |offset: u16| {
            let mut data = [0; 4];
            device.read(at + offset, &mut data);
            u32::from_le_bytes(data)
        };
        let mut control = [0; 2];
        device.read(at + CONTROL, &mut control);
        let size = u16::from_le_bytes(control) & MSIX_TABLE_SIZE;
        let (table, pba) = (dword(TABLE), dword(PBA));
        let layout = Self {
            vectors: size + 1,
            table_bar: (table & 7) as u8,
            table_offset: table & !7,
            pba_bar: (pba & 7) as u8,
            pba_offset: pba & !7,
        };
        if layout.table_bar > 5 || layout.pba_bar > 5 { Err(layout) } else { Ok(layout) }
    }

    pub(crate) fn save(&self) -> MsixLayoutState {
        let Self { vectors, table_bar, table_offset, pba_bar, pba_offset } = *self;
        MsixLayoutState { vectors, table_bar, table_offset, pba_bar, pba_offset }
    }

    pub(crate) fn restore(state: MsixLayoutState) -> Self {
        let MsixLayoutState { vectors, table_bar, table_offset, pba_bar, pba_offset } = state;
        Self { vectors, table_bar, table_offset, pba_bar, pba_offset }
    }

    /// Puts the capability's body at `at`; its id and the link to the next one are the caller's. Enable and function
    /// mask are all that can be written.
    pub(crate) fn emulate(&self, config: &mut ConfigSpace, at: u16) {
        let size = self.vectors.saturating_sub(1) & MSIX_TABLE_SIZE;
        config.emulate(at + CONTROL, &size.to_le_bytes(), 0xFF, 0);
        config.allow(at + CONTROL, &MSIX_WRITABLE.to_le_bytes());
        config.emulate(at + TABLE, &(self.table_offset | u32::from(self.table_bar)).to_le_bytes(), 0xFF, 0);
        config.emulate(at + PBA, &(self.pba_offset | u32::from(self.pba_bar)).to_le_bytes(), 0xFF, 0);
    }

    /// Message control as the guest has written it, of a capability at `at`.
    pub(crate) fn control(config: &ConfigSpace, at: u16) -> u16 {
        u16::from_le_bytes(config.value(at + CONTROL))
    }

    /// Where in their BARs the table and the pending bits are.
    pub(crate) fn ranges(&self) -> (Range<u64>, Range<u64>) {
        let (table, pba) = Msix::sizes(self.vectors);
        let (table_start, pba_start) = (u64::from(self.table_offset), u64::from(self.pba_offset));
        (table_start..table_start + table, pba_start..pba_start + pba)
    }

    /// What of them is in the BAR of this index.
    pub(crate) fn in_bar(&self, index: u8) -> MsixInBar {
        let (table, pba) = self.ranges();
        MsixInBar { table: (self.table_bar == index).then_some(table), pba: (self.pba_bar == index).then_some(pba) }
    }
}

/// The table and the pending bits in a BAR, if they are there: accesses to the BAR are parted between them and the
/// device.
#[derive(Clone, Debug)]
pub(crate) struct MsixInBar {
    table: Option<Range<u64>>,
    pba: Option<Range<u64>>,
}

/// Whom an access is for, with the offset there.
enum Target {
    Table(u64),
    Pba(u64),
    Device(u64),
}

impl MsixInBar {
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        [&self.table, &self.pba].into_iter().flatten().cloned().collect()
    }

    fn target(&self, at: u64) -> Target {
        let inside = |range: &Option<Range<u64>>| range.as_ref().filter(|r| r.contains(&at)).map(|r| at - r.start);
        match (inside(&self.table), inside(&self.pba)) {
            (Some(offset), _) => Target::Table(offset),
            (_, Some(offset)) => Target::Pba(offset),
            _ => Target::Device(at),
        }
    }

    /// The pieces of an access: all of it at once where the device answers alone (its registers may need the width),
    /// else by dword, the smallest unit in which the table and the pending bits begin and end.
    fn pieces(&self, start: u64, len: usize) -> Vec<(u64, Range<usize>)> {
        let end = start.saturating_add(len as u64);
        let touches = |range: &Option<Range<u64>>| range.as_ref().is_some_and(|r| r.start < end && start < r.end);
        if !touches(&self.table) && !touches(&self.pba) {
            return vec![(start, 0..len)];
        }
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let at = start.saturating_add(done as u64);
            let step = (4 - (at % 4) as usize).min(len - done);
            pieces.push((at, done..done + step));
            done += step;
        }
        pieces
    }

    /// A read at `at` in the BAR; `device` is asked for what is neither table nor pending bits.
    pub(crate) fn read(&self, msix: &Msix, at: u64, data: &mut [u8], device: impl Fn(u64, &mut [u8])) {
        for (at, range) in self.pieces(at, data.len()) {
            let data = &mut data[range];
            match self.target(at) {
                Target::Table(at) => msix.table_read(at, data),
                Target::Pba(at) => msix.pba_read(at, data),
                Target::Device(at) => device(at, data),
            }
        }
    }

    /// As [`MsixInBar::read`].
    pub(crate) fn write(&self, msix: &mut Msix, at: u64, data: &[u8], device: impl Fn(u64, &[u8])) {
        // All of an access to the table is one write: an unmask must not be seen before the message beside it.
        if let (Some((at, _)), true) = (self.pieces(at, data.len()).first(), data.len() == 8)
            && let (Target::Table(first), Target::Table(_)) = (self.target(*at), self.target(at.saturating_add(4)))
        {
            msix.table_write(first, data);
            return;
        }
        for (at, range) in self.pieces(at, data.len()) {
            let data = &data[range];
            match self.target(at) {
                Target::Table(at) => msix.table_write(at, data),
                Target::Pba(_) => {}
                Target::Device(at) => device(at, data),
            }
        }
    }
}
