//! What a vCPU is saved as, and the order in which KVM wants it back.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes};

use super::msrs::{self, MSR_IA32_TSC_DEADLINE};
use super::{Vcpu, deadline, offers};
use crate::{Error, Result, raw};

/// The XSAVE area, as long as the host's features make it (KVM_CAP_XSAVE2).
#[derive(Clone, Serialize, Deserialize)]
pub struct XsaveBytes(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// `struct kvm_nested_state` with its data, as long as its own `size` says: 128 bytes where no nested guest runs.
#[derive(Clone, Serialize, Deserialize)]
pub struct NestedBytes(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// `kvm_sregs2`, field by field: the bindings have no serde for it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Sregs {
    /// cs, ds, es, fs, gs, ss, tr, ldt
    pub segments: [kvm_segment; 8],
    /// gdt, idt
    pub tables: [kvm_dtable; 2],
    /// cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags
    pub control: [u64; 8],
    /// Of PAE paging; they count where `flags` has KVM_SREGS2_FLAGS_PDPTRS_VALID.
    pub pdptrs: [u64; 4],
}

/// What a vCPU is from its guest's boot on.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuShape {
    /// Which of the VM's vCPUs it is.
    pub index: u32,
    /// Frozen at the guest's boot: a newer build adds nothing to it.
    #[serde(with = "super::abi")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// IA32_MCG_CAP where it is not KVM's own.
    pub mcg_cap: Option<u64>,
    /// Which MSRs it has, in ascending order.
    #[serde(with = "super::abi")]
    pub msrs: Vec<u32>,
}

/// One vCPU between two instructions.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// Which of the VM's vCPUs it is.
    pub index: u32,
    /// Frozen at the guest's boot: a newer build adds nothing to it.
    #[serde(with = "super::abi")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Whether it runs, halts, or waits for INIT or SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers, RIP and RFLAGS.
    pub regs: kvm_regs,
    /// Segments, descriptor tables and control registers.
    pub sregs: Sregs,
    /// FPU and vector registers, and whatever else XSAVE has.
    pub xsave: XsaveBytes,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// DR0 to DR3, DR6 and DR7.
    pub debugregs: kvm_debugregs,
    /// The first KiB of its registers' page (KVM_APIC_REG_SIZE).
    pub lapic: kvm_lapic_state,
    /// Those that [`Vcpu::discover_msrs`] has found, in ascending order. Without TSC and deadline timer.
    #[serde(with = "super::abi")]
    pub msrs: Vec<kvm_msr_entry>,
    /// IA32_TSC_DEADLINE, 0 if it is not armed. None where it cannot be read.
    pub tsc_deadline: Option<u64>,
    /// None where the host or the guest has no nested virtualisation.
    pub nested: Option<NestedBytes>,
    /// Exceptions, interrupts and NMIs that are on their way to it, and SMM.
    pub events: kvm_vcpu_events,
    /// What its TSC ran at. Read by nobody.
    pub tsc_khz: u32,
    /// IA32_MCG_CAP where it is not KVM's own. A build before it gives the guest that one, which no guest looks at
    /// again.
    #[serde(default)]
    pub mcg_cap: Option<u64>,
    /// What its last instruction has written and nobody carried out yet: to be done, in this order, before its next
    /// instruction.
    #[serde(default)]
    pub owed: Vec<OwedWrite>,
}

/// What of a vCPU only this host has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuHandles {
    /// What the guest's TSC is ahead of the host's. The guest's own is in [`crate::ClockState`].
    pub tsc_offset: u64,
}

/// A write by an exit that KVM has completed already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedWrite {
    /// To a port, else to memory.
    pub is_port: bool,
    /// The port, or the guest physical address.
    pub address: u64,
    /// 1 to 8 bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

impl VcpuState {
    #[cfg(test)]
    pub(super) fn empty() -> Self {
        Self {
            index: 0,
            cpuid: Vec::new(),
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Sregs {
                segments: Default::default(),
                tables: Default::default(),
                control: Default::default(),
                pdptrs: Default::default(),
            },
            xsave: XsaveBytes(Vec::new()),
            xcrs: Default::default(),
            debugregs: Default::default(),
            lapic: Default::default(),
            msrs: Vec::new(),
            tsc_deadline: None,
            nested: None,
            events: Default::default(),
            tsc_khz: 0,
            owed: Vec::new(),
            mcg_cap: None,
        }
    }

