//! Where and how a vCPU thread is scheduled, as an operator may have set it from outside (taskset, chrt, cgroups).
//!
//! New threads inherit main's, so the update saves and restores it thread by thread.

use std::io;
use std::path::PathBuf;

use rustix::process::Resource;

/// What a thread could not be given.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub(crate) struct ScheduleError {
    what: &'static str,
    source: io::Error,
}

#[derive(Debug, thiserror::Error)]
#[error("cpus.affinity {cpus:?}: {source}: are these CPUs online, and in the cpuset of the VMM?")]
pub(crate) struct PinError {
    cpus: Vec<u32>,
    source: ScheduleError,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The kernel's CPU mask, in bytes; empty if unknown.
    pub affinity: Vec<u8>,
    /// SCHED_*
    pub policy: i32,
    /// Of the realtime policies.
    pub priority: i32,
    pub nice: i32,
    /// Path below /sys/fs/cgroup of the thread's own (threaded, v2) cgroup, where it is not that of the process.
    pub cgroup: Option<String>,
}

/// AvailableMemory for 8192 CPUs.
const MASK_BYTES: usize = 1024;

impl Placement {
    /// What cannot be read is left at its default, which [`Placement::apply`] does not touch.
    pub(crate) fn of(tid: libc::pid_t) -> Self {
        let mut affinity = vec![0u8; MASK_BYTES];
        // SAFETY: the kernel writes at most MASK_BYTES bytes and returns how many.
        let len = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, MASK_BYTES, affinity.as_mut_ptr()) };
        affinity.truncate(usize::try_from(len).unwrap_or(0));
        // SAFETY: plain calls on a thread id; a thread that is gone is an error, which reads as the default.
        let policy = unsafe { libc::sched_getscheduler(tid) }.max(0);
        let mut param = libc::sched_param { sched_priority: 0 };
        // SAFETY: the kernel fills one sched_param.
        unsafe { libc::sched_getparam(tid, &mut param) };
        // SAFETY: as above.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, tid as libc::id_t) };
        Self { affinity, policy, priority: param.sched_priority, nice, cgroup: own_cgroup(tid) }
    }

    /// Puts a thread of this process into its cgroup, if it has one of its own: not the calling one, which may open no
    /// file. What cannot be done is logged, as by [`Placement::apply`].
    pub(crate) fn join_cgroup(&self, tid: libc::pid_t, index: u32) {
        let Some(cgroup) = &self.cgroup else { return };
        let file = PathBuf::from("/sys/fs/cgroup").join(cgroup.trim_start_matches('/')).join("cgroup.threads");
        if let Err(error) = std::fs::write(&file, tid.to_string()) {
            log::warn!("vCPU {index}: cannot go back to its cgroup: {}: {error}", file.display());
        }
    }

    /// Schedules the calling thread so, if it is known how. What cannot be done is logged: a guest that runs on other
    /// CPUs is better than none.
    pub(crate) fn apply(&self, index: u32) {
        // The defaults too: main, of which this thread has inherited, may have been given something else.
        if let Err(error) = self.schedule(0) {
            log::warn!("vCPU {index}: cannot be scheduled as it was: {error}");
        }
    }

    /// Whether both say the same of affinity, policy, priority and nice value.
    pub(crate) fn is_scheduled_as(&self, other: &Self) -> bool {
        let of = |it: &Self| (it.affinity.clone(), it.policy, it.priority, it.nice);
        of(self) == of(other)
    }

    /// Gives affinity, policy, priority and nice value to a thread of this process (0: the calling one), if they are
    /// known. The error names one thing that could not be had.
    pub(crate) fn schedule(&self, tid: libc::pid_t) -> Result<(), ScheduleError> {
        if self.affinity.is_empty() {
            return Ok(());
        }
        let mut done = Ok(());
        let mut note = |ok: bool, what| {
            if !ok {
                done = Err(ScheduleError { what, source: io::Error::last_os_error() });
            }
        };
        let affinity = set_affinity(tid, &self.affinity);
        let param = libc::sched_param { sched_priority: self.priority };
        // SAFETY: the kernel reads one sched_param.
        note(unsafe { libc::sched_setscheduler(tid, self.policy, &param) } >= 0, "scheduling policy");
        // SAFETY: a plain call (PRIO_PROCESS is the thread on Linux).
        note(unsafe { libc::setpriority(libc::PRIO_PROCESS, tid as libc::id_t, self.nice) } >= 0, "nice value");
        affinity.and(done)
    }
}

/// `mask`: the kernel's, in bytes.
fn set_affinity(tid: libc::pid_t, mask: &[u8]) -> Result<(), ScheduleError> {
    // SAFETY: the kernel reads as many bytes as we say.
    let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) };
    if result < 0 {
        return Err(ScheduleError { what: "CPU affinity", source: io::Error::last_os_error() });
    }
    Ok(())
}

