//! The process's own memory, kept so that the pause of an update has few page faults: in an image that has just been started each page
//! it touches first costs one, and they were a quarter of the pause (docs/performance.md).

use std::ffi::c_int;

/// Freed memory of this size stays with the process, in bytes: a saved state of many vCPUs, and what encodes it.
const KEPT: c_int = 4 << 20;
/// What the heap grows by at least, in bytes.
const STEP: c_int = 512 << 10;
/// What a new image needs of its heap and of its main thread's stack until the guest runs, in bytes. The kernel maps 128 KiB of
/// stack at exec (setup_arg_pages); the environment may have some of that.
const HEAP: usize = 256 << 10;
const STACK: usize = 96 << 10;

/// One heap for all threads, which gives nothing back at once: what the rehearsal of an update ([`crate::update::prepare`]) has touched is
/// there for the update itself, and a vCPU's thread makes no arena of its own in the middle of the pause. To be called first of all.
pub fn keep_heap() {
    for (what, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, KEPT),
        (libc::M_TRIM_THRESHOLD, KEPT),
        (libc::M_TOP_PAD, STEP),
    ] {
        // SAFETY: takes no pointer; a value it does not like is ignored.
        unsafe { libc::mallopt(what, value) };
    }
}

/// In an image that an update has started: all pages at once, rather than a fault for each.
pub fn populate() {
    let heap = Vec::<u8>::with_capacity(HEAP);
    touch(heap.as_ptr() as usize, HEAP);
    let here = std::ptr::from_ref(&heap) as usize;
    touch(here.saturating_sub(STACK), STACK);
}

/// The whole pages of the range. Before Linux 5.14 nothing happens.
fn touch(start: usize, len: usize) {
    const PAGE: usize = 4096;
    let first = start.next_multiple_of(PAGE);
    let whole = (start + len).saturating_sub(first) / PAGE * PAGE;
    // SAFETY: makes pages present, and changes no byte of them.
    unsafe { libc::madvise(first as *mut libc::c_void, whole, libc::MADV_POPULATE_WRITE) };
}
