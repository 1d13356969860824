//! The line protocol between a test in L1 and the agent in the guest, over the guest's first serial port.
//!
//! A line is `@@ ID CRC JSON`, with ID chosen by the test (0: said unasked) and CRC-32 over `ID JSON`. The kernel
//! writes its messages to the same port, so anything may stand before, between and in the middle of lines: a reader
//! looks for the last `@@ ` of a line and drops what fails the checksum; the asker asks again under the same ID, and
//! the agent does nothing twice.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{clock::Sample, seq::SeqStats};

/// What every line of ours starts with.
pub const MARK: &str = "@@ ";
/// The ID of lines that answer no request.
pub const UNASKED: u64 = 0;

/// CRC-32 (IEEE 802.3, reflected), bit by bit: lines are short.
pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

/// One line, newline included.
pub fn encode_line<T: Serialize>(id: u64, body: &T) -> String {
    let json = serde_json::to_string(body).unwrap_or_else(|e| format!("{{\"err\":\"cannot encode: {e}\"}}"));
    let text = format!("{id} {json}");
    format!("{MARK}{id} {:08x} {json}\n", crc32(text.as_bytes()))
}

/// What a line from the serial port was.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// A whole line of the protocol.
    Message { id: u64, json: String },
    /// A line of ours that something wrote into.
    Garbled,
    /// Somebody else's: the kernel, or the init script.
    Other(String),
}

/// Reads one line, newline stripped or not.
pub fn decode_line(bytes: &[u8]) -> Line {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end_matches(['\r', '\n']);
    let Some(at) = text.rfind(MARK) else { return Line::Other(text.to_string()) };
    let mut parts = text[at + MARK.len()..].splitn(3, ' ');
    let (Some(id), Some(crc), Some(json)) = (parts.next(), parts.next(), parts.next()) else { return Line::Garbled };
    match (id.parse::<u64>(), u32::from_str_radix(crc, 16)) {
        (Ok(number), Ok(crc)) if crc32(format!("{id} {json}").as_bytes()) == crc => {
            Line::Message { id: number, json: json.to_string() }
        }
        _ => Line::Garbled,
    }
}

/// Splits a stream of bytes into lines, keeping what is not yet whole.
#[derive(Default)]
pub struct LineBuffer {
    pending: Vec<u8>,
}

impl LineBuffer {
    /// Adds bytes and returns the lines they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Line> {
        self.pending.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            lines.push(decode_line(&line));
        }
        lines
    }
}

/// What the agent answers: the value asked for, or why not.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Ok(serde_json::Value),
    Err(String),
}

impl Answer {
    /// The value as `T`.
    pub fn take<T: DeserializeOwned>(self) -> Result<T, String> {
        match self {
            Self::Ok(value) => serde_json::from_value(value).map_err(|e| format!("unexpected answer: {e}")),
            Self::Err(why) => Err(why),
        }
    }
}

/// Lines that the agent says unasked, under [`UNASKED`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// The agent is up and reads requests.
    Ready,
    /// A request came in garbled: ask again.
    Garbled,
}