    /// Why this is no state of the vCPU of this index.
    pub fn is_foreign(&self, index: u32) -> Option<String> {
        if self.index != index {
            return Some(format!("it is vCPU {}'s", self.index));
        }
        let is_odd = self.owed.iter().any(|write| !matches!(write.data.len(), 1..=8));
        is_odd.then(|| "it holds a write of no size that there is".to_owned())
    }

    /// Whether it may be on its way to a HLT with interrupts off, of a paravirtual spin lock, and have been kicked
    /// already: KVM shows that in the MP state of a halted vCPU only (kvm_arch_vcpu_ioctl_get_mpstate).
    pub fn may_have_been_kicked(&self) -> bool {
        self.mp_state.mp_state == KVM_MP_STATE_RUNNABLE
    }
}

impl Vcpu {
    fn err(&self, what: &str) -> impl FnOnce(kvm_ioctls::Error) -> Error + use<> {
        Error::call(format!("vCPU {}: {what}", self.index))
    }

    pub(super) fn io_err(&self, what: &str) -> impl FnOnce(std::io::Error) -> Error + use<> {
        Error::io(format!("vCPU {}: {what}", self.index))
    }

    /// Changes nothing. The vCPU must have no exit pending: [`Vcpu::run`] with immediate exit until `Interrupted`.
    ///
    /// # Errors
    /// What KVM does not give, as an MSR that can no longer be read. The vCPU runs on as before.
    pub fn save(&self) -> Result<(Box<VcpuState>, VcpuHandles)> {
        let fd = &self.fd;
        // First: KVM_GET_MP_STATE takes a pending INIT or SIPI into account, which changes what the others read.
        let mp_state = fd.get_mp_state().map_err(self.err("KVM_GET_MP_STATE"))?;
        // Puts the payload of a pending exception into CR2 or DR6, before those are read
        // (kvm_vcpu_ioctl_x86_get_vcpu_events).
        fd.get_vcpu_events().map_err(self.err("KVM_GET_VCPU_EVENTS"))?;
        // Before the LAPIC, which any load of the vCPU may move a deadline into (start_hv_timer): read afterwards, it
        // would be in neither.
        let (msrs, tsc_deadline) = msrs::read(fd, self.index, &self.msr_list)?;
        let regs = fd.get_regs().map_err(self.err("KVM_GET_REGS"))?;
        let sregs = raw::get_sregs2(fd).map_err(self.io_err("KVM_GET_SREGS2"))?;
        let xsave = self.get_xsave()?;
        let xcrs = fd.get_xcrs().map_err(self.err("KVM_GET_XCRS"))?;
        let debugregs = fd.get_debug_regs().map_err(self.err("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(self.err("KVM_GET_LAPIC"))?;
        let nested = self.get_nested()?;
        // Last: reading the others may turn something into an event (kernel-facts.md).
        let events = fd.get_vcpu_events().map_err(self.err("KVM_GET_VCPU_EVENTS"))?;
        let handles = VcpuHandles { tsc_offset: raw::tsc_offset(fd).map_err(self.io_err("read the TSC offset"))? };
        let state = Box::new(VcpuState {
            index: self.index,
            cpuid: self.cpuid.clone(),
            mp_state,
            regs,
            sregs: Sregs::from_kvm(&sregs),
            xsave,
            xcrs,
            debugregs,
            lapic,
            msrs,
            tsc_deadline,
            nested,
            events,
            tsc_khz: self.tsc_khz,
            owed: Vec::new(),
            mcg_cap: self.mcg_cap,
        });
        Ok((state, handles))
    }

    /// What it is, whatever its guest does meanwhile.
    pub fn shape(&self) -> VcpuShape {
        VcpuShape { index: self.index, cpuid: self.cpuid.clone(), mcg_cap: self.mcg_cap, msrs: self.msr_list.clone() }
    }

    /// Before its guest stands still, in the process that will run it: all that can be known by then, what most guests
    /// have, and what KVM does at a first KVM_RUN (which does not enter the guest). Then [`Vcpu::restore_early`], which
    /// leaves out what is so already: each call for a vCPU is some 10 us of the pause where KVM itself is in a VM.
    pub fn prewarm(&mut self, shape: &VcpuShape) -> Result<()> {
        self.set_cpuid(&shape.cpuid)?;
        self.set_mcg_cap(shape.mcg_cap)?;
        self.keep_to_offers(true)?;
        self.set_immediate_exit(true);
        let first = self.run().map(drop);
        self.set_immediate_exit(false);
        first?;
        // What is not so is set later; these only guess.
        let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        let _ = self.fd.set_mp_state(running).and_then(|()| self.fd.set_xcrs(&all_features(&shape.cpuid)));
        self.msr_list.clone_from(&shape.msrs);
        self.fresh = self.save().ok();
        Ok(())
    }

    /// What it was before its restore, as [`Vcpu::prewarm`] has left it.
    pub fn fresh(&self) -> Option<&(Box<VcpuState>, VcpuHandles)> {
        self.fresh.as_ref()
    }

    /// The part before the VM's clock can be set, with the TSC offset in it. Then [`crate::Vm::restore_clock`], then
    /// [`Vcpu::restore_late`].
    pub fn restore_early(&mut self, state: &VcpuState, handles: &VcpuHandles) -> Result<()> {
        if !offers::kept(&state.cpuid, &state.msrs) {
            self.keep_to_offers(false)?;
        }
        let fd = &self.fd;
        if self.lacks(&state.mp_state, |fresh| &fresh.mp_state) {
            fd.set_mp_state(state.mp_state).map_err(self.err("KVM_SET_MP_STATE"))?;
        }
        fd.set_regs(&state.regs).map_err(self.err("KVM_SET_REGS"))?;
        raw::set_sregs2(fd, &state.sregs.to_kvm()).map_err(self.io_err("KVM_SET_SREGS2"))?;
        // XCRS first: KVM checks the XSAVE area against them.
        if self.lacks(&state.xcrs, |fresh| &fresh.xcrs) {
            fd.set_xcrs(&state.xcrs).map_err(self.err("KVM_SET_XCRS"))?;
        }
        self.set_xsave(&state.xsave)?;
        if self.lacks(&state.debugregs, |fresh| &fresh.debugregs) {
            fd.set_debug_regs(&state.debugregs).map_err(self.err("KVM_SET_DEBUGREGS"))?;
        }
        // Before the LAPIC, which reckons when its one-shot or periodic timer is due in the guest's TSC
        // (set_target_expiration).
        raw::set_tsc_offset(fd, handles.tsc_offset).map_err(self.io_err("set the TSC offset"))?;
        fd.set_lapic(&state.lapic).map_err(self.err("KVM_SET_LAPIC"))
    }

    /// The rest.
    ///
    /// # Errors
    /// As of [`Vcpu::restore_early`]: what KVM does not take, with an MSR's number. The vCPU has a part of the state
    /// then, and must not run.
    pub fn restore_late(&mut self, state: &VcpuState) -> Result<()> {
        let fd = &self.fd;
        let mut values = offers::existing(&state.cpuid, &state.msrs);
        let list = values.iter().map(|entry| entry.index).collect();
        let fresh = self.fresh.as_ref().map_or(&[][..], |(fresh, _)| &fresh.msrs);
        values.retain(|entry| !msrs::is_among(entry, fresh));
        // After LAPIC and MSRs: ignored unless LVTT is already in deadline mode, and an idle vCPU would never wake up.
        values.extend(state.tsc_deadline.map(|saved| kvm_msr_entry {
            index: MSR_IA32_TSC_DEADLINE,
            data: deadline::to_restore(&state.lapic, saved),
            ..Default::default()
        }));
        msrs::write(fd, self.index, &values)?;
        if let Some(nested) = &state.nested {
            self.set_nested(nested)?;
        }
        if self.lacks(&state.events, |fresh| &fresh.events) {
            fd.set_vcpu_events(&state.events).map_err(self.err("KVM_SET_VCPU_EVENTS"))?;
        }
        self.msr_list = list;
        self.fresh = None;
        Ok(())
    }

    /// Whether `wanted` is not what it has by itself.
    fn lacks<T: IntoBytes + Immutable>(&self, wanted: &T, of: impl FnOnce(&VcpuState) -> &T) -> bool {
        self.fresh.as_ref().is_none_or(|(fresh, _)| of(fresh).as_bytes() != wanted.as_bytes())
    }

    fn get_xsave(&self) -> Result<XsaveBytes> {
        let mut xsave = Xsave::new(self.xsave_extra_words()).map_err(|_| Error::Exhausted("memory for XSAVE"))?;
        // SAFETY: as long as KVM_CAP_XSAVE2 says.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(self.err("KVM_GET_XSAVE2"))?;
        let header = &xsave.as_fam_struct_ref().xsave.region;
        Ok(XsaveBytes([header.as_bytes(), xsave.as_slice().as_bytes()].concat()))
    }

    fn set_xsave(&self, bytes: &XsaveBytes) -> Result<()> {
        let mut xsave = Xsave::new(self.xsave_extra_words()).map_err(|_| Error::Exhausted("memory for XSAVE"))?;
        let (head, rest) = bytes.0.split_at(bytes.0.len().min(size_of::<kvm_xsave>()));
        // SAFETY: only the contents change, not the length.
        let header = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
        fill(header.as_mut_bytes(), head);
        fill(xsave.as_mut_slice().as_mut_bytes(), rest);
        // SAFETY: as long as KVM_CAP_XSAVE2 says.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(self.err("KVM_SET_XSAVE"))
    }

    fn xsave_extra_words(&self) -> usize {
        self.xsave_size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4)
    }

    fn get_nested(&self) -> Result<Option<NestedBytes>> {
        if !self.has_nested {
            return Ok(None);
        }
        let mut buffer = Box::new(KvmNestedStateBuffer::empty());
        match self.fd.nested_state(&mut buffer) {
            // Outside of nested guest mode too: the header holds SVM's GIF and VMX's VMXON pointer.
            Ok(_) => {
                let bytes = buffer.as_bytes();
                Ok(Some(NestedBytes(bytes.get(..buffer.size as usize).unwrap_or(bytes).to_vec())))
            }
            // None for this guest.
            Err(error) if [libc::EINVAL, libc::ENOTTY].contains(&error.errno()) => Ok(None),
            Err(error) => Err(self.err("KVM_GET_NESTED_STATE")(error)),
        }
    }

    fn set_nested(&self, bytes: &NestedBytes) -> Result<()> {
        let mut buffer = Box::new(KvmNestedStateBuffer::empty());
        // Longer ones are of a build that saved the whole buffer, or of nobody.
        fill(buffer.as_mut_bytes(), &bytes.0);
        self.fd.set_nested_state(&buffer).map_err(self.err("KVM_SET_NESTED_STATE"))
    }
}

/// XCR0 with all that a CPUID offers, which is what a guest's kernel sets (CPUID 0DH.0, EDX:EAX).
fn all_features(cpuid: &[kvm_cpuid_entry2]) -> kvm_xcrs {
    let leaf = cpuid.iter().find(|leaf| leaf.function == 0xd && leaf.index == 0);
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = leaf.map_or(1, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    xcrs
}

/// As much of `from` as there is room for.
fn fill(to: &mut [u8], from: &[u8]) {
    let len = to.len().min(from.len());
    to[..len].copy_from_slice(&from[..len]);
}

impl Sregs {
    pub(super) fn cs(&self) -> &kvm_segment {
        &self.segments[0]
    }

    #[cfg(test)]
    pub(super) fn cs_mut(&mut self) -> &mut kvm_segment {
        &mut self.segments[0]
    }

    fn from_kvm(s: &kvm_sregs2) -> Self {
        Self {
            segments: [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt],
            tables: [s.gdt, s.idt],
            control: [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base, s.flags],
            pdptrs: s.pdptrs,
        }
    }

    fn to_kvm(&self) -> kvm_sregs2 {
        let [cs, ds, es, fs, gs, ss, tr, ldt] = self.segments;
        let [gdt, idt] = self.tables;
        let [cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags] = self.control;
        let pdptrs = self.pdptrs;
        kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }
}
