//! An interrupt that comes only while the vCPUs are stopped is delivered, and DMA goes on meanwhile.
//!
//! The update is held with the vaddrs invalidated, one packet is sent, then there is silence. Its payload must be in
//! the guest's memfd while held, and the guest must report it soon after it runs again.
//!
//! Two things would forgive a lost interrupt: another packet (there is none) and the driver, whose watchdog fires all
//! its vectors every 2 s. So the guest's kernel notes when it handles the vector and when the watchdog runs: an
//! interrupt that was handled after the guest ran again and before the watchdog did is the packet's own, however long
//! everything took. Where the watchdog was first, it may have brought the packet to light, or have been quicker than an
//! interrupt that was due: an attempt in which it was sure to be the later of the two means a loss, any other says
//! nothing and is repeated. The update is therefore started right after such a tick.

use std::{
    net::{SocketAddr, UdpSocket},
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cases::note,
    clock::sample,
    harness::{
        PATIENCE,
        agent::Agent,
        clock,
        hooks::{self, Hold, Switch},
        lab::Nic,
        ram::{GuestRam, STEP},
        report::Report,
        rig::{self, Rig},
        traffic,
        vm::Vm,
        wait_for,
        wire::Wire,
    },
    proto::{Arrival, Request, Traced, Vector},
};

/// A guest that runs handles an interrupt that waits within this.
const PROMPT: Duration = Duration::from_millis(200);
/// From one tick of the driver to the next, less what the measurement of a tick is worth.
const TICK: Duration = Duration::from_millis(1800);
/// How long a guest without a packet is watched: several ticks of the driver must have passed it by.
const SILENCE: Duration = Duration::from_secs(15);
/// How long the packet may take to be in guest memory while the guest stands still. A search of all of it takes a
/// second on a slow machine.
const DMA: Duration = Duration::from_secs(60);
/// Of an update that is held so long.
pub(super) const HELD_DEADLINE_MS: u64 = 120_000;
const ATTEMPTS: usize = 12;
/// How many interrupts may be none of a tick, one after the other.
const TICKS: usize = 5;
const PORT: u16 = 9900;
const SOURCES: u8 = 24;
/// Packets by which a source's vector is found.
const PROBES: usize = 3;

pub(super) fn igb() -> Result<()> {
    rig::shared(|rig| every_vector(rig, 2))
}

/// The second of two alike, by itself.
pub(super) fn igb_b() -> Result<()> {
    every_vector(&mut Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbB, None)])?, 2)
}

pub(super) fn e1000e() -> Result<()> {
    // Its driver has one receive vector, however many CPUs.
    every_vector(&mut Rig::boot(Vm::builder().cpus(2), &[(Nic::E1000e, None)])?, 1)
}

/// With no irqfd attached to the device's eventfds by the new image, the very same check must fail.
pub(super) fn red_without_irqfds() -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?;
    ensure!(
        rig.vm.ping()?.features.iter().any(|f| f == hooks::FEATURE),
        "the VMM under test has no test hooks: {:?}",
        rig.vm.ping()?
    );
    let ram = GuestRam::of(rig.vm.vmm()?)?;
    let (vector, source) = sources(rig.agent()?, &rig.wires[0])?.into_iter().next().context("no vector")?;
    let _hook = Switch::on(&rig.vm.dir, "skip-irqfds")?;
    let seen = attempts(|| {
        let request = request(&rig)?;
        attempt(&mut rig, &ram, &vector, source, "invalidate", &request, "updated")
    })?;
    // The guest itself is well: it answers, only the packet's interrupt is missing.
    rig.agent()?.ping()?;
    ensure!(seen.verdict() == Verdict::Lost, "{seen:?} though nothing could deliver it");
    Ok(())
}

fn request(rig: &Rig) -> Result<String> {
    Ok(serde_json::json!({ "binary": rig.vm.other_build()?, "deadline_ms": HELD_DEADLINE_MS }).to_string())
}

fn every_vector(rig: &mut Rig, expected: usize) -> Result<()> {
    let ram = GuestRam::of(rig.vm.vmm()?)?;
    let vectors = sources(rig.agent()?, &rig.wires[0])?;
    if vectors.len() < expected {
        let why = traffic::why(rig.agent()?, &[&rig.wires[0]]);
        bail!("{expected} receive vectors expected, packets of {SOURCES} sources reach only {vectors:?}\n{why}");
    }
    for (vector, source) in vectors {
        let seen = attempts(|| {
            let request = request(rig)?;
            attempt(rig, &ram, &vector, source, "invalidate", &request, "updated")
        })?;
        ensure!(seen.verdict() == Verdict::Delivered, "{vector}: the packet's interrupt was lost: {seen:?}");
        note(format_args!("{vector}: in memory after {:?}, reported {:?} after resume", seen.dma_after, seen.reported));
    }
    Ok(())
}

