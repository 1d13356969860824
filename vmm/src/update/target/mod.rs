//! The build to update to: the file, opened once and from then on known by its fd, and what it says to our state.

mod error;
mod guard;
mod handshake;
mod named;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use semver::Version;
use sha2::{Digest, Sha256};
use theseus_api::types::{BuildInfo, UpdateRequest};

use crate::build_info::elf;
use crate::supervisor::Supervisor;

pub use error::{Reason, Unfit};
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
    pub fn open(request: &UpdateRequest, running: &BuildInfo, supervisor: &Supervisor) -> Result<Self, Vec<Unfit>> {
        let path = match &request.binary {
            Some(path) => path.clone(),
            None => named::default_path(supervisor.started_from())
                .map_err(|error| vec![Unfit { path: named::EXE.into(), reason: error.into() }])?,
        };
        Self::check(&path, request, running, supervisor)
            .map_err(|reasons| reasons.into_iter().map(|reason| Unfit { path: path.clone(), reason }).collect())
    }

    fn check(
        path: &Path,
        request: &UpdateRequest,
        running: &BuildInfo,
        supervisor: &Supervisor,
    ) -> Result<Self, Vec<Reason>> {
        // Not blocking: the path may name a FIFO that nobody writes to.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
            .map_err(|error| vec![Reason::NotOpened(error.into())])?;
        let file = File::from(file);
        let meta = file.metadata().map_err(|error| vec![error.into()])?;
        if !meta.is_file() {
            return Err(vec![Reason::NotAFile]);
        }
        let mut reasons = Vec::new();
        if let Some(allowed) = supervisor.update_dir() {
            reasons.extend(is_below(&file, allowed).err());
        }
        // Before it is read.
        let facts = Facts::of(&file).map_err(|error| vec![error.into()])?;
        let own = rustix::process::geteuid().as_raw();
        reasons.extend(facts.reasons(own).into_iter().map(Reason::from));
        let leased = facts.wants_lease() && facts.owner == own;
        let still = match leased {
            true => guard::lease(&file),
            false => guard::nobody_writes(&file),
        };
        reasons.extend(still.err().map(Reason::from));
        let (here, may) = (rustix::fs::CWD, rustix::fs::Access::EXEC_OK);
        if meta.permissions().mode() & 0o111 == 0 {
            reasons.push(Reason::NotExecutable);
        } else if let Err(error) = rustix::fs::accessat(here, by_fd(&file), may, rustix::fs::AtFlags::EACCESS) {
            reasons.push(Reason::MayNotExecute(error.into()));
        }
        let inspected = elf::inspect_file(&file).map_err(Reason::from);
        let build = inspected.and_then(|elf::Found { version, build_id }| match version {
            None => Err(Reason::Foreign),
            Some(version) => Ok(BuildInfo { version, build_id }),
        });
        if let Some(wanted) = &request.sha256 {
            match sha256(&file) {
                Ok(found) if found.eq_ignore_ascii_case(wanted) => {}
                Ok(found) => reasons.push(Reason::Sum { found, wanted: wanted.clone() }),
                Err(error) => reasons.push(Reason::NotRead(error)),
            }
        }
        let build = match build {
            Ok(build) => build,
            Err(reason) => {
                reasons.push(reason);
                return Err(reasons);
            }
        };
        if !request.allow_downgrade {
            let (to, from) = (build.version.clone(), running.version.clone());
            match older(&to, &from) {
                Ok(false) => {}
                Ok(true) => reasons.push(Reason::Older { to, from }),
                Err(source) => reasons.push(Reason::NoVersion { to, source }),
            }
        }
        if reasons.is_empty() { Ok(Self { path: path.into(), file, build, leased }) } else { Err(reasons) }
    }

    /// Whether it still is what was checked.
    pub fn unchanged(&self) -> Result<(), Unfit> {
        let held = if self.leased { guard::lease_holds(&self.file) } else { Ok(()) };
        held.map_err(|reason| Unfit { path: self.path.clone(), reason: reason.into() })
    }
}

/// A name that leads to the open file itself.
fn by_fd(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Where the open file really is, whatever links led to it.
fn is_below(file: &File, folder: &Path) -> Result<(), Reason> {
    let no_folder = |source| Reason::NoFolder { folder: folder.into(), source };
    let folder = folder.canonicalize().map_err(no_folder)?;
    let real = std::fs::read_link(by_fd(file))?;
    if real.starts_with(&folder) { Ok(()) } else { Err(Reason::Elsewhere { real, folder }) }
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

/// Whether version `a` is older than `b`; what follows a plus sign does not count.
fn older(a: &str, b: &str) -> Result<bool, semver::Error> {
    Ok(Version::parse(a)?.cmp_precedence(&Version::parse(b)?).is_lt())
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
            .map_err(|reasons| reasons.iter().map(Unfit::to_string).collect())
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
        assert!(is_below(&File::open(&link).unwrap(), inside.path()).unwrap_err().to_string().contains("--update-dir"));
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
        assert!(older("0.9.0", "0.10.0").unwrap());
        assert!(!older("1.0.0+b", "1.0.0+a").unwrap() && !older("1.0.0+a", "1.0.0+b").unwrap());
        assert!(!older("1.0.1", "1.0.0").unwrap());
        assert!(older("1.0.0-rc.2", "1.0.0").unwrap() && older("1.0.0-rc.2", "1.0.0-rc.10").unwrap());
        assert!(older("of today", "1.0.0").is_err() && older("1.0", "1.0.0").is_err());
    }
}
