//! The host's pool of huge pages: what is in it, and what to write where.

use std::fmt;
use std::path::{Path, PathBuf};

const POOLS: &str = "/sys/kernel/mm/hugepages";
/// It is for a message: a guest that goes on and on has it a few pages off.
const TRIES: u32 = 100;

/// What the kernel says of the pool of one size (Documentation/admin-guide/mm/hugetlbpage.rst), when it could not give
/// `wanted` pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    folder: PathBuf,
    bytes: u64,
    wanted: u64,
    /// All, those that nobody has, and those of them that are promised to somebody.
    pages: u64,
    free: u64,
    reserved: u64,
}

impl Pool {
    /// Reads that of pages of `bytes` bytes. What cannot be read counts as 0: it is for a message.
    pub fn of(bytes: u64, wanted: u64) -> Self {
        Self::read(&Path::new(POOLS).join(format!("hugepages-{}kB", bytes >> 10)), bytes, wanted)
    }

    fn read(folder: &Path, bytes: u64, wanted: u64) -> Self {
        let number = |file: &str| {
            let text = std::fs::read_to_string(folder.join(file));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        // A guest that touches its pages takes from both while they are read: only those between two equal readings
        // belong together.
        let (mut free, mut reserved) = (0, number("resv_hugepages"));
        for _ in 0..TRIES {
            free = number("free_hugepages");
            let before = std::mem::replace(&mut reserved, number("resv_hugepages"));
            if reserved == before {
                break;
            }
        }
        Self { folder: folder.to_owned(), bytes, wanted, pages: number("nr_hugepages"), free, reserved }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { folder, bytes, wanted, pages, free, reserved } = self;
        let left = free.saturating_sub(*reserved);
        write!(
            f,
            "{wanted} huge pages of {} KiB are needed, the pool has {pages}, of which {left} are neither in use nor \
             reserved: ",
            bytes >> 10
        )?;
        match wanted.saturating_sub(left) {
            // hugetlb.*.rsvd.max of the cgroup, or a cpuset whose nodes have none.
            0 => write!(f, "does a cgroup or a cpuset of this process limit them?"),
            missing => {
                let to = pages.saturating_add(missing);
                write!(
                    f,
                    "write {to} to {} and see that it holds, or take hugepages=off",
                    folder.join("nr_hugepages").display()
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_write_counts_what_others_have() {
        let dir = tempfile::tempdir().unwrap();
        for (file, number) in [("nr_hugepages", "100\n"), ("free_hugepages", "60\n"), ("resv_hugepages", "20\n")] {
            std::fs::write(dir.path().join(file), number).unwrap();
        }
        let said = Pool::read(dir.path(), 2 << 20, 64).to_string();
        assert!(said.contains("has 100, of which 40 are") && said.contains("write 124 to "), "{said}");
        assert!(Pool::read(dir.path(), 2 << 20, 40).to_string().contains("cgroup or a cpuset"));
        assert!(Pool::read(Path::new("/nowhere"), 2 << 20, 1).to_string().contains("has 0"));
    }
}
