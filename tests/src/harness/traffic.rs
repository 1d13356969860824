//! Numbered UDP packets in both directions over every wire, and the account of them.

use std::{
    fmt,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};

use crate::{
    counters,
    harness::{
        PATIENCE,
        agent::Agent,
        credit::{Credit, Ways},
        wire::Wire,
    },
    proto::{Request, Sent},
    seq::SeqStats,
    stillness,
    stream::{Receiver, Sender},
};

/// Packets a second, each way, where the machine can carry so many.
pub const RATE: u32 = 500;
/// How often is looked whether the traffic goes on.
const LOOK: Duration = Duration::from_millis(20);
const FIRST_PORT: u16 = 9000;

struct Flows {
    wire: Wire,
    /// L1 to guest.
    inward: u32,
    /// Guest to L1.
    outward: u32,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
}

/// Traffic that goes on until it is finished.
pub struct Traffic {
    flows: Vec<Flows>,
    credit: Credit,
    started: Instant,
}

/// What became of the packets of one direction of one wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Account {
    pub sent: Sent,
    pub got: SeqStats,
}

impl Account {
    /// None lost, none twice, none reordered, none damaged.
    pub fn is_clean(&self) -> bool {
        let SeqStats { duplicated, reordered, foreign, next, .. } = self.got;
        self.sent.packets > 0
            && self.got.lost_of(self.sent.packets) == 0
            && (duplicated, reordered, foreign) == (0, 0, 0)
            && next == self.sent.packets
            && self.sent.errors == 0
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, got } = self;
        write!(
            f,
            "sent {} (refused {}), lost {}, twice {}, reordered {}, foreign {}, longest gap {} us, longest wait for \
             credit {} us",
            sent.packets,
            sent.errors,
            got.lost_of(sent.packets),
            got.duplicated,
            got.reordered,
            got.foreign,
            got.max_gap_us,
            sent.longest_wait_us
        )
    }
}

/// Both directions of one wire.
#[derive(Debug, Clone)]
pub struct WireAccount {
    pub name: String,
    pub to_guest: Account,
    pub from_guest: Account,
    /// Numbers that never came to L1, the first of them.
    pub missing: Vec<u64>,
    /// What was counted since their start, in the guest and in L1.
    pub counters: String,
}

impl Traffic {
    /// At most `rate` packets a second, each way over each wire.
    pub fn start(agent: &Agent, wires: &[&Wire], rate: u32) -> Result<Self> {
        let (mut flows, mut ways) = (Vec::new(), Vec::new());
        for wire in wires {
            let inward = u32::from(wire.nic.index()) * 2;
            let outward = inward + 1;
            let (to_guest, to_peer) =
                (address(wire.guest_ip().into(), inward), address(wire.peer_ip(0).into(), outward));
            agent.call::<()>(&Request::RecvStart { flow: inward, at: to_guest.to_string() })?;
            let receiver = Receiver::start(outward, to_peer)?;
            let from = SocketAddr::new(wire.peer_ip(0).into(), 0);
            let sender = Sender::start(inward, from, to_guest, rate, wire.window)?;
            let (from, to, credit) = (format!("{}:0", wire.guest_ip()), to_peer.to_string(), wire.window);
            agent.call::<()>(&Request::SendStart { flow: outward, from, to, rate, credit })?;
            let (grant, tally) = (sender.grant().clone(), receiver.tally().clone());
            ways.push(Ways { window: wire.window, inward, grant, outward, tally });
            flows.push(Flows {
                wire: (*wire).clone(),
                inward,
                outward,
                sender: Some(sender),
                receiver: Some(receiver),
            });
        }
        Ok(Self { flows, credit: Credit::start(agent.asker(), ways)?, started: Instant::now() })
    }

    /// Since when it goes on.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The account so far; packets on their way count as lost.
    pub fn so_far(&self, agent: &Agent) -> Result<Vec<WireAccount>> {
        let mut accounts = Vec::new();
        for flows in &self.flows {
            let to_guest = Account {
                got: agent.call(&Request::RecvStats { flow: flows.inward })?,
                sent: flows.sender.as_ref().map(Sender::stats).unwrap_or_default(),
            };
            let from_guest = Account {
                got: flows.receiver.as_ref().map(Receiver::stats).unwrap_or_default(),
                sent: agent.call(&Request::SendStats { flow: flows.outward })?,
            };
            accounts.push(WireAccount {
                name: flows.wire.guest.clone(),
                to_guest,
                from_guest,
                missing: Vec::new(),
                counters: String::new(),
            });
        }
        Ok(accounts)
    }

