//! What the tests in L1 stand on: the VMM as a process and as an API, the agent in its guest, the far end of each wire.

pub mod agent;
pub mod builder;
pub mod capabilities;
pub mod clock;
pub mod credit;
pub mod exits;
pub mod fences;
pub mod hooks;
pub mod http;
pub mod lab;
pub mod logs;
pub mod placement;
pub mod proc;
pub mod process;
pub mod ram;
pub mod report;
pub mod rig;
pub mod signing;
pub mod systemd;
pub mod table;
pub mod traffic;
pub mod vfio;
pub mod vm;
pub mod vm_info;
pub mod wire;

use std::time::{Duration, Instant};

pub use crate::PATIENCE;

/// Waits until `check` returns something, looking often; for what cannot be waited for otherwise (files of /proc,
/// sysfs, debugfs).
pub fn wait_for<T>(what: &str, mut check: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = check()? {
            return Ok(value);
        }
        anyhow::ensure!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
