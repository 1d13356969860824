//! ELF kernels, entered by the PVH protocol.
//!
//! Not `linux_loader`'s: that one accepts 32-bit files, lets a second PT_NOTE hide the first, does not clear the BSS,
//! and would let a segment lie over the structures of the boot.

use std::io::{Seek, SeekFrom};
use std::ops::Range;

use object::elf::PT_LOAD;
use object::read::elf::ProgramHeader;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel_file::{KernelFile, LoadedKernel, Protocol};
use super::{BootError, lowmem};
use crate::elf::{Elf, ElfError, Segment};

const EHDR_SIZE: usize = 64;
/// Xen's public/elfnote.h: the physical address of the 32-bit entry.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// COMMAND_LINE_SIZE of x86 Linux, without the NUL: PVH has no field that says it.
const CMDLINE_MAX: usize = 2047;
/// The highest address Linux maps early enough whatever its version; bzImage headers say the same.
const INITRD_END_MAX: u64 = 0x8000_0000;

const DAMAGED: &str = "the file is damaged, copy it again";

/// Where a segment goes.
struct Load {
    offset: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
}

pub(super) fn load(
    mem: &GuestMemoryMmap,
    kernel: &mut KernelFile,
    low_ram_end: u64,
) -> Result<LoadedKernel, BootError> {
    let (loads, rip) = read(kernel)?;
    let rip = rip.ok_or_else(|| {
        kernel.error(
            "is an ELF file without a PVH entry note; boot the vmlinuz (bzImage) of the same kernel, or build it with \
             CONFIG_PVH=y",
        )
    })?;

    let mut end = lowmem::HIGH_MEMORY;
    let mut entry_loaded = false;
    for load in loads.iter().filter(|load| load.mem_size > 0) {
        let range = load_segment(mem, kernel, load, low_ram_end)?;
        entry_loaded |= range.contains(&rip);
        end = end.max(range.end);
    }
    if !entry_loaded {
        return Err(kernel.error(format!("has its PVH entry {rip:#x} in no loaded segment; {DAMAGED}")));
    }
    Ok(LoadedKernel { protocol: Protocol::Pvh { rip }, end, cmdline_max: CMDLINE_MAX, initrd_end_max: INITRD_END_MAX })
}

/// What is to be loaded, and the PVH entry, if there is one.
fn read(kernel: &KernelFile) -> Result<(Vec<Load>, Option<u64>), BootError> {
    // One that is not even that long is truncated.
    kernel.read_at(0, &mut [0; EHDR_SIZE])?;
    let elf = Elf::open(&kernel.file).map_err(|error| not_loaded(kernel, error))?;
    let segments = elf.segments().map_err(|error| not_loaded(kernel, error))?;
    if segments.is_empty() {
        return Err(kernel.error("has no program headers; give the linked vmlinux, not an object file"));
    }
    let mut rip = None;
    for segment in segments {
        rip = rip.or(pvh_entry(kernel, &elf, segment)?);
    }
    let loads = segments.iter().filter(|segment| segment.p_type(elf.endian) == PT_LOAD).map(|segment| Load {
        offset: segment.p_offset(elf.endian),
        paddr: segment.p_paddr(elf.endian),
        file_size: segment.p_filesz(elf.endian),
        mem_size: segment.p_memsz(elf.endian),
    });
    Ok((loads.collect(), rip))
}

fn not_loaded(kernel: &KernelFile, error: ElfError) -> BootError {
    match error {
        ElfError::NotElf | ElfError::OtherMachine(_) => {
            kernel.error("is an ELF file for another machine; give a 64-bit x86 vmlinux")
        }
        ElfError::Os(source) => BootError::Read { path: kernel.path.into(), source },
        other => kernel.error(format!("is a {other}; it is truncated or changed, copy it again")),
    }
}

fn load_segment(
    mem: &GuestMemoryMmap,
    kernel: &mut KernelFile,
    load: &Load,
    low_ram_end: u64,
) -> Result<Range<u64>, BootError> {
    let Load { offset, paddr, file_size, mem_size } = *load;
    let in_file = offset.checked_add(file_size).is_some_and(|end| end <= kernel.len);
    let (Some(end), true, true) = (paddr.checked_add(mem_size), in_file, file_size <= mem_size) else {
        return Err(
            kernel.error(format!("has a segment at {paddr:#x} that is larger than the file or memory; {DAMAGED}"))
        );
    };
    if paddr < lowmem::HIGH_MEMORY {
        return Err(
            kernel.error(format!("has a segment at {paddr:#x}; a kernel must be linked to load at 1 MiB or above"))
        );
    }
    if end > low_ram_end {
        let needed = end.div_ceil(1 << 20);
        return Err(kernel.error(format!("needs RAM up to {needed} MiB; give the guest more memory")));
    }

    // Both sizes are below low_ram_end now, so they fit in usize.
    let read_error = |source| BootError::Read { path: kernel.path.into(), source };
    kernel.file.seek(SeekFrom::Start(offset)).map_err(read_error)?;
    mem.read_exact_volatile_from(GuestAddress(paddr), &mut kernel.file, file_size as usize)
        .map_err(|error| read_error(std::io::Error::other(error)))?;
    // A piece at a time: how long a BSS is the file says.
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = paddr + file_size;
    while at < end {
        let piece = (end - at).min(ZEROS.len() as u64);
        super::write(mem, &ZEROS[..piece as usize], at)?;
        at += piece;
    }
    Ok(paddr..end)
}

/// The PVH entry, if it is among the notes of `segment`. What follows a note that is damaged is not looked at.
fn pvh_entry(kernel: &KernelFile, elf: &Elf<'_>, segment: &Segment) -> Result<Option<u64>, BootError> {
    let Some(mut notes) = elf.notes(segment).map_err(|error| not_loaded(kernel, error))? else { return Ok(None) };
    while let Ok(Some(note)) = notes.next() {
        if note.n_type(elf.endian) == XEN_ELFNOTE_PHYS32_ENTRY && note.name() == b"Xen" {
            // 4 or 8 bytes, by the kernel's version.
            let entry = match note.desc() {
                [a, b, c, d, 0, 0, 0, 0, ..] | [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
                _ => return Err(kernel.error(format!("has a PVH note without a 32-bit address; {DAMAGED}"))),
            };
            return Ok(Some(entry.into()));
        }
    }
    Ok(None)
}
