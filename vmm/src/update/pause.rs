//! From the stopped guest to the exec: Paused, Saved, Invalidated. Each is a guard over the one before.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use theseus_api::server::{ConnId, Frozen};
use theseus_resources::{Claims, KeptFd, Purpose, Slot, StateReader, StateWriter, Vault};

use super::Subject;
use super::back::Inherited;
use super::prepare::{Prepared, handover};
use super::saved::{self, ApiSlots, Sealed};
use super::timeline::Phase;
use crate::build_info;
use crate::logging::Held;
use crate::machine::state::Depth;
use crate::machine::{Host, Machine, MachineError};
use crate::main_thread::{ExecPlan, MainThread};

/// How long running requests may take to end, and vCPUs to stop: a hung device must not hold the guest for longer.
const DRAIN: Duration = Duration::from_secs(5);

const GUEST_ASKED: &str = "the guest has just asked for power-off or reset";

/// The eventfd that lets a parked helper go.
pub struct Release(KeptFd);

impl Release {
    pub fn new(vault: &Vault) -> std::io::Result<Self> {
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        Ok(Self(vault.keep("helper release", Purpose::State, fd)))
    }

    pub fn claim(slot: Slot, claims: &mut Claims) -> Result<Self, theseus_resources::vault::VaultError> {
        Ok(Self(claims.claim(slot, Purpose::State)?))
    }

    pub fn slot(&self) -> Slot {
        self.0.slot()
    }

    /// Lets the helper go; harmless if there is none.
    pub fn let_go(&self) {
        if let Err(error) = rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            log::error!("cannot let the parked helper go: {error}");
        }
    }
}

/// The guest's vCPUs are stopped with nothing pending, its interrupts wait in their eventfds, and the API stands still.
/// Dropped in the order of the fields: the guest runs again first, then the log and the API.
pub struct Paused<'a> {
    guest: Option<StoppedGuest<'a>>,
    _held: Held,
    _frozen: Option<Frozen<'a>>,
    host: &'a Host,
    main: &'a MainThread,
    handover: saved::Handover,
    /// Held so that the vault keeps them: their slots are in the handover.
    _kept_connections: Vec<KeptFd>,
    prepared: Prepared,
}

struct StoppedGuest<'a> {
    machine: &'a mut Machine,
    was_running: bool,
}

impl Drop for StoppedGuest<'_> {
    fn drop(&mut self) {
        self.machine.passthrough.resume(&self.machine.vm);
        if self.was_running
            && let Err(error) = self.machine.vcpus.resume()
        {
            log::error!("the guest cannot go on: {error}");
        }
    }
}

impl<'a> Paused<'a> {
    pub fn new(
        subject: &'a mut Subject<'_>,
        prepared: Prepared,
        caller: Option<ConnId>,
        deadline: Duration,
    ) -> Result<Self, String> {
        // A last look at the queue, too: the server waits for the answers to all that is in there.
        if (subject.guest_asked)() {
            return Err(GUEST_ASKED.into());
        }
        let drain = deadline.min(DRAIN);
        let frozen = subject.server.map(|server| server.freeze(caller, drain)).transpose();
        let frozen = frozen.map_err(|error| error.to_string())?;
        let mut kept_connections = Vec::new();
        let api =
            frozen.as_ref().map(|frozen| keep_api(frozen, &subject.host.vault, &mut kept_connections)).transpose();
        let api = api.map_err(|error| format!("cannot keep the API's connections: {error}"))?;
        let mut handover = handover(subject, &prepared.kept, &prepared.target, Vec::new(), api);
        prepared.timeline.start_deadline(deadline);
        prepared.timeline.pass(Phase::Freeze)?;

        let held = Held::new();
        let guest = match subject.machine.as_deref_mut() {
            Some(machine) => {
                let was_running = machine.vcpus.is_running();
                // vCPUs first: a vector that the guest enables while we look would be missed.
                machine.pause(drain).map_err(|error| error.to_string())?;
                let guest = StoppedGuest { machine, was_running };
                if (subject.guest_asked)() {
                    return Err(GUEST_ASKED.into());
                }
                guest.machine.passthrough.quiesce(&guest.machine.vm).map_err(|error| error.to_string())?;
                Some(guest)
            }
            None => None,
        };
        // Only now: a guest that turns MSI-X on has eventfds made for it until its last vCPU stands.
        handover.vault = subject.host.vault.manifest();
        prepared.timeline.pass(Phase::Pause)?;
        Ok(Self {
            guest,
            _held: held,
            _frozen: frozen,
            host: subject.host,
            main: subject.main,
            handover,
            _kept_connections: kept_connections,
            prepared,
        })
    }

