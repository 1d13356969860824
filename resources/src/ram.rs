//! Guest RAM: one shared memfd, mapped once per image.
//!
//! Always a memfd: it is what the next image maps again. Sealed against resizing only; write seals would forbid that
//! mapping.

use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::Advice;
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::fd_store::{Claims, FdKind, FdStore, FdStoreError, Slot, StoredFd};
use crate::hugepages::Pool;
use crate::layout;
use crate::mapping::Mapping;
use crate::memory_listener::RamBlock;

/// KVM maps a huge page only where guest address, host address and file offset agree modulo its size.
const HUGE: u64 = 2 << 20;

/// Which pages back the RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Those of the architecture: 4 KiB.
    #[default]
    Small,
    /// Transparent huge pages, where the host allows them for shared memory (shmem_enabled = advise).
    Transparent,
    /// hugetlbfs pages of this many bytes.
    Huge(u64),
}

/// Why a guest has no RAM, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// memfd_create, its size, or its seals.
    #[error("guest RAM: cannot create a memfd of {size} bytes: {source}: {remedy}")]
    Create {
        /// Of all RAM, in bytes.
        size: u64,
        /// What the kernel says.
        source: std::io::Error,
        /// What to do, or to ask oneself.
        remedy: &'static str,
    },
    /// mmap, or lseek or madvise for a part of it.
    #[error("guest RAM: cannot map {size:#x} bytes at offset {offset:#x}: {source}: is there enough free memory?")]
    Map {
        /// Of the part, in bytes.
        size: u64,
        /// Of the part in the memfd.
        offset: u64,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// The host has too few huge pages left: its pool, and how many were wanted.
    #[error("guest RAM: {0}")]
    HugePages(Pool),
    /// Ranges that wrap or overlap, or a size of huge pages that there is not.
    #[error("guest RAM: {0}")]
    Layout(String),
    /// The memfd did not come over.
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
}

/// A piece of RAM as seen from all sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Address in the guest.
    pub gpa: u64,
    /// In bytes.
    pub size: u64,
    /// Offset in the memfd.
    pub offset: u64,
    /// Address in this process.
    pub hva: u64,
}

/// Where the guest has RAM. What is in it is in a file of its own.
#[derive(Clone, Serialize, Deserialize)]
pub struct RamState {
    size: u64,
    ranges: Vec<RangeState>,
}

#[derive(Clone, Serialize, Deserialize)]
struct RangeState {
    gpa: u64,
    size: u64,
    /// In that file.
    offset: u64,
}

/// What backs it on this host.
#[derive(Clone, Serialize, Deserialize)]
pub struct RamHandles {
    memfd: Slot,
    pages: PagesState,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum PagesState {
    Small,
    Transparent,
    Huge(u64),
}

impl From<Pages> for PagesState {
    fn from(pages: Pages) -> Self {
        match pages {
            Pages::Small => Self::Small,
            Pages::Transparent => Self::Transparent,
            Pages::Huge(bytes) => Self::Huge(bytes),
        }
    }
}

impl From<PagesState> for Pages {
    fn from(pages: PagesState) -> Self {
        match pages {
            PagesState::Small => Self::Small,
            PagesState::Transparent => Self::Transparent,
            PagesState::Huge(bytes) => Self::Huge(bytes),
        }
    }
}

/// All RAM of a guest. Dropped, it is unmapped here; the memfd lasts until nobody has it.
pub struct GuestRam {
    size: u64,
    pages: Pages,
    ranges: Vec<RamRange>,
    memfd: StoredFd,
    memory: GuestMemoryMmap,
    _mappings: Vec<Mapping>,
}

/// What to do where no memfd is to be had.
fn no_memfd(error: Errno, pages: Pages) -> &'static str {
    match (error, pages) {
        (Errno::MFILE, _) => "raise RLIMIT_NOFILE",
        (Errno::NFILE, _) => "raise fs.file-max",
        (_, Pages::Huge(_)) => "does this kernel have huge pages of that size?",
        (_, Pages::Small | Pages::Transparent) => "is there a filter that forbids memfd_create?",
    }
}

