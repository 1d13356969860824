//! The update of the VMM under a running guest.
//!
//! ```text
//!   old VMM   Running -order-> Order -carry out-> Ready -pause-> Paused -save-> Saved -invalidate-> Invalidated
//!                ^               |                  |              |              |                    |  hands over,
//!                '--- refused ---'------------------'--------------'-------- guards drop in reverse ---'    ends
//!   keeper               becomes the new image, same PID, and starts
//!   new VMM                 (the guest runs) ready      ...waits...                  restores, commits: see `adopt`
//! ```
//!
//! Each phase consumes the one before. Dropping one puts back all that was done so far, and the guest runs on in this
//! VMM, which was never changed: a way back restores nothing.

pub(crate) mod adopt;
mod ahead;
mod dispensable;
mod error;
mod pause;
mod preflight;
mod prepare;
mod rehearsed;
mod rights;
pub(crate) mod saved;
mod sealed;
mod standby;
pub(crate) mod target;
mod transport;
mod words;

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use theseus_api::server::{ConnId, Server};
use theseus_api::types::{BuildInfo, UpdateOutcome, UpdateReport};

use crate::build_info;
use crate::events::EventStream;
use crate::keeper::{self, Keeper};
use crate::machine::{Host, Machine};
use crate::main_thread::MainThread;
use crate::panics::panic_text;
use crate::sandbox::Confinement;
use crate::supervisor::Supervisor;
use crate::timeline::Timeline;
use crate::vcpus::Vcpus;
pub(crate) use error::{Undone, UpdateError};
use pause::Paused;
use prepare::WayBack;
pub(crate) use prepare::{Order, Ready};

/// From the pause to the guest's next instruction, unless the request says otherwise. After that it goes on in this
/// VMM.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// What an update works on.
pub(crate) struct UpdateContext<'a> {
    pub host: &'a Host,
    pub keeper: &'a Arc<Keeper>,
    pub main: &'a MainThread,
    pub supervisor: &'a Supervisor,
    pub confinement: &'a Confinement,
    pub events: &'a EventStream,
    pub server: Option<&'a Server>,
    pub peers: &'a theseus_api::access::Peers,
    /// None where no VM is booted: then only the VMM itself is replaced.
    pub machine: Option<&'a mut Machine>,
    pub config: Option<&'a theseus_api::types::VmConfig>,
    pub was_shut_down: bool,
    /// Whether the guest has asked for power-off or reset, which nobody has acted on yet.
    pub guest_asked: &'a dyn Fn() -> bool,
}

/// Why the guest is still in this VMM. A success never comes back here.
pub(crate) struct NotUpdated {
    pub outcome: UpdateOutcome,
    pub to: Option<BuildInfo>,
    pub reasons: Vec<String>,
    pub timeline: Option<std::sync::Arc<Timeline>>,
}

impl NotUpdated {
    pub(crate) fn refused(to: Option<BuildInfo>, reasons: Vec<String>) -> Self {
        Self { outcome: UpdateOutcome::Refused, to, reasons, timeline: None }
    }

    pub(crate) fn report(self, machine: Option<&Machine>) -> UpdateReport {
        UpdateReport {
            outcome: self.outcome,
            from: build_info::this().clone(),
            to: self.to,
            pid: keeper::pid(),
            vmm_pid: std::process::id(),
            vcpu_threads: machine.map(|machine| machine.vcpus.threads()).unwrap_or_default(),
            pause_us: self.timeline.as_ref().and_then(|timeline| timeline.pause_us()),
            phases: self.timeline.map(|timeline| timeline.phases()).unwrap_or_default(),
            devices: machine.map(|machine| machine.passthrough_ids()).unwrap_or_default(),
            containers: machine.map(|machine| machine.container_names()).unwrap_or_default(),
            reasons: self.reasons,
        }
    }
}

/// The end of an update's story in the old VMM: the guest goes over to the new one, which is ready. Returns only if
/// that failed.
pub(crate) fn hand_over(
    mut subject: UpdateContext<'_>,
    ready: Ready,
    caller: Option<ConnId>,
    deadline: Duration,
) -> NotUpdated {
    let Ready { to, target, timeline, new, back } = ready;
    let pause = || {
        Paused::new(&mut subject, target, timeline.clone(), new, caller, deadline)
            .and_then(Paused::save)
            .and_then(|saved| saved.invalidate())
            .map(|invalidated| invalidated.hand_over())
    };
    // A panic drops the guards as an error does. All of them have dropped by the end of this.
    let reason = match catch_unwind(AssertUnwindSafe(pause)) {
        Ok(Ok(reason) | Err(reason)) => reason,
        Err(panic) => UpdateError::Panic(panic_text(&*panic)),
    };
    let vcpus = subject.machine.as_deref().map(|machine| &machine.vcpus).filter(|vcpus| vcpus.is_running());
    let entered = vcpus.and_then(Vcpus::entered);
    back_to(back, Some(to), timeline, reason, false, entered)
}

/// The update did not happen. `is_whole`: the keeper still is the program that it was; else it becomes that again,
/// around this VMM, or, if it is gone, this VMM goes on alone. `entered`: [`Vcpus::entered`].
fn back_to(
    back: WayBack,
    to: Option<BuildInfo>,
    timeline: Arc<Timeline>,
    source: UpdateError,
    is_whole: bool,
    entered: Option<u64>,
) -> NotUpdated {
    let reason = Undone { phase: timeline.current(), source }.to_string();
    timeline.resumed(entered);
    log::error!("the update did not happen, the guest goes on as it was: {reason}");
    let WayBack { keeper, supervisor, program, alone } = back;
    if !is_whole && !keeper::is_there() {
        alone.stay();
        supervisor.keeper_is_gone();
    } else if !is_whole && let Err(reason) = keeper.become_again(program.as_fd()) {
        log::error!("the keeper of this VMM stays the image that failed: {reason}");
    }
    NotUpdated { outcome: UpdateOutcome::RolledBack, to, reasons: vec![reason], timeline: Some(timeline) }
}
