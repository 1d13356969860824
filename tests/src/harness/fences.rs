//! The fences of a VMM: what they are, and what they have stopped: no test may meet one that it does not mean to.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;

use crate::harness::{hooks::Switch, lab, logs, proc, vm::Vm};

static MEANT: AtomicBool = AtomicBool::new(false);
/// How much of each log was read: that of a guest that tests share tells of those before, too.
static READ: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// The running test has a thread do what it may not.
pub fn are_met() {
    MEANT.store(true, Ordering::Relaxed);
}

/// Whether there are filters that stop anything.
pub fn stop() -> bool {
    let mode = lab::seccomp();
    if !mode.is_empty() {
        println!("     no filter stops anything with {}", mode.join(" "));
    }
    mode.is_empty()
}

/// From the start of a test to its end.
pub struct Watch {
    /// The kernel's log, if it can be read.
    kernel: Option<File>,
}

impl Watch {
    pub fn begin() -> Self {
        MEANT.store(false, Ordering::Relaxed);
        let open = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let kernel = open.and_then(|mut file| file.seek(SeekFrom::End(0)).map(|_| file)).ok();
        Self { kernel }
    }

    /// Each call that was stopped or noted, unless the test means it.
    pub fn met(self) -> Vec<String> {
        let mut met = self.noted();
        for log in logs::of_test() {
            let text = fs::read(&log).unwrap_or_default();
            let before = READ.lock().insert(log, text.len()).unwrap_or(0);
            let new = String::from_utf8_lossy(text.get(before..).unwrap_or_default()).into_owned();
            let stopped = |line: &&str| line.contains("which its seccomp filter does not allow");
            met.extend(new.lines().filter(stopped).map(str::to_owned));
        }
        if MEANT.load(Ordering::Relaxed) { Vec::new() } else { met }
    }

    /// The records of audit(8) of type 1326 (AUDIT_SECCOMP) of a VMM, by `--seccomp log`.
    fn noted(self) -> Vec<String> {
        let Some(mut kernel) = self.kernel else { return Vec::new() };
        let mut noted = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match kernel.read(&mut record) {
                // The records before the next one were overwritten.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
                Ok(0) | Err(_) => return noted,
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    if text.contains("type=1326") && text.contains("/theseus-") {
                        noted.push(text.trim().to_owned());
                    }
                }
            }
        }
    }
}

/// How many filters hold a thread, by its status (proc_pid_status(5)).
pub fn filters_in(status: &str) -> Result<u32> {
    let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
    Ok(count.context("no Seccomp_filters in the status of a thread")?.trim().parse()?)
}

/// How many filters hold each thread of a process, by its name.
pub fn filters(pid: u32) -> Result<BTreeMap<String, u32>> {
    let mut filters = BTreeMap::new();
    // But the kernel's own, which it makes of the thread that first needs them (virt/kvm/kvm_main.c,
    // vhost_task_create).
    for (tid, name) in proc::threads(pid)?.into_iter().filter(|(_, name)| !name.starts_with("kvm-")) {
        // One that has ended meanwhile has none.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")) else { continue };
        filters.insert(name, filters_in(&status)?);
    }
    Ok(filters)
}

/// What the build in the file `target` answers, asked for its verdict, to questions of `probe`.
pub fn probed(vm: &Vm, target: &Path, questions: &[String]) -> Result<Vec<String>> {
    let asked = Switch::with(&vm.dir, "probe", &questions.join("\n"))?;
    let body = serde_json::json!({ "binary": target, "dry_run": true, "allow_downgrade": true }).to_string();
    let answer = vm.api.put("vm.update", &body)?;
    ensure!(answer.ok(), "{answer:?}");
    drop(asked);
    let told = vm.dir.join("hooks/probed");
    let text = fs::read_to_string(&told).context("no answers: is this a build with test hooks?")?;
    fs::remove_file(told)?;
    let answers = text.lines().zip(questions).map(|(line, question)| line.replacen(&format!("{question}: "), "", 1));
    Ok(answers.collect())
}
