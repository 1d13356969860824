//! Who has to know of the guest's RAM, and how they are told: at the boot, in a new VMM, and while the guest runs.
//!
//! ```text
//!   machine --add, remove--> MemoryListeners --> handler of memory errors   Rank::Errors
//!                                            --> KVM's memslots             Rank::Guest
//!                                            --> each DMA domain            Rank::Dma
//!                                            --> vhost back ends, once there are any
//! ```
//!
//! A block that is added is told in this order, one that is removed in the opposite one. Where one refuses, those who
//! were told before it are told the contrary, last one first: so all know the same.
//!
//! The BARs of devices do not come here. They are not for all: only the DMA domain of the device itself may reach them,
//! vhost and the handler never. And a domain that refuses one is no reason to take it from the guest.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::fd_store::StoredFd;

/// A piece of the guest's RAM and all that one may reach it by. Multiples of the page size, in bytes.
#[derive(Clone, Debug)]
pub struct RamBlock {
    /// Where the guest has it.
    pub gpa: u64,
    /// From there on.
    pub size: u64,
    /// Where this process has it.
    pub hva: u64,
    /// What is mapped there, from `offset` on: for whoever has no use for an address of this process.
    pub file: StoredFd,
    /// In `file`.
    pub offset: u64,
}

impl RamBlock {
    /// The address in this process of `gpa..gpa + size`, if all of it is in this block.
    pub fn hva_of(&self, gpa: u64, size: u64) -> Option<u64> {
        let offset = gpa.checked_sub(self.gpa)?;
        (offset.checked_add(size)? <= self.size).then(|| self.hva.checked_add(offset))?
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.gpa < other.gpa.saturating_add(other.size) && other.gpa < self.gpa.saturating_add(self.size)
    }
}

/// In this order they are told of a new block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Who has to know it before anybody touches it.
    Errors,
    /// What the vCPUs reach. It pins nothing: quickly told, quickly undone.
    Guest,
    /// What devices reach: every page is pinned, which takes time and may be refused.
    Dma,
}

/// Why a listener refuses: a text that names the listener, the block and the remedy.
pub type Refusal = Box<dyn std::error::Error + Send + Sync>;

/// Who has to know of the guest's RAM. It must not call its [`MemoryListeners`].
pub trait MemoryListener: Send + Sync {
    /// For messages.
    fn describe(&self) -> String;

    /// When it is told; always the same.
    fn rank(&self) -> Rank;

    /// On an error it has nothing of it.
    ///
    /// # Safety
    /// The block's memory is mapped, and holds nothing that is a Rust object, until [`MemoryListener::remove`] of it
    /// was successful or the listener is dropped.
    unsafe fn add(&self, block: &RamBlock) -> Result<(), Refusal>;

    /// Nobody reaches it by this listener any more. It is one that it has.
    fn remove(&self, block: &RamBlock) -> Result<(), Refusal>;
}

/// Why the guest's RAM is what it was.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The block to be added cannot be one. Nobody was told.
    #[error("guest RAM {gpa:#x}+{size:#x}: it is empty, wraps, or overlaps what there is: give it another address")]
    Overlap {
        /// Of the block to be added.
        gpa: u64,
        /// Of the block to be added, in bytes.
        size: u64,
    },
    /// The guest physical address at which no block starts.
    #[error("guest RAM {0:#x}: there is none that starts there")]
    Absent(u64),
    /// One of the listeners has not taken it, or not let it go; all others were told the contrary again.
    #[error("{source}{}", .stuck.iter().map(|name| format!("; {name} could not be put back")).collect::<String>())]
    Refused {
        /// [`MemoryListener::describe`] of it.
        listener: String,
        /// What it says.
        source: Refusal,
        /// Who could not be told the contrary either: that is tried again, see [`MemoryListeners::settle`].
        stuck: Vec<String>,
    },
}

/// What a listener could not be told when another one had refused.
struct Owed {
    listener: Arc<dyn MemoryListener>,
    block: RamBlock,
    /// It is to have it.
    wanted: bool,
}

#[derive(Default)]
struct Inner {
    /// By rank.
    listeners: Vec<Arc<dyn MemoryListener>>,
    blocks: Vec<RamBlock>,
    owed: Vec<Owed>,
}

/// See the module. The machine has one, and drops it before its RAM.
#[derive(Default)]
pub struct MemoryListeners(Mutex<Inner>);

impl MemoryListeners {
    /// With no listeners and no RAM.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }

    /// What the guest has.
    pub fn blocks(&self) -> Vec<RamBlock> {
        self.lock().blocks.clone()
    }

