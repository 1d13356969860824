//! The keeper: the process that everybody knows the VMM by, and that does next to nothing.
//!
//! ```text
//!   keeper (PID of the VMM to the world)       start: fork --> VMM
//!      |  hands on signals, passes notices on, waits for its children, ends as its VMM ends
//!      '--exec: the new image, same PID--> keeper of the new build   fork --> new VMM   (the old one runs on)
//! ```
//!
//! It is single-threaded and holds neither guest memory nor descriptors of the machine, so an exec of it leaves the
//! guest alone: an update ([`crate::update`]) has it become the new program while the guest runs. Whose end is its own
//! end says the update's word.

mod children;
mod link;
mod program;
pub(crate) mod settings;
mod signals;
mod terminal;
pub(crate) mod watch;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use theseus_resources::Channel;
use theseus_resources::channel::ChannelError;

pub(crate) use link::{Keeper, KeeperError, NotBecome, is_gone, is_there, pid};

use crate::seams::untouched;
use crate::talk;
use crate::timeline::Timeline;
use children::{Fork, fork};
use link::{Answer, Ask, Tell};
use program::Inherited;
use signals::Signals;
use terminal::Terminal;

/// A VMM as its keeper knows it.
pub(crate) struct Vmm {
    pub pid: libc::pid_t,
    pub link: Channel,
}

/// What a process is to do that was started as this program.
pub(crate) enum Role {
    /// By its command line: it becomes a keeper, in [`start`], if that asks for a guest.
    Beginner,
    /// A new VMM in an update.
    Newcomer(Newcomer),
}

/// What a new VMM has.
pub(crate) struct Newcomer {
    pub keeper: Keeper,
    /// To the old VMM.
    pub channel: Channel,
    /// See [`Timeline::map`].
    pub page: OwnedFd,
}

/// An update from when the new VMM was started until one of the two has ended.
struct Update {
    new: Vmm,
    page: Timeline,
}

struct Life {
    signals: Signals,
    /// Whose end is the keeper's end; in an update the old one, until the word.
    vmm: Vmm,
    update: Option<Update>,
    /// What was handed on in this update: to a VMM that may have ended before it looked.
    handed_on: Vec<libc::c_int>,
    terminal: Terminal,
}

impl Life {
    fn new(signals: Signals, vmm: Vmm, update: Option<Update>, terminal: Terminal) -> Self {
        Self { signals, vmm, update, handed_on: Vec::new(), terminal }
    }
}

/// First of all in `main`. Does not return in a keeper.
pub(crate) fn role() -> std::io::Result<Role> {
    let Some(Inherited { vmm, id, update }) = Inherited::from_env()? else { return Ok(Role::Beginner) };
    let (signals, terminal) = (Signals::block()?, Terminal::from_env());
    let Some((channel, page)) = update else {
        tell(&vmm.link, id, Answer::Became, &[]);
        serve(Life::new(signals, vmm, None, terminal));
    };
    match begin(&page) {
        Ok((Fork::Child(keeper), _)) => {
            drop(vmm);
            signals.give_back();
            Ok(Role::Newcomer(Newcomer { keeper, channel, page }))
        }
        Ok((Fork::Parent(new, pidfd), timeline)) => {
            drop((channel, page));
            tell(&vmm.link, id, Answer::Became, &[pidfd.as_fd()]);
            drop(pidfd);
            let update = Some(Update { new, page: timeline });
            serve(Life::new(signals, vmm, update, terminal));
        }
        Err(error) => {
            let remedy = "raise pids.max or RLIMIT_NPROC";
            tell(&vmm.link, id, Answer::Childless(format!("cannot start a new VMM: {error}: {remedy}")), &[]);
            serve(Life::new(signals, vmm, None, terminal));
        }
    }
}

fn begin(page: &OwnedFd) -> std::io::Result<(Fork, Timeline)> {
    let timeline = Timeline::map(page, untouched())?;
    Ok((fork()?, timeline))
}

/// Starts a VMM and keeps it. Returns in the VMM only. To be called before there are other threads, or anything that a
/// keeper must not have.
pub(crate) fn start() -> std::io::Result<Keeper> {
    let (signals, terminal) = (Signals::block()?, Terminal::before_all());
    match fork()? {
        Fork::Child(keeper) => {
            signals.give_back();
            Ok(keeper)
        }
        Fork::Parent(vmm, pidfd) => {
            drop(pidfd);
            // What whoever started us has left open is the VMM's.
            close_all_but([signals.as_raw_fd(), vmm.link.as_fd().as_raw_fd()]);
            serve(Life::new(signals, vmm, None, terminal))
        }
    }
}

