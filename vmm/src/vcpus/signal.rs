//! The signal that takes a thread out of KVM_RUN.

use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

/// Not one of the real-time signals: those are not sent (EAGAIN) once this user's processes have used up what may be
/// queued, RLIMIT_SIGPENDING (kernel/signal.c, __send_signal_locked).
const KICK: libc::c_int = libc::SIGUSR1;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Once per image, before the first vCPU runs: without a handler the signal would end the process. With one, nothing
/// happens where somebody sends it to the process.
pub fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(KICK, nothing).map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

/// The keeper blocks it, and so does whoever wants to who starts a VMM.
pub fn unblock_kick() {
    if let Err(error) = unblock_signal(KICK) {
        log::error!("vCPU thread: cannot unblock its kick signal: {error:?}");
    }
}

pub fn kick(tid: libc::pid_t) {
    // SAFETY: a thread of this process, or one that has ended, which is ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, KICK) };
}
