//! What each request does.

use std::time::Duration;

use theseus_api::endpoint::DOCUMENT;
use theseus_api::server::ReplyTo;
use theseus_api::types::{
    Counters, DroppedBytes, LostEvents, PayloadConfig, PingInfo, SerialMode, VmConfig, VmEvent, VmInfo, VmState,
};
use theseus_api::{ApiError, Body, Reply, Request};

use super::{Control, Vm, Wish};
use crate::boot;
use crate::build_info;
use crate::machine::{Machine, MachineError};

/// How long vm.pause waits for the vCPUs.
const PAUSE: Duration = Duration::from_secs(5);

impl Control {
    pub(super) fn serve_request(&mut self, request: Request, reply: ReplyTo) {
        // A VM that is being booted is as good as booted for those who want it to end.
        let state = if self.booting.is_some() { self.vm.state().map(|_| VmState::Running) } else { self.vm.state() };
        let endpoint = request.endpoint();
        let busy = if endpoint.needs_machine { self.boot_still_ends() } else { None };
        if let Err(error) = endpoint.admit(state).and_then(|()| busy.map_or(Ok(()), Err)) {
            return reply.send(Err(error));
        }
        log::info!("API: {}", endpoint.name);
        if let Some(event) = endpoint.begins.clone() {
            self.events.emit(event);
        }
        let answer = match request {
            // These answer when they are done.
            Request::Update(request) => return self.start_update(&request, reply),
            Request::Boot => return self.boot(Wish::Boot(reply)),
            Request::Reboot => {
                self.shut_down();
                return self.boot(Wish::Reboot(reply));
            }
            Request::Ping => self.ping(),
            Request::VmmShutdown => {
                self.end(crate::EXIT_OK, None);
                Ok(Body::EmptyOk)
            }
            Request::Create(config) => self.create(*config),
            Request::Delete => {
                self.give_up_boot("vm.delete");
                if self.vm.machine().is_some() {
                    self.shut_down();
                    self.events.emit(VmEvent::Shutdown {});
                }
                self.vm = Vm::None;
                Ok(Body::Empty)
            }
            Request::Shutdown => {
                self.give_up_boot("vm.shutdown");
                self.shut_down();
                Ok(Body::Empty)
            }
            Request::Info => self.info(),
            Request::Pause => self.on_machine(|machine| machine.pause(PAUSE)),
            Request::Resume => self.on_machine(Machine::resume),
            Request::Nmi => self.on_machine(|machine| machine.nmi()),
            Request::PowerButton => self.on_machine(|machine| {
                if let Some(pm) = machine.power_management() {
                    pm.lock().press_power_button();
                }
                Ok(())
            }),
            Request::Counters => self.counters(),
            Request::OpenApi => Ok(Body::Text(DOCUMENT)),
        };
        if let Some(event) = endpoint.ends.clone().filter(|_| answer.is_ok()) {
            self.events.emit(event);
        }
        reply.send(answer);
    }

    fn ping(&self) -> Reply {
        let build = build_info::this();
        to_json(&PingInfo {
            build_version: build.version.clone(),
            version: build_info::VERSION.into(),
            build_id: build.build_id.clone(),
            pid: crate::keeper::pid(),
            vmm_pid: std::process::id(),
            features: self.host.seams.features(),
        })
    }

    fn create(&mut self, config: VmConfig) -> Reply {
        let refusals = self.confinement.refusals(&config);
        if !refusals.is_empty() {
            return Err(ApiError::bad_request("the VM is refused").because(refusals));
        }
        let PayloadConfig { kernel, initramfs, cmdline: _ } = &config.payload;
        let looked = kernel.iter().chain(initramfs).try_for_each(|path| boot::look_at(path));
        looked.map_err(|error| self.explained(ApiError::chain(400, &error)))?;
        self.vm = Vm::Created(config);
        Ok(Body::Empty)
    }

    /// An error with what Landlock may have to do with it.
    pub(super) fn explained(&self, error: ApiError) -> ApiError {
        let remedy = self.confinement.remedy(&error.to_string());
        error.because(remedy)
    }

    fn on_machine(&mut self, act: impl FnOnce(&mut Machine) -> Result<(), MachineError>) -> Reply {
        let machine = self.vm.machine_mut().ok_or_else(|| ApiError::conflict("the VM is not booted"))?;
        act(machine).map(|()| Body::Empty).map_err(|error| ApiError::chain(500, &error))
    }

    pub(super) fn shut_down(&mut self) {
        self.vm = match std::mem::replace(&mut self.vm, Vm::None) {
            // The machine goes first: a new one may need the same devices.
            Vm::Booted { machine, config } => {
                machine.shut_down();
                Vm::ShutDown(config)
            }
            Vm::Created(config) => Vm::ShutDown(config),
            other => other,
        };
        // What a guest asked for that is gone is not meant for the next one; its vCPUs can ask no more.
        self.inbox.forget_guest();
    }

    fn boot(&mut self, wish: Wish) {
        let config = self.vm.config().cloned().ok_or_else(|| ApiError::not_found("there is no VM"));
        match (config, wish) {
            (Ok(config), wish) => self.start_boot(config, wish),
            (Err(error), Wish::Boot(reply) | Wish::Reboot(reply)) => reply.send(Err(error)),
            (Err(_), Wish::CommandLine | Wish::Reset { .. }) => {}
        }
    }

    fn info(&self) -> Reply {
        let (Some(config), Some(state)) = (self.vm.config(), self.vm.state()) else {
            return Err(ApiError::not_found("there is no VM"));
        };
        let machine = self.vm.machine();
        let mut shown = config.clone().settled();
        shown.landlock_enable = self.confinement.landlock.is_some();
        if shown.serial.mode == SerialMode::Pty {
            shown.serial.file = machine.and_then(Machine::pty);
        }
        let info = VmInfo {
            config: shown,
            state,
            memory_actual_size: machine.map_or(config.memory.size, Machine::memory_size),
            device_tree: machine.map(Machine::device_tree).unwrap_or_default(),
            vcpu_threads: machine.map(|machine| machine.vcpus.threads()).unwrap_or_default(),
        };
        to_json(&info)
    }

    fn counters(&self) -> Reply {
        let dropped = self.vm.machine().and_then(|machine| Some(machine.serial()?.lock().dropped()));
        to_json(&Counters {
            serial: DroppedBytes { dropped_bytes: dropped.unwrap_or(0) },
            log: DroppedBytes { dropped_bytes: crate::logging::dropped() },
            events: LostEvents { lost: crate::events::lost() },
        })
    }
}

fn to_json(value: &impl serde::Serialize) -> Reply {
    serde_json::to_value(value).map(Body::Json).map_err(|error| ApiError::internal(error.to_string()))
}
