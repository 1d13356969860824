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
    Update,
    Unplug,
}

/// All that a vCPU's accesses go to.
#[derive(Clone)]
pub struct Buses {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
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
    Pio {
        base: u64,
        len: u64,
        device: SharedDevice,
    },
    Mmio {
        base: u64,
        len: u64,
        device: SharedDevice,
    },
    /// A slot of PCI bus 0.
    Pci {
        slot: u8,
        device: SharedPciDevice,
    },
}

/// One device of a [`crate::set::DeviceSet`]. It locks itself. No default methods: "nothing to do" is something that
/// somebody wrote.
pub trait Device: Any + Send + Sync {
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
    pub requests: &'a Arc<dyn GuestRequests>,
    pub fd_store: &'a FdStore,
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
    #[error("{name}: {source}")]
    Migrate { name: String, source: MigrateError },
    #[error("{name}: {source}")]
    Os { name: String, source: std::io::Error },
    #[error(transparent)]
    Bus(#[from] crate::bus::BusError),
    #[error(transparent)]
    Pci(#[from] crate::pci::bus::PciBusError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("there are two devices '{0}': give one another name")]
    Twice(String),
    #[error("device '{name}' is a '{kind}', which this build does not have: update to one that does")]
    UnknownKind { name: String, kind: String },
    #[error("there is no device '{0}'")]
    Missing(String),
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
