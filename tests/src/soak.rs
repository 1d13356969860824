//! `l1-tests soak`: many updates with everything watched at once, every fault in every phase, and random faults.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{
    bench::phase_table,
    cases::{
        self, boot,
        cell::{Cell, End},
        note, rollback,
    },
    clock::{mono_ns, slope},
    floor,
    harness::{
        clock,
        lab::{self, Nic},
        logs,
        proc::Facts,
        rig::Rig,
        table::{Table, percentile},
        traffic::{self, Traffic},
        vm::Vm,
    },
    proto::{MemoryStats, Request},
};

const UPDATES: u32 = 100;
const MANY: u32 = 1000;
const RANDOM_FAULTS: usize = 200;
/// How often the floor is taken.
const FLOORS: u32 = 40;

/// What an update may add to the error of the guest's clock, us.
const CLOCK_US: f64 = 0.2;
/// How long the clocks are watched before the first update.
const CONTROL: Duration = Duration::from_secs(40);

/// The clocks at a moment of L1's.
struct At(u64, clock::Reading);

impl At {
    fn now(vm: &Vm) -> Result<Self> {
        let reading = clock::read(vm)?;
        Ok(Self(mono_ns(), reading))
    }

    /// Seconds, and by how much the guest's clock has moved against L1's, us.
    fn to(&self, later: &Self) -> Result<(f64, f64)> {
        Ok(((later.0 - self.0) as f64 / 1e9, clock::error_us(&self.1, &later.1)?))
    }
}

/// What the clocks drift apart without any update, us a second: both count TSC ticks, each with a factor of its own
/// rounding.
fn drift(vm: &Vm) -> Result<f64> {
    let before = At::now(vm)?;
    std::thread::sleep(CONTROL);
    let (seconds, error) = before.to(&At::now(vm)?)?;
    Ok(error / seconds)
}

type Part = fn(&[String]) -> Result<()>;
const PARTS: [(&str, Part); 6] = [
    ("updates", updates),
    ("thousand", thousand),
    ("matrix", matrix),
    ("faults", faults),
    ("cpus", cpus),
    ("cases", |_| cases::long()),
];

/// `words`: which parts, all if there are none: updates, thousand, matrix, faults, cpus, cases. The names of phases are
/// those of a matrix, a number is the seed of the faults.
pub fn run(words: &[String]) -> Result<()> {
    let (parts, rest): (Vec<_>, Vec<_>) =
        words.iter().cloned().partition(|word| PARTS.iter().any(|(name, _)| name == word));
    let (mut ran, mut failures) = (0, Vec::new());
    for (name, body) in PARTS {
        if !parts.is_empty() && !parts.iter().any(|part| *part == name) {
            continue;
        }
        ran += 1;
        logs::begin(&format!("soak-{name}"));
        let outcome = body(&rest);
        println!("test soak_{name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        if let Err(e) = outcome {
            println!("{e:#}\n{}", logs::tails());
            failures.push(name);
        }
    }
    let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {} passed; {} failed", ran - failures.len(), failures.len());
    ensure!(failures.is_empty(), "failed: {failures:?}");
    Ok(())
}

fn updates(_: &[String]) -> Result<()> {
    soak(UPDATES, "one igb", &[(Nic::IgbA, None)])?;
    soak(
        UPDATES,
        "two igb and an e1000e in two containers",
        &[(Nic::IgbA, None), (Nic::IgbB, Some("second")), (Nic::E1000e, None)],
    )
}

fn thousand(_: &[String]) -> Result<()> {
    soak(MANY, "one igb", &[(Nic::IgbA, None)])
}

fn matrix(phases: &[String]) -> Result<()> {
    let mut cells = Cell::all();
    let phases: Vec<_> = phases.iter().filter(|word| word.parse::<u64>().is_err()).collect();
    for phase in &phases {
        ensure!(
            cells.iter().any(|cell| cell.phase == phase.as_str()),
            "'{phase}' is neither a part of the soak nor a phase"
        );
    }
    cells.retain(|cell| phases.is_empty() || phases.iter().any(|phase| *phase == cell.phase));
    println!("### Every fault in every phase, kernel {}\n", lab::kernel_version());
    rollback::matrix(&cells)
}

/// As many vCPUs as a guest may have.
fn cpus(_: &[String]) -> Result<()> {
    boot::many_cpus(64, 10)
}

