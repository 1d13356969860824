//! A page of the guest's memory whose guest physical address is known, and processes that need it.

use std::{fs::File, io, os::unix::fs::FileExt};

const PAGE: usize = 4096;
const FILL: u8 = 0x5A;

pub(super) struct Held(*mut u8);

// SAFETY: a mapping of its own, which only child processes read.
unsafe impl Send for Held {}

impl Held {
    pub(super) fn new() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = Self(page.cast());
        // SAFETY: the page just mapped.
        unsafe { page.0.write_bytes(FILL, PAGE) };
        Ok(page)
    }

    /// Documentation/admin-guide/mm/pagemap.rst.
    pub(super) fn address(&self) -> io::Result<u64> {
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, (self.0 as usize / PAGE * 8) as u64)?;
        let entry = u64::from_ne_bytes(entry);
        if entry >> 63 == 0 {
            return Err(io::Error::other("the page is not there"));
        }
        Ok((entry & ((1 << 55) - 1)) * PAGE as u64)
    }

    /// A process reads it. The signal that ended that, or 0.
    pub(super) fn touch(&self) -> io::Result<i32> {
        // SAFETY: the child reads one byte and ends; it calls nothing that another thread could have locked.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: mapped here as in the parent.
                let byte = unsafe { std::ptr::read_volatile(self.0) };
                // SAFETY: ends this process.
                unsafe { libc::_exit(i32::from(byte != FILL)) }
            }
            child => {
                let mut status = 0;
                // SAFETY: our child; the kernel fills one int.
                if unsafe { libc::waitpid(child, &mut status, 0) } != child {
                    return Err(io::Error::last_os_error());
                }
                match status {
                    _ if libc::WIFSIGNALED(status) => Ok(libc::WTERMSIG(status)),
                    0 => Ok(0),
                    _ => Err(io::Error::other("the page holds something else")),
                }
            }
        }
    }
}
