//! Nobody may change the target between its check and its exec: who owns the file, who may write it, and who is writing
//! it.
//!
//! A file of root's that nobody else may write needs nothing more. One of this user's own gets a read lease (fcntl(2),
//! F_SETLEASE): whoever opens it for writing or truncates it waits until the lease is given back, and is seen. A file
//! of anybody else is refused: its owner may make it writable at any time, and no lease can be had on it. From the exec
//! on the kernel itself keeps writers away (ETXTBSY), but for 6.11 and early 6.12 kernels, where the lease lasts until
//! the new VMM is ready.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::StatVfsMountFlags;

const SETUID_OR_SETGID: u32 = 0o6000;
const BY_GROUP: u32 = 0o020;
const BY_OTHERS: u32 = 0o002;

/// fcntl(2); libc lacks it for this platform.
const F_SETSIG: libc::c_int = 10;

/// Why somebody could change the file, or has.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unguarded {
    #[error("belongs to user {owner}, who could change it between check and exec: chown it to {}", runner(*own))]
    OfOthers { owner: u32, own: u32 },
    #[error("is writable by its group, or by others of its ACL: chmod g-w, or it could change between check and exec")]
    ByGroup,
    #[error("is writable by everybody: chmod o-w, or it could change between check and exec")]
    ByOthers,
    #[error("is setuid or setgid: the new image would not run as who runs this one: chmod ug-s")]
    SetId,
    #[error("is on a FUSE file system, whose server may give other bytes at every read: copy it to a local one")]
    Fuse,
    #[error("is open for writing, or its file system gives no leases: close it, or {TO_ROOT}")]
    NotLeased,
    #[error(
        "could change between check and exec, as its file system gives no leases ({0}; sysctl fs.leases-enable is to \
         be 1): {TO_ROOT}, or copy it to a local file system"
    )]
    NoLeases(io::Error),
    #[error("is open for writing: close it (fuser -v tells by whom)")]
    OpenForWriting,
    #[error("was opened for writing, or truncated, after it was checked: put a new build beside it and rename it")]
    Rewritten,
    #[error("cannot be looked at again: {0}")]
    NotSeen(io::Error),
    #[error(transparent)]
    Os(#[from] io::Error),
}

const TO_ROOT: &str = "give it to root (chown root, chmod go-w)";

/// Who may have a file that the user `own` is to run.
fn runner(own: u32) -> String {
    if own == 0 { "root".into() } else { format!("root or to user {own}, who runs this VMM") }
}

/// What of a file decides who can change it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub owner: u32,
    pub mode: u32,
    /// Served by a program of a user, it seems: what is read of it may be something else each time, whoever is said to
    /// own it.
    pub fuse: bool,
}

impl Facts {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        // Mounts that users can make are nosuid (fusermount(1)); virtiofs, which has the same magic number, is the
        // host's and is not.
        let nosuid = rustix::fs::fstatvfs(file)?.f_flag.contains(StatVfsMountFlags::NOSUID);
        let fuse = nosuid && rustix::fs::fstatfs(file)?.f_type == libc::FUSE_SUPER_MAGIC;
        Ok(Self { owner: stat.st_uid, mode: stat.st_mode, fuse })
    }

    /// Every reason against a file that the user `own` is to run.
    pub(super) fn reasons(self, own: u32) -> Vec<Unguarded> {
        let Self { owner, mode, fuse } = self;
        let mut reasons = Vec::new();
        if owner != 0 && owner != own {
            reasons.push(Unguarded::OfOthers { owner, own });
        }
        // With an ACL these bits are its mask: without them no entry of it gives anybody the right to write (acl(5)).
        if mode & BY_GROUP != 0 {
            reasons.push(Unguarded::ByGroup);
        }
        if mode & BY_OTHERS != 0 {
            reasons.push(Unguarded::ByOthers);
        }
        if mode & SETUID_OR_SETGID != 0 {
            reasons.push(Unguarded::SetId);
        }
        if fuse {
            reasons.push(Unguarded::Fuse);
        }
        reasons
    }

    /// Whether who may write it is not enough: its owner is not root, and so it takes a lease.
    pub(super) fn wants_lease(self) -> bool {
        self.owner != 0
    }
}

/// Takes a read lease, which lasts as long as the file is open here or in a process that has inherited it.
pub(super) fn lease(file: &File) -> Result<(), Unguarded> {
    take(file).map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN) => Unguarded::NotLeased,
        _ => Unguarded::NoLeases(error),
    })
}

