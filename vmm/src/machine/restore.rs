//! The machine in a new VMM. Until the update commits, nothing of the outside world is consumed and no guest code runs,
//! so that the state it came from stays true, and the old VMM can go on with it.
//!
//! ```text
//!   prewarm   the guest runs in the old VMM: RAM, VM, memslots, interrupt controllers, vCPUs and their threads,
//!             devices as they were just now
//!   restore   it stands still: what only now is known
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use theseus_devices::device::Buses;
use theseus_hypervisor::{BareVm, ReadyVm};
use theseus_resources::{Claims, GuestRam, MemoryListeners, Pages};

use super::build::told;
use super::passthrough::PassthroughDevices;
use super::state::MachineState;
use super::{Host, Machine, MachineError, devices};
use crate::timeline::{Phase, Timeline};
use crate::vcpus::saved::EncodedVcpu;
use crate::vcpus::{Restoring, Start, Vcpus};

/// How long page tables are filled before the guest stands still. What is missing then is filled in the background, as
/// the guest runs.
const FILL: Duration = Duration::from_secs(20);

/// So that the guest does not fault its memory in page by page, in either stage. Whether something of the first is left
/// to do.
fn fill_page_tables(ram: &GuestRam, vcpus: &Vcpus, passthrough: &PassthroughDevices) -> bool {
    let until = Instant::now() + FILL;
    let in_time = || Instant::now() < until;
    if !may_fill(ram, !passthrough.ids().is_empty()) {
        return false;
    }
    if let Err(error) = ram.populate_page_tables(in_time) {
        log::debug!("page tables: {error}");
        return false;
    }
    let unfilled = !in_time();
    // KVM empties it as the first group is added to the VM that is not coherent
    // (kvm_noncoherent_dma_assignment_start_or_stop), which is in the pause.
    if passthrough.are_coherent()
        && let Err(error) = ram.each_piece(in_time, |gpa, size| {
            vcpus.fill_second_stage(gpa, size)?;
            Ok::<_, MachineError>(())
        })
    {
        log::debug!("second stage: {error}");
    }
    unfilled
}

/// hugetlbfs does not tell which pages there are (its SEEK_DATA finds no holes): all of them only where they are
/// `pinned`, and so are there.
fn may_fill(ram: &GuestRam, pinned: bool) -> bool {
    pinned || !matches!(ram.pages(), Pages::Huge(_))
}

/// A machine that waits for its guest. Fields are dropped in this order, as those of [`Machine`] are.
pub(crate) struct Prewarmed {
    /// Once their states are here.
    restoring: Option<Restoring>,
    vcpus: Vcpus,
    passthrough: PassthroughDevices,
    memory: Arc<MemoryListeners>,
    vm: ReadyVm,
    ram: Arc<GuestRam>,
    buses: Buses,
    unfilled: bool,
}

impl Prewarmed {
    /// From the state of a dry run. Order matters: memslots, those of BARs too, before the interrupt controllers
    /// (cost), these before vCPUs.
    pub(crate) fn new(state: MachineState, host: &Host, claims: &mut Claims) -> Result<Self, MachineError> {
        let MachineState {
            version: _,
            running: _,
            ram,
            ram_handles,
            irqchip: _,
            clock: _,
            shapes,
            devices: _,
            passthrough,
        } = state;
        let ram = Arc::new(GuestRam::restore(ram, ram_handles, claims)?);
        let memory = told(&ram)?;
        let vm = BareVm::new(&host.hypervisor)?;
        memory.subscribe(vm.handle().clone())?;

        let buses = Buses::empty();
        let starts = shapes.into_iter().map(|(shape, placement)| Start::Prewarm(Box::new(shape), placement)).collect();
        let threads = Vcpus::start(&host.for_vcpus(&buses), starts)?;
        let passthrough = PassthroughDevices::restore(passthrough, &vm, &buses, &memory, host, claims)?;

        let vm = vm.create_irqchip()?;
        crate::ending::remember(Arc::downgrade(&vm));
        let vcpus = threads.create(&vm)?;
        // Likely ones: most guests leave their vectors where they are.
        vm.commit_routes()?;
        crate::heap::warm(vcpus.count() as usize);
        let unfilled = fill_page_tables(&ram, &vcpus, &passthrough);
        Ok(Self { restoring: None, unfilled, vcpus, passthrough, memory, vm, ram, buses })
    }

    /// Its state is about to come.
    pub(crate) fn awake(&self) {
        self.vcpus.awake();
    }

    /// With the vCPUs' part of the state of the paused guest. Then [`Prewarmed::restore`].
    pub(crate) fn begin(&mut self, vcpus: Vec<EncodedVcpu>) -> Result<(), MachineError> {
        self.restoring = Some(self.vcpus.restore_early(vcpus)?);
        Ok(())
    }

    /// From the rest of the state of the paused guest. TSC offsets before the clock, the clock before the kvmclock
    /// MSRs, all LAPICs and then the IRQ chip before routes, routes before irqfds.
    pub(crate) fn restore(
        self,
        state: MachineState,
        host: &Host,
        claims: &mut Claims,
        timeline: &Timeline,
    ) -> Result<Machine, MachineError> {
        let Self { restoring, vcpus, passthrough, memory, vm, ram, buses, unfilled } = self;
        let MachineState {
            version,
            running: _,
            ram: _,
            ram_handles: _,
            irqchip,
            clock,
            shapes: _,
            devices: set,
            passthrough: mend,
        } = state;
        restoring.map_or(Ok(()), |early| vcpus.finish(early))?;
        if let Some(error) = vm.restore_clock(&clock)? {
            log::debug!("kvmclock is off by {error} ns");
        }
        // Beside all that follows: KVM itself orders what interrupt controllers do to vCPUs that do not run.
        let late = vcpus.restore_late()?;
        timeline.pass(Phase::Vcpus)?;

        passthrough.mend(mend, claims)?;
        timeline.pass(Phase::Passthrough)?;

        vm.restore_irqchip(&irqchip)?;
        vm.commit_routes()?;
        let devices = devices::restore(set, &vm, host, claims, &buses)?;
        vcpus.finish(late)?;
        timeline.pass(Phase::Devices)?;

        let clock = Some(clock);
        Ok(Machine { version, vcpus, passthrough, devices, memory, vm, ram, clock, unfilled, populating: None })
    }
}
