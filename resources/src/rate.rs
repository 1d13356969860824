//! How often something may be done that somebody else can provoke without end: log lines, reboots, tries.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// `burst` times at once, and then one time each `each`, on average.
#[derive(Debug)]
pub struct Rate {
    burst: u32,
    each: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When all that was taken will have been given back.
    full: Option<Instant>,
    /// Refused since the last time that was not.
    refused: u64,
}

impl Rate {
    /// Nothing is taken yet. A `burst` of 0 is one of 1.
    pub const fn new(burst: u32, each: Duration) -> Self {
        Self { burst, each, state: Mutex::new(State { full: None, refused: 0 }) }
    }

    /// Takes one time: how many were refused since the last one. The error is how long to wait for the next.
    pub fn take(&self) -> Result<u64, Duration> {
        self.take_at(Instant::now())
    }

    fn take_at(&self, now: Instant) -> Result<u64, Duration> {
        let mut state = self.state.lock();
        let full = state.full.map_or(now, |full| full.max(now));
        let before = self.each.saturating_mul(self.burst.saturating_sub(1));
        let wait = full.duration_since(now).saturating_sub(before);
        if !wait.is_zero() {
            state.refused = state.refused.saturating_add(1);
            return Err(wait);
        }
        state.full = full.checked_add(self.each);
        Ok(std::mem::take(&mut state.refused))
    }

    /// Logs a warning, if its time has come, and how many others were not logged.
    pub fn warn(&self, message: impl FnOnce() -> String) {
        match self.take() {
            Ok(0) => log::warn!("{}", message()),
            Ok(more) => log::warn!("{} ({more} warnings of this kind were not logged)", message()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_at_a_time() {
        let rate = Rate::new(3, Duration::from_secs(10));
        let start = Instant::now();
        let at = |s| rate.take_at(start + Duration::from_secs(s));
        assert_eq!([at(0), at(0), at(1)], [Ok(0); 3]);
        assert_eq!(at(1), Err(Duration::from_secs(9)));
        assert_eq!(at(4), Err(Duration::from_secs(6)));
        assert_eq!(at(10), Ok(2), "and says how many were refused");
        assert_eq!(at(11), Err(Duration::from_secs(9)));
        assert_eq!([at(100), at(100), at(100)], [Ok(1), Ok(0), Ok(0)]);
        assert!(at(100).is_err());
        assert_eq!(at(99), Err(Duration::from_secs(11)), "a clock that goes back");
    }
}
