//! The host bridge, slot 0: only its identity, which guests look for.

use std::sync::Arc;

use acpi_tables::AmlSink;
use serde::{Deserialize, Serialize};
use theseus_resources::Claims;
use theseus_resources::state::Format;

use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, on_board};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::pci::PciDevice;
use crate::pci::config::{CLASS_CODE, CONFIG_SIZE, ConfigSpace, ConfigSpaceState, DEVICE_ID, REVISION_ID, VENDOR_ID};
use crate::spec::Spec;
use crate::turn::Turn;

/// Its name in a [`crate::set::DeviceSet`].
pub const NAME: &str = "pci-host-bridge";

/// On PCI bus 0.
const SLOT: u8 = 0;

const INTEL: u16 = 0x8086;
/// "Virtual PCIe host" in Intel's list of identities.
const VIRTUAL_HOST: u16 = 0x0D57;
const CLASS_HOST_BRIDGE: [u8; 3] = [0x00, 0x00, 0x06];

/// See the module.
pub struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    /// `revision` is what this build gives to a guest that boots; a guest that came over from another keeps what it
    /// had.
    pub fn new(revision: u8) -> Self {
        let mut config = ConfigSpace::new(CONFIG_SIZE);
        config.set(VENDOR_ID, &INTEL.to_le_bytes());
        config.set(DEVICE_ID, &VIRTUAL_HOST.to_le_bytes());
        config.set(REVISION_ID, &[revision]);
        config.set(CLASS_CODE, &CLASS_HOST_BRIDGE);
        Self { config }
    }
}

impl PciDevice for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
}

/// All of its configuration space, so that a guest keeps the identity that it has booted with.
#[derive(Debug, Serialize, Deserialize)]
pub struct HostBridgeState {
    /// [`CONFIG_SIZE`] bytes, none of them the guest's to write.
    config: ConfigSpaceState,
}

impl Migratable for HostBridge {
    const FORMAT: Format = Format::new("pci-host-bridge", 1);
    type State = HostBridgeState;
    type Handles = NoHandles;
    type Parts<'a> = ();

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { config } = self;
        let state = HostBridgeState { config: config.save() };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, (): ()) -> Result<Self, MigrateError> {
        let Saved { state: HostBridgeState { config }, handles: NoHandles } = saved;
        Ok(Self { config: ConfigSpace::restore(config)? })
    }
}

impl Catalogued for HostBridge {
    fn boot(spec: &Spec, _: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        Ok(vec![(NAME.to_owned(), Self::new(spec.revision))])
    }

    fn parts<'a>(_: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {}

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Turn::new(self))
    }
}

impl Device for Turn<HostBridge> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pci { slot: SLOT, device: self }]
    }

    /// Does nothing by itself.
    fn quiesce(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn resume(&self) {}

    fn reset(&self) {
        // Nothing of it can be written.
    }

    fn blockers(&self, operation: Operation) -> Vec<String> {
        on_board(operation)
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of(&*self.look().map_err(|held| MigrateError::State(held.to_string()))?, name)
    }

    fn describe(&self, _: &mut dyn AmlSink) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migratable::sent;

    fn dword(device: &mut HostBridge, offset: u16) -> u32 {
        let mut data = [0; 4];
        device.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_is_read_only() {
        let mut bridge = HostBridge::new(2);
        for offset in (0..4096).step_by(4) {
            bridge.config_write(offset, &[0xFF; 4]);
        }
        assert_eq!(dword(&mut bridge, 0), 0x0D57_8086);
        assert_eq!(dword(&mut bridge, 4), 0);
        assert_eq!(dword(&mut bridge, 8), 0x0600_0002);
        assert_eq!(dword(&mut bridge, 0x10), 0, "no BAR");
        assert_eq!(dword(&mut bridge, 0x100), u32::MAX, "no extended space");
    }

    #[test]
    fn the_revision_of_the_boot_stays() {
        let old = HostBridge::new(1);
        let mut restored = HostBridge::restore(sent(&old), ()).unwrap();
        assert_eq!(dword(&mut restored, 8), 0x0600_0001);
        let state = HostBridgeState { config: ConfigSpace::new(3).save() };
        assert!(HostBridge::restore(Saved { state, handles: NoHandles }, ()).is_err());
    }
}
