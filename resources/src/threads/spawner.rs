//! Who starts threads. A thread has the seccomp filters of the one that has started it, and its own on top
//! (seccomp(2)): so that each has no other than its own, all are started by one that has none, the spawner. Those of
//! vCPUs, of which there may be many, are started by a second one that has theirs: they inherit it, and none of them
//! installs any.
//!
//! Nobody's work is done on a spawner, and it sees no data of a guest or a client. Like the main thread, which has to
//! run programs, it is held by what holds the whole process.

use std::io;
use std::panic::resume_unwind;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use parking_lot::Mutex;

use super::{Role, ThreadError, set_mask};

/// Fences the calling thread in, by its role.
pub type Fence = Box<dyn Fn(Role) -> io::Result<()> + Send + Sync>;

type Job = Box<dyn FnOnce() + Send>;

static SPAWNER: OnceLock<Spawner> = OnceLock::new();

struct Spawner {
    fence: Fence,
    others: Sender<Job>,
    /// Once there is one.
    vcpus: Mutex<Option<Sender<Job>>>,
}

/// Every thread that is started from now on is fenced in by `fence`, before anything else of it. To be called once,
/// before there are others than the calling one, which must have no fence.
pub fn begin(fence: Fence) -> Result<(), ThreadError> {
    let (others, jobs) = channel();
    start(Role::Spawner, None, move || serve(&jobs))?;
    let _ = SPAWNER.set(Spawner { fence, others, vcpus: Mutex::new(None) });
    Ok(())
}

fn serve(jobs: &Receiver<Job>) {
    jobs.iter().for_each(|job| job());
}

/// The thread is fenced in when this returns.
///
/// # Errors
/// `body` has not begun, and is dropped.
pub fn spawn<T: Send + 'static>(
    role: Role,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, ThreadError> {
    match SPAWNER.get() {
        Some(spawner) => spawner.spawn(role, body),
        None => start(role, None, body),
    }
}

impl Spawner {
    fn spawn<T: Send + 'static>(
        &'static self,
        role: Role,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, ThreadError> {
        let (sender, started) = channel();
        let inherits = matches!(role, Role::Vcpu(_));
        let fence = (!inherits).then_some(&self.fence);
        let job = Box::new(move || drop(sender.send(start(role, fence, body))));
        let by = if inherits { self.of_vcpus()? } else { self.others.clone() };
        let gone = || ThreadError::NoSpawner(role);
        by.send(job).map_err(|_| gone())?;
        started.recv().map_err(|_| gone())?
    }

    fn of_vcpus(&'static self) -> Result<Sender<Job>, ThreadError> {
        let mut vcpus = self.vcpus.lock();
        if let Some(vcpus) = &*vcpus {
            return Ok(vcpus.clone());
        }
        let (sender, jobs) = channel();
        self.spawn(Role::VcpuSpawner, move || serve(&jobs))?;
        Ok(vcpus.insert(sender).clone())
    }
}

fn start<T: Send + 'static>(
    role: Role,
    fence: Option<&'static Fence>,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, ThreadError> {
    let (sender, fenced) = channel();
    let life = move || {
        set_mask(&role.mask());
        if let Some(fence) = fence {
            let result = fence(role);
            let is_out = result.is_err();
            let _ = sender.send(result);
            if is_out {
                // Whoever has asked for this thread is told, and never sees its end.
                resume_unwind(Box::new(role));
            }
        }
        body()
    };
    let thread = Builder::new().name(role.to_string()).spawn(life);
    let thread = thread.map_err(|source| ThreadError::Limit { role, source })?;
    if fence.is_some() {
        let fenced = fenced.recv().unwrap_or_else(|_| Err(io::Error::other("it has ended")));
        fenced.map_err(|source| ThreadError::Fence { role, source })?;
    }
    Ok(thread)
}
