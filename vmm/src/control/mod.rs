//! The control thread: one event loop that owns the machine. API requests and what the guest asks of the machine arrive
//! in its queue.

mod boot;
mod guest;
mod memory;
mod queue;
mod requests;
mod update;
mod vm;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use parking_lot::Mutex;
use theseus_api::access::Peers;
use theseus_api::server::Server;
use theseus_devices::legacy::serial::SerialDevice;

use crate::events::EventStream;
use crate::keeper::Keeper;
use crate::machine::{Host, Machine};
use crate::main_thread::MainThread;
use crate::sandbox::Confinement;
use crate::signals::Signals;
use crate::supervisor::Supervisor;
pub(crate) use boot::{Booting, UnderWay, Wish};
pub(crate) use guest::Resets;
pub(crate) use memory::LostPages;
pub(crate) use queue::{Inbox, Queue, queue};
pub(crate) use update::Updating;
pub(crate) use vm::Vm;

/// See the module.
pub(crate) struct Control {
    pub host: Host,
    pub keeper: Arc<Keeper>,
    pub main: MainThread,
    pub inbox: Inbox,
    pub signals: Signals,
    pub memory_errors: LostPages,
    pub server: Option<Server>,
    /// Whom it lets in.
    pub peers: Peers,
    pub supervisor: Supervisor,
    pub confinement: Confinement,
    pub events: EventStream,
    pub vm: Vm,
    /// The boot that is under way.
    pub booting: Option<Booting>,
    /// One that was given up, until it has ended.
    pub unwanted: Option<UnderWay>,
    /// The update that is being made ready.
    pub updating: Option<Updating>,
    /// Requests that wait for the boot.
    pub waiting: VecDeque<queue::Call>,
    pub resets: Resets,
    /// The serial console in the event loop; changes with the machine.
    pub watched: Option<WatchedConsole>,
    pub exit: Option<i32>,
}

impl Control {
    /// The control thread's life.
    pub(crate) fn run(self) {
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
                control.booting.iter().for_each(Booting::end);
                control.unwanted.iter().for_each(UnderWay::end);
                // Ends the vCPU threads and puts a terminal back into its old mode.
                drop(control);
                return Ok(code);
            }
        }
    }

    fn drain(&mut self) {
        let _ = self.inbox.wake.read();
        while self.exit.is_none() {
            if self.finish_boot() || self.finish_update() {
                continue;
            }
            if let Some(updating) = &self.updating {
                // What the guest asks for waits for the end of that.
                if self.inbox.guest_has_asked() {
                    updating.give_up();
                }
                let Some((request, reply)) = self.inbox.call() else { return };
                match request.endpoint().in_update {
                    true => self.serve_request(request, reply),
                    false => reply.send(Err(queue::update_under_way())),
                }
                continue;
            }
            if self.act_for_guest() {
                continue;
            }
            let waiting = if self.booting.is_none() { self.waiting.pop_front() } else { None };
            match waiting.or_else(|| self.inbox.call()) {
                Some(call) if self.booting.is_some() && call.0.endpoint().needs_machine => self.waiting.push_back(call),
                Some((request, reply)) => self.serve_request(request, reply),
                None => return,
            }
        }
    }

    /// The fd of the console that the present machine has.
    fn watch_console(&mut self, ops: &mut EventOps) {
        let serial = self.vm.machine().and_then(Machine::serial);
        let is_same = |watched: &WatchedConsole| {
            serial.as_ref().is_some_and(|serial| watched.device.ptr_eq(&Arc::downgrade(serial)))
        };
        if self.watched.as_ref().is_some_and(is_same) {
            return;
        }
        if let Some(old) = self.watched.take() {
            report(ops.remove(Events::empty(&old.poll)));
        }
        let Some(serial) = serial else { return };
        match serial.lock().poll_fd().try_clone_to_owned() {
            Ok(poll) => {
                report(ops.add(Events::with_data(&poll, CONSOLE, EventSet::IN)));
                self.watched = Some(WatchedConsole { device: Arc::downgrade(&serial), poll });
            }
            Err(error) => log::error!("the serial console cannot be watched: {error}"),
        }
    }
}

/// A serial console in the event loop: by an fd of its own, since the device's may be closed, and its number used
/// again, before this is taken out.
pub(crate) struct WatchedConsole {
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
const RESET: u32 = 3;
const MEMORY: u32 = 4;

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let added = ops
            .add(Events::with_data(&*self.inbox.wake, QUEUE, EventSet::IN))
            .and_then(|()| ops.add(Events::with_data(&self.signals, SIGNAL, EventSet::IN)))
            .and_then(|()| ops.add(Events::with_data(&*self.memory_errors, MEMORY, EventSet::IN)));
        if let Err(error) = added {
            log::error!("the control loop cannot start: {error:?}");
            self.exit = Some(crate::EXIT_FAILURE);
        }
        self.resets.watch(ops);
        self.watch_console(ops);
        // What came before this loop stood.
        let _ = self.inbox.wake.write(1);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            QUEUE => self.drain(),
            SIGNAL => self.signalled(),
            CONSOLE => {
                if let Some(serial) = self.vm.machine().and_then(Machine::serial) {
                    serial.lock().handle_ready();
                }
            }
            RESET => {
                self.resets.due();
                self.drain();
            }
            MEMORY => self.memory_lost(),
            other => log::error!("event from an unknown source {other}"),
        }
        self.watch_console(ops);
    }
}

impl Control {
    fn signalled(&mut self) {
        for signal in self.signals.read() {
            log::info!("signal {signal}: shutting down");
            self.end(crate::EXIT_OK, Some(signal));
        }
    }
}
