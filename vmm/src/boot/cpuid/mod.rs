//! The guest's CPUID, from what KVM supports: made at the boot of the guest, saved with it, never computed again for a
//! running guest.
//!
//! References: Intel SDM volume 2, CPUID; AMD64 APM volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.

pub(crate) mod timing;
mod topology;

use kvm_bindings::kvm_cpuid_entry2;
use theseus_hypervisor::vcpu::mce::Vendor;

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_XSTATE: u32 = 0xD;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_EXTENDED_MAX: u32 = 0x8000_0000;
/// AMD's "RAS capabilities" in EBX.
const LEAF_POWER: u32 = 0x8000_0007;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// McaOverflowRecov and SUCCOR: without them an AMD guest takes every uncorrectable memory error as fatal. KVM's
/// machine check banks are good for it (vcpu/mce.rs), but KVM_GET_SUPPORTED_CPUID leaves it to the VMM.
const EBX_MCA_RECOVERY: u32 = bits(&[0, 1]);

/// What the CPUs without a leaf 0x80000008 have.
const DEFAULT_PHYS_BITS: u8 = 36;

/// KVM's paravirtual features that a guest gets. All others stay hidden, new ones too until somebody has looked at
/// them:
/// - asynchronous page faults (4, 10, 14): faults in flight are state that no ioctl returns, and pinned memory has
///   none;
/// - MSI_EXT_DEST_ID (15), HC_MAP_GPA_RANGE (16), MIGRATION_CONTROL (17): need a VMM that takes part;
/// - MMU_OP (2): no kernel has it any more.
const KVM_FEATURES: u32 = bits(&[
    0,  // CLOCKSOURCE
    1,  // NOP_IO_DELAY
    3,  // CLOCKSOURCE2
    5,  // STEAL_TIME: an MSR and guest memory
    6,  // PV_EOI: KVM takes its bit back at every exit
    7,  // PV_UNHALT: whoever may have been kicked is kicked again
    9,  // PV_TLB_FLUSH: only the steal time page
    11, // PV_SEND_IPI: no state
    12, // POLL_CONTROL: an MSR, in the MSR index list
    13, // PV_SCHED_YIELD: no state
    24, // CLOCKSOURCE_STABLE
]);

/// Needs SGX memory from the VMM, or is host state that is not carried. SHSTK: its SSP is no MSR.
const UNSUPPORTED: &[Hidden] = &[
    Hidden { function: 7, index: 0, register: Register::Ebx, bits: bits(&[2, 25]) }, // SGX, Intel PT
    Hidden { function: 7, index: 0, register: Register::Ecx, bits: bits(&[7, 30]) }, // SHSTK, SGX_LC
    Hidden { function: 7, index: 1, register: Register::Edx, bits: bits(&[18]) },    // CET_SSS
];
const UNSUPPORTED_LEAVES: &[u32] = &[0x12, 0x14];

const NESTED: &[Hidden] = &[
    Hidden { function: LEAF_FEATURES, index: 0, register: Register::Ecx, bits: bits(&[5]) }, // VMX
    Hidden { function: 0x8000_0001, index: 0, register: Register::Ecx, bits: bits(&[2]) },   // SVM
];
const NESTED_LEAVES: &[u32] = &[0x8000_000A];

/// AMX exists only if the process asked for the tile state (ARCH_REQ_XCOMP_GUEST_PERM) before it asked KVM what it
/// supports; KVM reports the features in any case.
const XCR0_TILES: u32 = bits(&[17, 18]);
const AMX: &[Hidden] = &[
    Hidden { function: 7, index: 0, register: Register::Edx, bits: bits(&[22, 24, 25]) },
    Hidden { function: 7, index: 1, register: Register::Eax, bits: bits(&[21]) },
    Hidden { function: 7, index: 1, register: Register::Edx, bits: bits(&[8]) },
];
const AMX_LEAVES: &[u32] = &[0x1D, 0x1E];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Bits that a guest does not get to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hidden {
    pub function: u32,
    /// Subleaf; 0 for leaves without.
    pub index: u32,
    pub register: Register,
    pub bits: u32,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct CpuidOptions<'a> {
    /// 1 to `MAX_VCPUS`: one socket of as many cores with one thread each.
    pub vcpus: u32,
    /// KVM_CAP_TSC_DEADLINE_TIMER: KVM leaves the bit out of what it supports because it needs the in-kernel LAPIC.
    pub tsc_deadline: bool,
    /// Whether the guest may run guests of its own; then its nested state has to be carried.
    pub nested: bool,
    /// What this build hides besides, from guests that it boots.
    pub hidden: &'a [Hidden],
}

