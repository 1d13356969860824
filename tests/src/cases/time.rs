//! Clocks, timers, and vCPUs that run or sleep through an update.

use std::{thread::sleep, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    cases::{MANY, check, note},
    clock::slope,
    harness::{clock, lab, proc, rig, vm::Vm},
    proto::{Request, TimerFired},
};

/// How far the guest's clock may be off L1's after all updates, more than before them.
const CLOCK_LIMIT_US: f64 = 20.0;
/// What a busy L1 in software emulation may add to the lateness of a timer, if it adds no more without an update.
const TIMER_SLACK_US: i64 = 150_000;

/// The guest's clock against L1's, before, between and after many updates.
pub fn clock_updates() -> Result<()> {
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
pub fn timer_over_update() -> Result<()> {
    let vm = Vm::builder().boot()?;
    let usual = latest(&vm, || Ok(0))?;
    let slack = TIMER_SLACK_US.max(2 * usual);
    for round in 0..3 {
        let mut pause = 0;
        let worst = latest(&vm, || {
            pause = i64::try_from(vm.update_to(&lab::bin(["theseus-b", "theseus-a"][round % 2])?)?.pause_us)?;
            Ok(pause)
        })?;
        note(format_args!(
            "round {round}: the latest timer was {worst} us late, {usual} us without an update; pause {pause} us"
        ));
        ensure!(worst < pause + slack, "a timer was {worst} us late; pause {pause} us, without an update {usual} us");
    }
    Ok(())
}

/// Arms many timers, does `meanwhile`, and says how late the latest of them was, µs. None may be early.
fn latest(vm: &Vm, meanwhile: impl FnOnce() -> Result<i64>) -> Result<i64> {
    // One every 20 ms: some of them fall into the pause wherever that is.
    let after_ms: Vec<u64> = (1..=150).map(|i| i * 20).collect();
    let expected = after_ms.len();
    vm.agent()?.call::<()>(&Request::TimersArm { after_ms })?;
    meanwhile()?;
    let fired: Vec<TimerFired> = vm.agent()?.call(&Request::TimersWait { timeout_ms: 20_000 })?;
    ensure!(fired.len() == expected, "{} of {expected} timers fired", fired.len());
    let early: Vec<_> = fired.iter().filter(|t| t.late_us() < 0).collect();
    ensure!(early.is_empty(), "fired before they were due: {early:?}");
    Ok(fired.iter().map(TimerFired::late_us).max().unwrap_or(0))
}

/// All vCPUs halted when the update comes; nothing but the guest's own timer wakes it afterwards.
pub fn idle_guest_wakes() -> Result<()> {
    let mut vm = Vm::builder().cpus(2).boot()?;
    for round in 0..3 {
        vm.agent()?.call::<()>(&Request::TimersArm { after_ms: vec![4000] })?;
        sleep(Duration::from_millis(500));
        check_idle(&vm, "before the update")?;
        let report = vm.update()?;
        check_idle(&vm, "after the update")?;
        let fired: Vec<TimerFired> = vm.agent()?.call(&Request::TimersWait { timeout_ms: 20_000 })?;
        let late = fired.first().map_or(i64::MAX, TimerFired::late_us);
        ensure!(
            (0..TIMER_SLACK_US + report.pause_us as i64).contains(&late),
            "round {round}: the timer was {late} us late"
        );
        vm.agent()?.ping()?;
    }
    Ok(())
}

/// The vCPU threads use hardly any CPU for a while.
fn check_idle(vm: &Vm, when: &str) -> Result<()> {
    let used =
        |vm: &Vm| -> Result<u64> { (0..vm.cpus).map(|cpu| proc::thread_ticks(vm.pid(), &format!("vcpu{cpu}"))).sum() };
    let before = used(vm)?;
    sleep(Duration::from_secs(1));
    let ticks = used(vm)? - before;
    ensure!(ticks < 50, "the vCPUs of the idle guest used {ticks} of 100 clock ticks {when}");
    Ok(())
}

/// Each of 4 spinning vCPUs goes on after every update.
pub fn four_busy_vcpus() -> Result<()> {
    let mut vm = Vm::builder().cpus(4).boot()?;
    vm.agent()?.call::<()>(&Request::BusyStart { cpus: vec![0, 1, 2, 3] })?;
    let counts = |vm: &Vm| vm.agent()?.call_within::<Vec<u64>>(&Request::BusyStats, Duration::from_secs(60));
    for update in 1..=5 {
        let before = counts(&vm)?;
        vm.update()?;
        sleep(Duration::from_secs(1));
        let after = counts(&vm)?;
        ensure!(
            after.len() == 4 && before.iter().zip(&after).all(|(b, a)| a > b),
            "update {update}: {before:?} -> {after:?}"
        );
    }
    vm.agent()?.call_within::<Vec<u64>>(&Request::BusyStop, Duration::from_secs(60))?;
    Ok(())
}
