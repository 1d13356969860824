//! ELF files that somebody names: of what they say of themselves nothing is believed that their length does not bear
//! out, and no more is read than an honest one has.

use std::fs::File;
use std::io;

use object::Endianness;
use object::elf::{EM_X86_64, FileHeader64, PN_XNUM, PT_NOTE, ProgramHeader64};
use object::read::ReadCache;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};

pub(crate) type Segment = ProgramHeader64<Endianness>;
pub(crate) type Notes<'a> = NoteIterator<'a, FileHeader64<Endianness>>;

/// A note segment has some hundred bytes.
const NOTES_MAX: u64 = 1 << 20;

/// Without the file's name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ElfError {
    #[error("not an ELF file of 64 bits")]
    NotElf,
    #[error("for another kind of machine (ELF machine {0})")]
    OtherMachine(u16),
    #[error("damaged ELF file: {0}")]
    Damaged(#[from] object::Error),
    #[error("damaged ELF file: 65535 segments or more")]
    TooManySegments,
    #[error("damaged ELF file: {0} bytes of notes")]
    TooManyNotes(u64),
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// An ELF file of 64 bits for x86.
pub(crate) struct Elf<'a> {
    data: ReadCache<&'a File>,
    pub endian: Endianness,
}

impl<'a> Elf<'a> {
    pub(crate) fn open(file: &'a File) -> Result<Self, ElfError> {
        let data = ReadCache::new(file);
        let header = FileHeader64::<Endianness>::parse(&data).map_err(|_| ElfError::NotElf)?;
        let endian = header.endian()?;
        match header.e_machine(endian) {
            EM_X86_64 => Ok(Self { data, endian }),
            other => Err(ElfError::OtherMachine(other)),
        }
    }

    pub(crate) fn segments(&self) -> Result<&[Segment], ElfError> {
        let header = FileHeader64::<Endianness>::parse(&self.data)?;
        // What stands for a number that is somewhere else, and larger.
        if header.e_phnum.get(self.endian) == PN_XNUM {
            return Err(ElfError::TooManySegments);
        }
        Ok(header.program_headers(self.endian, &self.data)?)
    }

    /// None where it is no segment of notes.
    pub(crate) fn notes(&self, segment: &Segment) -> Result<Option<Notes<'_>>, ElfError> {
        match segment.p_filesz(self.endian) {
            size if segment.p_type(self.endian) == PT_NOTE && size > NOTES_MAX => Err(ElfError::TooManyNotes(size)),
            _ => Ok(segment.notes(self.endian, &self.data)?),
        }
    }
}