/// For each receive vector of the wire's NIC, the number of a source address whose packets raise it.
pub(super) fn sources(agent: &Agent, wire: &Wire) -> Result<Vec<(String, u8)>> {
    wire.add_peer_ips(SOURCES)?;
    let mut found: Vec<(String, u8)> = Vec::new();
    let counts = |agent: &Agent| -> Result<Vec<Vector>> {
        Ok(agent.interrupts(&wire.guest)?.into_iter().filter(|v| v.name.to_lowercase().contains("rx")).collect())
    };
    let all = counts(agent)?.len();
    ensure!(all > 0, "no receive vector of {} in the guest's /proc/interrupts", wire.guest);
    for source in 0..=SOURCES {
        let raised = (0..PROBES).map(|_| raised_by(agent, wire, source, counts)).collect::<Result<Vec<_>>>()?;
        // The driver's own tick raises all of them, but not each time.
        let always = |name: &String| raised.iter().all(|names| names.contains(name));
        let vector = raised[0].iter().find(|name| always(name));
        if let Some(name) = vector
            && !found.iter().any(|(known, _)| known == name)
        {
            found.push((name.clone(), source));
        }
        if found.len() == all {
            break;
        }
    }
    Ok(found)
}

/// The vectors that a packet of `source` raises: one packet at a time, or a guest that is slow takes several with one
/// interrupt. The packet has to arrive, as the driver's tick raises vectors too where no packet ever comes.
fn raised_by(
    agent: &Agent,
    wire: &Wire,
    source: u8,
    counts: impl Fn(&Agent) -> Result<Vec<Vector>>,
) -> Result<Vec<String>> {
    let before = counts(agent)?;
    agent.call::<()>(&Request::WatchOpen { port: PORT })?;
    let arrival = agent.start::<Arrival>(&Request::WatchWait { port: PORT })?;
    send(wire, source, 0x1234)?;
    if let Err(error) = arrival.wait(PATIENCE) {
        bail!("a packet of source {source} does not arrive: {error:#}\n{}", traffic::why(agent, &[wire]));
    }
    wait_for("an interrupt of a packet", || {
        let now = counts(agent)?.into_iter().zip(&before);
        let raised: Vec<_> = now.filter(|(now, then)| now.count > then.count).map(|(now, _)| now.name).collect();
        Ok((!raised.is_empty()).then_some(raised))
    })
}

/// 1200 bytes of `token` from L1's address number `source`.
pub(super) fn send(wire: &Wire, source: u8, token: u16) -> Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(wire.peer_ip(source).into(), 0))?;
    let payload: Vec<u8> = token.to_ne_bytes().repeat(600);
    assert!(payload.len() >= 2 * STEP);
    socket.send_to(&payload, (wire.guest_ip(), PORT)).context("sending the packet")?;
    Ok(())
}

/// What became of one packet, sent while the guest is stopped for an update that is rolled back. `request` is the body
/// of vm.update; the fault is armed already, and comes at the end of phase `held_at` or later.
pub(super) fn reported_after_roll_back(
    rig: &mut Rig,
    ram: &GuestRam,
    (vector, source): &(String, u8),
    request: &str,
    held_at: &str,
) -> Result<Verdict> {
    let seen = attempts(|| attempt(rig, ram, vector, *source, held_at, request, "rolled_back"))?;
    note(format_args!("{vector}: {:?}: {seen:?}", seen.verdict()));
    Ok(seen.verdict())
}

/// What a packet shows that was sent to a guest that stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its own interrupt came.
    Delivered,
    Lost,
    /// Each time the driver's watchdog was first.
    Unclear,
}

/// What an attempt showed.
#[derive(Debug)]
struct Seen {
    /// From sending to finding, search included.
    dma_after: Duration,
    /// From the moment the guest runs again to that in which it has the packet; `None`: not for long.
    reported: Option<Duration>,
    /// Its interrupt was handled before the driver's watchdog ran.
    by_itself: bool,
    /// From the driver's tick to the answer.
    took: Duration,
}

impl Seen {
    fn verdict(&self) -> Verdict {
        match self.reported {
            None => Verdict::Lost,
            Some(_) if self.by_itself => Verdict::Delivered,
            // The next tick was to come when the guest had run for long already, and that is when the packet came to
            // light. Sooner, and the tick before was none: another packet had raised the vector.
            Some(reported) if reported > PROMPT && self.took + PROMPT < TICK => Verdict::Lost,
            Some(_) => Verdict::Unclear,
        }
    }
}

/// Attempts until one says something.
fn attempts(mut attempt: impl FnMut() -> Result<Seen>) -> Result<Seen> {
    for _ in 1..ATTEMPTS {
        let seen = attempt()?;
        if seen.verdict() != Verdict::Unclear {
            return Ok(seen);
        }
        note(format_args!("once more, as this says nothing: {seen:?}"));
    }
    attempt()
}