/// Updates with a random fault each, all on one guest.
fn faults(words: &[String]) -> Result<()> {
    let seed = words.iter().find_map(|word| word.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) ^ mono_ns());
    println!("### {RANDOM_FAULTS} updates with a random fault each, kernel {}, seed {seed}\n", lab::kernel_version());
    let cells: Vec<Cell> = Cell::all().into_iter().filter(|cell| cell.end != End::Crash).collect();
    // xorshift64*: any will do that gives the same again for the same seed.
    let mut state = seed | 1;
    let mut random = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize
    };
    let chosen: Vec<Cell> = (0..RANDOM_FAULTS).map(|_| cells[random() % cells.len()]).collect();
    rollback::matrix(&chosen)
}

/// The median of the last quarter against that of the first.
fn last_against_first(values: &[u64]) -> f64 {
    let quarter = (values.len() / 4).max(1);
    percentile(&values[values.len() - quarter..], 50) as f64 / percentile(&values[..quarter], 50).max(1) as f64
}

fn soak(updates: u32, what: &str, nics: &[(Nic, Option<&str>)]) -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2).memory("size=512M"), nics)?;
    rig.agent()?.call::<()>(&Request::MemoryStart { mib: 32, seed: 99 })?;
    // Shared among the wires: with more, L1 is busy with packets alone.
    let wires: Vec<_> = rig.wires.iter().collect();
    let traffic = Traffic::start(rig.agent()?, &wires, traffic::RATE / wires.len() as u32)?;
    let drift = drift(&rig.vm)?;
    rig.vm.update()?;
    rig.vm.update()?;
    let first = rig.vm.settled_facts()?;
    let (clock_before, mut reports, mut errors, mut floors) = (At::now(&rig.vm)?, Vec::new(), Vec::new(), Vec::new());
    for update in 1..=updates {
        reports.push(rig.vm.update()?);
        traffic.moves_on(rig.agent()?, 25)?;
        if update % 100 == 0 {
            note(format_args!("{update} updates, the last paused for {} us", reports[reports.len() - 1].pause_us));
        }
        if update % (updates / FLOORS).max(1) == 0 {
            floors.push(floor::median(rig.vm.cpus)?);
        }
        if update % 5 == 0 {
            let (seconds, error) = clock_before.to(&At::now(&rig.vm)?)?;
            errors.push(error - drift * seconds);
        }
    }
    let last = rig.vm.settled_facts()?;
    let accounts = traffic.finish(rig.agent()?)?;
    let memory: MemoryStats = rig.agent()?.call(&Request::MemoryStop)?;

    println!("### Soak: {updates} updates, {what}, kernel {}\n", lab::kernel_version());
    println!("{}", phase_table(&reports));
    let mut table = Table::new(["", "after the first", "after the last"]);
    for (name, a, b) in [
        ("descriptors", first.fd_count() as u64, last.fd_count() as u64),
        ("threads", first.thread_count() as u64, last.thread_count() as u64),
        ("mappings", first.mapping_count() as u64, last.mapping_count() as u64),
        ("children", first.children as u64, last.children as u64),
        ("resident, without the guest's, KiB", first.own_rss_kib, last.own_rss_kib),
        ("VmLck, KiB", first.locked_kib, last.locked_kib),
    ] {
        table.row([name.to_string(), a.to_string(), b.to_string()]);
    }
    println!("{table}");
    for account in &accounts {
        println!("{} in: {}", account.name, account.to_guest);
        println!("{} out: {}", account.name, account.from_guest);
    }
    println!("guest memory: {memory:?}");
    let pauses: Vec<u64> = reports.iter().map(|report| report.pause_us).collect();
    // Printed alone: under another load the pause, of several processes, changes by more than its floor, of one.
    let longer = last_against_first(&pauses) / last_against_first(&floors);
    let slope = slope(&pauses.iter().map(|us| *us as f64).collect::<Vec<_>>());
    println!(
        "slope of the pause: {slope:+.3} us an update; p50 of the last quarter against the first, as multiples of an \
         exec that makes such a VM: {longer:.2}"
    );
    let clock_error = errors.last().copied().unwrap_or(0.0);
    println!(
        "clock error at the end {clock_error:+.1} us beyond the drift of {drift:+.3} us a second that it has without \
         updates\n"
    );

    ensure!(
        accounts.iter().all(|a| a.to_guest.is_clean() && a.from_guest.is_clean()),
        "packets were lost: {accounts:?}"
    );
    ensure!(memory.pages_wrong == 0, "guest memory is damaged: {memory:?}");
    let may_err = (f64::from(updates) * CLOCK_US).max(20.0);
    ensure!(errors.iter().all(|e| e.abs() < may_err), "clock errors, us: {errors:?}");
    let growth = last.growth_since(&first, Facts::FLAT_KIB);
    ensure!(growth.is_empty(), "{growth}");
    Ok(())
}