/// The calling thread runs on these CPUs of the host from now on.
pub(crate) fn pin(cpus: &[u32]) -> Result<(), PinError> {
    let mut mask = vec![0u8; MASK_BYTES];
    for cpu in cpus {
        if let Some(byte) = mask.get_mut(*cpu as usize / 8) {
            *byte |= 1 << (cpu % 8);
        }
    }
    set_affinity(0, &mask).map_err(|source| PinError { cpus: cpus.into(), source })
}

/// What a process may do with the scheduling of its own threads (sched(7), setpriority(2)).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rights {
    /// CAP_SYS_NICE: everything.
    pub sys_nice: bool,
    /// RLIMIT_RTPRIO
    pub rtprio: u64,
    /// The lowest nice value: RLIMIT_NICE's, or what the main thread has anyway.
    pub nice: i32,
}

impl Rights {
    /// `sys_nice`: whether this process has that capability.
    pub(crate) fn of_this_process(sys_nice: bool) -> Self {
        let limit = |resource| rustix::process::getrlimit(resource).current.unwrap_or(u64::MAX);
        let by_limit = 20 - i32::try_from(limit(Resource::Nice).min(40)).unwrap_or(40);
        let main = Placement::of(std::process::id() as libc::pid_t);
        Self { sys_nice, rtprio: limit(Resource::Rtprio), nice: by_limit.min(main.nice) }
    }

    /// Why a new thread could not be put there; somebody with more rights has done it to the one there is.
    pub(crate) fn lack_for(&self, placement: &Placement) -> Option<String> {
        let Placement { affinity: _, policy, priority, nice, cgroup: _ } = placement;
        match *policy {
            libc::SCHED_DEADLINE => Some("SCHED_DEADLINE, which cannot be given to a new thread".into()),
            _ if self.sys_nice => None,
            libc::SCHED_FIFO | libc::SCHED_RR if u64::try_from(*priority).unwrap_or(0) > self.rtprio => Some(format!(
                "realtime priority {priority}, and RLIMIT_RTPRIO is {}: raise it (prlimit --rtprio) or give \
                 CAP_SYS_NICE",
                self.rtprio
            )),
            _ if *nice < self.nice => Some(format!(
                "nice value {nice}, and RLIMIT_NICE allows {}: raise it (prlimit --nice) or give CAP_SYS_NICE",
                self.nice
            )),
            _ => None,
        }
    }
}

/// The thread's cgroup v2 path where it differs from the process's.
fn own_cgroup(tid: libc::pid_t) -> Option<String> {
    let read = |path: String| {
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
    };
    let own = read(format!("/proc/self/task/{tid}/cgroup"))?;
    (Some(&own) != read("/proc/self/cgroup".into()).as_ref()).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_restored_is_known_beforehand() {
        let none = Rights { sys_nice: false, rtprio: 10, nice: 0 };
        let placed = |policy, priority, nice| Placement { policy, priority, nice, ..Default::default() };
        for fine in [placed(libc::SCHED_OTHER, 0, 5), placed(libc::SCHED_FIFO, 10, 0), placed(libc::SCHED_BATCH, 0, 0)]
        {
            assert_eq!(none.lack_for(&fine), None, "{fine:?}");
        }
        for (bad, word) in
            [(placed(libc::SCHED_RR, 11, 0), "RTPRIO"), (placed(libc::SCHED_OTHER, 0, -1), "RLIMIT_NICE")]
        {
            assert!(none.lack_for(&bad).unwrap().contains(word), "{bad:?}");
            assert_eq!(Rights { sys_nice: true, ..none }.lack_for(&bad), None);
        }
        assert!(Rights { sys_nice: true, ..none }.lack_for(&placed(libc::SCHED_DEADLINE, 0, 0)).is_some());
        let own = Rights::of_this_process(false);
        assert_eq!(own.lack_for(&Placement::of(std::process::id() as libc::pid_t)), None, "{own:?}");
    }

    #[test]
    fn what_is_applied_is_read_back() {
        std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let now = Placement::of(tid);
            assert!(!now.affinity.is_empty());
            let mut one = now.clone();
            let first = now.affinity.iter().position(|byte| *byte != 0).unwrap();
            one.affinity.fill(0);
            one.affinity[first] = 1 << now.affinity[first].trailing_zeros();
            one.nice = 3;
            one.policy = libc::SCHED_BATCH;
            one.apply(0);
            assert_eq!(Placement::of(tid), one);
            Placement::default().apply(0);
            assert_eq!(Placement::of(tid), one, "what is unknown is left alone");
            // Back to the defaults, which a thread does not have if main has been given something else.
            one.policy = libc::SCHED_OTHER;
            one.apply(0);
            assert_eq!(Placement::of(tid), one);
        })
        .join()
        .unwrap();
    }
}
