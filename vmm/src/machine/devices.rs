//! The devices of a machine that are always there: serial port, CMOS, reset, power management, PCI.

use std::sync::Arc;

use parking_lot::Mutex;
use theseus_api::types::{SerialConfig, SerialMode};
use theseus_devices::bus::{Bus, Target};
use theseus_devices::interrupt::GuestRequests;
use theseus_devices::legacy::cmos::Cmos;
use theseus_devices::legacy::i8042::I8042;
use theseus_devices::legacy::pm::{Pm, PmParts};
use theseus_devices::legacy::serial::{Console, ConsoleConfig, SerialDevice, SerialParts};
use theseus_devices::migratable::Migratable;
use theseus_devices::pci::bus::PciBus;
use theseus_devices::pci::config_access::PciConfigAccess;
use theseus_devices::pci::ecam::Ecam;
use theseus_devices::pci::host_bridge::HostBridge;
use theseus_devices::turn::Turn;
use theseus_hypervisor::Vm;
use theseus_resources::{Claims, FdStore, StateReader, StateWriter, layout};

use super::MachineError;
use super::glue::Pin;

/// Ports of the 8042: data at +0, command and status at +4.
const I8042_PORTS: u64 = 5;

pub struct Buses {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
}

impl Buses {
    pub fn new() -> Self {
        Self { pio: Arc::new(Bus::new("port")), mmio: Arc::new(Bus::new("MMIO")) }
    }
}

/// See the module. VFIO devices are beside it, in the machine.
pub struct Devices {
    pub serial: Option<Arc<Mutex<SerialDevice>>>,
    pub cmos: Arc<Mutex<Cmos>>,
    pub i8042: Arc<Mutex<I8042>>,
    pub pm: Arc<Mutex<Pm>>,
    pub config_access: Arc<PciConfigAccess>,
    pub host_bridge: Arc<Turn<HostBridge>>,
    pub pci: Arc<PciBus>,
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn console_config(config: &SerialConfig) -> Result<ConsoleConfig, MachineError> {
    let path = |path: &Option<std::path::PathBuf>| {
        path.clone().ok_or_else(|| MachineError::Config("serial: a path is missing".into()))
    };
    Ok(match config.mode {
        SerialMode::Off => ConsoleConfig::Off,
        SerialMode::Null => ConsoleConfig::Null,
        SerialMode::Tty => ConsoleConfig::Tty,
        SerialMode::Pty => ConsoleConfig::Pty,
        SerialMode::File => ConsoleConfig::File(path(&config.file)?),
        SerialMode::Socket => ConsoleConfig::Socket(path(&config.socket)?),
    })
}

impl Devices {
    /// At the guest's boot. `revision` is that of the host bridge.
    pub fn build(
        serial: &SerialConfig,
        ram_size: u64,
        revision: u8,
        vm: &Arc<Vm>,
        fd_store: &FdStore,
        requests: &Arc<dyn GuestRequests>,
    ) -> Result<Self, MachineError> {
        let console =
            Console::open(&console_config(serial)?, fd_store).map_err(|e| MachineError::Config(e.to_string()))?;
        let serial = console
            .map(|console| SerialDevice::new(console, pin(vm, layout::SERIAL_GSI)).map(shared))
            .transpose()
            .map_err(|e| MachineError::Config(format!("serial: {e}")))?;
        let pci = Arc::new(PciBus::new());
        Ok(Self {
            serial,
            cmos: shared(Cmos::new(ram_size)),
            i8042: shared(I8042::new(requests.clone())),
            pm: shared(Pm::new(requests.clone(), pin(vm, layout::GED_GSI))),
            config_access: Arc::new(PciConfigAccess::new(&pci)),
            host_bridge: Arc::new(Turn::new(HostBridge::new(revision))),
            pci,
        })
    }

    pub fn save(&self, writer: &mut StateWriter) -> Result<(), MachineError> {
        let Self { serial, cmos, i8042, pm, config_access, host_bridge, pci: _ } = self;
        if let Some(serial) = serial {
            save(writer, "serial", serial)?;
        }
        save(writer, "cmos", cmos)?;
        save(writer, "i8042", i8042)?;
        save(writer, "acpi-pm", pm)?;
        add(writer, "pci-config-access", &**config_access)?;
        add(writer, "pci-host-bridge", &*host_bridge.lock())
    }

