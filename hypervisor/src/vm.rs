//! One KVM VM: memslots and the in-kernel devices.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use parking_lot::{Mutex, MutexGuard};
use theseus_resources::layout;
use theseus_resources::memory_listener::{MemoryListener, RamBlock, Rank, Refusal};
use theseus_resources::survivor::look;

use crate::routing::Routing;
use crate::vfio::VfioFiles;
use crate::{Error, Hypervisor, Result};

/// A KVM VM as its devices see it. It begins as a [`BareVm`].
pub struct Vm {
    fd: VmFd,
    /// What each memslot covers of the guest's memory.
    slots: Mutex<BTreeMap<u32, Range<u64>>>,
    max_slots: u32,
    pub(crate) routing: Mutex<Routing>,
    pub(crate) vfio: VfioFiles,
}

/// A VM that has no interrupt controllers yet, and so takes no vCPUs: first all memslots that it is known to need.
/// KVM_CREATE_IRQCHIP registers on the I/O bus, and a memslot that is set after it waits for that SRCU grace period: 5
/// to 7 ms natively (Linux 6.18), 0.3 before it. One that comes later is not wrong, only slow: a guest that moves a BAR
/// makes one.
pub struct BareVm(Arc<Vm>);

/// A VM with an in-kernel PIC, IOAPIC and LAPICs, as vCPUs need it. There is no PIT: the guest is told of a TSC
/// deadline timer and, by hardware-reduced ACPI, of no legacy timers.
#[derive(Clone)]
pub struct ReadyVm(Arc<Vm>);

impl BareVm {
    /// Makes a VM (KVM_CREATE_VM), bound to the address space of this process.
    pub fn new(hypervisor: &Hypervisor) -> Result<Self> {
        let fd = hypervisor.kvm().create_vm().map_err(Error::call("KVM_CREATE_VM"))?;
        if std::env::consts::ARCH == "x86_64" {
            // Needed on Intel hosts without unrestricted guest, harmless elsewhere.
            fd.set_identity_map_address(layout::IDENTITY_MAP_ADDR).map_err(Error::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
            fd.set_tss_address(layout::TSS_ADDR as usize).map_err(Error::call("KVM_SET_TSS_ADDR"))?;
        }
        let max_slots = u32::try_from(hypervisor.kvm().get_nr_memslots()).unwrap_or(u32::MAX);
        Ok(Self(Arc::new(Vm {
            fd,
            slots: Mutex::default(),
            max_slots,
            routing: Mutex::new(Routing::new()),
            vfio: VfioFiles::default(),
        })))
    }

    /// What the devices are wired to: their memslots, and routes that are only noted, come before the interrupt
    /// controllers.
    pub fn handle(&self) -> &Arc<Vm> {
        &self.0
    }

    /// With them it takes vCPUs (KVM_CREATE_IRQCHIP).
    pub fn create_irqchip(self) -> Result<ReadyVm> {
        self.0.fd.create_irq_chip().map_err(Error::call("KVM_CREATE_IRQCHIP"))?;
        Ok(ReadyVm(self.0))
    }
}

impl Deref for ReadyVm {
    type Target = Arc<Vm>;

    fn deref(&self) -> &Arc<Vm> {
        &self.0
    }
}

impl Vm {
    /// For calls that have no method here.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Range<u64>>> {
        self.slots.lock()
    }

    /// Shows `size` bytes of this process at `hva` to the guest at `gpa`. Returns the slot's number.
    ///
    /// # Errors
    /// All slots are in use, or KVM refuses it, as one that overlaps another (EEXIST): the guest sees nothing new.
    ///
    /// # Safety
    /// `hva..hva+size` must stay mapped until the slot is removed or the VM is gone, and be memory that may be shared
    /// with a guest (nothing in it is a Rust object).
    pub unsafe fn add_memslot(&self, gpa: u64, size: u64, hva: u64, readonly: bool) -> Result<u32> {
        let mut slots = self.slots();
        let slot = (0..self.max_slots).find(|slot| !slots.contains_key(slot)).ok_or(Error::Exhausted("memslot"))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: if readonly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: hva,
        };
        // SAFETY: the caller's promise.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(Error::call(format!("memslot {slot} at {gpa:#x}+{size:#x}")))?;
        slots.insert(slot, gpa..gpa.saturating_add(size));
        Ok(slot)
    }

    /// Takes the memory of a slot from the guest. On an error it has it still.
    pub fn remove_memslot(&self, slot: u32) -> Result<()> {
        let mut slots = self.slots();
        let region = kvm_userspace_memory_region { slot, memory_size: 0, ..Default::default() };
        // SAFETY: size 0 deletes the slot; no memory is handed over.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(Error::call(format!("delete memslot {slot}")))?;
        slots.remove(&slot);
        Ok(())
    }

    /// What its memslots cover.
    pub fn memory(&self) -> Vec<Range<u64>> {
        look(&self.slots).values().cloned().collect()
    }

    /// One edge on an IOAPIC pin.
    pub fn pulse_irq(&self, gsi: u32) -> Result<()> {
        self.fd.set_irq_line(gsi, true).map_err(Error::call(format!("raise GSI {gsi}")))?;
        self.fd.set_irq_line(gsi, false).map_err(Error::call(format!("lower GSI {gsi}")))
    }

    /// A paravirtual kick (KVM_HC_KICK_CPU) to the vCPU of this index: an MSI with KVM's own delivery mode
    /// APIC_DM_REMRD. Its next HLT does not wait.
    pub fn kick_halted(&self, index: u32) -> Result<()> {
        let msi = kvm_msi { address_lo: 0xFEE0_0000 | index << 12, data: 0x300, ..Default::default() };
        self.fd.signal_msi(msi).map(drop).map_err(Error::call(format!("KVM_SIGNAL_MSI to vCPU {index}")))
    }

    /// An NMI to all vCPUs: an MSI with delivery mode NMI to the physical broadcast destination (SDM 3A, 12.11).
    pub fn broadcast_nmi(&self) -> Result<()> {
        let msi = kvm_msi { address_lo: 0xFEEF_F000, data: 0x400, ..Default::default() };
        self.fd.signal_msi(msi).map(drop).map_err(Error::call("KVM_SIGNAL_MSI for an NMI"))
    }
}

/// Guest RAM is in its memslots, one for each block.
impl MemoryListener for Vm {
    fn describe(&self) -> String {
        "KVM".into()
    }

    fn rank(&self) -> Rank {
        Rank::Guest
    }

    unsafe fn add(&self, block: &RamBlock) -> std::result::Result<(), Refusal> {
        // SAFETY: the caller's promise.
        unsafe { self.add_memslot(block.gpa, block.size, block.hva, false) }?;
        Ok(())
    }

    fn remove(&self, block: &RamBlock) -> std::result::Result<(), Refusal> {
        let range = block.gpa..block.gpa.saturating_add(block.size);
        let slot = self.slots().iter().find_map(|(slot, covers)| (*covers == range).then_some(*slot));
        slot.map_or(Ok(()), |slot| Ok(self.remove_memslot(slot)?))
    }
}
