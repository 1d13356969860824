//! The one owner of file descriptors that go over from one VMM to the next.
//!
//! A device gives the fd store an fd under a name and a kind and works with the [`StoredFd`] it gets back. At save it
//! writes the [`Slot`] into its state; in the new VMM it claims that slot, once. What nobody claims is an error. How
//! the fds travel (over a socket, [`crate::channel`]) is not known here: [`FdStore::offer`] names them, and
//! [`FdStore::receive`] takes what came.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::survivor::look;

/// What an fd is for: named in errors, and checked when a slot is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FdKind {
    /// The memfd of the guest's RAM.
    GuestMemory,
    /// `/dev/vfio/vfio`, opened: a DMA domain.
    VfioContainer,
    /// `/dev/vfio/N` of an IOMMU group.
    VfioGroup,
    /// What VFIO_GROUP_GET_DEVICE_FD gave.
    VfioDevice,
    /// An eventfd that carries interrupts.
    Interrupt,
    /// What the serial port's text comes from and goes to. May be a file of the user's.
    Console,
    /// The event stream. May be a file of the user's.
    Log,
    /// The socket on which the API listens.
    ApiListener,
    /// A client's connection to the API.
    ApiConnection,
    /// `/dev/kvm` itself, of no VM.
    Kvm,
    /// In tests alone.
    State,
}

/// The serialisable name of a stored fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u32);

/// What a [`Slot`] is in MessagePack: an extension of this type, 4 bytes, little endian. So whoever looks through a
/// state finds each of them, and that none is where only the guest's state should be.
pub const SLOT_TYPE: i8 = 1;

/// The name by which rmp-serde knows an extension.
#[derive(Serialize, Deserialize)]
#[serde(rename = "_ExtStruct")]
struct Extension((i8, serde_bytes::ByteArray<4>));

impl Serialize for Slot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Extension((SLOT_TYPE, serde_bytes::ByteArray::new(self.0.to_le_bytes()))).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Slot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Extension::deserialize(deserializer)? {
            Extension((SLOT_TYPE, bytes)) => Ok(Self(u32::from_le_bytes(bytes.into_array()))),
            Extension((other, _)) => Err(serde::de::Error::custom(format!("an extension of type {other}, not a slot"))),
        }
    }
}

/// How one stored fd is described to the next VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// By which the saved state names it.
    pub slot: Slot,
    /// For messages.
    pub name: String,
    /// Compared when the slot is claimed.
    pub kind: FdKind,
    /// `st_dev`, `st_ino` and `st_rdev` when it was kept: an fd that came in another one's place is caught. Zeros if
    /// unknown.
    pub identity: (u64, u64, u64),
}

/// Why fds that came do not fit what is said of them.
#[derive(Debug, thiserror::Error)]
pub enum FdStoreError {
    /// Its identity is not that of its [`Record`].
    #[error("stored fd '{name}' ({kind:?}): what came is another file than the one that was kept")]
    OtherFile {
        /// As it was kept.
        name: String,
        /// As it was kept.
        kind: FdKind,
    },
    /// As many fds are needed as records name that are not here yet.
    #[error("{fds} fds came, and the saved state names {named} that are not here")]
    Count {
        /// How many came.
        fds: usize,
        /// How many were to come.
        named: usize,
    },
    /// Nothing waits there to be claimed.
    #[error("slot {slot} ({kind:?}) is not in the fd store: claimed twice, or never kept")]
    NoSlot {
        /// Its number.
        slot: u32,
        /// What it was to be.
        kind: FdKind,
    },
    /// It goes on waiting.
    #[error("stored fd '{name}' is a {found:?}, not a {wanted:?}")]
    WrongKind {
        /// As it was kept.
        name: String,
        /// What it was kept as.
        found: FdKind,
        /// What it was to be.
        wanted: FdKind,
    },
    /// Two records are of one slot.
    #[error("the saved state names a slot twice")]
    Twice,
    /// Their names, at the end of a restore.
    #[error("stored fds that nothing claimed: {0}")]
    Unclaimed(String),
}

struct Entry {
    slot: Slot,
    name: String,
    kind: FdKind,
    identity: (u64, u64, u64),
    fd: OwnedFd,
}

/// A stored fd in use. The fd_store forgets the fd, and it is closed, when the last clone is dropped.
#[derive(Clone)]
pub struct StoredFd(Arc<Entry>);

impl StoredFd {
    /// What a saved state calls it, good for [`Claims::claim`] in the next VMM.
    pub fn slot(&self) -> Slot {
        self.0.slot
    }

    /// As it was kept, for messages: need not be unique.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    fn record(&self) -> Record {
        let Entry { slot, name, kind, identity, fd: _ } = &*self.0;
        Record { slot: *slot, name: name.clone(), kind: *kind, identity: *identity }
    }
}

impl AsFd for StoredFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for StoredFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

impl std::fmt::Debug for StoredFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoredFd({}, {:?}, fd {})", self.0.name, self.0.kind, self.as_raw_fd())
    }
}

