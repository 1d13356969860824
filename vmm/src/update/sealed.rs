//! A state in a file of memory that nobody can change any more: stored, however it then travels.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use theseus_resources::state as envelope;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

/// A memfd for a state that is still to come, made before the pause: most of its cost is its pages.
pub(crate) struct Blank(File);

impl Blank {
    /// `name`: in /proc; `room`: how many bytes it will be, about.
    pub(crate) fn new(name: &str, room: usize) -> std::io::Result<Self> {
        let memfd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        if room > 0 {
            rustix::fs::fallocate(&memfd, FallocateFlags::empty(), 0, room as u64)?;
        }
        Ok(Self(memfd.into()))
    }

    /// With this state, that nobody can change any more. What room is left stays: to give it back takes longer than to
    /// read past it.
    pub(crate) fn seal(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(bytes, 0)?;
        Ok(rustix::fs::fcntl_add_seals(&self.0, SEALS | SealFlags::SEAL)?)
    }
}

impl AsFd for Blank {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A memfd with these bytes.
pub(super) fn seal(name: &str, bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let blank = Blank::new(name, bytes.len())?;
    blank.seal(bytes)?;
    Ok(blank.0.into())
}

/// The state in a sealed memfd. Read rather than mapped: to unmap it would interrupt every CPU that runs a thread of
/// this process. Refuses what is not sealed: its bytes could change, or end, under us.
pub(super) fn unseal(fd: BorrowedFd<'_>) -> std::io::Result<Vec<u8>> {
    if !rustix::fs::fcntl_get_seals(fd)?.contains(SEALS) {
        return Err(std::io::Error::other("its memfd is not sealed"));
    }
    let len = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(std::io::Error::other)?;
    // Not the room behind the state.
    let mut header = [0; envelope::HEADER];
    let read = rustix::io::pread(fd, &mut header, 0)?;
    let said = envelope::length(&header[..read]).unwrap_or(len);
    // One that is shorter than it says is found by who reads it.
    let said = said.min(len);
    let mut bytes = Vec::with_capacity(said);
    while bytes.len() < said {
        // It may take a little more than was asked for.
        let at = bytes.len() as u64;
        match rustix::io::pread(fd, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bytes.truncate(said);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_read_back() {
        let fd = seal("state", &[7; 5000]).unwrap();
        assert_eq!(unseal(fd.as_fd()).unwrap(), [7; 5000]);
        assert!(rustix::io::write(&fd, &[1]).is_err());
        let open = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(unseal(open.as_fd()).is_err(), "nobody promises that it stays as it is");
        assert!(unseal(seal("state", &[]).unwrap().as_fd()).unwrap().is_empty());
        let state = theseus_resources::StateWriter::new("id").finish().unwrap();
        for room in [0, 10_000] {
            let blank = Blank::new("state", room).unwrap();
            blank.seal(&state).unwrap();
            assert_eq!(unseal(blank.as_fd()).unwrap(), state);
            assert!(blank.seal(&[3]).is_err(), "once only");
        }
    }
}
