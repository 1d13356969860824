//! Interrupts in the saved state.

use serde::{Deserialize, Serialize};
use theseus_resources::Slot;

use super::controller::MsiMessage;

/// [`MsiMessage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MessageState {
    address: u64,
    data: u32,
}

impl From<MsiMessage> for MessageState {
    fn from(message: MsiMessage) -> Self {
        let MsiMessage { address, data } = message;
        Self { address, data }
    }
}

impl From<MessageState> for MsiMessage {
    fn from(state: MessageState) -> Self {
        let MessageState { address, data } = state;
        Self { address, data }
    }
}

/// Handles of [`super::route::Route`]: all of it. What the guest wants of an interrupt is in the state of its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RouteHandles {
    /// What the device signals; an event that waits is in it.
    pub(super) eventfd: Slot,
    /// The new VMM has the same.
    pub(super) gsi: u32,
    /// What KVM had it routed to.
    pub(super) routed: Option<MessageState>,
}

/// What the guest sees of a [`super::LevelLine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelLineState {
    /// Of the IOAPIC: a GSI.
    pub(super) pin: u32,
    /// The guest is to get it.
    pub(super) is_wanted: bool,
}

/// The eventfds of a [`super::LevelLine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelLineHandles {
    /// Raises the level.
    pub(super) trigger: Slot,
    /// Signalled when the guest's EOI has lowered it.
    pub(super) resample: Slot,
}
