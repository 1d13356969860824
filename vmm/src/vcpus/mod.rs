//! The vCPU threads and what the rest of the VMM may ask of them.
//!
//! ```text
//!   start -> Stopped <--pause-- Running        Stopped: save, restore_late, end
//!               '-----resume------^
//! ```

pub mod placement;
mod signal;
mod thread;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use theseus_devices::bus::Bus;
use theseus_devices::interrupt::GuestRequests;
use theseus_hypervisor::vcpu::ExitFlag;
use theseus_hypervisor::{Hypervisor, VcpuState, Vm};

use crate::boot::Entry;
use placement::Placement;
pub use signal::install_kick_handler;

/// How long a vCPU thread may take for one command that it answers while stopped.
const ANSWER: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU {index}: {source}")]
    Hypervisor { index: u32, source: theseus_hypervisor::Error },
    #[error("vCPU {index}: {reason}")]
    Boot { index: u32, reason: String },
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Spawn { index: u32, source: std::io::Error },
    #[error("{missing} of {all} vCPUs did not stop within {within:?}: is a device of theirs hung?")]
    Stuck { missing: usize, all: usize, within: Duration },
    #[error("a vCPU thread has ended")]
    Gone,
}

/// What a vCPU begins with.
pub enum Start {
    /// At the guest's boot. `entry` is where the boot processor starts; the others wait for its SIPI.
    Boot {
        cpuid: Vec<kvm_cpuid_entry2>,
        msrs: Vec<kvm_msr_entry>,
        entry: Option<(Entry, Arc<theseus_resources::GuestRam>)>,
    },
    /// From the state of an earlier image, up to [`theseus_hypervisor::Vcpu::restore_early`].
    Restore(Box<VcpuState>, Placement),
}

/// What all vCPU threads share.
#[derive(Clone)]
pub struct Shared {
    pub vm: Arc<Vm>,
    pub hypervisor: Arc<Hypervisor>,
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub requests: Arc<dyn GuestRequests>,
}

enum Command {
    RestoreLate,
    Run,
    Pause,
    Save,
    End,
}

enum Event {
    /// Created, or restored late.
    Ready(Result<(), VcpuError>),
    Paused,
    Saved(Result<Box<VcpuState>, VcpuError>),
}

/// One thread as its owner sees it.
struct Handle {
    index: u32,
    tid: libc::pid_t,
    /// How many commands to come out of KVM_RUN it has not taken yet. A count, and the thread itself takes from it: a flag that is taken back
    /// before a slow thread has looked would leave its command in the queue.
    pauses: Arc<AtomicU32>,
    exit_flag: ExitFlag,
    commands: Sender<Command>,
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
        self.commands.send(command).map_err(|_| VcpuError::Gone)
    }
}

/// A thread that has not said yet whether it has a vCPU.
struct Newcomer {
    index: u32,
    pauses: Arc<AtomicU32>,
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    introduced: Receiver<(libc::pid_t, ExitFlag)>,
}

/// vCPU threads on their way.
pub struct Starting {
    waiting: Vec<Newcomer>,
    events: Receiver<Event>,
}

impl Starting {
    /// All vCPUs exist, and are stopped.
    pub fn wait(self) -> Result<Vcpus, VcpuError> {
        let Self { waiting, events } = self;
        let mut vcpus = Vcpus { handles: Vec::new(), events, running: false, late: 0 };
        for Newcomer { index, pauses, commands, thread, introduced } in waiting {
            // A thread that failed before it had a vCPU has dropped its end; its reason is in the events.
            if let Ok((tid, exit_flag)) = introduced.recv() {
                vcpus.handles.push(Handle { index, tid, pauses, exit_flag, commands, thread: Some(thread) });
            } else {
                drop(commands);
                let _ = thread.join();
            }
            vcpus.ready()?;
        }
        Ok(vcpus)
    }
}

pub struct Vcpus {
    handles: Vec<Handle>,
    events: Receiver<Event>,
    running: bool,
    /// Acknowledgements of abandoned pauses that are still to come.
    late: usize,
}

impl Vcpus {
    /// Starts a thread per vCPU. They work in parallel with the caller, until [`Starting::wait`].
    pub fn start(shared: &Shared, starts: Vec<Start>) -> Result<Starting, VcpuError> {
        let (event_sender, events) = channel();
        let mut starting = Starting { waiting: Vec::new(), events };
        for (index, start) in (0u32..).zip(starts) {
            let pauses = Arc::new(AtomicU32::new(0));
            let (commands, receiver) = channel();
            let (introduce, introduced) = channel();
            let body = thread::Body {
                index,
                shared: shared.clone(),
                pauses: pauses.clone(),
                commands: receiver,
                events: event_sender.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || body.main(start, &introduce))
                .map_err(|source| VcpuError::Spawn { index, source })?;
            starting.waiting.push(Newcomer { index, pauses, commands, thread, introduced });
        }
        Ok(starting)
    }

    fn ready(&self) -> Result<(), VcpuError> {
        match self.events.recv_timeout(ANSWER) {
            Ok(Event::Ready(result)) => result,
            _ => Err(VcpuError::Gone),
        }
    }

    /// The second half of a restore, once the VM's clock is set.
    pub fn restore_late(&self) -> Result<(), VcpuError> {
        for handle in &self.handles {
            handle.send(Command::RestoreLate)?;
        }
        self.handles.iter().try_for_each(|_| self.ready())
    }

    /// Lets all vCPUs run.
    pub fn resume(&mut self) -> Result<(), VcpuError> {
        self.running = true;
        for handle in &self.handles {
            handle.send(Command::Run)?;
        }
        Ok(())
    }

    /// Takes all vCPUs out of the guest, with nothing pending. If one does not come in time, all go on.
    pub fn pause(&mut self, within: Duration) -> Result<(), VcpuError> {
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
        for done in 0..expected {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Paused) => {}
                Ok(_) | Err(RecvTimeoutError::Disconnected) => return Err(VcpuError::Gone),
                Err(RecvTimeoutError::Timeout) => {
                    self.late = expected - done;
                    // Whoever is late takes the pause, and then this, from its queue.
                    self.handles.iter().try_for_each(|handle| handle.send(Command::Run))?;
                    return Err(VcpuError::Stuck { missing: self.late.min(all), all, within });
                }
            }
        }
        self.running = false;
        Ok(())
    }

    /// The state of all (paused) vCPUs, read in parallel, in order of their index.
    pub fn save(&self) -> Result<Vec<VcpuState>, VcpuError> {
        for handle in &self.handles {
            handle.send(Command::Save)?;
        }
        let mut states = Vec::with_capacity(self.handles.len());
        let mut failed = None;
        for _ in &self.handles {
            match self.events.recv_timeout(ANSWER) {
                Ok(Event::Saved(Ok(state))) => states.push(*state),
                Ok(Event::Saved(Err(error))) => failed = Some(error),
                _ => return Err(VcpuError::Gone),
            }
        }
        states.sort_by_key(|state| state.index);
        failed.map_or(Ok(states), Err)
    }

    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Where and how each thread is scheduled now, as an operator may have changed it.
    pub fn placements(&self) -> Vec<Placement> {
        self.handles.iter().map(|handle| Placement::of(handle.tid)).collect()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for handle in &self.handles {
            let _ = handle.interrupt(Command::End);
        }
        for handle in &mut self.handles {
            if handle.thread.take().is_some_and(|thread| thread.join().is_err()) {
                log::error!("the thread of vCPU {} had panicked", handle.index);
            }
        }
    }
}
