//! What a process of this VMM can do, told by one that tries: an exploit's view of what confines it.
//!
//! Asked for in the file `probe`, a line each; the answers, in `probed`, are "ok" or the number of the error.

use std::io::Error;
use std::path::Path;

use crate::sandbox::ceiling::DENIED;

/// LANDLOCK_MAX_NUM_LAYERS (security/landlock/limits.h)
const MAX_LAYERS: i32 = 16;

pub(super) fn answer(questions: &Path) {
    let Ok(text) = std::fs::read_to_string(questions) else { return };
    let answers: String = text.lines().map(|question| format!("{question}: {}\n", answer_to(question))).collect();
    let _ = std::fs::write(questions.with_file_name("probed"), answers);
}

fn answer_to(question: &str) -> String {
    match question.split_once(' ') {
        Some(("read", path)) => told(std::fs::File::open(path).map(drop)),
        Some(("write", path)) => told(std::fs::File::options().append(true).open(path).map(drop)),
        None if question == "ceiling" => passed(),
        None if question == "layers" => layers().to_string(),
        _ => "what?".into(),
    }
}

fn told(done: std::io::Result<()>) -> String {
    done.err().map_or_else(|| "ok".into(), |error| error.raw_os_error().unwrap_or(-1).to_string())
}

/// All bits: of 32 alone some calls would make an address, or a length of 4 GiB, and be long about it (init_module).
const NONE: libc::c_long = -1;

/// With arguments that none of them takes.
fn call(number: libc::c_long) -> std::io::Result<()> {
    // SAFETY: no address is valid that is given, and no descriptor, so nothing of this process is touched.
    let done = unsafe { libc::syscall(number, NONE, NONE, NONE, NONE, NONE, NONE) };
    if done < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Which calls are not refused that the ceiling refuses.
fn passed() -> String {
    let passed = |number| call(number).err().and_then(|error| error.raw_os_error()) != Some(libc::EPERM);
    DENIED.iter().filter(|(_, number)| passed(*number)).map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
}

/// How many layers of Landlock there are: a child adds more until the kernel takes no more.
fn layers() -> i32 {
    // SAFETY: this process has one thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let more = (0..=MAX_LAYERS).take_while(|_| add_layer()).count() as i32;
        // SAFETY: ends the child.
        unsafe { libc::_exit(MAX_LAYERS - more) };
    }
    let mut status = 0;
    // SAFETY: our own child, and one status.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 }
}

fn add_layer() -> bool {
    use landlock::{AccessFs, Ruleset, RulesetAttr};
    let set = Ruleset::default().handle_access(AccessFs::MakeSym).and_then(Ruleset::create);
    set.and_then(|set| set.restrict_self()).is_ok()
}
