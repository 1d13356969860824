//! The zero page (`struct boot_params`) of the Linux boot protocol (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::initramfs::Initramfs;
use super::memory_map::MemoryRange;
use super::{BootError, lowmem};

/// `type_of_loader` of a loader without an assigned id.
const LOADER_UNDEFINED: u8 = 0xFF;

pub(super) fn write(
    mem: &GuestMemoryMmap,
    setup_header: &setup_header,
    initramfs: Option<Initramfs>,
    rsdp: u64,
    map: &[MemoryRange],
) -> Result<(), BootError> {
    // Everything else is zero, `sentinel` above all: otherwise the kernel distrusts the rest (sanitize_boot_params).
    let mut params = boot_params { hdr: *setup_header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = lowmem::CMDLINE as u32;
    if let Some(Initramfs { addr, size }) = initramfs {
        params.hdr.ramdisk_image = addr;
        params.hdr.ramdisk_size = size;
    }

    let mut table = params.e820_table;
    if map.len() > table.len() {
        return Err(BootError::Describe { what: "so many memory ranges" });
    }
    for (entry, range) in table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.addr, size: range.size, r#type: range.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    super::write(mem, params.as_slice(), lowmem::ZERO_PAGE)
}
