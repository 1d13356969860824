//! The CMOS chip: battery-backed RAM and an MC146818 real-time clock (ports 0x70 and 0x71).
//!
//! The clock is the host's, in UTC. It cannot be set: what a guest writes to the time registers is dropped, so the
//! guest's next boot starts from the right time whatever it wrote. Alarms and periodic interrupts do not exist.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use acpi_tables::aml::{Device as AmlDevice, EISAName, IO, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use theseus_resources::state::Format;
use theseus_resources::{Claims, layout};

use crate::bus::LockedDevice;
use crate::device::{Catalogued, Device, DeviceError, Operation, Place, Surroundings, on_board};
use crate::migratable::{Migratable, MigrateError, NoHandles, Saved, SavedDevice};
use crate::spec::Spec;

/// Its name in a [`crate::set::DeviceSet`].
pub const NAME: &str = "cmos";

/// Ports: index, data.
pub const CMOS_SIZE: u64 = 2;
const RAM_SIZE: usize = 128;

// MC146818 registers.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
/// By convention; the FADT names it.
pub const CENTURY: u8 = 0x32;

/// Bit 7, update in progress, is never seen: the time is read at one instant.
const A_UPDATING: u8 = 0x80;
/// 32.768 kHz time base, 1024 Hz: what firmware sets.
const A_DEFAULT: u8 = 0x26;
const B_24_HOURS: u8 = 0x02;
const B_BINARY: u8 = 0x04;
const HOURS_PM: u8 = 0x80;
/// The battery is good.
const D_VALID: u8 = 0x80;

/// See the module.
pub struct Cmos {
    index: u8,
    ram: [u8; RAM_SIZE],
}

impl Cmos {
    /// `ram_size` in bytes, for the memory size bytes that firmware would have left.
    pub fn new(ram_size: u64) -> Self {
        let mut ram = [0; RAM_SIZE];
        let kib = ram_size >> 10;
        let low = ram_size.min(theseus_resources::layout::LOW_RAM_END);
        // Base memory and memory above 1 MiB, in KiB; memory from 16 MiB to 4 GiB and from 4 GiB up, in 64 KiB.
        let base = kib.min(640).to_le_bytes();
        let above_1m = kib.saturating_sub(1 << 10).min(0xFFFF).to_le_bytes();
        let above_16m = (low.saturating_sub(16 << 20) >> 16).min(0xFFFF).to_le_bytes();
        let above_4g = ((ram_size - low) >> 16).min(0xFF_FFFF).to_le_bytes();
        let sizes =
            [(0x15, base, 2), (0x17, above_1m, 2), (0x30, above_1m, 2), (0x34, above_16m, 2), (0x5B, above_4g, 3)];
        for (at, bytes, len) in sizes {
            for (to, from) in ram.iter_mut().skip(at).zip(bytes).take(len) {
                *to = from;
            }
        }
        ram[usize::from(REGISTER_A)] = A_DEFAULT;
        ram[usize::from(REGISTER_B)] = B_24_HOURS;
        Self { index: 0, ram }
    }

    fn ram_at(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0xFF)
    }

    fn read_data(&self) -> u8 {
        match self.index {
            REGISTER_A => self.ram_at(REGISTER_A) & !A_UPDATING,
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            index => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                time_register(index, self.ram_at(REGISTER_B), now).unwrap_or_else(|| self.ram_at(index))
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        let read_only = matches!(
            self.index,
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY | REGISTER_C | REGISTER_D
        );
        if let Some(byte) = self.ram.get_mut(usize::from(self.index)).filter(|_| !read_only) {
            *byte = value;
        }
    }
}

/// A time register at `now`, seconds since 1970; `None` if `index` is not one.
fn time_register(index: u8, register_b: u8, now: u64) -> Option<u8> {
    let of_day = now % 86_400;
    let days = now / 86_400;
    let value = match index {
        SECONDS => of_day % 60,
        MINUTES => of_day / 60 % 60,
        HOURS => of_day / 3600,
        // 1 is Sunday, and 1970 began on a Thursday.
        WEEKDAY => (days + 4) % 7 + 1,
        DAY => civil(days).2,
        MONTH => civil(days).1,
        YEAR => civil(days).0 % 100,
        CENTURY => civil(days).0 / 100,
        _ => return None,
    };
    let encode = |value: u64| if register_b & B_BINARY != 0 { value } else { value / 10 * 16 + value % 10 };
    let encoded = if index == HOURS && register_b & B_24_HOURS == 0 {
        encode((value + 11) % 12 + 1) | if value >= 12 { u64::from(HOURS_PM) } else { 0 }
    } else {
        encode(value)
    };
    u8::try_from(encoded).ok()
}

/// (year, month, day) of the proleptic Gregorian calendar, `days` after 1970-01-01. Counts years from March, so that
/// the leap day is the last of its year, in eras of 400 years (146,097 days).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

impl LockedDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            // The index is write-only.
            *byte = if port == 1 { self.read_data() } else { 0xFF };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            match port {
                // Bit 7 masks NMIs, which do not exist.
                0 => self.index = byte & 0x7F,
                1 => self.write_data(*byte),
                _ => {}
            }
        }
    }
}

/// What the guest has written. The time is the host's, and not in it.
#[derive(Debug, Serialize, Deserialize)]
pub struct CmosState {
    /// Which byte port 0x71 is, as last written to port 0x70; bit 7 is 0.
    index: u8,
    /// All 128 bytes: the clock's registers A and B, and what firmware would have left, are among them.
    #[serde(with = "serde_bytes")]
    ram: Vec<u8>,
}

