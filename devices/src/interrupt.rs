//! What a device needs of the interrupt controller, so that devices can be tested without KVM.

use std::os::fd::BorrowedFd;

/// An edge on an IOAPIC pin.
pub trait IrqLine: Send + Sync {
    /// Raises and lowers the line once.
    fn pulse(&self);
}

/// How a guest's run ends from inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Asked for through a device register.
    PowerOff,
    /// Asked for through a device register, or by a triple fault.
    Reset,
    /// Not asked for: a vCPU cannot go on, for this reason.
    Failed(String),
}

/// Where such requests go. Called on a vCPU thread: must not block.
pub trait GuestRequests: Send + Sync {
    fn notify(&self, request: GuestRequest);
    /// Whether something was asked for that nobody has acted on. No vCPU goes on until somebody has.
    fn pending(&self) -> bool;
}

/// An MSI or MSI-X message: the address a device writes `data` to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// A request to the interrupt controller that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct MsiError {
    /// What was asked, with the GSI, and the remedy if there is one.
    pub what: String,
    pub source: std::io::Error,
}

/// Message signalled interrupts: GSIs, their routes and irqfds. Called on vCPU threads.
pub trait Msi: Send + Sync {
    /// `count` GSIs that nobody else has, not routed yet.
    fn allocate(&self, count: u32) -> Result<Vec<u32>, MsiError>;
    /// In a new image: takes GSIs that were allocated in the old one. Their messages are only noted: they take effect
    /// in the one KVM_SET_GSI_ROUTING call of the restore.
    fn adopt(&self, gsis: &[(u32, Option<MsiMessage>)]) -> Result<(), MsiError>;
    /// Gives GSIs back, and forgets their routes.
    fn free(&self, gsis: &[u32]);
    /// Routes `gsi` to `message`, at once.
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), MsiError>;
    /// KVM_IRQFD: from now on a signal of `eventfd` injects `gsi`. A count that is already in the eventfd is injected
    /// once, at this moment, provided that the GSI is routed.
    fn attach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), MsiError>;
    /// KVM_IRQFD with DEASSIGN: what was signalled before is injected and drained from the eventfd, what comes later
    /// stays in it.
    fn detach(&self, gsi: u32, eventfd: BorrowedFd<'_>) -> Result<(), MsiError>;
}

/// Memory that the guest reaches without an exit, beside its RAM: the BARs of passed-through devices.
pub trait Memslots: Send + Sync {
    /// Maps `size` bytes at `hva` into the guest at `gpa` (all multiples of the page size), and returns the slot's
    /// number.
    ///
    /// # Safety
    /// `hva..hva + size` must be mapped, and the guest may touch it, until the slot is removed.
    unsafe fn add(&self, gpa: u64, size: u64, hva: u64) -> std::io::Result<u32>;
    fn remove(&self, slot: u32) -> std::io::Result<()>;
}
