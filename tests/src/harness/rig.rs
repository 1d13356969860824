//! A guest with passed-through NICs whose wires are up. The common one is kept from test to test: a boot takes long.

use anyhow::Result;
use parking_lot::Mutex;

use crate::harness::{
    agent::Agent,
    builder::Builder,
    lab::Nic,
    traffic::{self, Traffic},
    vm::Vm,
    wire::Wire,
};

pub struct Rig {
    pub vm: Vm,
    pub wires: Vec<Wire>,
}

impl Rig {
    /// Boots, with each NIC in the container named.
    pub fn boot(mut builder: Builder, nics: &[(Nic, Option<&str>)]) -> Result<Self> {
        for (nic, container) in nics {
            builder = builder.device(*nic, *container)?;
        }
        let vm = builder.boot()?;
        let wires = nics.iter().map(|(nic, _)| Wire::set_up(*nic, vm.agent()?)).collect::<Result<_>>()?;
        Ok(Self { vm, wires })
    }

    pub fn agent(&self) -> Result<&Agent> {
        self.vm.agent()
    }

    /// One update, before and after which all NICs carry traffic, and which loses none of it.
    pub fn update_under_traffic(&mut self) -> Result<()> {
        let traffic = self.traffic()?;
        traffic.moves_on(self.agent()?, 50)?;
        self.vm.update()?;
        traffic.moves_on(self.agent()?, 50)?;
        traffic.finish_clean(self.agent()?)?;
        Ok(())
    }

    /// Numbered packets both ways over every wire.
    pub fn traffic(&self) -> Result<Traffic> {
        self.traffic_of(traffic::RATE)
    }

    /// At most `rate` packets a second, each way over each wire.
    pub fn traffic_of(&self, rate: u32) -> Result<Traffic> {
        Traffic::start(self.agent()?, &self.wires.iter().collect::<Vec<_>>(), rate)
    }
}

static SHARED: Mutex<Option<Rig>> = Mutex::new(None);

/// Runs `body` with the common guest: 2 vCPUs, 256 MiB, one NIC. It outlives the test only if that ends well.
pub fn shared(body: impl FnOnce(&mut Rig) -> Result<()>) -> Result<()> {
    let mut slot = SHARED.lock();
    let kept = slot.take().and_then(|mut rig| rig.vm.is_running().then_some(rig));
    let mut rig = match kept {
        Some(rig) => {
            rig.vm.adopt_logs();
            rig
        }
        None => Rig::boot(Vm::builder().cpus(2), &[(Nic::IgbA, None)])?,
    };
    body(&mut rig)?;
    *slot = Some(rig);
    Ok(())
}

/// Ends the common guest, so that its NIC is free.
pub fn drop_shared() {
    SHARED.lock().take();
}
