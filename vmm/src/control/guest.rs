//! What becomes of a guest that ends itself, or cannot go on.

use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use theseus_api::types::{VmEvent, VmmEvent};
use theseus_devices::interrupt::GuestRequest;
use theseus_resources::rate::Rate;
use vmm_sys_util::timerfd::TimerFd;

use super::{Control, RESET, Vm, Wish};

/// How often a guest that resets itself is booted anew: often enough for any that means it, and a guest that does
/// nothing else takes neither all of a host's CPU nor its disk (each boot is three events, and some lines of a verbose
/// log).
pub(crate) struct Resets {
    rate: Rate,
    timer: Option<TimerFd>,
}

impl Default for Resets {
    fn default() -> Self {
        Self { rate: Rate::new(10, Duration::from_secs(1)), timer: None }
    }
}

impl Resets {
    pub(super) fn watch(&mut self, ops: &mut EventOps) {
        match TimerFd::new() {
            Ok(timer) => match ops.add(Events::with_data(&timer, RESET, EventSet::IN)) {
                Ok(()) => self.timer = Some(timer),
                Err(error) => log::warn!("resets of the guest are not delayed: {error:?}"),
            },
            Err(error) => log::warn!("resets of the guest are not delayed: {error}"),
        }
    }

    /// Whether one more has to wait; its time is then told by an event.
    fn too_soon(&mut self) -> bool {
        let Some(timer) = &mut self.timer else { return false };
        self.rate.take().is_err_and(|wait| timer.reset(wait.max(Duration::from_millis(1)), None).is_ok())
    }

    pub(super) fn due(&mut self) {
        if let Some(timer) = &mut self.timer {
            let _ = timer.wait();
        }
    }
}

impl Control {
    /// Acts on what the guest has asked for, if it has, and if the time for that has come.
    pub(super) fn act_for_guest(&mut self) -> bool {
        let reboots = !self.supervisor.ends_on_reset();
        let Some(request) = self.inbox.guest_request() else { return false };
        if request == GuestRequest::Reset && reboots && self.resets.too_soon() {
            return false;
        }
        match request {
            GuestRequest::PowerOff => {
                self.events.emit(VmEvent::PoweredOff {});
                self.end_with("the guest has powered off", crate::EXIT_POWER_OFF);
            }
            GuestRequest::Reset if reboots => self.reboot_in_place(),
            GuestRequest::Reset => {
                self.events.emit(VmEvent::Reset {});
                self.end_with("the guest has asked for a reset", crate::EXIT_RESET);
            }
            GuestRequest::Failed(reason) => self.guest_failed(&reason),
        }
        true
    }

    /// A new machine in this process, as vm.reboot gives; paused if the guest was.
    fn reboot_in_place(&mut self) {
        log::info!("the guest has asked for a reset: it is booted again");
        self.events.emit(VmEvent::Reset {});
        self.events.emit(VmEvent::Rebooting {});
        let runs = self.vm.machine().is_some_and(|machine| machine.vcpus.is_running());
        self.shut_down();
        if let Some(config) = self.vm.config().cloned() {
            self.start_boot(config, Wish::Reset { runs });
        }
    }

    pub(super) fn guest_failed(&mut self, reason: &str) {
        self.events.emit(VmEvent::Failed { reason: reason.into() });
        if self.vm.machine().is_none() {
            self.events.emit(VmEvent::Shutdown {});
        }
        self.end_with(&format!("the guest cannot go on: {reason}"), crate::EXIT_GUEST_FAILED);
    }

    fn end_with(&mut self, what: &str, code: i32) {
        log::info!("{what}");
        self.end(code, None);
        crate::emit(std::io::stdout(), what);
    }

    /// The end of the guest, if there is one, and of the process. `signal`: the cause, where it was one.
    pub(super) fn end(&mut self, code: i32, signal: Option<i32>) {
        self.give_up_boot("the end of the VMM");
        if self.vm.machine().is_some() {
            self.shut_down();
            self.events.emit(VmEvent::Shutdown {});
        }
        if !matches!(std::mem::replace(&mut self.vm, Vm::None), Vm::None) {
            self.events.emit(VmEvent::Deleted {});
        }
        self.events.emit(VmmEvent::Shutdown { signal });
        self.exit = Some(code);
    }
}
