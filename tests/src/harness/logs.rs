//! The logs that belong to the running test: their ends are shown when it fails.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use parking_lot::Mutex;

use crate::harness::lab;

static TEST: Mutex<String> = Mutex::new(String::new());
static LOGS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Lines of each log that are shown.
const TAIL: usize = 30;

/// A test begins. Logs of a VM that it takes over from the test before are named again with [`add`].
pub fn begin(test: &str) {
    LOGS.lock().clear();
    *TEST.lock() = test.to_string();
}

/// A new log file named after the running test.
pub fn create(name: &str) -> Result<PathBuf> {
    let test = TEST.lock().clone();
    let dir = lab::results()?.join(if test.is_empty() { "other".to_string() } else { test });
    fs::create_dir_all(&dir).with_context(|| format!("{}", dir.display()))?;
    let path = (0..)
        .map(|n| dir.join(if n == 0 { format!("{name}.log") } else { format!("{name}-{n}.log") }))
        .find(|p| !p.exists())
        .context("no free log name")?;
    fs::write(&path, "").with_context(|| format!("{}", path.display()))?;
    LOGS.lock().push(path.clone());
    Ok(path)
}

/// `path` belongs to the running test as well.
pub fn add(path: &Path) {
    LOGS.lock().push(path.to_path_buf());
}

pub fn of_test() -> Vec<PathBuf> {
    LOGS.lock().clone()
}

/// The ends of all logs of the test.
pub fn tails() -> String {
    let mut text = String::new();
    for path in LOGS.lock().drain(..) {
        let _ = writeln!(text, "--- end of {} ---\n{}", path.display(), tail(&path));
    }
    text
}

/// The last lines of a file.
pub fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
