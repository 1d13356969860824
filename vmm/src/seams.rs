//! Where tests reach into a VMM: an object that is made at its start and handed to whom it concerns. In the builds that
//! users have it does nothing; in a test build it is `test_hooks::Hooks`.

use std::ffi::OsString;
use std::sync::Arc;

use theseus_devices::vfio::DmaDomain;

/// What a test has asked for in place of success.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Injected(pub String);

/// Each of these does nothing, unless a test wants it to.
pub(crate) trait Seams: Send + Sync {
    /// `moment`: the end of a phase of an update, by its name, or one of those between.
    fn at(&self, _moment: &str) -> Result<(), Injected> {
        Ok(())
    }

    /// A saved state as it was written (`save`), or as it is going to be read (`claim`, `check-update`).
    fn state(&self, _moment: &str, _bytes: &mut Vec<u8>) {}

    /// The kinds and versions of sections that a target says it writes.
    fn writes(&self, _writes: &mut [(String, u16)]) {}

    /// The thread of a vCPU of a new VMM is about to create it, while the guest runs.
    fn prewarms_vcpu(&self) {}

    /// A vCPU is about to be restored.
    fn restores_vcpu(&self) {}

    /// A vCPU was saved. `refused`: what of that no KVM would take back.
    fn saved_vcpu(&self, _refused: &mut Vec<String>) {}

    /// What the steps of an update go over.
    fn dma_domains(&self, domains: Vec<Arc<dyn DmaDomain>>) -> Vec<Arc<dyn DmaDomain>> {
        domains
    }

    /// Whether a guest that goes on has its interrupts.
    fn attaches_irqfds(&self) -> bool {
        true
    }

    /// Whether a guest that is booted has the device of tests.
    #[cfg(feature = "test-hooks")]
    fn counting_device(&self) -> bool {
        false
    }

    /// For the environment of a child.
    fn environment(&self) -> Option<(OsString, OsString)> {
        None
    }

    /// For `features` of vmm.ping.
    fn features(&self) -> Vec<String> {
        Vec::new()
    }
}

struct Untouched;

impl Seams for Untouched {}

/// Nobody reaches in.
pub(crate) fn untouched() -> Arc<dyn Seams> {
    Arc::new(Untouched)
}
