//! Prepare: the guest runs. Everything that is slow or can be refused happens here.

use std::sync::Arc;

use theseus_api::types::{UpdateOutcome, UpdateRequest};
use theseus_resources::StateWriter;

use super::pause::Release;
use super::saved::Handover;
use super::target::{self, Target};
use super::timeline::{Phase, Timeline};
use super::{NotUpdated, Subject};
use crate::build_info;
use crate::log_config::LogConfig;
use crate::machine::state::Depth;
use crate::vcpus::placement::Placement;

pub struct Prepared {
    pub target: Target,
    pub timeline: Arc<Timeline>,
    pub release: Release,
    /// Read here, as that means opening files.
    pub placements: Vec<Placement>,
}

impl Prepared {
    /// Refuses with every reason there is.
    pub fn new(subject: &Subject<'_>, request: &UpdateRequest) -> Result<Self, NotUpdated> {
        let vault = &subject.host.vault;
        let io = |error: std::io::Error| NotUpdated::refused(None, vec![format!("cannot prepare: {error}")]);
        let timeline = Arc::new(Timeline::new(vault).map_err(io)?);
        timeline.stamp(Phase::Start);
        let release = Release::new(vault).map_err(io)?;

        let mut reasons = Vec::new();
        if let Some(machine) = &subject.machine {
            reasons.extend(machine.passthrough.probe());
        }
        let target = match Target::open(request, build_info::this()) {
            Ok(target) => Some(target),
            Err(more) => {
                reasons.extend(more);
                None
            }
        };
        if let Some(target) = &target {
            match dry_run(subject, &timeline, &release) {
                Ok(state) => reasons.extend(target::ask(target, &state, subject.main).err().unwrap_or_default()),
                Err(reason) => reasons.push(reason),
            }
        }
        match target {
            Some(target) if reasons.is_empty() => {
                log::info!("update to {}: prepared", target::describe(&target.path, &target.build));
                let placements = subject.machine.as_ref().map(|machine| machine.vcpus.placements()).unwrap_or_default();
                timeline.stamp(Phase::Prepare);
                Ok(Self { target, timeline, release, placements })
            }
            target => Err(NotUpdated::refused(target.map(|target| target.build), reasons)),
        }
    }

    /// The end of a dry run that found nothing against the update.
    pub fn ready(self) -> NotUpdated {
        NotUpdated {
            outcome: UpdateOutcome::Ready,
            to: Some(self.target.build),
            reasons: Vec::new(),
            timeline: Some(self.timeline),
        }
    }
}

/// The state as it is now, with the guest running: all of it but the vCPUs.
fn dry_run(subject: &Subject<'_>, timeline: &Timeline, release: &Release) -> Result<Vec<u8>, String> {
    let mut writer = StateWriter::new(&build_info::this().build_id);
    let mut encode = || -> Result<Vec<u8>, crate::machine::MachineError> {
        handover(subject, timeline, release, None).encode(&mut writer)?;
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
    timeline: &Timeline,
    release: &Release,
    api: Option<super::saved::ApiSlots>,
) -> Handover {
    let vault = &subject.host.vault;
    Handover {
        vault: vault.manifest(),
        from: build_info::this().clone(),
        log: LogConfig::in_use(),
        timeline: timeline.slot(),
        kvm: subject.host.hypervisor.kept().slot(),
        release: release.slot(),
        api,
        config: subject.config.cloned(),
        booted: subject.machine.is_some(),
        was_shut_down: subject.was_shut_down,
    }
}
