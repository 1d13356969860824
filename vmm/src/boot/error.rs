//! Why a guest could not be prepared for its boot.

use std::path::PathBuf;

use super::{MAX_VCPUS, MIN_RAM};

#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("cannot open {}: {source}; give a file that exists and that the VMM may read", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("cannot read {}: {source}; check the file and its file system", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: is not a regular file; give the kernel's or initramfs' own", path.display())]
    NotAFile { path: PathBuf },
    /// `reason` says what is wrong and what to do.
    #[error("kernel {}: {reason}", path.display())]
    Kernel { path: PathBuf, reason: String },
    /// `reason` says what is wrong and what to do.
    #[error("initramfs {}: {reason}", path.display())]
    Initramfs { path: PathBuf, reason: String },
    #[error("the kernel command line has {len} bytes but {} takes at most {max}: shorten it", kernel.display())]
    CmdlineTooLong { kernel: PathBuf, len: usize, max: usize },
    #[error("the kernel command line has a NUL byte: remove it")]
    CmdlineNul,
    #[error("{vcpus} vCPUs: a guest has 1 to {max}", max = MAX_VCPUS)]
    Vcpus { vcpus: u32 },
    #[error("{ram_size} bytes of RAM: a guest needs at least {min}", min = MIN_RAM)]
    Ram { ram_size: u64 },
    #[error("the ACPI tables need {needed} bytes, {available} are reserved for them: use fewer vCPUs")]
    AcpiSpace { needed: usize, available: usize },
    #[error("the tables of the machine cannot describe {what}: choose another size of RAM")]
    Describe { what: &'static str },
    #[error("cannot write guest memory at {addr:#x}: {source}; guest memory must begin at 0 and match the size of RAM")]
    GuestMemory { addr: u64, source: vm_memory::GuestMemoryError },
}
