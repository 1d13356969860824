//! The accesses of guests to an I/O port, as L1's KVM counts them.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use crate::counters;

/// A trace buffer of its own; what it holds is of no interest, only how much was written.
const INSTANCE: &str = "/sys/kernel/tracing/instances/exits";

/// Counts until it is dropped.
pub struct PortAccesses(());

impl PortAccesses {
    /// From now on, to `port`, by all guests of this kernel.
    pub fn count(port: u16) -> Result<Self> {
        counters::mount_tracefs();
        if !Path::new(INSTANCE).exists() {
            fs::create_dir(INSTANCE).context(INSTANCE)?;
        }
        let this = Self(());
        set("events/kvm/kvm_pio/filter", &format!("port == {port}"))?;
        set("events/kvm/kvm_pio/enable", "1")?;
        Ok(this)
    }

    pub fn so_far(&self) -> Result<u64> {
        let trace = fs::read_to_string(Path::new(INSTANCE).join("trace")).context(INSTANCE)?;
        written(&trace).with_context(|| format!("{INSTANCE}/trace has no count"))
    }
}

impl Drop for PortAccesses {
    fn drop(&mut self) {
        let _ = set("events/kvm/kvm_pio/enable", "0");
        let _ = fs::remove_dir(INSTANCE);
    }
}

fn set(name: &str, text: &str) -> Result<()> {
    fs::write(Path::new(INSTANCE).join(name), text).with_context(|| format!("{INSTANCE}/{name}"))
}

/// Of `# entries-in-buffer/entries-written: 12/345   #P:1`, the second, which counts those that were overwritten, too.
fn written(trace: &str) -> Option<u64> {
    let line = trace.lines().find_map(|line| line.strip_prefix("# entries-in-buffer/entries-written: "))?;
    line.split_once('/')?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_how_many_there_were() {
        let trace = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 12/345   #P:1\n#\n vcpu0-7 [000] ...\n";
        assert_eq!(written(trace), Some(345));
        assert_eq!(written("# tracer: nop\n"), None);
    }
}
