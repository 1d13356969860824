//! Opening the back ends, at boot.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::pty::OpenptFlags;
use theseus_resources::fd_store::{FdKind, FdStore};
use theseus_resources::socket;

use super::console::{Backend, Console};
use super::stream::Stream;
use super::tty::{RawMode, is_anothers, make_raw};
use crate::spec::ConsoleConfig;

#[derive(Debug, thiserror::Error)]
#[error("serial {what}: {source}")]
pub struct ConsoleError {
    what: String,
    source: std::io::Error,
}

/// Names what was being done in an error of the system.
fn doing<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> ConsoleError {
    let what = what.into();
    |source| ConsoleError { what, source: source.into() }
}

impl Console {
    /// `None` for [`ConsoleConfig::Off`].
    pub fn open(config: &ConsoleConfig, fd_store: &FdStore) -> Result<Option<Self>, ConsoleError> {
        let backend = match config {
            ConsoleConfig::Off => return Ok(None),
            ConsoleConfig::Null => Backend::Null,
            ConsoleConfig::Tty => open_tty(fd_store)?,
            ConsoleConfig::Pty => open_pty(fd_store).map_err(doing("pty: cannot make one (is /dev/pts mounted?)"))?,
            ConsoleConfig::File(path) => open_file(path, fd_store)?,
            ConsoleConfig::Socket(path) => open_socket(path, fd_store)?,
        };
        Ok(Some(Self::new(backend, fd_store.clone())))
    }
}

fn open_tty(fd_store: &FdStore) -> Result<Backend, ConsoleError> {
    let keep = |name: &str, fd: BorrowedFd<'_>, access: OFlags| {
        let fd = private(fd, access)?;
        Stream::new(fd_store.keep(name, FdKind::Console, fd))
    };
    let output = keep("serial stdout", rustix::stdio::stdout(), OFlags::WRONLY)
        .map_err(doing("tty: standard output cannot be used: is it open?"))?;
    // Closed, a regular file, /dev/null: no input.
    let input = keep("serial stdin", rustix::stdio::stdin(), OFlags::RDONLY).ok().filter(Stream::pollable);
    let raw = match &input {
        // In the background: once it comes to the front, see `Console::has_terminal`.
        Some(stream) if rustix::termios::isatty(stream) && !is_anothers(stream.as_fd()) => {
            Some(RawMode::enter(stream.kept().clone()).map_err(doing("tty: cannot put the terminal into raw mode"))?)
        }
        _ => None,
    };
    Ok(Backend::Tty { input, output, raw })
}

/// O_NONBLOCK belongs to the open file description, and that of a terminal or pipe is shared with the shell and others:
/// open our own where possible. A regular file must stay the same description, which has the position.
fn private(fd: BorrowedFd<'_>, access: OFlags) -> std::io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    if kind == FileType::Fifo || rustix::termios::isatty(fd) {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok(own);
        }
    }
    fd.try_clone_to_owned()
}

fn open_pty(fd_store: &FdStore) -> std::io::Result<Backend> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let path = rustix::pty::ptsname(&master, Vec::new())?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    // Its echo would come back to the guest as input.
    make_raw(slave.as_fd())?;
    Ok(Backend::Pty {
        master: Stream::new(fd_store.keep("serial pty", FdKind::Console, master))?,
        slave: fd_store.keep("serial pty slave", FdKind::Console, slave),
        path: PathBuf::from(std::ffi::OsStr::from_bytes(path.as_bytes())),
    })
}

fn open_file(path: &Path, fd_store: &FdStore) -> Result<Backend, ConsoleError> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
    rustix::fs::open(path, flags, mode)
        .map_err(std::io::Error::from)
        .and_then(|fd| Stream::new(fd_store.keep("serial file", FdKind::Console, fd)))
        .map(|file| Backend::File { file })
        .map_err(doing(format!("file {}: cannot open it for appending", path.display())))
}

/// Who can connect has the guest's console: nobody but this process' user can.
fn open_socket(path: &Path, fd_store: &FdStore) -> Result<Backend, ConsoleError> {
    let listener = socket::listen(path, socket::PRIVATE, None, 8).map_err(doing("socket"))?;
    let listener = fd_store.keep("serial socket", FdKind::Console, listener);
    Ok(Backend::Socket { listener, client: None, path: path.to_owned() })
}
