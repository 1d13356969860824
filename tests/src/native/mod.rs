//! `l1-tests bench native`: the pause against the size of the guest's memory, and against its vCPUs ([`vcpus`]), on
//! this machine's own KVM.
//!
//! The guest is [`guest`], which keeps all of its memory populated; there is no VFIO device.

mod fences;
pub mod guest;
pub mod probes;
pub mod rogues;
pub mod steps;
mod vcpus;

use std::{
    fs::{self, File, OpenOptions},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::harness::{
    logs,
    placement::Placement,
    proc,
    table::{Table, ms, percentile},
    vm::Vm,
    wait_for,
};

const UPDATES: usize = 10;
const SMALL: u64 = 512 << 20;
const LARGE: u64 = 8 << 30;
const HUGE: usize = 2 << 20;
/// Over which the guest's speed is taken, µs.
const WINDOW_US: u64 = 20_000;
/// How long its speed before an update is taken.
const SAMPLED: Duration = Duration::from_secs(1);
/// How long the guest may take to be back at its speed.
const BACK: Duration = Duration::from_secs(60);
const BACK_PERCENT: u64 = 95;
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

pub fn run() -> Result<()> {
    logs::begin("bench-native");
    pinned()?;
    vcpus::run()?;
    let mut table = Table::new(["pause, ms", "memory", "p50", "p99", "max", "n", "back at 95 %, p50", "max"]);
    let mut medians = Vec::new();
    let mut huge_pages = None;
    for (name, options) in [("4 KiB pages", ""), ("2 MiB pages", ",hugepages=on")] {
        if !options.is_empty() {
            // Not before: two guests of 8 GiB may be more than this machine has.
            match HugePages::reserve((LARGE >> 21) + 64) {
                Ok(reserved) => huge_pages = Some(reserved),
                Err(e) => {
                    println!("No figures for {name}: {e:#}\n");
                    continue;
                }
            }
        }
        for size in [SMALL, LARGE] {
            let (pauses, backs) = measure(size, options).with_context(|| format!("{name}, {size} bytes"))?;
            let back_max = if backs.len() < pauses.len() {
                format!("not in {} s", BACK.as_secs())
            } else {
                ms(percentile(&backs, 100))
            };
            table.row([
                name.to_string(),
                format!("{} MiB", size >> 20),
                ms(percentile(&pauses, 50)),
                ms(percentile(&pauses, 99)),
                ms(percentile(&pauses, 100)),
                pauses.len().to_string(),
                ms(percentile(&backs, 50)),
                back_max,
            ]);
            println!("{name}, {} MiB: pauses {pauses:?} us, back at speed after {backs:?} us", size >> 20);
            medians.push((name, percentile(&pauses, 50)));
        }
    }
    drop(huge_pages);
    println!("### Pause against memory, natively: 1 vCPU that writes all of its memory, no device\n\n{table}");
    for pair in medians.chunks_exact(2) {
        let ratio = pair[1].1 as f64 / pair[0].1 as f64;
        println!("{}: 8 GiB take {ratio:.2} times the pause of 512 MiB", pair[0].0);
    }
    Ok(())
}

pub fn run_fences() -> Result<()> {
    logs::begin("bench-native");
    fences::run()
}

/// Its first table alone.
pub fn run_vcpus() -> Result<()> {
    logs::begin("bench-native");
    vcpus::run()
}

/// A vCPU pinned to one of several CPUs stays there, which the lab's L1 with its one CPU cannot show.
fn pinned() -> Result<()> {
    let mut vm = bare(SMALL, 1, "", true)?;
    let thread = |vm: &Vm| proc::thread_named(vm.vmm()?, "vcpu0");
    let before = Placement::of(thread(&vm)?)?;
    let Some(last) = before.cpus.last().filter(|_| before.cpus.len() > 1) else {
        println!("Not tried, for want of a second CPU: a vCPU that is pinned to one.\n");
        return Ok(());
    };
    let mut wanted = before.clone();
    wanted.cpus = vec![*last];
    wanted.put(thread(&vm)?)?;
    for _ in 0..4 {
        vm.update()?;
        let (now, main) = (Placement::of(thread(&vm)?)?, Placement::of(vm.pid() as i32)?);
        ensure!(now == wanted && main == before, "vcpu0: {wanted:?} -> {now:?}; main: {before:?} -> {main:?}");
    }
    println!(
        "A vCPU pinned to CPU {last} of {} was there after each of 4 updates, and nothing else was.\n",
        before.cpus.len()
    );
    Ok(())
}

/// [`guest`] with `size` bytes, and further `options` of `--memory`. `hooks`: whether the VMM looks for test hooks,
/// which one that users have does not.
pub fn bare(size: u64, cpus: u32, options: &str, hooks: bool) -> Result<Vm> {
    let kernel = std::env::temp_dir().join(format!("guest-{}", std::process::id()));
    guest::write(&kernel, size)?;
    let vm = Vm::bare(&kernel, cpus, &format!("size={}M{options}", size >> 20), hooks)?;
    let _ = fs::remove_file(&kernel);
    Ok(vm)
}

/// The pauses, and how long after each the guest was at [`BACK_PERCENT`] of its speed again, µs.
fn measure(size: u64, options: &str) -> Result<(Vec<u64>, Vec<u64>)> {
    let mut vm = bare(size, 1, options, true)?;
    let counter = Counter::of(vm.vmm()?)?;
    wait_for("the guest to write all of its memory", || {
        ensure!(vm.is_running(), "the VMM has ended");
        Ok((counter.get() > 2 * guest::pages(size)).then_some(()))
    })?;
    vm.update()?;
    let (mut pauses, mut backs) = (Vec::new(), Vec::new());
    for _ in 0..UPDATES {
        vm.settled_facts()?;
        // One round over the memory since the last update, so that all tables are there: only then is it at its speed.
        let round = counter.get() + guest::pages(size);
        wait_for("the guest to write all of its memory", || Ok((counter.get() > round).then_some(())))?;
        let sampler = Sampler::start(counter.clone());
        sleep(SAMPLED);
        let asked = sampler.now();
        let report = vm.update()?;
        let answered = sampler.now();
        ensure!(report.phases.iter().any(|phase| phase.name == "exec"), "the phases do not name the exec: {report:?}");
        let back = sampler.back(asked, answered)?;
        pauses.push(report.pause_us);
        backs.extend(back);
    }
    // The old VMM holds the guest's memory too.
    vm.settled_facts()?;
    Ok((pauses, backs))
}

/// The guest's count, in its own memory.
#[derive(Clone)]
pub struct Counter(Arc<Mapping>);

struct Mapping(*const AtomicU64);

impl Drop for Mapping {
    // Or the guest's memory would stay for as long as the benchmark runs.
    fn drop(&mut self) {
        let page = self.0 as usize - guest::COUNTER as usize % HUGE;
        // SAFETY: the whole of what Counter::map mapped; nobody else refers to it.
        unsafe { libc::munmap(page as *mut libc::c_void, HUGE) };
    }
}

// SAFETY: a shared mapping that is only read atomically.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Counter {
    pub fn of(pid: u32) -> Result<Self> {
        let fds = proc::fds_to(pid, "/memfd:guest-ram")?;
        let fd = fds.first().context("the VMM has no memfd called guest-ram")?;
        let file = OpenOptions::new().read(true).open(format!("/proc/{pid}/fd/{fd}"))?;
        Self::map(&file)
    }

    /// A whole huge page, as hugetlbfs maps nothing less.
    fn map(file: &File) -> Result<Self> {
        let (page, offset) = (guest::COUNTER / HUGE as u64 * HUGE as u64, guest::COUNTER % HUGE as u64);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                HUGE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                page as libc::off_t,
            )
        };
        ensure!(address != libc::MAP_FAILED, "mapping the guest's counter: {}", std::io::Error::last_os_error());
        // SAFETY: inside the mapping.
        Ok(Self(Arc::new(Mapping(unsafe { address.cast::<u8>().add(offset as usize) }.cast()))))
    }

    pub fn get(&self) -> u64 {
        // SAFETY: mapped until the last clone is dropped, aligned.
        unsafe { &*self.0.0 }.load(Ordering::Relaxed)
    }

    /// The number behind it, of a [`probes`] guest.
    pub fn second(&self) -> u64 {
        // SAFETY: as above; both are in one page.
        unsafe { &*self.0.0.add(1) }.load(Ordering::Relaxed)
    }
}

