//! The guest's memory as seen from outside: the VMM's memfd, mapped a second time.

use std::{
    fs::{File, OpenOptions},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, ensure};

use crate::harness::proc;

/// Where the 32-bit hole begins, in guest addresses and in the memfd.
pub const HOLE: u64 = 3 << 30;

fn memfd(pid: u32) -> Result<File> {
    proc::open_fd_to(pid, "/memfd:guest-ram", OpenOptions::new().read(true))
}

/// How many bytes from `offset` of the guest's memfd have been touched.
pub fn touched_from(pid: u32, offset: u64) -> Result<u64> {
    let file = memfd(pid)?;
    let seek = |from: u64, whence| -> Option<u64> {
        // SAFETY: no memory is involved. ENXIO: nothing more.
        u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) }).ok()
    };
    let (mut at, mut touched) = (offset, 0);
    while let Some(data) = seek(at, libc::SEEK_DATA) {
        let hole = seek(data, libc::SEEK_HOLE).context("data without an end")?;
        touched += hole - data;
        at = hole;
    }
    Ok(touched)
}

/// A shared, read-only mapping of the guest's memfd. It stays right over updates: the file is the same.
pub struct GuestRam {
    address: *const u8,
    len: usize,
}

impl GuestRam {
    /// Maps the memory of the VMM `pid` and fills the page tables, so that a search does not fault.
    pub fn of(pid: u32) -> Result<Self> {
        let file = memfd(pid)?;
        let len = usize::try_from(file.metadata()?.len())?;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is sealed against shrinking.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(address != libc::MAP_FAILED, "mapping guest memory: {}", std::io::Error::last_os_error());
        Ok(Self { address: address.cast_const().cast(), len })
    }

    /// Offset in the memfd of a packet filled with `token`, which is at least twice `STEP` bytes long.
    ///
    /// One word per `STEP` bytes is looked at, so that 512 MiB take a fraction of a second; where it fits, the
    /// neighbourhood decides.
    pub fn find_filler(&self, token: u16) -> Option<usize> {
        let [a, b] = token.to_ne_bytes();
        // Payloads start at even addresses: 14 bytes of Ethernet, 20 of IP, 8 of UDP after an aligned start.
        let word = u64::from_ne_bytes([a, b, a, b, a, b, a, b]);
        (0..self.len.saturating_sub(STEP) / STEP)
            .map(|i| i * STEP)
            .find(|&at| self.word(at) == word && self.run(at, word))
    }

    fn run(&self, at: usize, word: u64) -> bool {
        // The run goes on for half a STEP in at least one direction, wherever it was hit.
        let words = STEP / 16;
        let forward = (0..words).take_while(|i| at + i * 8 + 8 <= self.len && self.word(at + i * 8) == word).count();
        let backward = (1..words).take_while(|i| at >= i * 8 && self.word(at - i * 8) == word).count();
        forward + backward >= words
    }

    fn word(&self, at: usize) -> u64 {
        // SAFETY: callers stay within `len`, offsets are multiples of 8, and the mapping lives as long as self. The
        // guest and its devices write meanwhile, hence volatile.
        unsafe { std::ptr::read_volatile(self.address.add(at).cast::<u64>()) }
    }
}

/// Distance of the words looked at.
pub const STEP: usize = 512;

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: this very mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.address.cast_mut().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filler_is_found() {
        let mut memory = vec![0_u64; 1 << 16];
        let token = 0x3d71_u16;
        let ram = |memory: &[u64]| GuestRam { address: memory.as_ptr().cast(), len: memory.len() * 8 };
        let search = |memory: &[u64]| {
            let ram = ram(memory);
            let found = ram.find_filler(token);
            std::mem::forget(ram);
            found
        };
        // A lone word is no packet.
        memory[STEP / 8 * 3] = 0x3d71_3d71_3d71_3d71;
        assert_eq!(search(&memory), None);
        // 1200 bytes at an even address that is no multiple of 8.
        // SAFETY: within the vector.
        let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), 1 << 19) };
        for pair in bytes[70_042..71_242].chunks_exact_mut(2) {
            pair.copy_from_slice(&token.to_ne_bytes());
        }
        let at = search(&memory).unwrap();
        assert!((70_042..71_242).contains(&at), "{at}");
    }
}
