//! What the event stream says: one [`EventLine`] a line.

use serde::{Deserialize, Serialize};

use super::{BuildInfo, UpdateOutcome, UpdateReport};

/// A line of the event stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct EventLine {
    /// When it was said.
    pub timestamp: Timestamp,
    /// Who says what.
    #[serde(flatten)]
    pub event: Event,
}

/// Since 1970, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Timestamp {
    /// Whole seconds.
    pub secs: u64,
    /// Nanoseconds beside them.
    pub nanos: u32,
}

/// What has happened, by whom it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum Event {
    /// The guest's machine.
    Vm(VmEvent),
    /// The VMM itself.
    Vmm(VmmEvent),
    /// An update of the VMM.
    Update(Box<UpdateEvent>),
}

/// Of the guest's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "event", content = "properties", rename_all = "snake_case")]
pub enum VmEvent {
    /// By vm.create, or by the command line.
    Created {},
    /// A boot has begun.
    Booting {},
    /// The guest runs.
    Booted(Threads),
    /// vm.pause is about to be carried out.
    Pausing {},
    /// The guest stands still.
    Paused {},
    /// vm.resume is about to be carried out.
    Resuming {},
    /// The guest runs on.
    Resumed {},
    /// By vm.reboot, or as the guest has reset itself.
    Rebooting {},
    /// The guest was booted again.
    Rebooted(Threads),
    /// The guest has ended, by whomever.
    Shutdown {},
    /// Its configuration is gone too.
    Deleted {},
    /// The guest has done it: what comes of it follows.
    PoweredOff {},
    /// The guest has done it: what comes of it follows.
    Reset {},
    /// The host has lost a page of the guest's memory; said once a page.
    MemoryError {
        /// The page's address in the guest.
        gpa: u64,
        /// A vCPU was in need of it.
        needed: bool,
    },
    /// KVM or the VMM cannot go on with the guest, or cannot boot it.
    Failed {
        /// For people.
        reason: String,
    },
}

/// Who runs the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Threads {
    /// The process below the one that everybody knows, as in vmm.ping.
    pub vmm_pid: u32,
    /// Of the vCPUs, in order.
    pub vcpu_threads: Vec<i32>,
}

