//! The end-to-end tests. One file per theme; this one lists and runs them.

mod api;
pub mod boot;
pub mod booting;
pub mod bounds;
pub mod cell;
mod confined;
mod connections;
mod deaths;
mod failures;
mod fences;
pub mod frozen;
mod held;
mod hostile;
mod jobs;
mod keeper;
mod limits;
mod meetings;
mod memory;
mod operator;
mod poison;
mod probes;
mod resources;
mod rogue;
pub mod rollback;
mod serial;
mod service;
mod signed;
mod target;
mod time;
mod traffic;
mod update;

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::harness::{
    fences::Watch,
    lab::{self, Nic},
    logs, rig,
};

/// Updates in a row where a test wants many.
pub const MANY: u32 = 20;

/// One test: what it is called, the NICs it needs, what it does. It fails by returning an error or by panicking.
struct Case {
    name: &'static str,
    nics: &'static [Nic],
    /// Whether those must have a peer at the end of a wire.
    wired: bool,
    /// Uses the common guest; others end it first if they need its NIC.
    shares: bool,
    body: fn() -> Result<()>,
}

const fn plain(name: &'static str, body: fn() -> Result<()>) -> Case {
    Case { name, nics: &[], wired: false, shares: false, body }
}

const fn shared(name: &'static str, body: fn() -> Result<()>) -> Case {
    Case { name, nics: &[Nic::IgbA], wired: true, shares: true, body }
}

const fn with(nics: &'static [Nic], name: &'static str, body: fn() -> Result<()>) -> Case {
    Case { name, nics, wired: true, shares: false, body }
}

const fn unwired(nics: &'static [Nic], name: &'static str, body: fn() -> Result<()>) -> Case {
    Case { name, nics, wired: false, shares: false, body }
}

