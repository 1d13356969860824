//! How the state of a guest, and the descriptors that it names, get from the old VMM to the new one: over a socket,
//! with the words of [`super::words`]. Of an update only this file knows that. What is stored does not: a state is a
//! sealed memfd ([`super::sealed`]), a descriptor has its slot in the fd store.
//!
//! Another transport has two ends as these are. The one that is meant is the host kernel's own live update, which keeps
//! files, memfds among them, over a kexec, each by a token: the state, and each descriptor by its slot. Nobody answers
//! there, and there is no way back: of the words it has none.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use theseus_resources::channel::{ChannelError, FDS};
use theseus_resources::fd_store::Record;
use theseus_resources::{Channel, FdStore, Slot, StoredFd};

use super::sealed;
use super::words::{ToNew, ToOld};
use crate::seams::Seams;
use crate::spin::Spin;
use crate::talk;

/// The old VMM has deadlines, and ends the new one when they are over.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Why the two do not get on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("cannot make a socket: {0}")]
    NoSocket(io::Error),
    #[error("the new VMM: {0}")]
    ToNew(ChannelError),
    #[error("the old VMM: {0}")]
    ToOld(ChannelError),
    #[error("the new VMM says {0:?} where nobody has asked")]
    NewSays(ToOld),
    #[error("the old VMM says {said:?} instead of {wanted:?}")]
    OldSays { said: ToNew, wanted: Vec<ToNew> },
    #[error("the old VMM has sent no state")]
    NoState,
    #[error("the saved state cannot be read: {0}")]
    Unreadable(io::Error),
    #[error("the old VMM has sent {came} of {named} descriptors")]
    TooFew { came: usize, named: usize },
}

/// The old VMM's end.
pub(super) struct Outgoing {
    channel: Channel,
    /// What of the fd store has gone, or is about to.
    known: RefCell<BTreeSet<Slot>>,
    /// Descriptors that the new VMM has not asked for yet.
    waiting: RefCell<VecDeque<StoredFd>>,
}

impl Outgoing {
    /// And what the new VMM makes its own end of.
    pub(super) fn new() -> Result<(Self, Channel), TransportError> {
        let (channel, theirs) = Channel::pair().map_err(TransportError::NoSocket)?;
        Ok((Self { channel, known: RefCell::default(), waiting: RefCell::default() }, theirs))
    }

    /// The fd store as it is now, for a state, and those of its descriptors that have not gone yet, for
    /// [`Outgoing::send_state`].
    pub(super) fn missing(&self, fd_store: &FdStore) -> (Vec<Record>, Vec<StoredFd>) {
        fd_store.offer(&self.known.borrow())
    }

    /// A sealed state, and what it names.
    pub(super) fn send_state(
        &self,
        word: &ToNew,
        state: BorrowedFd<'_>,
        fds: Vec<StoredFd>,
    ) -> Result<(), TransportError> {
        self.known.borrow_mut().extend(fds.iter().map(StoredFd::slot));
        self.waiting.borrow_mut().extend(fds);
        self.send(word, Some(state))
    }

    /// A word alone.
    pub(super) fn say(&self, word: &ToNew) -> Result<(), TransportError> {
        talk::send(&self.channel, word, &[]).map_err(TransportError::ToNew)
    }

    /// With as many of the descriptors that wait as one message holds; the new VMM asks for the others.
    fn send(&self, word: &ToNew, first: Option<BorrowedFd<'_>>) -> Result<(), TransportError> {
        let mut waiting = self.waiting.borrow_mut();
        let count = waiting.len().min(FDS - first.iter().len());
        let next: Vec<StoredFd> = waiting.drain(..count).collect();
        let fds: Vec<_> = first.into_iter().chain(next.iter().map(AsFd::as_fd)).collect();
        talk::send(&self.channel, word, &fds).map_err(TransportError::ToNew)
    }

    /// What the new VMM has said, without a wait. None where that was a matter of this transport alone.
    pub(super) fn hear(&self) -> Result<Option<ToOld>, TransportError> {
        match talk::receive(&self.channel, Duration::ZERO).map_err(TransportError::ToNew)? {
            (ToOld::More, _) => self.send(&ToNew::Fds, None).map(|()| None),
            (word, _) => Ok(Some(word)),
        }
    }
}

/// Readable when the new VMM has said something.
impl AsFd for Outgoing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// The new VMM's end.
pub(super) struct Incoming<'a> {
    channel: &'a Channel,
    spin: Spin,
    seams: &'a dyn Seams,
}

