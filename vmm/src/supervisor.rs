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
use crate::update_key::UpdateKey;

/// What the command line says of it; goes over with every update.
#[derive(Clone, Debug, Default)]
pub(crate) struct Supervisor {
    pid_file: Option<PathBuf>,
    update_dir: Option<PathBuf>,
    /// A guest's reset ends the process, instead of the guest being booted again.
    ends_on_reset: bool,
    started_from: Option<PathBuf>,
    /// The name by which the first VMM of this guest was started.
    began_as: Option<PathBuf>,
    /// Who must have signed a build to update to; nobody if there are none.
    update_keys: Vec<UpdateKey>,
    /// An older build may be updated to in spite of keys.
    allows_downgrade: bool,
}

/// [`Supervisor`] in the saved state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SupervisorHandles {
    pid_file: Option<PathBuf>,
    update_dir: Option<PathBuf>,
    ends_on_reset: bool,
    started_from: Option<PathBuf>,
    began_as: Option<PathBuf>,
    update_keys: Vec<UpdateKey>,
    allows_downgrade: bool,
}

/// Where a build to update to has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fence<'a> {
    pub folder: &'a Path,
    /// It was chosen (`--update-dir`), and is not what it is by default.
    pub is_chosen: bool,
}

impl Supervisor {
    pub(crate) fn save(&self) -> SupervisorHandles {
        let Self { pid_file, update_dir, ends_on_reset, started_from, began_as, update_keys, allows_downgrade } =
            self.clone();
        SupervisorHandles { pid_file, update_dir, ends_on_reset, started_from, began_as, update_keys, allows_downgrade }
    }

    pub(crate) fn restore(handles: SupervisorHandles) -> Self {
        let SupervisorHandles {
            pid_file,
            update_dir,
            ends_on_reset,
            started_from,
            began_as,
            update_keys,
            allows_downgrade,
        } = handles;
        Self { pid_file, update_dir, ends_on_reset, started_from, began_as, update_keys, allows_downgrade }
    }

    /// `update_dir`: where builds to update to must be; see [`Supervisor::fence`] for what it is by default.
    pub(crate) fn new(pid_file: Option<PathBuf>, update_dir: Option<PathBuf>, ends_on_reset: bool) -> Self {
        Self { pid_file, update_dir, ends_on_reset, ..Self::default() }
    }

    /// `keys`: who must have signed a build to update to. Without any that is asked of none, and `allows_downgrade`
    /// means nothing.
    pub(crate) fn believes(&mut self, keys: Vec<UpdateKey>, allows_downgrade: bool) {
        self.update_keys = keys;
        self.allows_downgrade = allows_downgrade;
    }

    pub(crate) fn update_keys(&self) -> &[UpdateKey] {
        &self.update_keys
    }

    /// Whether an update may lead to an older build, if its request says so.
    pub(crate) fn allows_downgrade(&self) -> bool {
        self.update_keys.is_empty() || self.allows_downgrade
    }

    pub(crate) fn ends_on_reset(&self) -> bool {
        self.ends_on_reset
    }

    /// The name of the file that runs, as it was given.
    pub(crate) fn is_started_from(&mut self, name: Option<PathBuf>) {
        self.started_from = name;
    }

    pub(crate) fn started_from(&self) -> Option<&Path> {
        self.started_from.as_deref()
    }

    /// The first VMM of this guest was started by this name.
    pub(crate) fn begins_as(&mut self, name: PathBuf) {
        self.began_as = Some(name);
    }

    /// Where the build called `name` has to be. By default, in the folder of the name that the first VMM was started
    /// by. That name itself may lead anywhere, as a symbolic link that package upgrades move does: it is the choice of
    /// who has started the VMM, and of no client of the API. None: anywhere.
    pub(crate) fn fence(&self, name: &Path) -> Option<Fence<'_>> {
        match (&self.update_dir, &self.began_as) {
            (Some(folder), _) => Some(Fence { folder, is_chosen: true }),
            (None, Some(began_as)) if began_as != name => {
                began_as.parent().map(|folder| Fence { folder, is_chosen: false })
            }
            (None, _) => None,
        }
    }

    /// Replaces the file as a whole: nobody reads half a number.
    pub(crate) fn write_pid_file(&self) -> anyhow::Result<()> {
        let Some(path) = &self.pid_file else { return Ok(()) };
        let mut new = path.clone().into_os_string();
        new.push(".new");
        replace(Path::new(&new), path, &format!("{}\n", crate::keeper::pid()))
            .with_context(|| format!("PID file {}", path.display()))
    }

    /// The keeper has died in an update, and its VMM, this process, goes on.
    pub(crate) fn keeper_is_gone(&self) {
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
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn builds_are_beside_the_first_one_but_for_its_own_name() {
        let mut supervisor = Supervisor::new(None, None, false);
        assert_eq!(supervisor.fence(Path::new("/home/x")), None, "started by a build that knew of no such folder");
        supervisor.begins_as("/usr/bin/theseus".into());
        let fence = Some(Fence { folder: Path::new("/usr/bin"), is_chosen: false });
        // The name of an update is no exception, nor is its folder the next one's fence.
        supervisor.is_started_from(Some("/usr/bin/new/theseus".into()));
        let next = Supervisor::restore(supervisor.save());
        for name in ["/usr/bin/theseus.new", "/usr/bin/new/theseus", "/home/x", "/usr/bin/new/../theseus"] {
            assert_eq!(next.fence(Path::new(name)), fence, "{name}");
        }
        assert_eq!(next.fence(Path::new("/usr/bin/theseus")), None);
        let chosen = Supervisor { update_dir: Some("/opt".into()), ..supervisor };
        let fence = Some(Fence { folder: Path::new("/opt"), is_chosen: true });
        assert_eq!(chosen.fence(Path::new("/usr/bin/theseus")), fence);
    }

    #[test]
    fn what_is_believed_goes_over() {
        let mut supervisor = Supervisor::default();
        assert!(supervisor.allows_downgrade() && supervisor.update_keys().is_empty());
        let key = UpdateKey::try_from(crate::update_key::EXAMPLE.to_owned()).unwrap();
        supervisor.believes(vec![key.clone()], false);
        assert!(!supervisor.allows_downgrade());
        let bytes = rmp_serde::to_vec_named(&supervisor.save()).unwrap();
        let next = Supervisor::restore(rmp_serde::from_slice(&bytes).unwrap());
        assert_eq!(next.update_keys(), [key]);
        assert!(!next.allows_downgrade());
        supervisor.believes(next.update_keys, true);
        assert!(Supervisor::restore(supervisor.save()).allows_downgrade());
        // A key that is none is an error, not a VMM that believes everybody.
        let wrong = BTreeMap::from([("update_keys", ["RWQ"])]);
        let read = rmp_serde::from_slice::<SupervisorHandles>(&rmp_serde::to_vec_named(&wrong).unwrap());
        assert!(read.unwrap_err().to_string().contains("not a public key"));
    }

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
