//! ACPI power management of a hardware-reduced machine (ACPI 6.5, 4.8.3.7 and 5.6.9): power-off, reset, power button;
//! and the power management timer (4.8.3.3), which such a machine need not have.

use std::sync::Arc;

use acpi_tables::aml::{
    And, Device as AmlDevice, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, Notify, ONE, OpRegion, OpRegionSpace, Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use theseus_resources::state::Format;
use theseus_resources::{Claims, layout};

use crate::bus::LockedDevice;
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, edge_interrupt, on_board};
use crate::interrupt::{GuestRequest, GuestRequests, IrqLine};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::spec::Spec;

/// Its name in a [`crate::set::DeviceSet`].
pub const NAME: &str = "acpi-pm";

// Registers, relative to `layout::PM_BASE`, one byte each; the ACPI tables name them.
/// SLP_TYP and SLP_EN, by which the guest powers off (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u64 = 0;
/// WAK_STS, which is never set: there is no sleep state to wake from.
pub const SLEEP_STATUS: u64 = 1;
/// Where [`RESET_VALUE`] resets the guest (ACPI 6.5, 4.8.3.6).
pub const RESET: u64 = 2;
/// What the generic event device's interrupt was for. Reading clears it.
pub const GED_STATUS: u64 = 3;

/// The power management timer, four bytes: 32 bits at 3.579545 MHz.
pub const TIMER: u64 = 4;
const TIMER_HZ: u128 = 3_579_545;

/// The value for [`RESET`] that resets.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of soft-off, as the `\_S5` object gives it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Of [`GED_STATUS`]: the power button was pressed.
pub const GED_POWER_BUTTON: u8 = 1;
/// "Press" of a control method power button (ACPI 6.5, table 5.140).
const NOTIFY_POWER_BUTTON: u8 = 0x80;
const SLEEP_ENABLE: u8 = 1 << 5;

/// See the module.
pub struct Pm {
    requests: Arc<dyn GuestRequests>,
    ged: Arc<dyn IrqLine>,
    ged_status: u8,
}

impl Pm {
    /// `ged` is the generic event device's interrupt, `layout::GED_GSI`.
    pub fn new(requests: Arc<dyn GuestRequests>, ged: Arc<dyn IrqLine>) -> Self {
        Self { requests, ged, ged_status: 0 }
    }

    /// Tells the guest. Whether it powers off is its own decision.
    pub fn press_power_button(&mut self) {
        self.ged_status |= GED_POWER_BUTTON;
        self.ged.pulse();
    }

    /// The guest was reset: a button press it has not seen is forgotten.
    pub fn reset(&mut self) {
        self.ged_status = 0;
    }

    /// The host's monotonic clock in ticks of the timer: so it goes on over an update, with no state, as the guest's
    /// other clocks do.
    fn timer() -> [u8; 4] {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        ticks(now.tv_sec as u64, now.tv_nsec as u64).to_le_bytes()
    }

    fn write_register(&mut self, register: u64, value: u8) {
        match register {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5 => {
                self.requests.notify(GuestRequest::PowerOff);
            }
            RESET if value == RESET_VALUE => self.requests.notify(GuestRequest::Reset),
            _ => {}
        }
    }
}

fn ticks(seconds: u64, nanoseconds: u64) -> u32 {
    let ns = u128::from(seconds) * 1_000_000_000 + u128::from(nanoseconds);
    (ns * TIMER_HZ / 1_000_000_000) as u32
}

impl LockedDevice for Pm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // All bytes of an access are of one moment.
        let timer = (offset.saturating_add(data.len() as u64) > TIMER).then(Self::timer).unwrap_or_default();
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            *byte = match register {
                TIMER..=7 => timer[(register - TIMER) as usize],
                GED_STATUS => std::mem::take(&mut self.ged_status),
                // No sleep state is ever woken from: the status register stays 0.
                _ => 0,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..=u64::MAX).zip(data) {
            self.write_register(register, *byte);
        }
    }
}

/// What the guest was told and has not read yet.
#[derive(Debug, Serialize, Deserialize)]
pub struct PmState {
    /// [`GED_STATUS`].
    ged_status: u8,
}

/// What a restore needs. The interrupt controller must be restored before: a pending event is raised again.
pub struct PmParts {
    /// Where power-off and reset go.
    pub requests: Arc<dyn GuestRequests>,
    /// The pin `layout::GED_GSI`.
    pub ged: Arc<dyn IrqLine>,
}

impl Migratable for Pm {
    const FORMAT: Format = Format::new("acpi-pm", 1);
    type State = PmState;
    type Handles = NoHandles;
    type Parts<'a> = PmParts;

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { requests: _, ged: _, ged_status } = self;
        let state = PmState { ged_status: *ged_status };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, parts: PmParts) -> Result<Self, MigrateError> {
        let Saved { state: PmState { ged_status }, handles: NoHandles } = saved;
        let PmParts { requests, ged } = parts;
        if ged_status != 0 {
            ged.pulse();
        }
        Ok(Self { requests, ged, ged_status })
    }
}

