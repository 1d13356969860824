//! The words between a VMM and its keeper.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use theseus_resources::Channel;
use theseus_resources::channel::ChannelError;

use crate::talk;

/// How long an exec and the start of a process may take, on a machine that has next to no time for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// 0 in a process that has no keeper.
static PID: AtomicU32 = AtomicU32::new(0);

/// The PID that everybody knows this VMM by: its keeper's, where it has one.
pub(crate) fn pid() -> u32 {
    match PID.load(Ordering::Relaxed) {
        0 => std::process::id(),
        pid => pid,
    }
}

/// Whether this process's keeper still is there.
pub(crate) fn is_there() -> bool {
    // SAFETY: has no arguments and cannot fail.
    unsafe { libc::getppid() }.unsigned_abs() == PID.load(Ordering::Relaxed)
}

/// From now on this VMM is known by its own.
pub(crate) fn is_gone() {
    PID.store(0, Ordering::Relaxed);
}

/// What a VMM asks of its keeper.
#[derive(Serialize, Deserialize)]
pub(super) enum Ask {
    /// To be told to whoever has started the keeper (sd_notify(3)).
    Notify(String),
    /// To become the program that the first fd is open on. In an `update` the two others are a channel and the shared
    /// page of the update, for a VMM that the new program starts.
    Become { update: bool, id: u32 },
}

/// The answer to [`Ask::Become`] of that number: a keeper that was stopped may answer when nobody waits any more.
#[derive(Serialize, Deserialize)]
pub(super) struct Tell {
    pub id: u32,
    pub answer: Answer,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    /// It is that program now. In an update the fd is a pidfd of the new VMM.
    Became,
    /// It is the program that it was.
    Refused(String),
    /// It is that program now, and could not start a VMM.
    Childless(String),
}

/// A VMM's end of the socket to its keeper.
pub(crate) struct Keeper {
    channel: Channel,
    asked: AtomicU32,
}

/// What a keeper says, or why it says nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeeperError {
    #[error("the keeper: {0}")]
    Channel(#[from] ChannelError),
    /// In its own words.
    #[error("{0}")]
    Says(String),
    #[error("the keeper has not said which process the new VMM is")]
    NoPidfd,
}

/// Why a keeper is not what it was asked to become.
pub(crate) enum NotBecome {
    /// It is what it was: nothing has happened.
    Refused(KeeperError),
    /// It is another program, or nobody knows what.
    Half(KeeperError),
}

impl Keeper {
    /// In a process that was just forked by the keeper, whose PID is `pid`.
    pub(super) fn new(channel: Channel, pid: u32) -> Self {
        PID.store(pid, Ordering::Relaxed);
        Self { channel, asked: AtomicU32::new(0) }
    }

    pub(crate) fn notify(&self, text: &str) {
        if let Err(error) = talk::send(&self.channel, &Ask::Notify(text.to_owned()), &[]) {
            log::warn!("systemd cannot be notified: {error}");
        }
    }

    /// Has the keeper become `program`, which starts a VMM of its own: that one gets `channel` and `page`. Returns a
    /// pidfd of it.
    pub(crate) fn update(
        &self,
        program: BorrowedFd<'_>,
        channel: Channel,
        page: BorrowedFd<'_>,
    ) -> Result<OwnedFd, NotBecome> {
        let mut fds = self.become_other(true, &[program, channel.as_fd(), page])?;
        fds.pop().ok_or(NotBecome::Half(KeeperError::NoPidfd))
    }

    /// Has the keeper become `program` around this VMM.
    pub(crate) fn become_again(&self, program: BorrowedFd<'_>) -> Result<(), KeeperError> {
        match self.become_other(false, &[program]) {
            Ok(_) => Ok(()),
            Err(NotBecome::Refused(reason) | NotBecome::Half(reason)) => Err(reason),
        }
    }

    fn become_other(&self, update: bool, fds: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, NotBecome> {
        let id = self.asked.fetch_add(1, Ordering::Relaxed);
        let refused = |error: ChannelError| NotBecome::Refused(error.into());
        let half = |error: ChannelError| NotBecome::Half(error.into());
        talk::send(&self.channel, &Ask::Become { update, id }, fds).map_err(refused)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let (tell, fds) = talk::receive::<Tell>(&self.channel, rest).map_err(half)?;
            return match tell.answer {
                _ if tell.id != id => continue,
                Answer::Became => Ok(fds),
                Answer::Refused(reason) => Err(NotBecome::Refused(KeeperError::Says(reason))),
                Answer::Childless(reason) => Err(NotBecome::Half(KeeperError::Says(reason))),
            };
        }
    }
}