/// Of the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "event", content = "properties", rename_all = "snake_case")]
pub enum VmmEvent {
    /// The first event of a VMM that is not the target of an update.
    Starting {},
    /// The last event.
    Shutdown {
        /// The cause, where it was a signal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

/// Of `vm.update`: prepared and then updated or rolled_back, or at once refused or ready, with the report. Of one that
/// is too long for a line (4 KiB) there are `pid`, `outcome` and the first of `reasons` only, and `shortened`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "event", content = "properties", rename_all = "snake_case")]
pub enum UpdateEvent {
    /// The target is ready to take over: the guest is about to stand still.
    Prepared {
        /// The target.
        to: BuildInfo,
    },
    /// The guest runs in the new build.
    Updated(UpdateReport),
    /// The guest was stopped and runs in the old build again.
    RolledBack(UpdateReport),
    /// The guest was not touched.
    Refused(UpdateReport),
    /// A dry run found nothing against the update.
    Ready(UpdateReport),
}

impl From<UpdateReport> for UpdateEvent {
    fn from(report: UpdateReport) -> Self {
        match report.outcome {
            UpdateOutcome::Updated => Self::Updated(report),
            UpdateOutcome::RolledBack => Self::RolledBack(report),
            UpdateOutcome::Refused => Self::Refused(report),
            UpdateOutcome::Ready => Self::Ready(report),
        }
    }
}

impl From<VmEvent> for Event {
    fn from(event: VmEvent) -> Self {
        Self::Vm(event)
    }
}

impl From<VmmEvent> for Event {
    fn from(event: VmmEvent) -> Self {
        Self::Vmm(event)
    }
}

impl From<UpdateEvent> for Event {
    fn from(event: UpdateEvent) -> Self {
        Self::Update(Box::new(event))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;

    /// Source, event, properties of each.
    fn all() -> Vec<(Event, &'static str, &'static str, Value)> {
        let threads = || Threads { vmm_pid: 7, vcpu_threads: vec![8] };
        let threads_text = json!({"vmm_pid": 7, "vcpu_threads": [8]});
        let report = |outcome| {
            let report = json!({"outcome": outcome, "from": {"version": "1", "build_id": "a"}, "pid": 7});
            UpdateEvent::from(serde_json::from_value::<UpdateReport>(report).unwrap()).into()
        };
        let report_text = |outcome: &str| {
            json!({"outcome": outcome, "from": {"version": "1", "build_id": "a"}, "pid": 7, "vmm_pid": 0,
                "vcpu_threads": [], "phases": [], "devices": [], "containers": [], "reasons": []})
        };
        let to = BuildInfo { version: "2".into(), build_id: "b".into() };
        vec![
            (VmEvent::Created {}.into(), "vm", "created", json!({})),
            (VmEvent::Booting {}.into(), "vm", "booting", json!({})),
            (VmEvent::Booted(threads()).into(), "vm", "booted", threads_text.clone()),
            (VmEvent::Pausing {}.into(), "vm", "pausing", json!({})),
            (VmEvent::Paused {}.into(), "vm", "paused", json!({})),
            (VmEvent::Resuming {}.into(), "vm", "resuming", json!({})),
            (VmEvent::Resumed {}.into(), "vm", "resumed", json!({})),
            (VmEvent::Rebooting {}.into(), "vm", "rebooting", json!({})),
            (VmEvent::Rebooted(threads()).into(), "vm", "rebooted", threads_text),
            (VmEvent::Shutdown {}.into(), "vm", "shutdown", json!({})),
            (VmEvent::Deleted {}.into(), "vm", "deleted", json!({})),
            (VmEvent::PoweredOff {}.into(), "vm", "powered_off", json!({})),
            (VmEvent::Reset {}.into(), "vm", "reset", json!({})),
            (
                VmEvent::MemoryError { gpa: 4096, needed: true }.into(),
                "vm",
                "memory_error",
                json!({"gpa": 4096, "needed": true}),
            ),
            (VmEvent::Failed { reason: "x".into() }.into(), "vm", "failed", json!({"reason": "x"})),
            (VmmEvent::Starting {}.into(), "vmm", "starting", json!({})),
            (VmmEvent::Shutdown { signal: None }.into(), "vmm", "shutdown", json!({})),
            (VmmEvent::Shutdown { signal: Some(15) }.into(), "vmm", "shutdown", json!({"signal": 15})),
            (
                UpdateEvent::Prepared { to }.into(),
                "update",
                "prepared",
                json!({"to": {"version": "2", "build_id": "b"}}),
            ),
            (report("updated"), "update", "updated", report_text("updated")),
            (report("rolled_back"), "update", "rolled_back", report_text("rolled_back")),
            (report("refused"), "update", "refused", report_text("refused")),
            (report("ready"), "update", "ready", report_text("ready")),
        ]
    }

    #[test]
    fn each_event_is_on_the_wire_as_it_always_was() {
        for (event, source, name, properties) in all() {
            let line = EventLine { timestamp: Timestamp { secs: 1, nanos: 2 }, event };
            let expected = json!({
                "timestamp": {"secs": 1, "nanos": 2}, "source": source, "event": name, "properties": properties
            });
            assert_eq!(serde_json::to_value(&line).unwrap(), expected);
            assert_eq!(serde_json::from_value::<EventLine>(expected).unwrap(), line);
        }
    }

    /// The names of the generated schema are all that there are, so that none is left out above or in the guide.
    #[test]
    fn the_guide_and_the_test_above_name_every_event() {
        let mut declared = BTreeSet::new();
        let schemas =
            [schemars::schema_for!(VmEvent), schemars::schema_for!(VmmEvent), schemars::schema_for!(UpdateEvent)];
        for (source, schema) in ["vm", "vmm", "update"].into_iter().zip(&schemas) {
            for variant in schema.as_value()["oneOf"].as_array().unwrap() {
                let name = variant["properties"]["event"]["const"].as_str().unwrap();
                declared.insert((source, name));
            }
        }
        assert_eq!(declared, all().iter().map(|(_, source, name, _)| (*source, *name)).collect());
        let guide = include_str!("../../../docs/guide.md");
        let (_, section) = guide.split_once("\n## Event stream\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let words: BTreeSet<&str> = section.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
        for (source, name) in declared {
            assert!(words.contains(source) && words.contains(name), "docs/guide.md: {source} {name}");
        }
    }
}
