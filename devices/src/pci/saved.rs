//! What PCI functions are made of, in the saved state.

use serde::{Deserialize, Serialize};

use crate::interrupt::RouteHandles;

/// [`super::config::ConfigSpace`]: whole, as what a guest has seen stays as it is, also in a build that would begin
/// with other values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigSpaceState {
    /// The emulated bits; zero where the device answers.
    #[serde(with = "serde_bytes")]
    pub(super) bytes: Vec<u8>,
    /// A set bit is emulated. As long as `bytes`.
    #[serde(with = "serde_bytes")]
    pub(super) emulated: Vec<u8>,
    /// A set bit can be written by the guest; it is emulated. As long as `bytes`.
    #[serde(with = "serde_bytes")]
    pub(super) writable: Vec<u8>,
}

/// [`super::bar::BarRegister`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BarRegisterState {
    /// Of its first register, 0 to 5.
    pub(super) index: u8,
    /// The read-only low bits: type and prefetchable.
    pub(super) flags: u32,
    /// Ports or bytes, a power of two.
    pub(super) size: u64,
    /// At the guest's boot.
    pub(super) address: u64,
    /// Takes the next register too.
    pub(super) is_64bit: bool,
}

/// [`super::decoding::Decoding`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DecodingState {
    /// COMMAND, as the guest last wrote it.
    pub(super) command: u16,
    /// It decodes nothing then.
    pub(super) in_d3hot: bool,
    /// Of the host bridge, at the guest's boot.
    pub(super) windows: DecodedState,
}

/// [`super::placement::Decoded`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DecodedState {
    pub mmio32: WindowState,
    pub mmio64: WindowState,
    pub io: WindowState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WindowState {
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
}

/// [`super::msix_capability::MsixLayout`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsixLayoutState {
    /// How many the device has, 1 to 2048.
    pub(super) vectors: u16,
    pub(super) table_bar: u8,
    /// In bytes, a multiple of 8.
    pub(super) table_offset: u32,
    pub(super) pba_bar: u8,
    /// In bytes, a multiple of 8.
    pub(super) pba_offset: u32,
}

/// What the guest sees of [`super::msix::Msix`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsixState {
    /// As the guest reads it, 16 bytes a vector.
    #[serde(with = "serde_bytes")]
    pub(super) table: Vec<u8>,
    /// Message control: MSI-X Enable and Function Mask.
    pub(super) control: u16,
    /// The vectors whose pending bit is set. They wait in the eventfds, where these go over too, as does what is on its
    /// way and has no pending bit.
    pub(super) pending: Vec<u16>,
}

/// One for each vector, or none before the guest first enables MSI-X.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MsixHandles {
    pub(super) vectors: Vec<RouteHandles>,
}