impl GuestRam {
    /// `size` bytes of zeros for a boot, where [`layout::ram_regions`] says.
    ///
    /// # Errors
    /// Huge pages that cannot be set aside are an error here; small ones that are not there are found out when they are
    /// touched ([`GuestRam::prefault`]).
    pub fn new(fd_store: &FdStore, size: u64, pages: Pages) -> Result<Self, RamError> {
        let create = |source: Errno, remedy| RamError::Create { size, source: source.into(), remedy };
        let flags = match pages {
            Pages::Huge(bytes) => MemfdFlags::HUGETLB | huge_flag(bytes)?,
            Pages::Small | Pages::Transparent => MemfdFlags::empty(),
        };
        let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)
            .map_err(|error| create(error, no_memfd(error, pages)))?;
        rustix::fs::ftruncate(&fd, size).map_err(|error| create(error, "is there enough memory?"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| create(error, "sealing failed"))?;
        let mut offset = 0;
        let mut ranges = Vec::new();
        for (gpa, size) in layout::ram_regions(size) {
            ranges.push(RamRange { gpa, size, offset, hva: 0 });
            offset += size;
        }
        Self::map(fd_store.keep("guest RAM", FdKind::GuestMemory, fd), size, pages, ranges, Reserve::Now)
    }

    /// Maps in a new VMM what [`GuestRam::save`] of the old one described: the same pages, with what is in them.
    ///
    /// # Errors
    /// The memfd did not come, or cannot be mapped: then it was claimed, and is closed.
    pub fn restore(state: RamState, handles: RamHandles, claims: &mut Claims) -> Result<Self, RamError> {
        let RamHandles { memfd, pages } = handles;
        Self::map_again(state, claims.claim(memfd, FdKind::GuestMemory)?, pages.into())
    }

    fn map_again(state: RamState, memfd: StoredFd, pages: Pages) -> Result<Self, RamError> {
        let RamState { size, ranges } = state;
        let range = |RangeState { gpa, size, offset }| RamRange { gpa, size, offset, hva: 0 };
        Self::map(memfd, size, pages, ranges.into_iter().map(range).collect(), Reserve::Done)
    }

    /// What the guest has, and what of it only this host has. Nothing is copied.
    pub fn save(&self) -> (RamState, RamHandles) {
        let Self { size, pages, ranges, memfd, memory: _, _mappings } = self;
        // `hva` is of this process.
        let range = |&RamRange { gpa, size, offset, hva: _ }: &RamRange| RangeState { gpa, size, offset };
        let state = RamState { size: *size, ranges: ranges.iter().map(range).collect() };
        (state, RamHandles { memfd: memfd.slot(), pages: (*pages).into() })
    }

    fn map(
        memfd: StoredFd,
        size: u64,
        pages: Pages,
        mut ranges: Vec<RamRange>,
        reserve: Reserve,
    ) -> Result<Self, RamError> {
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for range in &mut ranges {
            let mapping = map(&memfd, range, pages, reserve)?;
            range.hva = mapping.address();
            // SAFETY: `mapping` covers exactly this many bytes and lives beside the region in the same struct.
            let region = unsafe {
                MmapRegionBuilder::new(mapping.len()).with_raw_mmap_pointer(mapping.start().as_ptr()).build()
            }
            .map_err(|error| RamError::Layout(error.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(range.gpa))
                .ok_or_else(|| RamError::Layout(format!("{:#x}+{:#x} wraps", range.gpa, range.size)))?;
            regions.push(region);
            mappings.push(mapping);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| RamError::Layout(error.to_string()))?;
        Ok(Self { size, pages, ranges, memfd, memory, _mappings: mappings })
    }

    /// Of all ranges together, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// As they were asked for at the boot: transparent ones may be small all the same.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// In ascending order of both addresses in the guest and offsets.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// For those who have to know of it: see [`crate::memory_listener`].
    pub fn blocks(&self) -> impl Iterator<Item = RamBlock> + '_ {
        self.ranges.iter().map(|RamRange { gpa, size, offset, hva }| RamBlock {
            gpa: *gpa,
            size: *size,
            hva: *hva,
            file: self.memfd.clone(),
            offset: *offset,
        })
    }

    /// For who reads and writes by guest addresses.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Touches every page now rather than at first use.
    pub fn prefault(&self) -> Result<(), RamError> {
        self.ranges.iter().try_for_each(|range| self.advise(range, 0..range.size, Advice::LinuxPopulateWrite, || true))
    }

