//! The way back after exec: whatever goes wrong in the new image before it commits, the old binary runs the guest again.
//!
//! An error or a panic comes here, and this image execs the old binary with the same state and the same kept fds. Anything that leaves
//! no code of ours running (a fatal signal, a hang) is the parked helper's ([`super::park`]), which does the same from outside.

use std::any::Any;
use std::ffi::{CString, c_char};
use std::fmt;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use theseus_resources::vault::{HeldVault, Vault};

use super::arbiter::Way;
use super::dispensable::Dispensable;
use super::timeline::{Phase, Timeline};

/// Names what the image before has left, see [`Inherited`].
pub const HANDOVER_VARIABLE: &str = "THESEUS_HANDOVER";

/// The fds that an image must know before it can read the state, as `state=N,old=N,timeline=N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// The saved state.
    pub state: RawFd,
    /// The old binary.
    pub old: RawFd,
    pub timeline: RawFd,
}

impl fmt::Display for Inherited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state={},old={},timeline={}", self.state, self.old, self.timeline)
    }
}

impl Inherited {
    /// None where this image was not started by an update.
    pub fn from_env() -> Option<Self> {
        Self::parse(&std::env::var(HANDOVER_VARIABLE).ok()?)
    }

    /// Keys it does not know are of a later build.
    fn parse(text: &str) -> Option<Self> {
        let find = |key| {
            let values = text.split(',').filter_map(|pair| pair.split_once('='));
            let mut values = values.filter_map(|(name, value)| (name == key).then_some(value));
            values.next()?.parse::<RawFd>().ok().filter(|fd| *fd > 2)
        };
        Some(Self { state: find("state")?, old: find("old")?, timeline: find("timeline")? })
    }
}

/// What exec gets beside the file: this process's own arguments and environment, and a word to the new image.
pub struct Image {
    _strings: Vec<CString>,
    args: Vec<*const c_char>,
    env: Vec<*const c_char>,
}

impl Image {
    pub fn new(variable: &str, value: &str) -> Self {
        let c_string = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
        let args: Vec<CString> = std::env::args_os().map(|arg| c_string(arg.into_vec())).collect();
        let mut env: Vec<CString> = std::env::vars_os()
            .filter(|(name, _)| name != variable)
            .map(|(name, value)| c_string([name.into_vec(), b"=".to_vec(), value.into_vec()].concat()))
            .collect();
        env.push(c_string(format!("{variable}={value}").into_bytes()));
        let pointers = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
        };
        let (arg_pointers, env_pointers) = (pointers(&args), pointers(&env));
        // Moving a CString moves not its bytes.
        Self { _strings: args.into_iter().chain(env).collect(), args: arg_pointers, env: env_pointers }
    }

    /// (arguments, environment), null-terminated; they live as long as self.
    pub fn pointers(&self) -> (*const *const c_char, *const *const c_char) {
        (self.args.as_ptr(), self.env.as_ptr())
    }

    /// Becomes the file that `fd` is open on; returns only if that failed.
    pub fn exec(&self, fd: RawFd) -> std::io::Error {
        let (args, env) = self.pointers();
        // SAFETY: null-terminated arrays of pointers to strings that live in self.
        unsafe { libc::syscall(libc::SYS_execveat, fd, c"".as_ptr(), args, env, libc::AT_EMPTY_PATH) };
        std::io::Error::last_os_error()
    }
}

/// Held by an image from its first moment to its commit.
pub struct WayBack {
    inherited: Inherited,
    pub timeline: Arc<Timeline>,
    /// Everything that was handed over stays open, whatever becomes of those who use it.
    held: Option<HeldVault>,
    /// While there is a helper who would bring the guest back.
    dispensable: Option<Dispensable>,
}

impl WayBack {
    /// The error means that there is no way back in this image.
    pub fn new(inherited: Inherited) -> std::io::Result<Self> {
        // SAFETY: only borrowed; a number that is not open is answered with EBADF. Above 2 by construction.
        let fd = unsafe { BorrowedFd::borrow_raw(inherited.timeline) };
        let timeline = Arc::new(Timeline::map(fd)?);
        let forward = timeline.arbiter().way() == Some(Way::Forward) && timeline.helper().is_some();
        let dispensable = if forward { Dispensable::new() } else { None };
        Ok(Self { inherited, timeline, held: None, dispensable })
    }

    pub fn state(&self) -> BorrowedFd<'_> {
        // SAFETY: handed over for this, and closed by `committed` only, which consumes self.
        unsafe { BorrowedFd::borrow_raw(self.inherited.state) }
    }

    pub fn hold(&mut self, vault: &Vault) {
        self.held = Some(vault.hold());
    }

    /// The guest runs: nothing leads back any more.
    pub fn committed(&mut self) {
        self.dispensable = None;
        if self.held.take().is_some() {
            // SAFETY: the state is the one fd that is not in the vault; nobody reads it any more. Once: `held` is gone now.
            drop(unsafe { OwnedFd::from_raw_fd(self.inherited.state) });
        }
    }

    /// Becomes the old binary again, because of `cause`. Returns, with the reason, only if the guest is lost to this process.
    pub fn go(self, cause: &str) -> String {
        let Self { inherited, timeline, held, dispensable } = self;
        match timeline.arbiter().way() {
            None => return format!("after the commit: {cause}"),
            Some(_) if timeline.arbiter().go_back() => {}
            // On its way back already. If there is a helper, the end of this process calls it.
            Some(Way::Back | Way::BackByHelper) => {
                return format!("on the way back: {cause}");
            }
            Some(Way::Forward) => superseded(),
        }
        timeline.set_cause(cause);
        timeline.stamp(Phase::Failed);
        // The old binary may be a build that knows nothing of it.
        drop(dispensable);
        log::error!("the new image gives the guest back: {cause}");
        // None where the vault was not even adopted: then everything is still open for exec.
        let open = held.as_ref().map(HeldVault::open_for_exec).transpose();
        let _open = match open {
            Ok(open) => open,
            Err(error) => return format!("{cause}; and no way back: {error}"),
        };
        let error = Image::new(HANDOVER_VARIABLE, &inherited.to_string()).exec(inherited.old);
        format!("{cause}; and the old binary cannot be started: {error}")
    }
}

/// Somebody else has the guest, and is about to kill this process.
pub fn superseded() -> ! {
    log::error!("the parked helper has taken the guest back");
    loop {
        std::thread::park();
    }
}

/// What a caught panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("of an unknown kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inherited_goes_over_as_text() {
        let inherited = Inherited { state: 10, old: 11, timeline: 12 };
        assert_eq!(Inherited::parse(&inherited.to_string()), Some(inherited));
        assert_eq!(Inherited::parse("new=1,timeline=12,old=11,state=10"), Some(inherited));
        for bad in ["", "10", "state=10,old=11", "state=0,old=11,timeline=12", "state=x,old=11,timeline=12"] {
            assert_eq!(Inherited::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_panic_is_told() {
        let caught = std::panic::catch_unwind(|| std::panic::panic_any(format!("no {}", 7))).unwrap_err();
        assert_eq!(panic_text(&*caught), "panic: no 7");
    }
}
