//! The guest's physical address space (x86-64). Frozen: a running guest's layout is saved state, these are the values
//! for its boot.
//!
//! ```text
//! 0            RAM, up to 3 GiB
//! 0xC000_0000  32-bit PCI window
//! 0xE000_0000  ECAM of bus 0 (1 MiB)
//! 0xFEC0_0000  IOAPIC            0xFEE0_0000  LAPIC
//! 0xFFFB_C000  identity map page and TSS of KVM on Intel (4 pages)
//! 4 GiB        RAM beyond 3 GiB, then (1 GiB aligned, not below 64 GiB) the 64-bit PCI window
//! ```

/// RAM from 0 on ends here at the latest: 3 GiB.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where the RAM goes on that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Memory BARs of 32 bits.
pub const PCI_WINDOW32: std::ops::Range<u64> = 0xC000_0000..0xE000_0000;
/// PCI configuration space in memory (PCIe enhanced configuration access mechanism), as the MCFG says.
pub const ECAM_BASE: u64 = 0xE000_0000;
/// One bus: 32 devices of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 0x10_0000;

/// Where KVM's IOAPIC is (IOAPIC_DEFAULT_BASE_ADDRESS), as the MADT says.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// Where every LAPIC is after reset (APIC_DEFAULT_PHYS_BASE), as the MADT says.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// One page of KVM's own (KVM_SET_IDENTITY_MAP_ADDR).
pub const IDENTITY_MAP_ADDR: u64 = 0xFFFB_C000;
/// Three pages of KVM's own (KVM_SET_TSS_ADDR).
pub const TSS_ADDR: u64 = 0xFFFB_D000;

const PCI_WINDOW64_MIN: u64 = 64 << 30;
const PCI_WINDOW64_SIZE: u64 = 256 << 30;

/// I/O ports of PCI BARs: away from all legacy ports and from [`PM_BASE`].
pub const PCI_IO_WINDOW: std::ops::Range<u16> = 0x1000..0xC000;
/// CONFIG_ADDRESS; CONFIG_DATA is 4 ports on (PCI Local Bus 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_ADDRESS: u16 = 0xCF8;
/// First of the serial port's 8, where a PC has COM1.
pub const SERIAL_PORT: u16 = 0x3F8;
/// The serial port's interrupt, as COM1's.
pub const SERIAL_GSI: u32 = 4;
/// Index port of the real-time clock and its RAM; the next one is the data port.
pub const CMOS_PORT: u16 = 0x70;
/// First port of the keyboard controller, by which a guest may reset.
pub const I8042_PORT: u16 = 0x60;
/// ACPI power management of the hardware-reduced model: sleep control and status, reset, GED status, PM timer (8
/// ports).
pub const PM_BASE: u16 = 0x600;
/// How many ports there are from [`PM_BASE`] on.
pub const PM_SIZE: u16 = 8;
/// ACPI generic event device (power button).
pub const GED_GSI: u32 = 5;

/// GSIs 0..24 are the IOAPIC's pins; MSI routes come after them.
pub const FIRST_MSI_GSI: u32 = 24;

/// RAM as (guest address, size) for `size` bytes in all.
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_RAM_END { vec![(0, size)] } else { vec![(0, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END)] }
}

/// The 64-bit PCI window for `ram_size` bytes of RAM and a guest with `phys_bits` address bits; empty if none fits.
pub fn pci_window64(ram_size: u64, phys_bits: u8) -> std::ops::Range<u64> {
    let ram_end = ram_regions(ram_size).last().map_or(0, |(base, size)| base.saturating_add(*size));
    let start = ram_end.next_multiple_of(1 << 30).max(PCI_WINDOW64_MIN);
    let limit = 1u64.checked_shl(phys_bits.into()).unwrap_or(u64::MAX);
    start..start.saturating_add(PCI_WINDOW64_SIZE).min(limit).max(start)
}
