//! A wire: the NIC in the guest, the peer in L1, addresses on both.
//!
//! Each wire is a subnet of its own, with fixed ARP entries on both ends, so nothing but a test's packets is on it.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};

use crate::{
    harness::{PATIENCE, agent::Agent, lab},
    net,
    proto::Request,
};

const PREFIX: u8 = 24;
/// Of further addresses of the peer, each of which is a network of its own.
const HOST: u8 = 32;
/// Ten times the drivers' default of 256: packets that find the ring full are dropped by the device.
const RING: u32 = 2560;
/// Packets of one direction that may be on their way at once, where the rings have room for twice as many.
const WINDOW: u32 = 512;
const WINDOW_VARIABLE: &str = "LAB_WINDOW";

#[derive(Debug, Clone)]
pub struct Wire {
    pub nic: lab::Nic,
    /// L1's interface.
    pub peer: String,
    /// The guest's interface.
    pub guest: String,
    /// Packets of one direction that may be on their way at once.
    pub window: u64,
}

impl Wire {
    /// Brings both ends up.
    pub fn set_up(nic: lab::Nic, agent: &Agent) -> Result<Self> {
        let nics = agent.nics()?;
        let found = match nic.mac() {
            Some(mac) => nics.iter().find(|n| n.mac.eq_ignore_ascii_case(&mac)),
            None => nics.first(),
        };
        let guest =
            found.with_context(|| format!("{nic:?} ({:?}) is not among the guest's NICs {nics:?}", nic.mac()))?;
        let mut wire = Self { nic, peer: nic.peer()?, guest: guest.name.clone(), window: 0 };
        let ring: u32 = agent.call(&Request::Ring { name: wire.guest.clone(), descriptors: RING })?;
        let ring = ring.min(net::set_receive_ring(&wire.peer, RING)?);
        // Half a ring: a driver fills up the other half in batches.
        wire.window = WINDOW.min(ring / 2).into();
        // To see a check of the traffic fail: with a window that has no bounds, a machine that is busy enough loses
        // packets.
        if let Some(window) = std::env::var(WINDOW_VARIABLE).ok().and_then(|text| text.parse().ok()) {
            wire.window = window;
        }
        // Both at once: the carrier of one end may need the other.
        let request = Request::IfUp { name: wire.guest.clone(), ip: wire.guest_ip().to_string(), prefix: PREFIX };
        let guest_up = agent.start::<()>(&request)?;
        net::interface_up(&wire.peer, wire.peer_ip(0), PREFIX).with_context(|| format!("the peer of {nic:?}"))?;
        guest_up.wait(PATIENCE)?;
        let guest_mac = net::parse_mac(&guest.mac).context("the guest's MAC")?;
        net::set_neighbour(&wire.peer, wire.guest_ip(), guest_mac)?;
        let mac = std::fs::read_to_string(format!("/sys/class/net/{}/address", wire.peer))?.trim().to_string();
        agent.call::<()>(&Request::Neighbour { name: wire.guest.clone(), ip: wire.peer_ip(0).to_string(), mac })?;
        Ok(wire)
    }

    pub fn guest_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.nic.index(), 2)
    }

    /// L1's addresses on this wire; number 0 is the one that is always there.
    pub fn peer_ip(&self, number: u8) -> Ipv4Addr {
        if number == 0 { Ipv4Addr::new(10, 77, self.nic.index(), 1) } else { spread(number) }
    }

    /// Gives L1 the further addresses 1..=`count`: a NIC spreads packets over its queues by source.
    pub fn add_peer_ips(&self, count: u8) -> Result<()> {
        for number in 1..=count {
            net::set_address(&format!("{}:{number}", self.peer), self.peer_ip(number), HOST)?;
        }
        Ok(())
    }
}

/// Addresses that differ in all of the bits that they may. A NIC's hash of an address is a sum of bits of its key, one
/// window of it for each bit of the address (Toeplitz), and drivers take a key at random: were only five bits ever
/// different, one guest in some dozens would have all of its packets in one queue.
fn spread(number: u8) -> Ipv4Addr {
    // The golden ratio: multiples of it are spread evenly over 32 bits, from which the highest are taken.
    let [a, b, c, _] = u32::from(number).wrapping_mul(0x9E37_79B9).to_be_bytes();
    Ipv4Addr::new(10, a, b, c)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the differences of `addresses` are no sum (exclusive or) of others.
    fn rank(addresses: &[Ipv4Addr]) -> usize {
        let first = addresses[0].to_bits();
        let mut base: Vec<u32> = Vec::new();
        for address in addresses {
            let rest = base.iter().fold(address.to_bits() ^ first, |rest, known| rest.min(rest ^ known));
            if rest != 0 {
                base.push(rest);
            }
        }
        base.len()
    }

    #[test]
    fn a_key_that_sends_all_sources_to_one_queue_is_one_in_a_million() {
        let new: Vec<_> = (1..=24).map(spread).collect();
        assert!(rank(&new) >= 20, "{}: {new:?}", rank(&new));
        assert!(new.iter().all(|address| address.octets()[1] != 77), "an address of a wire: {new:?}");
        let side_by_side: Vec<_> = (101..=124).map(|last| Ipv4Addr::new(10, 77, 0, last)).collect();
        assert_eq!(rank(&side_by_side), 5);
    }
}
