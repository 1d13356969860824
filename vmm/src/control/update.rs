//! An update is made ready beside the control loop, on a thread of its own: it opens a file that the caller names, and
//! runs it. Meanwhile the guest's console is served, signals end the VMM, and every other request is told that an
//! update is under way.
//!
//! ```text
//!   start_update --thread `update`--> finish_update: the pause
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use theseus_api::ApiError;
use theseus_api::server::ReplyTo;
use theseus_api::types::{UpdateEvent, UpdateOutcome, UpdateRequest};
use theseus_api::{Body, Reply};
use theseus_resources::threads::{self, Role};

use super::queue::update_under_way;
use super::{Control, Vm};
use crate::panics::panic_text;
use crate::update::{self, NotUpdated, Order, Ready, UpdateContext};

type Outcome = Result<Ready, NotUpdated>;

/// An update that is being made ready.
pub(crate) struct Updating {
    reply: ReplyTo,
    deadline: Duration,
    given_up: Arc<AtomicBool>,
    outcome: Receiver<Outcome>,
}

impl Updating {
    /// What has become of it, if that is known.
    fn outcome(&self) -> Option<Outcome> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(NotUpdated::refused(None, vec!["the thread that was to prepare it has ended".into()])))
            }
        }
    }

    /// The guest wants its end, and not an update.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }
}

impl Control {
    pub(super) fn start_update(&mut self, request: &UpdateRequest, reply: ReplyTo) {
        self.inbox.updating.store(true, Ordering::SeqCst);
        self.refuse_others();
        let given_up = Arc::new(AtomicBool::new(false));
        let deadline = request.deadline_ms.map_or(update::DEADLINE, Duration::from_millis);
        let order = match self.on_subject(|subject| Order::new(&subject, request, given_up.clone())) {
            Ok(order) => order,
            Err(not) => return self.not_updated(not, reply),
        };
        let (sender, outcome) = channel();
        let wake = self.inbox.wake.clone();
        let body = move || {
            let outcome = catch_unwind(AssertUnwindSafe(|| order.carry_out()));
            let outcome = outcome.unwrap_or_else(|panic| Err(NotUpdated::refused(None, vec![panic_text(&*panic)])));
            let _ = sender.send(outcome);
            let _ = wake.write(1);
        };
        match threads::spawn(Role::Update, body) {
            Ok(_) => self.updating = Some(Updating { reply, deadline, given_up, outcome }),
            Err(error) => self.not_updated(NotUpdated::refused(None, vec![error.to_string()]), reply),
        }
    }

    /// The pause, once all is ready. Whether there was something to do.
    pub(super) fn finish_update(&mut self) -> bool {
        let Some(outcome) = self.updating.as_ref().and_then(Updating::outcome) else { return false };
        let Some(Updating { reply, deadline, .. }) = self.updating.take() else { return false };
        let not = match outcome {
            Ok(ready) => {
                self.refuse_others();
                let caller = Some(reply.connection());
                self.on_subject(|subject| update::hand_over(subject, ready, caller, deadline))
            }
            Err(not) => not,
        };
        self.not_updated(not, reply);
        true
    }

    /// What came together with the update, or waited for a boot.
    fn refuse_others(&mut self) {
        self.waiting.drain(..).for_each(|(_, reply)| reply.send(Err(update_under_way())));
        while let Some((_, reply)) = self.inbox.call() {
            reply.send(Err(update_under_way()));
        }
    }

    fn on_subject<T>(&mut self, act: impl FnOnce(UpdateContext<'_>) -> T) -> T {
        let was_shut_down = matches!(self.vm, Vm::ShutDown(_));
        let config = self.vm.config().cloned();
        let inbox = &self.inbox;
        let guest_asked = || {
            while let Some((_, reply)) = inbox.call() {
                reply.send(Err(update_under_way()));
            }
            inbox.guest_has_asked()
        };
        act(UpdateContext {
            host: &self.host,
            keeper: &self.keeper,
            main: &self.main,
            supervisor: &self.supervisor,
            confinement: &self.confinement,
            events: &self.events,
            server: self.server.as_ref(),
            peers: &self.peers,
            machine: self.vm.machine_mut(),
            config: config.as_ref(),
            was_shut_down,
            guest_asked: &guest_asked,
        })
    }

    fn not_updated(&mut self, not: NotUpdated, reply: ReplyTo) {
        self.inbox.updating.store(false, Ordering::SeqCst);
        let outcome = not.outcome;
        let report = not.report(self.vm.machine());
        let told = serde_json::to_value(&report);
        self.events.emit(UpdateEvent::from(report.clone()));
        let answer: Reply = match outcome {
            UpdateOutcome::Refused => {
                Err(self.explained(ApiError::conflict("the update is refused").because(report.reasons)))
            }
            _ => told.map(Body::Json).map_err(|error| ApiError::internal(error.to_string())),
        };
        reply.send(answer);
    }
}
