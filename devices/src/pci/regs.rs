//! Offsets and bits of the PCI configuration space (PCI Local Bus 3.0, chapter 6; PCI Express 6.0, 7.5 to 7.9).

pub const COMMAND: u16 = 0x04;
pub const COMMAND_IO: u16 = 1 << 0;
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Interrupt Disable, in the register's upper byte (PCI 3.0, 6.2.2): the device does not assert INTx.
pub const DISABLE_INTX: u8 = 1 << 2;
pub const STATUS: u16 = 0x06;
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
pub const HEADER_TYPE: u16 = 0x0E;
pub const HEADER_ENDPOINT: u8 = 0;
pub const HEADER_MULTIFUNCTION: u8 = 0x80;
pub const BAR0: u16 = 0x10;
pub const EXPANSION_ROM: u16 = 0x30;
pub const CAPABILITY_POINTER: u16 = 0x34;
pub const INTERRUPT_PIN: u16 = 0x3D;

pub const BAR_IO: u32 = 1;
pub const BAR_IO_FLAGS: u32 = 0x3;
pub const BAR_MEMORY_FLAGS: u32 = 0xF;
pub const BAR_MEMORY_TYPE: u32 = 0x6;
pub const BAR_MEMORY_64: u32 = 0x4;
pub const BAR_MEMORY_PREFETCHABLE: u32 = 0x8;

pub const CAP_PM: u8 = 0x01;
pub const CAP_MSI: u8 = 0x05;
pub const CAP_MSIX: u8 = 0x11;
pub const CAP_EA: u8 = 0x14;

/// PMCSR, from the start of the power management capability; bits 0 and 1 are the state.
pub const PM_CONTROL: u16 = 4;
pub const PM_STATE: u8 = 3;
pub const PM_D3HOT: u8 = 3;

// Message control of MSI-X (PCI 3.0, 6.8.2.3).
pub const MSIX_TABLE_SIZE: u16 = 0x07FF;
/// All vectors are masked.
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
pub const MSIX_ENABLE: u16 = 1 << 15;
pub const MSIX_WRITABLE: u16 = MSIX_ENABLE | MSIX_FUNCTION_MASK;

pub const EXTENDED_START: u16 = 0x100;
/// Extended capabilities that manage what the host owns: functions (ARI, SR-IOV), BAR sizes (Resizable BAR, VF
/// Resizable BAR), address translation (ATS, PRI, PASID).
pub const HIDDEN_EXTENDED: [u16; 7] = [0x0E, 0x0F, 0x10, 0x13, 0x15, 0x1B, 0x24];
