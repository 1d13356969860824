//! What /proc says about a process from outside.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::harness::{capabilities::CAP_IPC_LOCK, wait_for};

/// What an update must not let grow.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// What each open descriptor refers to, numbers of anonymous things taken off, and how often.
    pub fds: BTreeMap<String, usize>,
    pub threads: BTreeMap<String, usize>,
    /// Mappings by name, and how often.
    pub mappings: BTreeMap<String, usize>,
    pub children: usize,
    /// Locked or pinned memory, KiB.
    pub locked_kib: u64,
    /// Resident memory without the guest's, KiB.
    pub own_rss_kib: u64,
}

impl Facts {
    pub fn of(pid: u32) -> Result<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(dir.join("status")).with_context(|| format!("process {pid} is gone"))?;
        let mut facts = Self {
            fds: BTreeMap::new(),
            threads: BTreeMap::new(),
            mappings: BTreeMap::new(),
            children: children(pid)?.len(),
            locked_kib: status_kib(&status, "VmLck:"),
            own_rss_kib: 0,
        };
        for (_, target) in links(&dir.join("fd"))? {
            *facts.fds.entry(without_number(&target)).or_default() += 1;
        }
        for (_, name) in threads(pid)? {
            *facts.threads.entry(name).or_default() += 1;
        }
        let mut is_guest = false;
        for line in fs::read_to_string(dir.join("smaps"))?.lines() {
            if let Some(rss) = line.strip_prefix("Rss:") {
                facts.own_rss_kib += if is_guest { 0 } else { kib(rss) };
            } else if line.split(' ').next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
                // The name is the sixth column.
                let name = line.split_whitespace().nth(5).unwrap_or("anonymous");
                is_guest = name.starts_with("/memfd:guest-ram");
                *facts.mappings.entry(name.to_string()).or_default() += 1;
            }
        }
        Ok(facts)
    }

    /// Those of the keeper too, by names of their own.
    pub fn with_keeper(mut self, keeper: Self) -> Self {
        let Self { fds, threads, mappings, children, locked_kib, own_rss_kib } = keeper;
        let named =
            |counts: BTreeMap<String, usize>| counts.into_iter().map(|(name, n)| (format!("keeper: {name}"), n));
        self.fds.extend(named(fds));
        self.threads.extend(named(threads));
        self.mappings.extend(named(mappings));
        self.children += children;
        self.locked_kib += locked_kib;
        self.own_rss_kib += own_rss_kib;
        self
    }

    pub fn fd_count(&self) -> usize {
        self.fds.values().sum()
    }

    pub fn thread_count(&self) -> usize {
        self.threads.values().sum()
    }

    pub fn mapping_count(&self) -> usize {
        self.mappings.values().sum()
    }

    /// Growth of the VMM's own resident memory that counts as flat, KiB: every update starts a process anew, and one
    /// huge page more or less in its heap is the kernel's choice.
    pub const FLAT_KIB: u64 = 1024 + 2048;

    /// What differs from `before` by more than is allowed, in words; empty if nothing. `rss_kib`: growth that is still
    /// flat.
    pub fn growth_since(&self, before: &Self, rss_kib: u64) -> String {
        let mut text = String::new();
        for (what, then, now) in [
            ("fds", &before.fds, &self.fds),
            ("threads", &before.threads, &self.threads),
            ("mappings", &before.mappings, &self.mappings),
        ] {
            if then.values().sum::<usize>() != now.values().sum::<usize>() {
                let _ = write!(text, "{what} ");
                for key in then.keys().chain(now.keys().filter(|k| !then.contains_key(*k))) {
                    let (a, b) = (then.get(key).unwrap_or(&0), now.get(key).unwrap_or(&0));
                    if a != b {
                        let _ = write!(text, "[{key}: {a} -> {b}] ");
                    }
                }
            }
        }
        if self.children != before.children {
            let _ = write!(text, "children {} -> {} ", before.children, self.children);
        }
        if self.locked_kib != before.locked_kib {
            let _ = write!(text, "VmLck {} -> {} KiB ", before.locked_kib, self.locked_kib);
        }
        if self.own_rss_kib > before.own_rss_kib + rss_kib {
            let _ = write!(text, "resident memory {} -> {} KiB ", before.own_rss_kib, self.own_rss_kib);
        }
        text
    }
}

