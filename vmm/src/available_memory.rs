//! What a boot or an update can count on: free memory of the host, and what the cgroups (v2) of this process leave it
//! of memory and threads.

use std::fs;
use std::io;
use std::path::Path;

const CGROUPS: &str = "/sys/fs/cgroup";

/// The least there is, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AvailableMemory {
    /// Bytes, or threads.
    pub free: u64,
    /// "the host", or the cgroup and its limit.
    pub of: String,
}

impl AvailableMemory {
    /// The least that a cgroup leaves of huge pages of 2 MiB. Their reservation does not look at that limit, only their
    /// use (mm/hugetlb_cgroup.c).
    pub(crate) fn in_huge_pages() -> Option<Self> {
        in_huge_pages(Path::new(CGROUPS), &own_cgroup())
    }

    /// The least that a cgroup leaves of threads, in all its processes.
    pub(crate) fn in_threads() -> Option<Self> {
        in_threads(Path::new(CGROUPS), &own_cgroup())
    }

    pub(crate) fn of_this_process() -> io::Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let available = field(&meminfo, "MemAvailable:").and_then(|kib| kib.parse::<u64>().ok());
        let available = available.ok_or_else(|| io::Error::other("no MemAvailable"))?;
        let host = Self { free: available.saturating_mul(1024), of: "the host".into() };
        let left = in_cgroups(Path::new(CGROUPS), &own_cgroup());
        Ok(left.into_iter().fold(host, |least, room| if room.free < least.free { room } else { least }))
    }
}

/// The first word behind `key` at the start of a line.
pub(crate) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()
}

/// For each cgroup from `own` up that has a limit.
fn in_cgroups(root: &Path, own: &str) -> Vec<AvailableMemory> {
    each_cgroup(own).filter_map(|path| in_cgroup(&root.join(path), path)).collect()
}

fn each_cgroup(own: &str) -> impl Iterator<Item = &Path> {
    Path::new(own.trim_start_matches('/')).ancestors()
}

/// Without cgroup v2 there is no such line, and no such limit.
fn own_cgroup() -> String {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").to_owned()
}

fn in_huge_pages(root: &Path, own: &str) -> Option<AvailableMemory> {
    least(root, own, "hugetlb.2MB", |bytes| format!("{} MiB", bytes >> 20))
}

fn in_threads(root: &Path, own: &str) -> Option<AvailableMemory> {
    least(root, own, "pids", |threads| threads.to_string())
}

/// Of what all cgroups from `own` up leave of a resource. `show`: their limits.
fn least(root: &Path, own: &str, resource: &str, show: impl Fn(u64) -> String) -> Option<AvailableMemory> {
    let left = each_cgroup(own).filter_map(|path| {
        let number = |file: &str| {
            let text = fs::read_to_string(root.join(path).join(format!("{resource}.{file}")));
            text.ok()?.trim().parse::<u64>().ok()
        };
        let limit = number("max")?;
        let free = limit.saturating_sub(number("current")?);
        Some(AvailableMemory { free, of: format!("the cgroup /{} ({resource}.max {})", path.display(), show(limit)) })
    });
    left.min_by_key(|room| room.free)
}

fn in_cgroup(dir: &Path, name: &Path) -> Option<AvailableMemory> {
    let read = |file: &str| fs::read_to_string(dir.join(file)).ok();
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    // "max", or no such file at the root: no limit.
    let limit = number("memory.max")?;
    let used = number("memory.current")?;
    // File pages go when memory is needed; shared memory counts as anonymous here.
    let stat = read("memory.stat").unwrap_or_default();
    let pages = |key: &str| field(&stat, key).and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0);
    let files = pages("active_file ").saturating_add(pages("inactive_file "));
    let free = limit.saturating_sub(used.saturating_sub(files));
    Some(AvailableMemory { free, of: format!("the cgroup /{} (memory.max {} MiB)", name.display(), limit >> 20) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cgroup_up_to_the_root_counts() {
        let root = tempfile::tempdir().unwrap();
        let put = |dir: &str, file: &str, text: &str| {
            fs::create_dir_all(root.path().join(dir)).unwrap();
            fs::write(root.path().join(dir).join(file), text).unwrap();
        };
        put("pods", "memory.max", "1073741824\n");
        put("pods", "memory.current", "943718400\n");
        put("pods/guest", "memory.max", "max\n");
        put("pods/guest", "memory.current", "943718400\n");
        let room = in_cgroups(root.path(), "/pods/guest");
        assert_eq!(room.len(), 1);
        assert_eq!((room[0].free, room[0].of.as_str()), (124 << 20, "the cgroup /pods (memory.max 1024 MiB)"));
        put("pods", "memory.stat", "anon 5\nfile 7\ninactive_file 1048576\nactive_file 1048576\n");
        assert_eq!(in_cgroups(root.path(), "/pods/guest")[0].free, 126 << 20);
        put("pods/guest", "memory.max", "943718400\n");
        assert_eq!(in_cgroups(root.path(), "/pods/guest")[0].free, 0);
        assert!(in_cgroups(root.path(), "/").is_empty());
        assert_eq!(in_huge_pages(root.path(), "/pods/guest"), None);
        put("pods/guest", "hugetlb.2MB.max", "max\n");
        put("pods", "hugetlb.2MB.max", "1073741824\n");
        put("pods", "hugetlb.2MB.current", "1071644672\n");
        assert_eq!(in_huge_pages(root.path(), "/pods/guest").unwrap().free, 2 << 20);
        assert_eq!(in_threads(root.path(), "/pods/guest"), None);
        put("pods/guest", "pids.max", "40\n");
        put("pods/guest", "pids.current", "33\n");
        put("pods", "pids.max", "9000\n");
        put("pods", "pids.current", "34\n");
        let threads = in_threads(root.path(), "/pods/guest").unwrap();
        assert_eq!((threads.free, threads.of.as_str()), (7, "the cgroup /pods/guest (pids.max 40)"));
    }

    #[test]
    fn this_process_has_room() {
        let room = AvailableMemory::of_this_process().unwrap();
        assert!(room.free > 0 && room.free < u64::MAX, "{room:?}");
    }
}
