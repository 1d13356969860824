//! Where and how a vCPU thread is scheduled, as an operator may have set it from outside (taskset, chrt, cgroups).
//!
//! New threads inherit main's, so the update saves and restores it thread by thread.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The kernel's CPU mask, in bytes; empty if unknown.
    #[serde(with = "serde_bytes", default)]
    pub affinity: Vec<u8>,
    /// SCHED_*
    #[serde(default)]
    pub policy: i32,
    /// Of the realtime policies.
    #[serde(default)]
    pub priority: i32,
    #[serde(default)]
    pub nice: i32,
    /// Path below /sys/fs/cgroup of the thread's own (threaded, v2) cgroup, where it is not that of the process.
    #[serde(default)]
    pub cgroup: Option<String>,
}

/// Room for 8192 CPUs.
const MASK_BYTES: usize = 1024;

impl Placement {
    /// What cannot be read is left at its default, which [`Placement::apply`] does not touch.
    pub fn of(tid: libc::pid_t) -> Self {
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

    /// Puts the calling thread there, if it is known. What cannot be done is logged: a guest that runs on other CPUs is better than none.
    pub fn apply(&self, index: u32) {
        let report = |what: &str| {
            log::warn!("vCPU {index}: cannot restore its {what}: {}", std::io::Error::last_os_error());
        };
        if let Some(cgroup) = &self.cgroup {
            let file = PathBuf::from("/sys/fs/cgroup").join(cgroup.trim_start_matches('/')).join("cgroup.threads");
            if let Err(error) = std::fs::write(&file, "0") {
                log::warn!("vCPU {index}: cannot go back to its cgroup: {}: {error}", file.display());
            }
        }
        if self.affinity.is_empty() {
            return;
        }
        // SAFETY: the kernel reads as many bytes as we say, for the calling thread.
        let done =
            unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, self.affinity.len(), self.affinity.as_ptr()) };
        if done < 0 {
            report("CPU affinity");
        }
        // The defaults too: main, of which this thread has inherited, may have been given something else.
        let param = libc::sched_param { sched_priority: self.priority };
        // SAFETY: the kernel reads one sched_param, for the calling thread.
        if unsafe { libc::sched_setscheduler(0, self.policy, &param) } < 0 {
            report("scheduling policy");
        }
        // SAFETY: a plain call for the calling thread (PRIO_PROCESS with 0 is the thread on Linux).
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.nice) } < 0 {
            report("nice value");
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