/// In the order they run; those that share a guest stand together.
const CASES: &[Case] = &[
    plain("boot_1cpu_512m", boot::one_cpu_512m),
    plain("boot_4cpu_5g", boot::four_cpus_5g),
    plain("boot_pvh_128m", boot::pvh_128m),
    plain("poweroff_from_guest", boot::poweroff_from_guest),
    plain("reboot_from_guest", boot::reboot_from_guest),
    plain("reset_in_place", boot::reset_in_place),
    plain("flood_of_resets", boot::flood_of_resets),
    plain("triple_fault_loop", boot::triple_fault_loop),
    plain("guest_that_cannot_go_on", boot::guest_that_cannot_go_on),
    plain("power_button", boot::power_button),
    plain("nmi_from_outside", boot::nmi_from_outside),
    plain("told_that_it_stood_still", probes::told_that_it_stood_still),
    plain("deadline_in_doubt", probes::deadline_in_doubt),
    plain("device_that_counts", probes::device_that_counts),
    plain("code_segment_that_kvm_refuses", probes::code_segment_that_kvm_refuses),
    plain("rogue_memory", rogue::memory_and_pci),
    plain("rogue_registers", rogue::registers),
    plain("rogue_interrupts", rogue::interrupts),
    plain("rogue_serial", rogue::serial),
    plain("rogue_ends", rogue::ends),
    plain("rogue_resets", rogue::resets),
    plain("rogue_power_off", rogue::power_off),
    plain("api_bad_input", api::bad_input),
    plain("api_bad_input_without_guest", api::bad_input_without_guest),
    plain("files_that_are_none", booting::files_that_are_none),
    plain("served_while_booting", booting::served_while_booting),
    plain("update_plain", update::plain),
    plain("update_paused", update::paused),
    plain("update_without_guest", update::without_guest),
    plain("confined_no_dumps", confined::no_dumps),
    plain("confined_by_ceiling", confined::by_ceiling),
    plain("confined_by_landlock", confined::by_landlock),
    plain("calls_that_are_stopped", fences::calls_that_are_stopped),
    plain("filters_in_force", fences::filters_in_force),
    plain("keeper_signals", keeper::signals),
    plain("keeper_settings", keeper::settings),
    plain("fatal_signals_unblocked", keeper::fatal_signals),
    plain("serial_modes", serial::modes),
    plain("serial_terminal_gone", serial::terminal_gone),
    plain("job_hang_up", jobs::hang_up),
    plain("job_in_background", jobs::background),
    plain("job_killed", jobs::killed),
    plain("limits_refuse_or_drop", limits::refuse_or_drop),
    plain("limits_signal_nothing", limits::signal_nothing),
    plain("limits_no_signal_queued", limits::no_signal_queued),
    plain("poison_signals", poison::signals),
    plain("poisoned_pages", poison::pages),
    plain("huge_pages_reserved", limits::huge_pages),
    plain("fault_by_option", deaths::fault_by_option),
    plain("ch_remote", operator::ch_remote),
    plain("target_rewritten", target::rewritten),
    plain("target_of_the_own_name", target::own_name),
    plain("target_signed", signed::builds),
    plain("meets_another_update", meetings::two_updates_at_once),
    plain("meets_boot", meetings::guest_boots),
    plain("meets_other_requests", meetings::other_requests),
    plain("meets_end_of_guest", meetings::guest_ends),
    plain("four_busy_vcpus", time::four_busy_vcpus),
    plain("idle_guest_wakes", time::idle_guest_wakes),
    plain("timer_over_update", time::timer_over_update),
    plain("power_management_timer", time::power_management_timer),
    plain("without_kvmclock", time::without_kvmclock),
    plain("affinity_kept", frozen::affinity_kept),
    plain("second_stage_is_there", memory::second_stage),
    shared("update_igb_traffic", traffic::igb),
    shared("clock_20_updates", time::clock_updates),
    shared("resources_flat_20_updates", resources::flat),
    shared("frozen_machine", frozen::machine),
    shared("idle_and_calling_connections", connections::kept),
    shared("client_hangs_up_during_update", connections::client_hangs_up),
    shared("dry_run", failures::dry_run),
    shared("preflight_lists_every_reason", failures::preflight),
    shared("fails_target_missing", failures::target_missing),
    shared("fails_not_executable", failures::not_executable),
    shared("fails_not_theseus", failures::not_theseus),
    shared("fails_wrong_sha256", failures::wrong_sha256),
    shared("fails_older_state_version", failures::older_state_version),
    shared("fails_downgrade", failures::downgrade),
    shared("fails_exec", failures::exec_fails),
    shared("fails_ahead", failures::ahead),
    shared("target_of_others", target::of_others),
    shared("fails_vcpu_thread", deaths::vcpu_panic),
    shared("fails_vcpu_filter", deaths::vcpu_filter),
    shared("fails_old_binary_deleted", failures::old_binary_deleted),
    shared("meets_its_deadline", meetings::deadline_race),
    shared("meets_stopped_at_the_word", meetings::stopped_at_the_word),
    shared("meets_short_deadlines", meetings::short_deadlines),
    shared("one_packet_while_invalidated_igb", held::igb),
    with(&[Nic::IgbA], "meets_driver_probe", meetings::driver_probes),
    with(&[Nic::IgbA], "refused_by_bounds", bounds::of_the_vmm),
    with(&[Nic::IgbA], "target_with_fewer_rights", target::with_fewer_rights),
    with(&[Nic::IgbA], "log_stands_still", bounds::log_stands_still),
    unwired(&[Nic::IgbA], "intx_stays_off", hostile::intx_stays_off),
    unwired(&[Nic::IgbA], "resets_without_end", hostile::resets_without_end),
    unwired(&[Nic::IgbA], "device_without_wire", operator::device_without_wire),
    unwired(&[Nic::IgbA], "devices_free_at_once", operator::devices_free_at_once),
    with(&[Nic::IgbA], "keeper_killed", keeper::killed),
    with(&[Nic::IgbA], "keeper_killed_in_update", keeper::killed_in_update),
    with(&[Nic::IgbA], "reset_with_nic", operator::reset_with_nic),
    unwired(&[Nic::IgbA], "eoi_flag_that_kvm_refuses", probes::eoi_flag_that_kvm_refuses),
    with(&[Nic::IgbA], "supervisor_is_told", operator::supervisor_is_told),
    with(&[Nic::IgbA], "dies_out_of_memory", deaths::out_of_memory),
    with(&[Nic::IgbA], "dies_committed", deaths::committed),
    with(&[Nic::IgbB], "one_packet_while_invalidated_igb_b", held::igb_b),
    with(&[Nic::E1000e], "one_packet_while_invalidated_e1000e", held::e1000e),
    with(&[Nic::IgbA, Nic::IgbB], "fails_second_container", failures::second_container),
    with(&[Nic::IgbA, Nic::E1000e], "rollback_some_cells", rollback::some_cells),
    with(&[Nic::IgbA], "huge_pages_with_nic", traffic::huge_pages),
    with(&[Nic::IgbA], "memory_behind_the_hole", traffic::memory_behind_the_hole),
];

/// Those that take long, or show that others can fail: in the soak, and where they are named.
const LONG: &[Case] = &[
    plain("boot_16cpu", boot::sixteen_cpus),
    shared("traffic_without_update", traffic::without_update),
    unwired(&[Nic::IgbA], "rogue_device", rogue::device),
    with(&[Nic::IgbA], "one_packet_red_without_irqfds", held::red_without_irqfds),
    with(&[Nic::IgbA, Nic::E1000e], "rollback_red_without_irqfds", rollback::red_without_irqfds),
    with(&[Nic::E1000e], "disk_and_nic_of_one_group", traffic::disk_and_nic),
    with(&Nic::ALL, "three_nics_two_containers", traffic::three_nics),
    with(&[Nic::IgbA], "reboot_with_nic", operator::reboot_with_nic),
    unwired(&[Nic::IgbA], "unit_of_systemd", service::unit_of_systemd),
    plain("rogue_ports", rogue::ports),
];