    /// Fills this image's page tables from pages that exist already, so that the guest does not fault them in one by
    /// one. Meant for a background thread, which ends when `go_on` says no. What was never touched stays without
    /// memory: a fault would allocate it, for reading too (shmem_fault). Not so with huge pages of hugetlbfs, which
    /// shows no holes (default_llseek): all of them are allocated.
    pub fn populate_page_tables(&self, go_on: impl Fn() -> bool) -> Result<(), RamError> {
        self.each_with_memory(&go_on, |range, part| self.advise(range, part, Advice::LinuxPopulateRead, &go_on))
    }

    /// The parts that have memory, as `populate_page_tables` finds them, in pieces: calls `each` with guest physical
    /// address and size, both in bytes.
    pub fn each_piece<E: From<RamError>>(
        &self,
        go_on: impl Fn() -> bool,
        mut each: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        self.each_with_memory(&go_on, |range, part| {
            pieces(part, &go_on).try_for_each(|(start, len)| each(range.gpa + start, len))
        })
    }

    fn each_with_memory<E: From<RamError>>(
        &self,
        go_on: impl Fn() -> bool,
        mut each: impl FnMut(&RamRange, Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        for range in &self.ranges {
            let mut at = 0;
            while go_on()
                && let Some((start, end)) = self.data(range, at)?
            {
                each(range, start..end)?;
                at = end;
            }
        }
        Ok(())
    }

    /// The next part of `range` from `at` that has memory, relative to its start.
    fn data(&self, range: &RamRange, at: u64) -> Result<Option<(u64, u64)>, RamError> {
        use rustix::fs::{SeekFrom, seek};
        let fail = |source: Errno| RamError::Map { size: range.size, offset: range.offset, source: source.into() };
        let (begin, end) = (range.offset + at, range.offset + range.size);
        if begin >= end {
            return Ok(None);
        }
        // The position of this fd means nothing to anybody else.
        let start = match seek(&self.memfd, SeekFrom::Data(begin)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(fail(error)),
        };
        let stop = seek(&self.memfd, SeekFrom::Hole(start)).map_err(fail)?.min(end);
        Ok((start < stop).then(|| (start - range.offset, stop - range.offset)))
    }

    fn advise(
        &self,
        range: &RamRange,
        part: Range<u64>,
        advice: Advice,
        go_on: impl Fn() -> bool,
    ) -> Result<(), RamError> {
        // Piece by piece: vCPU faults queue behind a writer that waits for the mmap_lock which a piece holds.
        pieces(part, go_on).try_for_each(|(start, len)| {
            // SAFETY: inside one of our mappings; populating changes no contents.
            unsafe { rustix::mm::madvise((range.hva + start) as *mut _, len as usize, advice) }
                .map_err(|source| RamError::Map { size: len, offset: range.offset + start, source: source.into() })?;
            std::thread::yield_now();
            Ok(())
        })
    }
}

/// Start and length of each, as long as `go_on` says so.
fn pieces(part: Range<u64>, go_on: impl Fn() -> bool) -> impl Iterator<Item = (u64, u64)> {
    let mut done = part.start;
    std::iter::from_fn(move || {
        let (start, len) = (done, (part.end - done).min(HUGE));
        done += len;
        (len > 0 && go_on()).then_some((start, len))
    })
}

fn huge_flag(bytes: u64) -> Result<MemfdFlags, RamError> {
    match bytes {
        0x20_0000 => Ok(MemfdFlags::HUGE_2MB),
        0x4000_0000 => Ok(MemfdFlags::HUGE_1GB),
        other => Err(RamError::Layout(format!("huge pages of {other} bytes: use 2M or 1G"))),
    }
}

/// Whether huge pages are to be set aside for the memfd. That is a property of the memfd, not of the mapping
/// (mm/hugetlb.c, hugetlb_reserve_pages): it lasts until the last one who has it open or mapped is gone, so a later
/// image has nothing to reserve.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reserve {
    /// Or fail: without, a pool that is too small is found out when the guest touches its memory.
    Now,
    Done,
}

