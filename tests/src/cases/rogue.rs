//! Guests that are out to harm ([`rogues`]). Whatever they do, their VMM serves, grows neither in memory nor in threads
//! or descriptors, writes no log without end, and is updated under them.

use std::{fs, path::PathBuf, thread::sleep, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cases::note,
    harness::{hooks::Switch, lab::Nic, proc, proc::Facts, report::Report, vm::Vm, wait_for},
    native::{
        guest, rogues,
        rogues::Rogue,
        steps::{Memory, Progress},
    },
};

/// How a VMM begins to say why its guest has ended.
const CANNOT_GO_ON: &str = "the guest cannot go on: vCPU";
/// Growth of a VMM whose guest does the same again, KiB.
const FLAT_KIB: u64 = 1024;
/// 200 warnings at once, and then one in ten seconds; twice.
const LOG_MAX: usize = 128 << 10;

struct Subject<'a> {
    vm: Vm,
    _kernel: Kernel,
    memory: Memory,
    rogue: &'a Rogue,
}

impl<'a> Subject<'a> {
    fn boot(rogue: &'a Rogue, args: &[String]) -> Result<Self> {
        let (vm, kernel) = start(rogue, args)?;
        let memory = Memory::of(vm.vmm()?)?;
        Ok(Self { vm, _kernel: kernel, memory, rogue })
    }

    fn progress(&self) -> Result<Vec<Progress>> {
        (0..self.rogue.goes_on).map(|vcpu| self.memory.progress(vcpu)).collect()
    }

    fn until(&mut self, what: &str, of: impl Fn(&Progress) -> u64, more: u64) -> Result<()> {
        let before = self.progress()?;
        wait_for(&format!("the guest to {what}"), || {
            ensure!(self.vm.is_running(), "the VMM has ended: {}", self.vm.log_text());
            Ok(self.progress()?.iter().zip(&before).all(|(now, then)| of(now) >= of(then) + more).then_some(()))
        })
    }

    fn round(&mut self) -> Result<()> {
        self.until("go through all of its steps", |progress| progress.rounds, 1)
    }

    fn goes_on(&mut self, when: &str) -> Result<()> {
        let before = self.progress()?;
        self.until(&format!("go on {when}"), |progress| progress.steps, 20)?;
        for (now, then) in self.progress()?.iter().zip(&before) {
            let Progress { differences, first: [what, found, expected], .. } = *now;
            ensure!(differences == 0, "MSR {what:#x} is {found:#x} {when}, and was {expected:#x}");
            ensure!(now.rounds >= then.rounds, "it has gone back {when}: {then:?} -> {now:?}");
        }
        Ok(())
    }

    fn serves(&self) -> Result<()> {
        self.vm.ping()?;
        let info = self.vm.info()?;
        ensure!(info["state"] == "Running", "{info}");
        Ok(())
    }

    /// While the guest goes through all that it does once more.
    fn flat(&mut self, when: &str) -> Result<()> {
        let before = self.vm.settled_facts()?;
        self.round()?;
        self.serves()?;
        is_flat(&before, || self.vm.settled_facts()).context(when.to_owned())
    }

    /// What the VMM has said of the end of its guest, and which step that came in, if that is what went wrong.
    fn end(&mut self) -> Option<String> {
        if !ends_soon(&mut self.vm) {
            return None;
        }
        let log = self.vm.log_text();
        let said = log.lines().find(|line| line.contains(CANNOT_GO_ON))?;
        let at = self.memory.progress(0).map(|progress| self.rogue.step(&progress));
        Some(format!("{said}, at {at:?}"))
    }

    fn all(&mut self) -> Result<()> {
        self.round()?;
        self.flat("after its boot")?;
        for (fault, outcome) in [(None, "updated"), (Some("vcpus:error"), "rolled_back"), (None, "updated")] {
            let when = format!("after an update that was {outcome}");
            let fault = fault.map(|fault| Switch::with(&self.vm.dir, "fault", fault)).transpose()?;
            let answer = self.vm.ask_update(&self.vm.other_build()?)?;
            let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
            drop(fault);
            ensure!(report.outcome == outcome, "not {outcome}: {report:?}");
            self.vm.follow(report.pid)?;
            if outcome == "updated" {
                self.vm.note_update();
            }
            self.goes_on(&when)?;
            self.serves()?;
        }
        self.flat("after its updates")?;
        self.goes_on("after all")?;
        let log = self.vm.log_text();
        ensure!(log.len() <= LOG_MAX, "a log of {} bytes: {}", log.len(), &log[..2000]);
        ensure!(!log.contains("panic"), "{log}");
        Ok(())
    }
}