impl Case {
    /// The first thing that it needs and that is not there.
    fn lacks(&self) -> Option<String> {
        let missing = |nic: &&Nic| nic.bdf().is_err() || self.wired && nic.peer().is_err();
        self.nics.iter().find(missing).map(|nic| {
            let why = nic.bdf().and_then(|_| nic.peer()).err().map(|e| e.to_string()).unwrap_or_default();
            format!("no {nic:?}: {why}")
        })
    }

    fn run(&self) -> Result<(), Failed> {
        logs::begin(self.name);
        if !self.shares {
            rig::drop_shared();
        }
        let started = Instant::now();
        let fences = Watch::begin();
        let outcome = std::panic::catch_unwind(self.body).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(anyhow::anyhow!("panicked: {}", text.unwrap_or("?")))
        });
        let met = fences.met();
        let outcome =
            outcome.and_then(|()| check(met.is_empty(), || format!("stopped at a fence: {}", met.join("\n"))));
        match outcome {
            Ok(()) => {
                println!("     {}: {:.1} s", self.name, started.elapsed().as_secs_f64());
                Ok(())
            }
            Err(e) => {
                let text = format!("{e:#}\n{}", logs::tails());
                // At once as well as in the summary: a run that is killed later still tells.
                println!("FAILED {}: {text}", self.name);
                rig::drop_shared();
                Err(Failed::from(text))
            }
        }
    }
}

/// Says something that a passing test has measured.
pub fn note(text: std::fmt::Arguments<'_>) {
    println!("     {text}");
}

/// Runs the tests whose names contain one of `filters` (for none: every one). `rest` are options of the test harness.
///
/// Where other labs run the same tests (`LAB_CLAIMS`), each takes what nobody has taken yet.
pub fn run(filters: &[String], rest: &[String]) -> Result<ExitCode> {
    let named = |case: &Case| filters.iter().any(|f| case.name.contains(f.as_str()));
    let wanted = |case: &&Case| filters.is_empty() || named(case);
    let cases: Vec<&Case> = CASES.iter().filter(wanted).chain(LONG.iter().filter(|case| named(case))).collect();
    anyhow::ensure!(!cases.is_empty(), "no test is called like {filters:?}; see l1-tests test --list");
    let mut args = Arguments::from_iter(["l1-tests".to_string()].into_iter().chain(rest.iter().cloned()));
    // The tests share devices.
    args.test_threads = Some(1);
    let claims = lab::claims();
    let mut failed = false;
    // What shares a guest is taken as a whole.
    for cases in cases.chunk_by(|a, b| claims.is_none() || a.shares && b.shares) {
        let Some(claim) = Claim::take(claims.as_deref(), cases[0].name)? else { continue };
        let trial =
            |case: &&'static Case| Trial::test(case.name, || case.run()).with_ignored_flag(case.lacks().is_some());
        failed |= libtest_mimic::run(&args, cases.iter().map(trial).collect()).has_failed();
        rig::drop_shared();
        for (case, why) in cases.iter().filter_map(|case| Some((case, case.lacks()?))) {
            println!("skipped {}: {why}", case.name);
        }
        claim.ended()?;
    }
    Ok(if failed { ExitCode::from(101) } else { ExitCode::SUCCESS })
}

/// Runs all that take long.
pub fn long() -> Result<()> {
    let names: Vec<_> = LONG.iter().map(|case| case.name.to_owned()).collect();
    let code = run(&names, &[])?;
    anyhow::ensure!(code == ExitCode::SUCCESS, "see above");
    Ok(())
}

/// Tests that this lab has taken, and no other lab will: a folder that only one can make. It says whose it is, and when
/// they have ended.
struct Claim(Option<PathBuf>);

impl Claim {
    /// `None` if another lab has them. What this one had taken when it died is taken again.
    fn take(claims: Option<&Path>, name: &str) -> Result<Option<Self>> {
        let Some(claims) = claims else { return Ok(Some(Self(None))) };
        let (claim, own) = (claims.join(name), lab::number());
        match fs::create_dir(&claim) {
            Ok(()) => fs::write(claim.join("by"), &own)?,
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e).context(claim.display().to_string()),
            Err(_) if claim.join("ended").exists() => return Ok(None),
            Err(_) if fs::read_to_string(claim.join("by")).is_ok_and(|by| by == own) => {}
            Err(_) => return Ok(None),
        }
        Ok(Some(Self(Some(claim))))
    }

    fn ended(self) -> Result<()> {
        self.0.map_or(Ok(()), |claim| Ok(fs::write(claim.join("ended"), "")?))
    }
}

/// `condition`, or an error with that text; reads better than a negated `ensure!` around long conditions.
fn check(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    condition.then_some(()).with_context(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_shared_cases_stand_together() {
        let mut names: Vec<_> = CASES.iter().chain(LONG).map(|c| c.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CASES.len() + LONG.len());
        let changes = CASES.windows(2).filter(|w| w[0].shares != w[1].shares).count();
        assert!(changes <= 2);
    }
}
