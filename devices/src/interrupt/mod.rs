//! Interrupts as objects, and what they need of KVM, said so that devices can be tested without it.
//!
//! ```text
//! device -> eventfd -> irqfd -> GSI -> message -> guest            Route, many of them: Vectors (MSI-X, MSI)
//! device -> eventfd -> irqfd -> IOAPIC pin -> guest -> EOI -> eventfd -> device      LevelLine (INTx)
//! guest's write -> ioeventfd -> eventfd -> device                  IoEvent (a queue's notify register)
//! ```
//!
//! Each owns its eventfds, its GSI and what KVM does with them, and knows both what is wanted and what KVM has. What
//! KVM refuses is never forgotten: `settle` tries again. An object comes up detached in a new VMM, is detached while
//! the guest stands still, and cannot be dropped attached.
//!
//! | file | what |
//! |---|---|
//! | [`controller`] | what all of them ask of KVM |
//! | [`route`] | [`route::Route`]: one message signalled interrupt |
//! | [`vectors`] | [`Vectors`]: those of a device, changed together |
//! | [`level`] | [`LevelLine`]: a level on an IOAPIC pin |
//! | [`ioevent`] | [`IoEvent`]: the other way |
//! | [`saved`] | all of these in the saved state |

mod controller;
#[cfg(any(test, feature = "fakes"))]
pub mod fake;
mod ioevent;
mod level;
mod route;
mod saved;
mod vectors;

pub use controller::{InterruptController, InterruptError, MsiMessage};
pub use ioevent::{IoAddress, IoEvent, IoEvents};
pub use level::LevelLine;
pub(crate) use saved::RouteHandles;
pub use saved::{LevelLineHandles, LevelLineState};
pub use vectors::VectorError;
pub(crate) use vectors::Vectors;

/// An edge-triggered IOAPIC pin.
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
    /// Takes a request for another thread to act on. One that is pending already stays, and this one is dropped.
    fn notify(&self, request: GuestRequest);
    /// Whether something was asked for that nobody has acted on. No vCPU goes on until somebody has.
    fn pending(&self) -> bool;
}
