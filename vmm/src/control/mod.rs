//! The control thread: one event loop that owns the machine. API requests and what the guest asks of the machine arrive in its queue.

mod admit;
mod requests;
mod vm;

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use theseus_api::server::{Backend, ReplyTo, Server};
use theseus_api::{ApiError, Request};
use theseus_devices::interrupt::{GuestRequest, GuestRequests};
use theseus_devices::legacy::serial::SerialDevice;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::events::EventStream;
use crate::machine::Host;
use crate::machine::devices::lock;
use crate::main_thread::MainThread;
use crate::signals::Signals;
use crate::supervisor::Supervisor;
use crate::update::adopt::Helper;
pub use vm::Vm;

enum Message {
    Api(Request, ReplyTo),
    Guest(GuestRequest),
}

/// The way into the control thread's queue.
#[derive(Clone)]
pub struct Queue {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
    updating: Arc<AtomicBool>,
}

pub struct Inbox {
    receiver: Receiver<Message>,
    wake: Arc<EventFd>,
    /// An update is under way: every other request is told so at once, as nobody would answer it before the exec.
    updating: Arc<AtomicBool>,
}

pub fn queue() -> std::io::Result<(Queue, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
    let updating = Arc::new(AtomicBool::new(false));
    let queue = Queue { sender, wake: wake.clone(), updating: updating.clone() };
    Ok((queue, Inbox { receiver, wake, updating }))
}

impl Queue {
    fn push(&self, message: Message) {
        // A full counter wakes as well as one that goes up; a control thread that is gone ends the process.
        let _ = self.sender.send(message);
        let _ = self.wake.write(1);
    }
}

fn update_under_way() -> ApiError {
    ApiError::busy("an update is under way: try again in a moment")
}

impl Backend for Queue {
    fn submit(&self, request: Request, reply: ReplyTo) {
        if self.updating.load(Ordering::SeqCst) {
            return reply.send(Err(update_under_way()));
        }
        self.push(Message::Api(request, reply));
    }
}

impl GuestRequests for Queue {
    fn ask(&self, request: GuestRequest) {
        log::info!("the guest asks: {request:?}");
        self.push(Message::Guest(request));
    }
}

/// See the module.
pub struct Control {
    pub host: Host,
    pub main: MainThread,
    pub inbox: Inbox,
    pub signals: Signals,
    pub server: Option<Server>,
    pub supervisor: Supervisor,
    pub events: EventStream,
    pub vm: Vm,
    /// Of the last update, until it is reaped.
    pub helper: Option<Helper>,
    /// When that helper has been at idle priority for long enough; None before the loop stands.
    pub hurry: Option<TimerFd>,
    /// What the guest has asked for and nobody has acted on: put aside while an update looks into the queue.
    pub asked: Option<GuestRequest>,
    /// The serial console in the event loop; changes with the machine.
    pub watched: Option<WatchedConsole>,
    /// API requests that were in the queue when a guest's were taken out of it.
    pub backlog: VecDeque<(Request, ReplyTo)>,
    pub exit: Option<i32>,
}

impl Control {
    /// The control thread's life.
    pub fn run(self) {
        let main = self.main.clone();
        let code = match self.serve() {
            Ok(code) => code,
            Err(error) => {
                log::error!("the control thread cannot go on: {error}");
                crate::EXIT_FAILURE
            }
        };
        main.quit(code);
    }

    fn serve(self) -> Result<i32, event_manager::Error> {
        let mut manager = EventManager::<Self>::new()?;
        let id = manager.add_subscriber(self);
        loop {
            manager.run()?;
            if let Some(code) = manager.subscriber_mut(id)?.exit {
                let mut control = manager.remove_subscriber(id)?;
                // The answer to vmm.shutdown may be on its way.
                if let Some(server) = control.server.take() {
                    server.stop();
                }
                // Ends the vCPU threads and puts a terminal back into its old mode.
                drop(control);
                return Ok(code);
            }
        }
    }

    fn drain(&mut self) {
        let _ = self.inbox.wake.read();
        while self.exit.is_none() {
            if let Some(request) = self.asked.take() {
                self.guest_asked(request);
                continue;
            }
            if let Some((request, reply)) = self.backlog.pop_front() {
                self.serve_request(request, reply);
                continue;
            }
            match self.inbox.receiver.try_recv() {
                Ok(Message::Guest(request)) => self.guest_asked(request),
                Ok(Message::Api(request, reply)) => self.serve_request(request, reply),
                Err(_) => return,
            }
        }
    }

