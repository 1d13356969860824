//! The new image: claim -> restore -> remap -> commit.
//!
//! Until commit it consumes nothing: no console byte, no API request, no guest instruction. So the saved state stays true, and any image
//! can be started from it again: the way back ([`super::back`]) is this same story in the old binary.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use theseus_api::access::Peers;
use theseus_api::server::KeptConnection;
use theseus_api::types::{UpdateOutcome, UpdateReport, VmConfig};
use theseus_api::{Body, Reply};
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::Hypervisor;
use theseus_resources::{Claims, KeptFd, Purpose, StateReader, Vault};

use super::arbiter::Way;
use super::back::{WayBack, superseded};
use super::pause::Release;
use super::saved::{ApiSlots, Handover, Saved, Sealed};
use super::timeline::{Phase, Timeline};
use crate::build_info;
use crate::events::EventStream;
use crate::machine::{Host, Machine};
use crate::supervisor::Supervisor;

/// The running guest in its new image, and what is left to do outside of its pause.
pub struct Adopted {
    pub host: Host,
    pub machine: Option<Machine>,
    pub config: Option<VmConfig>,
    pub was_shut_down: bool,
    pub api: Option<AdoptedApi>,
    pub peers: Peers,
    pub helper: Option<Helper>,
    pub supervisor: Supervisor,
    pub events: EventStream,
}

pub struct AdoptedApi {
    pub listener: UnixListener,
    pub connections: Vec<KeptConnection>,
}

/// The parked helper of the last update, while it has not been reaped.
pub struct Helper {
    pid: libc::pid_t,
    release: Release,
}

impl Helper {
    /// From now on the old address space is torn down, at idle priority.
    pub fn let_go(&self) {
        self.release.let_go();
    }

    /// It has had its time at idle priority.
    pub fn hurry(&self) {
        super::park::hurry(self.pid);
    }

    /// Whether it is gone; waits for that as long as `patience`.
    pub fn reap(&self, patience: Duration) -> bool {
        super::park::reap(self.pid, patience)
    }
}

/// Takes over what the image before left. On an error the guest has not been touched, and `back` leads to the old binary.
/// `started`: CLOCK_MONOTONIC at the start of main.
pub fn adopt(back: &mut WayBack, requests: Arc<dyn GuestRequests>, started: u64) -> Result<Adopted, String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let timeline = back.timeline.clone();
    let way = timeline.arbiter().way().ok_or("this state has been used already")?;
    // The helper may take the guest while this image starts: then it is not this one that was started for it.
    if way == Way::BackByHelper && timeline.helper() != Some(std::process::id()) {
        superseded();
    }
    let failed = (way != Way::Forward).then(|| Failed::of(&timeline));
    timeline.check(Phase::Exec)?;
    timeline.stamp_at(Phase::Exec, started);

    let bytes = Sealed::map(back.state()).map_err(|error| format!("the saved state cannot be read: {error}"))?;
    let bytes = if way == Way::Forward { crate::test_hooks::truncated("claim", &bytes) } else { &bytes };
    let reader = StateReader::new(bytes).map_err(|error| text(&error))?;
    let Saved { mut handover, machine } = Saved::decode(reader).map_err(|error| text(&error))?;
    if let Err(error) = std::mem::take(&mut handover.log).start_held() {
        crate::say(std::io::stderr(), &format!("after an update: {error:#}"));
    }
    if let Some(Failed { phase, cause }) = &failed {
        log::error!("the update failed in phase {}, the guest comes back: {cause}", phase.name());
    }
    let records = std::mem::take(&mut handover.vault);
    // SAFETY: the first thing this image does with fds: nobody else owns those of the manifest.
    let (vault, mut claims) = unsafe { Vault::adopt(records) }.map_err(|error| text(&error))?;
    back.hold(&vault);
    // The page itself is mapped since the start of main; its fd and the old binary's are for the way back only, which holds them.
    for (slot, purpose) in [(handover.timeline, Purpose::State), (handover.old_binary, Purpose::Binary)] {
        drop(claims.claim(slot, purpose).map_err(|error| text(&error))?);
    }
    let kvm = claims.claim(handover.kvm, Purpose::Kvm).map_err(|error| text(&error))?;
    let release = Release::claim(handover.release, &mut claims).map_err(|error| text(&error))?;
    let events = EventStream::claim(handover.events, &mut claims).map_err(|error| text(&error))?;
    let api = handover.api.take().map(|slots| ClaimedApi::new(slots, &mut claims)).transpose()?;
    let host = Host { hypervisor: Arc::new(Hypervisor::from_kept(kvm)), vault, requests };

    let running = machine.as_ref().is_some_and(|machine| machine.running);
    let restored = machine.map(|state| Machine::restore(state, &host, &mut claims, &timeline, way)).transpose();
    let mut machine = restored.map_err(|error| text(&error))?;
    way.bear(claims.finish()).map_err(|error| text(&error))?;
    if let Some(machine) = &machine {
        machine.passthrough.remap(&machine.ram, &machine.vm, way).map_err(|error| text(&error))?;
        timeline.pass(Phase::Remap)?;
    }

    timeline.check(Phase::Commit)?;
    if way == Way::Forward {
        crate::test_hooks::fault("word")?;
    }
    if !timeline.arbiter().commit(way) {
        superseded();
    }
    if way == Way::Forward {
        crate::test_hooks::fault("committed")?;
    }
    if let Some(machine) = &machine {
        machine.passthrough.settle(&machine.vm);
    }
    if let Some(machine) = machine.as_mut().filter(|_| running) {
        machine.vcpus.resume().map_err(|error| text(&error))?;
    }
    timeline.stamp(Phase::Commit);

    // From here on the guest runs, and no error is worth losing it.
    back.committed();
    let mut supervisor = std::mem::take(&mut handover.supervisor);
    if way == Way::Forward {
        supervisor.is_started_from(handover.target.take().or_else(super::target::started_from));
    }
    let helper = timeline.helper().filter(|_| way != Way::BackByHelper);
    let helper = helper.map(|pid| Helper { pid: pid as libc::pid_t, release });
    if let Some(helper) = &helper {
        helper.let_go();
    }
    if way == Way::BackByHelper {
        supervisor.pid_changed();
    }
    let report = report(&handover, failed, &timeline, machine.as_ref());
    log::info!("{:?} from build {}: pause {} us", report.outcome, report.from.build_id, report.pause_us.unwrap_or(0));
    events.say("update", report.outcome.name(), serde_json::to_value(&report).unwrap_or_default());
    let api = api.map(|api| api.open(&report)).transpose();
    let api = api.inspect_err(|error| log::error!("the API is lost: {error}")).unwrap_or_default();
    let Handover { config, was_shut_down, peers, .. } = handover;
    Ok(Adopted { host, machine, config, was_shut_down, api, peers, helper, supervisor, events })
}

