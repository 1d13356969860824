//! Named switches for the end-to-end tests, compiled in only with the feature `test-hooks`.
//!
//! The environment variable THESEUS_TEST_HOOKS names a folder; what is in it is looked up when its moment comes:
//!
//! | file | effect |
//! |---|---|
//! | `hold-invalidated`, `held` (FIFOs) | with all DMA vaddrs invalid, writes a line to `held` and waits for one from `hold-invalidated` |
//! | `skip-irqfds` | the new image does not attach irqfds, so that a test can be seen to go red |
//! | `state-version` | as a target, this build claims to read only saved states of another format |
//! | `fail-exec` | the exec is made to fail |
//! | `skip-park` | no helper keeps the old address space: its tear-down is part of the pause |

#[cfg(feature = "test-hooks")]
mod hooks {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Write};
    use std::path::PathBuf;

    use theseus_resources::StateReader;
    use theseus_resources::state::{FORMAT, StateError};

    const VARIABLE: &str = "THESEUS_TEST_HOOKS";

    fn path(name: &str) -> Option<PathBuf> {
        let path = PathBuf::from(std::env::var_os(VARIABLE)?).join(name);
        path.exists().then_some(path)
    }

    /// What a child needs to find the hooks too.
    pub fn environment() -> Option<(&'static str, std::ffi::OsString)> {
        Some((VARIABLE, std::env::var_os(VARIABLE)?))
    }

    pub fn hold_invalidated() {
        let (Some(hold), Some(held)) = (path("hold-invalidated"), path("held")) else { return };
        let waited = File::options()
            .write(true)
            .open(held)
            .and_then(|mut held| held.write_all(b"held\n"))
            .and_then(|()| BufReader::new(File::open(hold)?).read_line(&mut String::new()));
        if let Err(error) = waited {
            log::error!("test hook hold-invalidated: {error}");
        }
    }

    /// For `features` of vmm.ping.
    pub fn features() -> Vec<String> {
        vec!["test-hooks".into()]
    }

    pub fn skip_irqfds() -> bool {
        path("skip-irqfds").is_some()
    }

    pub fn fail_exec() -> bool {
        path("fail-exec").is_some()
    }

    pub fn skip_park() -> bool {
        path("skip-park").is_some()
    }

    pub fn state_as_read(reader: Result<StateReader, StateError>) -> Result<StateReader, StateError> {
        if path("state-version").is_some() { Err(StateError::Format(FORMAT)) } else { reader }
    }
}

#[cfg(not(feature = "test-hooks"))]
mod hooks {
    use theseus_resources::StateReader;
    use theseus_resources::state::StateError;

    pub fn environment() -> Option<(&'static str, std::ffi::OsString)> {
        None
    }

    pub fn hold_invalidated() {}

    pub fn features() -> Vec<String> {
        Vec::new()
    }

    pub fn skip_irqfds() -> bool {
        false
    }

    pub fn fail_exec() -> bool {
        false
    }

    pub fn skip_park() -> bool {
        false
    }

    pub fn state_as_read(reader: Result<StateReader, StateError>) -> Result<StateReader, StateError> {
        reader
    }
}

pub use hooks::*;
