//! Which of KVM's own MSRs a guest may use: those whose feature its CPUID offers (KVM_CAP_ENFORCE_PV_FEATURE_CPUID).
//!
//! A guest of an earlier build could use all of them. It is kept to what it was offered if it has not; one that has
//! keeps what it uses.

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};

const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const MSR_KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

/// (MSR, the feature that it needs): kvm_set_msr_common, Documentation/virt/kvm/x86/cpuid.rst.
const NEEDS: [(u32, u32); 11] = [
    (0x11, 0),                  // WALL_CLOCK
    (0x12, 0),                  // SYSTEM_TIME
    (0x4b56_4d00, 3),           // WALL_CLOCK_NEW
    (0x4b56_4d01, 3),           // SYSTEM_TIME_NEW
    (0x4b56_4d02, 4),           // ASYNC_PF_EN
    (0x4b56_4d03, 5),           // STEAL_TIME
    (0x4b56_4d04, 6),           // PV_EOI_EN
    (MSR_KVM_POLL_CONTROL, 12), // POLL_CONTROL
    (0x4b56_4d06, 14),          // ASYNC_PF_INT
    (0x4b56_4d07, 14),          // ASYNC_PF_ACK
    (0x4b56_4d08, 17),          // MIGRATION_CONTROL
];

/// What a CPUID offers: EAX of its leaf.
fn features(cpuid: &[kvm_cpuid_entry2]) -> u32 {
    cpuid.iter().find(|leaf| leaf.function == LEAF_KVM_FEATURES).map_or(0, |leaf| leaf.eax)
}

fn is_offered(features: u32, index: u32) -> bool {
    NEEDS.iter().all(|(msr, feature)| *msr != index || features & 1 << feature != 0)
}

/// As a new vCPU has it.
fn is_untouched(msr: &kvm_msr_entry) -> bool {
    msr.data == u64::from(msr.index == MSR_KVM_POLL_CONTROL)
}

/// Whether the guest has kept to what it was offered, and so can be made to.
pub(super) fn kept(cpuid: &[kvm_cpuid_entry2], msrs: &[kvm_msr_entry]) -> bool {
    let features = features(cpuid);
    msrs.iter().all(|msr| is_offered(features, msr.index) || is_untouched(msr))
}

/// The MSRs that there are for it.
pub(super) fn existing(cpuid: &[kvm_cpuid_entry2], msrs: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let (all, features) = (!kept(cpuid, msrs), features(cpuid));
    msrs.iter().filter(|msr| all || is_offered(features, msr.index)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(features: u32) -> [kvm_cpuid_entry2; 1] {
        [kvm_cpuid_entry2 { function: LEAF_KVM_FEATURES, eax: features, ..Default::default() }]
    }

    fn msrs(values: &[(u32, u64)]) -> Vec<kvm_msr_entry> {
        values.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect()
    }

    fn indices(cpuid: &[kvm_cpuid_entry2], msrs: &[kvm_msr_entry]) -> Vec<u32> {
        existing(cpuid, msrs).iter().map(|msr| msr.index).collect()
    }

    #[test]
    fn what_was_not_offered_goes_if_it_was_not_used() {
        let cpuid = leaves(1 << 6);
        let old = msrs(&[(0x10, 5), (0x4b56_4d02, 0), (0x4b56_4d04, 3), (MSR_KVM_POLL_CONTROL, 1)]);
        assert!(kept(&cpuid, &old));
        assert_eq!(indices(&cpuid, &old), [0x10, 0x4b56_4d04]);
        let used = msrs(&[(0x4b56_4d02, 0x1009), (0x4b56_4d06, 0), (0x4b56_4d04, 3)]);
        assert!(!kept(&cpuid, &used));
        assert_eq!(indices(&cpuid, &used), [0x4b56_4d02, 0x4b56_4d06, 0x4b56_4d04], "it goes on as it was");
    }
}
