//! The main thread: starts the others, then only waits to run a child, to exec, or to end the process.
//!
//! It has no seccomp filter and sees no guest data: the new image inherits what this thread is.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use theseus_resources::Vault;

use crate::update::park;
use crate::update::target::run_child;
use crate::update::timeline::{Phase, Timeline};

/// How long a helper that was let go after a failed exec may take; it has nothing to tear down.
const HELPER_END: Duration = Duration::from_secs(5);

/// Names the fd of the saved state to the new image.
pub const HANDOVER_VARIABLE: &str = "THESEUS_HANDOVER";

/// An exec, ready to go.
pub struct ExecPlan {
    /// The verified target.
    pub target: OwnedFd,
    pub state: RawFd,
    pub release: RawFd,
    pub vault: Vault,
    pub timeline: std::sync::Arc<Timeline>,
}

enum Order {
    Spawn(Box<Command>, Duration, Sender<std::io::Result<Option<ExitStatus>>>),
    Exec(Box<ExecPlan>, Sender<String>),
    Quit(i32),
}

/// The other threads' way to the main thread.
#[derive(Clone)]
pub struct MainThread(Sender<Order>);

impl MainThread {
    /// Runs a child to its end; `None` if it was killed because it took too long.
    pub fn spawn(&self, command: Command, patience: Duration) -> std::io::Result<Option<ExitStatus>> {
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

/// Parks the address space and execs. Whatever this returns, everything is as before.
fn exec(plan: ExecPlan) -> String {
    let ExecPlan { target, state, release, vault, timeline } = plan;
    let c_string = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
    let args: Vec<CString> = std::env::args_os().map(|arg| c_string(arg.into_vec())).collect();
    let mut env: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| name != HANDOVER_VARIABLE)
        .map(|(name, value)| c_string([name.into_vec(), b"=".to_vec(), value.into_vec()].concat()))
        .collect();
    env.push(c_string(format!("{HANDOVER_VARIABLE}={state}").into_bytes()));
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arg_pointers, env_pointers) = (pointers(&args), pointers(&env));

    // Signal dispositions are reset by exec: until the new image can receive signals, they wait.
    let _blocked = match BlockedSignals::new() {
        Ok(blocked) => blocked,
        Err(error) => return format!("cannot block signals: {error}"),
    };
    let _open = match vault.open_for_exec() {
        Ok(open) => open,
        Err(error) => return error.to_string(),
    };
    let parked = if crate::test_hooks::skip_park() { None } else { Some(park::park(release)) };
    let helper = match parked.transpose() {
        Ok(pid) => pid,
        Err(error) => {
            // The update goes on: only the pause is longer.
            log::warn!("cannot park the old address space, its tear-down will be part of the pause: {error}");
            None
        }
    };
    timeline.set_helper(helper.unwrap_or(0).unsigned_abs());
    timeline.stamp(Phase::Park);
    let fd = if crate::test_hooks::fail_exec() { -1 } else { target.as_raw_fd() };
    // SAFETY: null-terminated arrays of pointers to strings that live here; the fd is the verified target.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd,
            c"".as_ptr(),
            arg_pointers.as_ptr(),
            env_pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    let error = std::io::Error::last_os_error();
    if let Some(pid) = helper {
        // SAFETY: a count of one into an eventfd that the plan's owner keeps open.
        unsafe { libc::write(release, 1u64.to_ne_bytes().as_ptr().cast(), 8) };
        park::reap(pid, HELPER_END);
    }
    format!("exec failed: {error}")
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
