//! `vm.update`: what is asked for and what is reported.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How the new build takes over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UpdateMode {
    /// In place, under the same PID.
    #[default]
    Exec,
}

/// What to update to, and how; an empty body means all defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct UpdateRequest {
    /// The new build; default: the file this process was started from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// SHA-256 the file must have, 64 hex digits.
    #[cfg_attr(test, schemars(regex(pattern = "^[0-9A-Fa-f]{64}$")))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Stop after prepare and report whether the update would go ahead.
    pub dry_run: bool,
    /// Milliseconds from the pause to the guest's next instruction; after that the guest goes back to the running
    /// build. Default: 10000.
    #[cfg_attr(test, schemars(range(min = 1)))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// How the new build takes over; there is one way so far.
    pub mode: UpdateMode,
    /// Accept a target of a lower version than the running build.
    pub allow_downgrade: bool,
}

impl UpdateRequest {
    /// Checks what can be checked without looking at the target.
    ///
    /// # Errors
    /// One sentence for every problem.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut problems = Vec::new();
        if self.binary.as_ref().is_some_and(|b| !b.is_absolute()) {
            problems.push("binary is not an absolute path: the VMM has its own working directory".into());
        }
        if self.sha256.as_ref().is_some_and(|s| s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit())) {
            problems.push("sha256 is not 64 hex digits: give what sha256sum prints".into());
        }
        if self.deadline_ms == Some(0) {
            problems.push("deadline_ms is 0: give the milliseconds the update may take, or leave it out".into());
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

/// Which build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct BuildInfo {
    /// Version of the package.
    pub version: String,
    /// Linker build id, lower-case hex.
    pub build_id: String,
}

/// What has come of `vm.update`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UpdateOutcome {
    /// The guest runs in the new build.
    Updated,
    /// The guest was stopped and runs in the old build again.
    RolledBack,
    /// The guest was not touched.
    Refused,
    /// A dry run found nothing against the update.
    Ready,
}

/// Time spent in one phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PhaseTime {
    /// For people: phases may be others in another build.
    pub name: String,
    /// Microseconds.
    pub us: u64,
}

/// Answer of `vm.update`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct UpdateReport {
    /// How it has ended.
    pub outcome: UpdateOutcome,
    /// The build that was to be replaced.
    pub from: BuildInfo,
    /// The target's; absent where it was never identified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<BuildInfo>,
    /// The process that everybody knows, from now on.
    pub pid: u32,
    /// The process below that one which runs the guest now.
    #[serde(default)]
    pub vmm_pid: u32,
    /// The threads of its vCPUs, in order.
    #[serde(default)]
    pub vcpu_threads: Vec<i32>,
    /// Microseconds from the moment the vCPUs are asked to stop to the one in which the last of them goes into the guest
    /// again; absent where they were not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// In the order they passed.
    #[serde(default)]
    pub phases: Vec<PhaseTime>,
    /// Ids of the devices carried.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Names of the VFIO containers carried.
    #[serde(default)]
    pub containers: Vec<String>,
    /// Why it did not update; empty where it did.
    #[serde(default)]
    pub reasons: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::super::from_body;
    use super::*;

    #[test]
    fn requests() {
        assert_eq!(from_body::<UpdateRequest>(b"{}").unwrap(), UpdateRequest::default());
        let request: UpdateRequest = from_body(br#"{"binary":"/b","mode":"exec","dry_run":true}"#).unwrap();
        assert_eq!(request.binary, Some("/b".into()));
        assert!(request.dry_run);
        let error = from_body::<UpdateRequest>(br#"{"mode":"migrate"}"#).unwrap_err().remove(0);
        assert!(error.contains("mode: unknown variant"), "{error}");
        let bad = UpdateRequest {
            binary: Some("relative".into()),
            sha256: Some("12".into()),
            deadline_ms: Some(0),
            ..Default::default()
        };
        assert_eq!(bad.validate().unwrap_err().len(), 3);
    }

    #[test]
    fn a_report_of_a_newer_build_is_readable() {
        let report: UpdateReport = serde_json::from_str(
            r#"{"outcome":"rolled_back","from":{"version":"1","build_id":"a","new":1},"pid":7,"something":[]}"#,
        )
        .unwrap();
        assert_eq!(report.outcome, UpdateOutcome::RolledBack);
        assert_eq!(report.to, None);
    }
}
