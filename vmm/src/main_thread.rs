//! The main thread: starts the others, then only waits to run a child, to exec, or to end the process.
//!
//! It has no seccomp filter and sees no guest data: the new image inherits what this thread is.

use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use theseus_resources::Vault;

use crate::update::arbiter::Way;
use crate::update::back::{HANDOVER_VARIABLE, Image, Inherited};
use crate::update::park::{self, DeviceMapping, Parked, Return};
use crate::update::target::{Ended, Target, run_child};
use crate::update::timeline::{Phase, Timeline};

/// How long a helper that was let go after a failed exec may take; it has nothing to tear down.
const HELPER_END: Duration = Duration::from_secs(5);

/// An exec, ready to go.
pub struct ExecPlan {
    /// The verified target.
    pub target: Arc<Target>,
    pub inherited: Inherited,
    pub release: RawFd,
    /// Where this image has devices mapped: with it they would stay busy.
    pub devices: Vec<DeviceMapping>,
    pub vault: Vault,
    pub timeline: Arc<Timeline>,
}

enum Order {
    Spawn(Box<Command>, Duration, Sender<std::io::Result<Option<Ended>>>),
    Exec(Box<ExecPlan>, Sender<String>),
    Quit(i32),
}

/// The other threads' way to the main thread.
#[derive(Clone)]
pub struct MainThread(Sender<Order>);

impl MainThread {
    /// Runs a child to its end; `None` if it was killed because it took too long.
    pub fn spawn(&self, command: Command, patience: Duration) -> std::io::Result<Option<Ended>> {
        let (sender, receiver) = channel();
        let gone = |_| std::io::Error::other("the main thread has ended");
        self.0.send(Order::Spawn(Box::new(command), patience, sender)).map_err(|_| gone(()))?;
        receiver.recv().map_err(|_| gone(()))?
    }

    /// Becomes the new image. Returns only if that failed, with the reason.
    pub fn exec(&self, plan: ExecPlan) -> String {
        let (sender, receiver) = channel();
        let gone = || "the main thread has ended".to_owned();
        if self.0.send(Order::Exec(Box::new(plan), sender)).is_err() {
            return gone();
        }
        receiver.recv().unwrap_or_else(|_| gone())
    }

    /// Ends the process with this exit code.
    pub fn quit(&self, code: i32) {
        // A main thread that has ended has ended the process.
        let _ = self.0.send(Order::Quit(code));
    }
}

pub struct Orders(Receiver<Order>);

pub fn orders() -> (MainThread, Orders) {
    let (sender, receiver) = channel();
    (MainThread(sender), Orders(receiver))
}

impl Orders {
    /// The main thread's life. Returns the exit code.
    pub fn serve(self) -> i32 {
        for order in &self.0 {
            match order {
                Order::Spawn(command, patience, answer) => {
                    let _ = answer.send(run_child(*command, patience));
                }
                Order::Exec(plan, answer) => {
                    let _ = answer.send(exec(*plan));
                }
                Order::Quit(code) => return code,
            }
        }
        // All senders are gone: the control thread has panicked.
        crate::EXIT_FAILURE
    }
}

/// Parks the address space and execs. Whatever this returns, everything is as before, and the guest is this image's.
fn exec(plan: ExecPlan) -> String {
    let ExecPlan { target, inherited, release, devices, vault, timeline } = plan;
    let image = Image::new(HANDOVER_VARIABLE, &inherited.to_string());
    // Signal dispositions are reset by exec: until the new image can receive signals, they wait.
    let _blocked = match BlockedSignals::new() {
        Ok(blocked) => blocked,
        Err(error) => return format!("cannot block signals: {error}"),
    };
    let _open = match vault.open_for_exec() {
        Ok(open) => open,
        Err(error) => return error.to_string(),
    };
    let (args, env) = image.pointers();
    let back = Return { binary: inherited.old, args, env };
    let parked = match () {
        () if crate::test_hooks::skip_park() => Ok(None),
        () if crate::test_hooks::fail_park() => Err(std::io::Error::from_raw_os_error(libc::EAGAIN)),
        () => park::park(release, &timeline, back, &devices).map(Some),
    };
    let helper = match parked {
        Ok(parked) => parked,
        // Without a helper nobody would bring the guest back from an image that is killed or hangs.
        Err(error) => return format!("cannot park the old address space: {error}: raise pids.max or RLIMIT_NPROC"),
    };
    timeline.set_helper(helper.as_ref().map_or(0, Parked::pid).unsigned_abs());
    // From here on the guest may be the helper's at any moment, should we get stuck. A panic is as good as an error.
    let reason = catch_unwind(AssertUnwindSafe(|| {
        timeline.pass(Phase::Park)?;
        // Whoever comes from here on waits, or meets the exec itself.
        target.unchanged()?;
        let fd = if crate::test_hooks::fail_exec() { -1 } else { target.file.as_raw_fd() };
        Err(format!("exec failed: {}", image.exec(fd)))
    }));
    let reason = match reason {
        Ok(Ok(())) => "exec returned".to_owned(),
        Ok(Err(reason)) => reason,
        Err(panic) => crate::update::back::panic_text(&*panic),
    };
    if !timeline.arbiter().commit(Way::Forward) {
        crate::update::back::superseded();
    }
    if let Some(parked) = helper {
        parked.dismiss(release, HELPER_END);
    }
    reason
}

/// All signals blocked on this thread, until dropped.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> std::io::Result<Self> {
        // SAFETY: plain old data, filled by the calls below.
        let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
        // SAFETY: both point to valid sets.
        let result = unsafe {
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before)
        };
        if result == 0 { Ok(Self(before)) } else { Err(std::io::Error::from_raw_os_error(result)) }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: a set that pthread_sigmask gave us.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}
