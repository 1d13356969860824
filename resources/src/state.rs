//! The envelope of the saved state: named sections, each of a kind and a version, under magic, format, build id and
//! checksum.
//!
//! ```text
//! "THESEUS\0" | format u32 | crc32 u32 | length u64 | MessagePack map
//!     { build_id, sections: [{ name, kind, version, data }] }
//! ```
//! All integers little endian; the checksum covers the MessagePack. A section is consumed exactly once, and what is
//! left over is an error.

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

const MAGIC: [u8; 8] = *b"THESEUS\0";

/// How the name of a device's second section ends, that with what only this host has of it, behind the device's name.
pub const HANDLES: &str = ".handles";

/// Readers take the format before and the one after theirs.
pub const FORMAT: u32 = 1;
/// Bytes before the MessagePack.
pub const HEADER: usize = 24;

/// A kind of section: the version that this build writes, and those that it reads. A build one step back or on has the
/// version before or the one after; what a state loses on that way has a default (`#[serde(default)]`) or is made up
/// for by who gets the version that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What the section is of, as a device's type: one is not read for another.
    pub kind: &'static str,
    /// The one that this build writes.
    pub version: u16,
    /// The oldest version that is read, and the newest.
    pub reads: (u16, u16),
}

impl Format {
    /// Reads what is one step away, too.
    pub const fn new(kind: &'static str, version: u16) -> Self {
        Self { kind, version, reads: (version - 1, version + 1) }
    }

    /// Whether a section of version `found` is among those that are read.
    pub fn can_read(&self, found: u16) -> bool {
        (self.reads.0..=self.reads.1).contains(&found)
    }
}

/// A format with the type that it is of, for who has sections of any kind before him.
#[derive(Clone, Copy)]
pub struct Kind {
    /// What its sections are called and which of them are read.
    pub format: Format,
    /// What this build takes a section for: read, and written again.
    pub reread: fn(&Section<'_>) -> Result<Encoded<()>, StateError>,
}

impl Kind {
    /// Of sections that are read as they are, whatever their version.
    pub const fn of<T: Serialize + DeserializeOwned>(format: Format) -> Self {
        Self {
            format,
            reread: |section| Encoded::new(section.name.to_string(), &section.decode::<T>()?).map(Encoded::untyped),
        }
    }
}

/// Why bytes are no state that this build reads, or why it cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Too short for a header, or the first 8 bytes are others.
    #[error("not a saved state of Theseus (wrong magic)")]
    Magic,
    /// The envelope's format, more than one away from [`FORMAT`].
    #[error(
        "saved state: format {0} cannot be read by this build (it reads {min} to {max})",
        min = FORMAT - 1,
        max = FORMAT + 1
    )]
    Format(u32),
    /// Less or more than the header says.
    #[error("saved state: {have} bytes instead of {want}: truncated?")]
    Length {
        /// Bytes after the header.
        have: u64,
        /// Bytes after the header, as that says.
        want: u64,
    },
    /// The body is not the one that was written.
    #[error("saved state: wrong checksum: it was damaged")]
    Checksum,
    /// What rmp-serde says of the body as a whole.
    #[error("saved state: cannot be decoded: {0}")]
    Envelope(String),
    /// One section is missing, there twice, of another kind, or cannot be encoded or decoded.
    #[error("section '{name}': {reason}")]
    Section {
        /// The section's.
        name: String,
        /// A clause whose subject is the section, or what rmp-serde says.
        reason: String,
    },
    /// Written by a build too far from this one.
    #[error(
        "section '{name}': version {found} of kind '{kind}' cannot be read by this build (it reads {} to {})",
        reads.0,
        reads.1
    )]
    Version {
        /// The section's.
        name: String,
        /// The one that was asked for, and is there.
        kind: String,
        /// The version that is there.
        found: u16,
        /// The oldest and the newest that this build reads.
        reads: (u16, u16),
    },
    /// Their names, after all that this build knows were taken.
    #[error("sections that nothing read: {0}")]
    Leftover(String),
}

