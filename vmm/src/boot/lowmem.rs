//! Where the structures of the boot lie in the guest's first MiB (guest physical addresses).
//!
//! ```text
//! 0x0_0500  GDT                        0x0_9000  PML4
//! 0x0_6000  PVH start info             0x0_A000  PDPT
//! 0x0_6100  PVH modules                0x0_B000  4 page directories
//! 0x0_6200  PVH memory map             0x2_0000  command line
//! 0x0_7000  zero page                  0x9_FC00  EBDA (reserved, empty)
//! 0x0_8000  stack, grows down from 0x9000   0xE_0000  ACPI tables
//!                                           0xF_FFF0  reset vector
//! ```
//!
//! All but the ACPI tables and the reset vector is free for the kernel once it has read it.

pub(super) const GDT: u64 = 0x500;
pub(super) const START_INFO: u64 = 0x6000;
pub(super) const MODULES: u64 = 0x6100;
pub(super) const PVH_MEMORY_MAP: u64 = 0x6200;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const STACK_TOP: u64 = 0x9000;
pub(super) const PML4: u64 = 0x9000;
pub(super) const PDPT: u64 = 0xA000;
pub(super) const PAGE_DIRECTORIES: u64 = 0xB000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Bytes of command line that fit, without the NUL.
pub(super) const CMDLINE_MAX: usize = 0xFFFF;
pub(super) const EBDA: u64 = 0x9_FC00;
/// End of conventional memory; beyond it is the hole of the VGA and of option ROMs.
pub(super) const CONVENTIONAL_END: u64 = 0xA_0000;
/// Where a kernel without help looks for the RSDP (ACPI 6.5, 5.2.5.1).
pub(super) const ACPI: u64 = 0xE_0000;
/// F000:FFF0, the last 16 bytes below 1 MiB.
pub(super) const RESET_VECTOR: u64 = 0xF_FFF0;
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