fn without_number(target: &str) -> String {
    target.split_once(":[").map_or(target, |(kind, _)| kind).to_string()
}

fn kib(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn status_kib(status: &str, key: &str) -> u64 {
    status.lines().find_map(|line| line.strip_prefix(key)).map_or(0, kib)
}

/// Descriptors and where they lead; those that vanish meanwhile are left out.
fn links(dir: &Path) -> io::Result<Vec<(String, String)>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(dir)?.flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            links.push((entry.file_name().to_string_lossy().into_owned(), target.to_string_lossy().into_owned()));
        }
    }
    Ok(links)
}

/// Numbers of the descriptors that lead to something whose name starts with `prefix`, ascending.
pub fn fds_to(pid: u32, prefix: &str) -> Result<Vec<i32>> {
    let mut numbers: Vec<i32> = links(&PathBuf::from(format!("/proc/{pid}/fd")))?
        .into_iter()
        .filter(|(_, target)| target.starts_with(prefix))
        .filter_map(|(number, _)| number.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Threads by id and name.
pub fn threads(pid: u32) -> Result<Vec<(i32, String)>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let (Ok(tid), Ok(name)) =
            (entry.file_name().to_string_lossy().parse(), fs::read_to_string(entry.path().join("comm")))
        else {
            continue;
        };
        threads.push((tid, name.trim().to_string()));
    }
    Ok(threads)
}

/// The thread called `name`.
pub fn thread_named(pid: u32, name: &str) -> Result<i32> {
    let found = threads(pid)?;
    found
        .iter()
        .find(|(_, n)| n == name)
        .map(|(tid, _)| *tid)
        .with_context(|| format!("no thread '{name}' in process {pid}; there are {found:?}"))
}

/// Processes whose parent is `pid`, zombies too.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(child) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name may hold anything, so the fields are counted from its end: state, parent.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        if parent == Some(pid) {
            children.push(child);
        }
    }
    Ok(children)
}

/// The child of `pid` that was started last.
pub fn newest_child(pid: u32) -> Result<Option<u32>> {
    let started = |child: &u32| {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        // Field 22 (proc_pid_stat(5)), counted from the end of the name.
        stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse::<u64>().ok()
    };
    Ok(children(pid)?.into_iter().max_by_key(|child| (started(child), *child)))
}

/// Opens what the first of [`fds_to`] is open on: another open file, of the same memfd or device.
pub fn open_fd_to(pid: u32, prefix: &str, options: &std::fs::OpenOptions) -> Result<std::fs::File> {
    let fds = fds_to(pid, prefix)?;
    let fd = fds.first().with_context(|| format!("process {pid} has no fd to {prefix}"))?;
    Ok(options.open(format!("/proc/{pid}/fd/{fd}"))?)
}

/// What of a process's memory is in huge pages, reserved (hugetlbfs) or transparent (shmem), KiB.
pub fn huge_kib(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    let huge = ["Shared_Hugetlb:", "Private_Hugetlb:", "ShmemPmdMapped:"];
    Ok(text.lines().filter(|line| huge.iter().any(|key| line.starts_with(key))).filter_map(kib).sum())
}

/// Sends a signal to a process that need not be the VMM.
pub fn signal(pid: u32, signal: i32) -> Result<()> {
    // SAFETY: no memory is involved.
    let sent = unsafe { libc::kill(pid as libc::pid_t, signal) };
    ensure!(sent == 0, "signal {signal} to {pid}: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The letter of the state that `pid` is in: R, S, D, T, Z (proc_pid_stat(5)).
pub fn state(pid: u32) -> Result<char> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let state = status.lines().find_map(|line| line.strip_prefix("State:")?.trim_start().chars().next());
    state.with_context(|| format!("process {pid} has no state"))
}

/// CPU time that threads called `name` of `pid` have used, in clock ticks.
pub fn thread_ticks(pid: u32, name: &str) -> Result<u64> {
    let tid = thread_named(pid, name)?;
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let field = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok()).context("short stat line");
    Ok(field(11)? + field(12)?)
}

