//! The one owner of file descriptors that survive exec.
//!
//! A device gives the vault an fd under a name and a purpose and works with the [`KeptFd`] it gets back. At save it writes the
//! [`Slot`] into its state; in the new image it claims that slot, once. What nobody claims is an error. How the fds travel
//! (inherited by exec) is known only to [`Vault::open_for_exec`] and [`Vault::adopt`].

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};

/// What an fd is for: named in errors, and checked when a slot is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    GuestMemory,
    VfioContainer,
    VfioGroup,
    VfioDevice,
    Interrupt,
    Console,
    Log,
    ApiListener,
    ApiConnection,
    Kvm,
    State,
    Binary,
}

/// The serialisable name of a kept fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slot(u32);

/// How one kept fd is described to the next image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub slot: Slot,
    pub name: String,
    pub purpose: Purpose,
    pub fd: RawFd,
    /// `st_dev`, `st_ino` and `st_rdev` when it was kept: an fd number that now means something else is caught at claim. Zeros if unknown.
    pub identity: (u64, u64, u64),
}

#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("kept fd '{name}' ({purpose:?}): fd {fd} is not open in this image: was it closed before exec?")]
    NotOpen { name: String, purpose: Purpose, fd: RawFd },
    #[error("kept fd '{name}' ({purpose:?}): fd {fd} is another file than the one that was kept")]
    OtherFile { name: String, purpose: Purpose, fd: RawFd },
    #[error("slot {slot} ({purpose:?}) is not in the vault: claimed twice, or never kept")]
    NoSlot { slot: u32, purpose: Purpose },
    #[error("kept fd '{name}' is a {found:?}, not a {wanted:?}")]
    WrongPurpose { name: String, found: Purpose, wanted: Purpose },
    #[error("the saved state names a slot or an fd twice")]
    Twice,
    #[error("kept fds that nothing claimed: {0}")]
    Unclaimed(String),
    #[error("kept fd '{name}': cannot change its close-on-exec flag: {source}")]
    Flag { name: String, source: std::io::Error },
}

struct Entry {
    slot: Slot,
    name: String,
    purpose: Purpose,
    identity: (u64, u64, u64),
    fd: OwnedFd,
}

/// A kept fd in use. The vault forgets the fd, and it is closed, when the last clone is dropped.
#[derive(Clone)]
pub struct KeptFd(Arc<Entry>);

impl KeptFd {
    pub fn slot(&self) -> Slot {
        self.0.slot
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl AsFd for KeptFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for KeptFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

impl std::fmt::Debug for KeptFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeptFd({}, {:?}, fd {})", self.0.name, self.0.purpose, self.as_raw_fd())
    }
}

#[derive(Default)]
struct Inner {
    next: u32,
    entries: BTreeMap<Slot, Weak<Entry>>,
}

/// See the module. Cheap to clone: all clones are one vault.
#[derive(Clone, Default)]
pub struct Vault(Arc<Mutex<Inner>>);

impl Vault {
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every critical section leaves the map whole, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `fd` into keeping. It stays CLOEXEC until an exec is really about to happen.
    pub fn keep(&self, name: impl Into<String>, purpose: Purpose, fd: OwnedFd) -> KeptFd {
        let mut inner = self.lock();
        inner.entries.retain(|_, entry| entry.strong_count() > 0);
        let slot = Slot(inner.next);
        inner.next = inner.next.wrapping_add(1);
        let identity = identity(fd.as_fd()).unwrap_or_default();
        let entry = Arc::new(Entry { slot, name: name.into(), purpose, identity, fd });
        inner.entries.insert(slot, Arc::downgrade(&entry));
        KeptFd(entry)
    }

    fn live(&self) -> Vec<KeptFd> {
        self.lock().entries.values().filter_map(Weak::upgrade).map(KeptFd).collect()
    }

