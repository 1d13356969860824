//! The update trait: how a device goes from one image to the next, in two parts. Its state is what the guest can see of
//! it, and means the same on any host; its handles are what only this host has. An update takes both.

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use theseus_resources::StateReader;
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::state::{Encoded, Format, HANDLES, Kind, Section, StateError};
use theseus_resources::survivor::look;

/// Why a device could not be saved or restored; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A descriptor that its handles name is not in the fd store, or is another one.
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
    /// A section cannot be written or read.
    #[error(transparent)]
    Encode(#[from] theseus_resources::state::StateError),
    /// The host has refused it something.
    #[error("{what}: {source}")]
    Os {
        /// What was asked of it.
        what: String,
        /// What the system call said.
        source: std::io::Error,
    },
    /// The state makes no sense, is another device's, or cannot be had now.
    #[error("{0}")]
    State(String),
}

/// A device whose state goes over to the next image. No default methods: "nothing to save" is something somebody wrote.
///
/// `save` names every field of the device (destructure without `..`), so that a new field does not compile until
/// somebody has decided about it. `restore` is a constructor: there is no half-restored device.
pub trait Migratable: Sized {
    /// Of the sections with its state.
    const FORMAT: Format;
    /// What the guest can see of it.
    type State: Serialize + DeserializeOwned + 'static;
    /// What only this host has of it: slots of stored fds above all. [`NoHandles`] where there is nothing.
    type Handles: Handles;
    /// What restore needs from the new image: buses, interrupt lines, claims on stored fds.
    type Parts<'a>;

    /// Pure: may be called while the guest runs (a dry run) and any number of times.
    ///
    /// # Errors
    /// Some part of it cannot be had now: a vCPU has been in an access to it for too long.
    fn save(&self) -> Result<Saved<Self>, MigrateError>;

    /// Makes a state of version `found` one of this build's: what `#[serde(default)]` of a new field cannot say.
    fn upgrade(found: u16, state: Self::State) -> Result<Self::State, MigrateError>;

    /// The device as it was saved. It may raise pending interrupts again at once.
    ///
    /// # Errors
    /// The state makes no sense, or names what is not here (any more).
    fn restore(saved: Saved<Self>, parts: Self::Parts<'_>) -> Result<Self, MigrateError>;
}

/// Both parts of a device.
pub struct Saved<D: Migratable> {
    /// What the guest sees of it.
    pub state: D::State,
    /// What only this host has of it.
    pub handles: D::Handles,
}

impl<D: Migratable> PartialEq for Saved<D>
where
    D::State: PartialEq,
    D::Handles: PartialEq,
{
    fn eq(&self, other: &Self) -> bool {
        self.state == other.state && self.handles == other.handles
    }
}

/// Of a device that is all state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoHandles;

/// Handles that there are. They have a section of their own, and so a format.
pub trait HostHandles: Serialize + DeserializeOwned + 'static {
    /// Of the sections with them.
    const FORMAT: Format;

    /// As [`Migratable::upgrade`].
    fn upgrade(found: u16, handles: Self) -> Result<Self, MigrateError>;
}

/// [`NoHandles`] or some [`HostHandles`].
pub trait Handles: Sized {
    /// Of their sections, if there are any.
    const KIND: Option<Kind>;

    /// `name` is the device's.
    fn encode(&self, name: &str) -> Result<Option<SavedSection>, StateError>;

    /// Those of the device `name`, out of their section if they have one, as this build has them.
    fn take(reader: &mut StateReader<'_>, name: &str) -> Result<Self, StateError>;
}

impl Handles for NoHandles {
    const KIND: Option<Kind> = None;

    fn encode(&self, _: &str) -> Result<Option<SavedSection>, StateError> {
        Ok(None)
    }

    fn take(_: &mut StateReader<'_>, _: &str) -> Result<Self, StateError> {
        Ok(Self)
    }
}

impl<H: HostHandles> Handles for H {
    const KIND: Option<Kind> = Some(handles_kind::<H>());

    fn encode(&self, name: &str) -> Result<Option<SavedSection>, StateError> {
        Ok(Some(SavedSection::new(H::FORMAT, handles_name(name), self)?))
    }

