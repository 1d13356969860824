use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12], max_leaf: u32) -> kvm_cpuid_entry2 {
    let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, 0, [max_leaf, part(0), part(8), part(4)])
}

fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"GenuineIntel", 0x1F),
        leaf(1, 0, [0x806F8, 0x0D10_0800, 1 << 5, 0x0FFF_FFFF]),
        leaf(4, 0, [0xFC00_4121, 0, 0, 0]), // L1d
        leaf(4, 3, [0xFC1F_C163, 0, 0, 0]), // L3
        leaf(4, 4, [0, 0, 0, 0]),
        leaf(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0xB, 0, [1, 2, 0x100, 0x55]),
        leaf(0xD, 0, [7, 0, 0, 0]),
        leaf(0x12, 0, [1, 0, 0, 0]),
        leaf(0x1D, 0, [1, 0, 0, 0]),
        leaf(0x1F, 0, [1, 2, 0x100, 0x55]),
        leaf(0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0008, 0, [0x3034, 0, 0, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"AuthenticAMD", 0xD),
        leaf(1, 0, [0xA00F11, 0x0D10_0800, 0, 0x0FFF_FFFF]),
        leaf(0x8000_0000, 0, [0x8000_001F, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 1 << 2, 0]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0x407F, 0]),
        leaf(0x8000_000A, 0, [1, 0, 0, 0]),
        leaf(0x8000_001D, 0, [0x4121, 0, 0, 0]),
        leaf(0x8000_001D, 3, [0x3C163, 0, 0, 0]),
        leaf(0x8000_001E, 0, [9, 0x109, 3, 0]),
    ]
}

fn options(vcpus: u32) -> CpuidOptions<'static> {
    CpuidOptions { vcpus, tsc_deadline: true, nested: false, hidden: &[] }
}

fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *find(entries, function, index).unwrap_or_else(|| panic!("leaf {function:#x}.{index}"))
}

#[test]
fn intel_topology() {
    for (vcpus, id_bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (64, 6)] {
        let guest = GuestCpuid::new(&intel(), &options(vcpus));
        for id in 0..vcpus {
            let entries = guest.for_vcpu(id);
            let features = get(&entries, 1, 0);
            assert_eq!(features.ebx, id << 24 | vcpus << 16 | 0x0800);
            assert_eq!(features.edx >> 28 & 1, u32::from(vcpus > 1), "HTT");
            for function in [0xB, 0x1F] {
                let thread = get(&entries, function, 0);
                assert_eq!((thread.eax, thread.ebx, thread.ecx, thread.edx), (0, 1, 0x100, id));
                let core = get(&entries, function, 1);
                assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (id_bits, vcpus, 0x201, id));
                assert_eq!(get(&entries, function, 2).ecx, 2);
            }
            let ids_less_one = (1u32 << id_bits) - 1;
            assert_eq!(get(&entries, 4, 0).eax, ids_less_one << 26 | 0x0121);
            assert_eq!(get(&entries, 4, 3).eax, ids_less_one << 26 | ids_less_one << 14 | 0x0163);
            assert_eq!(get(&entries, 4, 4).eax, 0);
        }
    }
}

#[test]
fn amd_topology() {
    let entries = GuestCpuid::new(&amd(), &options(4)).for_vcpu(3);
    assert_eq!(get(&entries, 1, 0).ebx, 3 << 24 | 4 << 16 | 0x0800);
    assert_eq!(get(&entries, 0x8000_0008, 0).ecx, 2 << 12 | 3);
    assert_eq!(get(&entries, 0x8000_0001, 0).ecx, 1 << 1, "CMP_LEGACY, no SVM");
    let topology = get(&entries, 0x8000_001E, 0);
    assert_eq!((topology.eax, topology.ebx, topology.ecx), (3, 3, 0));
    assert_eq!(get(&entries, 0x8000_001D, 0).eax, 0x0121);
    assert_eq!(get(&entries, 0x8000_001D, 3).eax, 3 << 14 | 0x0163);
    assert_eq!(get(&entries, 0xB, 1).edx, 3);
    assert!(find(&entries, 0x1F, 0).is_none() && find(&entries, 0x8000_000A, 0).is_none());
}

#[test]
fn features() {
    let entries = GuestCpuid::new(&intel(), &options(1)).for_vcpu(0);
    assert_eq!(get(&entries, 1, 0).ecx, ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE, "and no VMX");
    assert_eq!(get(&entries, 0x4000_0001, 0).eax, KVM_FEATURES);
    let leaf7 = get(&entries, 7, 0);
    assert_eq!(!leaf7.ebx, bits(&[2, 25]));
    assert_eq!(!leaf7.ecx, bits(&[7, 30]));
    assert_eq!(!leaf7.edx, bits(&[22, 24, 25]), "no AMX without tile state");
    assert!(find(&entries, 0x12, 0).is_none() && find(&entries, 0x1D, 0).is_none());
    assert_eq!(phys_bits(&entries), 0x34);
    assert_eq!(phys_bits(&[]), DEFAULT_PHYS_BITS);
    assert_eq!(phys_bits(&[leaf(LEAF_ADDRESS_SIZES, 0, [0x0030_3934, 0, 0, 0])]), 48);

    let no_deadline = CpuidOptions { tsc_deadline: false, nested: true, ..options(1) };
    let entries = GuestCpuid::new(&intel(), &no_deadline).for_vcpu(0);
    assert_eq!(get(&entries, 1, 0).ecx, ECX_HYPERVISOR | ECX_X2APIC | 1 << 5);
}

#[test]
fn a_build_can_hide_more() {
    let hidden = [Hidden { function: 1, index: 0, register: Register::Ecx, bits: ECX_X2APIC }];
    let base = GuestCpuid::new(&intel(), &options(2)).for_vcpu(1);
    let less = GuestCpuid::new(&intel(), &CpuidOptions { hidden: &hidden, ..options(2) }).for_vcpu(1);
    let different: Vec<_> = base.iter().zip(&less).filter(|(a, b)| a != b).map(|(a, _)| a.function).collect();
    assert_eq!((base.len(), different), (less.len(), vec![1]));
}
