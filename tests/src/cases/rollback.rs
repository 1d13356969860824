//! Nothing loses the guest: faults by name, in every phase of an update, in both VMMs.
//!
//! A cell is a fault. The guest lives in every one of them but those that are an ordinary crash of the VMM that has it.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{
    cell::{Cell, DEADLINE_MS, End},
    held::{self, Verdict},
};
use crate::{
    cases::note,
    harness::{
        hooks::{Hold, Switch},
        http::Answer,
        lab::{self, Nic},
        proc,
        ram::GuestRam,
        report::Report,
        rig::Rig,
        table::{Table, ms},
        vm::Vm,
    },
    proto::{MemoryStats, Request, TimerFired},
};

/// What a timer may be late beside the outage, in software emulation: 0.1 to 1.1 s were seen after most roll backs, 2.2
/// s once, and a slow machine takes several times that. That the guest then faults its memory in anew is the likely
/// reason, not a proven one.
const TIMER_SLACK: Duration = Duration::from_secs(30);
/// The deadline of an update that is going to hang, as a multiple of the pause of one that does not: it must come to
/// where it hangs.
const DEADLINE_PAUSES: u64 = 8;

/// What a cell showed.
pub struct Shown {
    pub outage: Duration,
    /// How late the last of the timers that fell due in the outage was.
    pub late: Duration,
    /// Whether a packet that came in the pause, and none after it, was reported; None where that cannot be tried.
    pub reported: Option<Verdict>,
}

/// The guest of the matrix: 2 vCPUs, two containers, and a job that checks its memory.
pub struct UpdateContext {
    rig: Rig,
    ram: GuestRam,
    vector: (String, u8),
    /// Of an update that is going to hang.
    deadline_ms: u64,
    /// Of the process after its first update.
    first: proc::Facts,
}

impl UpdateContext {
    pub fn boot() -> Result<Self> {
        let nics = [(Nic::IgbA, None), (Nic::E1000e, Some("second"))];
        let mut rig = Rig::boot(Vm::builder().cpus(2), &nics)?;
        rig.agent()?.call::<()>(&Request::MemoryStart { mib: 16, seed: 3 })?;
        let ram = GuestRam::of(rig.vm.vmm()?)?;
        let vector = held::sources(rig.agent()?, &rig.wires[0])?.into_iter().next().context("no vector")?;
        let pause_ms = rig.vm.update()?.pause_us / 1000;
        let first = rig.vm.settled_facts()?;
        let deadline_ms = (DEADLINE_PAUSES * pause_ms).max(DEADLINE_MS);
        Ok(Self { rig, ram, vector, deadline_ms, first })
    }

    /// A last look at every page of the memory that the guest's job has written.
    fn finish(self) -> Result<()> {
        let memory: MemoryStats = self.rig.agent()?.call(&Request::MemoryStop)?;
        ensure!(memory.pages_wrong == 0 && memory.passes > 0, "guest memory at the end: {memory:?}");
        Ok(())
    }

    /// As the file `fault` has it. Who hangs does so for much longer than the deadline.
    fn fault(&self, cell: &Cell) -> String {
        let kind = if cell.hangs_in_a_sleep() {
            format!("hang:{}", 4 + 2 * self.deadline_ms / 1000)
        } else {
            cell.kind.into()
        };
        format!("{}:{kind}", cell.phase)
    }

    fn request(&self, cell: &Cell) -> Result<String> {
        let deadline_ms = if cell.hangs() { self.deadline_ms } else { held::HELD_DEADLINE_MS };
        let body = serde_json::json!({ "binary": self.rig.vm.other_build()?, "deadline_ms": deadline_ms });
        Ok(body.to_string())
    }

