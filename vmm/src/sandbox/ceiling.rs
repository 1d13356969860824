//! The ceiling (`--ceiling`): system calls that no build of ours makes, now or later, refused to the keeper, to every
//! VMM, and to all that they start. Threads have narrower filters of their own, which end with their image; the main
//! thread and the keeper have none, as a later image would inherit it, and have this.
//!
//! A refused call fails with EPERM: a later build that should make one after all gets an error, not its death.

use std::collections::BTreeMap;

use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// docs/theseus@.service has the same.
pub(crate) const DENIED: [(&str, libc::c_long); 43] = [
    // Another view of the file system, past what confines this one.
    ("chroot", libc::SYS_chroot),
    ("fsconfig", libc::SYS_fsconfig),
    ("fsmount", libc::SYS_fsmount),
    ("fsopen", libc::SYS_fsopen),
    ("fspick", libc::SYS_fspick),
    ("mount", libc::SYS_mount),
    ("mount_setattr", libc::SYS_mount_setattr),
    ("move_mount", libc::SYS_move_mount),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("open_tree", libc::SYS_open_tree),
    ("pivot_root", libc::SYS_pivot_root),
    ("setns", libc::SYS_setns),
    ("umount2", libc::SYS_umount2),
    ("unshare", libc::SYS_unshare),
    // Other processes.
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("ptrace", libc::SYS_ptrace),
    // Large parts of the kernel that a VMM has nothing to do with.
    ("add_key", libc::SYS_add_key),
    ("bpf", libc::SYS_bpf),
    ("keyctl", libc::SYS_keyctl),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("request_key", libc::SYS_request_key),
    ("userfaultfd", libc::SYS_userfaultfd),
    // The host itself.
    ("acct", libc::SYS_acct),
    ("adjtimex", libc::SYS_adjtimex),
    ("clock_adjtime", libc::SYS_clock_adjtime),
    ("clock_settime", libc::SYS_clock_settime),
    ("delete_module", libc::SYS_delete_module),
    ("finit_module", libc::SYS_finit_module),
    ("init_module", libc::SYS_init_module),
    ("ioperm", libc::SYS_ioperm),
    ("iopl", libc::SYS_iopl),
    ("kexec_file_load", libc::SYS_kexec_file_load),
    ("kexec_load", libc::SYS_kexec_load),
    ("quotactl", libc::SYS_quotactl),
    ("quotactl_fd", 443),
    ("reboot", libc::SYS_reboot),
    ("setdomainname", libc::SYS_setdomainname),
    ("sethostname", libc::SYS_sethostname),
    ("settimeofday", libc::SYS_settimeofday),
    ("swapoff", libc::SYS_swapoff),
    ("swapon", libc::SYS_swapon),
    ("syslog", libc::SYS_syslog),
];

/// Of the x32 ABI, which is the same architecture to a filter (arch/x86/include/uapi/asm/unistd.h).
const X32: libc::c_long = 0x4000_0000;
/// What has a number of its own there (arch/x86/entry/syscalls/syscall_64.tbl): ptrace, kexec_load, process_vm_readv,
/// process_vm_writev.
const X32_ALONE: [libc::c_long; 4] = [521, 528, 539, 540];

#[derive(Debug, thiserror::Error)]
pub(crate) enum CeilingError {
    #[error("--ceiling: the filter cannot be made: {0}")]
    NotMade(#[from] BackendError),
    #[error(
        "--ceiling: the kernel takes no filter: {0}: leave --ceiling out, or use a kernel with CONFIG_SECCOMP_FILTER"
    )]
    NotTaken(#[from] seccompiler::Error),
}

fn program() -> Result<BpfProgram, BackendError> {
    let numbers = DENIED.iter().map(|(_, number)| *number);
    let x32 = numbers.clone().chain(X32_ALONE).map(|number| number | X32);
    // Whatever its arguments.
    let rules: BTreeMap<_, _> = numbers.chain(x32).map(|number| (number, Vec::new())).collect();
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, denied, TargetArch::x86_64)?.try_into()
}

/// For this process, which has one thread, and all that it will start, for life. Another ABI, that of 32 bits, ends who
/// uses it.
pub(crate) fn install() -> Result<(), CeilingError> {
    Ok(apply_filter(&program()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::in_child;

    /// All bits: of 32 alone some calls would make an address, or a length of 4 GiB (init_module).
    const NONE: libc::c_long = -1;

    fn call(number: libc::c_long) -> Option<i32> {
        // SAFETY: no address or descriptor is valid that is given: nothing of this process is touched.
        let done = unsafe { libc::syscall(number, NONE, NONE, NONE, NONE, NONE, NONE) };
        (done < 0).then(|| std::io::Error::last_os_error().raw_os_error()).flatten()
    }

    #[test]
    fn each_call_of_the_list_is_refused_and_no_other() {
        let failed = in_child(|| {
            install().unwrap();
            let passed = DENIED.iter().position(|(_, number)| call(*number) != Some(libc::EPERM));
            let others = [libc::SYS_openat, libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_seccomp];
            let refused = others.iter().position(|number| call(*number) == Some(libc::EPERM));
            passed.map_or_else(|| refused.map_or(0, |index| 100 + index as i32), |index| 1 + index as i32)
        });
        assert_eq!(failed.code(), Some(0), "one more than the place in the list");
    }

    #[test]
    fn the_unit_has_the_same_list() {
        let unit = include_str!("../../../docs/theseus@.service");
        let lists = unit.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=~"));
        let mut names: Vec<_> = lists.flat_map(str::split_whitespace).collect();
        names.sort();
        let mut denied = DENIED.map(|(name, _)| name);
        denied.sort();
        assert_eq!(names, denied);
        for line in ["SystemCallErrorNumber=EPERM", "SystemCallArchitectures=native"] {
            assert!(unit.lines().any(|other| other == line), "{line}");
        }
    }
}
