//! The configuration space as the guest sees it: the device's own, with some bits answered by us.
//!
//! Emulated: BARs (the guest's addresses are not the host's), the expansion ROM and the interrupt pin (hidden), the
//! multi-function bit, the MSI-X control word, DisINTx (set in the device, as nobody handles its INTx). Capabilities
//! that cannot work in a guest are taken out of the chains. All the rest goes to VFIO, which virtualises what must not
//! reach the hardware (`vfio_pci_config.c`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::pci_regs::*;

/// The physical configuration space. `data` is 1, 2 or 4 bytes inside a dword; what is not there reads as ones.
pub trait ConfigSpace {
    fn read(&self, offset: u16, data: &mut [u8]);
    fn write(&self, offset: u16, data: &[u8]);
}

/// A byte of which at least one bit is emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Byte {
    offset: u16,
    /// The emulated bits' values.
    value: u8,
    /// Which bits are emulated.
    emulated: u8,
    /// Which of those the guest can write.
    writable: u8,
}

/// See the module. Also its own saved form: the guest's view is carried, not computed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFilter {
    bytes: BTreeMap<u16, Byte>,
    /// Where the MSI-X capability is.
    msix: u16,
    /// Where the power management capability is, if there is one.
    pm: Option<u16>,
}

/// What the MSI-X capability says (PCI 3.0, 6.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixLayout {
    pub vectors: u16,
    pub table_bar: u8,
    pub table_offset: u32,
    pub pba_bar: u8,
    pub pba_offset: u32,
}

/// A BAR to emulate. `size` is a power of two; `address` is the one it has at the guest's boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarRegister {
    pub index: u8,
    /// The read-only low bits: type and prefetchable.
    pub flags: u32,
    pub size: u64,
    pub address: u64,
    /// Takes the next register too.
    pub is_64bit: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("it is a bridge or has an unknown header (type {0:#x}): only endpoints can be passed through")]
    Header(u8),
    #[error("it has no MSI-X capability, and INTx and MSI are not supported yet")]
    NoMsix,
    #[error("its MSI-X capability makes no sense: {0:?}")]
    BadMsix(MsixLayout),
}

