//! State that KVM gives and does not take back: an update that meets it is undone, and this names the register that it
//! was, which KVM does not.
//!
//! KVM checks on KVM_SET_SREGS2 and KVM_SET_MSRS what a guest can change without being checked. Writing the state back
//! into the old vCPU would find out, and do harm (it rewrites the wall clock in guest RAM, restarts LAPIC timers, drops
//! MMU roots): so these are the rules.

use std::ops::Range;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};

use super::state::{Sregs, VcpuState};

const CR0_PE: u64 = 1 << 0;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Linear address masking, which is no part of the address (CPUID 7.1, EAX bit 26).
const CR3_LAM: u64 = 3 << 61;

pub(super) const MSR_KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
pub(super) const MSR_KVM_PV_EOI_EN: u32 = 0x4b56_4d04;

const ENABLED: u64 = 1 << 0;
const ASYNC_PF_DELIVERY_AS_INT: u64 = 1 << 3;

/// Why KVM would not take this vCPU's state, by register and value; empty if it would. `memory` is what the VM's
/// memslots cover.
///
/// Not looked at is what a guest cannot change without KVM's own check of the same rule: reserved bits of CR4 and EFER,
/// XCR0, DR6 and DR7.
pub fn reasons(state: &VcpuState, memory: &[Range<u64>]) -> Vec<String> {
    let special = special_registers(&state.sregs, &state.cpuid);
    let msrs = state.msrs.iter().filter_map(|msr| unreachable(msr, memory));
    special.into_iter().chain(msrs).map(|reason| format!("vCPU {}: {reason}", state.index)).collect()
}

/// kvm_is_valid_sregs and kvm_is_valid_cr0, Linux 6.1 to 7.
fn special_registers(sregs: &Sregs, cpuid: &[kvm_cpuid_entry2]) -> Vec<String> {
    let [cr0, _, cr3, cr4, _, efer, ..] = sregs.control;
    let mut reasons = Vec::new();
    let mut refuse = |wrong: bool, what: String| reasons.extend(wrong.then_some(what));
    if efer & EFER_LME != 0 && cr0 & CR0_PG != 0 {
        refuse(cr4 & CR4_PAE == 0, format!("CR4 is {cr4:#x}: no PAE in long mode"));
        refuse(efer & EFER_LMA == 0, format!("EFER is {efer:#x}: no LMA with LME and paging"));
        let illegal = cr3 & !legal_address(cpuid) != 0;
        refuse(illegal, format!("CR3 is {cr3:#x}: beyond the guest's physical addresses"));
    } else {
        refuse(efer & EFER_LMA != 0, format!("EFER is {efer:#x}: LMA outside of long mode"));
        let cs = sregs.cs();
        let (selector, base) = (cs.selector, cs.base);
        refuse(cs.l != 0, format!("CS is {selector:#x} (base {base:#x}) with L = 1 outside of long mode"));
    }
    refuse(cr0 >> 32 != 0, format!("CR0 is {cr0:#x}: more than 32 bits"));
    refuse(cr0 & CR0_NW != 0 && cr0 & CR0_CD == 0, format!("CR0 is {cr0:#x}: NW without CD"));
    refuse(cr0 & CR0_PG != 0 && cr0 & CR0_PE == 0, format!("CR0 is {cr0:#x}: PG without PE"));
    reasons
}

/// The bits that an address in CR3 may have (kvm_vcpu_is_legal_cr3, cpuid_query_maxphyaddr).
fn legal_address(cpuid: &[kvm_cpuid_entry2]) -> u64 {
    let leaf = |function, index| cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
    let bits = leaf(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xFF);
    let masking = leaf(7, 1).is_some_and(|leaf| leaf.eax & 1 << 26 != 0);
    let address = 1u64.checked_shl(bits).map_or(u64::MAX, |end| end - 1);
    if masking { address | CR3_LAM } else { address }
}