/// All that the agent can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Request {
    /// `()`
    Ping,
    /// `Vec<Nic>`: every PCI network interface of the guest, in PCI order.
    Nics,
    /// `()`: brings interface `name` up with `ip`/`prefix` and waits for its carrier.
    IfUp { name: String, ip: String, prefix: u8 },
    /// `u32`: sets the size of the receive rings of interface `name`, which should be down; what they have then.
    Ring { name: String, descriptors: u32 },
    /// `()`: a permanent ARP entry.
    Neighbour { name: String, ip: String, mac: String },
    /// `Vec<(String, u64)>`: what was counted on interface `name`, see [`crate::counters::of`].
    Counters { name: String },
    /// `Vec<String>`: see [`crate::stillness::report`].
    Stillness { name: String },
    /// `()`: starts to send numbered packets, at most `rate` a second, and not more than `credit` without a
    /// [`Request::Credit`].
    SendStart { flow: u32, from: String, to: String, rate: u32, credit: u64 },
    /// `Vec<Heard>`, one for each receiver: where the senders of these flows may go to.
    Credit { limits: Vec<(u32, u64)> },
    /// `Sent`: stops it.
    SendStop { flow: u32 },
    /// `Sent`, while it goes on.
    SendStats { flow: u32 },
    /// `()`: starts to count the packets of `flow` that come to `at` (ip:port).
    RecvStart { flow: u32, at: String },
    /// `SeqStats`
    RecvStats { flow: u32 },
    /// `SeqStats`: the last count; waits for `expected` packets, or until nothing comes any more.
    RecvStop { flow: u32, expected: u64 },
    /// `()`: opens UDP `port` for [`Request::WatchWait`], anew if it is open; who still waits there gets an error.
    WatchOpen { port: u16 },
    /// `Arrival`: answers as soon as a packet is there.
    WatchWait { port: u16 },
    /// `()`: one thread rewrites and verifies `mib` MiB over and over.
    MemoryStart { mib: u64, seed: u64 },
    /// `MemoryStats`
    MemoryStats,
    /// `MemoryStats`, after a last check of every page.
    MemoryStop,
    /// `()`: rewrites and verifies the first `mib` MiB of a block device, past the guest's caches.
    DiskStart { path: String, mib: u64, seed: u64 },
    /// `MemoryStats`: an I/O error makes a page wrong.
    DiskStats,
    /// `MemoryStats`, after a last check of every page.
    DiskStop,
    /// `()`: one spinning thread for each of `cpus`, pinned to it.
    BusyStart { cpus: Vec<usize> },
    /// `Vec<u64>`: loops done so far by each thread.
    BusyStats,
    /// `Vec<u64>`
    BusyStop,
    /// `()`: arms a timer for each of these distances from now, in ms.
    TimersArm { after_ms: Vec<u64> },
    /// `Vec<TimerFired>`: answers when all of them have fired.
    TimersWait,
    /// `Sample`, taken on `cpu`.
    Clock { cpu: usize },
    /// `Vec<String>`: all CPUID leaves as seen on `cpu`, a line each.
    Cpuid { cpu: usize },
    /// `Vec<usize>`: remembers the CPUID leaves of every CPU; says how many each has.
    CpuidRemember,
    /// `Vec<String>`: what differs now from what was remembered.
    CpuidChanges,
    /// `Vec<PciFunction>`
    Pci,
    /// `u32`: enables MSI-X on the device at `bdf`, whose driver is taken off it, with all vectors unmasked; how many
    /// they are.
    VectorsOn { bdf: String },
    /// `u16` of the configuration space of the device at `bdf`.
    ConfigRead { bdf: String, offset: u64 },
    /// `()`
    ConfigWrite { bdf: String, offset: u64, value: u16 },
    /// `()`: one thread for each of `cpus`, pinned to it, resets the function at `bdf`, whose driver is taken off it,
    /// over and over.
    ResetsStart { bdf: String, cpus: Vec<usize> },
    /// `Vec<u64>`: resets done so far by each thread.
    ResetsStats,
    /// `Vec<u64>`
    ResetsStop,
    /// `Vec<Vector>`: the lines of /proc/interrupts whose name contains `name`.
    Interrupts { name: String },
    /// `Vec<Vector>`: answers when the sum of the counts of those lines grew.
    InterruptsWait { name: String, timeout_ms: u64 },
    /// `()`: from now on the kernel notes when it handles interrupts of this vector, and when the watchdog of a driver
    /// runs.
    TraceStart { vector: String },
    /// `Vec<Traced>`: what it has noted, in order.
    TraceRead,
    /// `String`: the lines of the kernel's log that hold one of `words`.
    Dmesg { words: Vec<String> },
    /// `()`: makes `name` the kernel's clock source.
    ClockSource { name: String },
    /// `()`: writes `value` to `name` below /proc/sys.
    Sysctl { name: String, value: String },
    /// `u64`: the guest physical address of a page that the agent holds from now on, instead of the one before.
    PageHold,
    /// `i32`: a process reads that page; the signal that ended it, or 0.
    PageTouch,
    /// `MachineInfo`
    Machine,
    /// `()`: from now on a press of the ACPI power button is noticed.
    PowerButtonOpen,
    /// `()`: answers when it was pressed.
    PowerButtonWait,
    /// `()`; the machine is gone so long after it.
    PowerOff { after_ms: u64 },
    /// `()`; the machine is gone so long after it.
    Reboot { after_ms: u64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Nic {
    pub name: String,
    pub mac: String,
    /// The guest's PCI address of it.
    pub bdf: String,
    pub driver: String,
}

/// What a sender did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    pub packets: u64,
    /// Sends that the kernel refused; they have no number.
    pub errors: u64,
    /// The longest time that the sender was held up for want of credit.
    pub longest_wait_us: u64,
}

