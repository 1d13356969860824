//! What the vCPUs have noted.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context, Result};

use crate::harness::proc;

use super::{BLOCK, BLOCKS, GO};

/// What a vCPU has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub rounds: u64,
    pub steps: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    /// MSRs that read otherwise than they did: how often, and the first with what it read and what it had read.
    pub differences: u64,
    pub first: [u64; 3],
}

/// The memory of such a guest.
pub struct Memory(File);

impl Memory {
    /// That of the guest which process `pid` has.
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self(proc::open_fd_to(pid, "/memfd:guest-ram", File::options().read(true).write(true))?))
    }

    pub fn progress(&self, vcpu: u64) -> Result<Progress> {
        let mut block = [0; BLOCK as usize];
        self.0.read_exact_at(&mut block, BLOCKS + vcpu * BLOCK).context("the guest's memory")?;
        let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap_or_default());
        Ok(Progress {
            rounds: word(0),
            steps: word(8),
            exceptions: word(16),
            interrupts: word(64),
            differences: word(24),
            first: [word(32), word(40), word(48)],
        })
    }

    /// What vCPUs [`wait`] for.
    pub fn go(&self) -> Result<()> {
        Ok(self.0.write_all_at(&[1], GO)?)
    }
}
