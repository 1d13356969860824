//! What a shell and its terminal do to the VMM: nohup, a hang-up, a job in the background, one that is killed.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    harness::{
        http::{Answer, Api},
        lab, logs, proc,
        process::Process,
        report::{Report, update_body},
        wait_for,
    },
    native::{Counter, guest},
};

const MEMORY: u64 = 128 << 20;

struct Pty {
    master: File,
    slave: File,
}

impl Pty {
    fn open() -> Result<Self> {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: two ints to fill; nothing else is asked for.
        ensure!(unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) } == 0, "no pty");
        // SAFETY: just opened, and nobody else's.
        let pty = unsafe { Self { master: File::from_raw_fd(master), slave: File::from_raw_fd(slave) } };
        for fd in [&pty.master, &pty.slave] {
            // Or what is started would hold the master, and the terminal never hang up.
            // SAFETY: no memory is involved.
            ensure!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } == 0, "no close-on-exec");
        }
        Ok(pty)
    }

    /// Whether lines are edited and echoed, as a shell's user expects.
    fn is_cooked(&self) -> Result<bool> {
        // SAFETY: plain old data.
        let mut termios = unsafe { std::mem::zeroed::<libc::termios>() };
        // SAFETY: the kernel fills the struct.
        let read = unsafe { libc::tcgetattr(self.slave.as_raw_fd(), &mut termios) };
        ensure!(read == 0, "tcgetattr: {}", io::Error::last_os_error());
        Ok(termios.c_lflag & (libc::ICANON | libc::ECHO) == libc::ICANON | libc::ECHO)
    }
}