/// And standard input, output and error.
fn close_all_but(mut kept: [RawFd; 2]) {
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept.map(|fd| fd as u32).into_iter().chain([u32::MAX]) {
        if from < fd {
            // SAFETY: nobody in this process has any of these: it holds the two and nothing else.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
}

fn tell(vmm: &Channel, id: u32, answer: Answer, fds: &[std::os::fd::BorrowedFd<'_>]) {
    // One that is gone hears of nothing, and its end is seen.
    let _ = talk::send(vmm, &Tell { id, answer }, fds);
}

/// The keeper's life.
fn serve(mut life: Life) -> ! {
    // The name that tools look for (pgrep -x): exec leaves "fd N" or the file's old one.
    let _ = rustix::thread::set_name(c"theseus");
    // Who gets into this process has the next VMM. And of a crash the VMM's own core is the one to look at: a handler
    // in core_pattern looks at no limit. Behind the fork: a new VMM still has to write in its /proc/self.
    crate::sandbox::dumps::forbid();
    loop {
        let links = [Some(&life.vmm), life.update.as_ref().map(|update| &update.new)];
        let mut fds = vec![PollFd::new(&life.signals, PollFlags::IN)];
        fds.extend(links.iter().flatten().map(|vmm| PollFd::new(&vmm.link, PollFlags::IN)));
        if rustix::event::poll(&mut fds, None).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        life.settle();
        if ready.first() == Some(&true) {
            life.signalled();
        }
        if ready.iter().skip(1).any(|ready| *ready) {
            life.asked();
        }
    }
}

impl Life {
    /// Once the word is said the guest is the new VMM's, and what the old one does is of no interest but to be reaped.
    fn settle(&mut self) {
        if let Some(Update { new, .. }) = self.update.take_if(|update| update.page.word().is_committed()) {
            self.vmm = new;
            for signal in std::mem::take(&mut self.handed_on) {
                self.hand_on(signal);
            }
        }
    }

    fn hand_on(&self, signal: libc::c_int) {
        // SAFETY: our own child, not reaped: its number is its own.
        unsafe { libc::kill(self.vmm.pid, signal) };
    }

    fn signalled(&mut self) {
        for signal in self.signals.read() {
            if signal == libc::SIGCHLD {
                self.reap();
                continue;
            }
            if self.update.is_some() && !self.handed_on.contains(&signal) {
                self.handed_on.push(signal);
            }
            self.hand_on(signal);
        }
    }

    fn reap(&mut self) {
        while let Some((pid, status)) = children::next_end() {
            self.settle();
            if pid == self.vmm.pid {
                if let Some(Update { new, page }) = &self.update {
                    // Not yet committed; and if it is from now on, it is not: that one would run a guest whose keeper
                    // is gone.
                    if !page.word().take() {
                        self.settle();
                        continue;
                    }
                    children::kill(new.pid);
                }
                if libc::WIFSIGNALED(status) {
                    self.terminal.put_back();
                }
                children::end_as(status);
            }
            // One that failed: the old VMM, which has the guest, has seen it end.
            if self.update.take_if(|update| update.new.pid == pid).is_some() {
                self.handed_on.clear();
            }
        }
    }

    /// Answers every word of the VMM that is there. A new one has nothing to say before it has the guest.
    fn asked(&mut self) {
        let gone = loop {
            match talk::receive::<Ask>(&self.vmm.link, Duration::ZERO) {
                Ok((Ask::Notify(text), _)) => crate::notify::send(&text),
                Ok((Ask::Become { update, id }, fds)) => self.become_other(update, id, &fds),
                Err(error) => break matches!(error, ChannelError::Gone),
            }
        };
        let new_is_gone = self.update.as_ref().is_some_and(|update| {
            matches!(talk::receive::<Ask>(&update.new.link, Duration::ZERO), Err(ChannelError::Gone))
        });
        if gone || new_is_gone {
            // The end of a link comes shortly before the end of its VMM, which is a signal.
            children::await_end(&self.signals);
        }
    }

    fn become_other(&mut self, update: bool, id: u32, fds: &[OwnedFd]) {
        // Who has the guest asks, so the new VMM of the last update has failed; its end may not be seen yet.
        if let Some(Update { new, .. }) = self.update.take() {
            children::kill(new.pid);
            self.handed_on.clear();
        }
        let reason = match (update, fds) {
            (true, [program, channel, page]) => {
                let error = program::exec(
                    program.as_fd(),
                    id,
                    &self.vmm,
                    &self.terminal,
                    Some((channel.as_fd(), page.as_fd())),
                );
                format!("exec failed: {error}")
            }
            (false, [program]) => {
                format!("exec failed: {}", program::exec(program.as_fd(), id, &self.vmm, &self.terminal, None))
            }
            _ => format!("{} descriptors came", fds.len()),
        };
        tell(&self.vmm.link, id, Answer::Refused(reason), &[]);
    }
}

/// A pidfd of a child that was not reaped.
fn pidfd(pid: libc::pid_t) -> std::io::Result<OwnedFd> {
    // SAFETY: makes an fd, which nobody else has.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
