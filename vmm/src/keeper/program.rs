//! What an exec of the keeper gets beside the file: the keeper's own arguments and environment, and what it must know
//! of its VMM.

use std::ffi::{CString, c_char};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;

use theseus_resources::Channel;

use super::Vmm;
use super::terminal::{self, Terminal};

/// Names what the program before has left: see [`Inherited`].
const VARIABLE: &str = "THESEUS_KEEPER";

/// What the program before has left to the keeper.
pub(super) struct Inherited {
    pub vmm: Vmm,
    /// Of the VMM's request that this is the answer to.
    pub id: u32,
    /// In an update, for the VMM that is to be started: a channel to the other one, and the page that all share.
    pub update: Option<(Channel, OwnedFd)>,
}

/// The same as numbers, as `vmm=PID,id=N,link=FD[,channel=FD,page=FD]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Numbers {
    vmm: libc::pid_t,
    id: u32,
    link: RawFd,
    update: Option<(RawFd, RawFd)>,
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmm={},id={},link={}", self.vmm, self.id, self.link)?;
        self.update.map_or(Ok(()), |(channel, page)| write!(f, ",channel={channel},page={page}"))
    }
}

impl Numbers {
    /// Keys it does not know are of a later build.
    fn parse(text: &str) -> Option<Self> {
        let find = |key| {
            let values = text.split(',').filter_map(|pair| pair.split_once('='));
            let mut values = values.filter_map(|(name, value)| (name == key).then_some(value));
            values.next()
        };
        let fd = |key| find(key)?.parse::<RawFd>().ok().filter(|fd| *fd > 2);
        let vmm = find("vmm")?.parse::<libc::pid_t>().ok().filter(|pid| *pid > 0)?;
        let update = fd("channel").zip(fd("page"));
        Some(Self { vmm, id: find("id")?.parse().ok()?, link: fd("link")?, update })
    }
}

impl Inherited {
    /// None where this program was not started by a keeper that became it. An error is one that cannot go on: it would
    /// start another guest.
    pub(super) fn from_env() -> std::io::Result<Option<Self>> {
        let Some(text) = std::env::var_os(VARIABLE) else { return Ok(None) };
        let left = text.to_str().and_then(Numbers::parse).and_then(Self::take);
        let wrong = || std::io::Error::other(format!("{VARIABLE} is {text:?}: it is set by an update only"));
        left.map(Some).ok_or_else(wrong)
    }

    fn take(Numbers { vmm, id, link, update }: Numbers) -> Option<Self> {
        // SAFETY: left open for this, and taken once: `main` calls it once, before anything else has an fd.
        let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
        let [link, channel, page] = [Some(link), update.map(|(channel, _)| channel), update.map(|(_, page)| page)]
            .map(|fd| fd.filter(|fd| is_open(*fd)).map(own));
        for fd in [&link, &channel, &page].into_iter().flatten() {
            // An error would leave an fd to the next program that it does not know.
            let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
        }
        Some(Self {
            vmm: Vmm { pid: vmm, link: Channel::from_fd(link?) },
            id,
            update: channel.map(Channel::from_fd).zip(page),
        })
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: for this one call, which finds out whether it is open; above 2 by construction.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

/// Becomes the file that `program` is open on, with `link` to the VMM and what an `update` needs. Returns only if that
/// failed.
pub(super) fn exec(
    program: BorrowedFd<'_>,
    id: u32,
    vmm: &Vmm,
    terminal: &Terminal,
    update: Option<(BorrowedFd<'_>, BorrowedFd<'_>)>,
) -> std::io::Error {
    use std::os::fd::AsFd;
    let numbers = Numbers {
        vmm: vmm.pid,
        id,
        link: vmm.link.as_fd().as_raw_fd(),
        update: update.map(|(channel, page)| (channel.as_raw_fd(), page.as_raw_fd())),
    };
    let open = [Some(vmm.link.as_fd()), update.map(|(channel, _)| channel), update.map(|(_, page)| page)];
    let set = |flags| {
        open.iter().flatten().try_for_each(|fd| rustix::io::fcntl_setfd(*fd, flags)).map_err(std::io::Error::from)
    };
    let error = set(rustix::io::FdFlags::empty()).map_or_else(|error| error, |()| execute(program, &numbers, terminal));
    let _ = set(rustix::io::FdFlags::CLOEXEC);
    error
}

fn execute(program: BorrowedFd<'_>, numbers: &Numbers, terminal: &Terminal) -> std::io::Error {
    let c_string = |bytes: Vec<u8>| CString::new(bytes).unwrap_or_default();
    let args: Vec<CString> = std::env::args_os().map(|arg| c_string(arg.into_vec())).collect();
    let mut env: Vec<CString> = std::env::vars_os()
        .filter(|(name, _)| name != VARIABLE && name != terminal::VARIABLE)
        .map(|(name, value)| c_string([name.into_vec(), b"=".to_vec(), value.into_vec()].concat()))
        .collect();
    env.push(c_string(format!("{VARIABLE}={numbers}").into_bytes()));
    env.extend(terminal.to_env().map(|text| c_string(format!("{}={text}", terminal::VARIABLE).into_bytes())));
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args_pointers, env_pointers) = (pointers(&args), pointers(&env));
    // SAFETY: null-terminated arrays of pointers to strings that live in this function.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            args_pointers.as_ptr(),
            env_pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    std::io::Error::last_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_goes_over_as_text() {
        for numbers in [
            Numbers { vmm: 4711, id: 7, link: 10, update: Some((11, 12)) },
            Numbers { vmm: 4711, id: 8, link: 10, update: None },
        ] {
            assert_eq!(Numbers::parse(&numbers.to_string()), Some(numbers));
        }
        let later = Numbers::parse("new=1,link=10,vmm=5,id=3,page=4");
        assert_eq!(later, Some(Numbers { vmm: 5, id: 3, link: 10, update: None }));
        for bad in ["", "10", "vmm=5", "vmm=5,link=7", "vmm=5,id=1,link=0", "vmm=x,id=1,link=7"] {
            assert_eq!(Numbers::parse(bad), None, "{bad}");
        }
    }
}