/// The CPUID of all vCPUs of a guest.
#[derive(Debug, Clone)]
pub(crate) struct GuestCpuid {
    common: Vec<kvm_cpuid_entry2>,
}

impl GuestCpuid {
    /// `supported` is what KVM_GET_SUPPORTED_CPUID returned.
    pub(crate) fn new(supported: &[kvm_cpuid_entry2], options: &CpuidOptions) -> Self {
        let vcpus = options.vcpus.clamp(1, super::MAX_VCPUS);
        let mut common = supported.to_vec();

        hide(&mut common, UNSUPPORTED, UNSUPPORTED_LEAVES);
        if !options.nested {
            hide(&mut common, NESTED, NESTED_LEAVES);
        }
        let has_tiles = find(&common, LEAF_XSTATE, 0).is_some_and(|leaf| leaf.eax & XCR0_TILES == XCR0_TILES);
        if !has_tiles {
            hide(&mut common, AMX, AMX_LEAVES);
        }
        let is_amd = Vendor::of(&common) == Vendor::Amd;
        for leaf in common.iter_mut() {
            match leaf.function {
                LEAF_FEATURES => {
                    leaf.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
                    set(&mut leaf.ecx, ECX_TSC_DEADLINE, options.tsc_deadline);
                }
                LEAF_POWER if is_amd => leaf.ebx |= EBX_MCA_RECOVERY,
                LEAF_KVM_FEATURES => leaf.eax &= KVM_FEATURES,
                _ => {}
            }
        }
        topology::describe(&mut common, vcpus);
        // Last, so that it holds for the bits set here too.
        hide(&mut common, options.hidden, &[]);
        Self { common }
    }

    /// For KVM_SET_CPUID2 of vCPU `index`, whose APIC id is `index`.
    pub(crate) fn for_vcpu(&self, index: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.common.clone();
        topology::set_apic_id(&mut entries, index);
        entries.sort_by_key(|leaf| (leaf.function, leaf.index));
        entries
    }
}

/// Bits of the guest physical addresses that KVM can map.
pub(crate) fn phys_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    find(entries, LEAF_ADDRESS_SIZES, 0).map_or(DEFAULT_PHYS_BITS, |leaf| {
        // Newer kernels put a second size at bits 16 to 23, for when the page tables of KVM reach less far than the
        // CPU.
        let (cpu, mappable) = (leaf.eax as u8, (leaf.eax >> 16) as u8);
        if mappable == 0 { cpu } else { cpu.min(mappable) }
    })
}

fn hide(entries: &mut Vec<kvm_cpuid_entry2>, hidden: &[Hidden], leaves: &[u32]) {
    entries.retain(|leaf| !leaves.contains(&leaf.function));
    for hidden in hidden {
        for leaf in entries.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (hidden.function, hidden.index)) {
            let register = match hidden.register {
                Register::Eax => &mut leaf.eax,
                Register::Ebx => &mut leaf.ebx,
                Register::Ecx => &mut leaf.ecx,
                Register::Edx => &mut leaf.edx,
            };
            *register &= !hidden.bits;
        }
    }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|leaf| (leaf.function, leaf.index) == (function, index))
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < positions.len() {
        mask |= 1 << positions[at];
        at += 1;
    }
    mask
}

#[cfg(test)]
mod tests;
