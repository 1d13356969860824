//! What a file says of itself in its ELF notes: build id, and whether it is a build of Theseus.

use std::fs::File;
use std::io;
use std::path::Path;

use object::Endianness;
use object::elf::{EM_X86_64, FileHeader64, NT_GNU_BUILD_ID, PT_NOTE};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::build_info::{NOTE_KIND, NOTE_OWNER};

/// Why a file is no build; without its name.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    #[error("not an ELF file of 64 bits")]
    NotElf,
    #[error("for another kind of machine (ELF machine {0})")]
    OtherMachine(u16),
    #[error("damaged ELF file: {0}")]
    Damaged(#[from] object::Error),
    #[error(transparent)]
    Os(#[from] io::Error),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Lower-case hex; empty if there is none.
    pub build_id: String,
    /// None if the file is not Theseus.
    pub version: Option<String>,
}

/// Reads the notes of an executable for this machine.
pub fn inspect(path: &Path) -> Result<Found, ElfError> {
    inspect_file(File::open(path)?)
}

pub fn inspect_file(file: File) -> Result<Found, ElfError> {
    let data = &ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(data).map_err(|_| ElfError::NotElf)?;
    let endian = header.endian()?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(ElfError::OtherMachine(header.e_machine(endian)));
    }
    let mut found = Found { build_id: String::new(), version: None };
    for segment in header.program_headers(endian, data)? {
        if segment.p_type(endian) != PT_NOTE {
            continue;
        }
        let Some(mut notes) = segment.notes(endian, data)? else { continue };
        while let Some(note) = notes.next()? {
            match (note.name(), note.n_type(endian)) {
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
