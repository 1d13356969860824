//! What the fences of a VMM have stopped: no test may meet one that it does not mean to.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;

use crate::harness::{lab, logs};

static MEANT: AtomicBool = AtomicBool::new(false);
/// How much of each log was read: that of a guest that tests share tells of those before, too.
static READ: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// The running test has a thread do what it may not.
pub fn are_met() {
    MEANT.store(true, Ordering::Relaxed);
}

/// Whether there are filters that stop anything.
pub fn stop() -> bool {
    let mode = lab::seccomp();
    if !mode.is_empty() {
        println!("     no filter stops anything with {}", mode.join(" "));
    }
    mode.is_empty()
}

/// From the start of a test to its end.
pub struct Watch {
    /// The kernel's log, if it can be read.
    kernel: Option<File>,
}

impl Watch {
    pub fn begin() -> Self {
        MEANT.store(false, Ordering::Relaxed);
        let open = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let kernel = open.and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file)).ok();
        Self { kernel }
    }

    /// Each call that was stopped or noted, unless the test means it.
    pub fn met(self) -> Vec<String> {
        let mut met = self.noted();
        for log in logs::of_test() {
            let text = fs::read(&log).unwrap_or_default();
            let before = READ.lock().insert(log, text.len()).unwrap_or(0);
            let new = String::from_utf8_lossy(text.get(before..).unwrap_or_default()).into_owned();
            let stopped = |line: &&str| line.contains("which its seccomp filter does not allow");
            met.extend(new.lines().filter(stopped).map(str::to_owned));
        }
        if MEANT.load(Ordering::Relaxed) { Vec::new() } else { met }
    }

    /// The records of audit(8) of type 1326 (AUDIT_SECCOMP) of a VMM, by `--seccomp log`.
    fn noted(self) -> Vec<String> {
        let Some(mut kernel) = self.kernel else { return Vec::new() };
        let mut noted = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match kernel.read(&mut record) {
                // The records before the next one were overwritten.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
                Ok(0) | Err(_) => return noted,
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    if text.contains("type=1326") && text.contains("/theseus-") {
                        noted.push(text.trim().to_owned());
                    }
                }
            }
        }
    }
}