impl Catalogued for Pm {
    fn boot(_: &Spec, around: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        let device = Self::new(around.requests.clone(), (around.pin)(layout::GED_GSI));
        Ok(vec![(NAME.to_owned(), device)])
    }

    fn parts<'a>(around: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {
        PmParts { requests: around.requests.clone(), ged: (around.pin)(layout::GED_GSI) }
    }

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Mutex::new(self))
    }
}

impl Device for Mutex<Pm> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pio { base: layout::PM_BASE.into(), len: layout::PM_SIZE.into(), device: self }]
    }

    /// Does nothing by itself.
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
        PowerButton.to_aml_bytes(aml);
        GenericEventDevice.to_aml_bytes(aml);
    }
}

struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        AmlDevice::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(sink);
    }
}

/// Turns `layout::GED_GSI` into notifications (ACPI 6.5, 5.6.9).
struct GenericEventDevice;

impl Aml for GenericEventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let interrupt = edge_interrupt(layout::GED_GSI);
        let status = Field::new(
            "GSTR".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            vec![FieldEntry::Named(*b"GSTA", 8)],
        );
        // One read: it clears the status.
        let (status_field, button) = (Path::new("GSTA"), Path::new("\\_SB_.PWRB"));
        let read_status = Store::new(&Local(0), &status_field);
        let pressed = And::new(&ZERO, &Local(0), &GED_POWER_BUTTON);
        let notify = Notify::new(&button, &NOTIFY_POWER_BUTTON);
        AmlDevice::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                &OpRegion::new("GSTR".into(), OpRegionSpace::SystemIO, &(layout::PM_BASE + GED_STATUS as u16), &ONE),
                &status,
                &Method::new("_EVT".into(), 1, true, vec![&read_status, &If::new(&pressed, vec![&notify])]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::test_parts::{Asked, Pulses};

    fn read(pm: &mut Pm, register: u64) -> u8 {
        let mut byte = [0xEE];
        pm.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn power_off_and_reset() {
        let asked = Arc::new(Asked::default());
        let mut pm = Pm::new(asked.clone(), Arc::new(Pulses::default()));
        for value in [0, SLEEP_TYPE_S5 << 2, SLEEP_ENABLE, SLEEP_ENABLE | 3 << 2] {
            pm.write(SLEEP_CONTROL, &[value]);
        }
        pm.write(RESET, &[0]);
        pm.write(SLEEP_STATUS, &[0xFF]);
        pm.write(u64::MAX, &[1, 1]);
        assert_eq!(asked.take(), []);
        pm.write(SLEEP_CONTROL, &[SLEEP_ENABLE | SLEEP_TYPE_S5 << 2]);
        assert_eq!(asked.take(), [GuestRequest::PowerOff]);
        pm.write(RESET, &[RESET_VALUE]);
        assert_eq!(asked.take(), [GuestRequest::Reset]);
    }

    #[test]
    fn the_timer_runs_as_fast_as_it_should() {
        assert_eq!(
            (ticks(0, 999_999_999), ticks(1, 0), ticks(1, 279), ticks(1, 280)),
            (3_579_544, 3_579_545, 3_579_545, 3_579_546)
        );
        // It wraps after 20 minutes; 100 years of uptime overflow nothing.
        assert_eq!(ticks(1199, 0).wrapping_add(ticks(1, 0)), ticks(1200, 0));
        let century = 100 * 365 * 86_400;
        assert_eq!(ticks(century + 1, 0).wrapping_sub(ticks(century, 0)), 3_579_545);
        let mut pm = Pm::new(Arc::new(Asked::default()), Arc::new(Pulses::default()));
        let mut value = || {
            let mut bytes = [0; 4];
            pm.read(TIMER, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let first = value();
        assert!(std::iter::repeat_with(value).any(|now| now.wrapping_sub(first) > 10), "it stands still");
        // Across its end, and from before its beginning.
        let mut wide = [0xEE; 8];
        pm.read(6, &mut wide);
        assert_eq!(wide[2..], [0; 6]);
        pm.read(u64::MAX, &mut wide[..1]);
    }

    #[test]
    fn a_button_press_survives_an_update_and_is_seen_once() {
        let (asked, ged) = (Arc::new(Asked::default()), Arc::new(Pulses::default()));
        let mut pm = Pm::new(asked.clone(), ged.clone());
        pm.press_power_button();
        assert_eq!(ged.take(), 1);
        let parts = || PmParts { requests: asked.clone(), ged: ged.clone() };
        let mut pm = Pm::restore(pm.save().unwrap(), parts()).unwrap();
        assert_eq!(ged.take(), 1);
        assert_eq!(read(&mut pm, SLEEP_STATUS), 0);
        assert_eq!(read(&mut pm, GED_STATUS), GED_POWER_BUTTON);
        assert_eq!(read(&mut pm, GED_STATUS), 0);
        Pm::restore(pm.save().unwrap(), parts()).unwrap();
        assert_eq!(ged.take(), 0);
    }
}
