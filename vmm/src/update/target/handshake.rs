//! The dry run: the target decodes our real state, and says what it cannot read, before the guest is touched.
//!
//! We run `TARGET --check-update` with the state on its standard input; it prints a [`Verdict`] and ends.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};
use theseus_resources::StateReader;
use theseus_resources::state::{Format, Section, StateError};

use super::{Target, Unfit};
use crate::build_info;
use crate::main_thread::{Ended, MainThread};
use crate::seams::Seams;
use crate::update::saved::{self, Opened};

/// How long the target may take for its verdict.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Serialize, Deserialize)]
pub(super) struct Verdict {
    pub build_id: String,
    /// Why it cannot take this guest over; empty if it can.
    pub reasons: Vec<String>,
    /// (kind, version) of the sections that it writes: what we would have to read, should we be asked to take the guest
    /// back later.
    #[serde(default)]
    pub writes: Vec<(String, u16)>,
}

/// Why a dry run says no, or nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DryRunError {
    #[error("cannot run it: {0}")]
    NotRun(std::io::Error),
    #[error("no verdict within {0:?}")]
    Late(Duration),
    #[error("no verdict: it ended with {status}{}", if said.is_empty() { said.clone() } else { format!(", and said: \
         {said}") })]
    NoVerdict { status: ExitStatus, said: String },
    #[error("it calls itself build {own}, its file says {note}")]
    OtherBuild { own: String, note: String },
    #[error("it writes version {theirs} of '{kind}', which this build (version {ours}) could not take back")]
    OneWay { kind: String, theirs: u16, ours: u16 },
    /// In its own words.
    #[error("{0}")]
    Unreadable(String),
    #[error(transparent)]
    Os(#[from] std::io::Error),
}

/// What a dry run has shown.
pub(crate) struct Rehearsal {
    /// Every reason against the target; empty if there is none.
    pub reasons: Vec<Unfit>,
    /// Of the target after its exec. None if it did not get that far.
    pub capabilities: Option<CapabilitySet>,
    /// See [`saved::takes_ahead`].
    pub takes_ahead: bool,
}

/// In the running image.
pub(crate) fn ask(target: &Target, state: &[u8], main: &MainThread) -> Rehearsal {
    let mut capabilities = None;
    let (takes_ahead, reasons) = match converse(target, state, main, &mut capabilities) {
        Ok(verdict) => (saved::takes_ahead(&verdict.writes), judge(target, verdict)),
        Err(error) => (false, vec![error]),
    };
    let unfit = |reason: DryRunError| Unfit { path: target.path.clone(), reason: reason.into() };
    Rehearsal { reasons: reasons.into_iter().map(unfit).collect(), capabilities, takes_ahead }
}

/// Every reason against the target; empty if there is none.
fn judge(target: &Target, verdict: Verdict) -> Vec<DryRunError> {
    let Verdict { build_id: own, reasons, writes } = verdict;
    if own != target.build.build_id {
        return vec![DryRunError::OtherBuild { own, note: target.build.build_id.clone() }];
    }
    reasons.into_iter().map(DryRunError::Unreadable).chain(one_way(&writes, &saved::formats())).collect()
}

/// Which of the sections that it `writes` we could not read, who have the formats `ours`.
fn one_way(writes: &[(String, u16)], ours: &[Format]) -> Vec<DryRunError> {
    let unreadable = writes.iter().filter_map(|(kind, theirs)| {
        let Format { version, .. } = format_of(kind, ours).filter(|ours| !ours.can_read(*theirs))?;
        Some(DryRunError::OneWay { kind: kind.clone(), theirs: *theirs, ours: *version })
    });
    unreadable.collect()
}

fn format_of<'a>(kind: &str, formats: &'a [Format]) -> Option<&'a Format> {
    formats.iter().find(|format| format.kind == kind)
}

fn converse(
    target: &Target,
    state: &[u8],
    main: &MainThread,
    capabilities: &mut Option<CapabilitySet>,
) -> Result<Verdict, DryRunError> {
    let memfd = || -> std::io::Result<File> {
        Ok(rustix::fs::memfd_create("check-update", rustix::fs::MemfdFlags::CLOEXEC)?.into())
    };
    let mut input = memfd()?;
    // A file rather than a pipe: nothing can block on it, whatever the target does.
    let mut output = memfd()?;
    let mut complaints = memfd()?;
    input.write_all(state).and_then(|()| input.rewind())?;
    let mut command = alone(target.file.as_raw_fd(), "--check-update");
    command.stdin(Stdio::from(OwnedFd::from(input))).stdout(output.try_clone()?);
    command.stderr(complaints.try_clone()?);
    let ended = main.spawn(command, PATIENCE).map_err(DryRunError::NotRun)?;
    let Ended { status, capabilities: had } = ended.ok_or(DryRunError::Late(PATIENCE))?;
    *capabilities = Some(had);
    let mut json = String::new();
    output.rewind().and_then(|()| output.read_to_string(&mut json))?;
    serde_json::from_str(&json).map_err(|_| {
        let said = complaints.rewind().map(|()| last_line(&mut complaints)).unwrap_or_default();
        DryRunError::NoVerdict { status, said }
    })
}

/// The program that `fd` is open on, with one argument and no environment: executed as an update would, by this process
/// and this fd.
fn alone(fd: RawFd, argument: &str) -> Command {
    let mut command = Command::new(format!("/proc/self/fd/{fd}"));
    command.arg(argument).env_clear();
    command
}

