//! What the devices of a guest reach by DMA: a domain of the host's IOMMU and the list of what is mapped in it.
//!
//! | file | what |
//! |---|---|
//! | here | [`DmaDomain`]: what all ways to such a domain have in common |
//! | [`map`] | what is mapped |
//! | [`type1`] | the first one: a VFIO container with the type1 IOMMU |
//! | [`invalidate`] | making way for the next VMM's addresses in all domains, with its undo, and what that does then |
//!
//! RAM reaches a domain as it reaches all others ([`MemoryListener`]); the BARs of devices come from the devices
//! (`vfio/bars.rs`).

use std::io;

use theseus_resources::StoredFd;
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::memory_listener::MemoryListener;

use super::saved::DomainHandles;

#[cfg(any(test, feature = "fakes"))]
pub(super) mod fake;
pub(super) mod invalidate;
pub(super) mod map;
pub(super) mod type1;

pub use map::{DmaMap, MapSource};

/// Why a domain cannot be made, changed or taken over.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// A new container cannot be had.
    #[error("cannot open /dev/vfio/vfio: {0} (is the module vfio loaded, and may this user open it?)")]
    Open(io::Error),
    /// VFIO_GET_API_VERSION says something else than VFIO_API_VERSION.
    #[error("container '{name}': the kernel speaks VFIO API {version}, not 0")]
    Api {
        /// The container's.
        name: String,
        /// The kernel's.
        version: u32,
    },
    /// A request to the kernel failed.
    #[error("{domain}: {what}: {source}{hint}")]
    Os {
        /// What it is and its name: "container 'default'".
        domain: String,
        /// What was asked.
        what: String,
        /// What the ioctl said.
        source: io::Error,
        /// The remedy, in brackets after a space; empty if none is known.
        hint: &'static str,
    },
    /// [`DmaDomain::remap`]: nothing in this process is what was mapped there.
    #[error("{domain}: no memory in this image for the DMA mapping {iova:#x}+{size:#x} ({source_of:?})")]
    NoMemory {
        /// As in [`DmaError::Os`].
        domain: String,
        /// Of [`DmaMap`].
        iova: u64,
        /// In bytes.
        size: u64,
        /// What was looked for.
        source_of: MapSource,
    },
    /// Its fd is not in the fd store, or is another one.
    #[error("{domain}: its saved state is wrong: {source}")]
    FdStore {
        /// As in [`DmaError::Os`].
        domain: String,
        /// What the fd store said.
        source: FdStoreError,
    },
}

/// A DMA domain. Dropping it only closes fds: a device that the next VMM has adopted goes on.
///
/// An update, in the order of [`invalidate::invalidate_all`] and of the registry:
///
/// ```text
///   old VMM    save        what is mapped, and what the next VMM finds it by
///              invalidate  its addresses are nobody's; what is mapped goes on
///   new VMM    remap       they are this process's
///   or old     take_back   they are this process's again
/// ```
pub trait DmaDomain: MemoryListener {
    /// By which devices, saved states and messages call it. No two of a guest have one name.
    fn name(&self) -> &str;

    /// What a group or device is attached to.
    fn fd(&self) -> &StoredFd;

    /// What is mapped now.
    fn maps(&self) -> Vec<DmaMap>;

    /// Whether memory of devices can be mapped: where not, no device reaches another one's BARs.
    fn maps_device_memory(&self) -> bool;

    /// Whether all its devices always see what CPUs have in their caches, whatever they ask for. Where not, KVM follows
    /// the guest's own memory types.
    fn is_coherent(&self) -> bool;

    /// Lets the devices reach `size` bytes of a BAR at `vaddr` under `iova`. Refused where
    /// [`DmaDomain::maps_device_memory`] is false.
    ///
    /// # Errors
    /// The range overlaps a mapping, or there are too many: nothing is mapped.
    ///
    /// # Safety
    /// `vaddr..vaddr + size` must be what `source` says, and stay so until it is unmapped.
    unsafe fn map_device_memory(&self, iova: u64, size: u64, vaddr: u64, source: MapSource) -> Result<(), DmaError>;

    /// Takes the mapping that starts at `iova` away; none is no error.
    ///
    /// # Errors
    /// The devices reach it still; a later try may succeed.
    fn unmap(&self, iova: u64) -> Result<(), DmaError>;

    /// Why it could not go over in an update, each with its remedy; empty if it could.
    fn blockers(&self) -> Vec<String>;

    /// All its addresses or, on an error, none: a later call may succeed.
    fn invalidate(&self) -> Result<(), DmaError>;

    /// Undoes [`DmaDomain::invalidate`], after an update that did not happen, whatever the next VMM has got to. Goes on
    /// after a failure: what cannot be taken back keeps its DMA, and is logged.
    fn take_back(&self);

    /// Gives every mapping its address in this process, in a new VMM. Stops at the first failure; it may be called
    /// again.
    ///
    /// # Safety
    /// `vaddr_of` must answer with an address where this process has the very pages the mapping was made for.
    unsafe fn remap(&self, vaddr_of: &dyn Fn(&DmaMap) -> Option<u64>) -> Result<(), DmaError>;

    /// What is mapped, and what the next VMM finds it by. Pure.
    fn save(&self) -> DomainHandles;

    /// Takes later handles of the same domain. False: they are of another one.
    fn mend(&self, later: DomainHandles) -> bool;
}

#[cfg(test)]
pub(super) mod tests;