/// An MSR with an address that KVM looks up when it is written (kvm_gfn_to_hva_cache_init), in memory that is not there
/// any more: a BAR that was switched off. Steal time and kvmclock are looked up at each use, and a write is not
/// refused.
fn unreachable(msr: &kvm_msr_entry, memory: &[Range<u64>]) -> Option<String> {
    let on = |bits: u64| msr.data & bits == bits;
    let (name, address, len) = match msr.index {
        MSR_KVM_PV_EOI_EN if on(ENABLED) => ("MSR_KVM_PV_EOI_EN", msr.data & !ENABLED, 1),
        MSR_KVM_ASYNC_PF_EN if on(ENABLED | ASYNC_PF_DELIVERY_AS_INT) => ("MSR_KVM_ASYNC_PF_EN", msr.data & !0x3F, 8),
        _ => return None,
    };
    // Neither crosses a page, nor so a memslot.
    let there = memory.iter().any(|range| range.contains(&address) && range.end - address >= len);
    (!there).then(|| format!("{name} is {:#x}: there is no memory at {address:#x}", msr.data))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: [Range<u64>; 2] = [0..0x2000_0000, 0xE000_0000..0xE000_4000];

    fn sregs(cr0: u64, cr3: u64, cr4: u64, efer: u64, cs_l: u8) -> Sregs {
        let mut sregs = VcpuState::empty().sregs;
        sregs.control = [cr0, 0, cr3, cr4, 0, efer, 0, 0];
        sregs.cs_mut().l = cs_l;
        sregs
    }

    fn of(sregs: &Sregs) -> String {
        let sizes = kvm_cpuid_entry2 { function: 0x8000_0008, eax: 0x3028, ..Default::default() };
        special_registers(sregs, &[sizes]).join("; ")
    }

    #[test]
    fn long_and_legacy_mode_as_kvm_takes_them() {
        let long = CR0_PE | CR0_PG;
        for good in [
            sregs(0x10, 0, 0, 0, 0),
            sregs(long, 0x9000, CR4_PAE, EFER_LME | EFER_LMA, 1),
            sregs(long, 0x9000, CR4_PAE, EFER_LME | EFER_LMA, 0),
            // Legacy paging; and LME before paging is on.
            sregs(long, 0x9000, 0, 0, 0),
            sregs(CR0_PE, 0, CR4_PAE, EFER_LME, 0),
        ] {
            assert_eq!(of(&good), "");
        }
        for (bad, says) in [
            (sregs(CR0_PE, 0, 0, 0, 1), "L = 1 outside of long mode"),
            (sregs(CR0_PE, 0, 0, EFER_LMA, 0), "EFER is 0x400: LMA"),
            (sregs(long, 0, 0, EFER_LME | EFER_LMA, 1), "CR4 is 0x0: no PAE"),
            (sregs(long, 0, CR4_PAE, EFER_LME, 0), "EFER is 0x100: no LMA"),
            (sregs(long, 1 << 40, CR4_PAE, EFER_LME | EFER_LMA, 1), "CR3 is 0x10000000000"),
            (sregs(CR0_NW, 0, 0, 0, 0), "NW without CD"),
            (sregs(CR0_PG, 0, 0, 0, 0), "PG without PE"),
            (sregs(1 << 32, 0, 0, 0, 0), "more than 32 bits"),
        ] {
            assert!(of(&bad).contains(says), "{says}: {}", of(&bad));
        }
        assert_eq!(legal_address(&[]), (1 << 36) - 1);
    }

    #[test]
    fn addresses_in_memory_that_is_not_there() {
        let reason = |index, data| unreachable(&kvm_msr_entry { index, data, ..Default::default() }, &MEMORY);
        assert_eq!(reason(MSR_KVM_PV_EOI_EN, 0xE000_0001), None);
        assert_eq!(reason(MSR_KVM_PV_EOI_EN, 0xE000_4000), None, "not enabled");
        let text = reason(MSR_KVM_PV_EOI_EN, 0xE000_4001).unwrap();
        assert_eq!(text, "MSR_KVM_PV_EOI_EN is 0xe0004001: there is no memory at 0xe0004000");
        assert_eq!(reason(MSR_KVM_ASYNC_PF_EN, 0x3000_0001), None, "without an interrupt KVM does not look");
        assert!(reason(MSR_KVM_ASYNC_PF_EN, 0x3000_0009).is_some());
        assert_eq!(reason(MSR_KVM_ASYNC_PF_EN, 0x1FFF_FFC9), None);
        // MSR_KVM_STEAL_TIME and MSR_KVM_SYSTEM_TIME_NEW.
        assert_eq!((reason(0x4b56_4d03, 0x3000_0001), reason(0x4b56_4d01, 0x3000_0001)), (None, None));
    }
}