    fn take(reader: &mut StateReader<'_>, name: &str) -> Result<Self, StateError> {
        let name = handles_name(name);
        let (found, handles) = reader.take(&name, &H::FORMAT)?;
        H::upgrade(found, handles).map_err(|error| named(&name, error))
    }
}

/// Of the section with the handles of `name`.
pub fn handles_name(name: &str) -> String {
    format!("{name}{HANDLES}")
}

/// A section of the saved state that is not written yet.
#[derive(Clone)]
pub struct SavedSection {
    /// With which it is written into the envelope.
    pub format: Format,
    /// Its name and its data.
    pub encoded: Encoded<()>,
}

impl SavedSection {
    /// `name` is the section's; no two of a state have one.
    pub fn new<T: Serialize>(format: Format, name: String, value: &T) -> Result<Self, StateError> {
        Ok(Self { format, encoded: Encoded::new(name, value)?.untyped() })
    }
}

/// A device in the saved state.
pub struct SavedDevice {
    /// Named as the device.
    pub state: SavedSection,
    /// Named by [`handles_name`]; None: [`NoHandles`].
    pub handles: Option<SavedSection>,
}

impl SavedDevice {
    /// Saves `device` under its `name`.
    pub fn of<D: Migratable>(device: &D, name: &str) -> Result<Self, MigrateError> {
        Ok(Self::written(&device.save()?, name)?)
    }

    /// A device's state, under its `name`.
    pub fn written<D: Migratable>(saved: &Saved<D>, name: &str) -> Result<Self, StateError> {
        let Saved { state, handles } = saved;
        let state = SavedSection::new(D::FORMAT, name.to_owned(), state)?;
        Ok(Self { state, handles: handles.encode(name)? })
    }

    /// Of one that has a lock, which a survivor reads past.
    pub fn of_locked<D: Migratable>(device: &Mutex<D>, name: &str) -> Result<Self, MigrateError> {
        Self::of(&*look(device), name)
    }
}

/// Takes a device out of its sections, as this build has it.
pub fn take<D: Migratable>(reader: &mut StateReader<'_>, name: &str) -> Result<Saved<D>, StateError> {
    let (found, state) = reader.take(name, &D::FORMAT)?;
    let state = D::upgrade(found, state).map_err(|error| named(name, error))?;
    Ok(Saved { state, handles: D::Handles::take(reader, name)? })
}

fn named(name: &str, error: MigrateError) -> StateError {
    StateError::Section { name: name.to_owned(), reason: error.to_string() }
}

/// Of the sections with a device's state.
pub(crate) const fn state_kind<D: Migratable>() -> Kind {
    let reread = |section: &Section<'_>| {
        let state = D::upgrade(section.version, section.decode()?).map_err(|error| named(&section.name, error))?;
        Ok(Encoded::new(section.name.to_string(), &state)?.untyped())
    };
    Kind { format: D::FORMAT, reread }
}

/// Of the sections with some handles.
pub(crate) const fn handles_kind<H: HostHandles>() -> Kind {
    let reread = |section: &Section<'_>| {
        let handles = H::upgrade(section.version, section.decode()?).map_err(|error| named(&section.name, error))?;
        Ok(Encoded::new(section.name.to_string(), &handles)?.untyped())
    };
    Kind { format: H::FORMAT, reread }
}

/// The sections of a state that name a descriptor. What is no handle must not.
#[cfg(test)]
pub fn with_slots(bytes: &[u8]) -> Vec<String> {
    use rmpv::Value;
    fn has_slot(value: &Value) -> bool {
        match value {
            Value::Ext(theseus_resources::fd_store::SLOT_TYPE, _) => true,
            Value::Array(values) => values.iter().any(has_slot),
            Value::Map(map) => map.iter().any(|(_, value)| has_slot(value)),
            _ => false,
        }
    }
    let reader = StateReader::new(bytes).unwrap();
    let with = reader.sections().filter(|section| has_slot(&section.decode().unwrap()));
    with.map(|section| section.name.to_string()).collect()
}

/// The sections of a device, in an envelope.
#[cfg(test)]
pub fn written<D: Migratable>(device: &D) -> Vec<u8> {
    let mut writer = theseus_resources::StateWriter::new("test");
    let SavedDevice { state, handles } = SavedDevice::of(device, "device").unwrap();
    for SavedSection { format, encoded } in [Some(state), handles].into_iter().flatten() {
        writer.add_encoded(encoded, &format).unwrap();
    }
    writer.finish().unwrap()
}

/// A device as it comes out of the sections that it was written into.
#[cfg(test)]
pub fn sent<D: Migratable>(device: &D) -> Saved<D> {
    let bytes = written(device);
    let mut reader = StateReader::new(&bytes).unwrap();
    let saved = take(&mut reader, "device").unwrap();
    reader.finish().unwrap();
    saved
}