/// Borrowed where it was read: a section is copied for the first time when it is decoded.
#[derive(Clone, Serialize, Deserialize)]
pub struct Section<'a> {
    /// By which it is taken: no two of a state have the same.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// [`Format::kind`] of who wrote it.
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    /// [`Format::version`] of who wrote it.
    pub version: u16,
    /// A MessagePack value of its own, with named fields.
    #[serde(borrow, with = "serde_bytes")]
    pub data: Cow<'a, [u8]>,
}

impl Section<'_> {
    /// Reads its data as a `T`, whatever its kind and version: those are the caller's to look at.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, StateError> {
        decode(&self.name, &self.data)
    }
}

#[derive(Serialize, Deserialize)]
struct Body<'a> {
    build_id: String,
    #[serde(borrow)]
    sections: Vec<Section<'a>>,
}

/// The data of a section while it is encoded: whoever owns what it says encodes and decodes it, on a thread of its own
/// where that saves time.
pub struct Encoded<T> {
    name: String,
    data: Vec<u8>,
    of: PhantomData<fn() -> T>,
}

impl<T: Serialize> Encoded<T> {
    /// Encodes `value` for a section of this name.
    pub fn new(name: String, value: &T) -> Result<Self, StateError> {
        match rmp_serde::to_vec_named(value) {
            Ok(data) => Ok(Self { name, data, of: PhantomData }),
            Err(error) => Err(StateError::Section { name, reason: error.to_string() }),
        }
    }
}

impl<T> Clone for Encoded<T> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), data: self.data.clone(), of: PhantomData }
    }
}

impl<T> Encoded<T> {
    /// For who only passes it on.
    pub fn untyped(self) -> Encoded<()> {
        let Self { name, data, of: _ } = self;
        Encoded { name, data, of: PhantomData }
    }
}

impl<T: DeserializeOwned> Encoded<T> {
    /// What was encoded, or taken from a state.
    pub fn decode(&self) -> Result<T, StateError> {
        decode(&self.name, &self.data)
    }
}

fn decode<T: DeserializeOwned>(name: &str, data: &[u8]) -> Result<T, StateError> {
    rmp_serde::from_slice(data)
        .map_err(|error| StateError::Section { name: name.to_owned(), reason: error.to_string() })
}

/// Collects sections.
pub struct StateWriter {
    body: Body<'static>,
}

impl StateWriter {
    /// With no sections yet. `build_id` is that of the running build.
    pub fn new(build_id: &str) -> Self {
        Self { body: Body { build_id: build_id.to_owned(), sections: Vec::new() } }
    }

    /// Encodes and adds a section.
    ///
    /// # Errors
    /// There is one of this name already, or `value` cannot be encoded: nothing is added then.
    pub fn add<T: Serialize>(&mut self, name: &str, format: &Format, value: &T) -> Result<(), StateError> {
        self.add_encoded(Encoded::new(name.to_owned(), value)?, format)
    }

    /// As [`StateWriter::add`], for what was encoded elsewhere.
    pub fn add_encoded<T>(&mut self, encoded: Encoded<T>, format: &Format) -> Result<(), StateError> {
        let Encoded { name, data, of: _ } = encoded;
        if self.body.sections.iter().any(|other| other.name == name) {
            return Err(StateError::Section { name, reason: "is written twice".into() });
        }
        self.body.sections.push(Section {
            name: name.into(),
            kind: format.kind.into(),
            version: format.version,
            data: data.into(),
        });
        Ok(())
    }

    /// The whole envelope, header and all.
    pub fn finish(&self) -> Result<Vec<u8>, StateError> {
        // In one piece, as it is part of an update's pause: an envelope is some 50 bytes more than a section.
        let room: usize = self.body.sections.iter().map(|section| section.data.len() + 128).sum();
        let mut out = Vec::with_capacity(HEADER + 128 + room);
        out.resize(HEADER, 0);
        rmp_serde::encode::write_named(&mut out, &self.body)
            .map_err(|error| StateError::Envelope(error.to_string()))?;
        let (header, body) = out.split_at_mut(HEADER);
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..16].copy_from_slice(&checksum(body).to_le_bytes());
        header[16..].copy_from_slice(&(body.len() as u64).to_le_bytes());
        Ok(out)
    }
}

