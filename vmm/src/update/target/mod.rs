//! The build to update to: the file, opened once and from then on known by its fd, and what it says to our state.

mod guard;
mod handshake;
mod named;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use theseus_api::types::{BuildInfo, UpdateRequest};

use crate::build_info::elf;
use crate::supervisor::Supervisor;

use guard::Facts;
pub use handshake::{Rehearsal, answer, ask};
pub use named::started_from;

pub struct Target {
    pub path: PathBuf,
    /// What is checked here is what is executed: the path is not looked up again.
    pub file: File,
    pub build: BuildInfo,
    /// Whether it is a lease that keeps it as it was checked.
    leased: bool,
}

impl Target {
    /// Opens and checks the file; on failure all the reasons that could be found. `supervisor`: what is run where the
    /// request names no file, and the only folder that it may be in.
    pub fn open(request: &UpdateRequest, running: &BuildInfo, supervisor: &Supervisor) -> Result<Self, Vec<String>> {
        let path = match &request.binary {
            Some(path) => path.clone(),
            None => named::default_path(supervisor.started_from()).map_err(|reason| vec![reason])?,
        };
        let say = |reason: String| format!("binary {}: {reason}", path.display());
        // Not blocking: the path may name a FIFO that nobody writes to.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
            .map_err(|error| vec![say(format!("cannot be opened: {error}"))])?;
        let file = File::from(file);
        let meta = file.metadata().map_err(|error| vec![say(error.to_string())])?;
        if !meta.is_file() {
            return Err(vec![say("is not a regular file".into())]);
        }
        let mut reasons = Vec::new();
        if let Some(allowed) = supervisor.update_dir()
            && let Err(reason) = is_below(&file, allowed)
        {
            reasons.push(say(reason));
        }
        // Before it is read.
        let facts = Facts::of(&file).map_err(|error| vec![say(error.to_string())])?;
        let own = rustix::process::geteuid().as_raw();
        reasons.extend(facts.reasons(own).into_iter().map(say));
        let leased = facts.wants_lease() && facts.owner == own;
        let still = match leased {
            true => guard::lease(&file),
            false => guard::nobody_writes(&file),
        };
        reasons.extend(still.err().map(say));
        let (here, may) = (rustix::fs::CWD, rustix::fs::Access::EXEC_OK);
        if meta.permissions().mode() & 0o111 == 0 {
            reasons.push(say("is not executable: chmod +x".into()));
        } else if let Err(error) = rustix::fs::accessat(here, by_fd(&file), may, rustix::fs::AtFlags::EACCESS) {
            reasons.push(say(format!(
                "may not be executed: {error}: by this user, or is its file system mounted noexec?"
            )));
        }
        let inspected = file.try_clone().map_err(|error| error.to_string()).and_then(elf::inspect_file);
        let build = match inspected {
            Err(reason) => Err(say(reason)),
            Ok(elf::Found { version: None, .. }) => Err(say("is not a build of Theseus".into())),
            Ok(elf::Found { version: Some(version), build_id }) => Ok(BuildInfo { version, build_id }),
        };
        if let Some(wanted) = &request.sha256 {
            match sha256(&file) {
                Ok(found) if found.eq_ignore_ascii_case(wanted) => {}
                Ok(found) => reasons.push(say(format!("its SHA-256 is {found}, not {wanted}"))),
                Err(error) => reasons.push(say(format!("cannot be read: {error}"))),
            }
        }
        match build {
            Ok(build) => {
                if !request.allow_downgrade && older(&build.version, &running.version) {
                    let (to, from) = (&build.version, &running.version);
                    reasons.push(say(format!("version {to} is older than the running {from}: say allow_downgrade")));
                }
                if reasons.is_empty() { Ok(Self { path, file, build, leased }) } else { Err(reasons) }
            }
            Err(reason) => {
                reasons.push(reason);
                Err(reasons)
            }
        }
    }

    /// Whether it still is what was checked; the error is a reason.
    pub fn unchanged(&self) -> Result<(), String> {
        let held = if self.leased { guard::lease_holds(&self.file) } else { Ok(()) };
        held.map_err(|reason| format!("binary {}: {reason}", self.path.display()))
    }
}

/// A name that leads to the open file itself.
fn by_fd(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Where the open file really is, whatever links led to it.
fn is_below(file: &File, folder: &Path) -> Result<(), String> {
    let folder = folder.canonicalize().map_err(|error| format!("--update-dir {}: {error}", folder.display()))?;
    let real = std::fs::read_link(by_fd(file)).map_err(|error| error.to_string())?;
    if real.starts_with(&folder) {
        return Ok(());
    }
    Err(format!("is at {}, not below {} (--update-dir)", real.display(), folder.display()))
}

fn sha256(file: &File) -> std::io::Result<String> {
    let mut file = file.try_clone()?;
    std::io::Seek::rewind(&mut file)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..count]);
    }
}

/// Whether version `a` is older than `b`; what follows a plus or minus sign does not count.
fn older(a: &str, b: &str) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        let core = text.split(['+', '-']).next().unwrap_or_default();
        core.split('.').map(|part| part.parse().unwrap_or(0)).collect()
    };
    numbers(a) < numbers(b)
}

/// For messages.
pub fn describe(path: &Path, build: &BuildInfo) -> String {
    format!("{} (version {}, build {})", path.display(), build.version, build.build_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn open(path: &Path, sha256: Option<&str>) -> Result<Target, Vec<String>> {
        let request =
            UpdateRequest { binary: Some(path.into()), sha256: sha256.map(str::to_owned), ..Default::default() };
        Target::open(&request, crate::build_info::this(), &Supervisor::default())
    }

    #[test]
    fn only_what_is_below_the_allowed_folder() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (good, bad) = (inside.path().join("a"), outside.path().join("b"));
        std::fs::write(&good, "").unwrap();
        std::fs::write(&bad, "").unwrap();
        let link = inside.path().join("link");
        std::os::unix::fs::symlink(&bad, &link).unwrap();
        is_below(&File::open(&good).unwrap(), inside.path()).unwrap();
        assert!(is_below(&File::open(&link).unwrap(), inside.path()).unwrap_err().contains("--update-dir"));
    }

    #[test]
    fn every_reason_is_named() {
        assert!(open(Path::new("/nowhere/theseus"), None).err().unwrap()[0].contains("/nowhere/theseus"));
        assert!(open(Path::new("/tmp"), None).err().unwrap()[0].contains("not a regular file"));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"#!/bin/sh\n").unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o602)).unwrap();
        let reasons = open(file.path(), Some(&"0".repeat(64))).err().unwrap();
        for part in ["not executable", "writable by everybody", "SHA-256", "not an ELF"] {
            assert!(reasons.iter().any(|reason| reason.contains(part)), "{part}: {reasons:?}");
        }
        // Whatever the umask of who built it.
        let (me, dir) = (std::env::current_exe().unwrap(), tempfile::tempdir().unwrap());
        let copy = dir.path().join("theseus");
        std::fs::copy(&me, &copy).unwrap();
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        let sum = sha256(&File::open(&copy).unwrap()).unwrap();
        open(&copy, Some(&sum.to_uppercase())).unwrap().unchanged().unwrap();
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(older("0.9.0", "0.10.0"));
        assert!(!older("1.0.0+b", "1.0.0+a"));
        assert!(!older("1.0.1", "1.0.0"));
    }
}
