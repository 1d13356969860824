//! The body of a vCPU thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use theseus_devices::interrupt::GuestRequest;
use theseus_hypervisor::{Exit, ReadyVm, Vcpu};

use super::answers::{Command, Event};
use super::checks::Checks;
use super::processor::Processor;
use super::round::{Job, Seat};
use super::saved;
use super::start::Introduction;
use super::{Shared, Start, VcpuError, placement};
use crate::boot;
use crate::memory_errors;
use crate::panics::panic_text;
use crate::spin::{Commander, Spin};
use crate::timeline;

pub(super) struct Body {
    pub index: u32,
    pub shared: Shared,
    pub checks: Arc<Checks>,
    pub pauses: Arc<AtomicU32>,
    pub entered: Arc<AtomicU64>,
    pub commands: Receiver<Command>,
    pub events: Sender<Event>,
    pub spin: Spin,
    pub commander: Commander,
}

impl Body {
    /// The thread's life. A panic in it is told to whoever waits, and to the guest's owner: with a vCPU less no guest
    /// can go on.
    pub(super) fn guarded(self, life: impl FnOnce(&Self)) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| life(&self))) {
            let panic = panic_text(&*panic);
            self.fail(format!("vCPU {}: {panic}", self.index));
            self.tell(Event::Ready(Err(VcpuError::Panicked { index: self.index, panic })));
        }
    }

    pub(super) fn main(
        &self,
        start: Start,
        begun: &Sender<libc::pid_t>,
        vm: &Receiver<ReadyVm>,
        introduce: &Sender<Introduction>,
    ) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let _ = begun.send(tid);
        // None if the machine has come to nothing meanwhile.
        let Ok(vm) = vm.recv() else { return };
        if let Start::Prewarm(_, placement) = &start {
            // In its cgroup by now, where other CPUs may be its own.
            placement.apply(self.index);
            self.shared.seams.prewarms_vcpu();
        }
        let vcpu = match self.create(start, &vm) {
            Ok(vcpu) => vcpu,
            Err(error) => return self.tell(Event::Ready(Err(error))),
        };
        self.checks.introduce(self.index, tid, vcpu.exit_flag());
        let (exit_flag, shape, tsc_khz) = (vcpu.exit_flag(), vcpu.shape(), vcpu.tsc_khz());
        let seat = Arc::new(Seat::new(Processor::new(self.index, vcpu, vm)));
        let _ = introduce.send(Introduction { tid, seat: seat.clone(), exit_flag, shape, tsc_khz });
        self.tell(Event::Ready(Ok(())));
        // Whether the next command is about to come. Not so after a save: its CPU is wanted for the new VMM.
        let mut is_expected = false;
        let expect = || self.spin.receive(&self.commands, &self.commander);
        while let Ok(command) = if is_expected { expect() } else { self.commands.recv() } {
            is_expected = match command {
                Command::Awake => true,
                Command::Round(round) => {
                    self.tell(Event::Done(round.number, round.take_part(Some(self.index))));
                    !matches!(round.job, Job::Save)
                }
                Command::Run => {
                    self.run(&mut seat.processor.lock());
                    seat.was_here();
                    false
                }
                Command::Pause => {
                    self.pauses.fetch_sub(1, Ordering::SeqCst);
                    self.tell(Event::Paused);
                    true
                }
                Command::End => return,
            };
        }
    }

    fn error(&self, source: theseus_hypervisor::Error) -> VcpuError {
        VcpuError::Hypervisor { index: self.index, source }
    }

    /// Whether a command waits that this thread must come out of the guest for.
    fn is_wanted(&self) -> bool {
        self.pauses.load(Ordering::SeqCst) > 0
    }

    fn clear_exit_flag(&self, vcpu: &Vcpu) {
        vcpu.set_immediate_exit(false);
        // Who was wanted before the line above has the exit flag cleared by it: look again.
        if self.is_wanted() {
            vcpu.set_immediate_exit(true);
        }
    }

    fn fail(&self, reason: String) {
        log::error!("the guest cannot go on: {reason}");
        self.shared.requests.notify(GuestRequest::Failed(reason));
    }

    fn tell(&self, event: Event) {
        // The owner is gone only when the process is ending.
        let _ = self.events.send(event);
    }

    fn create(&self, start: Start, vm: &ReadyVm) -> Result<Vcpu, VcpuError> {
        let mut vcpu = Vcpu::new(vm, self.index).map_err(|source| self.error(source))?;
        match start {
            Start::Prewarm(shape, _) => {
                vcpu.prewarm(&shape).map_err(|source| self.error(source))?;
                saved::warm(&vcpu);
            }
            Start::Boot { mut cpuid, msrs, entry, host_cpus } => {
                if let Some(cpus) = host_cpus {
                    placement::pin(&cpus).map_err(|source| VcpuError::Pin { index: self.index, source })?;
                }
                boot::cpuid::timing::describe(&mut cpuid, vcpu.tsc_khz());
                vcpu.set_cpuid(&cpuid).map_err(|source| self.error(source))?;
                vcpu.offer_machine_checks(&self.shared.hypervisor).map_err(|source| self.error(source))?;
                if let Some((entry, ram)) = entry {
                    let mut sregs = vcpu.sregs().map_err(|source| self.error(source))?;
                    let regs = boot::boot_regs(ram.memory(), entry, &mut sregs)
                        .map_err(|source| VcpuError::Boot { index: self.index, source })?;
                    vcpu.set_registers(&regs, &sregs).map_err(|source| self.error(source))?;
                }
                vcpu.keep_to_offers(true).map_err(|source| self.error(source))?;
                vcpu.set_msrs(&msrs).map_err(|source| self.error(source))?;
                vcpu.discover_msrs(&self.shared.hypervisor).map_err(|source| self.error(source))?;
            }
        }
        Ok(vcpu)
    }

    /// In the guest until a pause is asked for, until it cannot go on, or until its machine is about to end: a vCPU
    /// that has asked for that waits like one that is stopped, and so do the others from their next exit on.
    fn run(&self, processor: &mut Processor) {
        let Processor { vcpu, owed, .. } = processor;
        let Shared { pio, mmio, .. } = &self.shared;
        let is_wanted = || self.is_wanted();
        if !owed.pay(pio, mmio, &is_wanted) {
            return;
        }
        self.clear_exit_flag(vcpu);
        // Whatever it stood still for: a pause that was asked for, an update, an update that was undone.
        vcpu.note_pause();
        self.checks.deliver(vcpu);
        self.entered.store(timeline::now_ns(), Ordering::Relaxed);
        while !self.shared.requests.pending() {
            if !owed.0.is_empty() {
                // Not one more instruction: KVM only completes the one whose write this is.
                vcpu.set_immediate_exit(true);
            }
            match memory_errors::in_guest(|| vcpu.run()) {
                Ok(Exit::IoIn(port, size, data)) => {
                    owed.pay(pio, mmio, &|| false);
                    data.chunks_mut(size).for_each(|one| pio.read(port.into(), one));
                }
                Ok(Exit::IoOut(port, size, data)) => {
                    data.chunks(size).for_each(|one| owed.write(pio, true, port.into(), one, &is_wanted));
                }
                Ok(Exit::MmioRead(addr, data)) => {
                    owed.pay(pio, mmio, &|| false);
                    mmio.read(addr, data);
                }
                Ok(Exit::MmioWrite(addr, data)) => owed.write(mmio, false, addr, data, &is_wanted),
                // KVM completes what the last exit left pending before it looks at the exit flag, so here nothing is.
                Ok(Exit::Interrupted) => {
                    if let Some(gpa) = memory_errors::required() {
                        self.checks.page_lost(vcpu, gpa);
                    }
                    if self.is_wanted() {
                        return;
                    }
                    self.clear_exit_flag(vcpu);
                    // After that: who posts one raises the flag again.
                    self.checks.deliver(vcpu);
                }
                Ok(Exit::Reset) => {
                    log::info!("vCPU {}: triple fault: the guest resets", self.index);
                    return self.shared.requests.notify(GuestRequest::Reset);
                }
                Ok(Exit::Failed(reason)) => return self.fail(format!("vCPU {}: {reason}", self.index)),
                Err(error) => return self.fail(error.to_string()),
            }
            vcpu.exit_handled();
        }
    }
}
