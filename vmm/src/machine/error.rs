//! What can go wrong with a machine, at its boot, in a pause and in its restore.

use theseus_devices::device::DeviceError;
use theseus_devices::migratable::MigrateError;
use theseus_devices::pci::bus::PciBusError;
use theseus_devices::pci::msix::MsixError;
use theseus_devices::turn::Held;
use theseus_devices::vfio::{AttachError, DmaError, InvalidateError};
use theseus_resources::fd_store::FdStoreError;
use theseus_resources::memory_listener::MemoryError;
use theseus_resources::ram::RamError;
use theseus_resources::state::StateError;
use theseus_resources::threads::ThreadError;

use super::fits::FitError;
use crate::boot::{BootError, MACHINE_VERSION};
use crate::timeline::NotPassed;
use crate::vcpus::VcpuError;

/// Why a machine is not built, not restored, or does not do what it is told. Each names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The configuration has no kernel, which [`VmConfig::validate`](theseus_api::types::VmConfig::validate) refuses.
    #[error("no kernel: give payload.kernel")]
    NoKernel,
    /// The serial port is to be a file or a socket, and none is named: refused by `validate`, too.
    #[error("serial: a path is missing")]
    NoSerialPath,
    /// The guest and this host do not fit.
    #[error(transparent)]
    Fit(#[from] FitError),
    /// Who asked for the boot wants it no more.
    #[error("the boot was given up")]
    GivenUp,
    /// The boot's thread ended without a word.
    #[error("the boot has ended early")]
    BootLost,
    /// With the panic's text.
    #[error("the boot: {0}")]
    BootPanicked(String),
    /// A thread cannot be started.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Kernel, initramfs, command line or what else the guest finds in its memory.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The memfds of the guest's RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// One of those who have to know of RAM refuses it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A call of KVM's.
    #[error(transparent)]
    Hypervisor(#[from] theseus_hypervisor::Error),
    /// A vCPU, or its thread.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A vCPU does not come to a stop.
    #[error("{source}{}", held.iter().map(|held| format!("; {held}")).collect::<String>())]
    Stuck {
        /// Which, and what was waited.
        source: VcpuError,
        /// The devices that are being accessed, in words: what it is likely to wait for.
        held: Vec<String>,
    },
    /// An emulated device.
    #[error(transparent)]
    Devices(#[from] DeviceError),
    /// The saved state or restore of the section `name`.
    #[error("{name}: {source}")]
    Device {
        /// Of the section.
        name: String,
        /// Why.
        source: MigrateError,
    },
    /// A device cannot be passed through.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// No place for it on the PCI bus.
    #[error(transparent)]
    Pci(#[from] PciBusError),
    /// A passed-through device's interrupts cannot be taken off this VM.
    #[error("{device}: {source}")]
    Interrupts {
        /// Its id.
        device: String,
        /// The vectors, and why.
        source: MsixError,
    },
    /// A passed-through device cannot be saved, as a thread is in an access to it.
    #[error("device '{device}': {held}")]
    Held {
        /// Its id.
        device: String,
        /// By whom, and for how long.
        held: Held,
    },
    /// The DMA addresses of a container stay as they are.
    #[error(transparent)]
    Invalidate(#[from] InvalidateError),
    /// A container does not take the addresses of this process.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The guest has passed-through devices that the rehearsal has not shown, or lacks some.
    #[error("the guest has other devices than those that were made ready")]
    OtherDevices,
    /// The saved state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The saved state contradicts itself.
    #[error("the saved state is of {said} vCPUs, and holds {found}")]
    SavedVcpus {
        /// By the section of the machine.
        said: u32,
        /// Sections of vCPUs.
        found: usize,
    },
    /// The guest is of a machine that only a later build knows.
    #[error(
        "the guest was booted as version {0} of the machine, this build knows those up to {MACHINE_VERSION}: update \
         to a later build"
    )]
    MachineVersion(u32),
    /// A descriptor that the saved state names was not handed over.
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
    /// A phase of an update was not passed: its deadline is over, or it was given up.
    #[error(transparent)]
    NotPassed(#[from] NotPassed),
    /// By the rules of `vcpu/refused.rs`, with the register.
    #[error("no KVM would take the guest's state as it is: {0}: try again when the guest has gone on")]
    Refused(String),
}
