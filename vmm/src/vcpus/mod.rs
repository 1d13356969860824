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
mod start;
mod still;
mod thread;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use theseus_hypervisor::VcpuShape;
use theseus_hypervisor::vcpu::ExitFlag;
use theseus_hypervisor::vcpu::mce::Check;
use theseus_resources::state::StateError;
use theseus_resources::threads::ThreadError;

use crate::boot::BootError;
use crate::seams::Seams;
use crate::spin::Commander;
use answers::{Answers, Command};
use checks::Checks;
use placement::{PinError, Placement};
use round::Seat;
pub(crate) use signal::install_kick_handler;
pub(crate) use start::{Shared, Start};
pub(crate) use still::{Restoring, Saving};

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
