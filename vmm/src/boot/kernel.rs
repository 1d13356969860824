//! Loads a kernel file: tells its format and hands it to the loader of that format.

use std::path::Path;

use vm_memory::GuestMemoryMmap;

use super::kernel_file::{KernelFile, LoadedKernel};
use super::{BootError, bzimage, elf};

/// Loads `path` into guest memory between 1 MiB and `low_ram_end`.
pub(super) fn load(mem: &GuestMemoryMmap, path: &Path, low_ram_end: u64) -> Result<LoadedKernel, BootError> {
    let Some((file, metadata)) = super::file::open(path)? else {
        return Err(BootError::NotAFile { path: path.into() });
    };
    let mut kernel = KernelFile { path, file, len: metadata.len() };

    let mut start = vec![0; bzimage::HEADER_END.min(usize::try_from(kernel.len).unwrap_or(usize::MAX))];
    kernel.read_at(0, &mut start)?;
    if start.starts_with(b"\x7fELF") {
        elf::load(mem, &mut kernel, low_ram_end)
    } else if bzimage::matches(&start) {
        bzimage::load(mem, &mut kernel, low_ram_end)
    } else {
        Err(kernel.error(unknown_format(&start)))
    }
}

fn unknown_format(start: &[u8]) -> &'static str {
    const COMPRESSED: [&[u8]; 5] = [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\x02\x21\x4c\x18"];
    if COMPRESSED.iter().any(|magic| start.starts_with(magic)) {
        "is compressed as a whole; unpack it first (gzip -d, zstd -d, xz -d)"
    } else if start.starts_with(b"MZ") {
        "is an EFI program without an x86 Linux header; give an x86-64 vmlinuz (a unified kernel image holds one in \
         its .linux section)"
    } else {
        "is neither a bzImage nor an ELF file; give an x86-64 vmlinuz, or a vmlinux built with CONFIG_PVH=y"
    }
}