/// What `now` says has not grown. Not at the first look: a connection of the API is closed a little later than its
/// answer is there.
fn is_flat(before: &Facts, mut now: impl FnMut() -> Result<Facts>) -> Result<()> {
    let mut growth = String::new();
    for _ in 0..100 {
        growth = now()?.growth_since(before, FLAT_KIB);
        if growth.is_empty() {
            return Ok(());
        }
        sleep(Duration::from_millis(20));
    }
    bail!("it has grown: {growth}")
}

/// There for as long as its guest may be booted again.
struct Kernel(PathBuf);

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn start(rogue: &Rogue, args: &[String]) -> Result<(Vm, Kernel)> {
    let kernel = Kernel(std::env::temp_dir().join(format!("rogue-{}", std::process::id())));
    guest::write_image(&kernel.0, &rogue.code())?;
    let mut all = vec!["--kernel".to_string(), kernel.0.display().to_string()];
    all.extend(["--cpus".into(), format!("boot={}", rogue.cpus)]);
    all.extend(["--memory".into(), format!("size={}M", rogues::RAM >> 20)]);
    all.extend_from_slice(args);
    let vm = Vm::with_args(&all.iter().map(String::as_str).collect::<Vec<_>>())?.booted()?;
    Ok((vm, kernel))
}

/// A reset is its end, and most of them ask for none. Its words are in nobody's log.
fn quiet(serial: &str) -> Vec<String> {
    ["--on-reset", "exit", "--serial", serial].map(Into::into).to_vec()
}

fn each(kinds: &[Rogue]) -> Result<()> {
    kinds.iter().try_for_each(|rogue| one(rogue, &quiet("null")))
}

fn one(rogue: &Rogue, args: &[String]) -> Result<()> {
    let mut subject = Subject::boot(rogue, args).context(rogue.name)?;
    if let Err(error) = subject.all() {
        let end = subject.end().map(anyhow::Error::msg);
        return Err(end.unwrap_or(error)).context(rogue.name);
    }
    let progress = subject.progress()?;
    let sum = |of: fn(&Progress) -> u64| progress.iter().map(of).sum::<u64>();
    let (steps, exceptions, interrupts) = (sum(|p| p.steps), sum(|p| p.exceptions), sum(|p| p.interrupts));
    note(format_args!("{}: {steps} steps, {exceptions} exceptions, {interrupts} interrupts", rogue.name));
    Ok(())
}

pub(super) fn ports() -> Result<()> {
    each(&rogues::ports())
}

pub(super) fn memory_and_pci() -> Result<()> {
    each(&rogues::memory())?;
    each(&rogues::pci())
}

pub(super) fn registers() -> Result<()> {
    each(&rogues::msrs())?;
    each(&rogues::modes())
}

pub(super) fn interrupts() -> Result<()> {
    each(&rogues::lapic())?;
    each(&rogues::storms())?;
    each(&rogues::controllers())
}

/// To a terminal that nobody reads and a socket that nobody is connected to.
pub(super) fn serial() -> Result<()> {
    let rogue = rogues::serial();
    let socket = std::env::temp_dir().join(format!("rogue-socket-{}", std::process::id()));
    for mode in ["pty".into(), format!("socket={}", socket.display())] {
        one(&rogue, &quiet(&mode)).context(mode)?;
    }
    let _ = fs::remove_file(socket);
    Ok(())
}

/// What KVM may give up on: then the VMM says so, and ends as is documented. On a CPU or a kernel where it is none, the
/// guest goes on, or stands still; then the VMM serves, and is updated.
pub(super) fn ends() -> Result<()> {
    for rogue in rogues::ends() {
        let (mut vm, _kernel) = start(&rogue, &quiet("null")).context(rogue.name)?;
        let memory = Memory::of(vm.vmm()?)?;
        wait_for("the guest", || Ok((memory.progress(0)?.steps > 0).then_some(())))?;
        memory.go()?;
        let what = end_of(&mut vm, &memory).context(rogue.name)?;
        note(format_args!("{}: {what}", rogue.name));
    }
    Ok(())
}

/// A client may hear of the end of its connection a little before that of the VMM.
fn ends_soon(vm: &mut Vm) -> bool {
    (0..1500).any(|_| {
        let ended = !vm.is_running();
        if !ended {
            sleep(Duration::from_millis(20));
        }
        ended
    })
}

