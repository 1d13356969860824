//! What interrupts ask of KVM.

use std::os::fd::BorrowedFd;

/// An MSI or MSI-X message: the address a device writes `data` to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Names the target LAPIC: 0xFEE..... (Intel SDM volume 3, "Message Address Register Format").
    pub address: u64,
    /// Vector and delivery mode ("Message Data Register Format" there).
    pub data: u32,
}

/// A request to the interrupt controller that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct InterruptError {
    /// What was asked, with the GSI, and the remedy if there is one.
    pub what: String,
    /// The errno of KVM's answer, where the request got so far.
    pub source: std::io::Error,
}

impl InterruptError {
    /// Whether KVM takes what was asked for nonsense, which another try does not change.
    pub(super) fn is_invalid(&self) -> bool {
        self.source.raw_os_error() == Some(libc::EINVAL)
    }
}

/// GSIs, their routes and irqfds. Called on vCPU threads.
pub trait InterruptController: Send + Sync {
    /// `count` GSIs that nobody else has, not routed yet.
    ///
    /// # Errors
    /// There are not so many left; none is taken then.
    fn allocate(&self, count: u32) -> Result<Vec<u32>, InterruptError>;
    /// In a new VMM: takes GSIs that were allocated in the old one, all or none.
    ///
    /// # Errors
    /// One of them is somebody's already, or cannot be a message's.
    fn adopt(&self, gsis: &[u32]) -> Result<(), InterruptError>;
    /// In a new VMM: only notes what GSIs that were adopted are routed to, for the one KVM_SET_GSI_ROUTING call of the
    /// restore.
    fn note(&self, routes: &[(u32, Option<MsiMessage>)]);
    /// Gives GSIs back, and forgets their routes.
    fn free(&self, gsis: &[u32]);
    /// Routes all of them at once, or none.
    ///
    /// # Errors
    /// KVM_SET_GSI_ROUTING failed: EINVAL if one of the messages makes no sense. All routes are as before.
    fn route(&self, routes: &[(u32, MsiMessage)]) -> Result<(), InterruptError>;
    /// KVM_IRQFD: from now on a signal of `eventfd` injects `gsi`. A count that is already in the eventfd is injected
    /// once, at this moment, provided that the GSI is routed. With `resample` the GSI is a pin whose level is raised,
    /// and stays so until the guest's EOI, which lowers it and signals `resample`.
    ///
    /// # Errors
    /// It is not attached: what is signalled stays in `eventfd`.
    fn attach(&self, gsi: u32, eventfd: BorrowedFd<'_>, resample: Option<BorrowedFd<'_>>)
    -> Result<(), InterruptError>;
    /// KVM_IRQFD with DEASSIGN: what was signalled before is injected and drained from the eventfd, what comes later
    /// stays in it. A pin's level falls with the last of its irqfds (irqfd_resampler_shutdown).
    ///
    /// # Errors
    /// It is attached still, and injects.
    fn detach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), InterruptError>;
}
