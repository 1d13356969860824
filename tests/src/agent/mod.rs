//! The guest agent: reads requests from the serial line, does them, answers.
//!
//! One loop reads; a request that waits for something gets a thread of its own, so that others are answered meanwhile.
//! Answers are kept for a while by ID: a request that comes again is answered again, not done again.

mod jobs;
mod machine;
mod page;
mod resets;
mod rewriter;
mod trace;
mod tty;
mod vectors;

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use rewriter::Rewriter;
use serde::Serialize;

use crate::{
    clock, counters, net,
    proto::{Answer, Line, LineBuffer, Notice, Request, UNASKED},
    stillness,
};

/// How many answers are kept for askers who did not get them.
const KEPT_ANSWERS: usize = 64;

/// What the agent is doing.
#[derive(Default)]
struct Agent {
    streams: Mutex<jobs::Streams>,
    watches: Mutex<jobs::Watches>,
    memory: Mutex<Option<Rewriter>>,
    disk: Mutex<Option<Rewriter>>,
    busy: Mutex<Option<jobs::Busy>>,
    resets: Mutex<Option<resets::Resets>>,
    timers: Mutex<Option<jobs::Timers>>,
    power_button: Mutex<Option<machine::PowerButton>>,
    page: Mutex<Option<page::Held>>,
    cpuid: Mutex<Vec<Vec<String>>>,
    /// By ID; `None` while it is being done.
    answers: Mutex<BTreeMap<u64, Option<Answer>>>,
}

/// Serves requests from the serial device at `path` until the machine goes down.
pub fn run(path: &str) -> std::io::Result<()> {
    let tty = Arc::new(tty::Tty::open(path)?);
    let agent = Arc::new(Agent::default());
    tty.write(UNASKED, &Notice::Ready)?;
    let mut lines = LineBuffer::default();
    loop {
        for line in lines.push(&tty.read()?) {
            match line {
                Line::Message { id, json } => receive(&agent, &tty, id, &json)?,
                Line::Garbled => tty.write(UNASKED, &Notice::Garbled)?,
                Line::Other(_) => {}
            }
        }
    }
}

fn receive(agent: &Arc<Agent>, tty: &Arc<tty::Tty>, id: u64, json: &str) -> std::io::Result<()> {
    {
        let mut answers = agent.answers.lock();
        match answers.get(&id) {
            Some(Some(answer)) => return tty.write(id, answer),
            Some(None) => return Ok(()),
            None => {
                answers.insert(id, None);
                forget_old(&mut answers);
            }
        }
    }
    let request = match serde_json::from_str::<Request>(json) {
        Ok(request) => request,
        Err(e) => return finish(agent, tty, id, Answer::Err(format!("not a request: {e}"))),
    };
    if !waits(&request) {
        return finish(agent, tty, id, answer(agent, request));
    }
    let (agent, tty) = (Arc::clone(agent), Arc::clone(tty));
    std::thread::Builder::new().name(format!("wait{id}")).spawn(move || {
        let answer = answer(&agent, request);
        if let Err(e) = finish(&agent, &tty, id, answer) {
            eprintln!("agent: cannot answer {id}: {e}");
        }
    })?;
    Ok(())
}

/// What is still being done is never forgotten, however many others were answered meanwhile: asked again, it must not
/// be done twice.
fn forget_old(answers: &mut BTreeMap<u64, Option<Answer>>) {
    let done: Vec<u64> = answers.iter().filter(|(_, answer)| answer.is_some()).map(|(id, _)| *id).collect();
    for id in done.iter().take(done.len().saturating_sub(KEPT_ANSWERS)) {
        answers.remove(id);
    }
}

fn finish(agent: &Agent, tty: &tty::Tty, id: u64, answer: Answer) -> std::io::Result<()> {
    agent.answers.lock().insert(id, Some(answer.clone()));
    tty.write(id, &answer)
}

fn waits(request: &Request) -> bool {
    matches!(
        request,
        Request::WatchWait { .. }
            | Request::TimersWait
            | Request::InterruptsWait { .. }
            | Request::PowerButtonWait
            | Request::RecvStop { .. }
            | Request::PageTouch
            | Request::MemoryStop
            | Request::DiskStop
            | Request::ResetsStop
            | Request::IfUp { .. }
    )
}

fn answer(agent: &Agent, request: Request) -> Answer {
    let name = format!("{request:?}");
    match carry_out(agent, request) {
        Ok(value) => Answer::Ok(value),
        Err(e) => Answer::Err(format!("{name}: {e}")),
    }
}

type Outcome = Result<serde_json::Value, Box<dyn std::error::Error>>;

fn value<T: Serialize>(value: T) -> Outcome {
    Ok(serde_json::to_value(value)?)
}

