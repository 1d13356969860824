//! The process's own memory, kept so that the pause of an update has fewer page faults (docs/performance.md).

use std::ffi::c_int;

/// Freed memory of this size stays with the process, in bytes: a saved state of many vCPUs, and what encodes it.
const KEPT: c_int = 4 << 20;
/// What the heap grows by at least, in bytes.
const STEP: c_int = 512 << 10;

/// One heap for all threads, which gives nothing back at once: what the dry run of an update (update/prepare.rs) has
/// touched is there for the update itself, and a vCPU's thread makes no arena of its own in the middle of the pause. To
/// be called first of all.
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
}

/// What a vCPU takes of the heap in a save or a restore, in bytes: its state, its section, and its part of the whole.
const VCPU: usize = 64 << 10;

/// Makes room for the save or the restore of so many vCPUs, which a dry run leaves out.
pub fn warm(vcpus: usize) {
    let bytes = vcpus.saturating_mul(VCPU).min(KEPT as usize / 2);
    // Written, as zeroes may be pages that nobody has touched; and freed, which leaves them to the heap.
    std::hint::black_box(vec![1u8; bytes]);
}
