//! The update of the VMM under a running guest.
//!
//! ```text
//!   Running --prepare--> Prepared --pause--> Paused --save--> Saved --invalidate--> Invalidated --exec--> (new image, see `adopt`)
//!      ^                    |                  |                |                       |
//!      '------ refused -----'------------------'---- guards drop in reverse order ------'
//! ```
//!
//! Each phase consumes the one before. Dropping one puts back all that was done so far, and the guest runs on in this image.

pub mod adopt;
pub mod arbiter;
pub mod back;
mod dispensable;
pub mod park;
mod pause;
mod preflight;
mod prepare;
mod rights;
pub mod room;
pub mod saved;
pub mod target;
pub mod timeline;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use theseus_api::server::{ConnId, Server};
use theseus_api::types::{BuildInfo, UpdateOutcome, UpdateReport, UpdateRequest};

use crate::build_info;
use crate::events::EventStream;
use crate::machine::{Host, Machine};
use crate::main_thread::MainThread;
use crate::supervisor::Supervisor;
use pause::Paused;
use prepare::Prepared;
use timeline::{Phase, Timeline};

/// From the pause to the guest's next instruction, unless the request says otherwise. After that the guest goes back to the old image.
const DEADLINE: Duration = Duration::from_secs(10);

/// What an update works on.
pub struct Subject<'a> {
    pub host: &'a Host,
    pub main: &'a MainThread,
    pub supervisor: &'a Supervisor,
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

/// Why the guest is still in this image. A success never comes back here.
pub struct NotUpdated {
    pub outcome: UpdateOutcome,
    pub to: Option<BuildInfo>,
    pub reasons: Vec<String>,
    pub timeline: Option<std::sync::Arc<Timeline>>,
}

impl NotUpdated {
    fn refused(to: Option<BuildInfo>, reasons: Vec<String>) -> Self {
        Self { outcome: UpdateOutcome::Refused, to, reasons, timeline: None }
    }

    pub fn report(self, devices: Vec<String>, containers: Vec<String>) -> UpdateReport {
        UpdateReport {
            outcome: self.outcome,
            from: build_info::this().clone(),
            to: self.to,
            pid: std::process::id(),
            pause_us: self.timeline.as_ref().and_then(|timeline| timeline.pause_us()),
            phases: self.timeline.map(|timeline| timeline.phases()).unwrap_or_default(),
            devices,
            containers,
            reasons: self.reasons,
        }
    }
}

/// The story of an update, in the old image.
pub fn run(mut subject: Subject<'_>, request: &UpdateRequest, caller: Option<ConnId>) -> NotUpdated {
    let deadline = request.deadline_ms.map_or(DEADLINE, Duration::from_millis);
    let prepared = match catch_unwind(AssertUnwindSafe(|| Prepared::new(&subject, request))) {
        Ok(Ok(prepared)) => prepared,
        Ok(Err(refused)) => return refused,
        Err(panic) => return NotUpdated::refused(None, vec![back::panic_text(&*panic)]),
    };
    if request.dry_run {
        return prepared.ready();
    }
    subject.events.say("update", "prepared", serde_json::json!({ "to": prepared.target.build }));
    let (to, timeline) = (Some(prepared.target.build.clone()), prepared.timeline.clone());
    let reason = in_pause(&mut subject, prepared, caller, deadline);
    let reason = format!("phase {}: {reason}", timeline.current().name());
    timeline.stamp(Phase::Commit);
    log::error!("the update did not happen, the guest goes on in this image: {reason}");
    NotUpdated { outcome: UpdateOutcome::RolledBack, to, reasons: vec![reason], timeline: Some(timeline) }
}

/// From the pause to the exec. Returns the reason why that failed; all guards have dropped by then.
fn in_pause(subject: &mut Subject<'_>, prepared: Prepared, caller: Option<ConnId>, deadline: Duration) -> String {
    let text = |error: crate::machine::MachineError| error.to_string();
    let update = || {
        Paused::new(subject, prepared, caller, deadline)
            .and_then(|paused| paused.save().map_err(text))
            .and_then(|saved| saved.invalidate())
            .map(|invalidated| invalidated.exec())
    };
    // A panic drops the guards as an error does.
    match catch_unwind(AssertUnwindSafe(update)) {
        Ok(Ok(reason) | Err(reason)) => reason,
        Err(panic) => back::panic_text(&*panic),
    }
}
