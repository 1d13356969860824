//! The process's own memory: kept, so that the pause of an update has fewer page faults (docs/performance.md), and
//! apart from the C library's where all other threads are dead.
//!
//! A thread that dies in malloc leaves its lock held, and whoever outlives it (fork(2) without the C library's
//! handlers, or clone(2) with CLONE_VM) waits for that for ever. So the allocator of this program can be switched, once
//! and for good, to memory that was mapped beforehand and has no lock. What the C library allocates for itself stays
//! with malloc: a survivor opens no folders, starts no threads, and is the first on its thread to use no thread local
//! that has a destructor.

mod arena;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use arena::Arena;

/// Freed memory of this size stays with the process, in bytes: a saved state of many vCPUs, and what encodes it.
const KEPT: c_int = 4 << 20;
/// What the heap grows by at least, in bytes.
const STEP: c_int = 512 << 10;

/// Of the arena, in bytes: address space until it is used. Several times what a save of the largest machine takes,
/// with nothing given back (machine/survivor_tests.rs).
const ARENA: usize = 32 << 20;

#[global_allocator]
static HEAP: Heap = Heap::new();

/// malloc, until it is switched.
struct Heap {
    is_switched: AtomicBool,
    arena: Arena,
}

impl Heap {
    const fn new() -> Self {
        Self { is_switched: AtomicBool::new(false), arena: Arena::new() }
    }

    /// Relaxed: who switches is the only thread, or nobody minds which of the two memories it gets.
    fn is_switched(&self) -> bool {
        self.is_switched.load(Ordering::Relaxed)
    }
}

// SAFETY: both memories keep to the contract, and what one has given is never given back to the other: after the switch
// nothing is given back at all.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.is_switched() {
            return self.arena.take(layout);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if self.is_switched() {
            // Nobody has had it before: it is as the kernel has mapped it.
            return self.arena.take(layout);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if !self.is_switched() {
            // SAFETY: the caller's promise; before the switch all memory is malloc's.
            unsafe { System.dealloc(memory, layout) }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !self.is_switched() {
            // SAFETY: as above.
            return unsafe { System.realloc(memory, layout, new_size) };
        }
        if self.arena.resize(memory, layout, new_size) {
            return memory;
        }
        // SAFETY: the caller promises that the size is none that overflows, and not 0.
        let new = self.arena.take(unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) });
        if !new.is_null() {
            // SAFETY: `memory` is of `layout`, `new` of `new_size`, and nobody else has that.
            unsafe { new.copy_from_nonoverlapping(memory, layout.size().min(new_size)) };
        }
        new
    }
}

/// One heap for all threads, which gives nothing back at once: what the dry run of an update (update/prepare.rs) has
/// touched is there for the update itself, and a vCPU's thread makes no arena of its own in the middle of the pause.
/// Nor does one have to open a file, which it may not: the C library asks /proc/sys/vm/overcommit_memory before it
/// gives back a part of any heap but the first (malloc/arena.c, shrink_heap). To be called first of all.
pub fn keep() {
    for (what, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, KEPT),
        (libc::M_TRIM_THRESHOLD, KEPT),
        (libc::M_TOP_PAD, STEP),
    ] {
        // SAFETY: takes no pointer; a value it does not like is ignored.
        unsafe { libc::mallopt(what, value) };
    }
    // Without one the process has nothing to switch to, and is none the worse for it till then.
    let _ = HEAP.arena.map(ARENA);
}

/// From now on, and for ever, memory comes from the arena that [`keep`] has mapped, without a lock, and none is given
/// back: neither to malloc nor to the arena. Where it is used up, or was not mapped, there is no memory (null).
/// Async-signal-safe.
pub fn switch_to_arena() {
    HEAP.is_switched.store(true, Ordering::Relaxed);
}

/// How many bytes of the arena are used, and how many there are.
pub fn arena_use() -> (usize, usize) {
    HEAP.arena.used()
}

/// What a vCPU takes of the heap in a save or a restore, in bytes: its state, its section, and its part of the whole.
const VCPU: usize = 64 << 10;

/// Makes room for the save or the restore of so many vCPUs, which a dry run leaves out.
pub fn warm(vcpus: usize) {
    let bytes = vcpus.saturating_mul(VCPU).min(KEPT as usize / 2);
    // Written, as zeroes may be pages that nobody has touched; and freed, which leaves them to the heap.
    std::hint::black_box(vec![1u8; bytes]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heap(bytes: usize) -> Heap {
        let heap = Heap::new();
        heap.arena.map(bytes).unwrap();
        heap
    }

    fn is_arenas(heap: &Heap, memory: *mut u8) -> bool {
        heap.arena.range().contains(&(memory as usize))
    }

    #[test]
    fn memory_of_before_the_switch_is_read_and_copied_and_never_freed() {
        let heap = heap(1 << 20);
        let layout = Layout::from_size_align(100, 8).unwrap();
        // SAFETY: all of it is of this heap and of its layout, and is used within its size.
        unsafe {
            let old = heap.alloc(layout);
            assert!(!is_arenas(&heap, old));
            old.write_bytes(7, 100);
            heap.is_switched.store(true, Ordering::Relaxed);
            let moved = heap.realloc(old, layout, 300);
            assert!(is_arenas(&heap, moved));
            assert_eq!(std::slice::from_raw_parts(moved, 100), [7; 100]);
            // malloc would give it to the next who asks for as much.
            heap.dealloc(old, layout);
            let next = System.alloc(layout);
            assert_ne!(next, old);
            assert_eq!(std::slice::from_raw_parts(old, 100), [7; 100]);
            System.dealloc(next, layout);
            heap.dealloc(moved, Layout::from_size_align(300, 8).unwrap());
            let new = heap.alloc_zeroed(layout);
            assert!(is_arenas(&heap, new) && new != moved);
            assert_eq!(std::slice::from_raw_parts(new, 100), [0; 100]);
            System.dealloc(old, layout);
        }
    }

    #[test]
    fn nothing_to_switch_to_is_no_memory() {
        let heap = Heap::new();
        heap.is_switched.store(true, Ordering::Relaxed);
        // SAFETY: a layout that is not empty.
        assert!(unsafe { heap.alloc(Layout::new::<u64>()) }.is_null());
    }
}
