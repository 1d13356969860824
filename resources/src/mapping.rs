//! Memory of this process that is mapped: mmap(2) and munmap(2) are called here and nowhere else.

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// How often another thread may take the free space that was found.
const TRIES: usize = 100;

/// How far apart from others is enough, in bytes: a process has 128 TiB.
const FAR: usize = 1 << 40;

/// A part of a file, shared with all who have it mapped, as long as this lives. No Rust object is ever in it but by who
/// owns this.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a plain range of shared memory; what is in it is accessed as its owner says.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes from `offset` on.
    pub fn new(file: impl AsFd, offset: u64, len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping, where the kernel has room for it.
        Self::of(unsafe { mmap(null_mut(), len, READ_WRITE, MapFlags::SHARED, file, offset) }?, len)
    }

    /// The same at a multiple of `align`. `reserved`: huge pages are set aside for it, or it fails.
    pub fn aligned(file: impl AsFd, offset: u64, len: usize, align: u64, reserved: bool) -> Result<Self, Errno> {
        let lasting = if reserved { MapFlags::empty() } else { MapFlags::NORESERVE };
        let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE | lasting;
        for apart in 0..TRIES {
            let start = free_space(len, align, apart)? as *mut c_void;
            // SAFETY: a new mapping, which replaces nothing.
            match unsafe { mmap(start, len, READ_WRITE, flags, &file, offset) } {
                Err(Errno::EXIST) => std::thread::yield_now(),
                mapped => return Self::of(mapped?, len),
            }
        }
        Err(Errno::EXIST)
    }

    fn of(start: *mut c_void, len: usize) -> Result<Self, Errno> {
        Ok(Self { start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?, len })
    }

    /// Its first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// As others name it: KVM, VFIO.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// In bytes, as it was asked for.
    #[expect(clippy::len_without_is_empty, reason = "none is")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` or `aligned`; who has its address is gone before its owner.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// An aligned address where so many bytes are free, or just were, and above it `apart` times as many: the kernel gives
/// others the highest space that is free, so the further from there the less likely somebody takes it. Nothing is kept there: a mapping with MAP_FIXED over
/// a reservation would leave a hole where it fails (mmap_region unmaps first), and unmapping that again would take the
/// stack of a thread that has started in it.
fn free_space(len: usize, align: u64, apart: usize) -> Result<u64, Errno> {
    let least = usize::try_from(align).ok().and_then(|align| len.checked_add(align)).ok_or(Errno::NOMEM)?;
    let space = least.checked_add(len.saturating_mul(apart).min(FAR)).ok_or(Errno::NOMEM)?;
    // SAFETY: a fresh mapping, and unmapped as it was mapped.
    let base = unsafe {
        let base = mmap_anonymous(null_mut(), space, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)?;
        munmap(base, space)?;
        base as u64
    };
    base.checked_next_multiple_of(align).ok_or(Errno::NOMEM)
}

/// Memory of this process alone, for ever. It costs nothing until it is touched, and no swap is set aside for it.
pub fn for_ever(len: usize) -> Result<NonNull<u8>, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, where the kernel has room for it.
    let start = unsafe { mmap_anonymous(null_mut(), len, READ_WRITE, flags) }?;
    NonNull::new(start.cast()).ok_or(Errno::NOMEM)
}

/// Puts empty pages where a part of a mapping was, as long as that lives. Async-signal-safe.
///
/// # Safety
/// `start..start + len` must be whole pages of a [`Mapping`], and nothing there may be a Rust object.
pub unsafe fn replace(start: u64, len: usize) -> Result<(), Errno> {
    let flags = MapFlags::FIXED | MapFlags::SHARED;
    // SAFETY: the caller's promise.
    unsafe { mmap_anonymous(start as *mut c_void, len, READ_WRITE, flags) }.map(drop)
}

/// Unmaps what a [`Mapping`] has still mapped, at the end of the process.
///
/// # Safety
/// Nobody may touch it any more, nor drop that mapping.
pub unsafe fn abandon(start: u64, len: usize) {
    // SAFETY: the caller's promise.
    let _ = unsafe { munmap(start as *mut c_void, len) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::read_to_string;
    use std::os::fd::OwnedFd;

    const LEN: usize = 4 << 20;

    fn file() -> OwnedFd {
        let file = rustix::fs::memfd_create("mapping-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, LEN as u64).unwrap();
        file
    }

    /// Whether the file of this test is mapped there (maps in proc(5)).
    fn mapped_at(address: u64) -> bool {
        let maps = read_to_string("/proc/self/maps").unwrap();
        let start = format!("{address:x}-");
        maps.lines().any(|line| line.starts_with(&start) && line.contains("mapping-test"))
    }

    /// All look for free space at the same time, and find the same.
    #[test]
    fn threads_that_map_at_once_all_find_room() {
        let map = || {
            let file = file();
            (0..300).for_each(|_| drop(Mapping::aligned(&file, 0, LEN, 2 << 20, false).unwrap()));
        };
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(map))));
    }

    #[test]
    fn a_mapping_is_shared_aligned_and_there_as_long_as_it_lives() {
        let file = file();
        let plain = Mapping::new(&file, 4096, LEN - 4096).unwrap();
        let aligned = Mapping::aligned(&file, 0, LEN, 2 << 20, false).unwrap();
        assert_eq!((aligned.address() % (2 << 20), aligned.len()), (0, LEN));
        // SAFETY: both are mapped, and of one file.
        let seen = unsafe {
            aligned.start().as_ptr().add(4096).write_volatile(7);
            plain.start().as_ptr().read_volatile()
        };
        assert_eq!(seen, 7);
        // SAFETY: whole pages of the mapping, which nobody else has.
        let seen = unsafe {
            replace(plain.address(), 4096).unwrap();
            (plain.start().as_ptr().read_volatile(), aligned.start().as_ptr().add(4096).read_volatile())
        };
        assert_eq!(seen, (0, 7), "an empty page in this mapping alone");
        let address = aligned.address();
        assert!(mapped_at(address));
        drop(aligned);
        assert!(!mapped_at(address));
        assert!(Mapping::aligned(&file, 0, usize::MAX, 2 << 20, false).is_err());
    }
}
