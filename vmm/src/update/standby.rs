//! The new VMM as the old one sees it: started by the keeper once that is the new image, it makes itself ready while
//! the guest runs here.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use theseus_resources::channel::ChannelError;
use theseus_resources::fd_store::Record;
use theseus_resources::state as envelope;
use theseus_resources::{FdStore, StoredFd};

use super::UpdateError;
use super::rehearsed::Rehearsed;
use super::sealed::Blank;
use super::transport::{Outgoing, TransportError};
use super::words::{ToNew, ToOld};
use crate::keeper::{Keeper, NotBecome};
use crate::timeline::Timeline;

/// How long the new VMM may take before the guest stands still. That costs nobody anything, but an update that hangs is
/// one that nobody can end.
const PREWARM: Duration = Duration::from_secs(60);

/// How long it may take for what comes ahead: the guest runs, but the API stands still.
const AHEAD: Duration = Duration::from_secs(10);

/// How soon a wait ends that nobody wants any more.
const LOOK: Duration = Duration::from_millis(50);

/// Ended, if it has not committed, when this is dropped: nothing of it is left then.
pub(crate) struct Standby {
    transport: Outgoing,
    pidfd: OwnedFd,
    timeline: Arc<Timeline>,
    given_up: Arc<AtomicBool>,
    ended: Cell<bool>,
    /// Where the state of the guest that stands still goes.
    blank: Blank,
    /// Whether it knows [`Standby::send_ahead`].
    pub takes_ahead: bool,
}

/// Why there is no new VMM.
pub(crate) struct NotStarted {
    pub reason: UpdateError,
    /// Whether the keeper is still the program that it was.
    pub is_whole: bool,
}

/// What it said last.
#[derive(Debug)]
pub(crate) enum End {
    Committed,
    /// It has the guest not, unless the word says so.
    Failed(UpdateError),
}

impl Standby {
    /// The keeper becomes the new image, which starts the new VMM.
    pub(crate) fn start(
        keeper: &Keeper,
        program: BorrowedFd<'_>,
        page: BorrowedFd<'_>,
        timeline: Arc<Timeline>,
        given_up: Arc<AtomicBool>,
        blank: Blank,
        takes_ahead: bool,
    ) -> Result<Self, NotStarted> {
        let whole = |reason| NotStarted { reason, is_whole: true };
        let (transport, theirs) = Outgoing::new().map_err(|error| whole(error.into()))?;
        let pidfd = keeper.update(program, theirs, page).map_err(|not| match not {
            NotBecome::Refused(reason) => whole(reason.into()),
            NotBecome::Half(reason) => NotStarted { reason: reason.into(), is_whole: false },
        })?;
        Ok(Self { transport, pidfd, timeline, given_up, ended: Cell::new(false), blank, takes_ahead })
    }

    /// Gives it the state of the running guest, and waits until it is ready for the true one.
    pub(crate) fn prewarm(&self, rehearsed: &Rehearsed) -> Result<(), UpdateError> {
        let sent = self.transport.send_state(&ToNew::Rehearsal, rehearsed.state.as_fd(), rehearsed.fds.clone());
        sent.map_err(|error| self.why(error))?;
        self.converse(PREWARM, &ToOld::Ready)
    }

    /// Gives it what goes over beside the machine, while the guest runs, and waits until it has that.
    pub(crate) fn send_ahead(&self, handover: BorrowedFd<'_>, fds: Vec<StoredFd>) -> Result<(), UpdateError> {
        self.transport.send_state(&ToNew::Ahead, handover, fds).map_err(|error| self.why(error))?;
        self.converse(AHEAD, &ToOld::Ready)
    }

    /// See [`Outgoing::missing`]; for [`Standby::hand_over`].
    pub(crate) fn missing(&self, fd_store: &FdStore) -> (Vec<Record>, Vec<StoredFd>) {
        self.transport.missing(fd_store)
    }

    /// It is to wake up.
    pub(crate) fn soon(&self) -> Result<(), UpdateError> {
        self.transport.say(&ToNew::Soon).map_err(|error| self.why(error))
    }

    /// Stores the state of the guest that stands still. What is cut off is found here, before the guest's DMA is
    /// touched.
    pub(crate) fn store(&self, mut state: Vec<u8>) -> Result<(), UpdateError> {
        self.timeline.seams().state("save", &mut state);
        envelope::check_length(&state)?;
        self.blank.seal(&state).map_err(UpdateError::os("cannot keep the state"))
    }

    /// Gives it the state that was stored, and waits for what becomes of it, until the update's deadline.
    pub(crate) fn hand_over(&self, fds: Vec<StoredFd>) -> End {
        let sent = self.transport.send_state(&ToNew::State, self.blank.as_fd(), fds).map_err(|error| self.why(error));
        match sent.and_then(|()| self.converse(self.timeline.left(), &ToOld::Committed)) {
            Ok(()) => End::Committed,
            Err(reason) => End::Failed(reason),
        }
    }

    /// Serves it until it says `wanted`.
    fn converse(&self, within: Duration, wanted: &ToOld) -> Result<(), UpdateError> {
        let until = Instant::now() + within;
        loop {
            self.await_word(until, within)?;
            match self.transport.hear() {
                Ok(None) => {}
                Ok(Some(ToOld::Failed(reason))) => return Err(UpdateError::GaveUp(reason)),
                Ok(Some(word)) if word == *wanted => return Ok(()),
                Ok(Some(word)) => return Err(TransportError::NewSays(word).into()),
                Err(error) => return Err(self.why(error)),
            }
        }
    }

    fn await_word(&self, until: Instant, within: Duration) -> Result<(), UpdateError> {
        loop {
            if self.given_up.load(Ordering::SeqCst) {
                return Err(UpdateError::GuestAsked);
            }
            let left = until.saturating_duration_since(Instant::now());
            let rest = left.min(LOOK);
            let timeout = Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: rest.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.transport, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                // What it said before it died comes first.
                Ok(_) if !fds[0].revents().is_empty() => return Ok(()),
                Ok(0) if left > rest => {}
                Ok(0) => return Err(self.how_late(within)),
                Ok(_) => return Err(self.how_it_died()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(UpdateError::os("cannot wait for the new VMM")(error.into())),
            }
        }
    }

    /// One that cannot be reached has died, whether it was to hear or to say something.
    fn why(&self, error: TransportError) -> UpdateError {
        match error {
            TransportError::ToNew(ChannelError::Gone) => self.how_it_died(),
            other => other.into(),
        }
    }

    fn how_it_died(&self) -> UpdateError {
        let said = self.timeline.cause();
        if said.is_empty() { UpdateError::Died } else { UpdateError::GaveUp(said) }
    }

    fn how_late(&self, within: Duration) -> UpdateError {
        let patience = self.timeline.patience();
        if patience.is_zero() { UpdateError::NotReady(within) } else { UpdateError::Stuck(patience) }
    }

    /// Kills it and waits until nothing of it is left, unless the guest is its own: then this process has nothing to do
    /// here any more.
    pub(crate) fn end(&self) {
        if self.ended.replace(true) {
            return;
        }
        if !self.timeline.word().take() {
            crate::ending::retire();
        }
        // SAFETY: a process's own fd, and no memory is handed over. ESRCH if it is dead already.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) };
        // Its last thread has given up its memory and its files before this is readable (do_exit).
        while rustix::event::poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], None).is_err() {}
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        self.end();
    }
}
