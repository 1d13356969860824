//! The vCPU threads and what the rest of the VMM may ask of them.
//!
//! ```text
//!   start -> Stopped <--pause-- Running        Stopped: save, restore_early, restore_late, end
//!               '-----resume------^
//! ```

mod answers;
mod checks;
mod owed;
pub(crate) mod placement;
mod processor;
mod round;
pub(crate) mod saved;
mod signal;
mod thread;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use theseus_devices::bus::Bus;
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::vcpu::ExitFlag;
use theseus_hypervisor::vcpu::mce::Check;
use theseus_hypervisor::{Hypervisor, ReadyVm, VcpuShape};
use theseus_resources::state::StateError;
use theseus_resources::survivor::{self, Look, look};
use theseus_resources::threads::{self, Role, ThreadError};

use crate::boot::{BootError, Entry};
use crate::seams::Seams;
use crate::spin::{self, Commander, Spin};
use answers::{Answers, Command};
use checks::Checks;
use placement::{PinError, Placement};
use processor::Processor;
use round::{Job, Round, Seat};
use saved::{EncodedVcpu, SavedVcpu};
pub(crate) use signal::install_kick_handler;

/// How long a vCPU thread may take for one command that it answers while stopped.
const ANSWER: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuError {
    #[error("vCPU {index}: {source}")]
    Hypervisor { index: u32, source: theseus_hypervisor::Error },
    #[error("vCPU {index}: {source}")]
    Pin { index: u32, source: PinError },
    #[error("vCPU {index}: {source}")]
    Boot { index: u32, source: BootError },
    #[error(transparent)]
    Thread(#[from] ThreadError),
    #[error("{missing} of {all} vCPUs did not stop within {within:?}: is a device of theirs hung?")]
    Stuck { missing: usize, all: usize, within: Duration },
    #[error("{missing} of {all} vCPUs have not answered within {within:?}: is the host out of memory or time?")]
    Silent { missing: usize, all: usize, within: Duration },
    #[error("vCPU {index}: {panic}")]
    Panicked { index: u32, panic: String },
    #[error("vCPU {index}: {source}")]
    State { index: u32, source: StateError },
    #[error("section 'vcpu{index}': {reason}")]
    Foreign { index: u32, reason: String },
    #[error("the saved state holds {states} vCPUs, the one before it {vcpus}")]
    Count { states: usize, vcpus: usize },
    #[error("a vCPU thread has ended")]
    Gone,
    #[error("the vCPUs run")]
    Run,
    #[error("vCPU {0} has left something to be done that nobody has")]
    Unhandled(u32),
}

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

/// One thread as its owner sees it.
struct Handle {
    tid: libc::pid_t,
    shape: VcpuShape,
    tsc_khz: u32,
    /// How many commands to come out of KVM_RUN it has not taken yet. A count, and the thread itself takes from it: a
    /// flag that is taken back before a slow thread has looked would leave its command in the queue.
    pauses: Arc<AtomicU32>,
    /// When it went into the guest; 0 where it has not since it was told to.
    entered: Arc<AtomicU64>,
    exit_flag: ExitFlag,
    commands: Sender<Command>,
    commander: Commander,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    fn kick(&self) {
        self.exit_flag.raise();
        signal::kick(self.tid);
    }

    /// Takes the thread out of KVM_RUN for `command`.
    fn interrupt(&self, command: Command) -> Result<(), VcpuError> {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        let sent = self.send(command);
        self.kick();
        sent
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commander.is_here();
        self.commands.send(command).map_err(|_| VcpuError::Gone)
    }
}

/// What a thread says of itself once it has its vCPU.
struct Introduction {
    tid: libc::pid_t,
    seat: Arc<Seat>,
    exit_flag: ExitFlag,
    shape: VcpuShape,
    tsc_khz: u32,
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

pub(crate) struct Vcpus {
    handles: Vec<Handle>,
    /// In order of their index, as the handles are.
    seats: Arc<[Arc<Seat>]>,
    checks: Arc<Checks>,
    answers: Answers,
    running: bool,
    /// Acknowledgements of abandoned pauses that are still to come.
    late: usize,
    /// How many there were.
    rounds: Cell<u64>,
    seams: Arc<dyn Seams>,
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

    /// Makes the second stage of `size` bytes from the guest physical address `gpa` on, for all of them: before they run.
    pub(crate) fn fill_second_stage(&self, gpa: u64, size: u64) -> Result<(), VcpuError> {
        let filled = self.seats.first().map_or(Ok(()), |seat| seat.processor.lock().vcpu.fill_second_stage(gpa, size));
        filled.map_err(|source| VcpuError::Hypervisor { index: 0, source })
    }

    /// Begins the first half of a restore, in parallel with the caller: `states` in order of their index, one for each
    /// vCPU.
    pub(crate) fn restore_early(&self, states: Vec<EncodedVcpu>) -> Result<Restoring, VcpuError> {
        if states.len() != self.handles.len() {
            return Err(VcpuError::Count { states: states.len(), vcpus: self.handles.len() });
        }
        Ok(Restoring(self.begin(Job::RestoreEarly(states))?))
    }

    /// Begins the second half of a restore, once the VM's clock is set.
    pub(crate) fn restore_late(&self) -> Result<Restoring, VcpuError> {
        Ok(Restoring(self.begin(Job::RestoreLate)?))
    }

    /// Waits until all vCPUs are restored so far, and takes part in that.
    pub(crate) fn finish(&self, Restoring(begun): Restoring) -> Result<(), VcpuError> {
        self.finish_round(&begun, || ()).map(drop)
    }

    /// Tells as many threads of a round as should take part in it: all where each has a CPU to wait on ([`Spin`]).
    fn begin(&self, job: Job) -> Result<Begun, VcpuError> {
        let number = self.rounds.get() + 1;
        self.rounds.set(number);
        let begun = Begun(Arc::new(Round::new(number, &self.seats, job, &self.checks, &self.seams)));
        let helpers = if self.answers.spin.is_spinning() {
            (0..self.seats.len()).collect()
        } else {
            round::helpers(round::this_cpu(), self.seats.iter().map(|seat| seat.cpu()), spin::cpus_seen())
        };
        for handle in helpers.into_iter().filter_map(|index| self.handles.get(index)) {
            handle.send(Command::Round(begun.0.clone()))?;
        }
        Ok(begun)
    }

    fn finish_round(&self, Begun(round): &Begun, soon: impl FnOnce()) -> Result<Vec<SavedVcpu>, VcpuError> {
        let done = round.take_part(None);
        self.answers.of_round(round.number, self.seats.len(), done, ANSWER, soon)
    }

    /// [`Vcpus::restore_early`] is about to come. Nothing where there is no CPU for each to wait on ([`Spin`]).
    pub(crate) fn awake(&self) {
        if self.answers.spin.is_spinning() {
            // One that has ended is found by what follows.
            self.handles.iter().for_each(|handle| drop(handle.send(Command::Awake)));
        }
    }

    /// Tells the guest of a page that it has lost, and does not need just now.
    pub(crate) fn memory_lost(&self, gpa: u64) {
        self.checks.post(0, Check::Optional(gpa));
    }

    /// Lets all vCPUs run.
    pub(crate) fn resume(&mut self) -> Result<(), VcpuError> {
        self.running = true;
        for handle in &self.handles {
            handle.entered.store(0, Ordering::Relaxed);
            handle.send(Command::Run)?;
        }
        Ok(())
    }

    /// Takes all vCPUs out of the guest, with nothing pending. If one does not come in time, all go on.
    pub(crate) fn pause(&mut self, within: Duration) -> Result<(), VcpuError> {
        if !self.running {
            return Ok(());
        }
        let deadline = Instant::now() + within;
        let all = self.handles.len();
        let asked = self.handles.iter().filter(|handle| handle.interrupt(Command::Pause).is_ok()).count();
        if asked < all {
            // One has ended, which it should not. The others go on, and their answers count as late.
            self.late += asked;
            self.handles.iter().for_each(|handle| drop(handle.send(Command::Run)));
            return Err(VcpuError::Gone);
        }
        let expected = all + std::mem::take(&mut self.late);
        if let Err(missing) = self.answers.paused(expected, deadline) {
            self.late = missing;
            // Whoever is late takes the pause, and then this, from its queue.
            self.handles.iter().for_each(|handle| drop(handle.send(Command::Run)));
            return Err(VcpuError::Stuck { missing: missing.min(all), all, within });
        }
        self.running = false;
        Ok(())
    }

    /// Begins to save the states of all (paused) vCPUs, in parallel with the caller. `soon` is called when no more than
    /// one is missing.
    pub(crate) fn begin_save<'a>(&'a self, soon: &'a dyn Fn()) -> Result<Saving<'a>, VcpuError> {
        Ok(Saving { vcpus: self, how: How::InRound { begun: self.begin(Job::Save)?, soon } })
    }

    /// The same, but the caller's thread will do it alone, in [`Saving::finish`].
    #[cfg_attr(not(test), expect(dead_code, reason = "for the rescue after a crash: docs/architecture.md"))]
    pub(crate) fn begin_save_alone(&self) -> Saving<'_> {
        Saving { vcpus: self, how: How::Alone }
    }

    /// Saves the states of all vCPUs by this thread alone: theirs wait for a command, or are dead, with their vCPU in
    /// hand or not. What a vCPU has left to be done was done before, and was completed.
    fn save_alone(&self) -> Result<Vec<SavedVcpu>, VcpuError> {
        if self.running && !survivor::is_alone() {
            return Err(VcpuError::Run);
        }
        let processors: Vec<_> = self.seats.iter().map(|seat| look(&seat.processor)).collect();
        if let Some(processor) = processors.iter().find(|processor| processor.vcpu.has_unhandled_exit()) {
            return Err(VcpuError::Unhandled(processor.index));
        }
        for (index, processor) in (0u32..).zip(&processors) {
            // A survivor leaves them where they are: to take them it would need a lock.
            let checks = if survivor::is_alone() { self.checks.waiting(index) } else { self.checks.take(index) };
            for check in checks {
                // What the guest is not told now it learns when it needs the page.
                let _ = processor.vcpu.inject(check);
                if matches!(check, Check::Optional(_)) && processor.vcpu.broadcasts() {
                    let others = processors.iter().filter(|other| other.index != index);
                    others.for_each(|other| drop(other.vcpu.inject(Check::OfOther)));
                }
            }
        }
        let save = |processor: &Look<'_, Processor>| {
            let mut saved = processor.save()?;
            self.seams.saved_vcpu(&mut saved.refused);
            Ok(saved)
        };
        processors.iter().map(save).collect()
    }

    /// How many threads have their vCPU locked.
    #[cfg(test)]
    pub(crate) fn in_hand(&self) -> usize {
        self.seats.iter().filter(|seat| seat.processor.is_locked()).count()
    }

    pub(crate) fn count(&self) -> u32 {
        self.handles.len() as u32
    }

    /// What KVM runs the guest's TSC at; 0 without a vCPU.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.handles.first().map_or(0, |handle| handle.tsc_khz)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// When the last of them has gone into the guest since [`Vcpus::resume`]; None while one has not. As
    /// [`crate::timeline::now_ns`].
    ///
    /// Where CPUs are few, a vCPU runs long before whoever has told it to gets to look at the clock.
    pub(crate) fn entered(&self) -> Option<u64> {
        let each = self.handles.iter().map(|handle| handle.entered.load(Ordering::Relaxed));
        each.map(|at| (at != 0).then_some(at)).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// In order of their index.
    pub(crate) fn threads(&self) -> Vec<libc::pid_t> {
        self.handles.iter().map(|handle| handle.tid).collect()
    }

    /// What each vCPU is, in order of their index.
    pub(crate) fn shapes(&self) -> Vec<VcpuShape> {
        self.handles.iter().map(|handle| handle.shape.clone()).collect()
    }

    /// Where and how each thread is scheduled now, as an operator may have changed it.
    pub(crate) fn placements(&self) -> Vec<Placement> {
        self.handles.iter().map(|handle| Placement::of(handle.tid)).collect()
    }
}

/// A round, which is given up where this is dropped.
struct Begun(Arc<Round>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// vCPUs that are being restored: [`Vcpus::finish`].
pub(crate) struct Restoring(Begun);

/// States that are being saved.
pub(crate) struct Saving<'a> {
    vcpus: &'a Vcpus,
    how: How<'a>,
}

enum How<'a> {
    InRound {
        begun: Begun,
        soon: &'a dyn Fn(),
    },
    /// By whoever calls [`Saving::finish`].
    Alone,
}

impl Saving<'_> {
    /// In order of their index.
    pub(crate) fn finish(self) -> Result<Vec<SavedVcpu>, VcpuError> {
        match self.how {
            How::InRound { begun, soon } => self.vcpus.finish_round(&begun, soon),
            How::Alone => self.vcpus.save_alone(),
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for handle in &self.handles {
            let _ = handle.interrupt(Command::End);
        }
        for handle in &mut self.handles {
            // What it may have panicked of was told when it did.
            let _ = handle.thread.take().map(JoinHandle::join);
        }
    }
}
