//! Offsets and bits of the PCI configuration space (PCI Local Bus 3.0, chapter 6; PCI Express 6.0, 7.5 to 7.9).

pub(crate) const COMMAND: u16 = 0x04;
pub(crate) const COMMAND_IO: u16 = 1 << 0;
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// Interrupt Disable, in the register's upper byte (PCI 3.0, 6.2.2): the device does not assert INTx.
pub(crate) const DISABLE_INTX: u8 = 1 << 2;
pub(crate) const STATUS: u16 = 0x06;
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;
pub(crate) const HEADER_TYPE: u16 = 0x0E;
pub(crate) const HEADER_ENDPOINT: u8 = 0;
pub(crate) const HEADER_MULTIFUNCTION: u8 = 0x80;
pub(crate) const BAR0: u16 = 0x10;
pub(crate) const EXPANSION_ROM: u16 = 0x30;
pub(crate) const CAPABILITY_POINTER: u16 = 0x34;
pub(crate) const INTERRUPT_PIN: u16 = 0x3D;

// Bits of a BAR's register (PCI Local Bus 3.0, 6.2.5.1).
pub(crate) const BAR_IO: u32 = 1;
pub(crate) const BAR_IO_FLAGS: u32 = 0x3;
pub(crate) const BAR_MEMORY_FLAGS: u32 = 0xF;
pub(crate) const BAR_MEMORY_TYPE: u32 = 0x6;
pub(crate) const BAR_MEMORY_64: u32 = 0x4;
pub(crate) const BAR_MEMORY_PREFETCHABLE: u32 = 0x8;

// Capability ids (PCI Local Bus 3.0, appendix H; EA is of a later ECN).
pub(crate) const CAP_PM: u8 = 0x01;
pub(crate) const CAP_MSI: u8 = 0x05;
pub(crate) const CAP_MSIX: u8 = 0x11;
pub(crate) const CAP_EA: u8 = 0x14;

/// PMCSR, from the start of the power management capability; bits 0 and 1 are the state.
pub(crate) const PM_CONTROL: u16 = 4;
pub(crate) const PM_STATE: u8 = 3;
pub(crate) const PM_D3HOT: u8 = 3;

// Message control of MSI-X (PCI 3.0, 6.8.2.3).
pub(crate) const MSIX_TABLE_SIZE: u16 = 0x07FF;
/// All vectors are masked.
pub(crate) const MSIX_FUNCTION_MASK: u16 = 1 << 14;
pub(crate) const MSIX_ENABLE: u16 = 1 << 15;
pub(crate) const MSIX_WRITABLE: u16 = MSIX_ENABLE | MSIX_FUNCTION_MASK;

pub(crate) const EXTENDED_START: u16 = 0x100;
/// Extended capabilities that manage what the host owns: functions (ARI, SR-IOV), BAR sizes (Resizable BAR, VF
/// Resizable BAR), address translation (ATS, PRI, PASID).
pub(crate) const HIDDEN_EXTENDED: [u16; 7] = [0x0E, 0x0F, 0x10, 0x13, 0x15, 0x1B, 0x24];
