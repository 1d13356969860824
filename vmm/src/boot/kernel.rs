//! Loads a kernel file: tells its format and hands it to the loader of that format.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestMemoryMmap;

use super::{BootError, bzimage, elf};

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    pub protocol: Protocol,
    /// First address that the kernel needs neither for its image nor for unpacking itself.
    pub end: u64,
    /// Longest command line it takes, in bytes without the NUL.
    pub cmdline_max: usize,
    /// First address that its initramfs may not reach.
    pub initrd_end_max: u64,
}

#[derive(Debug)]
pub enum Protocol {
    Linux64 { rip: u64, setup_header: Box<setup_header> },
    Pvh { rip: u64 },
}

/// An opened kernel file, whose length was taken once.
pub struct KernelFile<'a> {
    pub path: &'a Path,
    pub file: File,
    pub len: u64,
}

impl KernelFile<'_> {
    pub fn error(&self, reason: impl Into<String>) -> BootError {
        BootError::Kernel { path: self.path.into(), reason: reason.into() }
    }

    /// Bytes at `offset`, which must all be there.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len) {
            let len = buffer.len();
            return Err(
                self.error(format!("ends before the {len} bytes at {offset:#x}; it is truncated, copy it again"))
            );
        }
        let read_error = |source| BootError::Read { path: self.path.into(), source };
        self.file.read_exact_at(buffer, offset).map_err(read_error)
    }
}

/// Loads `path` into guest memory between 1 MiB and `low_ram_end`.
pub fn load(mem: &GuestMemoryMmap, path: &Path, low_ram_end: u64) -> Result<LoadedKernel, BootError> {
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
        "is an EFI program without an x86 Linux header; give an x86-64 vmlinuz (a unified kernel image holds one in its .linux section)"
    } else {
        "is neither a bzImage nor an ELF file; give an x86-64 vmlinuz, or a vmlinux built with CONFIG_PVH=y"
    }
}
