//! ELF kernels, entered by the PVH protocol.
//!
//! Not `linux_loader`'s: that one accepts 32-bit files, lets a second PT_NOTE hide the first, does not clear the BSS,
//! and would let a segment lie over the structures of the boot.

use std::io::{Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel_file::{KernelFile, LoadedKernel, Protocol};
use super::{BootError, lowmem};

const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_X86_64: u16 = 62;
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Xen's public/elfnote.h: the physical address of the 32-bit entry.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// A note segment of a kernel has some hundred bytes.
const NOTES_MAX: u64 = 1 << 20;

/// COMMAND_LINE_SIZE of x86 Linux, without the NUL: PVH has no field that says it.
const CMDLINE_MAX: usize = 2047;
/// The highest address Linux maps early enough whatever its version; bzImage headers say the same.
const INITRD_END_MAX: u64 = 0x8000_0000;

const DAMAGED: &str = "the file is damaged, copy it again";

struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
}

struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    descriptor: &'a [u8],
}

pub fn load(mem: &GuestMemoryMmap, kernel: &mut KernelFile, low_ram_end: u64) -> Result<LoadedKernel, BootError> {
    let segments = read_segments(kernel)?;
    let mut rip = None;
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        rip = rip.or(pvh_entry(kernel, segment)?);
    }
    let rip = rip.ok_or_else(|| {
        kernel.error(
            "is an ELF file without a PVH entry note; boot the vmlinuz (bzImage) of the same kernel, or build it with CONFIG_PVH=y",
        )
    })?;

    let mut end = lowmem::HIGH_MEMORY;
    let mut entry_loaded = false;
    for segment in segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.mem_size > 0) {
        let range = load_segment(mem, kernel, segment, low_ram_end)?;
        entry_loaded |= range.contains(&rip);
        end = end.max(range.end);
    }
    if !entry_loaded {
        return Err(kernel.error(format!("has its PVH entry {rip:#x} in no loaded segment; {DAMAGED}")));
    }
    Ok(LoadedKernel { protocol: Protocol::Pvh { rip }, end, cmdline_max: CMDLINE_MAX, initrd_end_max: INITRD_END_MAX })
}

fn read_segments(kernel: &KernelFile) -> Result<Vec<Segment>, BootError> {
    let mut ehdr = [0; EHDR_SIZE];
    kernel.read_at(0, &mut ehdr)?;
    if ehdr[4] != ELFCLASS64 || ehdr[5] != ELFDATA2LSB || u16_at(&ehdr, 18) != Some(EM_X86_64) {
        return Err(kernel.error("is an ELF file for another machine; give a 64-bit x86 vmlinux"));
    }
    let (Some(table), Some(entry_size), Some(count)) = (u64_at(&ehdr, 32), u16_at(&ehdr, 54), u16_at(&ehdr, 56)) else {
        return Err(kernel.error(format!("has a short ELF header; {DAMAGED}")));
    };
    if usize::from(entry_size) != PHDR_SIZE || count == 0 {
        return Err(kernel.error("has no program headers; give the linked vmlinux, not an object file"));
    }
    let mut table_bytes = vec![0; usize::from(count) * PHDR_SIZE];
    kernel.read_at(table, &mut table_bytes)?;
    table_bytes
        .chunks_exact(PHDR_SIZE)
        .map(|phdr| {
            Some(Segment {
                kind: u32_at(phdr, 0)?,
                offset: u64_at(phdr, 8)?,
                paddr: u64_at(phdr, 24)?,
                file_size: u64_at(phdr, 32)?,
                mem_size: u64_at(phdr, 40)?,
            })
        })
        .collect::<Option<_>>()
        .ok_or_else(|| kernel.error(format!("has short program headers; {DAMAGED}")))
}

fn load_segment(
    mem: &GuestMemoryMmap,
    kernel: &mut KernelFile,
    segment: &Segment,
    low_ram_end: u64,
) -> Result<Range<u64>, BootError> {
    let Segment { offset, paddr, file_size, mem_size, .. } = *segment;
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

/// The PVH entry, if it is among the notes of `segment`.
fn pvh_entry(kernel: &KernelFile, segment: &Segment) -> Result<Option<u64>, BootError> {
    if segment.file_size > NOTES_MAX {
        return Err(kernel.error(format!("has {} bytes of notes; {DAMAGED}", segment.file_size)));
    }
    let mut notes = vec![0; segment.file_size as usize];
    kernel.read_at(segment.offset, &mut notes)?;

    let mut rest = notes.as_slice();
    while let Some((note, next)) = split_note(rest) {
        if note.kind == XEN_ELFNOTE_PHYS32_ENTRY && note.name == b"Xen\0" {
            // 4 or 8 bytes, by the kernel's version.
            let entry = u64_at(note.descriptor, 0).or_else(|| u32_at(note.descriptor, 0).map(u64::from));
            return match entry {
                Some(entry) if u32::try_from(entry).is_ok() => Ok(Some(entry)),
                _ => Err(kernel.error(format!("has a PVH note without a 32-bit address; {DAMAGED}"))),
            };
        }
        rest = next;
    }
    Ok(None)
}

/// The first note, and what follows it. Name and descriptor are padded to 4 bytes, the last perhaps not.
fn split_note(notes: &[u8]) -> Option<(Note<'_>, &[u8])> {
    let (name_size, size, kind) = (u32_at(notes, 0)? as usize, u32_at(notes, 4)? as usize, u32_at(notes, 8)?);
    let after_header = notes.get(12..)?;
    let name = after_header.get(..name_size)?;
    let after_name = after_header.get(name_size.checked_next_multiple_of(4)?..)?;
    let descriptor = after_name.get(..size)?;
    let rest = after_name.get(size.checked_next_multiple_of(4)?..).unwrap_or_default();
    Some((Note { name, kind, descriptor }, rest))
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes_at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes_at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes_at(bytes, offset).map(u64::from_le_bytes)
}
