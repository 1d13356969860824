//! What a VM owns that outlives one process image: kept file descriptors ([`fd_store`]), guest memory ([`ram`]) and who
//! has to know of it ([`memory_listener`]), the saved state's envelope ([`state`]), how both travel ([`channel`]), and
//! the layout of the guest's physical address space ([`layout`], [`alloc`]). Beside it [`rate`], [`socket`],
//! [`survivor`] and [`threads`], which several crates use.

pub mod alloc;
pub mod channel;
pub mod fd_store;
pub mod hugepages;
pub mod layout;
pub mod mapping;
pub mod memory_listener;
pub mod ram;
pub mod rate;
pub mod socket;
pub mod state;
pub mod survivor;
pub mod threads;

pub use channel::Channel;
pub use fd_store::{Claims, FdKind, FdStore, Slot, StoredFd};
pub use mapping::Mapping;
pub use memory_listener::{MemoryListeners, RamBlock};
pub use ram::{GuestRam, Pages, RamRange};
pub use state::{StateReader, StateWriter};
