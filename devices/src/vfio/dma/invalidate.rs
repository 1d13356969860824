//! The steps of an update over all domains: one that makes way for the next image's addresses, with its undo, and the
//! other in the next image.

use std::sync::Arc;

use theseus_resources::memory_listener::RamBlock;

use super::{DmaDomain, DmaError, DmaMap, MapSource};

/// All addresses of these domains are invalid; DMA goes on. Dropping it, which happens only when the update failed,
/// takes the old addresses back.
#[must_use = "dropping it takes the old addresses back"]
pub struct Invalidated(Vec<Arc<dyn DmaDomain>>);

/// The domain that refused. All domains are as they were before.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct InvalidateError {
    /// Its [`DmaDomain::name`].
    pub domain: String,
    /// What it said.
    pub reason: DmaError,
}

/// Invalidates the addresses of every domain, or of none.
pub fn invalidate_all(domains: &[Arc<dyn DmaDomain>]) -> Result<Invalidated, InvalidateError> {
    let mut done = Invalidated(Vec::with_capacity(domains.len()));
    for domain in domains {
        domain.invalidate().map_err(|reason| InvalidateError { domain: domain.name().to_owned(), reason })?;
        done.0.push(domain.clone());
    }
    Ok(done)
}

impl Drop for Invalidated {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|domain| domain.take_back());
    }
}

/// In a new image: gives every mapping of every domain its address here.
/// `bar_vaddr(device, region, offset, size)` is `VfioPci::bar_vaddr` of the device with that id. May be called again
/// after a failure.
///
/// # Safety
/// `ram` must be mapped from the same memory as in the image that mapped it first, at the same guest addresses, and
/// what `bar_vaddr` finds from the same device fds.
pub unsafe fn remap_all(
    domains: &[Arc<dyn DmaDomain>],
    ram: &[RamBlock],
    bar_vaddr: impl Fn(&str, u32, u64, u64) -> Option<u64>,
) -> Result<(), DmaError> {
    let vaddr_of = |map: &DmaMap| match &map.source {
        MapSource::Ram => ram.iter().find_map(|block| block.hva_of(map.iova, map.size)),
        MapSource::Bar { device, region, offset } => bar_vaddr(device, *region, *offset, map.size),
    };
    // SAFETY: the caller's promise.
    domains.iter().try_for_each(|domain| unsafe { domain.remap(&vaddr_of) })
}
