//! Numbered packets, and the count of what became of them.

use serde::{Deserialize, Serialize};

/// What every packet starts with.
const MAGIC: u32 = 0x5448_5355;
/// Bytes of header in front of the filler.
const HEADER: usize = 24;
/// Payload bytes of every packet of a stream.
pub const PACKET_LEN: usize = 128;

/// A packet of a stream: who, which, when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Packet {
    pub flow: u32,
    pub seq: u64,
    /// The sender's CLOCK_MONOTONIC, ns.
    pub sent_ns: u64,
}

impl Packet {
    /// The payload: header, then filler that depends on the number, so that a packet that was mixed up is noticed.
    pub fn encode(&self) -> [u8; PACKET_LEN] {
        let mut bytes = [0; PACKET_LEN];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flow.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sent_ns.to_le_bytes());
        for (i, byte) in bytes.iter_mut().enumerate().skip(HEADER) {
            *byte = filler(self.seq, i);
        }
        bytes
    }

    /// `None`: not one of ours, or damaged.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != PACKET_LEN || bytes[..4] != MAGIC.to_le_bytes() {
            return None;
        }
        let seq = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let whole = bytes.iter().enumerate().skip(HEADER).all(|(i, &b)| b == filler(seq, i));
        whole.then_some(Self {
            flow: u32::from_le_bytes(bytes[4..8].try_into().ok()?),
            seq,
            sent_ns: u64::from_le_bytes(bytes[16..24].try_into().ok()?),
        })
    }
}

fn filler(seq: u64, i: usize) -> u8 {
    (seq as u8).wrapping_mul(31).wrapping_add(i as u8)
}

/// What a receiver counted. Packets are numbered from 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SeqStats {
    /// Different numbers seen.
    pub unique: u64,
    pub duplicated: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Packets to this port that are not of this flow, or damaged.
    pub foreign: u64,
    /// The highest number seen, plus one.
    pub next: u64,
    /// The longest time between two packets, µs on the receiver's clock.
    pub max_gap_us: u64,
    /// When the last one came, ns on the receiver's CLOCK_MONOTONIC.
    pub last_ns: u64,
}

impl SeqStats {
    /// How many of `sent` packets never came.
    pub fn lost_of(&self, sent: u64) -> u64 {
        sent.saturating_sub(self.unique)
    }
}

/// Keeps the count.
#[derive(Default)]
pub struct SeqCheck {
    stats: SeqStats,
    seen: Vec<u64>,
}

impl SeqCheck {
    /// Numbers beyond this are nobody's: more than a week at 500 a second would not fit either.
    const MAX_SEQ: u64 = 1 << 28;

    /// Counts a packet numbered `seq` that came at `now_ns`.
    pub fn packet(&mut self, seq: u64, now_ns: u64) {
        if seq >= Self::MAX_SEQ {
            return self.foreign();
        }
        let stats = &mut self.stats;
        if stats.last_ns != 0 {
            stats.max_gap_us = stats.max_gap_us.max(now_ns.saturating_sub(stats.last_ns) / 1000);
        }
        stats.last_ns = now_ns;
        let (word, bit) = ((seq / 64) as usize, 1u64 << (seq % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            stats.duplicated += 1;
            return;
        }
        self.seen[word] |= bit;
        stats.unique += 1;
        if seq < stats.next {
            stats.reordered += 1;
        }
        stats.next = stats.next.max(seq + 1);
    }

    /// Counts a packet that is none of this flow.
    pub fn foreign(&mut self) {
        self.stats.foreign += 1;
    }

    /// Numbers below the highest one that did not come (yet): at most `limit` of them.
    pub fn missing(&self, limit: usize) -> Vec<u64> {
        (0..self.stats.next)
            .filter(|&seq| self.seen.get((seq / 64) as usize).is_none_or(|w| w & (1 << (seq % 64)) == 0))
            .take(limit)
            .collect()
    }

    pub fn stats(&self) -> SeqStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(numbers: &[u64]) -> SeqCheck {
        let mut check = SeqCheck::default();
        for (i, &seq) in numbers.iter().enumerate() {
            check.packet(seq, 1_000_000 * (i as u64 + 1));
        }
        check
    }

    #[test]
    fn packet_comes_back() {
        let packet = Packet { flow: 3, seq: 0x1234_5678_9abc, sent_ns: 42 };
        assert_eq!(Packet::decode(&packet.encode()), Some(packet));
    }

    #[test]
    fn damage_is_noticed() {
        let mut bytes = Packet { flow: 3, seq: 5, sent_ns: 42 }.encode();
        bytes[100] ^= 1;
        assert_eq!(Packet::decode(&bytes), None);
        assert_eq!(Packet::decode(&bytes[..50]), None);
    }

    #[test]
    fn in_order() {
        let stats = run(&[0, 1, 2, 3]).stats();
        assert_eq!((stats.unique, stats.duplicated, stats.reordered, stats.next), (4, 0, 0, 4));
        assert_eq!(stats.lost_of(4), 0);
        assert_eq!(stats.max_gap_us, 1000);
    }

    #[test]
    fn lost() {
        let check = run(&[0, 1, 3, 200]);
        assert_eq!(check.stats().lost_of(201), 197);
        assert_eq!(check.stats().lost_of(203), 199);
        assert_eq!(check.missing(2), [2, 4]);
    }

    #[test]
    fn twice_and_out_of_order() {
        let stats = run(&[0, 2, 1, 2, 2, 3]).stats();
        assert_eq!((stats.unique, stats.duplicated, stats.reordered), (4, 2, 1));
        assert_eq!(stats.lost_of(4), 0);
    }

    #[test]
    fn absurd_numbers_do_not_allocate() {
        let stats = run(&[u64::MAX, SeqCheck::MAX_SEQ]).stats();
        assert_eq!((stats.foreign, stats.unique), (2, 0));
    }

    #[test]
    fn longest_gap() {
        let mut check = SeqCheck::default();
        for (seq, ms) in [(0, 10), (1, 12), (2, 52), (3, 54)] {
            check.packet(seq, ms * 1_000_000);
        }
        assert_eq!(check.stats().max_gap_us, 40_000);
    }
}
