//! Whoever watches over this process: it is told the PID, by a file and by systemd's notify socket (sd_notify(3)), and
//! may confine where builds to update to come from.
//!
//! An update keeps the PID. Only the death of the keeper in an update changes it.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::notify;

/// What the command line says of it; goes over with every update.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    pid_file: Option<PathBuf>,
    update_dir: Option<PathBuf>,
    /// A guest's reset ends the process, instead of the guest being booted again.
    ends_on_reset: bool,
    started_from: Option<PathBuf>,
}

/// [`Supervisor`] in the saved state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SupervisorHandles {
    pid_file: Option<PathBuf>,
    update_dir: Option<PathBuf>,
    ends_on_reset: bool,
    started_from: Option<PathBuf>,
}

impl Supervisor {
    pub fn save(&self) -> SupervisorHandles {
        let Self { pid_file, update_dir, ends_on_reset, started_from } = self.clone();
        SupervisorHandles { pid_file, update_dir, ends_on_reset, started_from }
    }

    pub fn restore(handles: SupervisorHandles) -> Self {
        let SupervisorHandles { pid_file, update_dir, ends_on_reset, started_from } = handles;
        Self { pid_file, update_dir, ends_on_reset, started_from }
    }

    /// `update_dir`: where builds to update to must be; anywhere if there is none.
    pub fn new(pid_file: Option<PathBuf>, update_dir: Option<PathBuf>, ends_on_reset: bool) -> Self {
        Self { pid_file, update_dir, ends_on_reset, started_from: None }
    }

    pub fn ends_on_reset(&self) -> bool {
        self.ends_on_reset
    }

    /// The name of the file that runs, as it was given.
    pub fn is_started_from(&mut self, name: Option<PathBuf>) {
        self.started_from = name;
    }

    pub fn started_from(&self) -> Option<&Path> {
        self.started_from.as_deref()
    }

    pub fn update_dir(&self) -> Option<&Path> {
        self.update_dir.as_deref()
    }

    /// Replaces the file as a whole: nobody reads half a number.
    pub fn write_pid_file(&self) -> anyhow::Result<()> {
        let Some(path) = &self.pid_file else { return Ok(()) };
        let mut new = path.clone().into_os_string();
        new.push(".new");
        replace(Path::new(&new), path, &format!("{}\n", crate::keeper::pid()))
            .with_context(|| format!("PID file {}", path.display()))
    }

    /// The keeper has died in an update, and its VMM, this process, goes on.
    pub fn keeper_is_gone(&self) {
        crate::keeper::is_gone();
        let pid = crate::keeper::pid();
        log::warn!("the keeper of this VMM has died in an update: the PID is now {pid}");
        if let Err(error) = self.write_pid_file() {
            log::error!("{error:#}");
        }
        notify::send(&format!("MAINPID={pid}\nSTATUS=an update was rolled back"));
    }
}

/// Never by what somebody may have left at either name: a link there would lead to any file that this user may write.
fn replace(new: &Path, path: &Path, text: &str) -> std::io::Result<()> {
    match std::fs::remove_file(new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // O_EXCL, which follows no link.
    std::fs::File::options().write(true).create_new(true).mode(0o644).open(new)?.write_all(text.as_bytes())?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "1234567890123\n").unwrap();
        let supervisor = Supervisor::new(Some(path.clone()), None, false);
        supervisor.write_pid_file().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        // Planted links are replaced, and what they lead to is left alone.
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        for link in [&path, &dir.path().join("pid.new")] {
            std::os::unix::fs::symlink(&precious, link).unwrap();
        }
        supervisor.write_pid_file().unwrap();
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
        assert!(!std::fs::symlink_metadata(&path).unwrap().is_symlink());
        let nowhere = Supervisor::new(Some("/nowhere/pid".into()), None, false);
        assert!(format!("{:#}", nowhere.write_pid_file().unwrap_err()).contains("/nowhere/pid"));
    }
}
