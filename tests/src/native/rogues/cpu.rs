//! What is in a CPU: its registers, its modes, its LAPIC.

use super::{ECAM, HOLE, IOAPIC, LAPIC, RAM, Rogue};
use crate::native::steps::*;

const IA32_APIC_BASE: u32 = 0x1B;
const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6E0;
pub(super) const EFER: u32 = 0xC000_0080;
/// EFER: segment limits in long mode, which KVM hands on to CPUs of AMD. [`super::ends`] has it: the CPU of a software
/// that does not know it ends its guest.
pub(super) const LMSLE: u64 = 1 << 13;

/// (first, how many): of all that KVM knows, and some that nobody does.
const MSRS: [(u32, u64); 6] = [
    (0, 0x1000),
    (0x4000_0000, 0x20),
    (0x4B56_4D00, 0x10),
    (0xC000_0000, 0x200),
    (0xC001_0000, 0x300),
    (0xC001_1000, 0x100),
];

/// Changes all MSRs that it may, a bit of each, and looks whether they stay so; those of KVM with addresses where there
/// is no memory; its time.
pub fn msrs() -> Vec<Rogue> {
    let mut kept = Vec::new();
    let notes = || {
        MSRS.iter().scan(NOTES, |notes, (first, count)| {
            let place = *notes;
            *notes += count * 16;
            Some((*first, *count, place))
        })
    };
    for bits in [1, 0x40, 0x1000, 0x8000_0000] {
        kept.extend(notes().map(|(first, count, notes)| change_msrs(first, count, bits, notes)));
    }
    for _ in 0..3 {
        kept.extend(notes().map(|(first, count, notes)| settle_msrs(first, count, notes)));
    }
    kept.push(from_here());
    kept.extend(notes().map(|(first, count, notes)| same_msrs(first, count, notes)));
    kept.push(spin(100_000));

    let nowhere = [
        0,
        0xA_0000,
        0xF_FFF0,
        0x234_5678,
        0x234_5FFC,
        RAM - 64,
        RAM - 16,
        RAM - 4,
        RAM,
        HOLE,
        ECAM,
        IOAPIC,
        LAPIC,
        0xFFFF_FFC0,
        4 << 30,
        1 << 46,
        (1 << 52) - 64,
        u64::MAX - 63,
    ];
    let mut pages = Vec::new();
    // Clocks, and what follows them; each by its old index where it has one.
    for msr in [0x11, 0x12].into_iter().chain(0x4B56_4D00..0x4B56_4D09) {
        for address in nowhere {
            for flags in [0, 1, 3, 9] {
                pages.extend([write_msr(msr, address | flags), read_port(0x80, 1), spin(1000)]);
            }
        }
    }
    let time = [0, 1, u64::MAX, 1 << 63, (1 << 63) - 1, 0x1234_5678_9ABC_DEF0, 1 << 32];
    let mut times = vec![store(LAPIC + 0x320, 4, 0x4_0040), interrupts(true)];
    for value in time {
        for msr in [IA32_TSC, 0x3B, IA32_TSC_DEADLINE] {
            times.extend([write_msr(msr, value), read_port(0x604, 4), spin(10_000)]);
        }
        times.extend([write_msr(0x12, 0x230_0001), write_msr(0x4B56_4D01, 0x230_0041), write_msr(IA32_TSC, value)]);
    }
    vec![
        Rogue::new("MSRs that are to stay", kept),
        Rogue::new("MSRs of KVM that point nowhere", pages),
        Rogue::of_vcpus("time of two vCPUs", vec![times.clone(), times.into_iter().rev().collect()], 2),
    ]
}

/// Its LAPIC moved, off and in x2APIC mode; a timer that always fires; registers with anything in them.
pub fn lapic() -> Vec<Rogue> {
    let mut bases = Vec::new();
    for base in [LAPIC, 0xFED0_0000, 0, 0x200_0000, RAM, ECAM, IOAPIC, 0xFFFF_F000, 1 << 40, (1 << 52) - 0x1000] {
        for mode in [0x900, 0x100, 0x800, 0, 0x900, 0xD00, 0x500, 0xC00, 0] {
            bases.push(write_msr(IA32_APIC_BASE, base | mode));
            bases.extend([load(base, 4).over(0x40, 16), load(LAPIC, 4), store(LAPIC + 0x80, 4, 0)]);
            bases.extend([write_msr(0x80F, 0x1FF), write_msr(0x83F, 0x41), interrupts(true), spin(1000)]);
        }
    }
    let mut registers = vec![store(LAPIC + 0xF0, 4, 0x1FF)];
    for value in [0, u64::MAX, 0x1_0040, 0x2_0040, 0x6_0041, 0x5555_5555] {
        for register in (0x20..0x400).step_by(16) {
            // Not what sends; that has a guest of its own.
            if register != 0x300 {
                registers.extend([store(LAPIC + register, 4, value), load(LAPIC + register, 4)]);
            }
        }
        registers.extend([interrupts(true), spin(10_000), interrupts(false)]);
    }
    let timer = vec![
        store(LAPIC + 0xF0, 4, 0x1FF),
        store(LAPIC + 0x3E0, 4, 0xB),
        store(LAPIC + 0x320, 4, 0x2_0040),
        store(LAPIC + 0x380, 4, 1),
        interrupts(true),
        from_here(),
        halt().times(4),
        spin(10_000),
    ];
    vec![
        Rogue::new("LAPIC elsewhere", bases),
        Rogue::new("LAPIC full of anything", registers),
        Rogue::new("a timer without end", timer),
    ]
}

