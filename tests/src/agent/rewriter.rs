//! Rewrites and verifies an area, page after page, each time with other contents: memory, or a disk.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::proto::MemoryStats;

const WORDS: usize = 512;
/// Pages between two rests: most of the CPU belongs to the streams.
const REST: usize = 16;

/// Aligned as O_DIRECT wants it.
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

/// Where the pages are.
trait Area: Send {
    fn read(&self, number: usize, page: &mut Page) -> io::Result<()>;
    fn write(&mut self, number: usize, page: &Page) -> io::Result<()>;
}

impl Area for Vec<u64> {
    fn read(&self, number: usize, page: &mut Page) -> io::Result<()> {
        page.0.copy_from_slice(&self[number * WORDS..][..WORDS]);
        Ok(())
    }

    fn write(&mut self, number: usize, page: &Page) -> io::Result<()> {
        self[number * WORDS..][..WORDS].copy_from_slice(&page.0);
        Ok(())
    }
}

struct Disk(File);

impl Area for Disk {
    fn read(&self, number: usize, page: &mut Page) -> io::Result<()> {
        // SAFETY: plain bytes of the page.
        let bytes = unsafe { std::slice::from_raw_parts_mut(page.0.as_mut_ptr().cast::<u8>(), size_of::<Page>()) };
        self.0.read_exact_at(bytes, (number * size_of::<Page>()) as u64)
    }

    fn write(&mut self, number: usize, page: &Page) -> io::Result<()> {
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(page.0.as_ptr().cast::<u8>(), size_of::<Page>()) };
        self.0.write_all_at(bytes, (number * size_of::<Page>()) as u64)
    }
}

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    checked: AtomicU64,
    wrong: AtomicU64,
    passes: AtomicU64,
}

pub(super) struct Rewriter {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Rewriter {
    pub(super) fn of_memory(mib: u64, seed: u64) -> io::Result<Self> {
        let pages = (mib * 256) as usize;
        Self::start(vec![0_u64; pages * WORDS], pages, seed)
    }

    /// The first `mib` MiB of the block device at `path`, past every cache of the guest's.
    pub(super) fn of_disk(path: &str, mib: u64, seed: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        Self::start(Disk(file), (mib * 256) as usize, seed)
    }

    fn start(area: impl Area + 'static, pages: usize, seed: u64) -> io::Result<Self> {
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let thread = std::thread::Builder::new().name("rewriter".into()).spawn(move || {
            // SAFETY: plain system call; a lower priority leaves the CPU to the streams.
            unsafe { libc::nice(19) };
            rewrite(area, pages, seed, &shared);
        })?;
        Ok(Self { counts, thread: Some(thread) })
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let Counts { stop: _, checked, wrong, passes } = &*self.counts;
        MemoryStats {
            pages_checked: checked.load(Ordering::Relaxed),
            pages_wrong: wrong.load(Ordering::Relaxed),
            passes: passes.load(Ordering::Relaxed),
        }
    }

    /// Goes through every page once more.
    pub(super) fn stop(mut self) -> MemoryStats {
        self.counts.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.stats()
    }
}

/// An I/O error makes a page wrong, like other contents.
fn rewrite(mut area: impl Area, pages: usize, seed: u64, counts: &Counts) {
    let mut page = Page([0; WORDS]);
    for number in 0..pages {
        fill(&mut page, seed, number, 0);
        let done = area.write(number, &page);
        counts.wrong.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
    }
    for generation in 0.. {
        // Read before the pass: a stop that comes in the middle is followed by one whole pass more.
        let last = counts.stop.load(Ordering::Relaxed);
        for number in 0..pages {
            let read = area.read(number, &mut page);
            let mut good = read.is_ok() && holds(&page, seed, number, generation);
            fill(&mut page, seed, number, generation + 1);
            good &= area.write(number, &page).is_ok();
            counts.wrong.fetch_add(u64::from(!good), Ordering::Relaxed);
            counts.checked.fetch_add(1, Ordering::Relaxed);
            if number % REST == REST - 1 && !last {
                std::thread::sleep(Duration::from_millis(4));
            }
        }
        counts.passes.fetch_add(1, Ordering::Relaxed);
        if last {
            return;
        }
    }
}

/// A cheap mixer (splitmix64's finaliser): every word of every page of every generation differs.
fn word(seed: u64, number: usize, generation: u64, i: usize) -> u64 {
    let mut x = seed ^ (number as u64) << 32 ^ generation << 12 ^ i as u64;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn fill(page: &mut Page, seed: u64, number: usize, generation: u64) {
    for (i, to) in page.0.iter_mut().enumerate() {
        *to = word(seed, number, generation, i);
    }
}

fn holds(page: &Page, seed: u64, number: usize, generation: u64) -> bool {
    page.0.iter().enumerate().all(|(i, &w)| w == word(seed, number, generation, i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_holds_and_damage_is_found() {
        let job = Rewriter::of_memory(1, 7).unwrap();
        let stats = job.stop();
        assert!(stats.pages_wrong == 0 && stats.passes >= 1 && stats.pages_checked >= 256, "{stats:?}");
        let mut page = Page([0; WORDS]);
        fill(&mut page, 1, 2, 3);
        assert!(holds(&page, 1, 2, 3) && !holds(&page, 1, 2, 4) && !holds(&page, 1, 3, 3));
        page.0[511] ^= 1;
        assert!(!holds(&page, 1, 2, 3));
    }

    #[test]
    fn a_disk_that_fails_is_wrong() {
        struct Broken;
        impl Area for Broken {
            fn read(&self, _: usize, _: &mut Page) -> io::Result<()> {
                Err(io::ErrorKind::Other.into())
            }
            fn write(&mut self, _: usize, _: &Page) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(Rewriter::start(Broken, 4, 0).unwrap().stop().pages_wrong >= 4);
    }
}
