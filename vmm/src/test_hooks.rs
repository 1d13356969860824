//! Named switches for the end-to-end tests, compiled in only with the feature `test-hooks`.
//!
//! The environment variable THESEUS_TEST_HOOKS names a folder; what is in it is looked up when its moment comes:
//!
//! | file | effect |
//! |---|---|
//! | `hold` | `PHASE`: at the end of that phase, before any fault, writes a line to the FIFO `held` and waits for one from the FIFO `release` |
//! | `skip-irqfds` | the new image does not attach irqfds, so that a test can be seen to go red |
//! | `state-version` | as a target, this build claims to read only saved states of another format |
//! | `fail-exec` | the exec is made to fail |
//! | `skip-state-check` | state that KVM would not take is saved all the same |
//! | `counting-device` | a guest that boots has a device that counts (devices/src/counting.rs) |
//! | `vcpu-panic` | a vCPU thread of the next image panics as it restores; the file is gone then |
//! | `fault` | `PHASE:KIND[:N]`, see below; the option `--fault` of a test build does the same |
//!
//! A fault strikes at the end of its phase, on the way there only: error, enomem, panic, segv, bus, abort, sigsys,
//! kill, stop, hang (N seconds), sleep (N ms), oom (takes memory until it is killed). The phase `become` is the moment
//! right before the keeper is asked to become the new image, `word` the one between the last look at the deadline and
//! the word, `committed` the one right after that word. Some are of one phase: `save:truncated` and `claim:truncated`
//! (the state as written, as read), `invalidate:ebusy:N` (container N refuses), `remap:refused:N` (MAP of range N is
//! refused).

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

    fn hold(phase: &str) -> Result<(), String> {
        let asked = path("hold").and_then(|path| std::fs::read_to_string(path).ok());
        if asked.is_none_or(|asked| asked.trim() != phase) {
            return Ok(());
        }
        let (Some(held), Some(release)) = (path("held"), path("release")) else { return Ok(()) };
        File::options()
            .write(true)
            .open(held)
            .and_then(|mut held| held.write_all(b"held\n"))
            .and_then(|()| BufReader::new(File::open(release)?).read_line(&mut String::new()))
            .map(|_| ())
            .map_err(|error| format!("test hook hold: {error}"))
    }

    /// For `features` of vmm.ping.
    pub fn features() -> Vec<String> {
        vec!["test-hooks".into()]
    }

    pub fn skip_irqfds() -> bool {
        path("skip-irqfds").is_some()
    }

    pub fn skip_state_check() -> bool {
        path("skip-state-check").is_some()
    }

    pub fn fail_exec() -> bool {
        path("fail-exec").is_some()
    }

    pub fn counting_device() -> bool {
        path("counting-device").is_some()
    }

    pub fn vcpu_panic() {
        if path("vcpu-panic").is_some_and(|file| std::fs::remove_file(file).is_ok()) {
            panic!("panic of a thread (test)");
        }
    }

    const FAULT: &str = "THESEUS_FAULT";

    /// What `--fault` says, for this image and all that come after it. To be called before there are other threads.
    pub fn set_fault(fault: &str) {
        // SAFETY: the caller's promise: nobody reads the environment meanwhile.
        unsafe { std::env::set_var(FAULT, fault) };
    }

    /// (kind, N) of the fault asked for in this phase.
    fn asked(phase: &str) -> Option<(String, u32)> {
        let text = path("fault").and_then(|path| std::fs::read_to_string(path).ok());
        let text = text.or_else(|| std::env::var(FAULT).ok())?;
        let mut words = text.trim().split(':');
        (words.next() == Some(phase)).then_some(())?;
        let kind = words.next()?.to_owned();
        Some((kind, words.next().and_then(|n| n.parse().ok()).unwrap_or(0)))
    }

    /// N of the fault `kind` where that is asked for in this phase.
    pub fn fault_number(phase: &str, kind: &str) -> Option<u32> {
        asked(phase).filter(|(asked, _)| asked == kind).map(|(_, n)| n)
    }

    /// The saved state as it is written (phase save) or read (phase claim).
    pub fn truncated<'a>(phase: &str, state: &'a [u8]) -> &'a [u8] {
        if fault_number(phase, "truncated").is_some() { &state[..state.len() / 2] } else { state }
    }

    /// At the end of `phase`.
    pub fn fault(phase: &str) -> Result<(), String> {
        hold(phase)?;
        let Some((kind, n)) = asked(phase) else { return Ok(()) };
        let signal = match kind.as_str() {
            "error" => return Err("error (test)".into()),
            "enomem" => return Err(std::io::Error::from_raw_os_error(libc::ENOMEM).to_string()),
            "panic" => panic!("panic (test)"),
            "segv" => libc::SIGSEGV,
            "bus" => libc::SIGBUS,
            "abort" => libc::SIGABRT,
            "sigsys" => libc::SIGSYS,
            "kill" => libc::SIGKILL,
            "stop" => libc::SIGSTOP,
            "hang" => {
                // For N seconds: nothing but its deadline ends what is stuck before the exec.
                std::thread::sleep(std::time::Duration::from_secs(n.into()));
                return Ok(());
            }
            // With pages that are touched.
            "oom" => loop {
                std::mem::forget(std::hint::black_box(vec![1u8; 16 << 20]));
            },
            "sleep" => {
                std::thread::sleep(std::time::Duration::from_millis(n.into()));
                return Ok(());
            }
            // One of those that are looked for where they strike.
            _ => return Ok(()),
        };
        // SAFETY: no handler of ours is run by these. Default dispositions, so that the sanitising handlers of std do
        // not swallow them.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            // To this thread, not to the process: that lets another thread take it, while this one goes on into the
            // next phase. None of them is ever blocked.
            libc::raise(signal);
        }
        Ok(())
    }

    pub fn state_as_read(reader: Result<StateReader<'_>, StateError>) -> Result<StateReader<'_>, StateError> {
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

    pub fn features() -> Vec<String> {
        Vec::new()
    }

    pub fn skip_irqfds() -> bool {
        false
    }

    pub fn skip_state_check() -> bool {
        false
    }

    pub fn fail_exec() -> bool {
        false
    }

    pub fn vcpu_panic() {}

    pub fn fault_number(_phase: &str, _kind: &str) -> Option<u32> {
        None
    }

    pub fn fault(_phase: &str) -> Result<(), String> {
        Ok(())
    }

    pub fn truncated<'a>(_phase: &str, state: &'a [u8]) -> &'a [u8] {
        state
    }

    pub fn state_as_read(reader: Result<StateReader<'_>, StateError>) -> Result<StateReader<'_>, StateError> {
        reader
    }
}

pub use hooks::*;
