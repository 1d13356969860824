//! The new VMM: made ready while the guest runs in the old one (prewarm), then restore -> remap -> commit.
//!
//! Until commit it consumes nothing: no console byte, no API request, no guest instruction. So the saved state stays
//! true, and the old VMM may go on at any moment.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use theseus_api::access::Peers;
use theseus_api::server::KeptConnection;
use theseus_api::types::{UpdateEvent, UpdateOutcome, UpdateReport, VmConfig};
use theseus_api::{Body, Reply};
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::Hypervisor;
use theseus_resources::state::Expected;
use theseus_resources::{Channel, Claims, FdKind, FdStore, StateReader, StoredFd};

use super::UpdateError;
use super::dispensable::Dispensable;
use super::saved::{ApiSlots, Beside, Handover, Opened, Saved};
use super::transport::{Arrived, Incoming};
use super::words::{ToNew, ToOld};
use crate::build_info;
use crate::events::EventStream;
use crate::logging::LogConfig;
use crate::machine::restore::Prewarmed;
use crate::machine::{Host, Machine};
use crate::sandbox::Confinement;
use crate::spin;
use crate::supervisor::Supervisor;
use crate::timeline::{NotPassed, Phase, Timeline};

/// The running guest in its new VMM, and what is left to do outside of its pause.
pub(crate) struct Adopted {
    pub host: Host,
    pub machine: Option<Machine>,
    pub config: Option<VmConfig>,
    pub was_shut_down: bool,
    pub api: Option<AdoptedApi>,
    pub peers: Peers,
    pub supervisor: Supervisor,
    pub confinement: Confinement,
    pub events: EventStream,
}

pub(crate) struct AdoptedApi {
    pub listener: UnixListener,
    pub connections: Vec<KeptConnection>,
}

/// What comes from the old VMM.
struct Inbox<'a> {
    old: Incoming<'a>,
    fd_store: FdStore,
    claims: Claims,
}

impl Inbox<'_> {
    /// Decodes a state, and gets the rest of the descriptors. `fds`: those that came with it; `ahead`: what came ahead
    /// of it.
    fn decode(&mut self, state: Opened<'_>, ahead: Option<Beside>, fds: Vec<OwnedFd>) -> Result<Saved, UpdateError> {
        let mut saved = state.decode(ahead)?;
        self.receive(&mut saved.beside, fds)?;
        Ok(saved)
    }

    /// What comes ahead of the state of the guest that stands still.
    fn ahead(&mut self, Arrived { bytes, fds, .. }: Arrived) -> Result<Beside, UpdateError> {
        let mut beside = Beside::decode(&bytes)?;
        self.receive(&mut beside, fds)?;
        Ok(beside)
    }

    fn receive(&mut self, beside: &mut Beside, fds: Vec<OwnedFd>) -> Result<(), UpdateError> {
        let Some(records) = beside.fd_store.take() else { return Ok(()) };
        let fds = self.old.descriptors(fds, self.fd_store.missing(&records))?;
        Ok(self.fd_store.receive(&mut self.claims, records, fds)?)
    }
}

/// Takes the guest over from the old VMM. On an error the guest has not been touched, and is the old one's.
/// `started`: CLOCK_MONOTONIC at the start of main.
pub(crate) fn adopt(
    channel: &Channel,
    timeline: &Timeline,
    requests: Arc<dyn GuestRequests>,
    started: u64,
) -> Result<Adopted, UpdateError> {
    timeline.check(Phase::Exec)?;
    timeline.stamp_at(Phase::Exec, started);
    let dispensable = Dispensable::new();

    let old = Incoming::new(channel, &**timeline.seams());
    let mut inbox = Inbox { old, fd_store: FdStore::new(), claims: Claims::default() };
    let Arrived { bytes, fds, .. } = inbox.old.state(&[ToNew::Rehearsal], || ())?;
    let mut expected = Expected::default();
    let reader = StateReader::new(&bytes)?.remembering(&mut expected);
    let Saved { beside: Beside { mut handover, .. }, machine } = inbox.decode(Opened::new(reader)?, None, fds)?;
    if let Err(error) = LogConfig::restore(std::mem::take(&mut handover.log)).start_held() {
        crate::emit(std::io::stderr(), &format!("after an update: {error:#}"));
    }
    let kvm = inbox.claims.claim(handover.kvm, FdKind::Kvm)?;
    let events = EventStream::claim(handover.events, &mut inbox.claims)?;
    let (hypervisor, fd_store) = (Arc::new(Hypervisor::from_kept(kvm)), inbox.fd_store.clone());
    let host = Host { hypervisor, fd_store, requests, seams: timeline.seams().clone() };
    let mut prewarmed = machine.map(|state| Prewarmed::new(state, &host, &mut inbox.claims)).transpose()?;
    spin::look_for_room();
    timeline.pass(Phase::Prewarm)?;
    inbox.old.say(&ToOld::Ready)?;

    let soon = || prewarmed.iter().for_each(Prewarmed::awake);
    let mut arrived = inbox.old.state(&[ToNew::Ahead, ToNew::State], soon)?;
    let mut ahead = None;
    if arrived.word == ToNew::Ahead {
        timeline.seams().at("ahead").map_err(NotPassed::from)?;
        ahead = Some(inbox.ahead(arrived)?);
        spin::look_for_room();
        inbox.old.say(&ToOld::Ready)?;
        arrived = inbox.old.state(&[ToNew::State], soon)?;
    }
    let Arrived { bytes, fds, .. } = arrived;
    // The guest stands still. Its vCPUs' threads begin before the rest is decoded.
    let mut state = Opened::new(StateReader::new(&bytes)?.knowing(&mut expected))?;
    let vcpus = state.take_vcpus();
    prewarmed.as_mut().map_or(Ok(()), |ready| ready.begin(vcpus))?;
    let Saved { beside: Beside { mut handover, config, .. }, machine } = inbox.decode(state, ahead, fds)?;
    timeline.pass(Phase::Claim)?;
    let Inbox { old, mut claims, .. } = inbox;
    let api = handover.api.take().map(|slots| ClaimedApi::new(slots, &mut claims)).transpose()?;
    let running = machine.as_ref().is_some_and(|machine| machine.running);
    let restored = prewarmed.zip(machine).map(|(ready, state)| ready.restore(state, &host, &mut claims, timeline));
    let mut machine = restored.transpose()?;
    claims.finish()?;
    if let Some(machine) = &machine {
        machine.remap()?;
        timeline.pass(Phase::Remap)?;
    }

    if !timeline.commit()? {
        superseded();
    }
    if let Some(machine) = &mut machine {
        machine.activate(running)?;
    }
    timeline.stamp(Phase::Commit);

    // From here on the guest runs, and no error is worth losing it.
    drop(dispensable);
    let confinement = Confinement::restore(std::mem::take(&mut handover.confinement));
    confinement.close();
    if let Err(error) = old.say(&ToOld::Committed) {
        log::debug!("{error}");
    }
    let mut supervisor = Supervisor::restore(std::mem::take(&mut handover.supervisor));
    supervisor.is_started_from(handover.target.take().or_else(super::target::started_from));
    if let Some(machine) = machine.as_ref().filter(|_| running) {
        timeline.resumed(machine.vcpus.entered());
    }
    let report = report(&handover, timeline, machine.as_ref());
    log::info!("{:?} from build {}: pause {} us", report.outcome, report.from.build_id, report.pause_us.unwrap_or(0));
    events.emit(UpdateEvent::from(report.clone()));
    let api = api.map(|api| api.open(&report)).transpose();
    let api = api.inspect_err(|error| log::error!("the API is lost: {error}")).unwrap_or_default();
    let Handover { was_shut_down, peers, .. } = handover;
    let peers = Peers::restore(peers);
    Ok(Adopted { host, machine, config, was_shut_down, api, peers, supervisor, confinement, events })
}

