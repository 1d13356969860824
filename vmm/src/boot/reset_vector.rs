//! Code at the processor's reset vector, where a BIOS would be.
//!
//! A kernel on a hardware-reduced ACPI machine prefers EFI for its reboot (`reboot_init` in arch/x86/kernel/reboot.c).
//! Without EFI it does not fall back to ACPI's reset register but jumps to F000:FFF0 in real mode
//! (`machine_real_restart`), where zeroed memory would let it run in circles for good.

use theseus_devices::legacy::pm::RESET_VALUE;
use vm_memory::GuestMemoryMmap;

use super::acpi::RESET_PORT;
use super::{BootError, lowmem};

/// Asks for a reset by its port, in real mode.
fn code() -> [u8; 9] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [
        0xBA,
        low,
        high, // mov dx, RESET_PORT
        0xB0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xEE,        // out dx, al
        0xF4,        // hlt
        0xEB,
        0xFD, // jmp to the hlt
    ]
}

pub(super) fn write(mem: &GuestMemoryMmap) -> Result<(), BootError> {
    super::write(mem, &code(), lowmem::RESET_VECTOR)
}
