//! Clocks, timers, and vCPUs that run or sleep through an update.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cases::{MANY, check, note},
    clock::slope,
    harness::{PATIENCE, clock, exits::PortAccesses, proc, rig, vm::Vm, wait_for},
    proto::{Request, TimerFired},
};

/// The port of the power management timer (X_PM_TMR_BLK of the FADT).
const PM_TIMER: u16 = 0x604;
/// How far the guest's clock may be off L1's after all updates, more than before them.
const CLOCK_LIMIT_US: f64 = 20.0;
/// The same for one that is read by an exit to the VMM, which takes its time in the lab.
const SLOW_CLOCK_LIMIT_US: f64 = 500.0;
/// What a busy L1 in software emulation may add to the lateness of a timer, if it adds no more without an update: up to
/// 1.4 s were seen with eight builds beside it. A timer that is lost is not late but missing, as nothing else wakes
/// these guests, least of all that of one CPU.
const TIMER_SLACK_US: i64 = 3_000_000;
/// How often a timer may be late before it counts: a machine is slow now and then, a timer that is lost is lost every
/// time.
const SLOW_TRIES: u32 = 5;

/// The guest's clock against L1's, before, between and after many updates.
pub(super) fn clock_updates() -> Result<()> {
    rig::shared(|rig| {
        let first = clock::read(&rig.vm)?;
        let mut errors = Vec::new();
        let mut last = first.clone();
        for _ in 0..MANY {
            rig.vm.update()?;
            last = clock::read(&rig.vm)?;
            errors.push(clock::error_us(&first, &last)?);
        }
        let real_us = (last.real_ns - first.real_ns) as f64 / 1000.0;
        let error = errors.last().copied().unwrap_or(f64::MAX);
        let growth = slope(&errors) * f64::from(MANY);
        let shown: Vec<String> = errors.iter().map(|e| format!("{e:.1}")).collect();
        let text =
            format!("clock error, us: {}; over all updates {growth:.1}; wall clock {real_us:.1}", shown.join(" "));
        note(format_args!("{text}; sharpest to {} TSC ticks", last.window));
        check(error.abs() < CLOCK_LIMIT_US, || format!("off by more than {CLOCK_LIMIT_US} us: {text}"))?;
        check(growth.abs() < CLOCK_LIMIT_US, || format!("growing: {text}"))?;
        check(real_us.abs() < CLOCK_LIMIT_US, || format!("the wall clock is off: {text}"))
    })
}

/// Timers due before, in and after the pause.
pub(super) fn timer_over_update() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    let usual = latest(&mut vm, |_| Ok(0))?;
    let slack = TIMER_SLACK_US.max(2 * usual);
    for round in 0..3 {
        for tries in 1.. {
            let mut pause = 0;
            let worst = latest(&mut vm, |vm| {
                pause = i64::try_from(vm.update()?.pause_us)?;
                Ok(pause)
            })?;
            note(format_args!(
                "round {round}: the latest timer was {worst} us late, {usual} us without an update; pause {pause} us"
            ));
            if worst < pause + slack {
                break;
            }
            ensure!(tries < SLOW_TRIES, "a timer was {worst} us late; pause {pause} us, without an update {usual} us");
        }
    }
    Ok(())
}

/// Arms many timers, does `meanwhile`, and says how late the latest of them was, µs. None may be early.
fn latest(vm: &mut Vm, meanwhile: impl FnOnce(&mut Vm) -> Result<i64>) -> Result<i64> {
    // One every 20 ms: some of them fall into the pause wherever that is.
    let after_ms: Vec<u64> = (1..=150).map(|i| i * 20).collect();
    let expected = after_ms.len();
    vm.agent()?.call::<()>(&Request::TimersArm { after_ms })?;
    // Asked for before: what comes over the serial line later would wake the guest.
    let fired = vm.agent()?.start::<Vec<TimerFired>>(&Request::TimersWait)?;
    meanwhile(vm)?;
    let (fired, _) = fired.wait(PATIENCE)?;
    ensure!(fired.len() == expected, "{} of {expected} timers fired", fired.len());
    let early: Vec<_> = fired.iter().filter(|t| t.late_us() < 0).collect();
    ensure!(early.is_empty(), "fired before they were due: {early:?}");
    Ok(fired.iter().map(TimerFired::late_us).max().unwrap_or(0))
}

/// All vCPUs halted when the update comes; nothing but the guest's own timer wakes it afterwards.
pub(super) fn idle_guest_wakes() -> Result<()> {
    const ROUNDS: u32 = 3;
    let mut vm = Vm::builder().cpus(2).boot()?;
    let (mut shown, mut tries, mut after_ms) = (0, 0, 4000);
    while shown < ROUNDS {
        becomes_idle(&vm, "before the update")?;
        let armed = Instant::now();
        vm.agent()?.call::<()>(&Request::TimersArm { after_ms: vec![after_ms] })?;
        // Asked for before: what comes over the serial line later would wake the guest.
        let fired = vm.agent()?.start::<Vec<TimerFired>>(&Request::TimersWait)?;
        let report = vm.update()?;
        becomes_idle(&vm, "after the update")?;
        let idle_in_time = armed.elapsed() < Duration::from_millis(after_ms);
        let (fired, _) = fired.wait(PATIENCE).context("the guest's timer has not woken it")?;
        let late = fired.first().map_or(i64::MAX, TimerFired::late_us);
        ensure!(late >= 0, "the timer fired {late} us before it was due");
        vm.agent()?.ping()?;
        let is_prompt = late < TIMER_SLACK_US + report.pause_us as i64;
        if idle_in_time && is_prompt {
            (shown, tries) = (shown + 1, 0);
            continue;
        }
        tries += 1;
        note(format_args!("once more: idle before the timer was due: {idle_in_time}; the timer was {late} us late"));
        ensure!(tries < SLOW_TRIES, "the timer was {late} us late; pause {} us", report.pause_us);
        if !idle_in_time {
            after_ms *= 2;
        }
    }
    Ok(())
}

