//! Any bytes as a saved state. What is accepted says the same when it is written again, and the devices that come out
//! of it are as it says.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use theseus_devices::device::Buses;
use theseus_devices::migratable::{self, Handles, Migratable};
use theseus_devices::pci::PciDevice;
use theseus_devices::set::DecodedSet;
use theseus_devices::vfio::saved::PassthroughHandles;
use theseus_devices::vfio::{Passthrough, VfioPci, VfioPciParts, fake};
use theseus_resources::alloc::Windows;
use theseus_resources::fd_store::{Claims, Record};
use theseus_resources::state::checksum;
use theseus_resources::{FdStore, StateReader, StateWriter, layout};

use crate::devices::surrounded;

/// Of an envelope: magic, format, checksum, length.
pub const HEADER: usize = 24;

/// More than a guest has here; each is made.
const DESCRIPTORS_MAX: usize = 64;

/// Makes checksum and length right, or nothing would get past them.
pub fn with_header(state: &mut [u8]) {
    let Some((header, body)) = state.split_at_mut_checked(HEADER) else { return };
    header[12..16].copy_from_slice(&checksum(body).to_le_bytes());
    header[16..].copy_from_slice(&(body.len() as u64).to_le_bytes());
}

/// As much of the section `handover` as it takes to find descriptors.
#[derive(Deserialize)]
struct Handover {
    fd_store: Vec<Record>,
}

/// Descriptors of nothing in the place of those that the state names.
fn descriptors(reader: &StateReader<'_>) -> Option<(FdStore, Claims)> {
    let section = reader.sections().find(|section| section.name == "handover")?;
    let Handover { mut fd_store } = section.decode().ok()?;
    if fd_store.len() > DESCRIPTORS_MAX {
        return None;
    }
    fd_store.iter_mut().for_each(|record| record.identity = Default::default());
    let fds: Result<Vec<OwnedFd>, _> = fd_store.iter().map(|_| memfd_create("fuzz", MemfdFlags::CLOEXEC)).collect();
    let (store, mut claims) = (FdStore::new(), Claims::default());
    store.receive(&mut claims, fd_store, fds.ok()?).ok()?;
    Some((store, claims))
}

/// The emulated devices, if they can be made.
fn restore_emulated(state: &[u8]) -> Option<()> {
    let mut reader = StateReader::new(state).ok()?;
    let (fd_store, mut claims) = descriptors(&reader)?;
    let decoded = DecodedSet::decode(&mut reader).ok()?;
    let buses = Buses::empty();
    let set = surrounded(&fd_store, &buses.pci, |around| decoded.restore(around, &mut claims, buses.clone())).ok()?;
    set.resume();
    let ports = [(layout::SERIAL_PORT, 8), (layout::CMOS_PORT, 2), (layout::I8042_PORT, 5), (layout::PM_BASE, 8)];
    for (port, count) in ports {
        (port..port + count).for_each(|port| buses.pio.read(port.into(), &mut [0]));
    }
    buses.mmio.read(layout::ECAM_BASE, &mut [0; 8]);
    let mut writer = StateWriter::new("fuzz");
    set.save(&mut writer).expect("what was restored can be saved");
    Some(())
}

/// The passed-through ones, if they can be made.
fn restore_passed_through(state: &[u8]) -> Option<()> {
    let mut reader = StateReader::new(state).ok()?;
    let (fd_store, mut claims) = descriptors(&reader)?;
    let kind = VfioPci::FORMAT.kind;
    let names = reader.sections().filter(|section| section.kind == kind).map(|section| section.name.to_string());
    let names: Vec<_> = names.collect();
    let handles = PassthroughHandles::take(&mut reader, "vfio").ok()?;
    let passthrough = Passthrough::restore(handles, fd_store.clone(), Arc::default(), &mut claims).ok()?;
    let (wiring, _, _) = fake::wiring(&fd_store);
    let mut windows = Windows::new(1 << 30, 40);
    for name in names {
        let saved = migratable::take::<VfioPci>(&mut reader, &name).ok()?;
        let groups = &|number| passthrough.group(number);
        let parts = VfioPciParts { claims: &mut claims, groups, windows: &mut windows, wiring: wiring.clone() };
        let mut device = VfioPci::restore(saved, parts).ok()?;
        (0..0x100).step_by(4).for_each(|at| device.config_read(at, &mut [0; 4]));
        device.config_write(0x04, &[7, 0]);
        device.save().expect("what was restored can be saved");
    }
    Some(())
}

pub fn run(data: &[u8]) {
    let mut state = data.to_vec();
    with_header(&mut state);
    if theseus_vmm::check_state(&state).is_ok() {
        let again = theseus_vmm::reread_state(&state).expect("what is accepted can be written again");
        theseus_vmm::check_state(&again).expect("and is accepted again");
        assert!(theseus_vmm::reread_state(&again).is_ok_and(|last| last == again), "it says something else again");
    }
    let _ = (restore_emulated(&state), restore_passed_through(&state));
}
