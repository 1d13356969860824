//! Switches of a test build of the VMM, as files in the folder that [`ENV`] names.
//!
//! `fault` (file): see `vmm/src/test_hooks.rs`. `hold` (file), `held` and `release` (fifos): [`Hold`].
//! `skip-irqfds` (file): the new image attaches no irqfd, which must turn the test of held interrupts red.
//! `state-version` (file): a target asked by `--check-update` answers as if it knew no state format but the one before.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::harness::PATIENCE;

/// The environment variable with the folder of the switches.
pub const ENV: &str = "THESEUS_TEST_HOOKS";
/// In `features` of vmm.ping where the build knows these switches.
pub const FEATURE: &str = "test-hooks";

/// A switch that is on as long as this lives.
pub struct Switch(PathBuf);

impl Switch {
    pub fn on(vm_dir: &Path, name: &str) -> Result<Self> {
        Self::with(vm_dir, name, "1")
    }

    /// A switch that says something, like `fault`.
    pub fn with(vm_dir: &Path, name: &str, text: &str) -> Result<Self> {
        let path = vm_dir.join("hooks").join(name);
        fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub fn make_fifo(path: &Path) -> Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a valid C string.
    let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
    ensure!(made == 0, "{}: {}", path.display(), std::io::Error::last_os_error());
    Ok(())
}

/// Makes the next update stop at the end of a phase: the VMM writes a line to the fifo `held` and waits for one from
/// `release`.
pub struct Hold {
    fifos: [PathBuf; 2],
    _phase: Switch,
    held: File,
    release: File,
    released: bool,
}

impl Hold {
    pub fn arm(vm_dir: &Path, phase: &str) -> Result<Self> {
        let dir = vm_dir.join("hooks");
        let fifos = [dir.join("held"), dir.join("release")];
        let mut ends = Vec::new();
        for path in &fifos {
            make_fifo(path)?;
            // Open for both: neither side then waits for the other in open.
            ends.push(OpenOptions::new().read(true).write(true).open(path)?);
        }
        let (release, held) = (ends.pop(), ends.pop());
        let phase = Switch::with(vm_dir, "hold", phase)?;
        Ok(Self {
            fifos,
            _phase: phase,
            held: held.context("fifo")?,
            release: release.context("fifo")?,
            released: false,
        })
    }

    /// Waits until the update is held.
    pub fn wait_held(&mut self) -> Result<Instant> {
        let mut poll = libc::pollfd { fd: self.held.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as libc::c_int) };
        ensure!(ready == 1, "the update was not held within {PATIENCE:?}: is this a build with test hooks?");
        let now = Instant::now();
        let mut line = [0; 64];
        let _ = self.held.read(&mut line)?;
        Ok(now)
    }

    /// Lets it go on. The names stay until this is dropped, as the VMM may be about to open them: that must be before
    /// the next update.
    pub fn release(&mut self) -> Result<Instant> {
        if !self.released {
            self.released = true;
            self.release.write_all(b"go\n")?;
        }
        Ok(Instant::now())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Opened by a VMM that waits, it reads this; our own end keeps the bytes until then.
        let _ = self.release();
        for path in &self.fifos {
            let _ = fs::remove_file(path);
        }
    }
}
