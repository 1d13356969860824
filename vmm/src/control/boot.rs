//! A boot goes on beside the control loop, on a thread of its own: it opens and reads files that the caller names,
//! whose server may be slow or gone, and devices that take their time. Meanwhile the API and signals are served; what
//! needs the machine waits for it.
//!
//! ```text
//!   start_boot --thread `boot`--> finish_boot: Booted
//!       '----give_up_boot: the caller is told, and what still comes of the boot is thrown away
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use theseus_api::server::ReplyTo;
use theseus_api::types::{Threads, VmConfig, VmEvent};
use theseus_api::{ApiError, Body};
use theseus_resources::threads::{self, Role};

use super::{Control, Vm};
use crate::machine::spec::MachineSpec;
use crate::machine::{Machine, MachineError};
use crate::panics::panic_text;
use crate::timeline::NotPassed;

/// How long the end of the process waits for a boot to put back what it has done, such as the mode of a terminal.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Who wants to know what becomes of a boot.
pub(crate) enum Wish {
    CommandLine,
    Boot(ReplyTo),
    Reboot(ReplyTo),
    /// The guest's own reset; whether it is to run, or wait where it was paused.
    Reset {
        runs: bool,
    },
}

impl Wish {
    /// The event that says that it was done.
    fn event(&self, threads: Threads) -> VmEvent {
        match self {
            Self::CommandLine | Self::Boot(_) => VmEvent::Booted(threads),
            Self::Reboot(_) | Self::Reset { .. } => VmEvent::Rebooted(threads),
        }
    }
}

/// A machine, with the configuration that it is made of.
type Built = Result<(Machine, VmConfig), MachineError>;

/// See the module.
pub(crate) struct Booting {
    wish: Wish,
    under_way: UnderWay,
}

/// The thread's part of it.
pub(crate) struct UnderWay {
    given_up: Arc<AtomicBool>,
    built: Receiver<Built>,
}

impl UnderWay {
    /// What has become of it, if it is over.
    fn built(&self) -> Option<Built> {
        match self.built.try_recv() {
            Ok(built) => Some(built),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(MachineError::BootLost)),
        }
    }

    /// At the end of the process.
    pub(crate) fn end(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        if let Ok(Ok((machine, _))) = self.built.recv_timeout(LAST_WAIT) {
            machine.shut_down();
        }
    }
}

impl Booting {
    pub(crate) fn end(&self) {
        self.under_way.end();
    }
}

impl Control {
    /// Begins to boot `config`; the VM stays as it is until that has been done.
    pub(crate) fn start_boot(&mut self, config: VmConfig, wish: Wish) {
        let given_up = Arc::new(AtomicBool::new(false));
        let (sender, built) = channel();
        let (host, wake, stop) = (self.host.clone(), self.inbox.wake.clone(), given_up.clone());
        let body = move || {
            let build = AssertUnwindSafe(|| {
                host.seams.at("boot").map_err(NotPassed::from)?;
                let machine = Machine::build(&MachineSpec::of(&config)?, &host, &stop)?;
                Ok((machine, config))
            });
            let built =
                catch_unwind(build).unwrap_or_else(|panic| Err(MachineError::BootPanicked(panic_text(&*panic))));
            // Nobody waits: the process is ending, and this machine with it.
            if let Err(unwanted) = sender.send(built)
                && let Ok((machine, _)) = unwanted.0
            {
                machine.shut_down();
            }
            let _ = wake.write(1);
        };
        self.booting = Some(Booting { wish, under_way: UnderWay { given_up, built } });
        if let Err(error) = threads::spawn(Role::Boot, body) {
            // The thread's end of the channel is gone: this is all that will come of it.
            self.boot_ended(Err(error.into()));
        }
    }

    /// Takes over what a boot has come to, if it has.
    pub(super) fn finish_boot(&mut self) -> bool {
        if let Some(built) = self.unwanted.as_ref().and_then(UnderWay::built) {
            self.unwanted = None;
            let _ = built.map(|(machine, _)| machine.shut_down());
            return true;
        }
        match self.booting.as_ref().and_then(|booting| booting.under_way.built()) {
            Some(built) => {
                self.boot_ended(built);
                true
            }
            None => false,
        }
    }

    fn boot_ended(&mut self, built: Built) {
        let Some(Booting { wish, .. }) = self.booting.take() else { return };
        let runs = !matches!(wish, Wish::Reset { runs: false });
        let booted = built.and_then(|(mut machine, config)| {
            if runs {
                machine.resume()?;
            }
            Ok(Vm::Booted { machine: Box::new(machine), config })
        });
        let booted = booted.map(|vm| self.vm = vm);
        if booted.is_ok() {
            let vcpu_threads = self.vm.machine().map(|machine| machine.vcpus.threads()).unwrap_or_default();
            self.events.emit(wish.event(Threads { vmm_pid: std::process::id(), vcpu_threads }));
        }
        match (wish, booted) {
            (Wish::CommandLine, Ok(())) => self.keeper.notify(crate::notify::READY),
            (Wish::Reset { .. }, Ok(())) => {}
            (Wish::CommandLine, Err(error)) => {
                let reason = self.explained(ApiError::chain(500, &error)).to_string();
                let what = format!("the guest cannot be booted: {reason}");
                self.events.emit(VmEvent::Failed { reason });
                self.end(crate::EXIT_FAILURE, None);
                crate::emit(std::io::stderr(), &what);
            }
            (Wish::Reset { .. }, Err(error)) => {
                let error = self.explained(ApiError::chain(500, &error));
                let reason = format!("it has reset itself, and cannot be booted again: {error}");
                log::error!("{reason}");
                self.guest_failed(&reason);
            }
            (Wish::Boot(reply) | Wish::Reboot(reply), Ok(())) => reply.send(Ok(Body::Empty)),
            (Wish::Boot(reply), Err(error)) => reply.send(Err(self.explained(ApiError::chain(500, &error)))),
            (Wish::Reboot(reply), Err(error)) => {
                self.events.emit(VmEvent::Shutdown {});
                reply.send(Err(self.explained(ApiError::chain(500, &error))));
            }
        }
    }

    /// Nobody wants the guest any more that is being booted.
    pub(super) fn give_up_boot(&mut self, why: &str) {
        let Some(Booting { wish, under_way }) = self.booting.take() else { return };
        under_way.given_up.store(true, Ordering::SeqCst);
        self.unwanted = Some(under_way);
        match wish {
            Wish::Boot(reply) | Wish::Reboot(reply) => {
                reply.send(Err(ApiError::conflict(format!("the boot was given up: {why} was asked for"))));
            }
            Wish::CommandLine | Wish::Reset { .. } => log::warn!("the boot was given up: {why} was asked for"),
        }
    }

    /// Why nothing can be booted, or updated, for now: what the boot before has opened is not given back yet.
    pub(super) fn boot_still_ends(&self) -> Option<ApiError> {
        let busy = "a boot that was given up has not ended yet: is one of its files on a server that is gone? Try \
                    again in a moment";
        self.unwanted.is_some().then(|| ApiError::busy(busy))
    }
}
