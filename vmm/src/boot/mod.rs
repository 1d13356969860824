//! What a guest finds when its first vCPU starts: kernel, initramfs, command line, memory map, ACPI tables, CPUID,
//! registers.
//!
//! All of it is done once, at the boot of the guest, into fresh (zeroed) guest memory. An update never comes here: what
//! the guest was given at boot is saved state.
//!
//! ```text
//! load        kernel, command line, initramfs, ACPI tables, zero page or PVH start info  -> Entry
//! boot_regs   GDT and page tables in guest memory, registers of the boot vCPU            <- Entry
//! GuestCpuid  CPUID of each vCPU
//! ```

pub(crate) mod acpi;
mod bzimage;
pub(crate) mod cpuid;
mod elf;
mod error;
mod file;
mod initramfs;
mod kernel;
mod kernel_file;
mod lowmem;
pub(crate) mod memory_map;
mod pvh;
mod regs;
mod reset_vector;
#[cfg(test)]
mod tests;
mod zero_page;

use std::ops::Range;
use std::path::Path;

use theseus_resources::layout;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) use error::BootError;
use kernel_file::Protocol;
pub(crate) use regs::{boot_msrs, boot_regs};

/// APIC ids above 254 need x2APIC entries in the MADT, and the processor names in the DSDT have two digits.
pub(crate) const MAX_VCPUS: u32 = theseus_api::types::MAX_VCPUS;
const _: () = assert!(MAX_VCPUS <= 100);
/// What a guest is given at its boot, beside what its configuration says: addresses, ports, tables. It is saved with
/// the guest. A build that changes any of it counts on, and a build that meets a number it does not know refuses the
/// guest.
pub(crate) const MACHINE_VERSION: u32 = 1;
/// Below this the kernel's early page tables and the decompressor have no room.
pub(crate) const MIN_RAM: u64 = 32 << 20;

/// What the memory map and the ACPI tables say about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MachineShape {
    /// RAM in bytes; it lies in guest memory as `layout::ram_regions` says.
    pub ram_size: u64,
    /// vCPUs; their APIC ids are 0, 1, 2, ...
    pub vcpus: u32,
    /// 64-bit PCI window; may be empty.
    pub pci_window64: Range<u64>,
    /// What its devices say in the DSDT, in the scope `\_SB_`.
    pub devices: Vec<u8>,
}

/// How the boot vCPU enters the kernel, in guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 64-bit Linux boot protocol: long mode, RSI = boot_params.
    Linux64 { rip: u64, boot_params: u64 },
    /// PVH: 32-bit protected mode without paging, EBX = hvm_start_info.
    Pvh { rip: u64, start_info: u64 },
}

/// Puts everything a kernel needs at its start into `mem`, which must be fresh: zeroed, and laid out by
/// `layout::ram_regions`.
pub(crate) fn load(
    mem: &GuestMemoryMmap,
    kernel: &Path,
    initramfs: Option<&Path>,
    cmdline: &str,
    machine: &MachineShape,
) -> Result<Entry, BootError> {
    check(machine)?;
    let low_ram_end = machine.ram_size.min(layout::LOW_RAM_END);

    let loaded = kernel::load(mem, kernel, low_ram_end)?;
    write_cmdline(mem, kernel, cmdline, loaded.cmdline_max)?;
    let initramfs = initramfs
        .map(|path| initramfs::load(mem, path, loaded.end..low_ram_end.min(loaded.initrd_end_max)))
        .transpose()?;
    let rsdp = acpi::write_tables(mem, machine)?;
    reset_vector::write(mem)?;
    let map = memory_map::memory_map(machine.ram_size);

    match loaded.protocol {
        Protocol::Linux64 { rip, setup_header } => {
            zero_page::write(mem, &setup_header, initramfs, rsdp, &map)?;
            Ok(Entry::Linux64 { rip, boot_params: lowmem::ZERO_PAGE })
        }
        Protocol::Pvh { rip } => {
            pvh::write_start_info(mem, initramfs, rsdp, &map)?;
            Ok(Entry::Pvh { rip, start_info: lowmem::START_INFO })
        }
    }
}

/// Whether a file that a guest is to be made of is one and may be read, with the words that [`load`] would have. It is
/// not opened: that of a FIFO would wait.
pub(crate) fn look_at(path: &Path) -> Result<(), BootError> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let error = |source: std::io::Error| BootError::Open { path: path.into(), source };
    let metadata = path.metadata().map_err(error)?;
    accessat(CWD, path, Access::READ_OK, AtFlags::EACCESS).map_err(|e| error(e.into()))?;
    if metadata.is_file() { Ok(()) } else { Err(BootError::NotAFile { path: path.into() }) }
}

fn check(machine: &MachineShape) -> Result<(), BootError> {
    if !(1..=MAX_VCPUS).contains(&machine.vcpus) {
        return Err(BootError::Vcpus { vcpus: machine.vcpus });
    }
    if machine.ram_size < MIN_RAM {
        return Err(BootError::Ram { ram_size: machine.ram_size });
    }
    Ok(())
}

/// `max` is the longest command line the kernel takes, in bytes without the terminating NUL.
fn write_cmdline(mem: &GuestMemoryMmap, kernel: &Path, cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    let max = max.min(lowmem::CMDLINE_MAX);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { kernel: kernel.into(), len: cmdline.len(), max });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(mem, &bytes, lowmem::CMDLINE)
}

fn write(mem: &GuestMemoryMmap, bytes: &[u8], addr: u64) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(addr)).map_err(|source| BootError::GuestMemory { addr, source })
}
