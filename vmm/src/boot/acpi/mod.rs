//! The ACPI tables: a hardware-reduced platform (ACPI 6.5, 4.1), so no SCI, no GPE blocks, no legacy PIC or PIT. It has
//! a PM timer all the same: without PIT and HPET a guest that does not use kvmclock has nothing else to measure its TSC
//! by (pit_hpet_ptimer_calibrate_cpu).
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT
//!              -> MADT  local APICs, IOAPIC
//!              -> MCFG  ECAM of bus 0
//! ```

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use theseus_devices::legacy::pm::{self, RESET_VALUE};
use theseus_resources::layout;
use vm_memory::GuestMemoryMmap;

use super::{BootError, MachineShape, lowmem};

/// Of power management (ACPI 6.5, 4.8.3.7 and 4.8.3.8), one byte each; the timer's is four (4.8.3.3).
const SLEEP_CONTROL_PORT: u16 = layout::PM_BASE + pm::SLEEP_CONTROL as u16;
const SLEEP_STATUS_PORT: u16 = layout::PM_BASE + pm::SLEEP_STATUS as u16;
pub(crate) const RESET_PORT: u16 = layout::PM_BASE + pm::RESET as u16;
const PM_TIMER_PORT: u16 = layout::PM_BASE + pm::TIMER as u16;

const OEM_ID: [u8; 6] = *b"THESEU";
const OEM_TABLE_ID: [u8; 8] = *b"THESEUS ";
const OEM_REVISION: u32 = 1;
/// ACPI 6: integers of 64 bits in AML.
const DSDT_REVISION: u8 = 6;
const SDT_HEADER: u32 = 36;
const ALIGN: u64 = 16;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11). No 8042 is announced: probing for one would take the guest seconds.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// The links of passed-through devices are the host's.
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;

/// Writes the tables below 1 MiB and returns the address of the RSDP.
pub(crate) fn write_tables(mem: &GuestMemoryMmap, machine: &MachineShape) -> Result<u64, BootError> {
    let rsdp = lowmem::ACPI;
    let mut next = rsdp + Rsdp::len() as u64;
    let mut place = |table: &[u8]| {
        let addr = next.next_multiple_of(ALIGN);
        next = addr + table.len() as u64;
        if next > lowmem::RESET_VECTOR {
            let needed = (next - lowmem::ACPI) as usize;
            return Err(BootError::AcpiSpace { needed, available: (lowmem::RESET_VECTOR - lowmem::ACPI) as usize });
        }
        super::write(mem, table, addr).map(|()| addr)
    };

    let dsdt = place(&dsdt(machine)?)?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt(dsdt), madt(machine.vcpus), mcfg()] {
        xsdt.add_entry(place(&table)?);
    }
    let xsdt = place(&bytes(&xsdt))?;
    super::write(mem, &bytes(&Rsdp::new(OEM_ID, xsdt)), rsdp)?;
    Ok(rsdp)
}

fn dsdt(machine: &MachineShape) -> Result<Vec<u8>, BootError> {
    let mut table = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&dsdt::definition_block(machine)?);
    Ok(table.as_slice().to_vec())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // No fixed-hardware buttons, no fixed RTC wake-up: the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    fadt.iapc_boot_arch = (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM).into();
    fadt.reset_reg = io_register(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = io_register(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(SLEEP_STATUS_PORT);
    // Linux looks at the extended field (acpi_parse_fadt), others at both.
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, PM_TIMER_PORT.into());
    bytes(&fadt.finalize())
}

