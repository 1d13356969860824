//! In which order the guest's kernel ran an interrupt's handler and the watchdog of the driver, which fires all of its
//! interrupts by itself.

use std::{fs, io, path::PathBuf, sync::Mutex};

use crate::{agent::machine, counters, proto::Traced};

/// A buffer of its own beside that of [`counters::note_drops`].
const INSTANCE: &str = "/sys/kernel/tracing/instances/order";

/// Of the NIC whose vector is traced: the watchdogs of others say nothing of it.
static DRIVER: Mutex<String> = Mutex::new(String::new());

/// From now on, and forgetting what was before: the interrupts of the vector that is called `vector`.
pub(super) fn start(vector: &str) -> io::Result<()> {
    counters::mount_tracefs();
    let dir = PathBuf::from(INSTANCE);
    if !dir.exists() {
        fs::create_dir(&dir).map_err(|e| io::Error::new(e.kind(), format!("{INSTANCE}: {e}")))?;
    }
    let vectors = machine::interrupts(vector)?;
    let found = vectors.iter().find(|v| v.name == vector).ok_or_else(|| io::Error::other(format!("no {vector}")))?;
    // "eth0-rx-0", "eth1"
    let interface = vector.split('-').next().unwrap_or(vector);
    let driver = fs::read_link(format!("/sys/class/net/{interface}/device/driver"))?;
    let driver = driver.file_name().unwrap_or_default().to_string_lossy().into_owned();
    *DRIVER.lock().map_err(|_| io::Error::other("poisoned"))? = driver;
    for (name, text) in [
        // CLOCK_MONOTONIC, as in an Arrival.
        ("trace_clock", "mono"),
        ("events/irq/irq_handler_entry/filter", &format!("irq == {}", found.irq)),
        ("events/irq/irq_handler_entry/enable", "1"),
        ("events/workqueue/workqueue_execute_start/enable", "1"),
        ("trace", ""),
    ] {
        fs::write(dir.join(name), text).map_err(|e| io::Error::new(e.kind(), format!("{INSTANCE}/{name}: {e}")))?;
    }
    Ok(())
}

/// What has happened since.
pub(super) fn read() -> io::Result<Vec<Traced>> {
    let driver = DRIVER.lock().map_err(|_| io::Error::other("poisoned"))?;
    let trace = fs::read_to_string(PathBuf::from(INSTANCE).join("trace"))?;
    Ok(trace.lines().filter_map(|line| parse(line, &driver)).collect())
}

fn parse(line: &str, driver: &str) -> Option<Traced> {
    let (head, is_interrupt) = match line.split_once(": irq_handler_entry: ") {
        Some((head, _)) => (head, true),
        None => {
            let (head, event) = line.split_once(": workqueue_execute_start: ")?;
            let function = event.split_once("function ")?.1;
            // igb_watchdog_task, e1000_watchdog_task; others call it service task.
            let is_watchdog = function.contains("watchdog_task") || function.contains("service_task");
            (is_watchdog && function.trim_end().ends_with(&format!("[{driver}]"))).then_some((head, false))?
        }
    };
    let (seconds, micros) = head.split_whitespace().next_back()?.split_once('.')?;
    let at_ns = seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1000;
    Some(Traced { at_ns, is_interrupt })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let irq = "          <idle>-0       [001] d.h1.   123.456789: irq_handler_entry: irq=25 name=eth0-TxRx-0";
        let tick = " kworker/0:1-10 [000] .....   124.000001: workqueue_execute_start: work struct 000000007c: \
                    function igb_watchdog_task [igb]";
        let other = " kworker/0:1-10 [000] .....   124.000001: workqueue_execute_start: work struct 000000007c: \
                     function vmstat_update";
        let neighbour = " kworker/0:1-10 [000] .....   124.000001: workqueue_execute_start: work struct 000000007c: \
                         function e1000_watchdog_task [e1000e]";
        let parse = |line| parse(line, "igb");
        assert_eq!(parse(neighbour), None, "another NIC's");
        assert_eq!(parse(irq), Some(Traced { at_ns: 123_456_789_000, is_interrupt: true }));
        assert_eq!(parse(tick), Some(Traced { at_ns: 124_000_001_000, is_interrupt: false }));
        assert_eq!(parse(other), None);
        assert_eq!(parse("# tracer: nop"), None);
    }
}