/// Of a guest that lives: how, and what becomes of an update.
fn life_of(vm: &mut Vm, memory: &Memory) -> Result<String> {
    let answer = vm.ask_update(&vm.other_build()?)?;
    let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
    if report.outcome == "updated" {
        vm.note_update();
    }
    ensure!(vm.state()? == "Running", "{}", vm.info()?);
    let how = if memory.progress(0)?.rounds < 2 { "stands still" } else { "goes on" };
    Ok(format!("it {how}, and an update is {}: {:?}", report.outcome, report.reasons))
}

/// How it was, where that is one of the ways there are.
fn end_of(vm: &mut Vm, memory: &Memory) -> Result<String> {
    // A guest that goes through its steps lives; one that does neither that nor ends after some looks stands still.
    for _ in 0..40 {
        if vm.is_running() && memory.progress(0)?.rounds < 2 {
            sleep(Duration::from_millis(25));
        }
    }
    if vm.is_running() {
        match life_of(vm, memory) {
            Ok(how) => return Ok(how),
            // Its end may come at any moment.
            Err(error) => ensure!(ends_soon(vm), "{error:#}"),
        }
    }
    let status = vm.wait_exit()?;
    let events = vm.events()?;
    let said = |name: &str| events.iter().find(|event| event["source"] == "vm" && event["event"] == name);
    ensure!(events.last().is_some_and(|last| last["source"] == "vmm" && last["event"] == "shutdown"), "{events:?}");
    match status.code() {
        Some(3) => said("reset").map(|_| "a reset".to_owned()).context("no event of the reset"),
        Some(4) => {
            let failed = said("failed").context("no event of the failure")?;
            let reason = failed["properties"]["reason"].as_str().unwrap_or_default();
            ensure!(reason.contains("vCPU 0") && reason.contains("KVM"), "{failed}");
            Ok(reason.to_owned())
        }
        _ => bail!("the VMM has ended otherwise ({status}): {}", vm.log_text()),
    }
}

/// Boots without end: nothing grows, the API is served, and an update either takes place or meets a reset.
pub(super) fn resets() -> Result<()> {
    for rogue in rogues::resets() {
        let (mut vm, _kernel) = start(&rogue, &["--serial".into(), "null".into()]).context(rogue.name)?;
        let boots = |vm: &Vm| -> Result<usize> {
            Ok(vm.story().unwrap_or_default().iter().filter(|event| *event == "vm rebooted").count())
        };
        let more = |vm: &mut Vm, times: usize| {
            let all = boots(vm)? + times;
            vm.wait_event("vm rebooted", all)
        };
        more(&mut vm, 11)?;
        // Between two boots, of which there is one in a second from here on.
        let facts = |vm: &mut Vm| {
            more(vm, 1)?;
            vm.settled_facts()
        };
        let before = facts(&mut vm)?;
        is_flat(&before, || facts(&mut vm)).context(rogue.name)?;
        for _ in 0..2 {
            let answer = vm.ask_update(&vm.other_build()?)?;
            let report: Report = answer.json().with_context(|| format!("{answer:?}"))?;
            note(format_args!("{}: {} {:?}", rogue.name, report.outcome, report.reasons));
            if report.outcome == "updated" {
                vm.note_update();
            } else {
                ensure!(report.reasons.join(" ").contains("power-off or reset"), "{report:?}");
            }
            more(&mut vm, 1)?;
            vm.ping()?;
        }
        vm.api.order("vm.shutdown")?;
        ensure!(vm.state()? == "Shutdown", "{}", vm.info()?);
        ensure!(vm.log_text().len() <= LOG_MAX, "{}", vm.log_text());
    }
    Ok(())
}

/// Four wishes are one end.
pub(super) fn power_off() -> Result<()> {
    let rogue = rogues::power_off();
    let mut subject = Subject::boot(&rogue, &[])?;
    subject.until("wait", |progress| progress.steps, 10)?;
    subject.memory.go()?;
    let status = subject.vm.wait_exit()?;
    ensure!(status.code() == Some(0), "{status}");
    let story = subject.vm.story()?;
    ensure!(story.iter().filter(|event| *event == "vm powered_off").count() == 1, "{story:?}");
    Ok(())
}

/// A device is the guest's to spoil, and nothing else.
pub(super) fn device() -> Result<()> {
    let bdf = Nic::IgbA.bdf()?;
    proc::wait_group_free(&bdf)?;
    let args = [quiet("null"), vec!["--device".into(), format!("path=/sys/bus/pci/devices/{bdf}")]].concat();
    one(&rogues::device(), &args)
}
