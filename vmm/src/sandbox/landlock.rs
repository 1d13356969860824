//! Landlock (Documentation/userspace-api/landlock.rst): which files a VMM may open, whatever it is made to do.
//!
//! Rules name folders wherever a file may be replaced: a rule is of an inode, and a new kernel, log or build has
//! another one. What was opened before needs no rule; nor does a memfd.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use ::landlock::{
    ABI, Access, AccessFs, BitFlags, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use theseus_api::types::LandlockConfig;

/// The last one that knows another right to a file that is of use here (ioctl on devices). What the kernel does not
/// know of it is left out.
const FILES: ABI = ABI::V5;
/// Signals and abstract sockets.
const SCOPES: ABI = ABI::V6;

/// What becomes of a place that the command line names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// A folder whose programs are run.
    Runs,
    /// A file that is read, again at each boot.
    Reads,
    /// A file that is made, and appended to.
    Appends,
    /// The same, and opened for reading too, as a FIFO without a reader is.
    Streams,
    /// A file that is replaced by another one.
    Replaces,
    /// A socket that is bound.
    Serves,
    /// A device, or a folder of them.
    Drives,
}

/// What is named, and by which option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub option: &'static str,
    pub path: PathBuf,
    pub will: Use,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum LandlockError {
    #[error(
        "--landlock: this kernel {0}: leave --landlock out, or boot it with landlock in its list lsm= (from 5.13 on, \
         with CONFIG_SECURITY_LANDLOCK)"
    )]
    Absent(&'static str),
    #[error("--landlock-rules: {}: {reason}: name a file or folder that is there", path.display())]
    Rule { path: PathBuf, reason: String },
    #[error("{option} {}: Landlock would let it write everywhere: put it into a folder of its own", path.display())]
    Everywhere { option: &'static str, path: PathBuf },
    #[error("--landlock: {0}")]
    Kernel(#[from] RulesetError),
}

fn reads() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

fn drives() -> BitFlags<AccessFs> {
    reads() | AccessFs::WriteFile | AccessFs::IoctlDev
}

impl Use {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Runs => reads() | AccessFs::Execute,
            Self::Reads => reads(),
            Self::Appends => AccessFs::WriteFile | AccessFs::MakeReg,
            Self::Streams => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg,
            Self::Replaces => AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile,
            Self::Serves => AccessFs::MakeSock | AccessFs::RemoveFile,
            Self::Drives => drives(),
        }
    }
}

/// A rule that is to be there if its place is.
type Granted = (PathBuf, BitFlags<AccessFs>);

impl Place {
    /// What rules it takes: of the folder that it is named in, and of the one that it really is in.
    fn granted(&self) -> Result<Vec<Granted>, LandlockError> {
        let Self { option, path, will } = self;
        let here = |path: &Path| vec![(path.to_owned(), will.rights())];
        if matches!(will, Use::Runs | Use::Drives) {
            return Ok(here(path));
        }
        let Ok(path) = std::path::absolute(path) else { return Ok(Vec::new()) };
        let (meta, real) = (path.metadata().ok(), path.canonicalize().ok());
        if let Some(meta) = &meta {
            // "/dev/stderr" leads to a pipe: Landlock lets those be opened that have no name.
            let Some(real) = &real else { return Ok(Vec::new()) };
            let kind = meta.file_type();
            // They are not replaced, and their folder has others of more power.
            if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || is_kernels(real) {
                return Ok(here(real));
            }
        }
        let folders = [Some(&path), real.as_ref()].into_iter().flatten().filter_map(|path| path.parent());
        let (everywhere, folders): (Vec<_>, Vec<_>) = folders.partition(|folder| folder.parent().is_none());
        let mut granted: Vec<_> = folders.into_iter().flat_map(here).collect();
        match (everywhere.is_empty(), *will) {
            (true, _) => {}
            (false, Use::Reads) => granted.extend(here(&path)),
            (false, _) => return Err(LandlockError::Everywhere { option, path }),
        }
        Ok(granted)
    }
}

fn is_kernels(path: &Path) -> bool {
    ["/dev", "/proc", "/sys"].iter().any(|top| path.starts_with(top))
}

