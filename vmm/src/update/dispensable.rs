//! Whom the OOM killer takes while an update is under way: the new VMM, which the old one replaces, and not the old
//! one, which has all of guest RAM mapped too (mm/oom_kill.c, oom_badness).

use std::fs::File;
use std::os::unix::fs::FileExt;

const PATH: &str = "/proc/self/oom_score_adj";
/// OOM_SCORE_ADJ_MAX: always the first.
const FIRST: i16 = 1000;

/// This process is the OOM killer's first choice for as long as this lives.
pub(super) struct Dispensable {
    /// Opened once: it is in the pause.
    file: File,
    /// What it was before. To lower it again needs no privilege, as it is not lower than what a privileged process gave
    /// us (fs/proc/base.c, __set_oom_adj).
    before: i16,
}

impl Dispensable {
    /// None where that cannot be had: the update goes on without.
    pub(super) fn new() -> Option<Self> {
        let file = File::options().read(true).write(true).open(PATH).ok()?;
        let mut text = [0; 16];
        let len = file.read_at(&mut text, 0).ok()?;
        let before = std::str::from_utf8(text.get(..len)?).ok()?.trim().parse().ok()?;
        let this = Self { file, before };
        this.set(FIRST).then_some(this)
    }

    fn set(&self, adj: i16) -> bool {
        let done = self.file.write_at(adj.to_string().as_bytes(), 0);
        if let Err(error) = &done {
            log::warn!("{PATH} cannot be set to {adj}: {error}");
        }
        done.is_ok()
    }
}

impl Drop for Dispensable {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_was_is_put_back() {
        let read = || std::fs::read_to_string(PATH).unwrap().trim().to_owned();
        let before = read();
        let dispensable = Dispensable::new().unwrap();
        assert_eq!(read(), "1000");
        drop(dispensable);
        assert_eq!(read(), before);
    }
}