fn attempt(
    rig: &mut Rig,
    ram: &GuestRam,
    vector: &str,
    source: u8,
    held_at: &str,
    request: &str,
    expected: &str,
) -> Result<Seen> {
    let wire = rig.wires[0].clone();
    let token = fresh_token(ram)?;
    let agent = rig.vm.agent()?;
    agent.call::<()>(&Request::WatchOpen { port: PORT })?;
    let report = agent.start::<Arrival>(&Request::WatchWait { port: PORT })?;
    let mut hold = Hold::arm(&rig.vm.dir, held_at)?;
    let mut caller = rig.vm.api.connect()?;

    await_tick(agent, vector)?;
    let tick = Instant::now();
    agent.call::<()>(&Request::TraceStart { vector: vector.into() })?;
    caller.send("PUT", "vm.update", request)?;
    hold.wait_held()?;
    // All on L1's TSC axis, so that the way of the news over the serial line does not count.
    let (sent, sent_tsc) = (Instant::now(), sample(1).tsc as i64);
    send(&wire, source, token)?;
    let mut dma = false;
    while !dma && sent.elapsed() < DMA {
        dma = ram.find_filler(token).is_some();
    }
    let dma_after = sent.elapsed();
    let released = sample(1).tsc;
    hold.release()?;
    let answer = caller.receive()?;
    let (took, answered) = (tick.elapsed(), sample(1).tsc);
    ensure!(answer.status == 200, "{answer:?}");
    let outcome: Report = answer.json()?;
    ensure!(outcome.outcome == expected, "{outcome:?}");
    ensure!(dma, "{vector}: the packet was not found in guest memory while the update was held");
    let late = report.wait(SILENCE).ok().map(|(arrival, _)| arrival);
    if expected == "updated" {
        rig.vm.note_update();
    }
    rig.vm.follow(outcome.pid)?;
    let Some(arrival) = late else {
        return Ok(Seen { dma_after, reported: None, by_itself: false, took });
    };
    ensure!(arrival.head.chunks(2).all(|pair| pair == token.to_ne_bytes()), "another packet came: {arrival:?}");
    let offset = *clock::tsc_offsets(&rig.vm)?.first().context("no vCPU")?;
    let ns_per_tick = ns_per_tick();
    let at = (arrival.tsc as i64).wrapping_sub(offset);
    // A fault leaves its phase without an end, so that the hold counts as part of the next: then the answer is the
    // better mark.
    let after_hold: u64 = outcome.phases.iter().skip_while(|phase| phase.name != held_at).skip(1).map(|p| p.us).sum();
    let resumed = (released as i64 + (after_hold as f64 * 1e3 / ns_per_tick) as i64).min(answered as i64);
    let reported = Duration::from_nanos(((at - resumed).max(0) as f64 * ns_per_tick) as u64);
    // The guest stood still when the packet was sent: what it has noted since was after it ran again.
    let mut traced: Vec<Traced> = rig.agent()?.call(&Request::TraceRead)?;
    let stood_still = arrival.mono_ns as i64 - ((at - sent_tsc) as f64 * ns_per_tick) as i64;
    traced.retain(|event| event.at_ns as i64 > stood_still);
    traced.sort_by_key(|event| event.at_ns);
    let by_itself = traced.first().is_some_and(|event| event.is_interrupt);
    Ok(Seen { dma_after, reported: Some(reported), by_itself, took })
}

/// Waits for an interrupt of `vector` that the driver's watchdog has raised, and no other packet. A driver without
/// ticks forgives nothing.
fn await_tick(agent: &Agent, vector: &str) -> Result<()> {
    for _ in 0..TICKS {
        agent.call::<()>(&Request::TraceStart { vector: vector.into() })?;
        let wait = Request::InterruptsWait { name: vector.into(), timeout_ms: 10_000 };
        if agent.call::<Vec<Vector>>(&wait).is_err() {
            break;
        }
        let traced: Vec<Traced> = agent.call(&Request::TraceRead)?;
        if traced.iter().any(|event| !event.is_interrupt) {
            break;
        }
    }
    Ok(())
}

/// Length of a TSC tick of L1.
fn ns_per_tick() -> f64 {
    let from = sample(50);
    sleep(Duration::from_millis(50));
    let to = sample(50);
    (to.raw_ns - from.raw_ns) as f64 / (to.tsc - from.tsc).max(1) as f64
}

/// A filler that is nowhere in guest memory yet.
fn fresh_token(ram: &GuestRam) -> Result<u16> {
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.subsec_nanos();
    (0..100_u32)
        .map(|i| (seed.wrapping_add(i.wrapping_mul(7919)) % 0xd000) as u16 + 0x1001)
        .find(|&token| token.to_ne_bytes()[0] != token.to_ne_bytes()[1] && ram.find_filler(token).is_none())
        .context("every filler is in guest memory already")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_attempt_shows() {
        let seen = |reported: Option<u64>, by_itself, took| Seen {
            dma_after: Duration::ZERO,
            reported: reported.map(Duration::from_millis),
            by_itself,
            took: Duration::from_millis(took),
        };
        for (seen, verdict) in [
            (seen(Some(20), true, 500), Verdict::Delivered),
            (seen(Some(1400), true, 500), Verdict::Delivered),
            (seen(None, false, 500), Verdict::Lost),
            (seen(Some(1400), false, 500), Verdict::Lost),
            // A watchdog at once, though it had just run: it had not.
            (seen(Some(6), false, 554), Verdict::Unclear),
            (seen(Some(300), false, 1700), Verdict::Unclear),
        ] {
            assert_eq!(seen.verdict(), verdict, "{seen:?}");
        }
    }
}
