//! Whether a core of this process may be written, and who may look into it (PR_SET_DUMPABLE, prctl(2)). Without it a
//! process of the same user can neither attach a debugger nor read /proc/PID/mem; root can.
//!
//! An exec resets it, so each image says it anew. Files of /proc/self that only the owner may write belong to root
//! then: what a VMM that is not root's has to do there (oom_score_adj) comes before.

/// From now on.
pub(crate) fn forbid() {
    // SAFETY: of this process; takes a number.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
}

#[cfg(test)]
mod tests {
    use crate::sandbox::in_child;

    #[test]
    fn it_is_forbidden_until_an_exec() {
        let dumpable = in_child(|| {
            super::forbid();
            // SAFETY: has no arguments.
            unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }
        });
        assert_eq!(dumpable.code(), Some(0));
    }
}
