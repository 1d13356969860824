//! The serial port as a device of the machine.

use std::sync::Arc;

use acpi_tables::aml::{Device as AmlDevice, EISAName, IO, Name, ONE, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use parking_lot::Mutex;
use theseus_resources::{Claims, layout};

use super::{Console, SERIAL_SIZE, SerialDevice, SerialParts};
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, edge_interrupt, on_board};
use crate::migratable::{MigrateError, SavedDevice};
use crate::spec::Spec;

/// Its name in a [`crate::set::DeviceSet`].
pub const NAME: &str = "serial";

impl Catalogued for SerialDevice {
    fn boot(spec: &Spec, around: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        let Some(console) =
            Console::open(&spec.console, around.fd_store).map_err(|error| DeviceError::Open(error.into()))?
        else {
            return Ok(Vec::new());
        };
        let device = Self::new(console, (around.pin)(layout::SERIAL_GSI));
        let device = device.map_err(|source| DeviceError::Os { name: NAME.to_owned(), source })?;
        Ok(vec![(NAME.to_owned(), device)])
    }

    fn parts<'a>(around: &Surroundings<'a>, claims: &'a mut Claims) -> SerialParts<'a> {
        SerialParts { irq: (around.pin)(layout::SERIAL_GSI), claims, fd_store: around.fd_store }
    }

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Mutex::new(self))
    }
}

impl Device for Mutex<SerialDevice> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pio { base: layout::SERIAL_PORT.into(), len: SERIAL_SIZE, device: self }]
    }

    /// The control loop moves its bytes, and does not turn in a pause.
    fn quiesce(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn resume(&self) {}

    fn reset(&self) {
        self.lock().reset();
    }

    fn blockers(&self, operation: Operation) -> Vec<String> {
        on_board(operation)
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of_locked(self, name)
    }

    fn describe(&self, aml: &mut dyn AmlSink) {
        let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, SERIAL_SIZE as u8);
        let interrupt = edge_interrupt(layout::SERIAL_GSI);
        AmlDevice::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ONE),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
            ],
        )
        .to_aml_bytes(aml);
    }
}
