//! What is on the board: ports, memory, PCI, interrupt controllers.

use super::{ECAM, HOLE, IOAPIC, LAPIC, RAM, Rogue, SERIAL};
use crate::native::steps::*;

/// Nothing that resets, switches off or sleeps, wherever it is written.
const HARMLESS: u32 = 0x5555_5555;

/// Ports in every size, one by one and in strings: all of the board's, and of the others some, as exits are slow in a
/// lab.
pub fn ports() -> Vec<Rogue> {
    let every = |first: u16, size: u32, times: u64, stride: u64| {
        [write_port(first, size, HARMLESS).over(times, stride), read_port(first, size).over(times, stride)]
    };
    let strings =
        |size: u32| [write_string(0, size, 64, BUFFER).over(0x710, 1), read_string(0, size, 64, BUFFER).over(0x710, 1)];
    let mut all = every(0, 1, 0x1000, 1).to_vec();
    all.extend(every(0x1000, 1, 0xF000 / 61, 61));
    all.push(from_here());
    for size in [1, 2, 4] {
        all.extend(every(0x1000, size, 0x40, 0x3BF));
        all.extend(every(0xFFF0, size, 16, 1));
    }
    let board = |size: u32| [every(0, size, 0x710, 1), strings(size)].concat();
    vec![
        Rogue::new("ports", all),
        Rogue::new("ports of the board", [board(1), board(2), board(4)].concat()),
        Rogue::new("clocks, timers and sleep", clocks()),
    ]
}

fn clocks() -> Vec<Step> {
    let mut steps = vec![read_port(0x604, 4).times(1000), read_port(0x602, 4), read_port(0x607, 1)];
    for value in 0..=0xFF_u32 {
        // CMOS, both ways; the interval timer's and the PICs' ports; port B.
        steps.extend([write_port(0x70, 1, value), read_port(0x71, 1), write_port(0x71, 1, value ^ 0x5A)]);
        steps.extend([write_port(0x43, 1, value), write_port(0x40, 1, value).over(3, 1), write_port(0x61, 1, value)]);
        // Sleep: all but what switches off, with SLP_EN and without.
        if value >> 2 & 7 != 5 || value & 0x20 == 0 {
            steps.push(write_port(0x600, 1, value));
        }
        if value != 1 {
            steps.push(write_port(0x602, 1, value));
        }
        if value != 0xFE {
            steps.push(write_port(0x64, 1, value));
        }
    }
    steps
}

/// Its output as fast as it can, and all that its registers can be told meanwhile.
pub fn serial() -> Rogue {
    let mut steps = vec![write_string(SERIAL, 1, 4096, BUFFER).times(4), write_port(SERIAL, 1, 0x78).times(2000)];
    for value in 0..=0xFF_u32 {
        steps.extend([write_port(SERIAL + 1, 1, value).over(7, 1), read_port(SERIAL, 1).over(8, 1)]);
        steps.push(write_port(SERIAL, 4, value << 8));
    }
    Rogue::new("serial port", steps)
}

/// Where no RAM is.
pub fn memory() -> Vec<Rogue> {
    const SIZES: [u32; 4] = [1, 2, 4, 8];
    let both = |at: u64, size: u32, times: u64, stride: u64| {
        [store(at, size, u64::MAX / 3).over(times, stride), load(at, size).over(times, stride)]
    };
    let mut holes = Vec::new();
    for size in SIZES {
        holes.extend(both(RAM, size, 0xB8, 16 << 20));
        // Half in RAM, and half in a page.
        holes.extend(both(RAM - 3, size, 1, 0));
        holes.extend(both(HOLE + 0xFFD, size, 64, 0x1001));
        // To the last bytes of ECAM, LAPIC and all.
        holes.extend(both(0xFFFF_F000, size, 0x200, 8));
        holes.extend(both(ECAM + 0x10_0000 - 4, size, 8, 1));
    }
    let mut boards = Vec::new();
    for size in SIZES {
        boards.extend(both(ECAM, size, 0x400, 0x3FD));
        boards.extend(both(IOAPIC - 0x10, size, 0x100, 0x11));
        boards.extend([load(LAPIC - 8, size).over(0x420, 4), store(LAPIC + 0x400, size, 0).over(0x200, 7)]);
        // The addresses of messages.
        boards.extend(both(LAPIC + 0x1000, size, 0x100, 0xFF1));
    }
    let mut moves = vec![
        move_string(HOLE, HOLE + 0x2000, 8, 64),
        move_string(RAM - 64, RAM - 32, 1, 64),
        move_string(BUFFER, RAM - 32, 8, 16),
        move_string(RAM - 32, BUFFER, 8, 16),
        move_string(ECAM, LAPIC + 0x400, 8, 16),
        move_string(0xFFFF_FFC0, BUFFER, 1, 64),
    ];
    // Beyond 4 GiB, by pages of 1 GiB: right above, in the middle, at the top of what a page table can say.
    moves.extend(
        [4_u64 << 30, 64 << 30, 255 << 30, 1 << 40, 1 << 46, (1 << 52) - (1 << 30)].into_iter().enumerate().flat_map(
            |(at, address)| {
                let (entry, seen) = (4 + at as u64, (4 + at as u64) << 30);
                let mut steps = vec![store(PDPT + 8 * entry, 8, address | 0x83), set(Register::Cr3, PML4)];
                for size in SIZES {
                    steps.extend(both(seen, size, 16, 0x400_0003));
                    steps.extend(both(seen + (1 << 30) - 64, size, 15, 4));
                }
                steps
            },
        ),
    );
    vec![
        Rogue::new("holes of memory", holes),
        Rogue::new("around the controllers", boards),
        Rogue::new("strings in holes, and beyond 4 GiB", moves),
    ]
}