/// Before an exec: a session of its own, whose terminal is standard input, and HUP ignored as by nohup(1).
fn in_session(nohup: bool) -> io::Result<()> {
    // SAFETY: system calls on numbers only.
    let done = unsafe {
        (!nohup || libc::signal(libc::SIGHUP, libc::SIG_IGN) != libc::SIG_ERR)
            && libc::setsid() > 0
            && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A VMM that was started from a terminal, by itself or by a shell.
struct Job {
    process: Process,
    api: Api,
    pid: u32,
    updates: usize,
    dir: tempdir::Dir,
}

impl Job {
    fn start(pty: &Pty, nohup: bool, shell: Option<&str>) -> Result<Self> {
        let dir = tempdir::Dir::new()?;
        let (kernel, api, pid) = (dir.path("kernel"), dir.path("api"), dir.path("pid"));
        guest::write(&kernel, MEMORY)?;
        let vmm = lab::bin("theseus-a")?;
        let mut command = match shell {
            Some(script) => {
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(script).arg("sh").arg(vmm);
                command.current_dir(dir.path(""));
                command
            }
            None => Command::new(vmm),
        };
        let options = [("--api-socket", &api), ("--pid-file", &pid), ("--kernel", &kernel)];
        for (name, path) in options {
            command.arg(name).arg(path);
        }
        command.args(["--memory", "size=128M", "--serial", "tty"]).args(lab::seccomp());
        let log = logs::create("theseus")?;
        let log = || File::options().append(true).open(&log);
        command.stdin(Stdio::from(pty.slave.try_clone()?)).stdout(log()?).stderr(log()?);
        // SAFETY: system calls only.
        unsafe { command.pre_exec(move || in_session(nohup)) };
        Process::adopt_orphans();
        let process = Process::new(command.spawn().context("starting the job")?);
        let api = Api { path: api };
        // The API is there before the guest is.
        wait_for("the guest to be booted", || {
            let info = api.get("vm.info").ok().filter(Answer::ok);
            let info = info.map(|info| info.json::<serde_json::Value>()).transpose()?;
            Ok(info.is_some_and(|info| info["state"] == "Running").then_some(()))
        })?;
        let pid = fs::read_to_string(pid)?.trim().parse()?;
        Ok(Self { process, api, pid, updates: 0, dir })
    }

    /// The guest runs, and the control thread answers.
    fn goes_on(&self, what: &str) -> Result<()> {
        let vmm = proc::newest_child(self.pid)?.context("no VMM")?;
        let counter = Counter::of(vmm)?;
        let before = counter.get();
        wait_for(&format!("the guest to go on: {what}"), || {
            Ok((counter.get() > before + guest::pages(MEMORY)).then_some(()))
        })?;
        ensure!(proc::state(self.pid)? != 'T' && proc::state(vmm)? != 'T', "the VMM is stopped: {what}");
        let ping = self.api.get("vmm.ping")?;
        ensure!(ping.ok(), "{what}: {ping:?}");
        Ok(())
    }

    fn update(&mut self) -> Result<()> {
        self.updates += 1;
        let target = lab::bin(if self.updates % 2 == 1 { "theseus-b" } else { "theseus-a" })?;
        let report: Report = wait_for("the update", || {
            let answer = self.api.put("vm.update", &update_body(&target))?;
            if answer.status == 429 { Ok(None) } else { answer.json().map(Some) }
        })?;
        ensure!(report.outcome == "updated" && report.pid == self.pid, "{report:?}");
        self.goes_on("after an update")
    }

    fn end(&mut self) -> Result<ExitStatus> {
        let process = &mut self.process;
        wait_for("the end", || Ok(process.try_wait()?))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            // A shell waits for its job.
            let _ = proc::signal(self.pid, libc::SIGKILL);
            let _ = self.process.signal(libc::SIGKILL);
            let _ = self.process.wait();
        }
    }
}

mod tempdir {
    use std::{
        fs, io,
        path::PathBuf,
        sync::atomic::{AtomicU32, Ordering},
    };

    /// Removed when dropped.
    pub(super) struct Dir(PathBuf);

    static NUMBER: AtomicU32 = AtomicU32::new(0);

    impl Dir {
        pub(super) fn new() -> io::Result<Self> {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let dir = std::env::temp_dir().join(format!("job-{}-{number}", std::process::id()));
            fs::create_dir_all(&dir)?;
            Ok(Self(dir))
        }

        pub(super) fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// The terminal hangs up: that ends a VMM, but not one that was started with HUP ignored; with and without updates
/// before.
pub(super) fn hang_up() -> Result<()> {
    for updates in [0, 1] {
        for nohup in [false, true] {
            let pty = Pty::open()?;
            let mut job = Job::start(&pty, nohup, None)?;
            job.goes_on("its start")?;
            for _ in 0..updates {
                job.update()?;
            }
            drop(pty);
            if !nohup {
                let status = job.end()?;
                ensure!(status.code() == Some(0), "after {updates} updates HUP ended it with {status}");
                continue;
            }
            proc::signal(job.pid, libc::SIGHUP)?;
            job.goes_on("after the hang-up")?;
            job.update()?;
            proc::signal(job.pid, libc::SIGHUP)?;
            job.goes_on("after another HUP")?;
            proc::signal(job.pid, libc::SIGTERM)?;
            let status = job.end()?;
            ensure!(status.code() == Some(0), "TERM ended it with {status}");
        }
    }
    Ok(())
}

/// A shell starts the VMM in the background and brings it to the front when the file `go` is there.
const SHELL: &str = "set -m; \"$@\" & while ! [ -e go ]; do sleep 0.1; done; fg";

/// A VMM in the background whose terminal somebody types at: it is not stopped, and leaves the terminal as it is;
/// brought to the front, it has it.
pub(super) fn background() -> Result<()> {
    let mut pty = Pty::open()?;
    let mut job = Job::start(&pty, false, Some(SHELL))?;
    job.goes_on("its start")?;
    for line in 0..3 {
        pty.master.write_all(b"typed\n")?;
        job.goes_on(&format!("line {line}"))?;
        if line == 1 {
            job.update()?;
        }
    }
    ensure!(pty.is_cooked()?, "the shell's terminal was made raw");
    fs::write(job.dir.path("go"), "")?;
    wait_for("a raw terminal", || Ok((!pty.is_cooked()?).then_some(())))?;
    pty.master.write_all(b"typed")?;
    wait_for("what was typed to be read", || Ok((waiting(&pty.slave)? == 0).then_some(())))?;
    job.update()?;
    ensure!(!pty.is_cooked()?, "the update has left it");
    proc::signal(job.pid, libc::SIGTERM)?;
    job.end()?;
    ensure!(pty.is_cooked()?, "the terminal is not as it was before");
    Ok(())
}

/// A VMM that is killed cannot put its terminal back: its keeper does, of the build that it was started in and of
/// another.
pub(super) fn killed() -> Result<()> {
    for updates in [0, 1, 2] {
        let pty = Pty::open()?;
        let mut job = Job::start(&pty, false, None)?;
        job.goes_on("its start")?;
        wait_for("a raw terminal", || Ok((!pty.is_cooked()?).then_some(())))?;
        for _ in 0..updates {
            job.update()?;
        }
        proc::signal(proc::newest_child(job.pid)?.context("no VMM")?, libc::SIGKILL)?;
        let status = job.end()?;
        ensure!(status.signal() == Some(libc::SIGKILL), "{status}");
        ensure!(pty.is_cooked()?, "after {updates} updates the terminal was left raw");
    }
    Ok(())
}

/// Bytes of input that nobody has read.
fn waiting(terminal: &File) -> Result<libc::c_int> {
    let mut count = 0;
    // SAFETY: the kernel writes one int.
    let read = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::FIONREAD, &mut count) };
    ensure!(read == 0, "FIONREAD: {}", io::Error::last_os_error());
    Ok(count)
}
