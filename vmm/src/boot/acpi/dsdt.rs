//! The DSDT: the devices that a guest cannot find by itself.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use theseus_resources::layout;

use super::{GED_POWER_BUTTON, GED_STATUS_PORT, SLEEP_TYPE_S5};
use crate::boot::{BootError, MAX_VCPUS, MachineShape};

/// "Press" of a control method power button (ACPI 6.5, table 5.140).
const NOTIFY_POWER_BUTTON: u8 = 0x80;

pub fn definition_block(machine: &MachineShape) -> Result<Vec<u8>, BootError> {
    let mut aml = Vec::new();
    // Only the first element counts with a sleep control register; ACPICA wants two integers.
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);

    let window64 = pci_window64(machine)?;
    let pci = PciHostBridge { window64 };
    let processors: Vec<Processor> =
        (0..machine.vcpus.min(MAX_VCPUS)).map(|uid| Processor { uid: uid as u8 }).collect();
    let mut devices: Vec<&dyn Aml> = vec![&Motherboard, &pci, &Rtc, &PowerButton, &GenericEventDevice];
    if machine.serial {
        devices.push(&Serial);
    }
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(&mut aml);
    Ok(aml)
}

/// First and last address of the window; none if it is empty.
fn pci_window64(machine: &MachineShape) -> Result<Option<(u64, u64)>, BootError> {
    let window = &machine.pci_window64;
    let ram_end = layout::ram_regions(machine.ram_size).last().map_or(0, |(addr, size)| addr + size);
    match window.end.checked_sub(1) {
        Some(last) if window.start < window.end => {
            if window.start < ram_end.max(layout::HIGH_RAM_START) {
                return Err(BootError::Describe { what: "a 64-bit PCI window that overlaps RAM or lies below 4 GiB" });
            }
            Ok(Some((window.start, last)))
        }
        _ => Ok(None),
    }
}

struct PciHostBridge {
    window64: Option<(u64, u64)>,
}

impl Aml for PciHostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let io = layout::PCI_IO_WINDOW;
        let window32 = layout::PCI_WINDOW32;
        // Not prefetchable: only then may Linux put both kinds of BARs into it.
        let memory = AddressSpaceCacheable::NotCacheable;
        let bus = AddressSpace::<u16>::new_bus_number(0, 0);
        let config = IO::new(layout::PCI_CONFIG_ADDRESS, layout::PCI_CONFIG_ADDRESS, 1, 8);
        let io = AddressSpace::<u16>::new_io(io.start, io.end - 1, None);
        let low = AddressSpace::<u32>::new_memory(memory, true, window32.start as u32, (window32.end - 1) as u32, None);
        let high = self.window64.map(|(first, last)| AddressSpace::<u64>::new_memory(memory, true, first, last, None));

        let mut resources: Vec<&dyn Aml> = vec![&bus, &config, &io, &low];
        resources.extend(high.iter().map(|high| high as &dyn Aml));
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Reserves what belongs to no device: the ECAM, without which Linux ignores the MCFG, and the power management ports.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam = Memory32Fixed::new(true, layout::ECAM_BASE as u32, layout::ECAM_SIZE as u32);
        let pm = IO::new(layout::PM_BASE, layout::PM_BASE, 1, layout::PM_SIZE as u8);
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &pm])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
        let interrupt = edge_interrupt(layout::SERIAL_GSI);
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ONE),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Without an interrupt: the clock has no alarm, and Linux then takes the RTC as one that only tells the time.
struct Rtc;

impl Aml for Rtc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = IO::new(layout::CMOS_PORT, layout::CMOS_PORT, 1, 2);
        Device::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(sink);
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
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                &OpRegion::new("GSTR".into(), OpRegionSpace::SystemIO, &GED_STATUS_PORT, &ONE),
                &status,
                &Method::new("_EVT".into(), 1, true, vec![&read_status, &If::new(&pressed, vec![&notify])]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct Processor {
    /// As in the MADT.
    uid: u8,
}

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let name = format!("C0{:02X}", self.uid);
        Device::new(
            name.as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &self.uid)],
        )
        .to_aml_bytes(sink);
    }
}

/// Edge-triggered, active-high, exclusive: a pulse of an irqfd is one interrupt.
fn edge_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}
