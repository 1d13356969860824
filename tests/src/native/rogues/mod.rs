//! Guests that are out to harm their VMM or their host, as lists of [`steps`].

mod board;
mod cpu;

pub use board::{controllers, device, memory, pci, ports, serial};
pub use cpu::{lapic, modes, msrs, storms};

use super::steps::{self, *};

/// RAM of all of them, bytes.
pub const RAM: u64 = 128 << 20;
/// Where nothing is, in the 32-bit PCI window.
const HOLE: u64 = 0xD000_0000;
const ECAM: u64 = 0xE000_0000;
const IOAPIC: u64 = 0xFEC0_0000;
const LAPIC: u64 = 0xFEE0_0000;
const SERIAL: u16 = 0x3F8;

pub struct Rogue {
    pub name: &'static str,
    pub cpus: u32,
    /// vCPUs from this one on need not go on: they halt, or start anew all the time.
    pub goes_on: u64,
    steps: Vec<Vec<Step>>,
}

impl Rogue {
    fn new(name: &'static str, steps: Vec<Step>) -> Self {
        Self { name, cpus: 1, goes_on: 1, steps: vec![steps] }
    }

    /// The first `goes_on` of them go on.
    fn of_vcpus(name: &'static str, steps: Vec<Vec<Step>>, goes_on: u64) -> Self {
        Self { name, cpus: steps.len() as u32, goes_on, steps }
    }

    /// What the first vCPU was doing, if it goes through all of its steps each time.
    pub fn step(&self, progress: &Progress) -> Option<&Step> {
        let steps = self.steps.first()?;
        // The end of a list is a step, too.
        let round = 1 + steps.iter().map(Step::turns).sum::<u64>();
        let mut left = (progress.steps % round).checked_sub(1)?;
        steps.iter().find(|step| {
            let here = left < step.turns();
            left = left.saturating_sub(step.turns());
            here
        })
    }

    pub fn code(&self) -> Vec<u8> {
        steps::guest(&self.steps)
    }
}

/// What KVM, or a CPU, may end a guest for; each once it is told to go.
pub fn ends() -> Vec<Rogue> {
    let end = |name, steps: Vec<Step>| Rogue::new(name, [vec![wait(GO)], steps].concat());
    vec![
        end("strings out of a hole", strings(|size| write_string(0x80, size, 0x400, HOLE))),
        end("strings into a hole", strings(|size| read_string(0x80, size, 0x400, HOLE))),
        end("strings out of RAM and a hole", strings(|size| write_string(SERIAL, size, 0x200, RAM - 0x100))),
        end("strings into RAM and a hole", strings(|size| read_string(SERIAL + 5, size, 0x200, RAM - 0x100))),
        end("strings out of the LAPIC", strings(|size| write_string(0x80, size, 0x400, LAPIC))),
        end("strings into the LAPIC", strings(|size| read_string(0x600, size, 0x200, LAPIC + 0x400))),
        end("strings into the configuration of PCI", strings(|size| read_string(0x600, size, 0x200, ECAM + 0x8000))),
        end("strings beyond all that is mapped", strings(|size| read_string(0x80, size, 0x200, 0xFFFF_FE00))),
        end("hypercalls", hypercalls()),
        end("an SMI", vec![send(1 << 18 | 2 << 8 | 1 << 14), spin(100_000)]),
        end("segment limits in long mode", vec![write_msr(cpu::EFER, 0xD00 | cpu::LMSLE), spin(1000)]),
        end("code where nothing is", vec![call(HOLE)]),
        end("code in the configuration of PCI", vec![call(ECAM)]),
        end("code in the LAPIC", vec![call(LAPIC)]),
        end("page tables where nothing is", vec![set(Register::Cr3, HOLE)]),
        end("page tables in the LAPIC", vec![set(Register::Cr3, LAPIC)]),
        end(
            "a page table where nothing is",
            vec![
                store(PDPT + 32, 8, HOLE | 3),
                set(Register::Cr3, PML4),
                load(4 << 30, 8),
                store(4 << 30, 8, 0),
                call(4 << 30),
            ],
        ),
        end("gates where nothing is", vec![interrupt_table(HOLE, 0xFFF), undefined()]),
        end("gates in the LAPIC", vec![interrupt_table(LAPIC, 0xFFF), undefined()]),
        end("no gates", vec![interrupt_table(0, 0), undefined()]),
    ]
}

fn strings(of: impl Fn(u32) -> Step) -> Vec<Step> {
    [1, 2, 4].map(of).to_vec()
}

/// Resets without end, by each way that there is.
pub fn resets() -> Vec<Rogue> {
    vec![
        Rogue::new("triple faults", vec![interrupt_table(0, 0), write_msr(u32::MAX, 0)]),
        Rogue::new("the keyboard controller's reset", vec![write_port(0x64, 1, 0xFE)]),
        Rogue::new("the reset register", vec![write_port(0x602, 1, 1)]),
    ]
}

/// All vCPUs at once, when they are told to.
pub fn power_off() -> Rogue {
    let steps = vec![wait(GO), write_port(0x600, 1, 0x34)];
    Rogue::of_vcpus("all switch off", vec![steps.clone(), steps.clone(), steps.clone(), steps], 4)
}

fn hypercalls() -> Vec<Step> {
    let arguments = [0, 1, RAM, HOLE, u64::MAX, 1 << 63];
    (0..20)
        .chain([u64::MAX, 1 << 40])
        .flat_map(|number| arguments.map(|argument| hypercall(number, argument)))
        .collect()
}