/// Samples the guest's count every millisecond, on a thread of its own.
struct Sampler {
    started: Instant,
    stop: Arc<AtomicBool>,
    samples: Arc<parking_lot::Mutex<Vec<(u64, u64)>>>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    fn start(counter: Counter) -> Self {
        let started = Instant::now();
        let stop = Arc::new(AtomicBool::new(false));
        let samples = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let thread = std::thread::spawn({
            let (stop, samples) = (stop.clone(), samples.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let sample = (started.elapsed().as_micros() as u64, counter.get());
                    samples.lock().push(sample);
                    sleep(Duration::from_millis(1));
                }
            }
        });
        Self { started, stop, samples, thread: Some(thread) }
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn samples(&self) -> Vec<(u64, u64)> {
        self.samples.lock().clone()
    }

    /// How long after the answer to an update the guest was back at its speed from before it was asked for, µs; None if
    /// not within [`BACK`].
    fn back(&self, asked: u64, answered: u64) -> Result<Option<u64>> {
        let deadline = self.now() + BACK.as_micros() as u64;
        loop {
            let samples = self.samples();
            if let Some(back) = recovery(&samples, asked, answered) {
                return Ok(Some(back));
            }
            if self.now() > deadline {
                return Ok(None);
            }
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// From `answered` to the first window at [`BACK_PERCENT`] of the speed before `asked`, µs. `samples`: (µs, count). A
/// pause is shorter than the time from a sample to the next; the answer comes right after it.
fn recovery(samples: &[(u64, u64)], asked: u64, answered: u64) -> Option<u64> {
    let before: Vec<_> = samples.iter().filter(|(at, _)| *at < asked).collect();
    let (first, last) = (before.first()?, before.last()?);
    let speed = (last.1 - first.1) as f64 / (last.0 - first.0) as f64;
    let after = samples.iter().position(|(at, _)| *at >= answered)?;
    (after..samples.len()).find_map(|n| {
        let end = samples[n..].iter().find(|(at, _)| *at >= samples[n].0 + WINDOW_US)?;
        let now = (end.1 - samples[n].1) as f64 / (end.0 - samples[n].0) as f64;
        (now * 100.0 >= speed * BACK_PERCENT as f64).then(|| samples[n].0 - answered)
    })
}

/// Huge pages of the pool, so many more than before, given back afterwards.
pub struct HugePages(String);

impl HugePages {
    pub fn reserve(count: u64) -> Result<Self> {
        let before = fs::read_to_string(HUGE_PAGES).context(HUGE_PAGES)?;
        fs::write("/proc/sys/vm/compact_memory", "1").context("/proc/sys/vm/compact_memory")?;
        let wanted = before.trim().parse::<u64>()? + count;
        fs::write(HUGE_PAGES, wanted.to_string()).context(HUGE_PAGES)?;
        let this = Self(before);
        let got = fs::read_to_string(HUGE_PAGES)?;
        ensure!(got.trim() == wanted.to_string(), "{HUGE_PAGES}: {wanted} wanted, {} there", got.trim());
        Ok(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recovery_counts_from_the_answer() {
        // 10 pages a ms; stands still from 100 to 150 ms; half the speed until 200 ms, then the old one.
        let count = |ms: u64| match ms {
            0..100 => ms * 10,
            100..150 => 1000,
            150..200 => 1000 + (ms - 150) * 5,
            _ => 1250 + (ms - 200) * 10,
        };
        let samples: Vec<_> = (0..400).map(|ms| (ms * 1000, count(ms))).collect();
        let back = recovery(&samples, 90_000, 150_000).unwrap();
        assert!((45_000..=52_000).contains(&back), "{back}");
        assert_eq!(recovery(&samples[..180], 90_000, 150_000), None, "not back yet");
        assert_eq!(recovery(&samples, 50_000, 60_000), Some(0), "it never was slower");
    }
}