/// A part of the memfd, aligned for huge pages.
fn map(memfd: impl AsFd, range: &RamRange, pages: Pages, reserve: Reserve) -> Result<Mapping, RamError> {
    let RamRange { size, offset, .. } = *range;
    let fail = |source: Errno| RamError::Map { size, offset, source: source.into() };
    let align = if let Pages::Huge(bytes) = pages { bytes.max(HUGE) } else { HUGE };
    let len = usize::try_from(size).map_err(|_| fail(Errno::NOMEM))?;
    // Small pages of a memfd are accounted when they are touched, whatever the mapping says (mm/shmem.c).
    let mapping =
        Mapping::aligned(memfd, offset, len, align, reserve == Reserve::Now).map_err(|source| match pages {
            Pages::Huge(bytes) if reserve == Reserve::Now => RamError::HugePages(Pool::of(bytes, size.div_ceil(bytes))),
            _ => fail(source),
        })?;
    let start = mapping.start().as_ptr().cast();
    if pages == Pages::Transparent {
        // SAFETY: our own mapping; only a hint.
        let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxHugepage) };
    }
    // SAFETY: our own mapping. Guest memory in a core dump helps nobody and takes minutes.
    let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontDump) };
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn small_ram_is_one_range_aligned_for_huge_pages() {
        let ram = GuestRam::new(&FdStore::new(), 128 << 20, Pages::Small).unwrap();
        assert_eq!(ram.ranges().len(), 1);
        assert_eq!(ram.ranges()[0].hva % HUGE, 0);
        ram.memory().write_obj(0x1234_5678u32, GuestAddress(0x1000)).unwrap();
        assert_eq!(ram.memory().read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0x1234_5678);
    }

    #[test]
    fn a_full_table_of_files_is_not_laid_on_huge_pages() {
        assert!(no_memfd(Errno::MFILE, Pages::Huge(HUGE)).contains("RLIMIT_NOFILE"));
        assert!(no_memfd(Errno::MFILE, Pages::Small).contains("RLIMIT_NOFILE"));
        assert!(no_memfd(Errno::INVAL, Pages::Huge(HUGE)).contains("huge pages"));
        assert!(!no_memfd(Errno::PERM, Pages::Small).contains("huge pages"));
    }

    #[test]
    fn big_ram_leaves_the_hole() {
        let ram = GuestRam::new(&FdStore::new(), 6 << 30, Pages::Small).unwrap();
        let ranges: Vec<_> = ram.ranges().iter().map(|r| (r.gpa, r.size, r.offset)).collect();
        assert_eq!(ranges, [(0, 3 << 30, 0), (4 << 30, 3 << 30, 3 << 30)]);
    }

    #[test]
    fn a_second_mapping_sees_the_same_pages() {
        let fd_store = FdStore::new();
        let old = GuestRam::new(&fd_store, 128 << 20, Pages::Small).unwrap();
        old.memory().write_obj(7u64, GuestAddress(0x10_0000)).unwrap();
        let new = GuestRam::map_again(old.save().0, old.memfd.clone(), old.pages()).unwrap();
        assert_ne!(new.ranges()[0].hva, old.ranges()[0].hva);
        assert_eq!(new.memory().read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 7);
        new.populate_page_tables(|| true).unwrap();
    }

    #[test]
    fn huge_pages_that_are_not_there_are_not_promised() {
        let all = GuestRam::new(&FdStore::new(), 1 << 40, Pages::Huge(HUGE));
        let error = all.err().expect("nobody has a TiB of them").to_string();
        // The second: this kernel has none at all.
        assert!(
            error.contains("huge pages of 2048 KiB are needed, the pool has") || error.contains("memfd"),
            "{error}"
        );
    }

    #[test]
    fn population_allocates_nothing() {
        let ram = GuestRam::new(&FdStore::new(), 128 << 20, Pages::Small).unwrap();
        let blocks = || rustix::fs::fstat(&ram.memfd).unwrap().st_blocks;
        ram.populate_page_tables(|| true).unwrap();
        assert_eq!(blocks(), 0);
        for mib in [1, 2, 127] {
            ram.memory().write_obj(1u8, GuestAddress(mib << 20)).unwrap();
        }
        let touched = blocks();
        assert!(touched > 0);
        ram.populate_page_tables(|| true).unwrap();
        assert_eq!(blocks(), touched);
    }
}