    /// Every fd in keeping now, as the next image has to know it.
    pub fn manifest(&self) -> Vec<Record> {
        self.live()
            .iter()
            .map(|kept| Record {
                slot: kept.slot(),
                name: kept.0.name.clone(),
                purpose: kept.0.purpose,
                fd: kept.as_raw_fd(),
                identity: kept.0.identity,
            })
            .collect()
    }

    /// Everything in keeping now stays open for as long as this lives.
    pub fn hold(&self) -> HeldVault {
        HeldVault(self.live())
    }

    /// [`HeldVault::open_for_exec`] for everything in keeping now.
    pub fn open_for_exec(&self) -> Result<OpenVault, VaultError> {
        self.hold().open_for_exec()
    }

    /// In the new image: takes over what the manifest names. Fails, before anything is claimed, if one is not what it was.
    ///
    /// # Safety
    /// The fds in `records` must have no other owner in this process: call it once, at start, on the manifest handed over.
    pub unsafe fn adopt(records: Vec<Record>) -> Result<(Self, Claims), VaultError> {
        // First look, then touch: an image that cannot take them over hands all of them back as they are.
        for Record { slot: _, name, purpose, fd, identity: kept } in &records {
            let (name, purpose, fd) = (name.clone(), *purpose, *fd);
            if fd < 0 {
                return Err(VaultError::NotOpen { name, purpose, fd });
            }
            // SAFETY: only borrowed, and a number that is not open is answered with EBADF; -1 is excluded.
            let file = unsafe { BorrowedFd::borrow_raw(fd) };
            if rustix::io::fcntl_getfd(file).is_err() {
                return Err(VaultError::NotOpen { name, purpose, fd });
            }
            // A file of the user's may be on a file system that is gone: its stat fails then, or waits.
            let ours = !matches!(purpose, Purpose::Console | Purpose::Log);
            if ours && *kept != Default::default() && identity(file).is_some_and(|found| found != *kept) {
                return Err(VaultError::OtherFile { name, purpose, fd });
            }
        }
        let numbers: BTreeSet<_> = records.iter().map(|record| record.fd).collect();
        let slots: BTreeSet<_> = records.iter().map(|record| record.slot).collect();
        if numbers.len() != records.len() || slots.len() != records.len() {
            return Err(VaultError::Twice);
        }
        let vault = Self::new();
        let mut waiting = BTreeMap::new();
        for Record { slot, name, purpose, fd, identity } in records {
            // SAFETY: open and named once (just checked), and the caller promises that nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            if let Err(error) = set_cloexec(fd.as_fd(), true) {
                log::error!("{name}: cannot set close-on-exec: {error}");
            }
            let entry = Arc::new(Entry { slot, name, purpose, identity, fd });
            let mut inner = vault.lock();
            inner.next = inner.next.max(slot.0.wrapping_add(1));
            inner.entries.insert(slot, Arc::downgrade(&entry));
            waiting.insert(slot, KeptFd(entry));
        }
        Ok((vault, Claims { waiting }))
    }
}

/// A share in every fd that was in keeping at some moment.
pub struct HeldVault(Vec<KeptFd>);

impl HeldVault {
    /// Clears CLOEXEC on every one of them: the only place that does. Dropping the guard, which happens only when exec failed,
    /// sets it again.
    pub fn open_for_exec(&self) -> Result<OpenVault, VaultError> {
        let mut open = OpenVault(Vec::new());
        for kept in &self.0 {
            set_cloexec(kept.as_fd(), false)
                .map_err(|source| VaultError::Flag { name: kept.name().to_owned(), source })?;
            open.0.push(kept.clone());
        }
        Ok(open)
    }
}

/// While it lives, the kept fds would survive an exec.
#[must_use = "dropping it closes the fds to the next image again"]
pub struct OpenVault(Vec<KeptFd>);

impl Drop for OpenVault {
    fn drop(&mut self) {
        for kept in &self.0 {
            if let Err(error) = set_cloexec(kept.as_fd(), true) {
                log::error!("{}: cannot set close-on-exec again: {error}", kept.name());
            }
        }
    }
}

