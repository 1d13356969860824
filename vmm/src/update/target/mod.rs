//! The build to update to: the file, opened once and from then on known by its fd, and what it says to our state.

mod error;
mod guard;
mod handshake;
mod named;
mod signature;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use semver::Version;
use sha2::{Digest, Sha256};
use theseus_api::types::{BuildInfo, UpdateRequest};

use crate::build_info::elf;
use crate::supervisor::{Fence, Supervisor};

pub(crate) use error::{Reason, Unfit};
use guard::Facts;
pub(crate) use handshake::{Rehearsal, answer, ask};
pub(crate) use named::{default_path, started_from};

pub(crate) struct Target {
    pub path: PathBuf,
    /// What is checked here is what is executed: the path is not looked up again.
    pub file: File,
    pub build: BuildInfo,
    /// Whether it is a lease that keeps it as it was checked.
    leased: bool,
}

impl Target {
    /// Opens and checks the file, without running any of it; on failure all the reasons that could be found.
    /// `supervisor`: what is run where the request names no file, where a file may be, and who must have signed it.
    pub(crate) fn open(
        request: &UpdateRequest,
        running: &BuildInfo,
        supervisor: &Supervisor,
    ) -> Result<Self, Vec<Unfit>> {
        let path = match &request.binary {
            Some(path) => path.clone(),
            None => default_path(supervisor.started_from())
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
        if let Some(fence) = supervisor.fence(path) {
            reasons.extend(is_within(&file, fence).err());
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
        let keys = supervisor.update_keys();
        if !keys.is_empty() {
            let version = build.as_ref().ok().map(|build| build.version.as_str());
            reasons.extend(signature::check(&file, keys, version).err().map(Reason::from));
        }
        let build = match build {
            Ok(build) => build,
            Err(reason) => {
                reasons.push(reason);
                return Err(reasons);
            }
        };
        let may = supervisor.allows_downgrade();
        if !(request.allow_downgrade && may) {
            let (to, from) = (build.version.clone(), running.version.clone());
            match older(&to, &from) {
                Ok(false) => {}
                Ok(true) => reasons.push(Reason::Older { to, from, remedy: error::back(may) }),
                Err(source) => reasons.push(Reason::NoVersion { to, source, remedy: error::back(may) }),
            }
        }
        if reasons.is_empty() { Ok(Self { path: path.into(), file, build, leased }) } else { Err(reasons) }
    }

    /// Whether it still is what was checked.
    pub(crate) fn unchanged(&self) -> Result<(), Unfit> {
        let held = if self.leased { guard::lease_holds(&self.file) } else { Ok(()) };
        held.map_err(|reason| Unfit { path: self.path.clone(), reason: reason.into() })
    }
}

/// A name that leads to the open file itself.
fn by_fd(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Where the open file really is, whatever links led to it.
fn is_within(file: &File, fence: Fence<'_>) -> Result<(), Reason> {
    let Fence { folder: named, is_chosen } = fence;
    let folder = named.canonicalize().map_err(|source| Reason::NoFolder { folder: named.into(), source })?;
    let real = std::fs::read_link(by_fd(file))?;
    match (real.starts_with(&folder), is_chosen) {
        (true, _) => Ok(()),
        (false, true) => Err(Reason::Elsewhere { real, folder }),
        (false, false) => Err(Reason::NotBeside { real, folder }),
    }
}

/// From its first byte to its last.
fn read_all(file: &File, mut each: impl FnMut(&[u8])) -> std::io::Result<()> {
    let (mut buffer, mut at) = (vec![0; 1 << 20], 0);
    loop {
        match file.read_at(&mut buffer, at) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                each(&buffer[..count]);
                at += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn sha256(file: &File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    read_all(file, |bytes| hash.update(bytes))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether version `a` is older than `b`; what follows a plus sign does not count.
fn older(a: &str, b: &str) -> Result<bool, semver::Error> {
    Ok(Version::parse(a)?.cmp_precedence(&Version::parse(b)?).is_lt())
}

/// For messages.
pub(crate) fn describe(path: &Path, build: &BuildInfo) -> String {
    format!("{} (version {}, build {})", path.display(), build.version, build.build_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update_key::UpdateKey;
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
        let told = |path: &Path, folder: &Path, is_chosen| {
            is_within(&File::open(path).unwrap(), Fence { folder, is_chosen }).map_err(|reason| reason.to_string())
        };
        for is_chosen in [true, false] {
            told(&good, inside.path(), is_chosen).unwrap();
            let error = told(&link, inside.path(), is_chosen).unwrap_err();
            assert!(error.contains("--update-dir") && error.contains(bad.to_str().unwrap()), "{error}");
            assert_eq!(error.contains("copy it there"), !is_chosen, "{error}");
        }
        // It is looked up anew, links and all.
        let folder = outside.path().join("current");
        std::os::unix::fs::symlink(inside.path(), &folder).unwrap();
        told(&good, &folder, false).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let error = told(&good, &folder, false).unwrap_err();
        assert!(error.contains("/current ") && error.contains("No such file"), "{error}");
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

    /// Whoever has stolen a build that was signed once, and may ask for updates, does not get it run.
    #[test]
    fn a_signed_build_that_is_older_takes_who_has_started_the_vmm() {
        let (mine, dir) = (std::env::current_exe().unwrap(), tempfile::tempdir().unwrap());
        let copy = dir.path().join("theseus");
        std::fs::copy(&mine, &copy).unwrap();
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        let comment = format!("theseus version={}", crate::build_info::this().version);
        let signed = minisign::sign(None, &pair.sk, File::open(&copy).unwrap(), Some(&comment), None).unwrap();
        let signature = dir.path().join("theseus.minisig");
        let key = || UpdateKey::try_from(pair.pk.to_base64()).unwrap();
        let told = |version: &str, keys: Vec<UpdateKey>, (asked, allowed)| {
            let request = UpdateRequest { binary: Some(copy.clone()), allow_downgrade: asked, ..Default::default() };
            let mut supervisor = Supervisor::default();
            supervisor.believes(keys, allowed);
            let running = BuildInfo { version: version.into(), build_id: String::new() };
            let told = |reasons: Vec<Unfit>| reasons.iter().map(|reason| format!("{reason}; ")).collect::<String>();
            Target::open(&request, &running, &supervisor).map(drop).map_err(told)
        };
        let unsigned = told("0.0.1", vec![key()], (true, true)).unwrap_err();
        assert!(unsigned.contains("/theseus.minisig: cannot be opened"), "{unsigned}");
        std::fs::write(&signature, signed.to_string()).unwrap();
        told("0.0.1", vec![key()], (false, false)).unwrap();
        told("99.0.0", vec![key()], (true, true)).unwrap();
        let refused = told("99.0.0", vec![key()], (true, false)).unwrap_err();
        assert!(refused.contains("is older than the running 99.0.0: ") && refused.contains("--allow-downgrade"));
        let unasked = told("99.0.0", vec![key()], (false, true)).unwrap_err();
        assert!(unasked.contains("say allow_downgrade"), "{unasked}");
        // Without a key it is as it was, and nobody looks for a signature.
        std::fs::write(&signature, "nothing").unwrap();
        told("99.0.0", vec![], (true, false)).unwrap();
        assert!(told("99.0.0", vec![], (false, false)).unwrap_err().contains("say allow_downgrade"));
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
