//! Memory that is given away from its start on, without a lock, and never taken back.

use std::alloc::Layout;
#[cfg(test)]
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use theseus_resources::mapping;

pub(super) struct Arena {
    /// Address of the mapping; 0: there is none.
    start: AtomicUsize,
    size: AtomicUsize,
    used: AtomicUsize,
}

impl Arena {
    pub(super) const fn new() -> Self {
        Self { start: AtomicUsize::new(0), size: AtomicUsize::new(0), used: AtomicUsize::new(0) }
    }

    /// Once, before anybody takes. It costs no memory until then.
    pub(super) fn map(&self, size: usize) -> std::io::Result<()> {
        let start = mapping::for_ever(size)?;
        self.size.store(size, Ordering::Relaxed);
        self.start.store(start.as_ptr() as usize, Ordering::Relaxed);
        Ok(())
    }

    /// Null where there is not that much left.
    pub(super) fn take(&self, layout: Layout) -> *mut u8 {
        let (start, size) = (self.start.load(Ordering::Relaxed), self.size.load(Ordering::Relaxed));
        if start == 0 {
            return std::ptr::null_mut();
        }
        // The first that is aligned, and where it ends.
        let place = |used: usize| {
            let at = start.checked_add(used)?.checked_next_multiple_of(layout.align())? - start;
            let end = at.checked_add(layout.size())?;
            (end <= size).then_some((at, end))
        };
        let found = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(place(used)?.1));
        found.ok().and_then(place).map_or(std::ptr::null_mut(), |(at, _)| (start + at) as *mut u8)
    }

    /// Makes the last that was taken longer or shorter, where it is: a buffer that grows would otherwise take twice its
    /// length. False: it is not the last one, or there is not that much left.
    pub(super) fn resize(&self, memory: *mut u8, layout: Layout, new_size: usize) -> bool {
        let Some(at) = (memory as usize).checked_sub(self.start.load(Ordering::Relaxed)) else { return false };
        let (old, new) = (at.checked_add(layout.size()), at.checked_add(new_size));
        let (Some(old), Some(new)) = (old, new.filter(|new| *new <= self.size.load(Ordering::Relaxed))) else {
            return false;
        };
        // What was used is not given away again, as it may not be zero any more.
        let end = new.max(old);
        self.used.compare_exchange(old, end, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Bytes that are used, and that there are.
    pub(super) fn used(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.size.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.start.load(Ordering::Relaxed);
        start..start + self.size.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn it_is_bounded_and_aligned() {
        let arena = Arena::new();
        arena.map(PAGE).unwrap();
        let start = arena.range().start;
        assert_eq!(arena.take(layout(3, 1)) as usize, start);
        assert_eq!(arena.take(layout(8, 64)) as usize, start + 64);
        assert!(arena.take(layout(PAGE - 71, 1)).is_null(), "one byte too many");
        assert!(arena.take(layout(isize::MAX as usize - 63, 64)).is_null());
        assert_eq!(arena.take(layout(PAGE - 72, 1)) as usize, start + 72, "the refused have taken nothing");
        assert!(arena.take(layout(1, 1)).is_null());
        assert_eq!(arena.used(), (PAGE, PAGE));
        assert!(Arena::new().take(layout(1, 1)).is_null(), "not mapped");
    }

    #[test]
    fn the_last_one_grows_where_it_is() {
        let arena = Arena::new();
        arena.map(PAGE).unwrap();
        let (first, last) = (arena.take(layout(16, 8)), arena.take(layout(16, 8)));
        assert!(!arena.resize(first, layout(16, 8), 32));
        assert!(arena.resize(last, layout(16, 8), 100));
        assert!(!arena.resize(last, layout(100, 8), PAGE - 15), "bounded");
        assert_eq!(arena.used().0, 116);
        assert!(arena.resize(last, layout(100, 8), 10), "shorter");
        assert_eq!(arena.used().0, 116, "what was used is not zero any more");
        let old = Box::new(0u64);
        assert!(!arena.resize(std::ptr::from_ref(&*old) as *mut u8, Layout::new::<u64>(), 16), "not the arena's");
    }

    #[test]
    fn no_two_threads_get_the_same() {
        let arena = Arena::new();
        arena.map(64 * PAGE).unwrap();
        let mut taken: Vec<usize> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1000).map(|_| arena.take(layout(16, 16)) as usize).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        taken.sort_unstable();
        taken.dedup();
        assert_eq!((taken.len(), taken.first()), (4000, Some(&arena.range().start)));
    }
}
