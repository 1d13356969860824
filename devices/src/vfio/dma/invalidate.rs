//! The step of an update that makes way for the next image's addresses, over all domains, with its undo.

use std::sync::Arc;

use super::{DmaDomain, DmaError};

/// All addresses of these domains are invalid; DMA goes on. Dropping it, which happens only when the update failed,
/// takes the old addresses back.
#[must_use = "dropping it takes the old addresses back"]
pub struct Invalidated(Vec<Arc<dyn DmaDomain>>);

/// The domain that refused. All domains are as they were before.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct InvalidateError {
    pub domain: String,
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
