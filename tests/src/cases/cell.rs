//! The cells of the matrix of faults: what is done to an update, and how that must end.

/// How a cell ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// 409: the guest was not touched.
    Refused,
    /// The fault only took time.
    Updated,
    /// Rolled back, in the same process.
    SamePid,
    /// Rolled back by the parked helper, in another.
    NewPid,
    /// An ordinary crash of the VMM, which nothing is there to catch yet.
    Crash,
}

#[derive(Debug, Clone, Copy)]
pub struct Cell {
    pub phase: &'static str,
    pub kind: &'static str,
    pub end: End,
}

const BEFORE_PARK: [&str; 5] = ["prepare", "freeze", "pause", "save", "invalidate"];
const FROM_PARK: [&str; 9] = ["park", "exec", "claim", "vm", "passthrough", "vcpus", "devices", "remap", "commit"];
const KINDS: [&str; 10] = ["error", "enomem", "panic", "segv", "bus", "abort", "sigsys", "kill", "stop", "hang"];
const SPECIAL: [(&str, &str); 6] = [
    ("save", "truncated"),
    ("invalidate", "ebusy:0"),
    ("invalidate", "ebusy:1"),
    ("claim", "truncated"),
    ("remap", "refused:0"),
    ("remap", "refused:1"),
];
/// Of an update that is going to hang, on a machine that is not slow: less than the driver's tick, so that one attempt tells of a lost interrupt.
pub const DEADLINE_MS: u64 = 800;

impl Cell {
    pub fn new(phase: &'static str, kind: &'static str) -> Self {
        let early = BEFORE_PARK.contains(&phase);
        let end = match kind {
            "stop" | "hang" if phase == "prepare" => End::Updated,
            "stop" | "hang" if early => End::SamePid,
            "segv" | "bus" | "abort" | "sigsys" | "kill" if early => End::Crash,
            "segv" | "bus" | "abort" | "sigsys" | "kill" | "stop" | "hang" => End::NewPid,
            _ if phase == "prepare" => End::Refused,
            _ => End::SamePid,
        };
        Self { phase, kind, end }
    }

    pub fn all() -> Vec<Self> {
        let phases = BEFORE_PARK.into_iter().chain(FROM_PARK);
        let cells = phases.flat_map(|phase| KINDS.map(|kind| Self::new(phase, kind)));
        let cells = cells.chain(SPECIAL.map(|(phase, kind)| Self::new(phase, kind)));
        // Those that need a guest of their own come last.
        let (crashes, mut all): (Vec<_>, Vec<_>) = cells.partition(|cell| cell.end == End::Crash);
        all.extend(crashes);
        all
    }

    pub fn hangs_in_a_sleep(&self) -> bool {
        self.kind == "hang"
    }

    pub fn hangs(&self) -> bool {
        matches!(self.kind, "stop" | "hang")
    }

    /// The phase at whose end the guest stands still before the fault comes: then a test can send it a packet. None where it does not stand
    /// still, or for so long that the driver's tick would forgive a lost interrupt.
    pub fn held_at(&self) -> Option<&'static str> {
        match self.phase {
            "prepare" | "freeze" => None,
            phase if self.hangs() && BEFORE_PARK.contains(&phase) => None,
            "pause" => Some("pause"),
            "save" if self.kind == "truncated" => Some("pause"),
            "save" => Some("save"),
            "invalidate" if self.kind.starts_with("ebusy") => Some("save"),
            _ => Some("invalidate"),
        }
    }

    /// What the report must say beside the phase.
    pub fn cause(&self) -> &'static str {
        match self.kind {
            "error" => "error (test)",
            "enomem" => "cannot allocate memory",
            "panic" => "panic (test)",
            "hang" | "stop" => "deadline_ms",
            "truncated" => "truncated",
            kind if kind.starts_with("ebusy") => "busy",
            kind if kind.starts_with("refused") => "container",
            _ => "died",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_park_to_commit_every_cell_is_survived() {
        let cells = Cell::all();
        assert_eq!(cells.len(), 14 * KINDS.len() + SPECIAL.len());
        let late = cells.iter().filter(|cell| FROM_PARK.contains(&cell.phase));
        assert!(late.clone().all(|cell| matches!(cell.end, End::SamePid | End::NewPid)));
        assert_eq!(late.filter(|cell| cell.end == End::NewPid).count(), 9 * 7);
    }
}