/// Waits until the vCPU threads use hardly any CPU for a while.
fn becomes_idle(vm: &Vm, when: &str) -> Result<()> {
    let used =
        |vm: &Vm| -> Result<u64> { (0..vm.cpus).map(|cpu| proc::thread_ticks(vm.vmm()?, &format!("vcpu{cpu}"))).sum() };
    wait_for(&format!("the guest to be idle {when}"), || {
        let (before, since) = (used(vm)?, Instant::now());
        sleep(Duration::from_millis(500));
        let ticks = u128::from(used(vm)? - before);
        // Of 100 a second: less than half of one CPU.
        Ok((ticks * 20 < since.elapsed().as_millis()).then_some(()))
    })
}

/// Each of 4 spinning vCPUs goes on after every update.
pub(super) fn four_busy_vcpus() -> Result<()> {
    let mut vm = Vm::builder().cpus(4).boot()?;
    vm.agent()?.call::<()>(&Request::BusyStart { cpus: vec![0, 1, 2, 3] })?;
    let counts = |vm: &Vm| vm.agent()?.call::<Vec<u64>>(&Request::BusyStats);
    for update in 1..=5 {
        vm.update()?;
        // Read after it: what was done before it does not count.
        let before = counts(&vm)?;
        ensure!(before.len() == 4, "{before:?}");
        wait_for(&format!("every vCPU to go on after update {update}"), || {
            let after = counts(&vm)?;
            Ok(before.iter().zip(&after).all(|(b, a)| a > b).then_some(()))
        })?;
    }
    vm.agent()?.call::<Vec<u64>>(&Request::BusyStop)?;
    Ok(())
}

/// The power management timer as the clock source of a guest, which reads it all the time then. Left to itself a guest
/// does not: no exit is on the way of whoever reads a clock.
pub(super) fn power_management_timer() -> Result<()> {
    let mut vm = Vm::builder().boot()?;
    let usual = vm.agent()?.machine()?.clocksource;
    ensure!(usual == "tsc" || usual == "kvm-clock", "left to itself the guest takes {usual}");
    let reads = PortAccesses::count(PM_TIMER)?;
    let started = Instant::now();
    read_clocks(&vm)?;
    let (before, took) = (reads.so_far()?, started.elapsed());
    // Linux looks whether the TSC is steady, twice a second (kernel/time/clocksource.c, clocksource_watchdog), by up to
    // five pairs of reads.
    let by_watchdog = 10 * (2 * took.as_secs() + 2);
    ensure!(before <= by_watchdog, "{before} reads of the timer within {took:?}, with {usual}");
    vm.agent()?.call::<()>(&Request::ClockSource { name: "acpi_pm".into() })?;
    let now = vm.agent()?.machine()?.clocksource;
    ensure!(now == "acpi_pm", "the clock source is {now}");
    read_clocks(&vm)?;
    let after = reads.so_far()? - before;
    note(format_args!("reads of the timer: {before} with {usual}, {after} with acpi_pm, the guest doing the same"));
    ensure!(after > 0, "this count counts nothing");
    drop(reads);
    exact_over_updates(&mut vm, "acpi_pm")
}

/// Clocks are read and timers set for two seconds.
fn read_clocks(vm: &Vm) -> Result<()> {
    vm.agent()?.call::<()>(&Request::TimersArm { after_ms: (1..=20).map(|i| i * 100).collect() })?;
    for _ in 0..5 {
        clock::read(vm)?;
    }
    vm.agent()?.call::<Vec<TimerFired>>(&Request::TimersWait)?;
    Ok(())
}

/// A guest that does not use kvmclock. It is told the frequency of its TSC here, where it would else measure it by the
/// power management timer: in the lab that takes too long (three exits more than the 131,072 ticks of tsc_read_refs),
/// and without a frequency Linux does not come up.
pub(super) fn without_kvmclock() -> Result<()> {
    let khz = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()?.create_vcpu(0)?.get_tsc_khz()).context("KVM")?;
    let mut vm = Vm::builder().kernel_words(&format!("no-kvmclock tsc_early_khz={khz}")).boot()?;
    // Where the lab is slow, its TSC looks unsteady to the guest's watchdog, which is the power management timer.
    // Where it is fast, the guest tries for ever to measure it better than it was told (tsc_refine_calibration_work).
    let source = vm.agent()?.machine()?.clocksource;
    ensure!(["tsc", "tsc-early", "acpi_pm"].contains(&source.as_str()), "left to itself the guest takes {source}");
    exact_over_updates(&mut vm, &source)
}

/// A guest whose clock source is `source`, at first.
fn exact_over_updates(vm: &mut Vm, source: &str) -> Result<()> {
    let first = clock::read(vm)?;
    for round in 0..3 {
        let started = Instant::now();
        vm.update()?;
        sleep(Duration::from_secs(2));
        let off = clock::error_us(&first, &clock::read(vm)?)?;
        note(format_args!("{source}: {off:.1} us off {:.1?} after update {round}", started.elapsed()));
        ensure!(off.abs() < SLOW_CLOCK_LIMIT_US, "off by more than {SLOW_CLOCK_LIMIT_US} us");
    }
    Ok(())
}