    /// Tells it of all that there is, and from now on of each change. On an error it is to be dropped.
    pub fn subscribe(&self, listener: Arc<dyn MemoryListener>) -> Result<(), MemoryError> {
        let mut inner = self.lock();
        for (n, block) in inner.blocks.iter().enumerate() {
            // SAFETY: promised by whoever has added the block, for all listeners.
            if let Err(source) = unsafe { listener.add(block) } {
                for block in inner.blocks[..n].iter().rev() {
                    if let Err(error) = listener.remove(block) {
                        log::error!("{error}");
                    }
                }
                return Err(MemoryError::Refused { listener: listener.describe(), source, stuck: Vec::new() });
            }
        }
        inner.enter(listener);
        Ok(())
    }

    /// As [`MemoryListeners::subscribe`], for one that has it all: it has gone over from another VMM.
    pub fn subscribe_told(&self, listener: Arc<dyn MemoryListener>) {
        self.lock().enter(listener);
    }

    /// It is about to end, and what it has with it.
    pub fn unsubscribe(&self, listener: &dyn MemoryListener) {
        let mut inner = self.lock();
        let is_other = |other: &Arc<dyn MemoryListener>| !std::ptr::addr_eq(Arc::as_ptr(other), listener);
        inner.listeners.retain(is_other);
        inner.owed.retain(|owed| is_other(&owed.listener));
    }

    /// Tells all of a new block, or none.
    ///
    /// # Safety
    /// The block's memory is mapped, and holds nothing that is a Rust object, until this and all listeners are dropped,
    /// or [`MemoryListeners::remove`] of it was successful. After an error: until [`MemoryListeners::settle`] says so.
    pub unsafe fn add(&self, block: RamBlock) -> Result<(), MemoryError> {
        let mut inner = self.lock();
        inner.settle();
        let RamBlock { gpa, size, .. } = block;
        let mut there = inner.blocks.iter().chain(inner.owed.iter().map(|owed| &owed.block));
        if size == 0 || gpa.checked_add(size).is_none() || there.any(|other| other.overlaps(&block)) {
            return Err(MemoryError::Overlap { gpa, size });
        }
        inner.tell_all(&block, true)?;
        inner.blocks.push(block);
        Ok(())
    }

    /// Tells all that the block that starts at `gpa` is no more, or none.
    pub fn remove(&self, gpa: u64) -> Result<RamBlock, MemoryError> {
        let mut inner = self.lock();
        inner.settle();
        let at = inner.blocks.iter().position(|block| block.gpa == gpa).ok_or(MemoryError::Absent(gpa))?;
        let block = inner.blocks[at].clone();
        inner.tell_all(&block, false)?;
        inner.owed.retain(|owed| owed.block.gpa != gpa);
        Ok(inner.blocks.remove(at))
    }

    /// Tells what could not be told before. True if nothing is left of that.
    pub fn settle(&self) -> bool {
        self.lock().settle()
    }
}

impl Inner {
    fn enter(&mut self, listener: Arc<dyn MemoryListener>) {
        let at = self.listeners.partition_point(|other| other.rank() <= listener.rank());
        self.listeners.insert(at, listener);
    }

    fn tell_all(&mut self, block: &RamBlock, wanted: bool) -> Result<(), MemoryError> {
        let mut order = self.listeners.clone();
        if !wanted {
            order.reverse();
            // Who could not take it again has none of it to let go.
            order.retain(|listener| !self.owes(&**listener, block));
        }
        for (n, listener) in order.iter().enumerate() {
            let Err(source) = tell(&**listener, block, wanted) else { continue };
            let mut stuck = Vec::new();
            for told in order[..n].iter().rev() {
                if let Err(error) = tell(&**told, block, !wanted) {
                    log::error!("{error}: tried again at the next change of memory");
                    stuck.push(told.describe());
                    self.owed.push(Owed { listener: told.clone(), block: block.clone(), wanted: !wanted });
                }
            }
            return Err(MemoryError::Refused { listener: listener.describe(), source, stuck });
        }
        Ok(())
    }

    /// Whether it is to have the block and has not.
    fn owes(&self, listener: &dyn MemoryListener, block: &RamBlock) -> bool {
        let is_it = |owed: &Owed| owed.wanted && owed.block.gpa == block.gpa;
        self.owed.iter().any(|owed| is_it(owed) && std::ptr::addr_eq(Arc::as_ptr(&owed.listener), listener))
    }

    fn settle(&mut self) -> bool {
        self.owed.retain(|Owed { listener, block, wanted }| tell(&**listener, block, *wanted).is_err());
        self.owed.is_empty()
    }
}

fn tell(listener: &dyn MemoryListener, block: &RamBlock, wanted: bool) -> Result<(), Refusal> {
    // SAFETY: promised by whoever has added the block.
    if wanted { unsafe { listener.add(block) } } else { listener.remove(block) }
}

#[cfg(test)]
#[path = "memory_listener_tests.rs"]
mod tests;