/// What a receiver has heard so far: flow, different numbers, and the highest number plus one. Short, as it is said
/// often.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Heard(pub u32, pub u64, pub u64);

/// A packet that a watch saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Arrival {
    /// CLOCK_MONOTONIC of the guest, ns.
    pub mono_ns: u64,
    pub tsc: u64,
    pub len: usize,
    /// The first bytes of the payload.
    pub head: Vec<u8>,
}

/// An interrupt of the vector that is traced, or a run of a driver's watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Traced {
    /// CLOCK_MONOTONIC of the guest, ns.
    pub at_ns: u64,
    pub is_interrupt: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryStats {
    pub pages_checked: u64,
    /// Pages that did not hold what was last written to them.
    pub pages_wrong: u64,
    /// Times the whole area was gone through.
    pub passes: u64,
}

/// Times of one timer on the guest's CLOCK_MONOTONIC, ns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TimerFired {
    pub due_ns: u64,
    pub fired_ns: u64,
}

impl TimerFired {
    /// How late it fired, µs; negative: before it was due.
    pub fn late_us(&self) -> i64 {
        (self.fired_ns as i64 - self.due_ns as i64) / 1000
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PciFunction {
    pub bdf: String,
    /// The first 256 bytes of its configuration space, hex.
    pub config: String,
    /// sysfs `resource`: one line per BAR, as the guest placed it.
    pub resources: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vector {
    /// Linux's interrupt number.
    pub irq: String,
    /// The name that the driver gave it, like `eth0-TxRx-0`.
    pub name: String,
    /// Interrupts on all CPUs together.
    pub count: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    pub kernel: String,
    pub cpus_online: usize,
    pub memory_kib: u64,
    pub clocksource: String,
    pub uptime_s: f64,
}

/// The clock sample is part of the protocol: the name here keeps the two sides together.
pub type ClockAnswer = Sample;
/// Likewise the count of a receiver.
pub type RecvAnswer = SeqStats;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_the_standard_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_line_comes_back() {
        let line = encode_line(7, &Request::Clock { cpu: 3 });
        let Line::Message { id, json } = decode_line(line.as_bytes()) else { panic!("{line}") };
        assert_eq!(id, 7);
        assert!(matches!(serde_json::from_str(&json).unwrap(), Request::Clock { cpu: 3 }));
    }

    #[test]
    fn kernel_text_in_front_is_no_harm() {
        let line = format!("[    1.0] igb: link is up {}", encode_line(1, &Notice::Ready));
        assert!(matches!(decode_line(line.as_bytes()), Line::Message { id: 1, .. }));
    }

    #[test]
    fn text_in_the_middle_is_noticed() {
        let mut line = encode_line(1, &Request::Ping);
        line.insert_str(line.len() - 5, "[ 2.0] oops");
        assert_eq!(decode_line(line.as_bytes()), Line::Garbled);
        assert_eq!(decode_line(b"@@ 1"), Line::Garbled);
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let all = format!("noise\n{}{}", encode_line(1, &Notice::Ready), encode_line(2, &Answer::Ok(5.into())));
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for byte in all.as_bytes() {
            lines.extend(buffer.push(&[*byte]));
        }
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0], Line::Other("noise".to_string()));
        let Line::Message { id: 2, json } = &lines[2] else { panic!("{:?}", lines[2]) };
        assert_eq!(serde_json::from_str::<Answer>(json).unwrap().take::<u32>(), Ok(5));
    }

    #[test]
    fn an_error_is_told() {
        let answer: Answer = serde_json::from_str(r#"{"err":"no such thing"}"#).unwrap();
        assert_eq!(answer.take::<u32>(), Err("no such thing".to_string()));
    }
}
