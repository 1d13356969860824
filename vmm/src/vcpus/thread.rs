//! The body of a vCPU thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use theseus_devices::bus::Bus;
use theseus_devices::interrupt::GuestRequest;
use theseus_hypervisor::vcpu::mce::Check;
use theseus_hypervisor::vcpu::{OwedWrite, reasons};
use theseus_hypervisor::{Exit, ReadyVm, Vcpu, VcpuState};

use super::answers::{Command, Event};
use super::checks::Checks;
use super::saved::{self, EncodedVcpu, SavedVcpu};
use super::{Introduction, Shared, Start, VcpuError, placement, signal};
use crate::boot;
use crate::memory_errors;
use crate::panics::panic_text;
use crate::spin::Spin;

/// Writes that this vCPU was taken away from while it waited for its turn at a device. A read waits: KVM cannot
/// complete its instruction without it.
struct Owed(Vec<OwedWrite>);

impl Owed {
    fn write(&mut self, bus: &Bus, is_port: bool, address: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) {
        // One after the other, as the guest has made them.
        if !self.0.is_empty() || !bus.write_unless(address, data, is_wanted) {
            self.0.push(OwedWrite { is_port, address, data: data.to_vec() });
        }
    }

    /// Carries them out. False: the vCPU was wanted again before that.
    fn pay(&mut self, pio: &Bus, mmio: &Bus, is_wanted: &dyn Fn() -> bool) -> bool {
        while let Some(OwedWrite { is_port, address, data }) = self.0.first() {
            let bus = if *is_port { pio } else { mmio };
            if !bus.write_unless(*address, data, is_wanted) {
                return false;
            }
            self.0.remove(0);
        }
        true
    }
}

pub(super) struct Body {
    pub index: u32,
    pub shared: Shared,
    pub checks: Arc<Checks>,
    pub pauses: Arc<AtomicU32>,
    pub commands: Receiver<Command>,
    pub events: Sender<Event>,
    pub spin: Spin,
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

    pub(super) fn main(&self, start: Start, vm: &Receiver<ReadyVm>, introduce: &Sender<Introduction>) {
        signal::unblock_kick();
        if let Start::Prewarm(_, placement) = &start {
            placement.apply(self.index);
        }
        // None if the machine has come to nothing meanwhile.
        let Ok(vm) = vm.recv() else { return };
        let mut vcpu = match self.create(start, &vm) {
            Ok(vcpu) => vcpu,
            Err(error) => return self.tell(Event::Ready(Err(error))),
        };
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.checks.introduce(self.index, tid, vcpu.exit_flag());
        let (exit_flag, shape, tsc_khz) = (vcpu.exit_flag(), vcpu.shape(), vcpu.tsc_khz());
        let _ = introduce.send(Introduction { tid, exit_flag, shape, tsc_khz });
        self.tell(Event::Ready(Ok(())));
        let mut owed = Owed(Vec::new());
        // Of which the late part is still to come.
        let mut restored = None;
        // Whether the next command is about to come. Not so after a save: its CPU is wanted for the new VMM.
        let mut is_expected = false;
        while let Ok(command) = if is_expected { self.spin.receive(&self.commands) } else { self.commands.recv() } {
            is_expected = !matches!(command, Command::Save(_) | Command::Run);
            match command {
                Command::RestoreEarly(encoded) => {
                    crate::test_hooks::vcpu_panic();
                    let result = saved::decode(&encoded, self.index).and_then(|mut state| {
                        owed.0 = std::mem::take(&mut state.owed);
                        let state = restored.insert(state);
                        vcpu.restore_early(state).map_err(|source| self.error(source))
                    });
                    self.tell(Event::Ready(result));
                }
                Command::RestoreLate => {
                    let result = restored.take().map_or(Ok(()), |state| self.restore_late(&mut vcpu, &vm, &state));
                    self.tell(Event::Ready(result.map_err(|source| self.error(source))));
                }
                Command::Run => self.run(&mut vcpu, &mut owed),
                Command::Pause => {
                    self.pauses.fetch_sub(1, Ordering::SeqCst);
                    self.tell(Event::Paused);
                }
                Command::Save(turn) => {
                    self.take_checks(&mut vcpu);
                    self.tell(Event::Saved(turn, self.index, self.save(&vcpu, &vm, &owed)));
                }
                Command::End => return,
            }
        }
    }

    fn save(&self, vcpu: &Vcpu, vm: &ReadyVm, owed: &Owed) -> Result<SavedVcpu, VcpuError> {
        let mut state = vcpu.save().map_err(|source| self.error(source))?;
        state.owed.clone_from(&owed.0);
        let refused = reasons(&state, &vm.memory());
        let state = EncodedVcpu::new(saved::section(self.index as usize), &state);
        Ok(SavedVcpu { state: state.map_err(|source| VcpuError::State { index: self.index, source })?, refused })
    }

    fn restore_late(&self, vcpu: &mut Vcpu, vm: &ReadyVm, state: &VcpuState) -> Result<(), theseus_hypervisor::Error> {
        vcpu.restore_late(state)?;
        // A kick too many is legal, one too few a guest that waits for a spin lock for ever.
        if state.may_have_been_kicked() { vm.kick_halted(self.index) } else { Ok(()) }
    }

    fn error(&self, source: theseus_hypervisor::Error) -> VcpuError {
        VcpuError::Hypervisor { index: self.index, source }
    }

