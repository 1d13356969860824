//! The serial line, raw.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
};

use parking_lot::Mutex;
use serde::Serialize;

use crate::proto::encode_line;

pub(super) struct Tty {
    input: File,
    /// One line at a time.
    output: Mutex<File>,
}

impl Tty {
    /// Opens the terminal at `path` and makes it a plain byte pipe.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        let input = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
        // SAFETY: all-zero bytes are a valid termios, and tcgetattr fills it.
        let mut modes: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `modes` is valid for the three calls, and the descriptor is open.
        let done = unsafe {
            libc::tcgetattr(input.as_raw_fd(), &mut modes) == 0 && {
                libc::cfmakeraw(&mut modes);
                modes.c_cflag |= libc::CLOCAL | libc::CREAD;
                libc::tcsetattr(input.as_raw_fd(), libc::TCSANOW, &modes) == 0
            }
        };
        if !done {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { output: Mutex::new(input.try_clone()?), input })
    }

    /// At least one byte.
    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = [0; 1024];
        match (&self.input).read(&mut bytes)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            len => Ok(bytes[..len].to_vec()),
        }
    }

    pub(super) fn write<T: Serialize>(&self, id: u64, body: &T) -> io::Result<()> {
        // The newline in front ends whatever the kernel left there.
        let line = format!("\n{}", encode_line(id, body));
        self.output.lock().write_all(line.as_bytes())
    }
}