#[derive(Default)]
struct Inner {
    next: u32,
    entries: BTreeMap<Slot, Weak<Entry>>,
}

impl Inner {
    fn has(&self, slot: Slot) -> bool {
        self.entries.get(&slot).is_some_and(|entry| entry.strong_count() > 0)
    }
}

/// See the module. Cheap to clone: all clones are one fd_store.
#[derive(Clone, Default)]
pub struct FdStore(Arc<Mutex<Inner>>);

impl FdStore {
    /// With nothing in keeping.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every critical section leaves the map whole, so a panic elsewhere does not spoil it.
        self.0.lock()
    }

    /// Takes `fd` into keeping.
    pub fn keep(&self, name: impl Into<String>, kind: FdKind, fd: OwnedFd) -> StoredFd {
        let mut inner = self.lock();
        inner.entries.retain(|_, entry| entry.strong_count() > 0);
        let slot = Slot(inner.next);
        inner.next = inner.next.wrapping_add(1);
        let identity = identity(fd.as_fd()).unwrap_or_default();
        let entry = Arc::new(Entry { slot, name: name.into(), kind, identity, fd });
        inner.entries.insert(slot, Arc::downgrade(&entry));
        StoredFd(entry)
    }

    fn live(&self) -> Vec<StoredFd> {
        look(&self.0).entries.values().filter_map(Weak::upgrade).map(StoredFd).collect()
    }

    /// Every fd in keeping now, as the next VMM has to know it.
    pub fn manifest(&self) -> Vec<Record> {
        self.live().iter().map(StoredFd::record).collect()
    }

    /// As [`FdStore::manifest`], with those of the fds, in the same order, that are not among `known` slots.
    pub fn offer(&self, known: &BTreeSet<Slot>) -> (Vec<Record>, Vec<StoredFd>) {
        let live = self.live();
        let records = live.iter().map(StoredFd::record).collect();
        (records, live.into_iter().filter(|kept| !known.contains(&kept.slot())).collect())
    }

    /// The same twice: in between nothing was taken into keeping, and nothing was dropped.
    pub fn generation(&self) -> (u32, usize) {
        let inner = look(&self.0);
        (inner.next, inner.entries.values().filter(|entry| entry.strong_count() > 0).count())
    }

    /// Everything in keeping once more, as another process would get it. For tests.
    pub fn handed_over(&self) -> Result<(Self, Claims), FdStoreError> {
        let (records, fds) = self.offer(&BTreeSet::new());
        let (new, mut claims) = (Self::new(), Claims::default());
        let again = fds.iter().filter_map(|kept| kept.as_fd().try_clone_to_owned().ok()).collect();
        new.receive(&mut claims, records, again)?;
        Ok((new, claims))
    }

    /// How many of `records` are not here.
    pub fn missing(&self, records: &[Record]) -> usize {
        let inner = self.lock();
        records.iter().filter(|record| !inner.has(record.slot)).count()
    }

    /// In the new VMM: takes over what `records` names. What is here already stays; each of the others is the next one
    /// of `fds`. What waits in `claims` and is no longer named is closed. On an error nothing has changed, and `fds`
    /// are closed.
    pub fn receive(&self, claims: &mut Claims, records: Vec<Record>, fds: Vec<OwnedFd>) -> Result<(), FdStoreError> {
        let slots: BTreeSet<_> = records.iter().map(|record| record.slot).collect();
        if slots.len() != records.len() {
            return Err(FdStoreError::Twice);
        }
        let mut inner = self.lock();
        let new: Vec<_> = records.into_iter().filter(|record| !inner.has(record.slot)).collect();
        if new.len() != fds.len() {
            return Err(FdStoreError::Count { fds: fds.len(), named: new.len() });
        }
        for (Record { slot: _, name, kind, identity: kept }, fd) in new.iter().zip(&fds) {
            // A file of the user's may be on a file system that is gone: its stat fails then, or waits.
            let ours = !matches!(kind, FdKind::Console | FdKind::Log);
            if ours && *kept != Default::default() && identity(fd.as_fd()).is_some_and(|found| found != *kept) {
                return Err(FdStoreError::OtherFile { name: name.clone(), kind: *kind });
            }
        }
        for (Record { slot, name, kind, identity }, fd) in new.into_iter().zip(fds) {
            let entry = Arc::new(Entry { slot, name, kind, identity, fd });
            inner.next = inner.next.max(slot.0.wrapping_add(1));
            inner.entries.insert(slot, Arc::downgrade(&entry));
            claims.waiting.insert(slot, StoredFd(entry));
        }
        claims.waiting.retain(|slot, _| slots.contains(slot));
        Ok(())
    }
}

/// What the old VMM handed over and nobody has claimed yet.
#[derive(Default)]
pub struct Claims {
    waiting: BTreeMap<Slot, StoredFd>,
}

