//! KVM calls that kvm-ioctls does not wrap.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_pre_fault_memory, kvm_sregs2, kvm_x86_mce,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);
ioctl_iow_nr!(KVM_X86_SET_MCE, KVMIO, 0x9e, kvm_x86_mce);

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: a vCPU fd, and the kernel writes one kvm_sregs2.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: a vCPU fd, and the kernel reads one kvm_sregs2.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// The guest's TSC is the host's plus this (modulo 2^64).
pub(crate) fn tsc_offset(vcpu: &impl AsRawFd) -> io::Result<u64> {
    let mut offset = 0;
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: a vCPU fd; the kernel writes the u64 that `addr` points to, which outlives the call.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(offset)
}

pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, mut offset: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: a vCPU fd; the kernel reads the u64 that `addr` points to, which outlives the call.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}

/// What of IA32_MCG_CAP can be given to a guest; 0 where KVM does not say.
pub(crate) fn supported_mce(kvm: &impl AsRawFd) -> u64 {
    let mut cap = 0u64;
    // SAFETY: /dev/kvm, and the kernel writes one u64.
    let read = unsafe { ioctl_with_mut_ref(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut cap) };
    if read < 0 { 0 } else { cap }
}

pub(crate) fn setup_mce(vcpu: &VcpuFd, cap: u64) -> io::Result<()> {
    // SAFETY: a vCPU fd, and the kernel reads one u64.
    check(unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &cap) })
}

pub(crate) fn set_mce(vcpu: &VcpuFd, mce: &kvm_x86_mce) -> io::Result<()> {
    // SAFETY: a vCPU fd, and the kernel reads one kvm_x86_mce.
    check(unsafe { ioctl_with_ref(vcpu, KVM_X86_SET_MCE(), mce) })
}

/// `range` is then what is left of it.
pub(crate) fn pre_fault_memory(vcpu: &VcpuFd, range: &mut kvm_pre_fault_memory) -> io::Result<()> {
    // SAFETY: a vCPU fd, and the kernel reads and writes one kvm_pre_fault_memory.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), range) })
}