/// Whether nobody has the file open for writing: of one that is root's by now, somebody else may. Only root may ask.
pub(super) fn nobody_writes(file: &File) -> Result<(), Unguarded> {
    match take(file) {
        Ok(()) => Ok(fcntl(file, libc::F_SETLEASE, libc::F_UNLCK).map(drop)?),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && !is_remote(file) => Err(Unguarded::OpenForWriting),
        // No leases here, and so no answer.
        Err(_) => Ok(()),
    }
}

/// NFS, SMB1, SMB2: they answer EAGAIN where their server gives no delegation.
fn is_remote(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| [0x6969, 0xff53_4d42, 0xfe53_4d42].contains(&(stat.f_type as u32)))
}

fn take(file: &File) -> io::Result<()> {
    // A broken lease is looked for, not waited for: SIGURG is ignored by default, where SIGIO would end the process.
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    fcntl(file, libc::F_SETLEASE, libc::F_RDLCK).map(|_| ())
}

/// Whether a lease that was taken is still there. What breaks it changes nothing as long as it is (lease-break-time, 45
/// s by default).
pub(super) fn lease_holds(file: &File) -> Result<(), Unguarded> {
    match fcntl(file, libc::F_GETLEASE, 0) {
        Ok(libc::F_RDLCK) => Ok(()),
        Ok(_) => Err(Unguarded::Rewritten),
        Err(error) => Err(Unguarded::NotSeen(error)),
    }
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: these commands take a number, and refer to no memory.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn only_root_and_the_own_user_can_change_it() {
        let file = |owner, mode: u32| Facts { owner, mode: 0o100_000 | mode, fuse: false };
        let of = |facts: Facts, own| facts.reasons(own).iter().map(|reason| format!("{reason}; ")).collect::<String>();
        for (owner, own, mode) in [(0, 0, 0o755), (0, 7, 0o755), (7, 7, 0o700), (7, 7, 0o555)] {
            assert_eq!(of(file(owner, mode), own), "", "{owner} {own} {mode:o}");
        }
        assert!(of(file(7, 0o755), 0).contains("belongs to user 7"), "root runs nobody else's");
        assert!(of(file(7, 0o755), 8).contains("chown it to root or to user 8"));
        assert!(of(file(0, 0o775), 0).contains("writable by its group"));
        assert!(of(file(0, 0o757), 0).contains("writable by everybody"));
        assert!(of(file(0, 0o4755), 7).contains("setuid") && of(file(0, 0o2755), 7).contains("setgid"));
        assert!(of(Facts { fuse: true, ..file(0, 0o755) }, 0).contains("FUSE"));
        assert_eq!(file(7, 0o4777).reasons(0).len(), 4, "all of them at once");
        assert!(file(7, 0o755).wants_lease() && !file(0, 0o755).wants_lease());
    }

    fn open(path: &Path, write: bool) -> io::Result<File> {
        File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)
    }

    #[test]
    fn a_writer_is_seen_before_it_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        std::fs::write(&path, "one").unwrap();
        let file = open(&path, false).unwrap();
        lease(&file).unwrap();
        open(&path, false).unwrap();
        lease_holds(&file).unwrap();
        // A copy of the descriptor has it too.
        let copy = file.try_clone().unwrap();
        drop(file);
        assert_eq!(open(&path, true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(lease_holds(&copy).unwrap_err().to_string().contains("opened for writing"));
        drop(copy);

        let file = open(&path, false).unwrap();
        // A child that another test starts has the copy until its exec.
        while lease(&file).is_err() {
            std::thread::yield_now();
        }
        // The lease keeps a caller that waits until it is given back.
        let truncate = std::thread::spawn({
            let path = path.clone();
            move || {
                rustix::fs::open(&path, rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::TRUNC, 0.into()).map(|_| ())
            }
        });
        while lease_holds(&file).is_ok() {
            std::thread::yield_now();
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        drop(file);
        truncate.join().unwrap().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");

        let file = open(&path, false).unwrap();
        nobody_writes(&file).unwrap();
        let _writer = open(&path, true).unwrap();
        assert!(nobody_writes(&file).unwrap_err().to_string().contains("is open for writing"));
        assert!(lease(&file).unwrap_err().to_string().contains("is open for writing"));
    }
}
