//! What an operator has set on the PID that everybody knows: it reaches the keeper only, and counts for its VMM. A new
//! VMM inherits it; this is for one that was there before.

use std::path::PathBuf;

use crate::vcpus::placement::Placement;

const LIMITS: libc::__rlimit_resource_t = libc::RLIMIT_RTTIME + 1;

/// Before a guest is booted: cgroup, limits, affinity, scheduling policy and nice value. The threads of this process
/// have them then, and so will those of the vCPUs.
pub(crate) fn take_over() {
    let keeper = super::pid();
    if keeper == std::process::id() {
        return;
    }
    join_cgroup(keeper);
    take_over_limits();
    let (theirs, own) = (Placement::of(keeper as libc::pid_t), Placement::of(std::process::id() as libc::pid_t));
    if theirs.is_scheduled_as(&own) {
        return;
    }
    for entry in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        if let Ok(tid) = entry.file_name().to_string_lossy().parse::<libc::pid_t>()
            && let Err(error) = theirs.schedule(tid)
        {
            log::warn!("thread {tid} is not scheduled as process {keeper} is: {error}");
        }
    }
}

/// Before an update too: the new VMM will have them.
pub(crate) fn take_over_limits() {
    let keeper = super::pid() as libc::pid_t;
    for resource in 0..LIMITS {
        let mut both = [libc::rlimit { rlim_cur: 0, rlim_max: 0 }; 2];
        let [theirs, own] = &mut both;
        // SAFETY: the kernel fills in, and then reads, one rlimit each.
        let done = unsafe {
            libc::prlimit(keeper, resource, std::ptr::null(), theirs) == 0
                && libc::prlimit(0, resource, std::ptr::null(), own) == 0
                && ((theirs.rlim_cur, theirs.rlim_max) == (own.rlim_cur, own.rlim_max)
                    || libc::prlimit(0, resource, theirs, std::ptr::null_mut()) == 0)
        };
        if !done {
            let error = std::io::Error::last_os_error();
            log::warn!("limit {resource} (RLIMIT_*) of process {keeper} is not taken over: {error}");
        }
    }
}

/// Version 2, as one process.
fn join_cgroup(keeper: u32) {
    let of = |process: &str| {
        let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
    };
    let Some(theirs) = of(&keeper.to_string()).filter(|theirs| of("self").as_ref() != Some(theirs)) else { return };
    let file = PathBuf::from("/sys/fs/cgroup").join(theirs.trim_start_matches('/')).join("cgroup.procs");
    if let Err(error) = std::fs::write(&file, "0") {
        log::warn!("cannot join the cgroup of process {keeper}: {}: {error}", file.display());
    }
}
