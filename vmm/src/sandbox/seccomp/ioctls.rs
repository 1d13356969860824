//! The ioctls by whose number a filter lets a call of ioctl(2) pass: the low 16 bits, type and number
//! (include/uapi/asm-generic/ioctl.h). Who handles an ioctl compares all of it: one with another size or direction is
//! nobody's.
//!
//! The fd is not looked at, so that a number stands for whatever it means to any: VFIO_IOMMU_MAP_DMA of a container is
//! VFIO_DEVICE_PCI_HOT_RESET of a device.

/// Which do `KVM_RUN` and what belongs to one vCPU or its exits. That one first, as it is by far the most frequent.
pub(super) const VCPU: &[u32] = &[
    kvm(0x80), // KVM_RUN
    kvm(0x61), // KVM_IRQ_LINE
    kvm(0xa5), // KVM_SIGNAL_MSI, KVM_SET_XSAVE
    kvm(0x6a), // KVM_SET_GSI_ROUTING
    kvm(0x76), // KVM_IRQFD
    kvm(0x79), // KVM_IOEVENTFD
    kvm(0x46), // KVM_SET_USER_MEMORY_REGION, of a BAR
    kvm(0x41), // KVM_CREATE_VCPU
    kvm(0x02), // KVM_GET_MSR_INDEX_LIST
    kvm(0x03), // KVM_CHECK_EXTENSION
    kvm(0x04), // KVM_GET_VCPU_MMAP_SIZE
    kvm(0x81), // KVM_GET_REGS
    kvm(0x82), // KVM_SET_REGS
    kvm(0x83), // KVM_GET_SREGS
    kvm(0x84), // KVM_SET_SREGS
    kvm(0x88), // KVM_GET_MSRS
    kvm(0x89), // KVM_SET_MSRS
    kvm(0x8e), // KVM_GET_LAPIC
    kvm(0x8f), // KVM_SET_LAPIC
    kvm(0x90), // KVM_SET_CPUID2
    kvm(0x98), // KVM_GET_MP_STATE
    kvm(0x99), // KVM_SET_MP_STATE
    kvm(0x9c), // KVM_X86_SETUP_MCE
    kvm(0x9d), // KVM_X86_GET_MCE_CAP_SUPPORTED
    kvm(0x9e), // KVM_X86_SET_MCE
    kvm(0x9f), // KVM_GET_VCPU_EVENTS
    kvm(0xa0), // KVM_SET_VCPU_EVENTS
    kvm(0xa1), // KVM_GET_DEBUGREGS
    kvm(0xa2), // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
    kvm(0xa3), // KVM_ENABLE_CAP, KVM_GET_TSC_KHZ
    kvm(0xa4), // KVM_GET_XSAVE
    kvm(0xa6), // KVM_GET_XCRS
    kvm(0xa7), // KVM_SET_XCRS
    kvm(0xad), // KVM_KVMCLOCK_CTRL
    kvm(0xbe), // KVM_GET_NESTED_STATE
    kvm(0xbf), // KVM_SET_NESTED_STATE
    kvm(0xcc), // KVM_GET_SREGS2
    kvm(0xcd), // KVM_SET_SREGS2
    kvm(0xcf), // KVM_GET_XSAVE2
    kvm(0xe1), // KVM_SET_DEVICE_ATTR
    kvm(0xe2), // KVM_GET_DEVICE_ATTR
    vfio(9),   // VFIO_DEVICE_GET_IRQ_INFO
    vfio(10),  // VFIO_DEVICE_SET_IRQS
    vfio(11),  // VFIO_DEVICE_RESET
    vfio(13),  // VFIO_IOMMU_MAP_DMA
    vfio(14),  // VFIO_IOMMU_UNMAP_DMA
];

/// Beside those: what a whole machine is made of, saved and restored by.
pub(super) const MACHINE: &[u32] = &[
    kvm(0x00), // KVM_GET_API_VERSION
    kvm(0x01), // KVM_CREATE_VM
    kvm(0x05), // KVM_GET_SUPPORTED_CPUID
    kvm(0x47), // KVM_SET_TSS_ADDR
    kvm(0x48), // KVM_SET_IDENTITY_MAP_ADDR
    kvm(0x60), // KVM_CREATE_IRQCHIP
    kvm(0x62), // KVM_GET_IRQCHIP
    kvm(0x63), // KVM_SET_IRQCHIP
    kvm(0x77), // KVM_CREATE_PIT2
    kvm(0x7b), // KVM_SET_CLOCK
    kvm(0x7c), // KVM_GET_CLOCK
    kvm(0x9a), // KVM_NMI
    kvm(0xd5), // KVM_PRE_FAULT_MEMORY
    kvm(0xe0), // KVM_CREATE_DEVICE
    vfio(0),   // VFIO_GET_API_VERSION
    vfio(1),   // VFIO_CHECK_EXTENSION
    vfio(2),   // VFIO_SET_IOMMU
    vfio(3),   // VFIO_GROUP_GET_STATUS
    vfio(4),   // VFIO_GROUP_SET_CONTAINER
    vfio(6),   // VFIO_GROUP_GET_DEVICE_FD
    vfio(7),   // VFIO_DEVICE_GET_INFO
    vfio(8),   // VFIO_DEVICE_GET_REGION_INFO
];

/// What kind of a file it is, and whose terminal.
pub(super) const LOOKED_AT: &[u32] = &[
    0x5401, // TCGETS
    0x540f, // TIOCGPGRP
    0x5413, // TIOCGWINSZ
    0x542a, // TCGETS2
];

/// Of terminals (include/uapi/asm-generic/ioctls.h). Not TIOCSTI, which types into one.
pub(super) const TERMINAL: &[u32] = &[
    0x5401, // TCGETS
    0x5402, // TCSETS
    0x5403, // TCSETSW
    0x5404, // TCSETSF
    0x540f, // TIOCGPGRP
    0x5413, // TIOCGWINSZ
    0x541b, // FIONREAD
    0x5429, // TIOCGSID
    0x542a, // TCGETS2
    0x542b, // TCSETS2
    0x5430, // TIOCGPTN
    0x5431, // TIOCSPTLCK
    0x5441, // TIOCGPTPEER
];

/// FIONBIO, by which a socket is told not to block.
pub(super) const NONBLOCK: &[u32] = &[0x5421];

/// Of the keeper's death: what a group's device holds is let go (KVM_DEV_VFIO_FILE_DEL).
pub(super) const ENDING: &[u32] = &[kvm(0xe1)];

const fn kvm(number: u32) -> u32 {
    0xae00 | number
}

/// VFIO_BASE and on.
const fn vfio(number: u32) -> u32 {
    0x3b00 | (100 + number)
}