/// Every register of every function, there or not, in all sizes and across registers, by both ways.
pub fn pci() -> Vec<Rogue> {
    let address = |slot: u32, register: u32| 0x8000_0000 | slot << 11 | register;
    let mut ports = Vec::new();
    for slot in 0..32_u32 {
        let registers = if slot < 3 { 0x100 } else { 0x40 };
        for register in (0..registers).step_by(4) {
            ports.push(write_port(0xCF8, 4, address(slot, register)));
            for value in [u32::MAX, 0, 0xFEE0_0000] {
                ports.extend([write_port(0xCFC, 4, value), read_port(0xCFC, 4)]);
            }
            ports.extend([write_port(0xCFC, 1, 0xFF).over(4, 1), write_port(0xCFD, 2, 0xFFFF).over(3, 1)]);
        }
    }
    // Writes and reads that leave the data's ports, and an address in parts.
    ports.extend([write_port(0xCF8, 1, 0xFF).over(8, 1), write_port(0xCF9, 4, HARMLESS).over(7, 1)]);
    ports.extend([write_port(0xCFE, 4, u32::MAX), read_port(0xCFE, 4), write_string(0xCFC, 4, 64, BUFFER)]);
    let mut ecam = Vec::new();
    for value in [u64::MAX, 0, LAPIC] {
        for slot in 0..3_u64 {
            let function = ECAM + (slot << 15);
            for (size, times, stride) in [(4, 0x400, 4), (1, 0x140, 3), (2, 0x140, 3), (8, 0x140, 5)] {
                ecam.extend([
                    store(function, size, value).over(times, stride),
                    load(function, size).over(times, stride),
                ]);
            }
        }
        // All others of the bus.
        ecam.push(store(ECAM + 0x4010, 4, value).over(0x200, 0x1000 / 2));
    }
    vec![Rogue::new("PCI by ports", ports), Rogue::new("PCI by ECAM", ecam)]
}

/// The interrupt controllers of the board with anything in them, and interrupts that nobody ends.
pub fn controllers() -> Vec<Rogue> {
    let redirect = |pin: u64, low: u64, high: u64| {
        [
            store(IOAPIC, 4, 0x10 + 2 * pin),
            store(IOAPIC + 0x10, 4, low),
            store(IOAPIC, 4, 0x11 + 2 * pin),
            store(IOAPIC + 0x10, 4, high),
        ]
    };
    let mut ioapic = vec![store(LAPIC + 0xF0, 4, 0x1FF), interrupts(true)];
    // Fixed, lowest priority, NMI and ExtINT; edge and level; to all and to nobody. An SMI ends this guest's VM.
    for mode in [0, 1 << 8, 4 << 8, 7 << 8] {
        for level in [0, 1 << 15, 1 << 15 | 1 << 14 | 1 << 13] {
            for high in [0, 0xFF00_0000] {
                ioapic.extend((0..24).flat_map(|pin| redirect(pin, (0x50 + pin) | mode | level, high)));
                // The serial port's interrupt, which is pin 4.
                ioapic.extend([write_port(SERIAL + 1, 1, 0), write_port(SERIAL + 1, 1, 2), read_port(SERIAL + 2, 1)]);
                ioapic.push(spin(1000));
            }
        }
    }
    // Level, masked and not, while its interrupt is in service: nobody writes an EOI with interrupts off.
    ioapic.push(interrupts(false));
    ioapic.extend(redirect(4, 0x8050, 0));
    ioapic.extend([write_port(SERIAL + 1, 1, 0), write_port(SERIAL + 1, 1, 2), spin(1000)]);
    ioapic.extend([
        store(IOAPIC, 4, 0).over(0x100, 1),
        store(IOAPIC + 0x10, 4, u64::MAX),
        store(IOAPIC + 0x40, 4, 0x50),
    ]);
    let mut pic = Vec::new();
    for value in 0..=0xFF_u32 {
        for port in [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1] {
            pic.extend([write_port(port, 1, value), read_port(port, 1)]);
        }
        pic.extend([write_port(SERIAL + 1, 1, value & 2), store(LAPIC + 0x350, 4, 0x700)]);
    }
    vec![Rogue::new("IOAPIC full of anything", ioapic), Rogue::new("PICs full of anything", pic)]
}

/// Its passed-through device, in slot 1: BARs over RAM, controllers, one another, and all of its registers.
pub fn device() -> Rogue {
    let register = |offset: u64| ECAM + (1 << 15) + offset;
    let mut steps = Vec::new();
    for address in
        [0, 0x100_0000, RAM - 0x1000, 0xC000_0000, HOLE, ECAM, IOAPIC, LAPIC, 0xFFFF_F000, u64::from(u32::MAX)]
    {
        steps.extend([store(register(4), 2, 0), store(register(0x10), 4, address).over(6, 4)]);
        // All of them there, with decoding on; then moved with it on.
        steps.extend([store(register(4), 2, 3), load(address & !0xFFF, 4).over(8, 64), spin(1000)]);
        steps.extend([store(register(0x10), 4, address ^ 0x10_0000).over(6, 4), load(HOLE, 4)]);
    }
    // Without bus mastering (the bit is never set on its own), a reset (there is one in each round) and all it is told.
    steps.extend([
        store(register(4), 2, 0),
        store(register(0x40), 4, u64::MAX).over(0xF0, 4),
        store(register(4), 2, 0),
    ]);
    Rogue::new("BARs anywhere", steps)
}
