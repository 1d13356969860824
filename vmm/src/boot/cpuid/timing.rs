//! The frequency of the TSC, where guests look for it that do not use kvmclock. It is known once there is a vCPU.

use kvm_bindings::kvm_cpuid_entry2;

use super::find;

const LEAF_TSC: u32 = 0x15;
const LEAF_FREQUENCIES: u32 = 0x16;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// VMware's, of which KVM guests know too: frequencies of TSC and LAPIC timer in kHz.
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// KVM's LAPIC timers count nanoseconds (APIC_BUS_CYCLE_NS), and an Intel guest takes the crystal for what drives them
/// (SDM 3A, 12.5.4).
const CRYSTAL_KHZ: u32 = 1_000_000;
/// Linux multiplies the numerator with the crystal's kHz in 32 bits (native_calibrate_tsc).
const MAX_NUMERATOR: u32 = u32::MAX / CRYSTAL_KHZ;

/// Adds the leaves to the CPUID of a guest that is about to boot. `tsc_khz`: 0 if unknown.
pub(crate) fn describe(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    if tsc_khz == 0 {
        return;
    }
    if let Some(root) = entries.iter_mut().find(|leaf| leaf.function == LEAF_HYPERVISOR) {
        root.eax = root.eax.max(LEAF_HYPERVISOR_TIMING);
        put(entries, LEAF_HYPERVISOR_TIMING, [tsc_khz, CRYSTAL_KHZ, 0, 0]);
    }
    // Both are Intel's.
    let Some(root) = find(entries, 0, 0).copied().filter(|root| [root.ebx, root.edx, root.ecx] == INTEL) else {
        return;
    };
    if root.eax >= LEAF_TSC {
        let (numerator, denominator) = ratio(tsc_khz);
        put(entries, LEAF_TSC, [denominator, numerator, CRYSTAL_KHZ.saturating_mul(1000), 0]);
    }
    if root.eax >= LEAF_FREQUENCIES {
        let mhz = tsc_khz.saturating_add(500) / 1000;
        put(entries, LEAF_FREQUENCIES, [mhz, mhz, 100, 0]);
    }
    entries.sort_by_key(|leaf| (leaf.function, leaf.index));
}

const INTEL: [u32; 3] = [u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ineI"), u32::from_le_bytes(*b"ntel")];

fn put(entries: &mut Vec<kvm_cpuid_entry2>, function: u32, registers: [u32; 4]) {
    entries.retain(|leaf| leaf.function != function);
    let [eax, ebx, ecx, edx] = registers;
    entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() });
}

/// (numerator, denominator) of the TSC's frequency over the crystal's, as near as small numbers come: less than 1 in
/// 10^6 off.
fn ratio(tsc_khz: u32) -> (u32, u32) {
    let (tsc, crystal) = (u64::from(tsc_khz), u64::from(CRYSTAL_KHZ));
    let candidates =
        (1..=u64::from(MAX_NUMERATOR)).map(|denominator| ((tsc * denominator + crystal / 2) / crystal, denominator));
    let usable = candidates.filter(|(numerator, _)| (1..=u64::from(MAX_NUMERATOR)).contains(numerator));
    // Distances over one denominator each: |n * crystal - tsc * d| / d.
    let best = usable.min_by_key(|(n, d)| (n * crystal).abs_diff(tsc * d).saturating_mul(1 << 20) / d);
    best.map_or((1, 1), |(numerator, denominator)| (numerator as u32, denominator as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let mut entries = Vec::new();
        put(&mut entries, function, registers);
        entries[0]
    }

    #[test]
    fn ratios_are_near_and_fit() {
        for khz in [800_000, 1_996_247, 2_000_000, 2_399_998, 2_999_999, 3_700_123, 4_200_000] {
            let (numerator, denominator) = ratio(khz);
            let linux = CRYSTAL_KHZ.checked_mul(numerator).unwrap() / denominator;
            assert!(linux.abs_diff(khz) <= 1 + khz / 1_000_000, "{khz}: {numerator}/{denominator} is {linux}");
        }
        assert_eq!(ratio(2_400_000), (12, 5));
    }

    #[test]
    fn each_vendor_gets_its_leaves() {
        let kvm = leaf(LEAF_HYPERVISOR, [0x4000_0001, 0, 0, 0]);
        let mut intel = vec![leaf(0, [0x1F, INTEL[0], INTEL[2], INTEL[1]]), leaf(LEAF_TSC, [0; 4]), kvm];
        describe(&mut intel, 2_400_000);
        let functions: Vec<_> = intel.iter().map(|leaf| leaf.function).collect();
        assert_eq!(functions, [0, LEAF_TSC, LEAF_FREQUENCIES, LEAF_HYPERVISOR, LEAF_HYPERVISOR_TIMING]);
        assert_eq!((intel[1].eax, intel[1].ebx, intel[1].ecx), (5, 12, 1_000_000_000));
        assert_eq!((intel[3].eax, intel[4].eax, intel[4].ebx), (LEAF_HYPERVISOR_TIMING, 2_400_000, 1_000_000));
        let mut amd = vec![leaf(0, [0x1F, 1, 2, 3]), kvm];
        describe(&mut amd, 2_400_000);
        assert_eq!(amd.len(), 3);
        let before = intel.clone();
        describe(&mut intel, 0);
        assert_eq!(intel.len(), before.len());
    }
}
