//! Where and how the kernel schedules a thread.

use anyhow::{Result, ensure};

/// Where and how a thread is scheduled.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    pub cpus: Vec<usize>,
    pub policy: i32,
    pub nice: i32,
    /// Path of its cgroup (v2), which `put` leaves alone.
    pub cgroup: String,
}

impl Placement {
    pub fn of(tid: i32) -> Result<Self> {
        // SAFETY: the set is plain data of the size given; the others take numbers only.
        let (cpus, policy, nice) = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            ensure!(libc::sched_getaffinity(tid, size_of::<libc::cpu_set_t>(), &mut set) == 0, "affinity of {tid}");
            let cpus = (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect();
            (cpus, libc::sched_getscheduler(tid), libc::getpriority(libc::PRIO_PROCESS, tid as u32))
        };
        let cgroups = std::fs::read_to_string(format!("/proc/{tid}/cgroup"))?;
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_string();
        Ok(Self { cpus, policy, nice, cgroup })
    }

    pub fn put(&self, tid: i32) -> Result<()> {
        // SAFETY: as in `of`.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            for &cpu in &self.cpus {
                libc::CPU_SET(cpu, &mut set);
            }
            ensure!(libc::sched_setaffinity(tid, size_of::<libc::cpu_set_t>(), &set) == 0, "affinity of {tid}");
            let param = libc::sched_param { sched_priority: 0 };
            ensure!(libc::sched_setscheduler(tid, self.policy, &param) == 0, "policy of {tid}");
            ensure!(libc::setpriority(libc::PRIO_PROCESS, tid as u32, self.nice) == 0, "nice of {tid}");
        }
        Ok(())
    }
}
