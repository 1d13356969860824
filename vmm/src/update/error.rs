//! Why an update ends before its commit.

use std::time::Duration;

use theseus_api::server::FreezeError;
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::state::StateError;

use super::target::Unfit;
use super::transport::TransportError;
use crate::keeper::KeeperError;
use crate::machine::MachineError;
use crate::timeline::{NotPassed, Phase};
use crate::vcpus::VcpuError;

/// In the words that a caller reads; the guest goes on as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpdateError {
    /// A deadline that was missed is [`NotPassed::Late`].
    #[error(transparent)]
    NotPassed(#[from] NotPassed),
    #[error("the guest has just asked for power-off or reset")]
    GuestAsked,
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
    #[error(transparent)]
    Api(#[from] FreezeError),
    #[error("{what}: {source}")]
    Os { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("no room for the state: {source}: {remedy}")]
    Memory { source: std::io::Error, remedy: &'static str },
    /// What the new VMM said before it gave up.
    #[error("{0}")]
    GaveUp(String),
    #[error("its process died or was killed (why is in the kernel's log, and in this VMM's)")]
    Died,
    #[error("it was not ready within {0:?} and was killed")]
    NotReady(Duration),
    #[error("it did not get on within {0:?} (deadline_ms) and was killed")]
    Stuck(Duration),
    /// The keeper has not become the new image, or not all of it.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The target's file is not what was checked any more.
    #[error(transparent)]
    Target(#[from] Unfit),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A thread of this VMM.
    #[error("{0}")]
    Panic(String),
}

impl UpdateError {
    pub(crate) fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Os { what, source }
    }
}

/// An update that was undone, and in which phase it was.
#[derive(Debug, thiserror::Error)]
#[error("phase {}: {source}", phase.name())]
pub(crate) struct Undone {
    pub phase: Phase,
    pub source: UpdateError,
}
