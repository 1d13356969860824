//! One socket of N cores with one thread each. APIC id = core id = index of the vCPU.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use theseus_hypervisor::vcpu::mce::Vendor;

use super::{LEAF_ADDRESS_SIZES, LEAF_EXTENDED_MAX, LEAF_FEATURES, LEAF_VENDOR, find, set};

/// Cache parameters: Intel's leaf, and AMD's of the same form.
const LEAF_INTEL_CACHES: u32 = 4;
const LEAF_AMD_CACHES: u32 = 0x8000_001D;
/// Extended topology, and its second version.
const EXTENDED_TOPOLOGY: [u32; 2] = [0xB, 0x1F];
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001E;
/// AMD's third way to say it; left out, since leaf 0xB says it.
const LEAF_AMD_EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

const EDX_HTT: u32 = 1 << 28;
const ECX_CMP_LEGACY: u32 = 1 << 1;
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Caches from this level on are shared by all cores.
const SHARED_CACHE_LEVEL: u32 = 3;

/// Describes all that is the same for each vCPU.
pub(super) fn describe(entries: &mut Vec<kvm_cpuid_entry2>, vcpus: u32) {
    let amd = Vendor::of(entries) == Vendor::Amd;
    let max_leaf = find(entries, LEAF_VENDOR, 0).map_or(0, |leaf| leaf.eax);
    let max_extended = find(entries, LEAF_EXTENDED_MAX, 0).map_or(0, |leaf| leaf.eax);
    let id_bits = core_id_bits(vcpus);

    entries.retain(|leaf| {
        !EXTENDED_TOPOLOGY.contains(&leaf.function)
            && leaf.function != LEAF_AMD_EXTENDED_TOPOLOGY
            && (amd || leaf.function != LEAF_AMD_TOPOLOGY)
    });
    for leaf in entries.iter_mut() {
        match leaf.function {
            LEAF_FEATURES => {
                leaf.ebx = (leaf.ebx & 0x0000_FFFF) | vcpus << 16;
                set(&mut leaf.edx, EDX_HTT, vcpus > 1);
            }
            LEAF_INTEL_CACHES if !amd => share_cache(leaf, id_bits, true),
            LEAF_AMD_CACHES if amd => share_cache(leaf, id_bits, false),
            LEAF_AMD_FEATURES if amd => set(&mut leaf.ecx, ECX_CMP_LEGACY, vcpus > 1),
            // ApicIdSize and the number of cores less one; KVM keeps the host's.
            LEAF_ADDRESS_SIZES if amd => leaf.ecx = (leaf.ecx & !0xF0FF) | id_bits << 12 | (vcpus - 1),
            // One thread a core, one node.
            LEAF_AMD_TOPOLOGY => (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0),
            _ => {}
        }
    }
    for function in EXTENDED_TOPOLOGY.into_iter().filter(|function| *function <= max_leaf) {
        // AMD has no leaf 0x1F.
        if !(amd && function == 0x1F) {
            entries.extend(extended_topology(function, vcpus, id_bits));
        }
    }
    let has_amd_topology = find(entries, LEAF_AMD_TOPOLOGY, 0).is_some();
    if amd && max_extended >= LEAF_AMD_TOPOLOGY && !has_amd_topology {
        entries.push(kvm_cpuid_entry2 { function: LEAF_AMD_TOPOLOGY, ..Default::default() });
    }
}

/// Puts the APIC id where leaves hold one.
pub(super) fn set_apic_id(entries: &mut [kvm_cpuid_entry2], apic_id: u32) {
    for leaf in entries {
        match leaf.function {
            LEAF_FEATURES => leaf.ebx = (leaf.ebx & 0x00FF_FFFF) | apic_id << 24,
            LEAF_AMD_TOPOLOGY => {
                leaf.eax = apic_id;
                leaf.ebx = (leaf.ebx & !0xFF) | (apic_id & 0xFF);
            }
            function if EXTENDED_TOPOLOGY.contains(&function) => leaf.edx = apic_id,
            _ => {}
        }
    }
}

/// Bits of an APIC id that number the cores of a socket.
fn core_id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// EAX[25:14]: ids that share this cache, less one. EAX[31:26], Intel only: core ids in the socket, less one.
fn share_cache(leaf: &mut kvm_cpuid_entry2, id_bits: u32, core_ids: bool) {
    let (kind, level) = (leaf.eax & 0x1F, leaf.eax >> 5 & 0x7);
    if kind == 0 {
        return;
    }
    let ids_less_one = (1 << id_bits) - 1;
    let sharing = if level >= SHARED_CACHE_LEVEL { ids_less_one } else { 0 };
    leaf.eax = (leaf.eax & 0x3FFF) | sharing << 14;
    if core_ids {
        leaf.eax |= ids_less_one << 26;
    }
}

fn extended_topology(function: u32, vcpus: u32, id_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, id_bits, vcpus, LEVEL_CORE), level(2, 0, 0, 0)]
}
