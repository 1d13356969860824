//! The DSDT: the devices that a guest cannot find by itself. Most of it is what they say themselves.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
    ZERO,
};
use acpi_tables::{Aml, AmlSink};
use theseus_devices::legacy::pm::SLEEP_TYPE_S5;
use theseus_resources::layout;

use crate::boot::{BootError, MAX_VCPUS, MachineShape};

pub(super) fn definition_block(machine: &MachineShape) -> Result<Vec<u8>, BootError> {
    let mut aml = Vec::new();
    // Only the first element counts with a sleep control register; ACPICA wants two integers.
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);

    let window64 = pci_window64(machine)?;
    let pci = PciHostBridge { window64 };
    let processors: Vec<Processor> =
        (0..machine.vcpus.min(MAX_VCPUS)).map(|uid| Processor { uid: uid as u8 }).collect();
    let own = Encoded(&machine.devices);
    let mut devices: Vec<&dyn Aml> = vec![&Motherboard, &pci, &own];
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

/// What is AML already.
struct Encoded<'a>(&'a [u8]);

impl Aml for Encoded<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
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