/// How long an envelope says it is, header and all; None where there is no header.
pub fn length(bytes: &[u8]) -> Option<usize> {
    let body = bytes.get(16..HEADER)?.try_into().ok().map(u64::from_le_bytes)?;
    usize::try_from(body).ok()?.checked_add(HEADER)
}

/// That an envelope is whole: its header, length and checksum. Returns its body.
pub fn check(bytes: &[u8]) -> Result<&[u8], StateError> {
    let (body, sum) = measured(bytes)?;
    if checksum(body) == sum { Ok(body) } else { Err(StateError::Checksum) }
}

/// The same without a look at the body, which its reader checks.
pub fn check_length(bytes: &[u8]) -> Result<(), StateError> {
    measured(bytes).map(drop)
}

/// The body of an envelope that is as long as its header says, and its checksum by that.
fn measured(bytes: &[u8]) -> Result<(&[u8], u32), StateError> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or(StateError::Magic)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..8] != MAGIC {
        return Err(StateError::Magic);
    }
    let format = word(8);
    if format.abs_diff(FORMAT) > 1 {
        return Err(StateError::Format(format));
    }
    let want = u64::from(word(16)) | u64::from(word(20)) << 32;
    if body.len() as u64 != want {
        return Err(StateError::Length { have: body.len() as u64, want });
    }
    Ok((body, word(12)))
}

/// Sections of a state that may come again as they are, decoded in advance: most of what a device has saved while its
/// guest ran is the same when that stands still, and then nobody has the time to decode it.
#[derive(Default)]
pub struct Expected(BTreeMap<String, ExpectedSection>);

struct ExpectedSection {
    version: u16,
    data: Vec<u8>,
    value: Box<dyn Any>,
}

impl ExpectedSection {
    /// Whether this very section has come again.
    fn is(&self, version: u16, data: &[u8]) -> bool {
        self.version == version && self.data == data
    }
}

impl Expected {
    /// Its value, once, if it is the very same section.
    fn take<T: 'static>(&mut self, name: &str, version: u16, data: &[u8]) -> Option<T> {
        self.0.get(name).filter(|section| section.is(version, data) && section.value.is::<T>())?;
        self.0.remove(name)?.value.downcast().ok().map(|value| *value)
    }
}

/// What a reader has to do with what is [`Expected`].
enum Foresight<'a> {
    None,
    Adds(&'a mut Expected),
    Uses(&'a mut Expected),
}

/// A checked envelope whose sections wait to be taken.
pub struct StateReader<'a> {
    build_id: String,
    sections: BTreeMap<Cow<'a, str>, Section<'a>>,
    foresight: Foresight<'a>,
}

impl<'a> StateReader<'a> {
    /// Checks the envelope ([`check`]) and looks through its sections, which are decoded as they are taken.
    ///
    /// # Errors
    /// As [`check`], or two sections have the same name.
    pub fn new(bytes: &'a [u8]) -> Result<Self, StateError> {
        let body = check(bytes)?;
        let body: Body = rmp_serde::from_slice(body).map_err(|error| StateError::Envelope(error.to_string()))?;
        let mut sections = BTreeMap::new();
        for section in body.sections {
            let name = section.name.clone();
            if sections.insert(name.clone(), section).is_some() {
                return Err(StateError::Section { name: name.into(), reason: "is there twice".into() });
            }
        }
        Ok(Self { build_id: body.build_id, sections, foresight: Foresight::None })
    }

    /// Whatever is taken is decoded once more, for `expected`.
    pub fn remembering(self, expected: &'a mut Expected) -> Self {
        Self { foresight: Foresight::Adds(expected), ..self }
    }

    /// What is just as it was in a state that was read with [`StateReader::remembering`] is not decoded again.
    pub fn knowing(self, expected: &'a mut Expected) -> Self {
        Self { foresight: Foresight::Uses(expected), ..self }
    }