fn carry_out(agent: &Agent, request: Request) -> Outcome {
    match request {
        Request::Ping => value(()),
        Request::Nics => value(machine::nics()?),
        Request::IfUp { name, ip, prefix } => {
            net::drop_nothing_by_age();
            counters::note_drops();
            value(net::interface_up(&name, ip.parse()?, prefix)?)
        }
        Request::Ring { name, descriptors } => value(net::set_receive_ring(&name, descriptors)?),
        Request::Neighbour { name, ip, mac } => {
            value(net::set_neighbour(&name, ip.parse()?, net::parse_mac(&mac).ok_or("not a MAC address")?)?)
        }
        Request::Counters { name } => value(counters::of(&name)?),
        Request::Stillness { name } => value(stillness::report(Some(&name))?),
        Request::SendStart { flow, from, to, rate, credit } => {
            value(agent.streams.lock().send_start(flow, from.parse()?, to.parse()?, rate, credit)?)
        }
        Request::Credit { limits } => value(agent.streams.lock().credit(&limits)?),
        Request::SendStop { flow } => value(agent.streams.lock().send_stop(flow)?),
        Request::SendStats { flow } => value(agent.streams.lock().send_stats(flow)?),
        Request::RecvStart { flow, at } => value(agent.streams.lock().recv_start(flow, at.parse()?)?),
        Request::RecvStats { flow } => value(agent.streams.lock().recv_stats(flow)?),
        Request::RecvStop { flow, expected } => {
            let receiver = agent.streams.lock().recv_take(flow)?;
            value(receiver.stop(expected).0)
        }
        Request::WatchOpen { port } => value(agent.watches.lock().open(port)?),
        Request::WatchWait { port } => {
            let watch = agent.watches.lock().of(port)?;
            value(watch.wait()?)
        }
        Request::MemoryStart { mib, seed } => {
            let mut memory = agent.memory.lock();
            if memory.is_some() {
                return Err("a memory job is running".into());
            }
            *memory = Some(Rewriter::of_memory(mib, seed)?);
            value(())
        }
        Request::DiskStart { path, mib, seed } => {
            let mut disk = agent.disk.lock();
            if disk.is_some() {
                return Err("a disk job is running".into());
            }
            *disk = Some(Rewriter::of_disk(&path, mib, seed)?);
            value(())
        }
        Request::DiskStats => value(agent.disk.lock().as_ref().ok_or("no disk job")?.stats()),
        Request::DiskStop => value(agent.disk.lock().take().ok_or("no disk job")?.stop()),
        Request::MemoryStats => value(agent.memory.lock().as_ref().ok_or("no memory job")?.stats()),
        Request::MemoryStop => value(agent.memory.lock().take().ok_or("no memory job")?.stop()),
        Request::BusyStart { cpus } => {
            let mut busy = agent.busy.lock();
            if busy.is_some() {
                return Err("busy threads are running".into());
            }
            *busy = Some(jobs::Busy::start(&cpus)?);
            value(())
        }
        Request::BusyStats => value(agent.busy.lock().as_ref().ok_or("no busy threads")?.counts()),
        Request::BusyStop => value(agent.busy.lock().take().ok_or("no busy threads")?.stop()),
        Request::TimersArm { after_ms } => {
            *agent.timers.lock() = Some(jobs::Timers::arm(&after_ms)?);
            value(())
        }
        Request::TimersWait => {
            let timers = agent.timers.lock().take().ok_or("no timers are armed")?;
            value(timers.wait()?)
        }
        Request::Clock { cpu } => value(machine::on_cpu(cpu, || clock::sample(200))?),
        Request::Cpuid { cpu } => value(machine::on_cpu(cpu, machine::cpuid_lines)?),
        Request::CpuidRemember => {
            let leaves = machine::cpuid_of_all()?;
            let counts: Vec<usize> = leaves.iter().map(Vec::len).collect();
            *agent.cpuid.lock() = leaves;
            value(counts)
        }
        Request::CpuidChanges => value(machine::changes(&agent.cpuid.lock(), &machine::cpuid_of_all()?)),
        Request::Pci => value(machine::pci()?),
        Request::VectorsOn { bdf } => value(vectors::on(&bdf)?),
        Request::ConfigRead { bdf, offset } => value(resets::config_read(&bdf, offset)?),
        Request::ConfigWrite { bdf, offset, value: word } => value(resets::config_write(&bdf, offset, word)?),
        Request::ResetsStart { bdf, cpus } => {
            let mut resets = agent.resets.lock();
            if resets.is_some() {
                return Err("a device is being reset".into());
            }
            *resets = Some(resets::Resets::start(&bdf, &cpus)?);
            value(())
        }
        Request::ResetsStats => value(agent.resets.lock().as_ref().ok_or("no device is being reset")?.counts()),
        Request::ResetsStop => {
            let resets = agent.resets.lock().take().ok_or("no device is being reset")?;
            value(resets.stop())
        }
        Request::Interrupts { name } => value(machine::interrupts(&name)?),
        Request::InterruptsWait { name, timeout_ms } => value(machine::interrupts_wait(&name, timeout_ms)?),
        Request::TraceStart { vector } => value(trace::start(&vector)?),
        Request::TraceRead => value(trace::read()?),
        Request::Dmesg { words } => value(machine::dmesg(&words)?),
        Request::ClockSource { name } => value(machine::set_clock_source(&name)?),
        Request::Sysctl { name, value: text } => value(std::fs::write(format!("/proc/sys/{name}"), text)?),
        Request::PageHold => {
            let page = page::Held::new()?;
            let address = page.address()?;
            *agent.page.lock() = Some(page);
            value(address)
        }
        Request::PageTouch => value(agent.page.lock().as_ref().ok_or("no page is held")?.touch()?),
        Request::Machine => value(machine::info()?),
        Request::PowerButtonOpen => {
            *agent.power_button.lock() = Some(machine::PowerButton::open()?);
            value(())
        }
        Request::PowerButtonWait => {
            let button = agent.power_button.lock().take().ok_or("the power button is not open")?;
            value(button.wait()?)
        }
        Request::PowerOff { after_ms } => value(machine::reboot(libc::RB_POWER_OFF, after_ms)?),
        Request::Reboot { after_ms } => value(machine::reboot(libc::RB_AUTOBOOT, after_ms)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_done_is_not_forgotten() {
        let mut answers = BTreeMap::from([(1, None)]);
        for id in 2..200 {
            answers.insert(id, Some(Answer::Ok(id.into())));
            forget_old(&mut answers);
        }
        assert!(matches!(answers.get(&1), Some(None)));
        assert_eq!(answers.len(), KEPT_ANSWERS + 1);
        assert!(answers.contains_key(&199) && !answers.contains_key(&2));
    }
}
