//! An interrupt that comes only while the vCPUs are stopped is delivered, and DMA goes on meanwhile.
//!
//! The update is held with the vaddrs invalidated, one packet is sent, then there is silence. Its payload must be in the guest's memfd
//! while held, and the guest must report it soon after it runs again.
//!
//! Two things would forgive a lost interrupt: another packet (there is none) and the driver, which fires all its vectors every 2 s. The update
//! is therefore started right after such a tick and must be over well before the next; an attempt that takes longer says nothing and is
//! repeated.

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
        agent::Agent,
        clock,
        hooks::{self, Hold, Switch},
        lab::Nic,
        ram::{GuestRam, STEP},
        report::{Report, update_body},
        rig::{self, Rig},
        vm::Vm,
        wait_for,
        wire::Wire,
    },
    proto::{Arrival, Request, Vector},
};

/// The guest must have the packet so long after it runs again.
const PROMPT: Duration = Duration::from_millis(200);
/// From one tick of the driver to the next, less what the measurement of a tick is worth.
const TICK: Duration = Duration::from_millis(1800);
/// How long the news of it may take.
const PATIENCE: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 8;
const SLOW_TRIES: usize = 3;
const PORT: u16 = 9900;
const SOURCES: u8 = 24;
/// Packets by which a source's vector is found.
const PROBES: usize = 3;

pub fn igb() -> Result<()> {
    rig::shared(|rig| every_vector(rig, 2))
}

/// The second of two alike, by itself.
pub fn igb_b() -> Result<()> {
    every_vector(&mut Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbB, None)])?, 2)
}

pub fn e1000e() -> Result<()> {
    // Its driver has one receive vector, however many CPUs.
    every_vector(&mut Rig::boot(Vm::builder().cpus(2), &[(Nic::E1000e, None)])?, 1)
}

/// With no irqfd attached to the device's eventfds by the new image, the very same check must fail.
pub fn red_without_irqfds() -> Result<()> {
    let mut rig = Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?;
    ensure!(
        rig.vm.ping()?.features.iter().any(|f| f == hooks::FEATURE),
        "the VMM under test has no test hooks: {:?}",
        rig.vm.ping()?
    );
    let ram = GuestRam::of(rig.vm.pid())?;
    let (vector, source) = sources(rig.agent()?, &rig.wires[0])?.into_iter().next().context("no vector")?;
    let _hook = Switch::on(&rig.vm.dir, "skip-irqfds")?;
    let seen = conclusive(&mut rig, &ram, &vector, source)?;
    // The guest itself is well: it answers, only the packet's interrupt is missing.
    rig.agent()?.ping()?;
    ensure!(seen.dma, "the packet was not even in memory");
    ensure!(seen.is_lost(), "reported {:?} after resume though nothing could deliver it", seen.reported);
    Ok(())
}

fn every_vector(rig: &mut Rig, expected: usize) -> Result<()> {
    let ram = GuestRam::of(rig.vm.pid())?;
    let vectors = sources(rig.agent()?, &rig.wires[0])?;
    ensure!(
        vectors.len() >= expected,
        "{expected} receive vectors expected, packets of {SOURCES} sources reach only {vectors:?}"
    );
    for (vector, source) in vectors {
        // On a busy machine a guest can be slow without anything being lost: that is tried again, a loss is not.
        let mut seen = conclusive(rig, &ram, &vector, source)?;
        for _ in 1..SLOW_TRIES {
            if seen.is_lost() || seen.is_prompt() {
                break;
            }
            note(format_args!("{vector}: reported {:?} after resume, once more", seen.reported));
            seen = conclusive(rig, &ram, &vector, source)?;
        }
        ensure!(seen.dma, "{vector}: the packet was not found in guest memory while the update was held");
        ensure!(
            !seen.is_lost(),
            "{vector}: the packet's interrupt was lost; reported {:?} after resume",
            seen.reported
        );
        note(format_args!("{vector}: in memory after {:?}, reported {:?} after resume", seen.dma_after, seen.reported));
        ensure!(seen.is_prompt(), "{vector}: reported {:?} after resume", seen.reported);
    }
    Ok(())
}

