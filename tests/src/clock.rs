//! The guest's clock against L1's.
//!
//! Method. Both sides read (tsc, clock) pairs: a clock reading between two TSC readings, the closest of many tries. The
//! guest's TSC is L1's plus the vCPU's TSC offset, which KVM shows in debugfs (`tsc-offset`), so a guest sample has a
//! place on L1's TSC axis without any message between the two, whose travel time would drown what is measured. L1's
//! clock at that place is interpolated between an L1 sample taken before and one taken after the guest's. The
//! difference of the two clocks holds an unknown constant (the guest booted later), so only its change from the sample
//! before the updates is an error.
//!
//! CLOCK_MONOTONIC_RAW on both sides: that is what kvmclock follows, and no NTP daemon bends it. The offset is read
//! again after each update and must be the very same number: with the TSC as clocksource in the guest, a moved offset
//! would shift both sides of the difference alike and stay unseen.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Clocks read together with the TSC.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The middle of the two TSC readings around the clock's.
    pub tsc: u64,
    /// CLOCK_MONOTONIC_RAW, ns.
    pub raw_ns: u64,
    /// CLOCK_REALTIME, ns, at the same place.
    pub real_ns: u64,
    /// TSC ticks between the two TSC readings: the sample's uncertainty.
    pub window: u64,
}

/// `clock_gettime`, in ns; `clock` is one of libc's CLOCK constants.
pub fn now_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to be written to; the call cannot fail for the fixed clocks used here.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// CLOCK_MONOTONIC, ns.
pub fn mono_ns() -> u64 {
    now_ns(libc::CLOCK_MONOTONIC)
}

/// The TSC, read after everything before it.
pub fn rdtsc() -> u64 {
    // SAFETY: LFENCE and RDTSC exist on every x86-64 CPU and touch no memory.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// The closest of `tries` readings.
pub fn sample(tries: usize) -> Sample {
    let (raw_ns, tsc, window) = closest(libc::CLOCK_MONOTONIC_RAW, tries);
    let (real, real_tsc, _) = closest(libc::CLOCK_REALTIME, tries);
    // The two were read some µs apart: brought to the same place, at the rate of the two raw readings around them.
    let raw_later = closest(libc::CLOCK_MONOTONIC_RAW, tries);
    let rate = (raw_later.0 - raw_ns) as f64 / (raw_later.1.saturating_sub(tsc)).max(1) as f64;
    let real_ns = (real as i64 - ((real_tsc as i64 - tsc as i64) as f64 * rate) as i64) as u64;
    Sample { tsc, raw_ns, real_ns, window }
}

fn closest(clock: libc::clockid_t, tries: usize) -> (u64, u64, u64) {
    let mut best = (0, 0, u64::MAX);
    for _ in 0..tries.max(1) {
        let before = rdtsc();
        let ns = now_ns(clock);
        let window = rdtsc().saturating_sub(before);
        if window < best.2 {
            best = (ns, before + window / 2, window);
        }
    }
    best
}

/// Which of the two clocks of a [`Sample`] is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Which {
    Raw,
    Real,
}

impl Which {
    fn of(self, sample: &Sample) -> u64 {
        match self {
            Self::Raw => sample.raw_ns,
            Self::Real => sample.real_ns,
        }
    }
}

/// The guest's clock minus L1's at the place of the guest's sample, ns, with an unknown constant in it for
/// [`Which::Raw`].
///
/// `before` and `after` are L1's samples around the guest's. `None`: they are not around it, so `offset` (guest TSC
/// minus L1's) is wrong.
pub fn difference(which: Which, before: &Sample, guest: &Sample, after: &Sample, offset: i64) -> Option<i64> {
    let at = (guest.tsc as i64).wrapping_sub(offset) as u64;
    if !(before.tsc..=after.tsc).contains(&at) || before.tsc == after.tsc {
        return None;
    }
    let (from, to) = (which.of(before), which.of(after));
    let part = (at - before.tsc) as f64 / (after.tsc - before.tsc) as f64;
    let host = from as i64 + ((to as i64 - from as i64) as f64 * part).round() as i64;
    Some(which.of(guest) as i64 - host)
}

/// Least squares slope of `values` over their index.
pub fn slope(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if values.len() < 2 {
        return 0.0;
    }
    let (mean_x, mean_y) = ((n - 1.0) / 2.0, values.iter().sum::<f64>() / n);
    let (mut over, mut under) = (0.0, 0.0);
    for (i, value) in values.iter().enumerate() {
        let x = i as f64 - mean_x;
        over += x * (value - mean_y);
        under += x * x;
    }
    over / under
}

/// The middle value; 0 for none.
pub fn median(values: &[i64]) -> i64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// Sleeps until `at_ns` on CLOCK_MONOTONIC.
pub fn sleep_until(at_ns: u64) {
    let time = libc::timespec { tv_sec: (at_ns / 1_000_000_000) as i64, tv_nsec: (at_ns % 1_000_000_000) as i64 };
    // SAFETY: `time` is valid, and no remainder is asked for.
    while unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &time, std::ptr::null_mut()) }
        == libc::EINTR
    {}
}

/// `duration` in whole µs.
pub fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tsc: u64, raw_ns: u64) -> Sample {
        Sample { tsc, raw_ns, real_ns: raw_ns + 1_000_000_000, window: 100 }
    }

    #[test]
    fn a_clock_that_keeps_time_has_no_error() {
        // 2 GHz; the guest's TSC starts at -10_000, and its clock 7 s after L1's.
        let (before, after) = (at(100_000, 50_000), at(300_000, 150_000));
        let first = difference(Which::Raw, &before, &at(190_000, 7_000_100_000), &after, -10_000);
        let second = difference(Which::Raw, &before, &at(192_000, 7_000_101_000), &after, -10_000);
        assert_eq!(first, Some(7_000_000_000));
        assert_eq!(second, first);
    }

    #[test]
    fn a_jump_is_seen() {
        let (before, after) = (at(100_000, 50_000), at(300_000, 150_000));
        assert_eq!(difference(Which::Real, &before, &at(200_000, 100_777), &after, 0), Some(777));
    }

    #[test]
    fn a_wrong_offset_is_noticed() {
        let (before, after) = (at(100_000, 50_000), at(300_000, 150_000));
        assert_eq!(difference(Which::Raw, &before, &at(200_000, 100_000), &after, 250_000), None);
    }

    #[test]
    fn slopes() {
        assert_eq!(slope(&[1.0, 3.0, 5.0, 7.0]), 2.0);
        assert_eq!(slope(&[4.0, 4.0, 4.0]), 0.0);
        assert_eq!(slope(&[4.0]), 0.0);
        assert_eq!(median(&[9, -1, 3]), 3);
    }

    #[test]
    fn samples_advance() {
        let (a, b) = (sample(10), sample(10));
        assert!(b.tsc > a.tsc && b.raw_ns > a.raw_ns && a.window < u64::MAX);
        let between = difference(Which::Real, &a, &a, &b, 0).unwrap();
        assert!(between.abs() < 2, "{between}");
    }
}