impl Claims {
    /// Hands `slot` to its owner, once. Dropped, it is closed.
    ///
    /// # Errors
    /// Nothing waits there, or it is of another kind: then it goes on waiting.
    pub fn claim(&mut self, slot: Slot, kind: FdKind) -> Result<StoredFd, FdStoreError> {
        let kept = self.waiting.remove(&slot).ok_or(FdStoreError::NoSlot { slot: slot.0, kind })?;
        if kept.0.kind != kind {
            let (name, found) = (kept.0.name.clone(), kept.0.kind);
            self.waiting.insert(slot, kept);
            return Err(FdStoreError::WrongKind { name, found, wanted: kind });
        }
        Ok(kept)
    }

    /// The last step of a restore: everything must have found its owner.
    pub fn finish(self) -> Result<(), FdStoreError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.waiting.values().map(|kept| kept.name().to_owned()).collect();
        Err(FdStoreError::Unclaimed(names.join(", ")))
    }
}

fn identity(fd: BorrowedFd<'_>) -> Option<(u64, u64, u64)> {
    rustix::fs::fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino, stat.st_rdev))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    fn again(kept: &[&StoredFd]) -> Vec<OwnedFd> {
        kept.iter().map(|kept| kept.as_fd().try_clone_to_owned().unwrap()).collect()
    }

    #[test]
    fn claim_once_with_the_right_purpose_and_leave_nothing() {
        let fd_store = FdStore::new();
        let a = fd_store.keep("a", FdKind::Log, file());
        let b = fd_store.keep("b", FdKind::Console, file());
        let (new, mut claims) = (FdStore::new(), Claims::default());
        new.receive(&mut claims, fd_store.manifest(), again(&[&a, &b])).unwrap();
        assert!(matches!(claims.claim(a.slot(), FdKind::Console), Err(FdStoreError::WrongKind { .. })));
        let _kept = claims.claim(a.slot(), FdKind::Log).unwrap();
        assert!(matches!(claims.claim(a.slot(), FdKind::Log), Err(FdStoreError::NoSlot { .. })));
        assert!(matches!(claims.finish(), Err(FdStoreError::Unclaimed(names)) if names == "b"));
        assert_ne!(new.keep("c", FdKind::Log, file()).slot(), b.slot());
    }

    #[test]
    fn a_slot_is_told_from_a_number() {
        let bytes = rmp_serde::to_vec_named(&Slot(0x0102)).unwrap();
        // fixext 4
        assert_eq!(bytes, [0xD6, SLOT_TYPE as u8, 2, 1, 0, 0]);
        assert_eq!(rmp_serde::from_slice::<Slot>(&bytes).unwrap(), Slot(0x0102));
        for other in [&[0xD6, 2, 2, 1, 0, 0][..], &[0xD5, 1, 2, 1], &[7], &[0x92, 1, 0]] {
            assert!(rmp_serde::from_slice::<Slot>(other).is_err(), "{other:x?}");
        }
    }

    #[test]
    fn what_was_opened_since_comes_later_and_what_was_closed_goes() {
        let old = FdStore::new();
        let (a, b) = (old.keep("a", FdKind::State, file()), old.keep("b", FdKind::State, file()));
        let (new, mut claims) = (FdStore::new(), Claims::default());
        let (records, fds) = old.offer(&BTreeSet::new());
        assert_eq!(fds.len(), 2);
        let known = records.iter().map(|record| record.slot).collect();
        new.receive(&mut claims, records, again(&[&a, &b])).unwrap();
        let claimed = claims.claim(a.slot(), FdKind::State).unwrap();
        let gone = b.slot();
        drop((b, fds));
        let c = old.keep("c", FdKind::State, file());
        let (records, fds) = old.offer(&known);
        assert_eq!(fds.iter().map(StoredFd::slot).collect::<Vec<_>>(), [c.slot()]);
        new.receive(&mut claims, records, again(&[&c])).unwrap();
        assert!(claims.claim(gone, FdKind::State).is_err());
        let c = claims.claim(c.slot(), FdKind::State).unwrap();
        claims.finish().unwrap();
        assert_eq!(new.manifest().len(), 2);
        drop((a, c, claimed));
    }

    #[test]
    fn another_file_is_refused_and_changes_nothing() {
        let fd_store = FdStore::new();
        let kept = fd_store.keep("a", FdKind::State, file());
        let (new, mut claims) = (FdStore::new(), Claims::default());
        let other = new.receive(&mut claims, fd_store.manifest(), vec![file()]);
        assert!(matches!(other, Err(FdStoreError::OtherFile { .. })));
        assert!(matches!(
            new.receive(&mut claims, fd_store.manifest(), Vec::new()),
            Err(FdStoreError::Count { fds: 0, named: 1 })
        ));
        let twice = [fd_store.manifest(), fd_store.manifest()].concat();
        assert!(matches!(new.receive(&mut claims, twice, again(&[&kept, &kept])), Err(FdStoreError::Twice)));
        assert!(new.manifest().is_empty());
        drop(kept);
        assert!(fd_store.manifest().is_empty());
    }
}