/// Waits until the VFIO group of the device `bdf` can be opened: whoever was killed may still be resetting it.
pub fn wait_group_free(bdf: &str) -> Result<()> {
    let link = fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group"))
        .with_context(|| format!("{bdf} has no IOMMU group: is there an IOMMU?"))?;
    let group = Path::new("/dev/vfio").join(link.file_name().context("empty link")?);
    wait_for(&format!("{} of {bdf} to be free", group.display()), || {
        match fs::OpenOptions::new().read(true).write(true).open(&group) {
            Ok(_) => Ok(Some(())),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("{}: is {bdf} bound to vfio-pci?", group.display())),
        }
    })
}

/// Address range, file offset and name of every mapping of `pid`.
pub fn maps(pid: u32) -> Result<Vec<(u64, u64, u64, String)>> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(text.lines().filter_map(parse_map).collect())
}

fn parse_map(line: &str) -> Option<(u64, u64, u64, String)> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let offset = words.nth(1)?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(from)?, hex(to)?, hex(offset)?, words.nth(2).unwrap_or_default().to_string()))
}

/// Before an exec: the program has no CAP_IPC_LOCK, and may lock so many bytes.
pub fn bound_locking(bytes: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit lives during the call, and prctl takes numbers only.
    let done = unsafe {
        libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(CAP_IPC_LOCK), 0, 0, 0) == 0
            && libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Before an exec: the soft limit of `resource`.
pub fn bound(resource: libc::__rlimit_resource_t, soft: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit lives during the call.
    if unsafe { libc::setrlimit(resource, &limit) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Before an exec: the program starts with SIGCHLD ignored.
pub fn ignore_children() -> io::Result<()> {
    // SAFETY: no handler is involved.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Before an exec: the program starts with all signals blocked.
pub fn block_signals() -> io::Result<()> {
    let mut all = std::mem::MaybeUninit::uninit();
    // SAFETY: a set of our own, initialised by the first call.
    let failed = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
    };
    if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What thread `tid` of `pid` has blocked, one bit a signal.
pub fn blocked(pid: u32, tid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).context("no SigBlk")?;
    Ok(u64::from_str_radix(mask.trim(), 16)?)
}

/// Sets the soft limit of `resource` for a running process; what it was.
pub fn set_soft_limit(pid: u32, resource: libc::__rlimit_resource_t, soft: u64) -> Result<u64> {
    let pid = pid as libc::pid_t;
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills `old`, which lives during the call.
    let read = unsafe { libc::prlimit(pid, resource, std::ptr::null(), &mut old) };
    ensure!(read == 0, "prlimit of process {pid}: {}", io::Error::last_os_error());
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: old.rlim_max };
    // SAFETY: the kernel reads `limit`, which lives during the call, and writes nothing.
    let written = unsafe { libc::prlimit(pid, resource, &limit, std::ptr::null_mut()) };
    ensure!(written == 0, "prlimit of process {pid} to {soft}: {}", io::Error::last_os_error());
    Ok(old.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_facts() {
        let facts = Facts::of(std::process::id()).unwrap();
        assert!(facts.fd_count() >= 3 && facts.thread_count() >= 1 && facts.mapping_count() > 5, "{facts:?}");
        assert!(facts.own_rss_kib > 100);
        assert_eq!(facts.growth_since(&facts, 0), "");
    }

    #[test]
    fn growth_is_named() {
        let before = Facts::of(std::process::id()).unwrap();
        let mut after = before.clone();
        *after.fds.entry("anon_inode:kvm-vm".into()).or_default() += 1;
        after.own_rss_kib += 5000;
        let growth = after.growth_since(&before, 1000);
        assert!(growth.contains("anon_inode:kvm-vm: 0 -> 1") && growth.contains("resident"), "{growth}");
    }

    #[test]
    fn map_lines() {
        let line = "7f0000000000-7f0020000000 rw-s 00001000 00:01 12345    /memfd:guest-ram (deleted)";
        assert_eq!(parse_map(line), Some((0x7f00_0000_0000, 0x7f00_2000_0000, 0x1000, "/memfd:guest-ram".into())));
        assert_eq!(parse_map("1000-2000 rw-p 00000000 00:00 0"), Some((0x1000, 0x2000, 0, String::new())));
    }
}
