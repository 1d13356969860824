//! Warnings that a guest can provoke: a few are of use, a million fill the host's disk.

/// Logs the first hundred, then one more that says so.
#[derive(Debug)]
pub struct Complaints {
    left: u32,
}

impl Default for Complaints {
    fn default() -> Self {
        Self { left: 100 }
    }
}

impl Complaints {
    pub fn warn(&mut self, message: impl FnOnce() -> String) {
        match self.left {
            0 => return,
            1 => log::warn!("{} (further warnings of this kind are not logged)", message()),
            _ => log::warn!("{}", message()),
        }
        self.left -= 1;
    }
}
