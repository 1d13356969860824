//! The VMM as a child process, with its API and the agent in its guest.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::{
    PATIENCE,
    agent::Agent,
    builder::Builder,
    capabilities, hooks,
    http::{Answer, Api},
    lab, logs, proc,
    process::Process,
    report::{Ping, Report, update_body},
    wait_for,
};

pub struct Vm {
    process: Process,
    pub api: Api,
    pub dir: PathBuf,
    pub log: PathBuf,
    console: Option<PathBuf>,
    agent: Option<Agent>,
    pub cpus: u32,
    /// Updates so far: which build is next.
    updates: u32,
}

/// What a VMM is started in.
pub struct Setting<'a> {
    /// Its serial port is a socket of the harness.
    pub serial: bool,
    pub hooks: bool,
    pub notify_socket: Option<&'a Path>,
    /// Without CAP_IPC_LOCK, and with RLIMIT_MEMLOCK at so many bytes.
    pub may_lock: Option<u64>,
    /// SIGCHLD is ignored, as by a careless supervisor.
    pub ignores_children: bool,
    /// All signals are blocked.
    pub blocks_signals: bool,
    /// The user that it runs as, who has these capabilities.
    pub user: Option<(u32, &'static [u32])>,
    /// Its standard input.
    pub terminal: Option<&'a File>,
    /// A limit, and its soft value.
    pub limit: Option<(libc::__rlimit_resource_t, u64)>,
    /// By Landlock, but for its switches.
    pub confined: bool,
    /// Builds to update to may be anywhere, unless it is confined or the arguments say otherwise.
    pub anywhere: bool,
}