    /// The IRQ chip must be restored before: pending interrupts are raised again.
    pub fn restore(state: DevicesState, pci: Arc<PciBus>, parts: RestoreParts<'_>) -> Result<Self, MachineError> {
        let DevicesState { serial, cmos, i8042, pm, config_access, host_bridge } = state;
        let RestoreParts { vm, fd_store, claims, requests } = parts;
        let serial = serial
            .map(|state| {
                SerialDevice::restore(state, SerialParts { irq: pin(vm, layout::SERIAL_GSI), claims, fd_store })
                    .map(shared)
            })
            .transpose()
            .map_err(device("serial"))?;
        let ged = pin(vm, layout::GED_GSI);
        Ok(Self {
            serial,
            cmos: shared(Cmos::restore(cmos, ()).map_err(device("cmos"))?),
            i8042: shared(I8042::restore(i8042, requests.clone()).map_err(device("i8042"))?),
            pm: shared(Pm::restore(pm, PmParts { requests: requests.clone(), ged }).map_err(device("acpi-pm"))?),
            config_access: PciConfigAccess::restore(config_access, &pci)
                .map(Arc::new)
                .map_err(device("pci-config-access"))?,
            host_bridge: HostBridge::restore(host_bridge, ())
                .map(|bridge| Arc::new(Turn::new(bridge)))
                .map_err(device("pci-host-bridge"))?,
            pci,
        })
    }

    /// Puts every device where the guest expects it.
    pub fn plug(&self, buses: &Buses) -> Result<(), MachineError> {
        let Self { serial, cmos, i8042, pm, config_access, host_bridge, pci } = self;
        if let Some(serial) = serial {
            plug(&buses.pio, layout::SERIAL_PORT.into(), 8, serial)?;
        }
        plug(&buses.pio, layout::CMOS_PORT.into(), 2, cmos)?;
        plug(&buses.pio, layout::I8042_PORT.into(), I8042_PORTS, i8042)?;
        plug(&buses.pio, layout::PM_BASE.into(), layout::PM_SIZE.into(), pm)?;
        plug(&buses.pio, layout::PCI_CONFIG_ADDRESS.into(), 8, config_access)?;
        plug(&buses.mmio, layout::ECAM_BASE, layout::ECAM_SIZE, &Arc::new(Ecam::new(pci)))?;
        pci.add(Some(0), host_bridge.clone()).map_err(|e| MachineError::Config(e.to_string()))?;
        Ok(())
    }
}

fn pin(vm: &Arc<Vm>, gsi: u32) -> Arc<Pin> {
    Arc::new(Pin { vm: vm.clone(), gsi })
}

fn plug<T: Target + 'static>(bus: &Bus, base: u64, len: u64, device: &Arc<T>) -> Result<(), MachineError> {
    Ok(bus.insert(base, len, device.clone())?)
}

fn device(name: &'static str) -> impl FnOnce(theseus_devices::migratable::MigrateError) -> MachineError {
    move |source| MachineError::Device { name: name.into(), source }
}

fn save<T: Migratable>(writer: &mut StateWriter, name: &'static str, carried: &Mutex<T>) -> Result<(), MachineError> {
    add(writer, name, &*carried.lock())
}

fn add<T: Migratable>(writer: &mut StateWriter, name: &'static str, carried: &T) -> Result<(), MachineError> {
    let state = carried.save().map_err(device(name))?;
    Ok(writer.add(name, T::KIND, T::VERSION, &state)?)
}

/// The decoded states; nothing is claimed or created yet.
pub struct DevicesState {
    serial: Option<<SerialDevice as Migratable>::State>,
    cmos: <Cmos as Migratable>::State,
    i8042: <I8042 as Migratable>::State,
    pm: <Pm as Migratable>::State,
    config_access: <PciConfigAccess as Migratable>::State,
    host_bridge: <HostBridge as Migratable>::State,
}

impl DevicesState {
    pub fn decode(reader: &mut StateReader<'_>, has_serial: bool) -> Result<Self, MachineError> {
        Ok(Self {
            serial: has_serial.then(|| take::<SerialDevice>(reader, "serial")).transpose()?,
            cmos: take::<Cmos>(reader, "cmos")?,
            i8042: take::<I8042>(reader, "i8042")?,
            pm: take::<Pm>(reader, "acpi-pm")?,
            config_access: take::<PciConfigAccess>(reader, "pci-config-access")?,
            host_bridge: take::<HostBridge>(reader, "pci-host-bridge")?,
        })
    }
}

fn take<T: Migratable>(reader: &mut StateReader<'_>, name: &str) -> Result<T::State, MachineError> {
    Ok(reader.take(name, T::KIND, T::VERSION)?)
}

pub struct RestoreParts<'a> {
    pub vm: &'a Arc<Vm>,
    pub fd_store: &'a FdStore,
    pub claims: &'a mut Claims,
    pub requests: &'a Arc<dyn GuestRequests>,
}
