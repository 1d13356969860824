//! Guests that are a list of steps for each of their vCPUs, which go through it over and over: what no kernel does can
//! be written down and read. An exception ends the step that it comes in, and counts.
//!
//! Each vCPU keeps what it has done in its block of guest memory ([`Progress`]).

mod code;
mod progress;

pub use code::guest;
pub use progress::{Memory, Progress};

/// Of vCPU `n`: at `n` times its size.
const BLOCKS: u64 = 0x1F0_0000;
const BLOCK: u64 = 0x100;
/// Set from outside, read by [`wait`].
pub const GO: u64 = 0x1F0_F000;
/// Where strings come from and go to.
pub const BUFFER: u64 = 0x1F4_0000;
/// Free for what a guest has to note; 16 bytes for each MSR of a [`change_msrs`].
pub const NOTES: u64 = 0x200_0000;
/// As the boot made them: the first 4 GiB, one to one.
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xA000;
/// In the order of the table in `code.rs`.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Kind {
    End,
    FromHere,
    Out,
    In,
    Outs,
    Ins,
    Store,
    Load,
    Move,
    Wrmsr,
    SameMsr,
    ChangeMsr,
    SettleMsr,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Dr0,
    Dr6,
    Dr7,
    Xcr0,
    Lidt,
    Cli,
    Sti,
    Hlt,
    Undefined,
    Call,
    Hypercall,
    Wait,
    RealMode,
    Spin,
}

/// What a vCPU does once, or `times` times.
#[derive(Debug, Clone)]
pub struct Step {
    kind: Kind,
    /// Bytes of an access.
    size: u32,
    /// Of a string.
    count: u32,
    /// Port, address, index or value of a register.
    at: u64,
    value: u64,
    times: u64,
    /// Added to `at` each time.
    stride: u64,
}

impl Step {
    const fn new(kind: Kind, at: u64, value: u64) -> Self {
        Self { kind, size: 0, count: 0, at, value, times: 1, stride: 0 }
    }

    const fn sized(self, size: u32, count: u32) -> Self {
        Self { size, count, ..self }
    }

    /// All of this so many times.
    pub const fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// At so many places, each this much beyond the last.
    pub const fn over(self, times: u64, stride: u64) -> Self {
        Self { times, stride, ..self }
    }

    pub const fn turns(&self) -> u64 {
        self.times
    }

    fn bytes(&self) -> [u8; 48] {
        let Self { kind, size, count, at, value, times, stride } = self;
        let size = u64::from(*count) << 32 | u64::from(*size);
        let mut bytes = [0; 48];
        for (place, word) in bytes.chunks_exact_mut(8).zip([*kind as u64, size, *at, *value, *times, *stride]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What is before it is done once only.
pub const fn from_here() -> Step {
    Step::new(Kind::FromHere, 0, 0)
}

/// `size`: 1, 2 or 4 bytes.
pub const fn write_port(port: u16, size: u32, value: u32) -> Step {
    Step::new(Kind::Out, port as u64, value as u64).sized(size, 0)
}

pub const fn read_port(port: u16, size: u32) -> Step {
    Step::new(Kind::In, port as u64, 0).sized(size, 0)
}

/// `count` accesses of one string instruction, from the memory at `from`.
pub const fn write_string(port: u16, size: u32, count: u32, from: u64) -> Step {
    Step::new(Kind::Outs, port as u64, from).sized(size, count)
}

pub const fn read_string(port: u16, size: u32, count: u32, to: u64) -> Step {
    Step::new(Kind::Ins, port as u64, to).sized(size, count)
}

/// `size`: 1, 2, 4 or 8 bytes.
pub const fn store(at: u64, size: u32, value: u64) -> Step {
    Step::new(Kind::Store, at, value).sized(size, 0)
}

pub const fn load(at: u64, size: u32) -> Step {
    Step::new(Kind::Load, at, 0).sized(size, 0)
}

/// `count` times 1 or 8 bytes.
pub const fn move_string(from: u64, to: u64, size: u32, count: u32) -> Step {
    Step::new(Kind::Move, from, to).sized(size, count)
}

pub const fn write_msr(index: u32, value: u64) -> Step {
    Step::new(Kind::Wrmsr, index as u64, value)
}

/// Turns `bits` over in each of `count` MSRs that take it, and notes what they read then. `notes`: 16 bytes for each.
pub fn change_msrs(first: u32, count: u64, bits: u32, notes: u64) -> Step {
    Step::new(Kind::ChangeMsr, first.into(), notes).sized(0, bits).over(count, 1)
}

/// Forgets those that change by themselves.
pub fn settle_msrs(first: u32, count: u64, notes: u64) -> Step {
    Step::new(Kind::SettleMsr, first.into(), notes).over(count, 1)
}

/// Whether each reads as was noted; see [`Progress::differences`].
pub fn same_msrs(first: u32, count: u64, notes: u64) -> Step {
    Step::new(Kind::SameMsr, first.into(), notes).over(count, 1)
}

/// Of one vCPU each.
#[derive(Clone, Copy)]
pub enum Register {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Dr0,
    Dr6,
    Dr7,
    Xcr0,
}

pub const fn set(register: Register, value: u64) -> Step {
    let kind = match register {
        Register::Cr0 => Kind::Cr0,
        Register::Cr2 => Kind::Cr2,
        Register::Cr3 => Kind::Cr3,
        Register::Cr4 => Kind::Cr4,
        Register::Cr8 => Kind::Cr8,
        Register::Dr0 => Kind::Dr0,
        Register::Dr6 => Kind::Dr6,
        Register::Dr7 => Kind::Dr7,
        Register::Xcr0 => Kind::Xcr0,
    };
    Step::new(kind, value, 0)
}

pub const fn interrupt_table(base: u64, limit: u16) -> Step {
    Step::new(Kind::Lidt, base, limit as u64)
}

pub const fn interrupts(on: bool) -> Step {
    Step::new(if on { Kind::Sti } else { Kind::Cli }, 0, 0)
}

/// Until an interrupt.
pub const fn halt() -> Step {
    Step::new(Kind::Hlt, 0, 0)
}

/// An instruction that there is not.
pub const fn undefined() -> Step {
    Step::new(Kind::Undefined, 0, 0)
}

pub const fn call(address: u64) -> Step {
    Step::new(Kind::Call, address, 0)
}

/// `argument`: all of them.
pub const fn hypercall(number: u64, argument: u64) -> Step {
    Step::new(Kind::Hypercall, number, argument)
}

/// Until the dword there is not 0.
pub const fn wait(address: u64) -> Step {
    Step::new(Kind::Wait, address, 0)
}

/// Until that vCPU is at its first step, with gates.
pub const fn wait_for_vcpu(vcpu: u64) -> Step {
    wait(BLOCKS + vcpu * BLOCK + 8)
}

/// Compatibility mode, protected mode of 32 and of 16 bits and real mode, for so many turns of a loop each.
pub const fn real_mode(turns: u32) -> Step {
    Step::new(Kind::RealMode, turns as u64, 0)
}

/// So many turns of a loop.
pub const fn spin(turns: u64) -> Step {
    Step::new(Kind::Spin, turns, 0)
}

/// LAPIC_BASE + ICR, and what it is to send (SDM 3A, 11.6.1).
pub const fn send(command: u32) -> Step {
    store(0xFEE0_0300, 4, command as u64)
}