    /// Waits until every direction has moved `packets` on from now, however long that takes: it fails where one stands
    /// still.
    pub fn moves_on(&self, agent: &Agent, packets: u64) -> Result<()> {
        let counts = || Ok::<_, anyhow::Error>(self.credit.exchange()?.concat());
        let before = counts()?;
        let (mut last, mut moved) = (before.clone(), vec![Instant::now(); before.len()]);
        loop {
            let now = counts()?;
            let mut all = true;
            for way in 0..now.len() {
                if now[way] > last[way] {
                    (last[way], moved[way]) = (now[way], Instant::now());
                } else if now[way] < before[way] + packets && moved[way].elapsed() > PATIENCE {
                    let (account, why) = (
                        self.so_far(agent),
                        why(agent, &self.flows.iter().map(|flows| &flows.wire).collect::<Vec<_>>()),
                    );
                    bail!("a direction of the traffic stands still for {PATIENCE:?}: {account:?}\n{why}");
                }
                all &= now[way] >= before[way] + packets;
            }
            if all {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Ends it and counts.
    pub fn finish(self, agent: &Agent) -> Result<Vec<WireAccount>> {
        let Self { mut flows, credit, .. } = self;
        credit.stop();
        let mut accounts = Vec::new();
        for flows in &mut flows {
            let sent_in = flows.sender.take().map(Sender::stop).unwrap_or_default();
            let sent_out: Sent = agent.call(&Request::SendStop { flow: flows.outward })?;
            let stop = Request::RecvStop { flow: flows.inward, expected: sent_in.packets };
            let got_in = agent.start::<SeqStats>(&stop)?;
            let receiver = flows.receiver.take();
            let (got_out, missing) = receiver.map(|receiver| receiver.stop(sent_out.packets)).unwrap_or_default();
            let (got_in, _) = got_in.wait(PATIENCE)?;
            accounts.push(WireAccount {
                name: format!("{:?} ({})", flows.wire.nic, flows.wire.guest),
                to_guest: Account { sent: sent_in, got: got_in },
                from_guest: Account { sent: sent_out, got: got_out },
                missing,
                counters: format!(
                    "guest {:?}, L1 {:?}",
                    agent.call::<Vec<(String, u64)>>(&Request::Counters { name: flows.wire.guest.clone() })?,
                    counters::of(&flows.wire.peer)?
                ),
            });
        }
        Ok(accounts)
    }

    /// Ends it; every packet must have come, once and in order. Gives back the number of packets.
    pub fn finish_clean(self, agent: &Agent) -> Result<u64> {
        let mut packets = 0;
        for account in self.finish(agent)? {
            let WireAccount { name, to_guest, from_guest, missing, counters } = account;
            ensure!(to_guest.is_clean(), "{name}, L1 to guest: {to_guest}; counters: {counters}");
            ensure!(
                from_guest.is_clean(),
                "{name}, guest to L1: {from_guest}; missing {missing:?}; counters: {counters}"
            );
            packets += to_guest.sent.packets + from_guest.sent.packets;
        }
        Ok(packets)
    }
}

fn address(ip: std::net::IpAddr, flow: u32) -> SocketAddr {
    SocketAddr::new(ip, FIRST_PORT + flow as u16)
}

/// What both sides say where an interface stands still, twice: what goes on, and what does not.
pub fn why(agent: &Agent, wires: &[&Wire]) -> String {
    let mut said = Vec::new();
    for _ in 0..2 {
        for wire in wires {
            let name = wire.guest.clone();
            said.push(format!("guest: {:#?}", agent.call::<Vec<String>>(&Request::Stillness { name })));
        }
        said.push(format!("L1: {:#?}", stillness::report(None)));
        // Long enough for a driver's own watch to have come round.
        std::thread::sleep(Duration::from_secs(5));
    }
    said.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_clean() {
        let sent = Sent { packets: 100, ..Sent::default() };
        let got = SeqStats { unique: 100, next: 100, ..SeqStats::default() };
        assert!(Account { sent, got }.is_clean());
        for bad in [
            SeqStats { unique: 99, ..got },
            SeqStats { duplicated: 1, ..got },
            SeqStats { reordered: 1, ..got },
            SeqStats { foreign: 1, ..got },
            SeqStats { unique: 101, next: 101, ..got },
        ] {
            assert!(!Account { sent, got: bad }.is_clean(), "{bad:?}");
        }
        assert!(!Account { sent: Sent::default(), got: SeqStats::default() }.is_clean());
    }
}
