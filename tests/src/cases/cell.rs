//! The cells of the matrix of faults: what is done to an update, and how that must end.

/// How a cell ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// 409: the guest was not touched.
    Refused,
    /// The fault only took time.
    Updated,
    /// The guest goes on in the old VMM.
    RolledBack,
    /// An ordinary crash of the VMM, which nothing is there to catch yet.
    Crash,
}

#[derive(Debug, Clone, Copy)]
pub struct Cell {
    pub phase: &'static str,
    pub kind: &'static str,
    pub end: End,
}

/// Phases that the old VMM ends.
const OLD: [&str; 5] = ["prepare", "freeze", "pause", "save", "invalidate"];
/// Phases that the new VMM ends: the guest runs in the old one; and stands still.
const PREWARM: [&str; 2] = ["exec", "prewarm"];
const NEW: [&str; 6] = ["claim", "vcpus", "passthrough", "devices", "remap", "commit"];
const KINDS: [&str; 10] = ["error", "enomem", "panic", "segv", "bus", "abort", "sigsys", "kill", "stop", "hang"];
const SPECIAL: [(&str, &str); 6] = [
    ("save", "truncated"),
    ("invalidate", "ebusy:0"),
    ("invalidate", "ebusy:1"),
    ("claim", "truncated"),
    ("remap", "refused:0"),
    ("remap", "refused:1"),
];
/// Of an update that is going to hang, on a machine that is not slow: less than the driver's tick, so that one attempt
/// tells of a lost interrupt.
pub const DEADLINE_MS: u64 = 800;

impl Cell {
    pub fn new(phase: &'static str, kind: &'static str) -> Self {
        let end = match kind {
            "stop" | "hang" if phase == "prepare" => End::Updated,
            "hang" if PREWARM.contains(&phase) => End::Updated,
            "segv" | "bus" | "abort" | "sigsys" | "kill" if OLD.contains(&phase) => End::Crash,
            _ if phase == "prepare" => End::Refused,
            _ => End::RolledBack,
        };
        Self { phase, kind, end }
    }

    pub fn all() -> Vec<Self> {
        let phases = OLD.into_iter().chain(PREWARM).chain(NEW);
        let cells = phases.flat_map(|phase| KINDS.map(|kind| Self::new(phase, kind)));
        let cells = cells.chain(SPECIAL.map(|(phase, kind)| Self::new(phase, kind)));
        // Those that need a guest of their own come last.
        let (crashes, mut all): (Vec<_>, Vec<_>) = cells.partition(|cell| cell.end == End::Crash);
        all.extend(crashes);
        all
    }

    /// Whether it is the old VMM that stops: nobody but its supervisor can wake that.
    pub fn stops_the_old(&self) -> bool {
        self.kind == "stop" && OLD.contains(&self.phase)
    }

    pub fn hangs_in_a_sleep(&self) -> bool {
        self.kind == "hang"
    }

    pub fn hangs(&self) -> bool {
        matches!(self.kind, "stop" | "hang")
    }

    /// The phase at whose end the guest stands still before the fault comes: then a test can send it a packet. None
    /// where it does not stand still, or for so long that the driver's tick would forgive a lost interrupt.
    pub fn held_at(&self) -> Option<&'static str> {
        match self.phase {
            "prepare" | "freeze" | "exec" | "prewarm" => None,
            phase if self.hangs() && OLD.contains(&phase) => None,
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
            "stop" if PREWARM.contains(&self.phase) => "not ready within",
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
    fn what_the_new_vmm_does_is_survived() {
        let cells = Cell::all();
        assert_eq!(cells.len(), 13 * KINDS.len() + SPECIAL.len());
        let mut late = cells.iter().filter(|cell| !OLD.contains(&cell.phase));
        assert!(late.all(|cell| matches!(cell.end, End::RolledBack | End::Updated)));
        assert_eq!(cells.iter().filter(|cell| cell.end == End::Crash).count(), 5 * OLD.len());
    }
}