fn io_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// APIC id = processor UID = index of the vCPU. No interrupt source overrides: in the hardware-reduced model ISA
/// interrupts are GSIs like all others, edge-triggered and active-high as the DSDT says.
fn madt(vcpus: u32) -> Vec<u8> {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(layout::LAPIC_BASE as u32));
    for id in 0..vcpus.min(super::MAX_VCPUS) as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // The id only has to differ from those of the IOAPICs; KVM's IOAPIC starts with 0.
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, 0));
    bytes(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_BASE, 0, 0, 0);
    bytes(&mcfg)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use theseus_devices::device::{Buses, Surroundings};
    use theseus_devices::interrupt::{GuestRequest, GuestRequests, IrqLine};
    use theseus_devices::set::DeviceSet;
    use theseus_devices::spec::{ConsoleConfig, Spec};
    use theseus_resources::FdStore;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    struct Nobody;

    impl IrqLine for Nobody {
        fn pulse(&self) {}
    }

    impl GuestRequests for Nobody {
        fn notify(&self, _: GuestRequest) {}

        fn pending(&self) -> bool {
            false
        }
    }

    /// What a machine with all of them has.
    fn devices() -> Vec<u8> {
        let buses = Buses::empty();
        let requests: Arc<dyn GuestRequests> = Arc::new(Nobody);
        let (pin, fd_store) = (|_| -> Arc<dyn IrqLine> { Arc::new(Nobody) }, FdStore::new());
        let around = Surroundings { pin: &pin, requests: &requests, fd_store: &fd_store, pci: &buses.pci };
        let spec = Spec {
            ram_size: 6 << 30,
            console: ConsoleConfig::Null,
            revision: 0,
            #[cfg(feature = "test-hooks")]
            counting: false,
        };
        DeviceSet::boot(&spec, &around, buses.clone()).unwrap().describe()
    }

    fn read(mem: &GuestMemoryMmap, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(mem: &GuestMemoryMmap, addr: u64) -> Vec<u8> {
        let len: u32 = mem.read_obj(GuestAddress(addr + 4)).unwrap();
        let bytes = read(mem, addr, len as usize);
        assert_eq!(sum(&bytes), 0, "checksum of {:?}", String::from_utf8_lossy(&bytes[..4]));
        bytes
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn tables_are_found_from_the_rsdp() {
        for vcpus in [1, 64] {
            let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let machine =
                MachineShape { ram_size: 6 << 30, vcpus, pci_window64: 64 << 30..96 << 30, devices: devices() };
            let rsdp = read(&mem, write_tables(&mem, &machine).unwrap(), 36);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp), rsdp[15]), (0, 0, 2));

            let xsdt = table(&mem, u64_at(&rsdp, 24));
            let tables: Vec<_> = (36..xsdt.len()).step_by(8).map(|offset| table(&mem, u64_at(&xsdt, offset))).collect();
            let names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);

            let fadt = &tables[0];
            assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
            // Reset, sleep control and sleep status: GAS of one byte at a port.
            for (offset, port) in [(116, RESET_PORT), (244, SLEEP_CONTROL_PORT), (256, SLEEP_STATUS_PORT)] {
                assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
                assert_eq!(u64_at(fadt, offset + 4), u64::from(port));
            }
            assert_eq!(fadt[128], RESET_VALUE);
            // The PM timer: PM_TMR_BLK, PM_TMR_LEN, TMR_VAL_EXT of the flags, X_PM_TMR_BLK.
            assert_eq!((fadt[76..80].to_vec(), fadt[91], fadt[113] & 1), (vec![4, 6, 0, 0], 4, 1));
            assert_eq!((&fadt[208..212], u64_at(fadt, 212)), (&[1, 32, 0, 3][..], u64::from(PM_TIMER_PORT)));
            let dsdt = table(&mem, u64_at(fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");

            assert_eq!(tables[1].len(), 44 + 8 * vcpus as usize + 12);
            assert_eq!(u64_at(&tables[2], 44), layout::ECAM_BASE);
            assert_eq!(tables[2][52..56], [0, 0, 0, 0], "segment 0, buses 0 to 0");
        }
    }

    #[test]
    fn windows_that_cannot_be_described_are_refused() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let machine = MachineShape { ram_size: 1 << 30, vcpus: 1, pci_window64: 0..u64::MAX, devices: Vec::new() };
        assert!(write_tables(&mem, &machine).is_err());
    }

    /// `THESEUS_TABLES=DIR cargo test -- --ignored write_tables_to_files`, then `iasl -d DIR/*` shows them as a person
    /// reads them.
    #[test]
    #[ignore = "writes files for iasl"]
    fn write_tables_to_files() {
        let dir = std::path::PathBuf::from(std::env::var_os("THESEUS_TABLES").expect("THESEUS_TABLES names a folder"));
        let machine =
            MachineShape { ram_size: 6 << 30, vcpus: 4, pci_window64: 64 << 30..96 << 30, devices: devices() };
        let dsdt = dsdt(&machine).unwrap();
        for (name, table) in [("dsdt", dsdt), ("facp", fadt(lowmem::ACPI)), ("apic", madt(4)), ("mcfg", mcfg())] {
            std::fs::write(dir.join(name), table).unwrap();
        }
    }
}