/// What became of the new image.
struct Failed {
    phase: Phase,
    cause: String,
}

impl Failed {
    fn of(timeline: &Timeline) -> Self {
        let failed = Self { phase: timeline.current(), cause: timeline.cause() };
        timeline.forget_new_image();
        failed
    }
}

/// The API's fds, still unused.
struct ClaimedApi {
    listener: KeptFd,
    idle: Vec<KeptFd>,
    caller: Option<KeptFd>,
}

impl ClaimedApi {
    fn new(slots: ApiSlots, claims: &mut Claims) -> Result<Self, String> {
        let ApiSlots { listener, idle, caller } = slots;
        let mut claim = |slot, purpose| claims.claim(slot, purpose).map_err(|error| error.to_string());
        Ok(Self {
            listener: claim(listener, Purpose::ApiListener)?,
            idle: idle.into_iter().map(|slot| claim(slot, Purpose::ApiConnection)).collect::<Result<_, _>>()?,
            caller: caller.map(|slot| claim(slot, Purpose::ApiConnection)).transpose()?,
        })
    }

    /// Hands them to the server, the caller's with its answer.
    fn open(self, report: &UpdateReport) -> std::io::Result<AdoptedApi> {
        use std::os::fd::AsFd;
        let Self { listener, idle, caller } = self;
        let stream = |kept: &KeptFd| kept.as_fd().try_clone_to_owned().map(UnixStream::from);
        let answer: Reply = Ok(Body::Json(serde_json::to_value(report)?));
        let mut connections = Vec::new();
        let all = idle.iter().map(|kept| (kept, None)).chain(caller.iter().map(|kept| (kept, Some(answer.clone()))));
        for (kept, answer) in all {
            // Its client is lost, the others are not.
            match stream(kept) {
                Ok(stream) => connections.push(KeptConnection { stream, answer }),
                Err(error) => log::error!("{}: {error}", kept.name()),
            }
        }
        Ok(AdoptedApi { listener: listener.as_fd().try_clone_to_owned()?.into(), connections })
    }
}

fn report(handover: &Handover, failed: Option<Failed>, timeline: &Timeline, machine: Option<&Machine>) -> UpdateReport {
    let (outcome, to) = match &failed {
        Some(_) => (UpdateOutcome::RolledBack, handover.to.clone()),
        None => (UpdateOutcome::Updated, build_info::this().clone()),
    };
    UpdateReport {
        outcome,
        from: handover.from.clone(),
        to: Some(to),
        pid: std::process::id(),
        pause_us: timeline.pause_us(),
        phases: timeline.phases(),
        devices: machine.map(|machine| machine.passthrough.ids()).unwrap_or_default(),
        containers: machine.map(|machine| machine.passthrough.container_names()).unwrap_or_default(),
        reasons: failed.iter().map(|failed| format!("phase {}: {}", failed.phase.name(), failed.cause)).collect(),
    }
}
