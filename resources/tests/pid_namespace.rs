//! A program of its own, as it forks: the child has all descriptors of the process for a while, and a socket that
//! another test has closed would still be open in it.

use std::os::unix::net::UnixStream;

use theseus_resources::socket::Peer;

/// In a container the API's clients may be outside of its PID namespace.
#[test]
fn a_peer_of_another_pid_namespace_is_known_by_its_user() {
    let (here, _there) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let own = rustix::process::geteuid().as_raw();
        // SAFETY: of this thread's children only.
        if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
            // Not root.
            return Ok(());
        }
        // SAFETY: the child makes a few system calls, allocates, for which the C library cares at a fork, and
        // exits.
        match unsafe { libc::fork() } {
            0 => {
                let peer = Peer::of(&here);
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(!peer.is_ok_and(|peer| peer.uid == own))) }
            }
            child => {
                let mut status = 0;
                // SAFETY: our own child; the kernel fills in one status.
                unsafe { libc::waitpid(child, &mut status, 0) };
                if status == 0 { Ok(()) } else { Err(status) }
            }
        }
    });
    assert_eq!(thread.join().unwrap(), Ok(()));
}
