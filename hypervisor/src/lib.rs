//! KVM: the VM, its vCPUs, interrupt routing and clock, and what of them is saved (x86-64).
//!
//! VM and vCPU fds are bound to the address space that created the VM and never survive exec: every image makes its
//! own.

mod clock;
mod error;
mod irqchip;
mod raw;
mod routing;
mod system;
pub mod vcpu;
mod vfio;
mod vm;

pub use clock::{ClockAnchor, ClockHandles, ClockState, SavedClock, read_tsc};
pub use error::Error;
pub use irqchip::IrqchipState;
pub use routing::{IoEventAt, MsiRoute};
pub use system::Hypervisor;
pub use vcpu::{Exit, Vcpu, VcpuHandles, VcpuShape, VcpuState};
pub use vm::{BareVm, ReadyVm, Vm};

/// Of a call to KVM.
pub type Result<T> = std::result::Result<T, Error>;