/// A state, and as many of the descriptors that it names as came with it.
pub(super) struct Arrived {
    pub word: ToNew,
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl<'a> Incoming<'a> {
    pub(super) fn new(channel: &'a Channel, seams: &'a dyn Seams) -> Self {
        Self { channel, spin: Spin::of_threads(1), seams }
    }

    /// `soon` is called when the old VMM says that it is about to come.
    fn hear(&self, wanted: &[ToNew], soon: impl Fn()) -> Result<(ToNew, Vec<OwnedFd>), TransportError> {
        let now = || match talk::receive::<ToNew>(self.channel, Duration::ZERO) {
            Err(ChannelError::Silent(_)) => None,
            heard => Some(heard),
        };
        let mut spin = Spin::NOT;
        loop {
            match spin.awake(now).unwrap_or_else(|| talk::receive(self.channel, FOR_EVER)) {
                Ok((ToNew::Soon, _)) => {
                    spin = self.spin;
                    soon();
                }
                Ok((word, fds)) if wanted.contains(&word) => return Ok((word, fds)),
                Ok((said, _)) => return Err(TransportError::OldSays { said, wanted: wanted.to_vec() }),
                Err(error) => return Err(TransportError::ToOld(error)),
            }
        }
    }

    /// The state that comes with one of these words, which is told too. `soon` is called when the old VMM says that it
    /// is about to come.
    pub(super) fn state(&self, words: &[ToNew], soon: impl Fn()) -> Result<Arrived, TransportError> {
        let (word, came) = self.hear(words, soon)?;
        let mut came = came.into_iter();
        let state = came.next().ok_or(TransportError::NoState)?;
        let mut bytes = sealed::unseal(state.as_fd()).map_err(TransportError::Unreadable)?;
        if word == ToNew::State {
            self.seams.state("claim", &mut bytes);
        }
        Ok(Arrived { word, bytes, fds: came.collect() })
    }

    /// `fds`, and the others of the `named` descriptors that a state has named.
    pub(super) fn descriptors(&self, mut fds: Vec<OwnedFd>, named: usize) -> Result<Vec<OwnedFd>, TransportError> {
        while fds.len() < named {
            self.say(&ToOld::More)?;
            let (_, more) = self.hear(&[ToNew::Fds], || ())?;
            if more.is_empty() {
                return Err(TransportError::TooFew { came: fds.len(), named });
            }
            fds.extend(more);
        }
        Ok(fds)
    }

    pub(super) fn say(&self, word: &ToOld) -> Result<(), TransportError> {
        talk::send(self.channel, word, &[]).map_err(TransportError::ToOld)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seams::untouched;
    use theseus_resources::{Claims, FdKind};

    fn file() -> OwnedFd {
        rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    /// Answers until the new VMM says something that is not the transport's own.
    fn serve(old: &Outgoing) -> ToOld {
        loop {
            rustix::event::poll(&mut [rustix::event::PollFd::new(old, rustix::event::PollFlags::IN)], None).unwrap();
            if let Some(word) = old.hear().unwrap() {
                return word;
            }
        }
    }

    #[test]
    fn a_state_comes_with_all_that_it_names_and_only_once() {
        let (old, channel) = Outgoing::new().unwrap();
        let fd_store = FdStore::new();
        let keep = |count| -> Vec<_> { (0..count).map(|_| fd_store.keep("a", FdKind::State, file())).collect() };
        let first = keep(2 * FDS + 5);
        let (all, fds) = old.missing(&fd_store);
        let state = sealed::seal("t", b"rehearsal").unwrap();
        let thread = std::thread::spawn(move || {
            let (seams, new, mut claims) = (untouched(), FdStore::new(), Claims::default());
            let incoming = Incoming::new(&channel, &*seams);
            for (word, text, records) in
                [(ToNew::Rehearsal, &b"rehearsal"[..], all), (ToNew::State, b"state", Vec::new())]
            {
                let Arrived { bytes, fds, .. } = incoming.state(&[word], || ()).unwrap();
                assert_eq!(bytes, text);
                let more = if records.is_empty() { 3 } else { new.missing(&records) };
                let fds = incoming.descriptors(fds, more).unwrap();
                assert_eq!(fds.len(), more);
                if !records.is_empty() {
                    // The fd store looks whether each is the file that its record says.
                    new.receive(&mut claims, records, fds).unwrap();
                }
                incoming.say(&ToOld::Ready).unwrap();
            }
            new.manifest().len()
        });
        old.send_state(&ToNew::Rehearsal, state.as_fd(), fds).unwrap();
        assert_eq!(serve(&old), ToOld::Ready);
        let later = keep(3);
        let (records, fds) = old.missing(&fd_store);
        assert_eq!((records.len(), fds.len()), (first.len() + 3, 3));
        old.say(&ToNew::Soon).unwrap();
        let state = sealed::seal("t", b"state").unwrap();
        old.send_state(&ToNew::State, state.as_fd(), fds).unwrap();
        assert_eq!(serve(&old), ToOld::Ready);
        assert_eq!(thread.join().unwrap(), first.len());
        drop(later);
    }

    #[test]
    fn what_is_not_understood_is_said() {
        let (old, channel) = Outgoing::new().unwrap();
        let seams = untouched();
        let new = Incoming::new(&channel, &*seams);
        old.say(&ToNew::State).unwrap();
        assert!(matches!(new.state(&[ToNew::State], || ()), Err(TransportError::NoState)));
        old.send_state(&ToNew::State, file().as_fd(), Vec::new()).unwrap();
        assert!(
            matches!(new.state(&[ToNew::State], || ()), Err(TransportError::Unreadable(_))),
            "nobody promises that it stays"
        );
        old.say(&ToNew::State).unwrap();
        let error = new.state(&[ToNew::Rehearsal], || ()).err().unwrap().to_string();
        assert_eq!(error, "the old VMM says State instead of [Rehearsal]");
        old.say(&ToNew::Fds).unwrap();
        assert!(matches!(new.descriptors(Vec::new(), 2), Err(TransportError::TooFew { came: 0, named: 2 })));
        drop(old);
        assert!(matches!(new.state(&[ToNew::State], || ()), Err(TransportError::ToOld(ChannelError::Gone))));
    }
}
