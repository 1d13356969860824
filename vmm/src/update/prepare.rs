//! Prepare: the guest runs. Everything that is slow or can be refused happens here.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use theseus_api::types::{UpdateOutcome, UpdateRequest};
use theseus_resources::vault::Record;
use theseus_resources::{KeptFd, Pages, Purpose, StateWriter, Vault};

use super::pause::Release;
use super::preflight::{self, Needs};
use super::rights::{Image, Wants};
use super::saved::Handover;
use super::target::{self, Rehearsal, Target};
use super::timeline::{Phase, Timeline};
use super::{NotUpdated, Subject};
use crate::build_info;
use crate::logging::LogConfig;
use crate::machine::state::Depth;
use crate::vcpus::placement::Placement;

pub struct Prepared {
    pub target: Arc<Target>,
    pub timeline: Arc<Timeline>,
    pub kept: Kept,
    /// Read here, as that means opening files.
    pub placements: Vec<Placement>,
}

/// What travels beside the state itself.
pub struct Kept {
    pub timeline: KeptFd,
    pub release: Release,
    /// The running binary: it can be started again even if its file is replaced or deleted.
    pub old_binary: KeptFd,
}

impl Kept {
    fn new(vault: &Vault, timeline: KeptFd) -> std::io::Result<Self> {
        let old_binary = std::fs::File::open("/proc/self/exe")?;
        Ok(Self {
            timeline,
            release: Release::new(vault)?,
            old_binary: vault.keep("old binary", Purpose::Binary, old_binary.into()),
        })
    }
}

impl Prepared {
    /// Refuses with every reason there is.
    pub fn new(subject: &Subject<'_>, request: &UpdateRequest) -> Result<Self, NotUpdated> {
        let vault = &subject.host.vault;
        let io = |error: std::io::Error| {
            NotUpdated::refused(None, vec![format!("cannot prepare: {error}: {}", preflight::remedy(&error))])
        };
        let (timeline, fd) = Timeline::new(vault).map_err(io)?;
        let timeline = Arc::new(timeline);
        timeline.stamp(Phase::Start);
        let kept = Kept::new(vault, fd).map_err(io)?;

        let mut reasons = Vec::new();
        let mut needs = Needs::default();
        if let Some(machine) = &subject.machine {
            reasons.extend(machine.passthrough.probe());
            needs = Needs {
                placements: machine.vcpus.placements(),
                ram: machine.memory_size(),
                small_pages: machine.ram.pages() == Pages::Small,
            };
        }
        reasons.extend(preflight::reasons(&needs));
        reasons.extend(crate::logging::stands_still());
        let target = match Target::open(request, build_info::this(), subject.supervisor) {
            Ok(target) => Some(target),
            Err(more) => {
                reasons.extend(more);
                None
            }
        };
        let mut images = Vec::new();
        if let Some(target) = &target {
            match dry_run(subject, &kept, target) {
                Ok(state) => {
                    let Rehearsal { reasons: more, capabilities } = target::ask(target, &state, subject.main);
                    reasons.extend(more);
                    let image = |has| Image::new("the new image", &target.path, &target.file, has);
                    images.extend(capabilities.map(image));
                }
                Err(reason) => reasons.push(reason),
            }
        }
        match old_image(subject, &kept) {
            Ok(image) => images.push(image),
            Err(reason) => reasons.push(reason),
        }
        match Wants::of_this_process(&needs.placements) {
            Ok(wants) => reasons.extend(wants.reasons(&images)),
            Err(error) => {
                reasons
                    .push(format!("the rights of this process cannot be read: {error}: {}", preflight::remedy(&error)));
            }
        }
        match target {
            Some(target) if reasons.is_empty() => {
                log::info!("update to {}: prepared", target::describe(&target.path, &target.build));
                let placements = needs.placements;
                crate::heap::warm(placements.len());
                match timeline.pass(Phase::Prepare).and_then(|()| target.unchanged()) {
                    Ok(()) => Ok(Self { target: Arc::new(target), timeline, kept, placements }),
                    Err(reason) => Err(NotUpdated::refused(Some(target.build), vec![reason])),
                }
            }
            target => Err(NotUpdated::refused(target.map(|target| target.build), reasons)),
        }
    }

    /// The end of a dry run that found nothing against the update.
    pub fn ready(self) -> NotUpdated {
        NotUpdated {
            outcome: UpdateOutcome::Ready,
            to: Some(self.target.build.clone()),
            reasons: Vec::new(),
            timeline: Some(self.timeline),
        }
    }
}

/// What a way back leads to.
fn old_image(subject: &Subject<'_>, kept: &Kept) -> Result<Image, String> {
    let path = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let capabilities = target::capabilities_of(kept.old_binary.as_raw_fd(), subject.main)
        .map_err(|reason| format!("there would be no way back: the running binary {}: {reason}", path.display()))?;
    Ok(Image::new("the old binary on a way back", &path, &kept.old_binary, capabilities))
}

/// The state as it is now, with the guest running: all of it but the vCPUs.
fn dry_run(subject: &Subject<'_>, kept: &Kept, target: &Target) -> Result<Vec<u8>, String> {
    let mut writer = StateWriter::new(&build_info::this().build_id);
    let mut encode = || -> Result<Vec<u8>, crate::machine::MachineError> {
        handover(subject, kept, target, subject.host.vault.manifest(), None).encode(&mut writer)?;
        if let Some(machine) = &subject.machine {
            machine.save(&mut writer, Depth::DryRun, machine.vcpus.is_running(), Vec::new())?;
        }
        Ok(writer.finish()?)
    };
    encode().map_err(|error| format!("the present state cannot be saved: {error}"))
}

/// The section that says what else the new image gets.
pub fn handover(
    subject: &Subject<'_>,
    kept: &Kept,
    target: &Target,
    vault: Vec<Record>,
    api: Option<super::saved::ApiSlots>,
) -> Handover {
    Handover {
        vault,
        from: build_info::this().clone(),
        to: target.build.clone(),
        target: Some(target.path.clone()),
        old_binary: kept.old_binary.slot(),
        supervisor: subject.supervisor.clone(),
        events: subject.events.slot(),
        log: LogConfig::in_use(),
        timeline: kept.timeline.slot(),
        kvm: subject.host.hypervisor.kept().slot(),
        release: kept.release.slot(),
        api,
        peers: subject.peers.clone(),
        config: subject.config.cloned(),
        booted: subject.machine.is_some(),
        was_shut_down: subject.was_shut_down,
    }
}
