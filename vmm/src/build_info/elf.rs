//! What a file says of itself in its ELF notes: build id, and whether it is a build of Theseus.

use std::fs::File;
use std::path::Path;

use object::elf::NT_GNU_BUILD_ID;

use crate::build_info::{NOTE_KIND, NOTE_OWNER};
use crate::elf::{Elf, ElfError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Lower-case hex; empty if there is none.
    pub build_id: String,
    /// None if the file is not Theseus.
    pub version: Option<String>,
}

/// Reads the notes of an executable for this machine.
pub(crate) fn inspect(path: &Path) -> Result<Found, ElfError> {
    inspect_file(&File::open(path)?)
}

pub(crate) fn inspect_file(file: &File) -> Result<Found, ElfError> {
    let elf = Elf::open(file)?;
    let mut found = Found { build_id: String::new(), version: None };
    for segment in elf.segments()? {
        let Some(mut notes) = elf.notes(segment)? else { continue };
        while let Some(note) = notes.next()? {
            match (note.name(), note.n_type(elf.endian)) {
                (b"GNU", NT_GNU_BUILD_ID) => {
                    found.build_id = note.desc().iter().map(|byte| format!("{byte:02x}")).collect();
                }
                (NOTE_OWNER, NOTE_KIND) => {
                    let text = note.desc().split(|byte| *byte == 0).next().unwrap_or_default();
                    found.version = Some(String::from_utf8_lossy(text).into_owned());
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn scripts_and_damage_are_told_apart() {
        let mut script = tempfile::NamedTempFile::new().unwrap();
        script.write_all(b"#!/bin/sh\nexit 0\n").unwrap();
        assert!(inspect(script.path()).unwrap_err().to_string().contains("not an ELF"));
        let me = std::fs::read("/proc/self/exe").unwrap();
        let mut cut = tempfile::NamedTempFile::new().unwrap();
        cut.write_all(&me[..80]).unwrap();
        assert!(inspect(cut.path()).is_err());
        let mut foreign = tempfile::NamedTempFile::new().unwrap();
        // e_machine, EM_AARCH64.
        foreign.write_all(&[&me[..18], &183_u16.to_le_bytes(), &me[20..]].concat()).unwrap();
        let error = inspect(foreign.path()).unwrap_err().to_string();
        assert!(error.contains("another kind of machine (ELF machine 183)"), "{error}");
    }
}
