//! `l1-tests bench native fences`: what all that confines a VMM costs, on this machine's own KVM: in updates, on ways
//! back, and at each exit of a vCPU. A VMM with all of it and one with nothing, in turns; the other's guest stands
//! still.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use minisign::KeyPair;

use super::{
    guest,
    steps::{self, Memory, read_port, write_msr},
};
use crate::harness::{
    fences,
    report::Report,
    signing,
    table::{Table, ms, percentile},
    vm::{Setting, Vm},
};

const TURNS: usize = 10;
/// Of each turn.
const UPDATES: usize = 10;
/// The ways back of each turn, after its updates: a VMM that says why, and one that is gone.
const BACK: [&str; 2] = ["vcpus:error", "remap:kill"];
const RAM: u64 = 128 << 20;
/// Over which exits are counted.
const WINDOW: Duration = Duration::from_millis(300);
/// So often is a step done that what else the guest does is none of its time.
const MANY: u64 = 1 << 20;
/// Where nothing is.
const PORT: u16 = 0x80;
/// Taken by KVM, without an exit to the VMM.
const IA32_PAT: u32 = 0x277;

pub(super) fn run() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("fences-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let dir = dir.canonicalize()?;
    let outcome = Signed::new(&dir).and_then(|signed| {
        [1, 16].into_iter().try_for_each(|cpus| updates(&dir, &signed, cpus))?;
        exits(&dir, &signed)
    });
    fs::remove_dir_all(dir)?;
    outcome
}

/// Two builds in a folder of their own, and the key of their signatures.
struct Signed {
    folder: String,
    key: String,
    a: PathBuf,
    b: PathBuf,
}

impl Signed {
    fn new(dir: &Path) -> Result<Self> {
        let folder = dir.join("builds");
        fs::create_dir_all(&folder)?;
        let key = KeyPair::generate_unencrypted_keypair()?;
        let (a, b) = (signing::build(&folder, "a", &key)?, signing::build(&folder, "b", &key)?);
        Ok(Self { folder: folder.display().to_string(), key: signing::public(&dir.join("key.pub"), &key)?, a, b })
    }
}

struct Side {
    name: &'static str,
    vm: Vm,
    builds: [PathBuf; 2],
    /// Which of them is next.
    next: usize,
    reports: Vec<Report>,
    back: Vec<Report>,
    held: Option<Held>,
}

/// What holds a VMM: its threads' filters and Landlock's layers.
type Held = (BTreeMap<String, u32>, String);

impl Side {
    fn pair(signed: &Signed, kernel: &Path, cpus: u32) -> Result<[Self; 2]> {
        let Signed { folder, key, a, b } = signed;
        let common = ["--kernel", &kernel.display().to_string(), "--memory", &format!("size={}M", RAM >> 20), "--cpus"]
            .map(str::to_owned);
        let start = |name, more: &[&str], confined| -> Result<Self> {
            let args = common.iter().cloned().chain([format!("boot={cpus}")]);
            let args: Vec<_> = args.chain(more.iter().map(|arg| (*arg).to_owned())).collect();
            let setting = Setting { confined, ..Setting::default() };
            let vm = Vm::spawn(&a.display().to_string(), &args, &setting)?.booted()?;
            vm.api.order("vm.pause")?;
            Ok(Self {
                name,
                vm,
                builds: [b.clone(), a.clone()],
                next: 0,
                reports: Vec::new(),
                back: Vec::new(),
                held: None,
            })
        };
        let everything = ["--seccomp", "true", "--ceiling", "--update-key", key, "--update-dir", folder];
        Ok([start("nothing", &["--seccomp", "false"], false)?, start("everything", &everything, true)?])
    }

    /// The same as after the first turn.
    fn is_held_as_before(&mut self) -> Result<()> {
        self.vm.settled_facts()?;
        let layers = fences::probed(&self.vm, &self.builds[self.next], &["layers".into()])?.join(" ");
        let mut filters = fences::filters(self.vm.vmm()?)?;
        // The thread of the update itself ends after its answer.
        filters.remove("update");
        let now = (filters, layers);
        let before = self.held.get_or_insert_with(|| now.clone());
        ensure!(*before == now, "{}: {before:?} -> {now:?}", self.name);
        Ok(())
    }