    /// The build that wrote it.
    pub fn build_id(&self) -> &str {
        &self.build_id
    }

    /// What is there, for a check beforehand.
    pub fn sections(&self) -> impl Iterator<Item = &Section<'a>> {
        self.sections.values()
    }

    /// Whether a section of this name is left to be taken.
    pub fn has(&self, name: &str) -> bool {
        self.sections.contains_key(name)
    }

    /// Takes out all sections whose names begin with `prefix`, if they are just those of a state that was read with
    /// [`StateReader::remembering`]. Whether they are.
    pub fn take_unchanged(&mut self, prefix: &str) -> bool {
        let Foresight::Uses(Expected(expected)) = &self.foresight else { return false };
        let found: Vec<_> = self.sections.iter().filter(|(name, _)| name.starts_with(prefix)).collect();
        let count = expected.keys().filter(|name| name.starts_with(prefix)).count();
        let is_same = |name: &str, section: &Section<'_>| {
            expected.get(name).is_some_and(|was| was.is(section.version, &section.data))
        };
        if found.len() != count || !found.iter().all(|(name, section)| is_same(name, section)) {
            return false;
        }
        self.sections.retain(|name, _| !name.starts_with(prefix));
        true
    }

    /// Takes one section out, with the version that it has.
    ///
    /// # Errors
    /// It is missing, of another kind, of a version that `format` does not read, or no `T`. It is gone all the same.
    pub fn take<T: DeserializeOwned + 'static>(&mut self, name: &str, format: &Format) -> Result<(u16, T), StateError> {
        let Section { version, data, .. } = self.take_section(name, format)?;
        if let Foresight::Uses(expected) = &mut self.foresight
            && let Some(value) = expected.take(name, version, &data)
        {
            return Ok((version, value));
        }
        if let Foresight::Adds(expected) = &mut self.foresight {
            let value = Box::new(decode::<T>(name, &data)?);
            expected.0.insert(name.to_owned(), ExpectedSection { version, data: data.to_vec(), value });
        }
        Ok((version, decode(name, &data)?))
    }

    /// As [`StateReader::take`], for who decodes it elsewhere.
    pub fn take_encoded<T>(&mut self, name: &str, format: &Format) -> Result<(u16, Encoded<T>), StateError> {
        let Section { version, data, .. } = self.take_section(name, format)?;
        Ok((version, Encoded { name: name.to_owned(), data: data.into_owned(), of: PhantomData }))
    }

    fn take_section(&mut self, name: &str, format: &Format) -> Result<Section<'a>, StateError> {
        let error = |reason: String| StateError::Section { name: name.to_owned(), reason };
        let section = self.sections.remove(name).ok_or_else(|| error("is missing, or read twice".into()))?;
        let Format { kind, version: _, reads } = *format;
        if section.kind != kind {
            return Err(error(format!("is of kind '{}', not '{kind}'", section.kind)));
        }
        if !format.can_read(section.version) {
            let (name, kind) = (name.to_owned(), kind.to_owned());
            return Err(StateError::Version { name, kind, found: section.version, reads });
        }
        Ok(section)
    }

    /// The last step of a restore.
    ///
    /// # Errors
    /// Nobody has taken some of the sections: what they say would be lost.
    pub fn finish(self) -> Result<(), StateError> {
        if self.sections.is_empty() {
            return Ok(());
        }
        Err(StateError::Leftover(self.sections.into_keys().collect::<Vec<_>>().join(", ")))
    }
}