    /// Runs a cell that the guest survives. An error is a loss, or a lie.
    pub fn survive(&mut self, cell: &Cell) -> Result<Shown> {
        let rig = &mut self.rig;
        let traffic = rig.traffic()?;
        traffic.moves_on(rig.agent()?, 25)?;
        let after_ms: Vec<u64> = (1..=20).map(|i| i * 100).collect();
        rig.agent()?.call::<()>(&Request::TimersArm { after_ms })?;
        let (before, pid) = (rig.vm.ping()?, rig.vm.pid());

        let request = self.request(cell)?;
        let fault = Switch::with(&self.rig.vm.dir, "fault", &self.fault(cell))?;
        let answer = self.ask(cell, &request)?;
        drop(fault);
        let outage = self.check_answer(cell, &answer, pid)?;

        let rig = &mut self.rig;
        let after = rig.vm.ping()?;
        ensure!((after.build_id == before.build_id) == (cell.end != End::Updated), "{before:?} -> {after:?}");
        let fired: Vec<TimerFired> = rig.agent()?.call(&Request::TimersWait)?;
        // A stopped VMM has stopped its vCPUs too, whatever phase it is in.
        let stopped = Duration::from_millis(if cell.kind == "stop" { self.deadline_ms + 100 } else { 0 });
        let limit = (outage.max(stopped) + TIMER_SLACK).as_micros() as i64;
        ensure!(
            fired.iter().all(|timer| (0..limit).contains(&timer.late_us())),
            "timers: {fired:?}; outage {outage:?}"
        );
        traffic.moves_on(rig.agent()?, 25)?;
        traffic.finish_clean(rig.agent()?).with_context(|| format!("outage {outage:?}"))?;
        let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStats)?;
        crate::harness::wait_for("the guest's job to check its memory", || {
            let now: MemoryStats = rig.agent()?.call(&Request::MemoryStats)?;
            ensure!(now.pages_wrong == 0, "guest memory is damaged: {now:?}");
            Ok((now.pages_checked > memory.pages_checked).then_some(()))
        })?;
        let reported = self.silent_packet(cell)?;
        ensure!(
            reported.is_none_or(|verdict| verdict == Verdict::Delivered),
            "the one packet that came in the pause: {reported:?}"
        );
        self.rig.vm.update().context("the update after it")?;
        let growth = self.rig.vm.settled_facts()?.growth_since(&self.first, proc::Facts::FLAT_KIB);
        ensure!(growth.is_empty(), "after it the process is not what it was: {growth}");
        let late = fired.iter().map(TimerFired::late_us).max().unwrap_or(0);
        Ok(Shown { outage, late: Duration::from_micros(late.max(0) as u64), reported })
    }

    fn ask(&mut self, cell: &Cell, request: &str) -> Result<Answer> {
        let vm = &mut self.rig.vm;
        if !cell.stops_the_old() {
            return vm.api.put("vm.update", request);
        }
        let old = vm.vmm()?;
        let mut caller = vm.api.connect()?;
        caller.send("PUT", "vm.update", request)?;
        crate::harness::wait_for("the VMM to stop", || Ok((proc::state(old)? == 'T').then_some(())))?;
        std::thread::sleep(Duration::from_millis(self.deadline_ms + 100));
        proc::signal(old, libc::SIGCONT)?;
        caller.receive()
    }

    /// Checks that the answer is what this cell must say, and true. How long the guest stood still.
    fn check_answer(&mut self, cell: &Cell, answer: &Answer, pid: u32) -> Result<Duration> {
        let vm = &mut self.rig.vm;
        if cell.end == End::Refused {
            ensure!(
                answer.status == 409 && answer.causes()?.join(" ").to_lowercase().contains(cell.cause()),
                "{answer:?}"
            );
            ensure!(vm.ping()?.pid == pid, "the PID changed");
            return Ok(Duration::ZERO);
        }
        ensure!(answer.status == 200, "{answer:?}");
        let report: Report = answer.json()?;
        ensure!(report.pid == pid && vm.ping()?.pid == pid, "PID {pid} before: {report:?}");
        if cell.end == End::Updated {
            vm.note_update();
            ensure!(report.outcome == "updated", "{report:?}");
        } else {
            let reasons = report.reasons.join(" ").to_lowercase();
            ensure!(
                report.outcome == "rolled_back"
                    && reasons.contains(&format!("phase {}", cell.phase))
                    && reasons.contains(cell.cause()),
                "{report:?} does not say {}: {}",
                cell.phase,
                cell.cause()
            );
        }
        Ok(Duration::from_micros(report.pause_us))
    }

    fn silent_packet(&mut self, cell: &Cell) -> Result<Option<Verdict>> {
        let Some(held_at) = cell.held_at() else { return Ok(None) };
        let request = self.request(cell)?;
        let _fault = Switch::with(&self.rig.vm.dir, "fault", &self.fault(cell))?;
        held::reported_after_roll_back(&mut self.rig, &self.ram, &self.vector, &request, held_at).map(Some)
    }
}

/// A cell that is an ordinary crash: the VMM is gone, as a signal has killed it, and its device can be used again.
fn crash(cell: &Cell) -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None), (Nic::E1000e, Some("second"))])?;
    let _fault = Switch::with(&rig.vm.dir, "fault", &format!("{}:{}", cell.phase, cell.kind))?;
    let answer = rig.vm.ask_update(&rig.vm.other_build()?);
    ensure!(answer.is_err(), "{answer:?}");
    let status = rig.vm.wait_exit()?;
    ensure!(std::os::unix::process::ExitStatusExt::signal(&status).is_some(), "{status}");
    Ok(())
}