    fn guest_asked(&mut self, request: GuestRequest) {
        let nothing = serde_json::json!({});
        let (event, properties, what, code) = match request {
            GuestRequest::PowerOff => {
                ("powered_off", nothing, "the guest has powered off".to_owned(), crate::EXIT_POWER_OFF)
            }
            GuestRequest::Reset => ("reset", nothing, "the guest has asked for a reset".to_owned(), crate::EXIT_RESET),
            GuestRequest::Failed(reason) => {
                let what = format!("the guest cannot go on: {reason}");
                ("failed", serde_json::json!({ "reason": reason }), what, crate::EXIT_GUEST_FAILED)
            }
        };
        self.events.say("vm", event, properties);
        log::info!("{what}");
        // Not println!, which panics where nobody listens any more.
        let _ = writeln!(std::io::stdout(), "theseus: {what}");
        self.exit = Some(code);
    }

    /// What a guest asked for that is gone is not meant for the next one.
    fn forget_guest(&mut self) {
        self.asked = None;
        for message in self.inbox.receiver.try_iter() {
            if let Message::Api(request, reply) = message {
                self.backlog.push_back((request, reply));
            }
        }
    }

    /// The fd of the console that the present machine has.
    fn watch_console(&mut self, ops: &mut EventOps) {
        let serial = self.vm.machine().and_then(|machine| machine.devices.serial.as_ref());
        let is_same =
            |watched: &WatchedConsole| serial.is_some_and(|serial| watched.device.ptr_eq(&Arc::downgrade(serial)));
        if self.watched.as_ref().is_some_and(is_same) {
            return;
        }
        if let Some(old) = self.watched.take() {
            report(ops.remove(Events::empty(&old.poll)));
        }
        let Some(serial) = serial else { return };
        match lock(serial).poll_fd().try_clone_to_owned() {
            Ok(poll) => {
                report(ops.add(Events::with_data(&poll, CONSOLE, EventSet::IN)));
                self.watched = Some(WatchedConsole { device: Arc::downgrade(serial), poll });
            }
            Err(error) => log::error!("the serial console cannot be watched: {error}"),
        }
    }
}

/// A serial console in the event loop: by an fd of its own, since the device's may be closed, and its number used again, before this is
/// taken out.
pub struct WatchedConsole {
    /// Tells the devices apart: an allocation that this refers to is not used again.
    device: Weak<Mutex<SerialDevice>>,
    poll: OwnedFd,
}

fn report(result: Result<(), event_manager::Error>) {
    if let Err(error) = result {
        log::error!("the serial console's input or output may stall: {error:?}");
    }
}

const QUEUE: u32 = 0;
const SIGNAL: u32 = 1;
const CONSOLE: u32 = 2;
const HURRY: u32 = 3;

/// How long the tear-down of an old address space may take at idle priority. On a host whose CPUs are all busy it would never end.
const IDLE: Duration = Duration::from_secs(2);

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let added = ops
            .add(Events::with_data(&*self.inbox.wake, QUEUE, EventSet::IN))
            .and_then(|()| ops.add(Events::with_data(&self.signals, SIGNAL, EventSet::IN)));
        if let Err(error) = added {
            log::error!("the control loop cannot start: {error:?}");
            self.exit = Some(crate::EXIT_FAILURE);
        }
        self.watch_helper(ops);
        self.watch_console(ops);
        // What came before this loop stood.
        let _ = self.inbox.wake.write(1);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            QUEUE => self.drain(),
            SIGNAL => self.signalled(),
            CONSOLE => {
                if let Some(serial) = self.vm.machine().and_then(|machine| machine.devices.serial.as_ref()) {
                    lock(serial).handle_ready();
                }
            }
            HURRY => {
                if let Some(timer) = &mut self.hurry {
                    let _ = timer.wait();
                }
                self.helper.iter().for_each(Helper::hurry);
            }
            other => log::error!("event from an unknown source {other}"),
        }
        self.watch_console(ops);
    }
}

impl Control {
    fn signalled(&mut self) {
        for signal in self.signals.read() {
            match signal {
                libc::SIGCHLD => self.reap_helper(Duration::ZERO),
                signal => {
                    log::info!("signal {signal}: shutting down");
                    self.events.say("vmm", "shutdown", serde_json::json!({ "signal": signal }));
                    self.exit = Some(crate::EXIT_OK);
                }
            }
        }
    }

    /// Only once in the life of an image is there a helper of an update that succeeded, and that is at its start.
    fn watch_helper(&mut self, ops: &mut EventOps) {
        let timer = TimerFd::new().and_then(|mut timer| {
            if self.helper.is_some() {
                timer.reset(IDLE, None)?;
            }
            Ok(timer)
        });
        match timer {
            Ok(timer) => {
                if let Err(error) = ops.add(Events::with_data(&timer, HURRY, EventSet::IN)) {
                    log::warn!("the helper of the update stays at idle priority: {error:?}");
                }
                self.hurry = Some(timer);
            }
            Err(error) => log::warn!("the helper of the update stays at idle priority: {error}"),
        }
    }

    /// Forgets the helper of the last update once it is gone, for which this waits a while.
    pub fn reap_helper(&mut self, patience: Duration) {
        self.helper.take_if(|helper| helper.reap(patience));
    }
}
