//! The configuration space as the guest sees it: the device's own, with some bits answered by us.
//!
//! Emulated: BARs (the guest's addresses are not the host's), the expansion ROM and the interrupt pin (hidden), the
//! multi-function bit, the MSI-X control word, DisINTx (set in the device, as nobody handles its INTx). Capabilities
//! that cannot work in a guest are taken out of the chains. All the rest goes to VFIO, which virtualises what must not
//! reach the hardware (`vfio_pci_config.c`).

use super::saved::FilterState;
use crate::migratable::MigrateError;
use crate::pci::bar::BarRegister;
use crate::pci::config::{ConfigSpace, PhysicalConfig};
use crate::pci::msix_capability::MsixLayout;
use crate::pci::regs::*;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfigFilter {
    space: ConfigSpace,
    /// Where the MSI-X capability is.
    msix: u16,
    /// Where the power management capability is, if there is one.
    pm: Option<u16>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("it is a bridge or has an unknown header (type {0:#x}): only endpoints can be passed through")]
    Header(u8),
    #[error("it has no MSI-X capability, and INTx and MSI are not supported yet")]
    NoMsix,
    #[error("its MSI-X capability makes no sense: {0:?}")]
    BadMsix(MsixLayout),
}

fn u16_at(device: &dyn PhysicalConfig, offset: u16) -> u16 {
    let mut data = [0; 2];
    device.read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn u32_at(device: &dyn PhysicalConfig, offset: u16) -> u32 {
    let mut data = [0; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn u8_at(device: &dyn PhysicalConfig, offset: u16) -> u8 {
    let mut data = [0; 1];
    device.read(offset, &mut data);
    data[0]
}

impl ConfigFilter {
    /// Looks the device's capabilities over. The BARs are there once [`ConfigFilter::set_bars`] was called.
    pub(super) fn new(device: &dyn PhysicalConfig) -> Result<(Self, MsixLayout), ConfigError> {
        let header = u8_at(device, HEADER_TYPE);
        if header & !HEADER_MULTIFUNCTION != HEADER_ENDPOINT {
            return Err(ConfigError::Header(header));
        }
        let mut this = Self { space: ConfigSpace::over_device(), msix: 0, pm: None };
        this.emulate(HEADER_TYPE, &[0], HEADER_MULTIFUNCTION, 0);
        this.emulate(EXPANSION_ROM, &[0; 4], 0xFF, 0);
        this.emulate(INTERRUPT_PIN, &[0], 0xFF, 0);
        this.emulate(BAR0, &[0; 24], 0xFF, 0);
        // What the guest reads of the bit is what it wrote.
        this.emulate(COMMAND + 1, &[0], DISABLE_INTX, DISABLE_INTX);
        this.filter_capabilities(device);
        this.filter_extended(device);
        if this.msix == 0 {
            return Err(ConfigError::NoMsix);
        }
        let layout = MsixLayout::read(device, this.msix).map_err(ConfigError::BadMsix)?;
        layout.emulate(&mut this.space, this.msix);
        Ok((this, layout))
    }

    fn emulate(&mut self, offset: u16, values: &[u8], mask: u8, writable: u8) {
        self.space.emulate(offset, values, mask, writable);
    }

    pub(super) fn save(&self) -> FilterState {
        let Self { space, msix, pm } = self;
        FilterState { space: space.save(), msix: *msix, pm: *pm }
    }

    /// Refuses capabilities where none can be.
    pub(super) fn restore(state: FilterState) -> Result<Self, MigrateError> {
        let FilterState { space, msix, pm } = state;
        if msix >= EXTENDED_START || pm.is_some_and(|at| at >= EXTENDED_START) {
            return Err(MigrateError::State("a capability is outside of the configuration space".into()));
        }
        Ok(Self { space: ConfigSpace::restore(space)?, msix, pm })
    }

    /// Relinks the chain that starts at 0x34 without the hidden capabilities (PCI 3.0, 6.7).
    fn filter_capabilities(&mut self, device: &dyn PhysicalConfig) {
        let mut link = CAPABILITY_POINTER;
        let mut at = u16::from(u8_at(device, CAPABILITY_POINTER)) & !3;
        if u16_at(device, STATUS) & STATUS_CAPABILITIES == 0 {
            at = 0;
        }
        // 48 dwords follow the header: more steps than that are a loop.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            let (id, next) = (u8_at(device, at), u16::from(u8_at(device, at + 1)) & !3);
            if let Some(size) = hidden_size(id, u16_at(device, at + 2)) {
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
    fn filter_extended(&mut self, device: &dyn PhysicalConfig) {
        let mut link = None;
        let mut at = EXTENDED_START;
        for _ in 0..(4096 - EXTENDED_START) / 4 {
            let head = u32_at(device, at);
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
        let emulated = self.space.emulated(at + 2) | 0xF0;
        self.emulate(at + 2, &[high as u8], emulated, 0);
        self.emulate(at + 3, &[(high >> 8) as u8], 0xFF, 0);
    }

    /// Puts the BARs' guest addresses in; registers without a BAR read as zero.
    pub(super) fn set_bars(&mut self, bars: &[BarRegister]) {
        bars.iter().for_each(|bar| bar.emulate(&mut self.space));
    }

    /// The address in a BAR's register(s), as the guest has programmed it.
    pub(super) fn bar_address(&self, bar: &BarRegister) -> u64 {
        bar.address_in(&self.space)
    }

    /// Message control of the MSI-X capability.
    pub(super) fn msix_control(&self) -> u16 {
        MsixLayout::control(&self.space, self.msix)
    }

    /// Where the power management control register is (PCI PM 1.2, 3.2.4).
    pub(super) fn power_register(&self) -> Option<u16> {
        self.pm.map(|at| at + PM_CONTROL)
    }

    pub(super) fn read(&self, device: &dyn PhysicalConfig, offset: u16, data: &mut [u8]) {
        self.space.read_over(device, offset, data);
    }

    /// Takes the emulated part of a write. Returns what is to be written to the device, if anything.
    pub(super) fn write(&mut self, device: &dyn PhysicalConfig, offset: u16, data: &[u8]) -> Option<Vec<u8>> {
        self.space.write_over(device, offset, data)
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