/// What the old image handed over and nobody has claimed yet.
pub struct Claims {
    waiting: BTreeMap<Slot, KeptFd>,
}

impl Claims {
    pub fn claim(&mut self, slot: Slot, purpose: Purpose) -> Result<KeptFd, VaultError> {
        let kept = self.waiting.remove(&slot).ok_or(VaultError::NoSlot { slot: slot.0, purpose })?;
        if kept.0.purpose != purpose {
            let (name, found) = (kept.0.name.clone(), kept.0.purpose);
            self.waiting.insert(slot, kept);
            return Err(VaultError::WrongPurpose { name, found, wanted: purpose });
        }
        Ok(kept)
    }

    /// The last step of a restore: everything must have found its owner.
    pub fn finish(self) -> Result<(), VaultError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.waiting.values().map(|kept| kept.name().to_owned()).collect();
        Err(VaultError::Unclaimed(names.join(", ")))
    }
}

fn identity(fd: BorrowedFd<'_>) -> Option<(u64, u64, u64)> {
    rustix::fs::fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino, stat.st_rdev))
}

fn set_cloexec(fd: BorrowedFd<'_>, on: bool) -> std::io::Result<()> {
    let flags = if on { rustix::io::FdFlags::CLOEXEC } else { rustix::io::FdFlags::empty() };
    Ok(rustix::io::fcntl_setfd(fd, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    fn is_cloexec(fd: &impl AsFd) -> bool {
        rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC)
    }

    #[test]
    fn cloexec_is_cleared_only_while_open() {
        let vault = Vault::new();
        let kept = vault.keep("a", Purpose::Log, file());
        assert!(is_cloexec(&kept));
        let open = vault.open_for_exec().unwrap();
        assert!(!is_cloexec(&kept));
        drop(open);
        assert!(is_cloexec(&kept));
    }

    #[test]
    fn claim_once_with_the_right_purpose_and_leave_nothing() {
        let vault = Vault::new();
        let a = vault.keep("a", Purpose::Log, file());
        let b = vault.keep("b", Purpose::Console, file());
        let mut records = vault.manifest();
        // Hand over duplicates, as exec would hand over the numbers themselves.
        let dups: Vec<OwnedFd> = [&a, &b].iter().map(|kept| kept.as_fd().try_clone_to_owned().unwrap()).collect();
        for (record, dup) in records.iter_mut().zip(dups) {
            record.fd = std::os::fd::IntoRawFd::into_raw_fd(dup);
        }
        // SAFETY: the duplicates were made for this and have no other owner.
        let (adopted, mut claims) = unsafe { Vault::adopt(records) }.unwrap();
        assert!(matches!(claims.claim(a.slot(), Purpose::Console), Err(VaultError::WrongPurpose { .. })));
        let kept = claims.claim(a.slot(), Purpose::Log).unwrap();
        assert!(is_cloexec(&kept));
        assert!(matches!(claims.claim(a.slot(), Purpose::Log), Err(VaultError::NoSlot { .. })));
        assert!(matches!(claims.finish(), Err(VaultError::Unclaimed(names)) if names == "b"));
        assert_ne!(adopted.keep("c", Purpose::Log, file()).slot(), b.slot());
    }

    #[test]
    fn a_number_that_means_another_file_is_refused() {
        let vault = Vault::new();
        let kept = vault.keep("a", Purpose::State, file());
        let mut records = vault.manifest();
        let other = file();
        records[0].fd = other.as_raw_fd();
        // SAFETY: refused before ownership is taken.
        let adopted = unsafe { Vault::adopt(records.clone()) };
        assert!(matches!(adopted, Err(VaultError::OtherFile { .. })));
        records[0].fd = 987_654;
        // SAFETY: as above.
        assert!(matches!(unsafe { Vault::adopt(records) }, Err(VaultError::NotOpen { .. })));
        drop(kept);
        assert!(vault.manifest().is_empty());
    }
}