/// For each receive vector of the wire's NIC, the number of a source address whose packets raise it.
pub fn sources(agent: &Agent, wire: &Wire) -> Result<Vec<(String, u8)>> {
    wire.add_peer_ips(SOURCES)?;
    let mut found: Vec<(String, u8)> = Vec::new();
    let counts = |agent: &Agent| -> Result<Vec<Vector>> {
        Ok(agent.interrupts(&wire.guest)?.into_iter().filter(|v| v.name.to_lowercase().contains("rx")).collect())
    };
    let all = counts(agent)?.len();
    ensure!(all > 0, "no receive vector of {} in the guest's /proc/interrupts", wire.guest);
    for source in 0..=SOURCES {
        let raised = (0..PROBES).map(|_| raised_by(wire, source, || counts(agent))).collect::<Result<Vec<_>>>()?;
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

/// The vectors that a packet of `source` raises: one packet at a time, or a guest that is slow takes several with one interrupt.
fn raised_by(wire: &Wire, source: u8, counts: impl Fn() -> Result<Vec<Vector>>) -> Result<Vec<String>> {
    let before = counts()?;
    send(wire, source, 0x1234)?;
    wait_for("an interrupt of a packet", Duration::from_secs(10), || {
        let now = counts()?.into_iter().zip(&before);
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

/// Whether one packet, sent while the guest is stopped for an update that is rolled back, is reported after that. `request` is the body of
/// vm.update; the fault is armed already, and comes at the end of phase `held_at` or later.
pub fn reported_after_roll_back(
    rig: &mut Rig,
    ram: &GuestRam,
    (vector, source): &(String, u8),
    request: &str,
    held_at: &str,
) -> Result<bool> {
    let mut took = Vec::new();
    for _ in 0..ATTEMPTS {
        let seen = attempt(rig, ram, vector, *source, held_at, request, "rolled_back")?;
        ensure!(seen.dma, "{vector}: the packet was not found in guest memory while the update was held");
        if seen.is_prompt() {
            return Ok(true);
        }
        if seen.took + PROMPT < TICK {
            return Ok(!seen.is_lost());
        }
        took.push(seen.took);
    }
    bail!("{vector}: no attempt was over before the driver's next tick: {took:?}")
}

/// What an attempt showed.
struct Seen {
    dma: bool,
    /// From sending to finding, search included.
    dma_after: Duration,
    /// From the moment the guest runs again to that in which it has the packet; `None`: not for long.
    reported: Option<Duration>,
    /// From the driver's tick to the same.
    after_tick: Duration,
    /// From the driver's tick to the answer.
    took: Duration,
}

impl Seen {
    fn is_prompt(&self) -> bool {
        self.reported.is_some_and(|after| after <= PROMPT)
    }

    /// Nothing, or no more than the driver's next tick, brought the packet to light.
    fn is_lost(&self) -> bool {
        self.reported.is_none() || self.after_tick >= TICK
    }
}

/// Attempts until one is short enough to mean something.
fn conclusive(rig: &mut Rig, ram: &GuestRam, vector: &str, source: u8) -> Result<Seen> {
    let mut took = Vec::new();
    for _ in 0..ATTEMPTS {
        let request = update_body(&rig.vm.other_build()?);
        let seen = attempt(rig, ram, vector, source, "invalidate", &request, "updated")?;
        if seen.took + PROMPT < TICK {
            return Ok(seen);
        }
        took.push(seen.took);
    }
    bail!("{vector}: no attempt was over before the driver's next tick: {took:?}")
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
    let report = agent.start::<Arrival>(&Request::WatchWait { port: PORT, timeout_ms: 8000 })?;
    let mut hold = Hold::arm(&rig.vm.dir, held_at)?;
    let mut caller = rig.vm.api.connect()?;

    // A driver without ticks forgives nothing.
    let _ = agent.call::<Vec<Vector>>(&Request::InterruptsWait { name: vector.into(), timeout_ms: 4000 });
    // On L1's TSC axis, so that the way of the news over the serial line does not count.
    let (tick, tick_tsc) = (Instant::now(), sample(1).tsc);
    caller.send("PUT", "vm.update", request)?;
    hold.wait_held(Duration::from_secs(30))?;
    let sent = Instant::now();
    send(&wire, source, token)?;
    let mut dma = false;
    while !dma && sent.elapsed() < Duration::from_secs(1) {
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
    let late = report.wait(PATIENCE).ok().map(|(arrival, _)| arrival);
    if expected == "updated" {
        rig.vm.note_update();
    }
    rig.vm.follow(outcome.pid)?;
    let Some(arrival) = late else {
        return Ok(Seen { dma, dma_after, reported: None, after_tick: Duration::MAX, took });
    };
    ensure!(arrival.head.chunks(2).all(|pair| pair == token.to_ne_bytes()), "another packet came: {arrival:?}");
    let offset = *clock::tsc_offsets(&rig.vm)?.first().context("no vCPU")?;
    let at = (arrival.tsc as i64).wrapping_sub(offset);
    // A fault leaves its phase without an end, so that the hold counts as part of the next: then the answer is the better mark.
    let after_hold: u64 = outcome.phases.iter().skip_while(|phase| phase.name != held_at).skip(1).map(|p| p.us).sum();
    let resumed = (released as i64 + (after_hold as f64 * 1e3 / ns_per_tick()) as i64).min(answered as i64);
    let since = |tsc: i64| Duration::from_nanos(((at - tsc).max(0) as f64 * ns_per_tick()) as u64);
    Ok(Seen { dma, dma_after, reported: Some(since(resumed)), after_tick: since(tick_tsc as i64), took })
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
