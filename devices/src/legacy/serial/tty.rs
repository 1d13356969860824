//! Terminal settings of the host's side of the serial port.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use serde::{Deserialize, Serialize};
use theseus_resources::fd_store::StoredFd;
use vmm_sys_util::signal::{block_signal, unblock_signal};

/// The settings of a terminal, a `termios` that can be serialised (termios(3)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTermios {
    iflag: u32,
    oflag: u32,
    cflag: u32,
    lflag: u32,
    line: u8,
    #[serde(with = "serde_bytes")]
    cc: Vec<u8>,
    ispeed: u32,
    ospeed: u32,
}

impl SavedTermios {
    /// None where `fd` is no terminal.
    pub fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        get(fd).ok().map(|termios| save(&termios))
    }

    /// Sets the terminal so again, unless another job has it now, which sets it as it likes.
    pub fn put_back(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        if is_anothers(fd) {
            return Ok(());
        }
        set(fd, &load(get(fd)?, self))
    }
}

/// A terminal in raw mode; dropping it puts back the settings it had before. An exec does not drop it: the next image
/// takes it over with the settings to put back.
pub(super) struct RawMode {
    fd: StoredFd,
    before: SavedTermios,
}

impl RawMode {
    pub(super) fn enter(fd: StoredFd) -> std::io::Result<Self> {
        let before = get(fd.as_fd())?;
        make_raw(fd.as_fd())?;
        Ok(Self { fd, before: save(&before) })
    }

    /// The terminal is raw already, unless an image that failed to start has put it back. One that has hung up is no
    /// reason for a guest not to go on.
    pub(super) fn resume(fd: StoredFd, before: SavedTermios) -> Self {
        let this = Self { fd, before };
        this.renew();
        this
    }

    /// Raw again, where another job may have had the terminal meanwhile; one that has it still sets it as it likes.
    pub(super) fn renew(&self) {
        if !is_anothers(self.fd.as_fd())
            && let Err(error) = make_raw(self.fd.as_fd())
        {
            log::warn!("serial: the terminal stays as it is: {error}");
        }
    }

    pub(super) fn before(&self) -> &SavedTermios {
        &self.before
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(error) = self.before.put_back(self.fd.as_fd()) {
            log::warn!("serial: cannot restore the terminal: {error}: `reset` does");
        }
    }
}

/// Whether another job of this session has the terminal, so that reading from it is an error (tty_ioctl.c,
/// job_control). Not so where it is of another session (ENOTTY), or has hung up (EIO).
pub(super) fn is_anothers(fd: BorrowedFd<'_>) -> bool {
    rustix::termios::tcgetpgrp(fd).is_ok_and(|job| job != rustix::process::getpgrp())
}

/// No echo, no line editing, no signals: every byte goes through as it is.
pub(super) fn make_raw(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut termios = get(fd)?;
    // SAFETY: changes only the struct it is given.
    unsafe { libc::cfmakeraw(&mut termios) };
    set(fd, &termios)
}

fn get(fd: BorrowedFd<'_>) -> std::io::Result<libc::termios> {
    let mut termios = std::mem::MaybeUninit::uninit();
    // SAFETY: the pointer is valid for a termios, which is complete when 0 is returned.
    unsafe {
        if libc::tcgetattr(fd.as_raw_fd(), termios.as_mut_ptr()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(termios.assume_init())
    }
}

/// With SIGTTOU blocked, which the terminal driver takes for leave: it would stop a process in the background, an
/// update's pause included.
fn set(fd: BorrowedFd<'_>, termios: &libc::termios) -> std::io::Result<()> {
    let blocked = block_signal(libc::SIGTTOU).is_ok();
    // SAFETY: reads a valid termios.
    let result = match unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, termios) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    if blocked {
        let _ = unblock_signal(libc::SIGTTOU);
    }
    result
}

fn save(termios: &libc::termios) -> SavedTermios {
    SavedTermios {
        iflag: termios.c_iflag,
        oflag: termios.c_oflag,
        cflag: termios.c_cflag,
        lflag: termios.c_lflag,
        line: termios.c_line,
        cc: termios.c_cc.to_vec(),
        ispeed: termios.c_ispeed,
        ospeed: termios.c_ospeed,
    }
}

fn load(mut termios: libc::termios, saved: &SavedTermios) -> libc::termios {
    let SavedTermios { iflag, oflag, cflag, lflag, line, cc, ispeed, ospeed } = saved;
    (termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag) = (*iflag, *oflag, *cflag, *lflag);
    (termios.c_line, termios.c_ispeed, termios.c_ospeed) = (*line, *ispeed, *ospeed);
    for (to, from) in termios.c_cc.iter_mut().zip(cc) {
        *to = *from;
    }
    termios
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use theseus_resources::fd_store::{FdKind, FdStore};

    #[test]
    fn the_terminal_is_as_before_afterwards() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let tty = FdStore::new().keep("tty", FdKind::Console, ioctl_tiocgptpeer(&master, flags).unwrap());
        let before = save(&get(tty.as_fd()).unwrap());
        let raw = RawMode::enter(tty.clone()).unwrap();
        assert_eq!(raw.before(), &before);
        assert_eq!(get(tty.as_fd()).unwrap().c_lflag & (libc::ECHO | libc::ICANON | libc::ISIG), 0);
        drop(RawMode::resume(tty.clone(), before.clone()));
        assert_eq!(save(&get(tty.as_fd()).unwrap()), before);
        drop(raw);
        assert_eq!(save(&get(tty.as_fd()).unwrap()), before);
        drop(master);
        assert!(make_raw(tty.as_fd()).is_err(), "it has hung up");
        assert_eq!(RawMode::resume(tty, before.clone()).before(), &before);
    }
}
