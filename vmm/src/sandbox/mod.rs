//! What confines a VMM for its whole life: the first image puts it on before it has a second process or thread, so that
//! keeper and VMM are inside, and all that they fork or exec later. No other image puts anything on again: layers of
//! the kernel add up, and 16 of Landlock are the most that it allows.

pub(crate) mod ceiling;
pub(crate) mod dumps;
pub(crate) mod landlock;
pub(crate) mod seccomp;

use serde::{Deserialize, Serialize};
use theseus_api::types::{LandlockConfig, VmConfig};

pub(crate) use landlock::{Place, Use};

/// What this VMM was started with; goes over with every update, for nobody could ask the kernel later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Confinement {
    /// The rules of the command line, where Landlock is on.
    pub landlock: Option<Vec<LandlockConfig>>,
    pub ceiling: bool,
    /// It may be dumped, for whoever looks for a fault in it.
    pub core_dumps: bool,
}

/// [`Confinement`] in the saved state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ConfinementHandles {
    landlock: Option<Vec<LandlockConfig>>,
    ceiling: bool,
    core_dumps: bool,
}

impl Confinement {
    pub(crate) fn save(&self) -> ConfinementHandles {
        let Self { landlock, ceiling, core_dumps } = self.clone();
        ConfinementHandles { landlock, ceiling, core_dumps }
    }

    pub(crate) fn restore(handles: ConfinementHandles) -> Self {
        let ConfinementHandles { landlock, ceiling, core_dumps } = handles;
        Self { landlock, ceiling, core_dumps }
    }

    /// At the start, or once the guest of an update is this VMM's: all that a new VMM has to write in /proc/self is
    /// written then.
    pub(crate) fn close(&self) {
        if !self.core_dumps {
            dumps::forbid();
        }
    }

    /// Why a guest cannot have what its configuration asks of Landlock; every reason.
    pub(crate) fn refusals(&self, config: &VmConfig) -> Vec<String> {
        let wanted = config.landlock_rules.as_deref().unwrap_or_default();
        let Some(rules) = &self.landlock else {
            let reason = "landlock_enable: this VMM was started without --landlock, and its threads and its keeper \
                          cannot be confined any more: start it with --landlock, and name what guests need by \
                          --landlock-rules";
            return config.landlock_enable.then(|| reason.into()).into_iter().collect();
        };
        let missing = wanted.iter().filter(|rule| !landlock::covers(rules, rule));
        let reason = |rule: &LandlockConfig| {
            let (path, access) = (rule.path.display(), &rule.access);
            format!(
                "landlock_rules: {path} with access {access} is not in the rules that this VMM was started with, and \
                 none can be added: start it with --landlock-rules path={path},access={access}"
            )
        };
        missing.map(reason).collect()
    }

    /// What may be the matter where something was refused, and what to do.
    pub(crate) fn remedy(&self, error: &str) -> Option<String> {
        let denied = error.contains("(os error 13)") && self.landlock.is_some();
        let remedy = "it may be outside of what --landlock lets this VMM do: start it with --landlock-rules \
                      path=FOLDER,access=r or rw";
        denied.then(|| remedy.into())
    }
}

/// How a child ends that does what a process cannot take back.
#[cfg(test)]
fn in_child(body: impl FnOnce() -> i32) -> std::process::ExitStatus {
    // SAFETY: the child only makes system calls and allocates, which the C library lets it do after fork.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        crate::heap::keep();
        // SAFETY: takes no pointer. Its thread may have a heap that is not the process's first, as a test's has and no
        // thread of a VMM: nothing of it is ever given back, for which the C library would open a file.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) };
        let code = body();
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: our own child, and one status.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    std::os::unix::process::ExitStatusExt::from_raw(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(path: &str, access: &str) -> LandlockConfig {
        LandlockConfig { path: path.into(), access: access.into() }
    }

    #[test]
    fn a_guest_gets_no_less_of_landlock_than_it_asks_for() {
        let asks = |rules: &[LandlockConfig]| VmConfig {
            landlock_enable: true,
            landlock_rules: Some(rules.to_vec()),
            ..Default::default()
        };
        let open = Confinement::default();
        assert!(open.refusals(&VmConfig::default()).is_empty());
        assert!(open.refusals(&asks(&[]))[0].contains("start it with --landlock,"));
        let rules = vec![rule("/srv", "rw"), rule("/boot", "r")];
        let closed = Confinement { landlock: Some(rules), ceiling: true, core_dumps: true };
        assert!(closed.refusals(&VmConfig::default()).is_empty());
        assert!(closed.refusals(&asks(&[rule("/srv/a", "w"), rule("/boot", "r"), rule("/srv", "wr")])).is_empty());
        let refused = closed.refusals(&asks(&[rule("/boot/a", "rw"), rule("/srv2", "r")]));
        assert!(refused[0].contains("--landlock-rules path=/boot/a,access=rw") && refused[1].contains("/srv2"));
        let denied = std::io::Error::from_raw_os_error(libc::EACCES).to_string();
        assert!(closed.remedy(&denied).unwrap().contains("--landlock-rules") && open.remedy(&denied).is_none());
        assert_eq!(closed.remedy("is not an ELF"), None);
        assert_eq!(Confinement::restore(closed.save()), closed);
    }
}