/// Runs `cells`, prints what each has shown and, at the end, the matrix. All of them are run, whatever fails.
pub fn matrix(cells: &[Cell]) -> Result<()> {
    let mut table = Table::new(["phase", "fault", "the guest", "outage, ms", "silent packet"]);
    let mut failures = Vec::new();
    let mut subject = None;
    for cell in cells {
        let Cell { phase, kind, end } = cell;
        let row = |what: &str, rest: [String; 2]| {
            let [a, b] = rest;
            [phase.to_string(), kind.to_string(), what.to_string(), a, b]
        };
        let kept = subject.take();
        let result = if *end == End::Crash {
            // Its devices are needed.
            kept.map_or(Ok(()), UpdateContext::finish).and_then(|()| crash(cell)).map(|()| None)
        } else {
            kept.map_or_else(UpdateContext::boot, Ok).and_then(|mut kept: UpdateContext| {
                let shown = kept.survive(cell)?;
                subject = Some(kept);
                Ok(Some(shown))
            })
        };
        match result {
            Ok(None) => table.row(row("dies, as any VMM that crashes", Default::default())),
            Ok(Some(Shown { outage, late, reported })) => {
                let what = match end {
                    End::Refused => "lives, refused",
                    End::Updated => "lives, updated",
                    _ => "lives, rolled back",
                };
                note(format_args!(
                    "{phase}:{kind}: {what}, outage {outage:?}, timers late {late:?}, silent packet {reported:?}"
                ));
                let reported = reported.map_or("-", |_| "reported").to_string();
                let outage = ms(outage.as_micros() as u64);
                table.row(row(what, [outage, reported]));
            }
            Err(error) => {
                note(format_args!("{phase}:{kind}: FAILED: {error:#}"));
                failures.push(format!("{phase}:{kind}: {error:#}\n{}", crate::harness::logs::tails()));
                table.row(row("**FAILED**", Default::default()));
            }
        }
    }
    if let Some(Err(error)) = subject.map(UpdateContext::finish) {
        failures.push(format!("at the end: {error:#}"));
    }
    println!("{table}");
    ensure!(failures.is_empty(), "{} of {} cells failed:\n{}", failures.len(), cells.len(), failures.join("\n"));
    Ok(())
}

/// Cells with each kind of end, in both VMMs; all cells are in the soak's matrix.
pub fn some_cells() -> Result<()> {
    let cells = [
        ("pause", "error"),
        ("invalidate", "ebusy:1"),
        ("prewarm", "segv"),
        ("devices", "hang"),
        ("remap", "refused:1"),
    ];
    matrix(&cells.map(|(phase, kind)| Cell::new(phase, kind)))
}

/// With no irqfd attached again by the old VMM, the packet that came in the pause must be missing: or the check above
/// shows nothing.
pub fn red_without_irqfds() -> Result<()> {
    let mut subject = UpdateContext::boot()?;
    let _hook = Switch::on(&subject.rig.vm.dir, "skip-irqfds")?;
    let seen = subject.silent_packet(&Cell::new("commit", "error"))?;
    subject.rig.agent()?.ping()?;
    // Only the driver's watchdog brings it to light.
    ensure!(matches!(seen, Some(Verdict::Lost | Verdict::Unclear)), "{seen:?} though nothing could deliver it");
    Ok(())
}

/// Keeps the states of an update, the true one and that of its rehearsal, as files among the results, for
/// vmm/tests/golden.
pub fn golden() -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None), (Nic::E1000e, Some("second"))])?;
    // Twice: the state is to be of build a, which is what is released.
    rig.vm.update()?;
    rig.vm.update()?;
    let version = rig.vm.ping()?.version;
    for (kind, memfd, phase) in
        [("rehearsal", "/memfd:rehearsal", "prepare"), ("state", "/memfd:saved-state", "invalidate")]
    {
        let old = rig.vm.vmm()?;
        let mut hold = Hold::arm(&rig.vm.dir, phase)?;
        let mut caller = rig.vm.api.connect()?;
        let body = serde_json::json!({ "binary": lab::bin("theseus-a")? });
        caller.send("PUT", "vm.update", &body.to_string())?;
        hold.wait_held()?;
        let mut state = proc::open_fd_to(old, memfd, std::fs::File::options().read(true))?;
        let path = lab::results()?.join(format!("{version}.{kind}"));
        let mut bytes = Vec::new();
        state.read_to_end(&mut bytes)?;
        // Behind it is room that was not needed. The header is 24 bytes, with the body's length in the last eight.
        let body = bytes.get(16..24).context("the state has no header")?;
        bytes.truncate(24 + usize::try_from(u64::from_le_bytes(body.try_into()?))?);
        std::fs::write(&path, bytes)?;
        println!("{}", path.display());
        hold.release()?;
        caller.receive()?;
        drop(hold);
        rig.vm.settled_facts()?;
    }
    Ok(())
}