/// Control and debug registers, all of the modes, and exceptions without end.
pub fn modes() -> Vec<Rogue> {
    use Register::{Cr0, Cr2, Cr3, Cr4, Cr8, Dr0, Dr6, Dr7, Xcr0};
    const CR0: u64 = 0x8000_0031;
    let mut registers = Vec::new();
    for bits in [0, 0x8, 0x4, 0x2, 0x1_0000, 0x4_0000, 1 << 29, 3 << 29, 1 << 30, 1 << 32, u64::MAX << 32] {
        registers.extend([set(Cr0, CR0 | bits), spin(1000)]);
    }
    registers.extend([set(Cr0, CR0 & !1), set(Cr0, 0x11), set(Cr0, CR0)]);
    for bit in 0..64 {
        registers.extend([set(Cr4, 0x20 | 1 << bit), set(Cr2, 1 << bit), set(Dr6, 1 << bit), set(Xcr0, 1 | 1 << bit)]);
        if 1 << bit != LMSLE {
            registers.extend([write_msr(EFER, 0xD00 | 1 << bit), write_msr(EFER, 0x500)]);
        }
        registers.push(set(Cr4, 0x20));
        registers.extend([set(Dr0, 1 << bit), set(Dr7, 0x400 | 1 << bit)]);
    }
    registers.extend([
        set(Dr7, 0x400),
        set(Cr4, 0x4_0020),
        set(Xcr0, 3),
        set(Xcr0, 7),
        set(Xcr0, 0xE7),
        set(Xcr0, u64::MAX),
    ]);
    registers.extend([0, 7, 15, 16, u64::MAX].map(|value| set(Cr8, value)));
    registers.extend([set(Cr8, 0), set(Cr3, PML4 | 0x18), set(Cr3, PML4)]);
    // A breakpoint on data that is written all the time.
    registers.extend([set(Dr0, NOTES), set(Dr7, 0xD_0402), store(NOTES, 8, 1).times(100), set(Dr7, 0x400)]);
    let loops = vec![interrupts(false), undefined().times(1000)];
    let stuck = vec![interrupts(false), halt()];
    vec![
        Rogue::new("control registers", registers),
        Rogue::new("modes", vec![real_mode(20_000)]),
        Rogue::of_vcpus("exceptions without end", vec![loops.clone(), loops, stuck], 2),
    ]
}

/// INIT, SIPI, NMI and interrupts to all and to itself.
pub fn storms() -> Vec<Rogue> {
    const TO_OTHERS: u32 = 3 << 18;
    const TO_ALL: u32 = 2 << 18;
    const TO_SELF: u32 = 1 << 18;
    const NMI: u32 = 4 << 8 | 1 << 14;
    const INIT: u32 = 5 << 8 | 1 << 14;
    const SIPI: u32 = 6 << 8 | 1 << 14 | 0x50;
    const FIXED: u32 = 1 << 14 | 0x60;
    // An NMI to one that has no gates yet would be the guest's own end.
    let first = vec![
        send(TO_OTHERS | INIT),
        send(TO_OTHERS | SIPI),
        send(TO_SELF | SIPI),
        send(TO_SELF | NMI),
        spin(10_000),
        send(TO_OTHERS | INIT).times(3),
        send(TO_OTHERS | SIPI).times(3),
        spin(200_000),
    ];
    let others = vec![interrupts(true), send(TO_SELF | NMI), send(TO_ALL | FIXED), send(TO_SELF | SIPI), spin(1000)];
    let mut nmis: Vec<_> = (0..4).map(wait_for_vcpu).collect();
    nmis.extend([send(TO_ALL | NMI).times(100), send(TO_SELF | NMI).times(100)]);
    nmis.extend([interrupts(true), send(TO_ALL | FIXED)]);
    let all = |steps: Vec<Step>| vec![steps.clone(), steps.clone(), steps.clone(), steps];
    let mut starts = all(others);
    starts[0] = first;
    vec![Rogue::of_vcpus("INIT and SIPI", starts, 1), Rogue::of_vcpus("NMIs", all(nmis), 4)]
}