    /// Whether a command waits that this thread must come out of the guest for.
    fn is_wanted(&self) -> bool {
        self.pauses.load(Ordering::SeqCst) > 0
    }

    fn clear_exit_flag(&self, vcpu: &mut Vcpu) {
        vcpu.set_immediate_exit(false);
        // Who was wanted before the line above has the exit flag cleared by it: look again.
        if self.is_wanted() {
            vcpu.set_immediate_exit(true);
        }
    }

    /// Tells the guest of a page that it has just needed, and that is lost.
    fn page_lost(&self, vcpu: &mut Vcpu, gpa: u64) {
        self.inject(vcpu, Check::Required(gpa));
        if vcpu.broadcasts() {
            self.checks.post_others(self.index, Check::OfOther);
        }
    }

    /// Machine checks that others have for this vCPU.
    fn take_checks(&self, vcpu: &mut Vcpu) {
        for check in self.checks.take(self.index) {
            self.inject(vcpu, check);
            if matches!(check, Check::Optional(_)) && vcpu.broadcasts() {
                self.checks.post_others(self.index, Check::OfOther);
            }
        }
    }

    fn inject(&self, vcpu: &mut Vcpu, check: Check) {
        if let Err(error) = vcpu.inject(check) {
            log::error!("vCPU {}: the guest is not told of a memory error: {error}", self.index);
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
            Start::Prewarm(shape, _) => vcpu.prewarm(&shape).map_err(|source| self.error(source))?,
            Start::Boot { mut cpuid, msrs, entry, host_cpus } => {
                if let Some(cpus) = host_cpus {
                    placement::pin(&cpus).map_err(|reason| VcpuError::Boot { index: self.index, reason })?;
                }
                boot::cpuid::timing::describe(&mut cpuid, vcpu.tsc_khz());
                vcpu.set_cpuid(&cpuid).map_err(|source| self.error(source))?;
                vcpu.offer_machine_checks(&self.shared.hypervisor).map_err(|source| self.error(source))?;
                if let Some((entry, ram)) = entry {
                    let mut sregs = vcpu.sregs().map_err(|source| self.error(source))?;
                    let regs = boot::boot_regs(ram.memory(), entry, &mut sregs)
                        .map_err(|error| VcpuError::Boot { index: self.index, reason: error.to_string() })?;
                    vcpu.set_registers(&regs, &sregs).map_err(|source| self.error(source))?;
                }
                vcpu.keep_to_offers().map_err(|source| self.error(source))?;
                vcpu.set_msrs(&msrs).map_err(|source| self.error(source))?;
                vcpu.discover_msrs(&self.shared.hypervisor).map_err(|source| self.error(source))?;
            }
        }
        Ok(vcpu)
    }

    /// In the guest until a pause is asked for, until it cannot go on, or until its machine is about to end: a vCPU
    /// that has asked for that waits like one that is stopped, and so do the others from their next exit on.
    fn run(&self, vcpu: &mut Vcpu, owed: &mut Owed) {
        let Shared { pio, mmio, .. } = &self.shared;
        let is_wanted = || self.is_wanted();
        if !owed.pay(pio, mmio, &is_wanted) {
            return;
        }
        self.clear_exit_flag(vcpu);
        // Whatever it stood still for: a pause that was asked for, an update, an update that was undone.
        vcpu.note_pause();
        self.take_checks(vcpu);
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
                        self.page_lost(vcpu, gpa);
                    }
                    if self.is_wanted() {
                        return;
                    }
                    self.clear_exit_flag(vcpu);
                    // After that: who posts one raises the flag again.
                    self.take_checks(vcpu);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use parking_lot::Mutex;
    use theseus_devices::bus::BusDevice;

    use super::*;

    /// A device that another vCPU is in an access to.
    #[derive(Default)]
    struct Busy {
        busy: AtomicBool,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl BusDevice for Busy {
        fn read(&self, _: u64, _: &mut [u8]) {}

        fn write(&self, offset: u64, data: &[u8], is_wanted: &dyn Fn() -> bool) -> bool {
            if self.busy.load(Ordering::SeqCst) && is_wanted() {
                return false;
            }
            self.written.lock().push((offset, data.to_vec()));
            true
        }
    }

    #[test]
    fn what_a_vcpu_is_taken_away_from_it_owes() {
        let (device, pio, mmio) = (Arc::new(Busy::default()), Bus::new("port"), Bus::new("MMIO"));
        pio.insert(0xCF8, 8, device.clone()).unwrap();
        mmio.insert(0x1000, 16, device.clone()).unwrap();
        let mut owed = Owed(Vec::new());
        device.busy.store(true, Ordering::SeqCst);
        owed.write(&pio, true, 0xCFC, &[1], &|| true);
        device.busy.store(false, Ordering::SeqCst);
        // The second half of an access that crosses a page: free by now, but not its turn.
        owed.write(&mmio, false, 0x1008, &[2, 3], &|| true);
        assert!(device.written.lock().is_empty());
        let carried = owed.0.clone();
        device.busy.store(true, Ordering::SeqCst);
        assert!(!owed.pay(&pio, &mmio, &|| true), "wanted again");
        assert_eq!(owed.0, carried);
        device.busy.store(false, Ordering::SeqCst);
        assert!(owed.pay(&pio, &mmio, &|| true));
        assert_eq!(*device.written.lock(), [(4, vec![1]), (8, vec![2, 3])]);
        assert!(owed.0.is_empty());
    }
}