    fn turn(&mut self) -> Result<()> {
        self.vm.api.order("vm.resume")?;
        for _ in 0..UPDATES {
            // The tear-down of the last old image is not part of the next pause.
            self.vm.settled_facts()?;
            self.reports.push(self.vm.update_to(&self.builds[self.next])?);
            self.next = 1 - self.next;
        }
        for fault in BACK {
            self.vm.settled_facts()?;
            self.back.push(self.vm.roll_back(fault, &self.builds[self.next])?);
        }
        self.is_held_as_before()?;
        self.vm.api.order("vm.pause")
    }
}

fn updates(dir: &Path, signed: &Signed, cpus: u32) -> Result<()> {
    let kernel = dir.join("writer");
    guest::write(&kernel, RAM)?;
    let mut sides = Side::pair(signed, &kernel, cpus)?;
    for turn in 0..TURNS {
        // Each is the first as often as the second.
        let order = if turn % 2 == 0 { [0, 1] } else { [1, 0] };
        order.into_iter().try_for_each(|side| sides[side].turn().with_context(|| sides[side].name))?;
    }
    println!("### What confines a VMM, and its updates: {cpus} vCPU, {} MiB, no device\n", RAM >> 20);
    let mut table = Table::new(["ms", "confined by", "p50", "p99", "max", "n"]);
    let phase = |reports: &[Report], name: &str| -> Vec<u64> {
        reports.iter().flat_map(|report| &report.phases).filter(|phase| phase.name == name).map(|p| p.us).collect()
    };
    let mut row = |what: &str, of: &dyn Fn(&Side) -> Vec<u64>| {
        for side in &sides {
            let values = of(side);
            let at = |percent| ms(percentile(&values, percent));
            table.row([what.into(), side.name.into(), at(50), at(99), at(100), values.len().to_string()]);
        }
    };
    let pauses = |reports: &[Report]| reports.iter().map(|report| report.pause_us).collect::<Vec<_>>();
    row("**pause**", &|side| pauses(&side.reports));
    row("pause of a way back", &|side| pauses(&side.back));
    for name in ["prepare", "exec", "prewarm"] {
        row(name, &|side| phase(&side.reports, name));
    }
    println!("{table}");
    for side in &sides {
        let (filters, layers) = side.held.as_ref().context("no turn")?;
        let most = filters.values().max().copied().unwrap_or(0);
        println!(
            "{}: {most} filters at most of {} threads, {layers} layers, after each turn.",
            side.name,
            filters.len()
        );
    }
    println!();
    Ok(())
}

/// Exits of one kind and no other, by reads of a port where nothing is; and beside them what KVM does by itself.
fn exits(dir: &Path, signed: &Signed) -> Result<()> {
    let mut table = Table::new(["ns", "confined by", "p50", "min", "max", "n"]);
    let kernel = dir.join("steps");
    for (what, step) in [("an exit to the VMM", read_port(PORT, 1)), ("one to KVM alone", write_msr(IA32_PAT, 0x606))] {
        guest::write_image(&kernel, &steps::guest(&[vec![step.times(MANY)]]))?;
        let sides = Side::pair(signed, &kernel, 1)?;
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..TURNS {
            for (side, times) in sides.iter().zip(&mut times) {
                let memory = Memory::of(side.vm.vmm()?)?;
                side.vm.api.order("vm.resume")?;
                let (started, before) = (Instant::now(), memory.progress(0)?.steps);
                sleep(WINDOW);
                let (took, now) = (started.elapsed(), memory.progress(0)?.steps);
                side.vm.api.order("vm.pause")?;
                times.push(took.as_nanos() as u64 / (now - before).max(1));
            }
        }
        for (side, times) in sides.iter().zip(&times) {
            let at = |percent| percentile(times, percent).to_string();
            let least = times.iter().min().copied().unwrap_or(0).to_string();
            table.row([what.into(), side.name.into(), at(50), least, at(100), times.len().to_string()]);
        }
    }
    println!("### What confines a VMM, and exits\n\n{table}");
    Ok(())
}