/// Of the body, as the header has it (CRC-32, ISO-HDLC).
pub fn checksum(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct V1 {
        a: u32,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct V2 {
        a: u32,
        #[serde(default)]
        b: Option<u8>,
    }

    const ONE: Format = Format::new("thing", 1);
    const TWO: Format = Format::new("thing", 2);

    fn written() -> Vec<u8> {
        let mut writer = StateWriter::new("id");
        writer.add("x", &ONE, &V1 { a: 5 }).unwrap();
        assert!(writer.add("x", &ONE, &V1 { a: 5 }).is_err());
        writer.add("y", &TWO, &V2 { a: 6, b: Some(1) }).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn old_and_new_readers_cope_and_every_section_is_read_once() {
        let bytes = written();
        let mut reader = StateReader::new(&bytes).unwrap();
        assert_eq!(reader.build_id(), "id");
        assert_eq!(reader.take::<V2>("x", &TWO).unwrap(), (1, V2 { a: 5, b: None }));
        assert_eq!(reader.take::<V1>("y", &ONE).unwrap(), (2, V1 { a: 6 }));
        assert!(reader.take::<V1>("y", &ONE).is_err());
        reader.finish().unwrap();
        let mut reader = StateReader::new(&bytes).unwrap();
        let error = reader.take::<V1>("x", &Format::new("thing", 3)).unwrap_err();
        assert!(matches!(error, StateError::Version { found: 1, reads: (2, 4), .. }));
        assert!(error.to_string().contains("(it reads 2 to 4)"), "{error}");
        // One that still knows the first version.
        let mut reader = StateReader::new(&bytes).unwrap();
        assert_eq!(reader.take::<V1>("x", &Format { reads: (1, 4), ..Format::new("thing", 3) }).unwrap().0, 1);
        assert!(reader.take::<V1>("y", &Format::new("other", 1)).is_err());
        assert!(StateReader::new(&written()).unwrap().finish().is_err());
    }

    #[test]
    fn what_is_as_expected_is_not_decoded_again() {
        /// Tells how often it was decoded.
        #[derive(Serialize, PartialEq, Debug)]
        struct Counted(u32);

        thread_local!(static DECODED: std::cell::Cell<u32> = const { std::cell::Cell::new(0) });

        impl<'de> Deserialize<'de> for Counted {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                DECODED.set(DECODED.get() + 1);
                u32::deserialize(deserializer).map(Self)
            }
        }

        let state = |same: u32, other: u32| {
            let mut writer = StateWriter::new("id");
            writer.add("same", &ONE, &Counted(same)).unwrap();
            writer.add("other", &ONE, &Counted(other)).unwrap();
            writer.finish().unwrap()
        };
        let (first, second, third) = (state(1, 2), state(1, 3), state(1, 2));
        let mut expected = Expected::default();
        let mut reader = StateReader::new(&first).unwrap().remembering(&mut expected);
        let mut take = |name| reader.take::<Counted>(name, &ONE).unwrap().1;
        assert_eq!((take("same"), take("other")), (Counted(1), Counted(2)));
        reader.finish().unwrap();

        DECODED.set(0);
        let mut reader = StateReader::new(&second).unwrap().knowing(&mut expected);
        assert!(reader.take::<Counted>("same", &Format::new("thing", 3)).is_err(), "of a version that is not read");
        let mut reader = StateReader::new(&second).unwrap().knowing(&mut expected);
        let mut take = |name| reader.take::<Counted>(name, &ONE).unwrap().1;
        assert_eq!((take("same"), take("other"), DECODED.get()), (Counted(1), Counted(3), 1));
        let mut reader = StateReader::new(&second).unwrap().knowing(&mut expected);
        assert!(!reader.take_unchanged("o"), "it is another");
        assert!(reader.has("other"));
        let mut reader = StateReader::new(&third).unwrap().knowing(&mut expected);
        assert!(reader.take_unchanged("o") && reader.has("same") && !reader.has("other"));
        assert!(!StateReader::new(&third).unwrap().take_unchanged("o"), "nothing is expected");
        // Once, and for no other type.
        let mut reader = StateReader::new(&third).unwrap().knowing(&mut expected);
        assert_eq!(reader.take::<u32>("other", &ONE).unwrap().1, 2);
        assert_eq!((reader.take::<Counted>("same", &ONE).unwrap().1, DECODED.get()), (Counted(1), 2));
    }

    #[test]
    fn damage_is_found() {
        let good = written();
        for cut in [0, 7, 23, 24, good.len() - 1] {
            assert!(StateReader::new(&good[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(StateReader::new(&bad).is_err(), "flip at {at}");
        }
    }
}
