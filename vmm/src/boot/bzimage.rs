//! bzImage, entered by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::kernel_file::{KernelFile, LoadedKernel, Protocol};
use super::{BootError, lowmem};

const HEADER_START: usize = 0x1F1;
/// End of the setup header as protocol 2.15 defines it.
pub(super) const HEADER_END: usize = HEADER_START + size_of::<setup_header>();
const MAGIC_OFFSET: usize = 0x202;

/// The first protocol with `xloadflags`, which says that there is a 64-bit entry.
const PROTOCOL_MIN: u16 = 0x020C;
/// The protocol that added `kernel_info_offset`, the header's last field.
const PROTOCOL_KERNEL_INFO: u16 = 0x020F;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
/// The 64-bit entry lies this far into the loaded image.
const ENTRY64_OFFSET: u64 = 0x200;

pub(super) fn matches(start: &[u8]) -> bool {
    start.get(MAGIC_OFFSET..).is_some_and(|magic| magic.starts_with(b"HdrS"))
}

pub(super) fn load(
    mem: &GuestMemoryMmap,
    kernel: &mut KernelFile,
    low_ram_end: u64,
) -> Result<LoadedKernel, BootError> {
    let mut header = setup_header::default();
    kernel.read_at(HEADER_START as u64, header.as_mut_slice())?;
    check_header(kernel, &header)?;

    // boot.rst, "Loading The Rest of The Kernel": 0 stands for 4 sectors, and one boot sector comes before them.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let load_address = lowmem::HIGH_MEMORY;
    let image_size = kernel.len.saturating_sub((setup_sectors + 1) * 512);
    if image_size <= ENTRY64_OFFSET {
        return Err(kernel.error("has no kernel behind its setup code; the file is truncated, copy it again"));
    }
    let end = runtime_end(&header, load_address, image_size)
        .ok_or_else(|| kernel.error("has a setup header with impossible addresses; copy the file again"))?;
    if end > low_ram_end {
        let needed = end.div_ceil(1 << 20);
        return Err(kernel.error(format!("needs RAM up to {needed} MiB to unpack itself; give the guest more memory")));
    }

    let loaded = BzImage::load(mem, Some(GuestAddress(load_address)), &mut kernel.file, None)
        .map_err(|error| kernel.error(format!("cannot be loaded: {error}; check the file and its file system")))?;
    header.code32_start = load_address as u32;
    if header.version < PROTOCOL_KERNEL_INFO {
        header.kernel_info_offset = 0;
    }

    Ok(LoadedKernel {
        end: end.max(loaded.kernel_end),
        cmdline_max: header.cmdline_size as usize,
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        protocol: Protocol::Linux64 { rip: load_address + ENTRY64_OFFSET, setup_header: Box::new(header) },
    })
}

fn check_header(kernel: &KernelFile, header: &setup_header) -> Result<(), BootError> {
    let (version, loadflags, xloadflags) = (header.version, header.loadflags, header.xloadflags);
    if version < PROTOCOL_MIN {
        return Err(kernel.error(format!(
            "speaks boot protocol {}.{:02}, 2.12 is needed; use Linux 3.8 or later",
            version >> 8,
            version & 0xFF
        )));
    }
    if loadflags & LOADED_HIGH == 0 {
        return Err(kernel.error("is a zImage, which loads below 1 MiB; use a bzImage"));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(kernel.error("is a 32-bit kernel; use an x86-64 one"));
    }
    Ok(())
}

/// End of the memory that the image and, once it has moved to where it runs, the kernel use before reading the memory
/// map (boot.rst, `init_size`).
fn runtime_end(header: &setup_header, load_address: u64, image_size: u64) -> Option<u64> {
    let preferred = header.pref_address;
    let runtime_start = if header.relocatable_kernel != 0 {
        load_address.checked_next_multiple_of(u64::from(header.kernel_alignment))?.max(preferred)
    } else {
        preferred
    };
    let loaded_end = load_address.checked_add(image_size)?;
    Some(runtime_start.checked_add(u64::from(header.init_size))?.max(loaded_end))
}
