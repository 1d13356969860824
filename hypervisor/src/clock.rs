//! kvmclock over an update: it runs on through the pause and agrees with the host's TSC after any number of updates.
//!
//! KVM_SET_CLOCK takes effect some hundred nanoseconds after the value was computed. Saved and set each time, that
//! error would add up. So the first image to save takes an anchor (guest clock, host TSC) which goes over verbatim, and
//! each image sets its clock to what the anchor says: set, read back with the TSC at which it was read, correct by the
//! difference.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Vm};

/// Beyond this the guest's clock was moved by something else than updates (host suspend, master clock update).
const SAME_CLOCK_NS: u64 = 20_000;

const ROUNDS: u32 = 12;
/// What a round must reach; twice as much every two rounds.
const GOOD_NS: u64 = 100;

/// The guest's clocks at a moment of its pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, ns.
    clock: u64,
    /// The TSC of each vCPU.
    tscs: Vec<u64>,
}

/// A [`ClockAnchor`]: the host's clocks are in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockHandles {
    clock: u64,
    host_tsc: u64,
    raw_ns: u64,
    tsc_khz: u32,
}

/// A moment at which the guest's clock is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockAnchor {
    /// kvmclock, ns.
    pub clock: u64,
    /// Host TSC at that moment; 0 where the kernel does not tell (no master clock).
    pub host_tsc: u64,
    /// CLOCK_MONOTONIC_RAW at that moment, ns: used where there is no host TSC.
    pub raw_ns: u64,
    /// What the TSC runs at; 0 where KVM does not tell.
    pub tsc_khz: u32,
}

impl ClockAnchor {
    /// The guest's clock at the host TSC `tsc`.
    fn at_tsc(&self, tsc: u64) -> u64 {
        let delta = i128::from(tsc) - i128::from(self.host_tsc);
        let ns = delta * 1_000_000 / i128::from(self.tsc_khz.max(1));
        self.clock.wrapping_add_signed(ns as i64)
    }

    fn has_tsc(&self) -> bool {
        self.host_tsc != 0 && self.tsc_khz != 0
    }

    /// As the image before had it.
    pub fn restore(handles: ClockHandles) -> Self {
        let ClockHandles { clock, host_tsc, raw_ns, tsc_khz } = handles;
        Self { clock, host_tsc, raw_ns, tsc_khz }
    }
}

/// What [`Vm::save_clock`] has found.
pub struct SavedClock {
    now: ClockAnchor,
    anchor: ClockAnchor,
}

impl SavedClock {
    /// `tsc_offsets`: of each vCPU, what its TSC is ahead of the host's.
    pub fn state(&self, tsc_offsets: impl Iterator<Item = u64>) -> ClockState {
        let ClockAnchor { clock, host_tsc, raw_ns: _, tsc_khz: _ } = self.now;
        // Where the kernel does not tell the moment's, one of a little later.
        let host_tsc = if host_tsc == 0 { read_tsc() } else { host_tsc };
        ClockState { clock, tscs: tsc_offsets.map(|offset| host_tsc.wrapping_add(offset)).collect() }
    }

    /// The anchor to hand over: the one this image was given while it still holds, else a new one.
    pub fn handles(&self) -> ClockHandles {
        let ClockAnchor { clock, host_tsc, raw_ns, tsc_khz } = self.anchor;
        ClockHandles { clock, host_tsc, raw_ns, tsc_khz }
    }
}

/// The host's time stamp counter.
pub fn read_tsc() -> u64 {
    // SAFETY: RDTSC is unprivileged on Linux (CR4.TSD is off unless a process asks for it).
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn raw_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

impl Vm {
    fn clock(&self) -> Result<kvm_clock_data> {
        self.fd().get_clock().map_err(Error::call("KVM_GET_CLOCK"))
    }

    /// `given`: the anchor that this image was given, if it was. `tsc_khz`: what the vCPUs' TSC runs at.
    pub fn save_clock(&self, given: Option<ClockAnchor>, tsc_khz: u32) -> Result<SavedClock> {
        let read = self.clock()?;
        let host_tsc = if read.flags & KVM_CLOCK_HOST_TSC != 0 { read.host_tsc } else { 0 };
        let now = ClockAnchor { clock: read.clock, host_tsc, raw_ns: raw_ns(), tsc_khz };
        let holds = |anchor: &ClockAnchor| anchor.at_tsc(host_tsc).abs_diff(now.clock) <= SAME_CLOCK_NS;
        let given = given.filter(|anchor| anchor.has_tsc() && now.has_tsc());
        Ok(SavedClock { now, anchor: given.filter(holds).unwrap_or(now) })
    }

    /// Call when all vCPUs have their TSC offsets (only then is there a master clock) and before the kvmclock MSRs are
    /// set. Returns the error left, in ns, where it can be known.
    pub fn restore_clock(&self, anchor: &ClockAnchor) -> Result<Option<i64>> {
        let set = |clock: u64| {
            let data = kvm_clock_data { clock, ..Default::default() };
            self.fd().set_clock(&data).map_err(Error::call("KVM_SET_CLOCK"))
        };
        if !anchor.has_tsc() {
            set(anchor.clock.wrapping_add(raw_ns().saturating_sub(anchor.raw_ns)))?;
            return Ok(None);
        }
        let mut lead = 0i64;
        let mut left = None;
        // Each round measures how long a set takes to take effect, and the next one uses it. An interruption between
        // reading the TSC and the kernel's own reading spoils a round: go on until one is good, with less and less
        // ambition.
        for round in 0..ROUNDS {
            set(anchor.at_tsc(read_tsc()).wrapping_add_signed(lead))?;
            let now = self.clock()?;
            if now.flags & KVM_CLOCK_HOST_TSC == 0 {
                break;
            }
            let error = now.clock.wrapping_sub(anchor.at_tsc(now.host_tsc)) as i64;
            left = Some(error);
            if error.unsigned_abs() <= GOOD_NS << (round / 2) {
                break;
            }
            lead = lead.wrapping_sub(error);
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_clock_is_the_guest_s_and_its_anchor_the_host_s() {
        let anchor = ClockAnchor { clock: 5, host_tsc: 1000, raw_ns: 7, tsc_khz: 2_000_000 };
        let saved = SavedClock { now: ClockAnchor { clock: 500, host_tsc: 2000, ..anchor }, anchor };
        let state = saved.state([0, 10, (-1500_i64) as u64].into_iter());
        assert_eq!(state, ClockState { clock: 500, tscs: vec![2000, 2010, 500] });
        assert_eq!(ClockAnchor::restore(saved.handles()), anchor);
    }

    #[test]
    fn an_anchor_runs_with_the_tsc_both_ways() {
        let anchor = ClockAnchor { clock: 5_000_000_000, host_tsc: 1_000_000, raw_ns: 0, tsc_khz: 2_000_000 };
        assert_eq!(anchor.at_tsc(1_000_000), 5_000_000_000);
        assert_eq!(anchor.at_tsc(3_000_000), 5_001_000_000);
        assert_eq!(anchor.at_tsc(0), 4_999_500_000);
        // 100 days at 5 GHz neither overflow nor lose a nanosecond.
        let fast = ClockAnchor { tsc_khz: 5_000_000, ..anchor };
        assert_eq!(fast.at_tsc(1_000_000 + 100 * 86_400 * 5_000_000_000), 5_000_000_000 + 100 * 86_400 * 1_000_000_000);
    }
}