/// Tells the old VMM why this one ends, before it has touched anything.
pub(crate) fn give_up(channel: &Channel, timeline: &Timeline, cause: String) {
    timeline.set_cause(&cause);
    // One that is gone hears of nothing.
    let _ = Incoming::new(channel, &**timeline.seams()).say(&ToOld::Failed(cause));
}

/// The old VMM has the guest, and is about to end this process.
fn superseded() -> ! {
    log::error!("the old VMM has taken the guest back");
    loop {
        std::thread::park();
    }
}

/// The API's fds, still unused.
struct ClaimedApi {
    listener: StoredFd,
    idle: Vec<StoredFd>,
    caller: Option<StoredFd>,
    caller_ends: bool,
}

impl ClaimedApi {
    fn new(slots: ApiSlots, claims: &mut Claims) -> Result<Self, UpdateError> {
        let ApiSlots { listener, idle, caller, caller_ends } = slots;
        let mut claim = |slot, kind| claims.claim(slot, kind);
        Ok(Self {
            listener: claim(listener, FdKind::ApiListener)?,
            idle: idle.into_iter().map(|slot| claim(slot, FdKind::ApiConnection)).collect::<Result<_, _>>()?,
            caller: caller.map(|slot| claim(slot, FdKind::ApiConnection)).transpose()?,
            caller_ends,
        })
    }

    /// Hands them to the server, the caller's with its answer.
    fn open(self, report: &UpdateReport) -> std::io::Result<AdoptedApi> {
        use std::os::fd::AsFd;
        let Self { listener, idle, caller, caller_ends } = self;
        let stream = |kept: &StoredFd| kept.as_fd().try_clone_to_owned().map(UnixStream::from);
        let answer: Reply = Ok(Body::Json(serde_json::to_value(report)?));
        let mut connections = Vec::new();
        let all = idle.iter().map(|kept| (kept, None)).chain(caller.iter().map(|kept| (kept, Some(answer.clone()))));
        for (kept, answer) in all {
            let ends = answer.is_some() && caller_ends;
            // Its client is lost, the others are not.
            match stream(kept) {
                Ok(stream) => connections.push(KeptConnection { stream, answer, ends }),
                Err(error) => log::error!("{}: {error}", kept.name()),
            }
        }
        Ok(AdoptedApi { listener: listener.as_fd().try_clone_to_owned()?.into(), connections })
    }
}

fn report(handover: &Handover, timeline: &Timeline, machine: Option<&Machine>) -> UpdateReport {
    UpdateReport {
        outcome: UpdateOutcome::Updated,
        from: handover.from.clone().into(),
        to: Some(build_info::this().clone()),
        pid: crate::keeper::pid(),
        vmm_pid: std::process::id(),
        vcpu_threads: machine.map(|machine| machine.vcpus.threads()).unwrap_or_default(),
        pause_us: timeline.pause_us(),
        phases: timeline.phases(),
        devices: machine.map(|machine| machine.passthrough_ids()).unwrap_or_default(),
        containers: machine.map(|machine| machine.container_names()).unwrap_or_default(),
        reasons: Vec::new(),
    }
}
