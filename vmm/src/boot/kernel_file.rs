//! A kernel file, and the kernel that it becomes in guest memory: what the loaders of all formats share.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;

use super::BootError;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct LoadedKernel {
    pub protocol: Protocol,
    /// First address that the kernel needs neither for its image nor for unpacking itself.
    pub end: u64,
    /// Longest command line it takes, in bytes without the NUL.
    pub cmdline_max: usize,
    /// First address that its initramfs may not reach.
    pub initrd_end_max: u64,
}

#[derive(Debug)]
pub(super) enum Protocol {
    Linux64 { rip: u64, setup_header: Box<setup_header> },
    Pvh { rip: u64 },
}

/// An opened kernel file, whose length was taken once.
pub(super) struct KernelFile<'a> {
    pub path: &'a Path,
    pub file: File,
    pub len: u64,
}

impl KernelFile<'_> {
    pub(super) fn error(&self, reason: impl Into<String>) -> BootError {
        BootError::Kernel { path: self.path.into(), reason: reason.into() }
    }

    /// Bytes at `offset`, which must all be there.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
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