/// What every VMM opens in its life.
fn always() -> Vec<Granted> {
    let mut granted: Vec<Granted> = vec![
        // By its fd once more in a container of its own; and by later builds.
        ("/dev/kvm".into(), drives()),
        ("/dev/vfio".into(), drives()),
        // A child's.
        ("/dev/null".into(), reads() | AccessFs::WriteFile),
        ("/dev/urandom".into(), reads()),
    ];
    let read =
        ["/proc", "/sys/bus/pci", "/sys/devices", "/sys/fs/cgroup", "/sys/kernel/iommu_groups", "/sys/kernel/mm"];
    granted.extend(read.map(|path| (path.into(), reads())));
    // A new VMM's own oom_score_adj, of a process that nobody knows yet. To root it would be all of /proc/sys.
    if !rustix::process::geteuid().is_root() {
        granted.push(("/proc".into(), AccessFs::WriteFile.into()));
    }
    // The file that runs, which a way back execs; and those beside it.
    let program = std::fs::read_link("/proc/self/exe").ok();
    granted.extend(program.as_deref().and_then(Path::parent).map(|folder| (folder.into(), Use::Runs.rights())));
    granted.extend(own_cgroup().map(|folder| (folder, AccessFs::WriteFile | AccessFs::Truncate)));
    granted
}

/// Where threads of vCPUs are put into cgroups of their own (version 2). Not the root of all: with that one could end
/// every process of the host.
fn own_cgroup() -> Option<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/")).filter(|own| !own.is_empty())?;
    Some(Path::new("/sys/fs/cgroup").join(own))
}

/// Standard input and output, where they are terminals: a boot opens them anew.
pub(crate) fn terminals() -> impl Iterator<Item = PathBuf> {
    let link = |fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    (0..=1).filter_map(link).filter(|path| path.as_os_str().as_bytes().starts_with(OsStr::new("/dev/").as_bytes()))
}

/// Whether what `rule` asks for is in one of `rules`.
pub(crate) fn covers(rules: &[LandlockConfig], rule: &LandlockConfig) -> bool {
    let Some((reads, writes)) = rule.accesses() else { return false };
    let of = |wide: &LandlockConfig| wide.accesses().filter(|_| rule.path.starts_with(&wide.path));
    let all = rules.iter().filter_map(of).fold((false, false), |all, one| (all.0 || one.0, all.1 || one.1));
    (all.0 || !reads) && (all.1 || !writes)
}

fn rights_of(rule: &LandlockConfig) -> BitFlags<AccessFs> {
    let (reads, writes) = rule.accesses().unwrap_or_default();
    let part = |is: bool, rights| if is { rights } else { BitFlags::EMPTY };
    part(reads, AccessFs::from_read(FILES)) | part(writes, AccessFs::from_write(FILES))
}

/// Confines this process, which has one thread, and all that it will start. Returns what the log has to say.
pub(crate) fn restrict(places: &[Place], rules: &[LandlockConfig]) -> Result<Vec<String>, LandlockError> {
    let mut granted = always();
    for place in places {
        granted.extend(place.granted()?);
    }
    // systemd may listen on an abstract one (sd_notify(3)).
    let notified = std::env::var_os("NOTIFY_SOCKET").is_some_and(|name| name.as_bytes().starts_with(b"@"));
    let scopes = if notified { Scope::Signal.into() } else { Scope::from_all(SCOPES) };
    let mut set = Ruleset::default().handle_access(AccessFs::from_all(FILES))?.scope(scopes)?.create()?;
    for (path, rights) in granted {
        // What is not there is missed by who opens it, and says so.
        if let Ok(place) = PathFd::new(&path) {
            set = add(set, place, &path, rights)?;
        }
    }
    for rule in rules {
        let wrong = |reason: String| LandlockError::Rule { path: rule.path.clone(), reason };
        let place = PathFd::new(&rule.path).map_err(|error| wrong(error.to_string()))?;
        set = add(set, place, &rule.path, rights_of(rule)).map_err(|error| wrong(error.to_string()))?;
    }
    let status = set.restrict_self()?;
    let abi = match status.landlock {
        LandlockStatus::NotImplemented => return Err(LandlockError::Absent("has no Landlock")),
        LandlockStatus::NotEnabled => return Err(LandlockError::Absent("has Landlock, but it is not switched on")),
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
    };
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(LandlockError::Absent("did not confine this process"));
    }
    Ok(not_held_back(abi))
}