    /// Pure: the guest and its devices stay as they are.
    pub fn save(self) -> Result<Saved<'a>, MachineError> {
        let mut writer = StateWriter::new(&build_info::this().build_id);
        self.handover.encode(&mut writer)?;
        if let Some(StoppedGuest { machine, was_running }) = &self.guest {
            machine.save(&mut writer, Depth::Full, *was_running, self.prepared.placements.clone())?;
        }
        let bytes = writer.finish()?;
        let kept = |error: std::io::Error| MachineError::Config(format!("cannot keep the state: {error}"));
        let memfd = saved::seal(crate::test_hooks::truncated("save", &bytes)).map_err(kept)?;
        // Both images live by what is in there now: what cannot be read back is found while there still is another way.
        StateReader::new(&Sealed::map(memfd.as_fd()).map_err(kept)?)?;
        self.prepared.timeline.pass(Phase::Save).map_err(MachineError::Config)?;
        Ok(Saved { paused: self, state: memfd })
    }
}

fn keep_api(frozen: &Frozen<'_>, vault: &Vault, kept: &mut Vec<KeptFd>) -> std::io::Result<ApiSlots> {
    let mut keep = |name: &str, purpose, fd: std::os::fd::BorrowedFd<'_>| -> std::io::Result<Slot> {
        let fd = vault.keep(name, purpose, fd.try_clone_to_owned()?);
        let slot = fd.slot();
        kept.push(fd);
        Ok(slot)
    };
    Ok(ApiSlots {
        listener: keep("API listener", Purpose::ApiListener, frozen.listener())?,
        idle: frozen
            .idle()
            .map(|(_, fd)| keep("idle API connection", Purpose::ApiConnection, fd))
            .collect::<Result<_, _>>()?,
        caller: frozen
            .caller()
            .map(|fd| keep("API connection of the caller", Purpose::ApiConnection, fd))
            .transpose()?,
    })
}

/// The state is in a sealed memfd.
pub struct Saved<'a> {
    paused: Paused<'a>,
    state: OwnedFd,
}

impl<'a> Saved<'a> {
    /// All DMA addresses of all containers; the DMA itself goes on.
    pub fn invalidate(self) -> Result<Invalidated<'a>, String> {
        let containers = match &self.paused.guest {
            Some(guest) => guest.machine.passthrough.invalidate()?,
            None => None,
        };
        let invalidated = Invalidated { _containers: containers, saved: self };
        invalidated.saved.paused.prepared.timeline.pass(Phase::Invalidate)?;
        Ok(invalidated)
    }
}

/// No DMA address of this process is valid any more; DMA that was mapped goes on. Dropping it maps them back first.
pub struct Invalidated<'a> {
    _containers: Option<theseus_devices::vfio::Invalidated>,
    saved: Saved<'a>,
}

impl Invalidated<'_> {
    /// Becomes the new image. Returns only if that failed: then everything is put back, and this is the reason.
    pub fn exec(self) -> String {
        let Saved { paused, state } = &self.saved;
        let kept = &paused.prepared.kept;
        // The state travels like every other kept fd, but is not in the manifest that it contains.
        let state = match state.try_clone() {
            Ok(state) => paused.host.vault.keep("saved state", Purpose::State, state),
            Err(error) => return format!("cannot hold on to the state: {error}"),
        };
        let plan = ExecPlan {
            target: Arc::clone(&paused.prepared.target),
            inherited: Inherited {
                state: state.as_raw_fd(),
                old: kept.old_binary.as_raw_fd(),
                timeline: kept.timeline.as_raw_fd(),
            },
            release: kept.release.0.as_raw_fd(),
            devices: paused.guest.as_ref().map(|guest| guest.machine.passthrough.mappings()).unwrap_or_default(),
            vault: paused.host.vault.clone(),
            timeline: Arc::clone(&paused.prepared.timeline),
        };
        paused.main.exec(plan)
    }
}
