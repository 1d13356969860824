//! The threads of a VMM, all started from here: what each is for gives it its name, which /proc and debuggers show.

use std::fmt;
use std::io;
use std::thread::{Builder, JoinHandle};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves the API's sockets.
    Api,
    /// Makes a machine and boots a guest.
    Boot,
    /// Owns the machine.
    Control,
    /// Waits for the keeper's death.
    KeeperWatch,
    /// Writes what has waited for the log.
    Log,
    /// Fills page tables.
    Populate,
    /// An update before its pause.
    Update,
    /// The vCPU of this index.
    Vcpu(u32),
}

impl fmt::Display for Role {
    /// At most 15 bytes (TASK_COMM_LEN).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api => f.write_str("api"),
            Self::Boot => f.write_str("boot"),
            Self::Control => f.write_str("control"),
            Self::KeeperWatch => f.write_str("keeper-watch"),
            Self::Log => f.write_str("log"),
            Self::Populate => f.write_str("populate"),
            Self::Update => f.write_str("update"),
            Self::Vcpu(index) => write!(f, "vcpu{index}"),
        }
    }
}

/// Its `source` is EAGAIN where a limit is reached (clone(2)).
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread '{role}': {source}: raise RLIMIT_NPROC or pids.max")]
pub struct ThreadError {
    role: Role,
    source: io::Error,
}

impl From<ThreadError> for io::Error {
    fn from(error: ThreadError) -> Self {
        Self::new(error.source.kind(), error.to_string())
    }
}

pub fn spawn<T: Send + 'static>(
    role: Role,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, ThreadError> {
    Builder::new().name(role.to_string()).spawn(body).map_err(|source| ThreadError { role, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_the_name_of_its_role() {
        for role in [Role::KeeperWatch, Role::Vcpu(u32::MAX)] {
            let name = || std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            assert_eq!(spawn(role, name).unwrap().join().unwrap().trim_end(), role.to_string());
        }
    }
}