fn add(
    set: RulesetCreated,
    place: PathFd,
    path: &Path,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let is_folder = path.is_dir();
    let rights = if is_folder { rights } else { rights & AccessFs::from_file(FILES) };
    if rights.is_empty() {
        return Ok(set);
    }
    set.set_compatibility(::landlock::CompatLevel::BestEffort).add_rule(PathBeneath::new(place, rights))
}

/// What a kernel with this ABI lets a confined process do that a later one does not.
fn not_held_back(abi: u32) -> Vec<String> {
    let known = [(3, "truncation of files"), (5, "ioctls on devices"), (6, "signals and abstract sockets")];
    let missing: Vec<_> = known.iter().filter(|(from, _)| abi < *from).map(|(_, what)| *what).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![format!("--landlock: this kernel (Landlock ABI {abi}) does not hold back {}", missing.join(", "))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::in_child;

    fn place(path: &Path, will: Use) -> Place {
        Place { option: "--x", path: path.into(), will }
    }

    fn paths(place: Place) -> Vec<PathBuf> {
        place.granted().unwrap().into_iter().map(|(path, _)| path).collect()
    }

    #[test]
    fn rules_are_of_folders_where_a_file_may_be_replaced() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (kernel, link) = (elsewhere.path().join("vmlinuz-1"), dir.path().join("vmlinuz"));
        std::fs::write(&kernel, "").unwrap();
        std::os::unix::fs::symlink(&kernel, &link).unwrap();
        let both = [dir.path().to_owned(), elsewhere.path().to_owned()];
        assert_eq!(paths(place(&link, Use::Reads)), both);
        assert_eq!(paths(place(&dir.path().join("log"), Use::Appends)), both[..1]);
        // Not their folders: there are disks in one, and all settings of the kernel in another.
        for device in ["/dev/null", "/proc/self/oom_score_adj"] {
            let found = paths(place(Path::new(device), Use::Appends));
            assert!(found.iter().all(|path| path.ends_with(Path::new(device).file_name().unwrap())), "{found:?}");
        }
        assert_eq!(paths(place(Path::new("/vmlinuz"), Use::Reads)), [Path::new("/vmlinuz")]);
        let error = place(Path::new("/log"), Use::Appends).granted().unwrap_err().to_string();
        assert!(error.contains("--x /log") && error.contains("a folder of its own"), "{error}");
    }

    #[test]
    fn what_a_kernel_does_not_hold_back_is_said() {
        assert!(
            not_held_back(6).is_empty()
                && not_held_back(5)[0].ends_with("does not hold back signals and abstract sockets")
        );
        assert!(
            not_held_back(1)[0].contains("ABI 1) does not hold back truncation of files, ioctls on devices, signals")
        );
    }

    /// The exit code says what was not as it should be.
    #[test]
    fn a_confined_process_opens_what_its_rules_name() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&inside, &outside] {
            std::fs::write(dir.path().join("file"), "").unwrap();
        }
        let (read, kept) = (inside.path().join("file"), std::fs::File::open(outside.path().join("file")).unwrap());
        let rule = LandlockConfig { path: outside.path().join("named"), access: "rw".into() };
        std::fs::create_dir(&rule.path).unwrap();
        let body = || {
            let places = [place(&read, Use::Reads)];
            if restrict(&places, std::slice::from_ref(&rule)).is_err() {
                return 1;
            }
            let denied =
                |done: std::io::Result<()>| done.is_err_and(|error| error.raw_os_error() == Some(libc::EACCES));
            let open = |path: &Path| std::fs::File::open(path).map(drop);
            let checks = [
                open(&read).is_ok(),
                denied(std::fs::write(&read, "")),
                denied(open(&outside.path().join("file"))),
                std::io::Read::read(&mut &kept, &mut [0]).is_ok(),
                std::fs::write(rule.path.join("new"), "").is_ok(),
                denied(open(Path::new("/etc/passwd"))),
                open(Path::new("/proc/self/exe")).is_ok(),
                denied(open(Path::new("/"))),
            ];
            checks.iter().position(|good| !good).map_or(0, |index| index as i32 + 2)
        };
        assert_eq!(in_child(body).code(), Some(0));
    }

    #[test]
    fn a_rule_for_nothing_is_refused_by_name() {
        let rule = LandlockConfig { path: "/nowhere/at-all".into(), access: "r".into() };
        // Fails before anything is restricted.
        let error = restrict(&[], &[rule]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at-all") && error.contains("No such file"), "{error}");
    }
}
