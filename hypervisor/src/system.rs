//! `/dev/kvm` itself: its fd survives exec, unlike those of VMs.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use theseus_resources::{FdKind, FdStore, StoredFd};

use crate::{Error, Result};

/// What the update cannot do without, by name for the error.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// KVM of this host, of which VMs are made.
pub struct Hypervisor {
    // The fd_store's fd is the owner; this is a view of it that must not close it.
    kvm: ManuallyDrop<Kvm>,
    fd: StoredFd,
}

impl Hypervisor {
    /// Opens `/dev/kvm` and checks that it can do what an update needs.
    pub fn open(fd_store: &FdStore) -> Result<Self> {
        let path = rustix::fs::open(
            "/dev/kvm",
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        let fd: OwnedFd = path.map_err(|error| Error::Open(error.into()))?;
        let this = Self::from_kept(fd_store.keep("/dev/kvm", FdKind::Kvm, fd));
        for (cap, name) in NEEDED {
            if !this.kvm.check_extension(cap) {
                return Err(Error::MissingCapability(name));
            }
        }
        Ok(this)
    }

    /// In the new image: the fd that came through exec.
    pub fn from_kept(fd: StoredFd) -> Self {
        // SAFETY: a valid fd that `fd` keeps open for as long as this lives; ManuallyDrop never closes it.
        let kvm = ManuallyDrop::new(unsafe { Kvm::from_raw_fd(fd.as_raw_fd()) });
        Self { kvm, fd }
    }

    /// `/dev/kvm`, to be handed over.
    pub fn kept(&self) -> &StoredFd {
        &self.fd
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// What KVM can offer a guest on this host.
    pub fn supported_cpuid(&self) -> Result<CpuId> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::call("KVM_GET_SUPPORTED_CPUID"))
    }

    pub(crate) fn msr_index_list(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(Error::call("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }
}
