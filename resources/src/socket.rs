//! Unix sockets for those they are meant for, and nobody else: made private from the first moment on, and peers known
//! by who they are.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Only the owner may connect, whatever the umask.
pub const PRIVATE: u32 = 0o600;

/// Makes a stream socket that listens at `path`, in place of one that nobody listens on any more (nobody unlinks it at
/// exit, as after an update it belongs to the next image). Only who `mode` and, if it is given, the group let may
/// connect, and before it listens nobody can.
///
/// # Errors
/// Name the path: when something else is there, or somebody answers.
pub fn listen(path: &Path, mode: u32, group: Option<u32>, backlog: i32) -> io::Result<OwnedFd> {
    let failed = |what: &str, e: Errno| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("{}: {what}: {e}", path.display()))
    };
    let refuse = |what: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display())));
    let new = || {
        // Not blocking: a server that is there may have a full backlog.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed("cannot make a socket", e))
    };
    let address = SocketAddrUnix::new(path).map_err(|e| failed("not a socket path (at most 107 bytes)", e))?;
    match rustix::fs::lstat(path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return refuse("there is a file which is not a socket: choose another path for the socket");
        }
        Ok(_) => match rustix::net::connect(&new()?, &address) {
            Ok(()) | Err(Errno::AGAIN) => return refuse("the socket is being served: is another theseus using it?"),
            Err(Errno::CONNREFUSED) => {
                rustix::fs::unlink(path).map_err(|e| failed("a stale socket cannot be removed", e))?;
            }
            Err(e) => return Err(failed("the socket is there and cannot be tried", e)),
        },
        Err(_) => {}
    }
    let listener = new()?;
    // The file that bind makes gets this mode (net/unix/af_unix.c, unix_bind_bsd), less the umask.
    rustix::fs::fchmod(&listener, Mode::from_raw_mode(PRIVATE & mode))
        .map_err(|e| failed("cannot make it private", e))?;
    rustix::net::bind(&listener, &address)
        .map_err(|e| failed("the socket cannot be made (does the folder exist?)", e))?;
    open_to(path, mode, group).map_err(|e| failed("the socket's mode or group cannot be set", e))?;
    rustix::net::listen(&listener, backlog).map_err(|e| failed("cannot listen", e))?;
    Ok(listener)
}

/// By an fd of the file: the name may lead elsewhere by now.
fn open_to(path: &Path, mode: u32, group: Option<u32>) -> rustix::io::Result<()> {
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::Socket {
        return Err(Errno::NOTSOCK);
    }
    if let Some(group) = group {
        rustix::fs::chownat(&file, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
    }
    rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), Mode::from_raw_mode(mode))
}

/// Why `fd` cannot be served as a listening unix stream socket.
pub fn not_listening(fd: impl AsFd) -> Option<&'static str> {
    match sockopt::socket_domain(&fd) {
        Err(Errno::BADF) => Some("is not open: who started this process has to leave it open"),
        Err(_) => Some("is not a socket"),
        Ok(domain) if domain != AddressFamily::UNIX => Some("is not a unix socket"),
        Ok(_) if sockopt::socket_type(&fd) != Ok(SocketType::STREAM) => Some("is not a stream socket"),
        Ok(_) if sockopt::socket_acceptconn(&fd) != Ok(true) => Some("does not listen: call listen before"),
        Ok(_) => None,
    }
}

/// Who is at the other end, as the kernel noted it when they connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The effective one.
    pub uid: u32,
    /// The process' own group, and those that it has beside it.
    pub gids: Vec<u32>,
}

impl Peer {
    /// Of a connected unix socket (SO_PEERCRED, SO_PEERGROUPS).
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let credentials = credentials(&fd)?;
        let mut gids = groups(&fd)?;
        gids.push(credentials.gid);
        Ok(Self { uid: credentials.uid, gids })
    }
}

/// SO_PEERCRED (unix(7)). By libc: rustix has no place for the PID 0 of a peer outside of this process's PID namespace,
/// as that of a container.
fn credentials(fd: &impl AsFd) -> io::Result<libc::ucred> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, one ucred, and into `len` how many.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &mut len,
        )
    };
    if result != 0 || len as usize != size_of::<libc::ucred>() {
        return Err(io::Error::last_os_error());
    }
    Ok(credentials)
}

/// SO_PEERGROUPS (unix(7)).
fn groups(fd: &impl AsFd) -> io::Result<Vec<u32>> {
    // NGROUPS_MAX
    let mut groups = vec![0u32; 1 << 16];
    let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `groups`, and into `len` how many.
    let result = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(len as usize / size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_socket_is_private_unless_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // The umask of a careless starter; one of another test that is looser does no harm.
        let before = rustix::process::umask(Mode::empty());
        let private = listen(&path, PRIVATE, None, 8);
        rustix::process::umask(before);
        let private = private.unwrap();
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(not_listening(&private), None);
        let error = listen(&path, PRIVATE, None, 8).unwrap_err().to_string();
        assert!(error.contains("being served"), "{error}");
        drop(private);

        let group = rustix::process::getegid().as_raw();
        let _open = listen(&path, 0o660, Some(group), 8).unwrap();
        assert_eq!((mode_of(&path), std::fs::metadata(&path).unwrap().gid()), (0o660, group));
        let client = UnixStream::connect(&path).unwrap();
        let peer = Peer::of(&client).unwrap();
        assert!(peer.uid == rustix::process::geteuid().as_raw() && peer.gids.contains(&group), "{peer:?}");
    }

    #[test]
    fn no_server_with_a_full_backlog_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _busy = listen(&path, PRIVATE, None, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let error = listen(&path, PRIVATE, None, 0).unwrap_err().to_string();
        assert!(error.contains("being served"), "{error}");
    }

    #[test]
    fn what_does_not_listen_is_found_out() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(not_listening(&one).unwrap().contains("does not listen"));
        assert!(not_listening(std::fs::File::open("/dev/null").unwrap()).unwrap().contains("not a socket"));
        let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(not_listening(&inet).unwrap().contains("not a unix socket"));
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert!(not_listening(&datagram).unwrap().contains("not a stream"));
    }
}
