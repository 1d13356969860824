//! One vCPU: run it, stop it between instructions, save and restore it.

mod abi;
mod deadline;
pub mod mce;
mod msrs;
mod offers;
mod refused;
#[cfg(test)]
mod restore_tests;
#[cfg(test)]
mod run_tests;
mod second_stage;
mod state;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_EXIT_INTR, KVM_EXIT_UNKNOWN, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::{Mutex, MutexGuard};

pub use refused::reasons;
pub use state::{OwedWrite, VcpuHandles, VcpuShape, VcpuState, XsaveBytes};

use crate::{Error, Hypervisor, ReadyVm, Result};

/// Why a vCPU came back from the guest. Buffers are in the shared run page: fill reads before running again.
pub enum Exit<'a> {
    /// Port, bytes an access, and all the accesses of a string instruction to that one port.
    IoIn(u16, usize, &'a mut [u8]),
    /// As [`Exit::IoIn`], with what is written.
    IoOut(u16, usize, &'a [u8]),
    /// Guest physical address, and 1 to 8 bytes to be filled in.
    MmioRead(u64, &'a mut [u8]),
    /// Guest physical address, and 1 to 8 bytes that are written.
    MmioWrite(u64, &'a [u8]),
    /// A signal, or `immediate_exit`: nothing is pending.
    Interrupted,
    /// Triple fault.
    Reset,
    /// KVM or the guest did something that cannot go on.
    Failed(String),
}

/// In `exit_reason` of the run page once an exit was handled, until KVM has another. KVM completes an exit without a
/// word there (kvm_arch_vcpu_ioctl_run), so that to whoever finds the page when the vCPU's thread has died a write that
/// is done would look like one that is to be done. No reason of KVM's own: those count from 0.
const HANDLED: u32 = u32::from_le_bytes(*b"done");

/// Makes KVM_RUN of one vCPU return at once, from any thread: `immediate_exit` in the shared run page. Raised before
/// the kick signal is sent, it closes the gap in which the signal comes just before KVM_RUN.
#[derive(Clone)]
pub struct ExitFlag(Arc<Mutex<FlagAddr>>);

/// Empty once the vCPU, and with it the mapping of its run page, is gone.
struct FlagAddr(Option<NonNull<AtomicU8>>);

// SAFETY: the byte is only accessed atomically, and only while the lock says that it is still mapped.
unsafe impl Send for FlagAddr {}

impl ExitFlag {
    fn lock(&self) -> MutexGuard<'_, FlagAddr> {
        self.0.lock()
    }

    /// It stays raised: KVM_RUN returns at once until [`Vcpu::set_immediate_exit`] takes it back.
    pub fn raise(&self) {
        self.set(true);
    }

    fn set(&self, on: bool) {
        if let Some(flag) = self.lock().0 {
            // SAFETY: mapped: the vCPU clears the address, under this lock, before it unmaps the page.
            unsafe { flag.as_ref() }.store(on.into(), Ordering::SeqCst);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.exit_flag.lock().0 = None;
    }
}

/// `exit_reason` of the run page.
struct ExitReason(NonNull<AtomicU32>);

// SAFETY: only accessed atomically, and only while the vCPU that it is a field of has its run page mapped.
unsafe impl Send for ExitReason {}
// SAFETY: as above.
unsafe impl Sync for ExitReason {}

/// A vCPU of a VM of this process. Its thread alone runs it.
pub struct Vcpu {
    fd: VcpuFd,
    exit_flag: ExitFlag,
    exit_reason: ExitReason,
    index: u32,
    /// As it was set: KVM's own has bits in it that follow the guest's registers.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The MSRs this vCPU has, all readable and writable here.
    msr_list: Vec<u32>,
    xsave_size: usize,
    tsc_khz: u32,
    /// Whether this host's KVM runs guests of guests (KVM_CAP_NESTED_STATE).
    has_nested: bool,
    /// As its CPUID says.
    vendor: mce::Vendor,
    /// What IA32_MCG_CAP was set to, if it was.
    mcg_cap: Option<u64>,
    /// In a new VMM until its restore: what it has by itself, and need not be given.
    fresh: Option<(Box<VcpuState>, VcpuHandles)>,
}

impl Vcpu {
    /// Makes one as after a reset, without CPUID. `index` is its APIC ID too (KVM_CREATE_VCPU).
    pub fn new(vm: &ReadyVm, index: u32) -> Result<Self> {
        let mut fd = vm.fd().create_vcpu(index.into()).map_err(Error::call(format!("create vCPU {index}")))?;
        let xsave_size = usize::try_from(vm.fd().check_extension_int(kvm_ioctls::Cap::Xsave2)).unwrap_or(0);
        let has_nested = vm.fd().check_extension_int(kvm_ioctls::Cap::NestedState) > 0;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let byte = NonNull::from(&mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        let exit_reason = ExitReason(NonNull::from(&mut fd.get_kvm_run().exit_reason).cast());
        let exit_flag = ExitFlag(Arc::new(Mutex::new(FlagAddr(Some(byte)))));
        Ok(Self {
            fd,
            exit_flag,
            exit_reason,
            index,
            cpuid: Vec::new(),
            msr_list: Vec::new(),
            xsave_size,
            tsc_khz,
            has_nested,
            vendor: Default::default(),
            mcg_cap: None,
            fresh: None,
        })
    }

    /// Which of the VM's vCPUs it is, from 0 on.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// For who kicks it. Harmless once the vCPU is gone.
    pub fn exit_flag(&self) -> ExitFlag {
        self.exit_flag.clone()
    }

    /// The special registers, as KVM made them: where the boot registers start from.
    pub fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(Error::call(format!("vCPU {}: KVM_GET_SREGS", self.index)))
    }

    /// For a boot: what a restore needs beside is in [`Vcpu::restore_early`].
    pub fn set_registers(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs).map_err(Error::call(format!("vCPU {}: KVM_SET_SREGS", self.index)))?;
        self.fd.set_regs(regs).map_err(Error::call(format!("vCPU {}: KVM_SET_REGS", self.index)))
    }

    /// What KVM runs the guest's TSC at.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// What the guest is told of its CPU. Before its first KVM_RUN: afterwards KVM refuses a change.
    pub fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        self.vendor = mce::Vendor::of(entries);
        let cpuid = CpuId::from_entries(entries).map_err(|_| Error::Exhausted("CPUID entry"))?;
        self.fd.set_cpuid2(&cpuid).map_err(Error::call(format!("vCPU {}: KVM_SET_CPUID2", self.index)))?;
        self.cpuid = entries.to_vec();
        Ok(())
    }

    /// Sets them in this order, up to the first that KVM refuses, which is the error.
    pub fn set_msrs(&self, values: &[kvm_msr_entry]) -> Result<()> {
        msrs::write(&self.fd, self.index, values)
    }

    /// From now on the guest may use those of KVM's own MSRs and hypercalls that its CPUID offers, and no others; or
    /// all of them again.
    pub fn keep_to_offers(&self, on: bool) -> Result<()> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
        cap.args[0] = on.into();
        self.fd.enable_cap(&cap).map_err(Error::call(format!("vCPU {}: KVM_CAP_ENFORCE_PV_FEATURE_CPUID", self.index)))
    }

    /// Finds out which MSRs there are to save. Once, at the guest's boot, after CPUID is set; the list is saved state.
    pub fn discover_msrs(&mut self, hypervisor: &Hypervisor) -> Result<()> {
        self.msr_list = msrs::discover(&self.fd, &hypervisor.msr_index_list()?);
        Ok(())
    }

    /// Lets `KVM_RUN` return at once from now on (or no more). Also completes what the last exit left pending.
    pub fn set_immediate_exit(&self, on: bool) {
        self.exit_flag.set(on);
    }

    /// Tells the guest's watchdogs that it stood still, before it runs again (PVCLOCK_GUEST_STOPPED).
    pub fn note_pause(&self) {
        // EINVAL where it has no kvmclock, as a guest that has not begun yet.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn exit_reason(&self) -> &AtomicU32 {
        // SAFETY: in the run page, which is mapped as long as self, and aligned.
        unsafe { self.exit_reason.0.as_ref() }
    }

    /// What the last exit asked for is done, or noted by whom it will be. To be called as soon as it is.
    pub fn exit_handled(&self) {
        // After all of that, as another process may see it.
        self.exit_reason().store(HANDLED, Ordering::Release);
    }

    /// Whether its last exit asked for something that nobody has done.
    pub fn has_unhandled_exit(&self) -> bool {
        let reason = self.exit_reason().load(Ordering::Acquire);
        ![HANDLED, KVM_EXIT_UNKNOWN, KVM_EXIT_INTR].contains(&reason)
    }

    /// Runs the guest until something is to be done. Then [`Vcpu::exit_handled`].
    pub fn run(&mut self) -> Result<Exit<'_>> {
        let page = NonNull::from(self.fd.get_kvm_run());
        // SAFETY: the shared run page is mapped as long as self; after an I/O exit its `io` is what KVM has filled in.
        let io_size = || usize::from(unsafe { (*page.as_ptr()).__bindgen_anon_1.io.size }).max(1);
        match self.fd.run() {
            Ok(exit) => Ok(match exit {
                VcpuExit::IoIn(port, data) => Exit::IoIn(port, io_size(), data),
                VcpuExit::IoOut(port, data) => Exit::IoOut(port, io_size(), data),
                VcpuExit::MmioRead(addr, data) => Exit::MmioRead(addr, data),
                VcpuExit::MmioWrite(addr, data) => Exit::MmioWrite(addr, data),
                VcpuExit::Shutdown => Exit::Reset,
                VcpuExit::Intr => Exit::Interrupted,
                VcpuExit::InternalError => {
                    // SAFETY: the run page, see above; after this exit its `internal` is what KVM has filled in.
                    let suberror = unsafe { (*page.as_ptr()).__bindgen_anon_1.internal.suberror };
                    Exit::Failed(format!("KVM_EXIT_INTERNAL_ERROR, {}", internal_error(suberror)))
                }
                VcpuExit::FailEntry(reason, cpu) => {
                    Exit::Failed(format!("KVM_EXIT_FAIL_ENTRY, reason {reason:#x} on host CPU {cpu}"))
                }
                VcpuExit::MemoryFault { gpa, .. } => Exit::Failed(format!(
                    "the page of the guest's memory at {gpa:#x} cannot be had: is the host, or a cgroup, out of (huge) \
                     pages?"
                )),
                other => Exit::Failed(format!("unexpected exit {other:?}")),
            }),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => Ok(Exit::Interrupted),
            Err(error) if error.errno() == libc::EFAULT => {
                let what = "KVM_RUN: is the host, or a cgroup, out of (huge) pages?";
                Err(Error::call(format!("vCPU {}: {what}", self.index))(error))
            }
            Err(error) => Err(Error::call(format!("vCPU {}: KVM_RUN", self.index))(error)),
        }
    }
}

/// Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR.
fn internal_error(suberror: u32) -> String {
    let what = match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an exception while another was being emulated",
        3 => "an exit while an event was being delivered",
        4 => "an exit reason that KVM does not know",
        _ => "of a kind that this build does not know",
    };
    format!("suberror {suberror} ({what}): the host's kernel log may say more")
}
