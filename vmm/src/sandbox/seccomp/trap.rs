//! SIGSYS: a thread has called what its filter does not allow. The call was not made; the process says which it was, to
//! its log and, in an update, to the old VMM, and dies as it would have without this.

use std::sync::atomic::{AtomicPtr, Ordering};
use std::{io, ptr};

use crate::logging;
use crate::timeline::Timeline;

/// The update that has made this process, until it is over.
static UPDATE: AtomicPtr<Timeline> = AtomicPtr::new(ptr::null_mut());

/// SYS_SECCOMP (include/uapi/asm-generic/siginfo.h): not sent by somebody.
const BY_FILTER: libc::c_int = 1;

/// Where the handler tells of a call, while it lives.
pub(crate) struct Witness<'a>(#[expect(dead_code, reason = "is not to outlive it")] &'a Timeline);

impl<'a> Witness<'a> {
    pub(crate) fn new(timeline: &'a Timeline) -> Self {
        UPDATE.store(ptr::from_ref(timeline).cast_mut(), Ordering::SeqCst);
        Self(timeline)
    }
}

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        UPDATE.store(ptr::null_mut(), Ordering::SeqCst);
    }
}

pub(crate) fn install() -> io::Result<()> {
    // SAFETY: all zeroes is a sigaction; the handler is async-signal-safe, and stays.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        // The second one dies by the default action.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
        libc::sigaction(libc::SIGSYS, &action, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a siginfo_t to a handler with SA_SIGINFO.
    if unsafe { (*info).si_code } == BY_FILTER {
        // SAFETY: as above; there for this code.
        tell(unsafe { number(info) });
    }
    // SAFETY: a system call only. Blocked while this handler runs, it comes when this returns.
    unsafe { libc::raise(signal) };
}

/// si_syscall, behind si_call_addr (include/uapi/asm-generic/siginfo.h).
///
/// # Safety
/// `info` is of a SIGSYS by a filter.
unsafe fn number(info: *const libc::siginfo_t) -> i32 {
    const OFFSET: usize = 24;
    // SAFETY: within the siginfo_t, of 128 bytes, and aligned.
    unsafe { info.cast::<u8>().add(OFFSET).cast::<i32>().read() }
}

/// No allocation, no lock.
fn tell(call: i32) {
    let mut name = [0u8; 16];
    // SAFETY: the kernel fills 16 bytes, the last of them zero. Refused, it leaves them as they are.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = std::ffi::CStr::from_bytes_until_nul(&name).unwrap_or_default().to_str().unwrap_or_default();
    let mut text = [0; 200];
    let mut rest = &mut text[..];
    let written = io::Write::write_fmt(
        &mut rest,
        format_args!(
            "the thread '{name}' has called system call {call} (ausyscall {call}), which its seccomp filter does not \
             allow"
        ),
    );
    let unused = rest.len();
    let said = text.get(..text.len() - if written.is_ok() { unused } else { 0 });
    let said = said.and_then(|said| std::str::from_utf8(said).ok()).unwrap_or_default();
    // SAFETY: as long as a Witness is there, and that is not gone before all threads but one are.
    if let Some(timeline) = unsafe { UPDATE.load(Ordering::SeqCst).as_ref() } {
        timeline.set_cause(said);
    }
    let mut line = [0; 220];
    let mut rest = &mut line[..];
    let _ = io::Write::write_fmt(&mut rest, format_args!("theseus: {said}\n"));
    let unused = rest.len();
    logging::last_words(line.get(..line.len() - unused).unwrap_or_default());
}