fn u16_at(space: &dyn ConfigSpace, offset: u16) -> u16 {
    let mut data = [0; 2];
    space.read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn u32_at(space: &dyn ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn u8_at(space: &dyn ConfigSpace, offset: u16) -> u8 {
    let mut data = [0; 1];
    space.read(offset, &mut data);
    data[0]
}

impl ConfigFilter {
    /// Looks the device's capabilities over. The BARs are there once [`ConfigFilter::set_bars`] was called.
    pub fn new(space: &dyn ConfigSpace) -> Result<(Self, MsixLayout), ConfigError> {
        let header = u8_at(space, HEADER_TYPE);
        if header & !HEADER_MULTIFUNCTION != HEADER_ENDPOINT {
            return Err(ConfigError::Header(header));
        }
        let mut this = Self { bytes: BTreeMap::new(), msix: 0, pm: None };
        this.emulate(HEADER_TYPE, &[0], HEADER_MULTIFUNCTION, 0);
        this.emulate(EXPANSION_ROM, &[0; 4], 0xFF, 0);
        this.emulate(INTERRUPT_PIN, &[0], 0xFF, 0);
        this.emulate(BAR0, &[0; 24], 0xFF, 0);
        this.emulate_intx_disable(0);
        this.filter_capabilities(space);
        this.filter_extended(space);
        if this.msix == 0 {
            return Err(ConfigError::NoMsix);
        }
        let layout = this.emulate_msix(space)?;
        Ok((this, layout))
    }

    fn emulate(&mut self, offset: u16, values: &[u8], emulated: u8, writable: u8) {
        for (offset, value) in (offset..).zip(values) {
            self.bytes
                .insert(offset, Byte { offset, value: value & emulated, emulated, writable: writable & emulated });
        }
    }

    /// What the guest reads of the bit is what it wrote. `high`: the upper byte of COMMAND as it has it now.
    fn emulate_intx_disable(&mut self, high: u8) {
        self.emulate(COMMAND + 1, &[high], DISABLE_INTX, DISABLE_INTX);
    }

    /// For a filter that an older build has made: the guest's bit is VFIO's. Whether it was such a one.
    pub fn adopt_intx_disable(&mut self, space: &dyn ConfigSpace) -> bool {
        let is_old = !self.bytes.contains_key(&(COMMAND + 1));
        if is_old {
            self.emulate_intx_disable(u8_at(space, COMMAND + 1));
        }
        is_old
    }

    /// As an older build would have made it.
    #[cfg(test)]
    pub fn forget_intx_disable(&mut self) {
        self.bytes.remove(&(COMMAND + 1));
    }

    /// Relinks the chain that starts at 0x34 without the hidden capabilities (PCI 3.0, 6.7).
    fn filter_capabilities(&mut self, space: &dyn ConfigSpace) {
        let mut link = CAPABILITY_POINTER;
        let mut at = u16::from(u8_at(space, CAPABILITY_POINTER)) & !3;
        if u16_at(space, STATUS) & STATUS_CAPABILITIES == 0 {
            at = 0;
        }
        // 48 dwords follow the header: more steps than that are a loop.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            let (id, next) = (u8_at(space, at), u16::from(u8_at(space, at + 1)) & !3);
            if let Some(size) = hidden_size(id, u16_at(space, at + 2)) {
                self.emulate(at, &vec![0; usize::from(size.min(0x100 - at))], 0xFF, 0);
            } else {
                self.emulate(link, &[at as u8], 0xFF, 0);
                link = at + 1;
                match id {
                    CAP_MSIX => self.msix = at,
                    CAP_PM => self.pm = Some(at),
                    _ => {}
                }
            }
            at = next;
        }
        self.emulate(link, &[0], 0xFF, 0);
    }

    /// Relinks the chain that starts at 0x100 (PCI Express 6.0, 7.6.3). Its head cannot move: if it is hidden, its id
    /// becomes 0.
    fn filter_extended(&mut self, space: &dyn ConfigSpace) {
        let mut link = None;
        let mut at = EXTENDED_START;
        for _ in 0..(4096 - EXTENDED_START) / 4 {
            let head = u32_at(space, at);
            if head == 0 || head == u32::MAX {
                break;
            }
            let (id, next) = ((head & 0xFFFF) as u16, (head >> 20) as u16 & !3);
            let hidden = HIDDEN_EXTENDED.contains(&id);
            if hidden {
                self.emulate(at, &[0; 4], 0xFF, 0);
            }
            if !hidden || at == EXTENDED_START {
                if let Some(link) = link {
                    self.emulate_next(link, at);
                }
                link = Some(at);
            }
            if next < EXTENDED_START {
                break;
            }
            at = next;
        }
        if let Some(link) = link {
            self.emulate_next(link, 0);
        }
    }

    /// The next pointer is the upper 12 bits of the capability's first dword.
    fn emulate_next(&mut self, at: u16, next: u16) {
        let high = next << 4;
        // The head may be hidden already: then its version bits stay zero.
        let emulated = self.bytes.get(&(at + 2)).map_or(0xF0, |byte| byte.emulated | 0xF0);
        self.emulate(at + 2, &[high as u8], emulated, 0);
        self.emulate(at + 3, &[(high >> 8) as u8], 0xFF, 0);
    }

    fn emulate_msix(&mut self, space: &dyn ConfigSpace) -> Result<MsixLayout, ConfigError> {
        let at = self.msix;
        let size = u16_at(space, at + 2) & MSIX_TABLE_SIZE;
        let (table, pba) = (u32_at(space, at + 4), u32_at(space, at + 8));
        let layout = MsixLayout {
            vectors: size + 1,
            table_bar: (table & 7) as u8,
            table_offset: table & !7,
            pba_bar: (pba & 7) as u8,
            pba_offset: pba & !7,
        };
        if layout.table_bar > 5 || layout.pba_bar > 5 {
            return Err(ConfigError::BadMsix(layout));
        }
        self.emulate(at + 2, &size.to_le_bytes(), 0xFF, 0);
        // Enable and function mask are all that can be written.
        self.emulate(at + 3, &[(size >> 8) as u8], 0xFF, (MSIX_WRITABLE >> 8) as u8);
        self.emulate(at + 4, &table.to_le_bytes(), 0xFF, 0);
        self.emulate(at + 8, &pba.to_le_bytes(), 0xFF, 0);
        Ok(layout)
    }

    /// Puts the BARs' guest addresses in; registers without a BAR read as zero.
    pub fn set_bars(&mut self, bars: &[BarRegister]) {
        for bar in bars {
            let offset = BAR0 + 4 * u16::from(bar.index);
            let mask = !(bar.size - 1);
            let value = bar.address & mask | u64::from(bar.flags);
            let count = if bar.is_64bit { 8 } else { 4 };
            for (n, (value, writable)) in (0..count).zip(value.to_le_bytes().into_iter().zip(mask.to_le_bytes())) {
                self.emulate(offset + n, &[value], 0xFF, writable);
            }
        }
    }

    /// The address in a BAR's register(s), as the guest has programmed it.
    pub fn bar_address(&self, bar: &BarRegister) -> u64 {
        let offset = BAR0 + 4 * u16::from(bar.index);
        let count = if bar.is_64bit { 8 } else { 4 };
        let bytes = (offset..offset + count).map(|at| self.bytes.get(&at).map_or(0, |byte| byte.value));
        let value = bytes.rev().fold(0, |value, byte| value << 8 | u64::from(byte));
        value & !(bar.size - 1)
    }

    /// Message control of the MSI-X capability.
    pub fn msix_control(&self) -> u16 {
        let byte = |at: u16| self.bytes.get(&at).map_or(0, |byte| byte.value);
        u16::from_le_bytes([byte(self.msix + 2), byte(self.msix + 3)])
    }

    /// Where the power management control register is (PCI PM 1.2, 3.2.4).
    pub fn power_register(&self) -> Option<u16> {
        self.pm.map(|at| at + PM_CONTROL)
    }

    pub fn read(&self, space: &dyn ConfigSpace, offset: u16, data: &mut [u8]) {
        let emulated = |at: u16| self.bytes.get(&at);
        let len = data.len() as u16;
        let all = (offset..offset.saturating_add(len)).all(|at| emulated(at).is_some_and(|byte| byte.emulated == 0xFF));
        if !all {
            space.read(offset, data);
        }
        for (at, out) in (offset..).zip(data) {
            if let Some(byte) = emulated(at) {
                *out = *out & !byte.emulated | byte.value;
            }
        }
    }

    /// Takes the emulated part of a write. Returns what is to be written to the device, if anything.
    pub fn write(&mut self, space: &dyn ConfigSpace, offset: u16, data: &[u8]) -> Option<Vec<u8>> {
        let mut physical = data.to_vec();
        let range = offset..offset.saturating_add(data.len() as u16);
        let emulated: Vec<u8> = range.clone().map(|at| self.bytes.get(&at).map_or(0, |byte| byte.emulated)).collect();
        for (at, value) in range.zip(data) {
            if let Some(byte) = self.bytes.get_mut(&at) {
                byte.value = byte.value & !byte.writable | value & byte.writable;
            }
        }
        if emulated.iter().all(|mask| *mask == 0xFF) {
            return None;
        }
        if emulated.iter().any(|mask| *mask != 0) {
            // The device's own value in the emulated bits: the write must not change them.
            let mut current = vec![0; data.len()];
            space.read(offset, &mut current);
            for ((out, mask), current) in physical.iter_mut().zip(emulated).zip(current) {
                *out = *out & !mask | current & mask;
            }
        }
        Some(physical)
    }
}

/// The size of a capability that the guest must not see; None: it may. `control` is the word behind its header.
fn hidden_size(id: u8, control: u16) -> Option<u16> {
    match id {
        // One way to signal interrupts is enough: MSI-X. Bit 7: 64-bit address, bit 8: mask bits (PCI 3.0, 6.8.1).
        CAP_MSI => Some(10 + if control & 0x80 != 0 { 4 } else { 0 } + if control & 0x100 != 0 { 10 } else { 0 }),
        // Fixed BAR addresses: the host's, not the guest's.
        CAP_EA => Some(4),
        _ => None,
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
