//! The new image: claim -> restore -> remap -> commit.
//!
//! Until commit it consumes nothing: no console byte, no API request, no guest instruction. So the saved state stays true, and any image
//! could be started from it again (the way back after exec will be that).

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use theseus_api::server::KeptConnection;
use theseus_api::types::{BuildInfo, UpdateOutcome, UpdateReport, VmConfig};
use theseus_api::{Body, Reply};
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::Hypervisor;
use theseus_resources::{Claims, KeptFd, Purpose, StateReader, Vault};

use super::pause::Release;
use super::saved::{ApiSlots, Handover, Saved};
use super::timeline::{Phase, Timeline};
use crate::build_info;
use crate::machine::{Host, Machine};

/// The running guest in its new image, and what is left to do outside of its pause.
pub struct Adopted {
    pub host: Host,
    pub machine: Option<Machine>,
    pub config: Option<VmConfig>,
    pub was_shut_down: bool,
    pub api: Option<AdoptedApi>,
    pub helper: Option<Helper>,
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

    /// Whether it is gone; waits for that as long as `patience`.
    pub fn reap(&self, patience: Duration) -> bool {
        super::park::reap(self.pid, patience)
    }
}

/// Takes over what the image before left in `state`. `started`: CLOCK_MONOTONIC at the start of main.
pub fn adopt(state: RawFd, requests: Arc<dyn GuestRequests>, started: u64) -> Result<Adopted, String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let bytes = read_state(state).map_err(|error| format!("the saved state cannot be read: {error}"))?;
    let reader = StateReader::new(&bytes).map_err(|error| text(&error))?;
    let Saved { mut handover, machine } = Saved::decode(reader).map_err(|error| text(&error))?;
    if let Err(error) = std::mem::take(&mut handover.log).start() {
        eprintln!("theseus: after an update: {error:#}");
    }
    let records = std::mem::take(&mut handover.vault);
    // SAFETY: the first thing this image does with fds: nobody else owns those of the manifest.
    let (vault, mut claims) = unsafe { Vault::adopt(records) }.map_err(|error| text(&error))?;
    let Handover { from, log: _, timeline, kvm, release, api, config, booted: _, was_shut_down, vault: _ } = handover;
    let timeline = Timeline::claim(timeline, &mut claims)?;
    timeline.stamp_at(Phase::Exec, started);
    let kvm = claims.claim(kvm, Purpose::Kvm).map_err(|error| text(&error))?;
    let release = Release::claim(release, &mut claims).map_err(|error| text(&error))?;
    let api = api.map(|slots| ClaimedApi::new(slots, &mut claims)).transpose()?;
    let host = Host { hypervisor: Arc::new(Hypervisor::from_kept(kvm)), vault, requests };

    let running = machine.as_ref().is_some_and(|machine| machine.running);
    let restored = machine.map(|state| Machine::restore(state, &host, &mut claims, &timeline)).transpose();
    let mut machine = restored.map_err(|error| text(&error))?;
    claims.finish().map_err(|error| text(&error))?;
    if let Some(machine) = &machine {
        machine.passthrough.remap(&machine.ram, &machine.vm).map_err(|error| text(&error))?;
        timeline.stamp(Phase::Remap);
    }

    if !timeline.win() {
        return Err("the old image has taken the guest back".into());
    }
    if let Some(machine) = machine.as_mut().filter(|_| running) {
        machine.vcpus.resume().map_err(|error| text(&error))?;
    }
    timeline.stamp(Phase::Commit);

    // From here on the guest runs.
    let helper = timeline.helper().map(|pid| Helper { pid: pid as libc::pid_t, release });
    if let Some(helper) = &helper {
        helper.let_go();
    }
    let report = report(from, &timeline, machine.as_ref());
    log::info!("updated from build {}: pause {} us", report.from.build_id, report.pause_us.unwrap_or(0));
    let api = api.map(|api| api.open(&report)).transpose().map_err(|error| format!("the API is lost: {error}"))?;
    Ok(Adopted { host, machine, config, was_shut_down, api, helper })
}

fn read_state(fd: RawFd) -> std::io::Result<Vec<u8>> {
    // SAFETY: the fd that the image before left for this, and nobody else here knows of it; closed after reading.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = rustix::fs::fstat(&fd)?.st_size;
    let mut bytes = vec![0; usize::try_from(size).map_err(std::io::Error::other)?];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(&fd, &mut bytes[done..], done as u64)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(bytes)
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
        for kept in &idle {
            connections.push(KeptConnection { stream: stream(kept)?, answer: None });
        }
        if let Some(kept) = &caller {
            connections.push(KeptConnection { stream: stream(kept)?, answer: Some(answer) });
        }
        Ok(AdoptedApi { listener: listener.as_fd().try_clone_to_owned()?.into(), connections })
    }
}

fn report(from: BuildInfo, timeline: &Timeline, machine: Option<&Machine>) -> UpdateReport {
    UpdateReport {
        outcome: UpdateOutcome::Updated,
        from,
        to: Some(build_info::this().clone()),
        pid: std::process::id(),
        pause_us: timeline.pause_us(),
        phases: timeline.phases(),
        devices: machine.map(|machine| machine.passthrough.ids()).unwrap_or_default(),
        containers: machine.map(|machine| machine.passthrough.container_names()).unwrap_or_default(),
        reasons: Vec::new(),
    }
}
