//! The system calls that each thread may make: a seccomp filter by role ([`calls`]), installed before anything else
//! that a thread does (`resources/src/threads`).
//!
//! The main thread has none: it runs a target to see whether it can take the guest over, and that one inherits what it
//! has. Nor has the keeper, of which each later build is a child.
//!
//! The mode is the same for the life of a guest. It is in the environment of the keeper, which hands that on at each
//! exec: the filters of a new VMM are there before it has heard anything of the old one, and no VMM, whatever has
//! become of it, can have its successor run without.

mod calls;
mod ioctls;
mod rules;
#[cfg(test)]
mod tests;
pub(crate) mod trap;

use std::ffi::OsStr;
use std::io;

use clap::ValueEnum;
use seccompiler::{BpfProgram, SeccompAction};
use theseus_resources::threads::{self, Role, ThreadError};

use rules::Rules;

const VARIABLE: &str = "THESEUS_SECCOMP";

/// What becomes of a thread that calls what it may not, in the words of Cloud Hypervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// The process dies by SIGSYS, with the call in its log.
    #[default]
    True,
    /// There are no filters.
    False,
    /// The call is made, and is in the kernel's log (audit type 1326).
    Log,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::False => "false",
            Self::Log => "log",
        }
    }

    fn of_name(name: Option<&OsStr>) -> Self {
        [Self::False, Self::Log].into_iter().find(|mode| name == Some(mode.name().as_ref())).unwrap_or_default()
    }

    /// Of this guest, in every image.
    fn in_force() -> Self {
        Self::of_name(std::env::var_os(VARIABLE).as_deref())
    }

    /// From now on it is in force, whatever this process was started with. To be called before there are other threads
    /// or processes.
    pub(crate) fn put_in_force(self) {
        // SAFETY: the caller's promise: nobody reads the environment meanwhile.
        unsafe { std::env::set_var(VARIABLE, self.name()) };
    }

    fn action(self) -> Option<SeccompAction> {
        match self {
            Self::True => Some(SeccompAction::Trap),
            Self::False => None,
            Self::Log => Some(SeccompAction::Log),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    #[error("the filter of '{role}': {source}")]
    Program { role: Role, source: seccompiler::Error },
    #[error(transparent)]
    Thread(#[from] ThreadError),
    #[error("no handler for SIGSYS: {0}")]
    Handler(io::Error),
}

/// On the main thread of a VMM, before there are others. From now on all are filtered.
pub(crate) fn begin() -> Result<(), SeccompError> {
    let Some(action) = Mode::in_force().action() else { return Ok(()) };
    trap::install().map_err(SeccompError::Handler)?;
    let pid = std::process::id();
    let fence = move |role| match programs(role, pid, &action) {
        Ok(programs) => programs.iter().try_for_each(|program| {
            let remedy = "does the kernel have CONFIG_SECCOMP_FILTER? --seccomp false does without";
            seccompiler::apply_filter(program).map_err(|error| io::Error::other(format!("{error}: {remedy}")))
        }),
        Err(error) => Err(io::Error::other(error)),
    };
    Ok(threads::begin(Box::new(fence))?)
}

/// What the thread of that role installs, one after the other. `pid`: of this process.
fn programs(role: Role, pid: u32, action: &SeccompAction) -> Result<Vec<BpfProgram>, SeccompError> {
    let program = |rules: Rules, other, matching| {
        rules.program(other, matching).map_err(|source| SeccompError::Program { role, source })
    };
    let Some(rules) = calls::of(role, pid) else { return Ok(Vec::new()) };
    let filter = program(rules, action.clone(), SeccompAction::Allow)?;
    if role != Role::VcpuSpawner {
        return Ok(vec![filter]);
    }
    // Its flags are in memory, which no filter sees: without it the C library uses clone(2). The action of another
    // filter counts for less where it lets a call pass.
    let mut clone3 = Rules::default();
    clone3.any(&[libc::SYS_clone3]);
    let without = program(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    Ok(vec![without, filter])
}
