//! The report of an update as a table.

use std::fmt::Write;

use theseus_api::types::{BuildInfo, UpdateOutcome, UpdateReport};

/// The report for people, with a newline at the end.
pub(crate) fn table(report: &UpdateReport) -> String {
    let UpdateReport { outcome, from, to, pid, pause_us, phases, devices, containers, .. } = report;
    let headline = match outcome {
        UpdateOutcome::Updated => "updated",
        UpdateOutcome::RolledBack => "ROLLED BACK: the guest runs in the old build",
        UpdateOutcome::Refused => "REFUSED: the guest was not touched",
        UpdateOutcome::Ready => "ready: the update would go ahead",
    };
    let target = to.as_ref().map_or_else(|| "unknown".into(), build);
    let mut lines = vec![headline.to_string(), String::new()];
    lines.push(format!("  from  {}", build(from)));
    lines.push(format!("  to    {target}"));
    lines.push(format!("  pid   {pid}"));
    if !devices.is_empty() {
        lines.push(format!("  kept  {} in {}", listed("device", devices), listed("container", containers)));
    }
    lines.push(String::new());

    let rows: Vec<(&str, u64)> = phases.iter().map(|p| (p.name.as_str(), p.us)).collect();
    let pause = pause_us.map(|us| ("guest paused", us));
    let width = rows.iter().chain(&pause).map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let numbers = rows.iter().chain(&pause).map(|(_, us)| grouped(*us).len()).max().unwrap_or(0);
    let row = |(name, us): &(&str, u64)| format!("  {name:width$}  {:>numbers$} µs", grouped(*us));
    lines.extend(rows.iter().map(row));
    if let Some(pause) = &pause {
        lines.push(format!("  {}", "-".repeat(width + numbers + 5)));
        lines.push(row(pause));
    }
    lines.iter().fold(String::new(), |mut text, line| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
        text
    })
}

fn build(build: &BuildInfo) -> String {
    format!("{} (build {})", build.version, build.build_id)
}

/// `2 devices (nic0, nic1)`
fn listed(what: &str, names: &[String]) -> String {
    let plural = if names.len() == 1 { "" } else { "s" };
    format!("{} {what}{plural} ({})", names.len(), names.join(", "))
}

/// `12 345`
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use theseus_api::types::PhaseTime;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1 000", "1 234 567"]);
    }

    #[test]
    fn a_table() {
        let report = UpdateReport {
            outcome: UpdateOutcome::Updated,
            from: BuildInfo { version: "0.1.0".into(), build_id: "aa".into() },
            to: Some(BuildInfo { version: "0.2.0".into(), build_id: "bb".into() }),
            pid: 42,
            vmm_pid: 43,
            vcpu_threads: vec![44],
            pause_us: Some(18_200),
            phases: vec![PhaseTime { name: "prepare".into(), us: 120_000 }, PhaseTime { name: "save".into(), us: 900 }],
            devices: vec!["nic".into()],
            containers: vec!["default".into()],
            reasons: vec![],
        };
        let expected = "\
updated

  from  0.1.0 (build aa)
  to    0.2.0 (build bb)
  pid   42
  kept  1 device (nic) in 1 container (default)

  prepare       120 000 µs
  save              900 µs
  ------------------------
  guest paused   18 200 µs
";
        assert_eq!(table(&report), expected);
    }
}
