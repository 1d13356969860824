//! What the machine does with a device, of whatever kind it is.

use std::any::Any;
use std::sync::Arc;

use acpi_tables::AmlSink;
use acpi_tables::aml::Interrupt;
use theseus_resources::state::StateError;
use theseus_resources::{Claims, FdStore};

use crate::bus::{Bus, SharedDevice};
use crate::interrupt::{GuestRequests, IrqLine};
use crate::migratable::{Migratable, MigrateError, SavedDevice};
use crate::pci::bus::{PciBus, SharedPciDevice};
use crate::spec::Spec;

/// What a device may stand in the way of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The next image takes it over.
    Update,
    /// It is taken away from a guest that runs on.
    Unplug,
}

/// All that a vCPU's accesses go to.
#[derive(Clone)]
pub struct Buses {
    /// Ports (`KVM_EXIT_IO`).
    pub pio: Arc<Bus>,
    /// Guest physical addresses without a memslot (`KVM_EXIT_MMIO`).
    pub mmio: Arc<Bus>,
    /// Configuration spaces, which vCPUs reach through the other two.
    pub pci: Arc<PciBus>,
}

impl Buses {
    /// Nothing answers on them yet.
    pub fn empty() -> Self {
        let [pio, mmio] = ["port", "MMIO"].map(|name| Arc::new(Bus::new(name)));
        Self { pio, mmio, pci: Arc::default() }
    }
}

/// Where vCPUs reach a device. Addresses and lengths in bytes.
pub enum Place {
    /// Ports `base..base + len`.
    Pio {
        /// The first port.
        base: u64,
        /// How many.
        len: u64,
        /// Answers there, at offsets from `base`.
        device: SharedDevice,
    },
    /// Guest physical addresses `base..base + len`, where there is no memslot.
    Mmio {
        /// The first address.
        base: u64,
        /// Bytes.
        len: u64,
        /// Answers there, at offsets from `base`.
        device: SharedDevice,
    },
    /// A slot of PCI bus 0.
    Pci {
        /// 0 to 31.
        slot: u8,
        /// Its function 0.
        device: SharedPciDevice,
    },
}

/// One device of a [`crate::set::DeviceSet`]. It locks itself. No default methods: "nothing to do" is something that
/// somebody wrote.
pub trait Device: Any + Send + Sync {
    /// The same at each call: it is asked where to put the device, and again what to take away.
    fn places(self: Arc<Self>) -> Vec<Place>;

    /// vCPUs are stopped: so does what the device does by itself, so that what [`Self::save`] finds stays true.
    fn quiesce(&self) -> Result<(), MigrateError>;

    /// The end of [`Self::quiesce`], of one that failed too, before vCPUs run. A new device stands still until this.
    fn resume(&self);

    /// Makes it what it was at the guest's power-on. What is on the host's side of it stays.
    fn reset(&self);

    /// Why `operation` cannot be now, each with its remedy. Empty if it can.
    fn blockers(&self, operation: Operation) -> Vec<String>;

    /// Pure: may be called while the guest runs, and any number of times. What it locks it locks by
    /// [`theseus_resources::survivor::look`] or [`crate::turn::Turn::look`], and it does not log: a survivor calls it
    /// too.
    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError>;

    /// Says what the guest cannot find by itself, in the scope `\_SB_` of the DSDT.
    fn describe(&self, aml: &mut dyn AmlSink);
}

/// What devices have around them in a VMM.
pub struct Surroundings<'a> {
    /// The line of an IOAPIC pin.
    pub pin: &'a dyn Fn(u32) -> Arc<dyn IrqLine>,
    /// Where the guest's requests to power off or to reset go.
    pub requests: &'a Arc<dyn GuestRequests>,
    /// Keeps what a device opens, and hands it on to the next image.
    pub fd_store: &'a FdStore,
    /// The one of [`Buses`].
    pub pci: &'a Arc<PciBus>,
}

/// How a kind of device comes into a machine.
pub(crate) trait Catalogued: Migratable {
    /// Those that the guest has at its boot, by name.
    fn boot(spec: &Spec, around: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError>;
    /// What [`Migratable::restore`] needs.
    fn parts<'a>(around: &Surroundings<'a>, claims: &'a mut Claims) -> Self::Parts<'a>;
    /// Under its lock.
    fn share(self) -> Arc<dyn Device>;
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// In the words of the device's own error.
    #[error(transparent)]
    Open(Box<dyn std::error::Error + Send + Sync>),
    /// It cannot be stopped, saved or restored.
    #[error("{name}: {source}")]
    Migrate {
        /// The device's.
        name: String,
        /// In the words of the device.
        source: MigrateError,
    },
    /// The host has refused it something that it needs.
    #[error("{name}: {source}")]
    Os {
        /// The device's.
        name: String,
        /// What the system call said.
        source: std::io::Error,
    },
    /// One of its ranges is another device's, or none at all.
    #[error(transparent)]
    Bus(#[from] crate::bus::BusError),
    /// Its slot is another device's, or does not exist.
    #[error(transparent)]
    Pci(#[from] crate::pci::bus::PciBusError),
    /// A section cannot be written, or is missing or wrong in the saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its name is another device's.
    #[error("there are two devices '{0}': give one another name")]
    Twice(String),
    /// The saved state has a device of a kind that this build cannot make.
    #[error("device '{name}' is a '{kind}', which this build does not have: update to one that does")]
    UnknownKind {
        /// The device's.
        name: String,
        /// As the manifest has it: the name of the format of its state.
        kind: String,
    },
    /// Nothing of this name is there to be removed.
    #[error("there is no device '{0}'")]
    Missing(String),
    /// [`Device::blockers`] of this operation, which are some.
    #[error("{0:?} is blocked: {why}", why = .1.join("; "))]
    Blocked(Operation, Vec<String>),
}

/// Edge-triggered, active-high, exclusive: a pulse of an irqfd is one interrupt.
pub(crate) fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// What stands in the way of taking a part of the board away.
pub(crate) fn on_board(operation: Operation) -> Vec<String> {
    match operation {
        Operation::Update => Vec::new(),
        Operation::Unplug => vec!["it is a part of the board".to_owned()],
    }
}
