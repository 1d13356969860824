//! vCPU threads come into being: each gets ready in parallel with its owner, who then gives it the VM.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use theseus_devices::bus::Bus;
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::vcpu::ExitFlag;
use theseus_hypervisor::{Hypervisor, ReadyVm, VcpuShape};
use theseus_resources::threads::{self, Role};

use super::answers::{Answers, Command};
use super::checks::Checks;
use super::placement::Placement;
use super::round::Seat;
use super::{ANSWER, Handle, VcpuError, Vcpus, thread};
use crate::boot::Entry;
use crate::seams::Seams;
use crate::spin::{Commander, Spin};

/// What a vCPU begins with.
pub(crate) enum Start {
    /// At the guest's boot. `entry` is where the boot processor starts; the others wait for its SIPI.
    Boot {
        cpuid: Vec<kvm_cpuid_entry2>,
        msrs: Vec<kvm_msr_entry>,
        entry: Option<(Entry, Arc<theseus_resources::GuestRam>)>,
        /// The host's CPUs that it is to run on, if not all that the VMM may.
        host_cpus: Option<Vec<u32>>,
    },
    /// In an update, while the guest still runs in the old VMM: [`Vcpus::restore_early`] and [`Vcpus::restore_late`]
    /// follow.
    Prewarm(Box<VcpuShape>, Placement),
}

/// What all vCPU threads share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub hypervisor: Arc<Hypervisor>,
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub requests: Arc<dyn GuestRequests>,
    pub seams: Arc<dyn Seams>,
}

/// What a thread says of itself once it has its vCPU.
pub(super) struct Introduction {
    pub tid: libc::pid_t,
    pub seat: Arc<Seat>,
    pub exit_flag: ExitFlag,
    pub shape: VcpuShape,
    pub tsc_khz: u32,
}

/// A thread that waits for the VM in which to create its vCPU.
struct Newcomer {
    /// Where its thread was.
    placement: Option<Placement>,
    /// Its thread's, once that is there.
    tid: Receiver<libc::pid_t>,
    vm: Sender<ReadyVm>,
    pauses: Arc<AtomicU32>,
    entered: Arc<AtomicU64>,
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    introduced: Receiver<Introduction>,
}

/// vCPU threads on their way.
pub(crate) struct Starting {
    waiting: Vec<Newcomer>,
    checks: Arc<Checks>,
    answers: Answers,
    commander: Commander,
    seams: Arc<dyn Seams>,
}

impl Starting {
    /// All vCPUs come into being, in parallel, and are stopped.
    pub(crate) fn create(self, vm: &ReadyVm) -> Result<Vcpus, VcpuError> {
        let Self { waiting, checks, answers, commander, seams } = self;
        for (index, newcomer) in (0u32..).zip(&waiting) {
            if let Some(placement) = newcomer.placement.as_ref().filter(|placement| placement.cgroup.is_some())
                && let Ok(tid) = newcomer.tid.recv()
            {
                placement.join_cgroup(tid, index);
            }
            // One that has ended already has said why.
            let _ = newcomer.vm.send(vm.clone());
        }
        let seats = Arc::new([]);
        let mut vcpus =
            Vcpus { handles: Vec::new(), seats, checks, answers, running: false, late: 0, rounds: Cell::new(0), seams };
        let mut seats = Vec::new();
        for Newcomer { placement: _, tid: _, vm: _, pauses, entered, commands, thread, introduced } in waiting {
            // A thread that failed before it had a vCPU has dropped its end; its reason is in the events.
            if let Ok(Introduction { tid, seat, exit_flag, shape, tsc_khz }) = introduced.recv() {
                seats.push(seat);
                vcpus.handles.push(Handle {
                    tid,
                    shape,
                    tsc_khz,
                    pauses,
                    entered,
                    exit_flag,
                    commands,
                    commander: commander.clone(),
                    thread: Some(thread),
                });
            } else {
                drop(commands);
                let _ = thread.join();
            }
            vcpus.answers.ready(vcpus.handles.len(), ANSWER)?;
        }
        vcpus.seats = seats.into();
        Ok(vcpus)
    }
}

impl Vcpus {
    /// Starts a thread per vCPU. They get ready in parallel with the caller, until [`Starting::create`].
    pub(crate) fn start(shared: &Shared, starts: Vec<Start>) -> Result<Starting, VcpuError> {
        let (event_sender, events) = channel();
        let checks = Arc::new(Checks::new(starts.len()));
        let spin = Spin::of_threads(starts.len());
        let commander = Commander::default();
        let mut starting = Starting {
            waiting: Vec::new(),
            checks: checks.clone(),
            answers: Answers { events, spin },
            commander: commander.clone(),
            seams: shared.seams.clone(),
        };
        for (index, start) in (0u32..).zip(starts) {
            let (pauses, entered) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU64::new(0)));
            let (commands, receiver) = channel();
            let (introduce, introduced) = channel();
            let (vm, given) = channel();
            let (begun, tid) = channel();
            let placement = match &start {
                Start::Prewarm(_, placement) => Some(placement.clone()),
                Start::Boot { .. } => None,
            };
            let body = thread::Body {
                index,
                shared: shared.clone(),
                checks: checks.clone(),
                pauses: pauses.clone(),
                entered: entered.clone(),
                commands: receiver,
                events: event_sender.clone(),
                spin,
                commander: commander.clone(),
            };
            let life = move || body.guarded(|body| body.main(start, &begun, &given, &introduce));
            let thread = threads::spawn(Role::Vcpu(index), life)?;
            starting.waiting.push(Newcomer { placement, tid, vm, pauses, entered, commands, thread, introduced });
        }
        Ok(starting)
    }
}