impl Migratable for Cmos {
    const FORMAT: Format = Format::new("cmos", 1);
    type State = CmosState;
    type Handles = NoHandles;
    type Parts<'a> = ();

    fn save(&self) -> Result<Saved<Self>, MigrateError> {
        let Self { index, ram } = self;
        let state = CmosState { index: *index, ram: ram.to_vec() };
        Ok(Saved { state, handles: NoHandles })
    }

    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(saved: Saved<Self>, (): ()) -> Result<Self, MigrateError> {
        let Saved { state: CmosState { index, ram }, handles: NoHandles } = saved;
        let ram = <[u8; RAM_SIZE]>::try_from(ram.as_slice())
            .map_err(|_| MigrateError::State(format!("{} bytes of RAM, not {RAM_SIZE}", ram.len())))?;
        Ok(Self { index: index & 0x7F, ram })
    }
}

impl Catalogued for Cmos {
    fn boot(spec: &Spec, _: &Surroundings<'_>) -> Result<Vec<(String, Self)>, DeviceError> {
        Ok(vec![(NAME.to_owned(), Self::new(spec.ram_size))])
    }

    fn parts<'a>(_: &Surroundings<'a>, _: &'a mut Claims) -> Self::Parts<'a> {}

    fn share(self) -> Arc<dyn Device> {
        Arc::new(Mutex::new(self))
    }
}

impl Device for Mutex<Cmos> {
    fn places(self: Arc<Self>) -> Vec<Place> {
        vec![Place::Pio { base: layout::CMOS_PORT.into(), len: CMOS_SIZE, device: self }]
    }

    /// Does nothing by itself.
    fn quiesce(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn resume(&self) {}

    fn reset(&self) {
        // A battery keeps its memory.
        self.lock().index = 0;
    }

    fn blockers(&self, operation: Operation) -> Vec<String> {
        on_board(operation)
    }

    fn save(&self, name: &str) -> Result<SavedDevice, MigrateError> {
        SavedDevice::of_locked(self, name)
    }

    fn describe(&self, aml: &mut dyn AmlSink) {
        // Without an interrupt: the clock has no alarm, and Linux then takes the RTC as one that only tells the time.
        let ports = IO::new(layout::CMOS_PORT, layout::CMOS_PORT, 1, CMOS_SIZE as u8);
        AmlDevice::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
            ],
        )
        .to_aml_bytes(aml);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(cmos: &mut Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut byte = [0];
        cmos.read(1, &mut byte);
        byte[0]
    }

    /// 2024-02-29 23:59:58, a Thursday.
    const LEAP: u64 = 1_709_251_198;
    const ALL: [u8; 8] = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];

    #[test]
    fn the_time_in_every_encoding() {
        let at = |b, now| ALL.map(|index| time_register(index, b, now).unwrap());
        assert_eq!(at(B_24_HOURS, LEAP), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(at(B_24_HOURS | B_BINARY, LEAP + 2), [20, 24, 3, 1, 6, 0, 0, 0]);
        assert_eq!(at(B_24_HOURS, 0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        let hour = |b, hour: u64| time_register(HOURS, b, hour * 3600).unwrap();
        assert_eq!([0, 1, 12, 13, 23].map(|h| hour(0, h)), [0x12, 0x01, 0x92, 0x81, 0x91]);
        assert_eq!([0, 11, 12, 23].map(|h| hour(B_BINARY, h)), [12, 11, 12 | HOURS_PM, 11 | HOURS_PM]);
    }

    #[test]
    fn the_calendar_agrees_with_a_count_of_days() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..200_000 {
            assert_eq!(civil(days), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }

    #[test]
    fn memory_sizes_and_read_only_registers() {
        let mut cmos = Cmos::new(6 << 30);
        let word = |cmos: &mut Cmos, at| u16::from_le_bytes([get(cmos, at), get(cmos, at + 1)]);
        assert_eq!(word(&mut cmos, 0x15), 640);
        assert_eq!(word(&mut cmos, 0x17), 0xFFFF);
        assert_eq!(word(&mut cmos, 0x34), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
        assert_eq!(word(&mut cmos, 0x5B), ((3u64 << 30) >> 16) as u16);
        assert_eq!(get(&mut cmos, REGISTER_A) & A_UPDATING, 0);
        let year = get(&mut cmos, YEAR);
        for index in 0..=0xFF {
            cmos.write(0, &[index, 0xAB]);
        }
        assert_eq!(get(&mut cmos, YEAR), if get(&mut cmos, REGISTER_B) == 0xAB { year } else { 0 });
        assert_eq!(get(&mut cmos, REGISTER_A) & A_UPDATING, 0);
        assert_eq!((get(&mut cmos, REGISTER_C), get(&mut cmos, REGISTER_D)), (0, D_VALID));
        assert_eq!(get(&mut cmos, 0x70), 0xAB);
    }

    #[test]
    fn index_and_ram_go_over() {
        let mut cmos = Cmos::new(512 << 20);
        cmos.write(0, &[0x40, 0x77]);
        let mut restored = Cmos::restore(cmos.save().unwrap(), ()).unwrap();
        let mut byte = [0];
        restored.read(1, &mut byte);
        assert_eq!(byte, [0x77]);
        assert_eq!(restored.ram, cmos.ram);
        let state = CmosState { index: 0, ram: vec![0; 5] };
        assert!(Cmos::restore(Saved { state, handles: NoHandles }, ()).is_err());
    }
}
