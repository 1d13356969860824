//! Named switches for the end-to-end tests, behind the [`Seams`] of a build with the feature `test-hooks`.
//!
//! The environment variable THESEUS_TEST_HOOKS names a folder; what is in it is looked up when its moment comes:
//!
//! | file | effect |
//! |---|---|
//! | `hold` | `PHASE`: at its end, before any fault, a line to the FIFO `held`, and waits for one from `release` |
//! | `skip-irqfds` | the new image does not attach irqfds, so that a test can be seen to go red |
//! | `state-version` | as a target, this build claims to read only saved states of another format |
//! | `whole-handover` | as a target, this build writes handovers as builds do that do not know one ahead |
//! | `skip-state-check` | state that KVM would not take is saved all the same |
//! | `counting-device` | a guest that boots has a device that counts (devices/src/counting.rs) |
//! | `vcpu-panic` | whoever restores a vCPU in the next image panics; the file is gone then |
//! | `vcpu-calls` | a vCPU thread of the next image makes the system call of that number; the file is gone then |
//! | `probe` | questions that the target answers, asked for its verdict, in the file `probed` (test_hooks/probe.rs) |
//! | `fault` | `PHASE:KIND[:N]`, see below; the option `--fault` of a test build does the same |
//!
//! A fault strikes at the end of its phase, on the way there only: error, enomem, panic, segv, bus, abort, sigsys,
//! kill, stop, hang (N seconds), sleep (N ms), oom (takes memory until it is killed). The phase `become` is the moment
//! right before the keeper is asked to become the new image, `ahead` the one in which the new VMM gets what goes over
//! ahead of the machine, `word` the one between the last look at the deadline and the word, `committed` the one right
//! after that word. Some are of one phase: `save:truncated` and `claim:truncated` (the state as written, as read),
//! `invalidate:ebusy:N` (container N refuses), `remap:refused:N` (MAP of range N is refused).

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use theseus_devices::vfio::DmaDomain;
use theseus_resources::state::FORMAT;

use crate::seams::{Injected, Seams};
use dma::DmaFaults;

mod dma;
mod probe;

const VARIABLE: &str = "THESEUS_TEST_HOOKS";
const FAULT: &str = "THESEUS_FAULT";

/// Looks the switches up.
pub(crate) struct Hooks;

impl Seams for Hooks {
    fn at(&self, moment: &str) -> Result<(), Injected> {
        look_for_vcpus(moment);
        hold(moment)?;
        strike(moment)
    }

    fn state(&self, moment: &str, bytes: &mut Vec<u8>) {
        if fault_number(moment, "truncated").is_some() {
            bytes.truncate(bytes.len() / 2);
        }
        if moment == "check-update"
            && let Some(questions) = path("probe")
        {
            probe::answer(&questions);
        }
        if moment == "check-update" && path("state-version").is_some() {
            // Behind the eight bytes of the magic number.
            bytes.splice(8..12, (FORMAT + 2).to_le_bytes());
        }
    }

    fn writes(&self, writes: &mut [(String, u16)]) {
        let handover = writes.iter_mut().find(|(kind, _)| kind == "handover");
        if let Some((_, version)) = handover.filter(|_| path("whole-handover").is_some()) {
            *version -= 1;
        }
    }

    fn restores_vcpu(&self) {
        if VCPU_PANICS.swap(false, Ordering::SeqCst) {
            panic!("panic of a thread (test)");
        }
    }

    fn prewarms_vcpu(&self) {
        if let call @ 0.. = VCPU_CALLS.swap(-1, Ordering::SeqCst) {
            // SAFETY: whatever it is, this thread's filter is there to stop it; null pointers.
            unsafe { libc::syscall(call, 0, 0, 0, 0, 0, 0) };
        }
    }

    fn saved_vcpu(&self, refused: &mut Vec<String>) {
        if SKIPS_STATE_CHECK.load(Ordering::SeqCst) {
            refused.clear();
        }
    }

    fn dma_domains(&self, domains: Vec<Arc<dyn DmaDomain>>) -> Vec<Arc<dyn DmaDomain>> {
        let faults = DmaFaults { busy: fault_number("invalidate", "ebusy"), refused: fault_number("remap", "refused") };
        faults.over(domains)
    }

    fn attaches_irqfds(&self) -> bool {
        path("skip-irqfds").is_none()
    }

    fn counting_device(&self) -> bool {
        path("counting-device").is_some()
    }

    /// What a child needs to find the switches too.
    fn environment(&self) -> Option<(OsString, OsString)> {
        Some((VARIABLE.into(), std::env::var_os(VARIABLE)?))
    }

    fn features(&self) -> Vec<String> {
        vec!["test-hooks".into()]
    }
}

static VCPU_PANICS: AtomicBool = AtomicBool::new(false);
/// -1: none.
static VCPU_CALLS: AtomicI64 = AtomicI64::new(-1);
static SKIPS_STATE_CHECK: AtomicBool = AtomicBool::new(false);

/// The switches of vCPU threads, which may not look at files: by the thread that commands them, before it does.
fn look_for_vcpus(moment: &str) {
    let take = |name| {
        let file = path(name)?;
        let text = std::fs::read_to_string(&file).ok()?;
        std::fs::remove_file(file).ok().map(|()| text)
    };
    match moment {
        "prewarm" => VCPU_PANICS.store(take("vcpu-panic").is_some(), Ordering::SeqCst),
        "exec" => {
            let call = take("vcpu-calls").and_then(|text| text.trim().parse().ok());
            VCPU_CALLS.store(call.unwrap_or(-1), Ordering::SeqCst);
        }
        "freeze" => SKIPS_STATE_CHECK.store(path("skip-state-check").is_some(), Ordering::SeqCst),
        _ => {}
    }
}

fn path(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os(VARIABLE)?).join(name);
    path.exists().then_some(path)
}

fn hold(phase: &str) -> Result<(), Injected> {
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
        .map(drop)
        .map_err(|error| Injected(format!("test hook hold: {error}")))
}

/// What `--fault` says, for this image and all that come after it. To be called before there are other threads.
pub(crate) fn set_fault(fault: &str) {
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
fn fault_number(phase: &str, kind: &str) -> Option<u32> {
    asked(phase).filter(|(asked, _)| asked == kind).map(|(_, n)| n)
}

fn strike(phase: &str) -> Result<(), Injected> {
    let Some((kind, n)) = asked(phase) else { return Ok(()) };
    let signal = match kind.as_str() {
        "error" => return Err(Injected("error (test)".into())),
        "enomem" => return Err(Injected(std::io::Error::from_raw_os_error(libc::ENOMEM).to_string())),
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
    // SAFETY: no handler of ours is run by these. Default dispositions, so that the sanitising handlers of std do not
    // swallow them.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        // To this thread, not to the process: that lets another thread take it, while this one goes on into the next
        // phase. None of them is ever blocked.
        libc::raise(signal);
    }
    Ok(())
}
