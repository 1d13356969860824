//! Warnings that a guest can provoke: a few are of use, a million fill the host's disk.

use std::time::Duration;

use theseus_resources::rate::Rate;

/// Of all devices together: a guest that reboots itself has new ones each time.
static ALL: Rate = Rate::new(200, Duration::from_secs(10));

/// Logs the first hundred of a device; the last of them says that no more follow.
#[derive(Debug)]
pub(crate) struct RateLimitedLog {
    left: u32,
}

impl Default for RateLimitedLog {
    fn default() -> Self {
        Self { left: 100 }
    }
}

impl RateLimitedLog {
    pub(crate) fn warn(&mut self, message: impl FnOnce() -> String) {
        match self.left {
            0 => return,
            1 => ALL.warn(|| format!("{} (further warnings of this kind are not logged)", message())),
            _ => ALL.warn(message),
        }
        self.left -= 1;
    }
}
