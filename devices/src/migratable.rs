//! The update trait: how a device goes from one image to the next.

use serde::Serialize;
use serde::de::DeserializeOwned;
use theseus_resources::StateReader;
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::state::{Format, StateError};

/// Why a device could not be saved or restored; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
    #[error(transparent)]
    Encode(#[from] theseus_resources::state::StateError),
    #[error("{what}: {source}")]
    Os { what: String, source: std::io::Error },
    #[error("{0}")]
    State(String),
}

/// A device whose state goes over to the next image. No default methods: "nothing to save" is something somebody wrote.
///
/// `save` names every field of the device (destructure without `..`), so that a new field does not compile until
/// somebody has decided about it. `restore` is a constructor: there is no half-restored device.
pub trait Migratable: Sized {
    /// Of its sections in the saved state.
    const FORMAT: Format;
    type State: Serialize + DeserializeOwned;
    /// What restore needs from the new image: buses, interrupt lines, claims on stored fds.
    type Parts<'a>;

    /// Pure: may be called while the guest runs (a dry run) and any number of times.
    fn save(&self) -> Result<Self::State, MigrateError>;

    /// Makes a state of version `found` one of this build's: what `#[serde(default)]` of a new field cannot say.
    fn upgrade(found: u16, state: Self::State) -> Result<Self::State, MigrateError>;

    fn restore(state: Self::State, parts: Self::Parts<'_>) -> Result<Self, MigrateError>;
}

/// Takes the state of a device out of its section, as this build has it.
pub fn take<D: Migratable>(reader: &mut StateReader<'_>, name: &str) -> Result<D::State, StateError> {
    let (found, state) = reader.take(name, &D::FORMAT)?;
    let named = |error: MigrateError| StateError::Section { name: name.to_owned(), reason: error.to_string() };
    D::upgrade(found, state).map_err(named)
}