impl Default for Setting<'_> {
    fn default() -> Self {
        Self {
            serial: false,
            hooks: true,
            notify_socket: None,
            may_lock: None,
            ignores_children: false,
            blocks_signals: false,
            user: None,
            terminal: None,
            limit: None,
            confined: false,
            anywhere: true,
        }
    }
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Vm {
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The VMM without a guest: API only.
    pub fn api_only() -> Result<Self> {
        Self::spawn("theseus-a", &[], &Setting::default())
    }

    /// The same of the file at `path`. Builds to update to are where they have to be by default.
    pub fn api_only_from(path: &Path) -> Result<Self> {
        let setting = Setting { anywhere: false, ..Setting::default() };
        Self::spawn(&path.display().to_string(), &[], &setting)
    }

    /// The VMM with these arguments beside those that every VMM gets: there is no agent to talk to.
    pub fn with_args(args: &[&str]) -> Result<Self> {
        Self::spawn("theseus-a", &args.iter().map(|arg| (*arg).to_string()).collect::<Vec<_>>(), &Setting::default())
    }

    /// A guest without console and agent: `kernel` is all there is.
    pub fn bare(kernel: &Path, cpus: u32, memory: &str, hooks: bool) -> Result<Self> {
        let cpus = format!("boot={cpus}");
        let args = ["--kernel", &kernel.display().to_string(), "--cpus", &cpus, "--memory", memory].map(str::to_owned);
        Self::spawn("theseus-a", &args, &Setting { hooks, ..Setting::default() })?.booted()
    }

    /// [`Vm::bare`] with its serial port on `terminal`.
    pub fn bare_on(terminal: &File, kernel: &Path, memory: &str) -> Result<Self> {
        let args = ["--kernel", &kernel.display().to_string(), "--memory", memory, "--serial", "tty"];
        let setting = Setting { terminal: Some(terminal), ..Setting::default() };
        Self::spawn("theseus-a", &args.map(str::to_owned), &setting)?.booted()
    }

    /// The API is there before the guest is.
    pub fn booted(mut self) -> Result<Self> {
        self.wait_event("vm booted", 1)?;
        Ok(self)
    }

    /// `binary`: a name among the builds, or a path.
    pub fn spawn(binary: &str, args: &[String], setting: &Setting<'_>) -> Result<Self> {
        let dir =
            std::env::temp_dir().join(format!("vm-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(dir.join("hooks")).with_context(|| format!("{}", dir.display()))?;
        let log = logs::create("theseus")?;
        let api = Api { path: dir.join("api") };
        let mut command = Command::new(lab::bin(binary)?);
        command.arg("--api-socket").arg(&api.path).args(lab::seccomp()).args(args);
        command.arg("--pid-file").arg(dir.join("pid")).arg("--event-monitor").arg(dir.join("events"));
        if setting.anywhere && !setting.confined && !args.iter().any(|arg| arg == "--update-dir") {
            command.args(["--update-dir", "/"]);
        }
        if setting.serial {
            command.arg("--serial").arg(format!("socket={}", dir.join("serial").display()));
        }
        if setting.confined {
            let rule = format!("path={},access=rw", dir.join("hooks").display());
            command.args(["--landlock", "--landlock-rules", &rule]);
        }
        if setting.hooks {
            command.env(hooks::ENV, dir.join("hooks"));
        }
        command.envs(setting.notify_socket.map(|path| ("NOTIFY_SOCKET", path)));
        if let Some(bytes) = setting.may_lock {
            // SAFETY: system calls only.
            unsafe { command.pre_exec(move || proc::bound_locking(bytes)) };
        }
        if setting.ignores_children {
            // SAFETY: a system call only.
            unsafe { command.pre_exec(proc::ignore_children) };
        }
        if setting.blocks_signals {
            // SAFETY: a system call only.
            unsafe { command.pre_exec(proc::block_signals) };
        }
        if let Some((user, capabilities)) = setting.user {
            // SAFETY: system calls only.
            unsafe { command.pre_exec(move || capabilities::become_user(user, capabilities)) };
        }
        if let Some((resource, soft)) = setting.limit {
            // SAFETY: a system call only.
            unsafe { command.pre_exec(move || proc::bound(resource, soft)) };
        }
        command
            .stdin(setting.terminal.map(File::try_clone).transpose()?.map_or_else(Stdio::null, Stdio::from))
            .stdout(File::options().append(true).open(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        Process::adopt_orphans();
        let child = command.spawn().with_context(|| format!("{:?}", command.get_program()))?;
        let process = Process::new(child);
        let mut vm = Self { process, api, dir, log, console: None, agent: None, cpus: 0, updates: 0 };
        let api = vm.api.path.clone();
        let process = &mut vm.process;
        let log = vm.log.clone();
        wait_for("API socket", || {
            if let Some(status) = process.try_wait()? {
                bail!("the VMM ended at once ({status}):\n{}", logs::tail(&log));
            }
            Ok(std::os::unix::net::UnixStream::connect(&api).ok())
        })?;
        Ok(vm)
    }

    /// The PID that everybody knows: the keeper's.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process that has the guest, or, in an update, may have it in a moment: the keeper's newest.
    pub fn vmm(&self) -> Result<u32> {
        proc::newest_child(self.pid())?.with_context(|| format!("the keeper {} has no VMM", self.pid()))
    }

    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("this VM has no agent")
    }

    /// Where a guest's serial port is, if it has one.
    pub fn serial(&self) -> PathBuf {
        self.dir.join("serial")
    }

    /// Connects to the serial port of a guest that is about to boot.
    pub(super) fn attach(&mut self) -> Result<()> {
        let console = logs::create("console")?;
        let agent = Agent::connect(&self.serial(), &console);
        self.console = Some(console);
        if agent.is_err()
            && let Ok(Some(status)) = self.process.try_wait()
        {
            bail!("the VMM ended at once ({status}):\n{}", logs::tail(&self.log));
        }
        self.agent = Some(agent?);
        Ok(())
    }

    /// The guest was booted anew in this VMM: waits for its agent, on its new serial port.
    pub fn reconnect(&mut self) -> Result<()> {
        self.attach()?;
        self.agent()?.wait_ready(PATIENCE)
    }

    pub fn ping(&self) -> Result<Ping> {
        self.api.get("vmm.ping")?.json()
    }

    pub fn info(&self) -> Result<serde_json::Value> {
        self.api.get("vm.info")?.json()
    }

    /// State of the VM as `vm.info` names it.
    pub fn state(&self) -> Result<String> {
        Ok(self.info()?["state"].as_str().context("vm.info has no state")?.to_string())
    }

    /// Asks for an update to `binary` and gives back whatever is answered.
    pub fn ask_update(&self, binary: &Path) -> Result<Answer> {
        self.api.put("vm.update", &update_body(binary))
    }

    /// Updates to `binary`, and checks all that every update must keep.
    pub fn update_to(&self, binary: &Path) -> Result<Report> {
        let before = self.ping()?;
        let started = Instant::now();
        let answer = loop {
            let answer = self.ask_update(binary)?;
            // An update that meets the end of the one before may be told to wait.
            if answer.status != 429 || started.elapsed() > PATIENCE {
                break answer;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(answer.status == 200, "vm.update to {}: {answer:?}", binary.display());
        let report: Report = answer.json()?;
        self.check_updated(&before, &report)?;
        Ok(report)
    }

    /// Checks that `report` tells of an update from the build of `before`, and that it is true.
    pub fn check_updated(&self, before: &Ping, report: &Report) -> Result<()> {
        let after = self.ping()?;
        ensure!(report.outcome == "updated", "{report:?}");
        ensure!(report.pid == self.pid() && after.pid == self.pid(), "the PID changed: {} -> {report:?}", self.pid());
        ensure!(report.from.build_id == before.build_id, "reported from {:?}, was {before:?}", report.from);
        ensure!(report.to.build_id == after.build_id, "reported to {:?}, is {after:?}", report.to);
        ensure!(after.build_id != before.build_id, "the build id {} did not change", after.build_id);
        ensure!(report.pause_us > 0 && !report.phases.is_empty(), "{report:?}");
        Ok(())
    }

    /// The build that runs not: a and b take turns.
    pub fn other_build(&self) -> Result<PathBuf> {
        lab::bin(if self.updates.is_multiple_of(2) { "theseus-b" } else { "theseus-a" })
    }

    /// Updates to the other of the two builds.
    pub fn update(&mut self) -> Result<Report> {
        let report = self.update_to(&self.other_build()?)?;
        self.updates += 1;
        Ok(report)
    }

    /// An update to `binary` that is given up by `fault` (`vmm/src/test_hooks.rs`), and must be undone.
    pub fn roll_back(&self, fault: &str, binary: &Path) -> Result<Report> {
        let fault = hooks::Switch::with(&self.dir, "fault", fault)?;
        let answer = self.ask_update(binary)?;
        drop(fault);
        let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
        ensure!(report.outcome == "rolled_back" && report.pid == self.pid(), "{report:?}");
        Ok(report)
    }

    /// An update to the other build was done without [`Vm::update`].
    pub fn note_update(&mut self) {
        self.updates += 1;
    }

    /// Facts about the keeper and its VMM, once the old one of the last update is gone.
    pub fn settled_facts(&self) -> Result<proc::Facts> {
        wait_for("the old VMM of the last update to end", || {
            Ok((proc::children(self.pid())?.len() == 1).then_some(()))
        })?;
        Ok(proc::Facts::of(self.vmm()?)?.with_keeper(proc::Facts::of(self.pid())?))
    }

    /// Everything that the event stream has said, in order.
    pub fn events(&self) -> Result<Vec<serde_json::Value>> {
        let text = fs::read_to_string(self.dir.join("events"))?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Source and name of each of them.
    pub fn story(&self) -> Result<Vec<String>> {
        let word = |word: &serde_json::Value| word.as_str().unwrap_or("?").to_owned();
        let events = self.events()?;
        Ok(events.iter().map(|event| format!("{} {}", word(&event["source"]), word(&event["event"]))).collect())
    }

    /// Waits until `event` has been told so many times.
    pub fn wait_event(&mut self, event: &str, times: usize) -> Result<()> {
        wait_for(&format!("{times} times the event '{event}'"), || {
            if let Some(status) = self.process.try_wait()? {
                bail!("the VMM has ended ({status}):\n{}", logs::tail(&self.log));
            }
            // The line that is being written may be half there.
            let told = self.story().unwrap_or_default();
            Ok((told.iter().filter(|told| *told == event).count() >= times).then_some(()))
        })
    }

    /// After a roll back that may have changed the PID, which is said where a supervisor looks.
    pub fn follow(&mut self, pid: u32) -> Result<()> {
        let written = fs::read_to_string(self.dir.join("pid"))?;
        ensure!(written.trim() == pid.to_string(), "the PID file says {written}, the report {pid}");
        let last = self.events()?.pop().context("no event")?;
        ensure!(
            last["source"] == "update"
                && last["event"] == last["properties"]["outcome"]
                && last["properties"]["pid"] == pid,
            "the last event is {last}"
        );
        self.process.follow(pid).with_context(|| format!("the VMM is said to be process {pid} now"))
    }

    pub fn signal(&mut self, signal: i32) -> Result<()> {
        Ok(self.process.signal(signal)?)
    }

    /// Waits for the end of the VMM.
    pub fn wait_exit(&mut self) -> Result<ExitStatus> {
        let process = &mut self.process;
        wait_for("the VMM to end", || Ok(process.try_wait()?))
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// The running test uses this VM, which another has started.
    pub fn adopt_logs(&self) {
        logs::add(&self.log);
        if let Some(console) = &self.console {
            logs::add(console);
        }
    }

    /// A number of `vm.counters`, like `/serial/dropped_bytes`.
    pub fn counter(&self, pointer: &str) -> Result<u64> {
        let counters: serde_json::Value = self.api.get("vm.counters")?.json()?;
        counters
            .pointer(pointer)
            .and_then(serde_json::Value::as_u64)
            .with_context(|| format!("no {pointer} in {counters}"))
    }

    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(Some(status)) = self.process.try_wait()
            && let Ok(mut log) = File::options().append(true).open(&self.log)
        {
            let _ = writeln!(log, "[the VMM had ended: {status}]");
        }
        // One that has an update under way would outlive its keeper, with its devices.
        let below = proc::children(self.pid()).unwrap_or_default();
        // A test that failed may not have followed a roll back that changed the PID.
        let written = fs::read_to_string(self.dir.join("pid")).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = written {
            let _ = self.process.follow(pid);
        }
        let _ = self.process.signal(libc::SIGKILL);
        let _ = self.process.wait();
        for vmm in below {
            let _ = proc::signal(vmm, libc::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}
