//! The start info of the PVH protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::initramfs::Initramfs;
use super::memory_map::MemoryRange;
use super::{BootError, lowmem};

/// The version with a memory map.
const VERSION: u32 = 1;
const MEMORY_MAP_MAX: usize =
    (lowmem::ZERO_PAGE - lowmem::PVH_MEMORY_MAP) as usize / size_of::<hvm_memmap_table_entry>();

pub(super) fn write_start_info(
    mem: &GuestMemoryMmap,
    initramfs: Option<Initramfs>,
    rsdp: u64,
    map: &[MemoryRange],
) -> Result<(), BootError> {
    if map.len() > MEMORY_MAP_MAX {
        return Err(BootError::Describe { what: "so many memory ranges" });
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        cmdline_paddr: lowmem::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: lowmem::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(Initramfs { addr, size }) = initramfs {
        let module = hvm_modlist_entry { paddr: addr.into(), size: size.into(), ..Default::default() };
        super::write(mem, module.as_slice(), lowmem::MODULES)?;
        info.nr_modules = 1;
        info.modlist_paddr = lowmem::MODULES;
    }

    let mut table = Vec::new();
    for range in map {
        let entry = hvm_memmap_table_entry {
            addr: range.addr,
            size: range.size,
            type_: range.kind as u32,
            ..Default::default()
        };
        table.extend_from_slice(entry.as_slice());
    }
    super::write(mem, &table, lowmem::PVH_MEMORY_MAP)?;
    super::write(mem, info.as_slice(), lowmem::START_INFO)
}
