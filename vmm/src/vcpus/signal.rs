//! The signal that takes a thread out of KVM_RUN.

use theseus_resources::threads::KICK;
use vmm_sys_util::signal::register_signal_handler;

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Once per image, before the first vCPU runs: without a handler the signal would end the process. With one, nothing
/// happens where somebody sends it to the process.
pub(crate) fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(KICK, nothing).map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

pub(super) fn kick(tid: libc::pid_t) {
    // SAFETY: a thread of this process, or one that has ended, which is ESRCH.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, KICK) };
}