/// What a program said last, of what is in the first 64 KiB.
fn last_line(output: &mut File) -> String {
    let mut text = Vec::new();
    let _ = output.take(64 << 10).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    line.chars().take(500).collect()
}

/// In the target, as `--check-update`: reads the state from standard input, prints the verdict.
pub(crate) fn answer(seams: &dyn Seams) -> std::io::Result<()> {
    let mut state = Vec::new();
    std::io::stdin().read_to_end(&mut state)?;
    seams.state("check-update", &mut state);
    let reasons = match StateReader::new(&state) {
        Err(error) => vec![error.to_string()],
        Ok(reader) => {
            let foreign = foreign(&reader, &saved::formats());
            // What a decoder says of a section is of use only where all of them are known.
            let decoded =
                if foreign.is_empty() { Opened::new(reader).and_then(|state| state.decode(None)).err() } else { None };
            foreign.into_iter().chain(decoded.map(|error| error.to_string())).collect()
        }
    };
    let formats = saved::formats();
    let mut writes: Vec<_> = formats.iter().map(|format| (format.kind.to_owned(), format.version)).collect();
    seams.writes(&mut writes);
    let verdict = Verdict { build_id: build_info::this().build_id.clone(), reasons, writes };
    println!("{}", serde_json::to_string(&verdict)?);
    Ok(())
}

/// Which sections of a state a build with the formats `ours` cannot read: all of them, where a decoder would stop at
/// the first.
fn foreign(state: &StateReader<'_>, ours: &[Format]) -> Vec<String> {
    let unreadable = state.sections().filter_map(|section| {
        let Section { name, kind, version, data: _ } = section;
        let (name, kind, found) = (name.to_string(), kind.to_string(), *version);
        match format_of(&kind, ours) {
            None => Some(format!("section '{name}': kind '{kind}' is unknown to this build")),
            Some(ours) if ours.can_read(found) => None,
            Some(ours) => Some(StateError::Version { name, kind, found, reads: ours.reads }.to_string()),
        }
    });
    unreadable.collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use theseus_resources::StateWriter;

    use super::*;
    use crate::main_thread::run_child;

    fn capabilities(file: &File, user: Option<u32>) -> CapabilitySet {
        let run = || {
            let mut command = alone(file.as_raw_fd(), "--version");
            command.stdout(Stdio::null());
            user.map(|user| command.uid(user));
            run_child(command, Duration::from_secs(60))
        };
        // A child that another test starts has the file open for writing until its exec.
        let ended = loop {
            match run() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                ended => break ended.unwrap().unwrap(),
            }
        };
        assert!(ended.status.success());
        ended.capabilities
    }

    #[test]
    fn capabilities_are_those_after_the_exec() {
        let mut copy = tempfile::NamedTempFile::new().unwrap();
        std::io::copy(&mut File::open("/bin/true").unwrap(), &mut copy).unwrap();
        rustix::fs::fchmod(&copy, 0o755.into()).unwrap();
        // No longer open for writing.
        let path = copy.into_temp_path();
        let open = || File::open(&path).unwrap();
        let own = rustix::thread::capabilities(None).unwrap().effective;
        if !rustix::process::geteuid().is_root() || !own.contains(CapabilitySet::SETFCAP | CapabilitySet::IPC_LOCK) {
            assert_eq!(
                capabilities(&open(), None),
                CapabilitySet::empty(),
                "no capabilities of the file, and no user who has any"
            );
            return;
        }
        assert!(capabilities(&open(), None).contains(CapabilitySet::IPC_LOCK), "root gets all of them");
        assert_eq!(capabilities(&open(), Some(4711)), CapabilitySet::empty());
        // struct vfs_cap_data, revision 2, effective (include/uapi/linux/capability.h).
        let lock = CapabilitySet::IPC_LOCK;
        let words = [0x0200_0001, lock.bits() as u32, 0, 0, 0];
        let data: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        rustix::fs::setxattr(&*path, "security.capability", &data, rustix::fs::XattrFlags::empty()).unwrap();
        assert_eq!(capabilities(&open(), Some(4711)), lock);
    }

    const OURS: [Format; 2] = [Format::new("vcpu", 1), Format::new("ram", 1)];

    #[test]
    fn every_foreign_section_is_named() {
        let mut writer = StateWriter::new("id");
        for (name, kind, version) in [("ram", "ram", 2), ("tap0", "virtio-net", 1), ("vcpu0", "vcpu", 3)] {
            writer.add(name, &Format::new(kind, version), &()).unwrap();
        }
        let bytes = writer.finish().unwrap();
        let reasons = foreign(&StateReader::new(&bytes).unwrap(), &OURS);
        assert!(matches!(&reasons[..], [a, b] if a.contains("'virtio-net'") && b.contains("version 3")), "{reasons:?}");
    }

    #[test]
    fn a_step_of_one_version_leads_both_ways() {
        let writes = [("vcpu", 3), ("ram", 2), ("new", 9)].map(|(kind, version)| (kind.to_owned(), version));
        let reasons = one_way(&writes, &OURS);
        assert!(matches!(&reasons[..], [one] if one.to_string().contains("version 3 of 'vcpu'")), "{reasons:?}");
        let verdict: Verdict = serde_json::from_str(r#"{"build_id":"a","reasons":[]}"#).unwrap();
        assert!(verdict.writes.is_empty(), "a verdict of the format before");
    }
}
