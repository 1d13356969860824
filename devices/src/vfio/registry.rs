//! All containers and groups of a VM: who shares what, and the steps of an update over all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use theseus_resources::alloc::Windows;
use theseus_resources::fd_store::Claims;
use theseus_resources::state::Format;
use theseus_resources::survivor::look;
use theseus_resources::{FdStore, StoredFd};

use super::container::{Container, ContainerError, ContainerState, DmaMap, MapSource, RamRange};
use super::device::VfioDevice;
use super::group::{Group, GroupError, GroupState};
use super::invalidate::{InvalidateError, Invalidated, invalidate_all};
use super::pci::VfioPci;
use super::wiring::{PassthroughError, Wiring};
use crate::migratable::{Migratable, MigrateError};
use crate::pci::regs::{COMMAND, DISABLE_INTX, INTERRUPT_PIN};
use crate::turn::Turn;

/// The container of devices that name none.
pub const DEFAULT_CONTAINER: &str = "default";

/// A device to pass through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// In sysfs, e.g. `/sys/bus/pci/devices/0000:01:00.0`.
    pub path: PathBuf,
    pub id: String,
    pub container: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("device '{id}' ({}): {reason}", path.display())]
pub struct AttachError {
    id: String,
    path: PathBuf,
    reason: Box<AttachReason>,
}

#[derive(Debug, thiserror::Error)]
pub enum AttachReason {
    #[error("there is no such PCI device on this host: lspci -D lists those that there are")]
    Absent,
    #[error("not a PCI device in sysfs: {0}")]
    Path(std::io::Error),
    #[error("it has no IOMMU group: is the IOMMU enabled (intel_iommu=on or amd_iommu=on)? {0}")]
    NoGroup(std::io::Error),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Device(#[from] PassthroughError),
}

#[derive(Default)]
struct Inner {
    containers: Vec<Arc<Container>>,
    groups: Vec<Arc<Group>>,
    ram: Vec<RamRange>,
}

/// See the module.
pub struct Passthrough {
    fd_store: FdStore,
    inner: Mutex<Inner>,
}

/// Saved state of [`Passthrough`]: containers with what is mapped in them, and groups.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PassthroughState {
    containers: Vec<ContainerState>,
    groups: Vec<GroupState>,
}

impl Passthrough {
    pub fn new(fd_store: FdStore) -> Self {
        Self { fd_store, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Containers and groups enter the lists whole, so a panic elsewhere does not spoil them.
        self.inner.lock()
    }

    /// Lets all devices reach the guest's RAM: those there are, and those that are attached later. Call it once, at
    /// boot.
    ///
    /// # Safety
    /// The ranges must be guest RAM, shared with the guest, mapped for as long as a device is attached.
    pub unsafe fn map_ram(&self, ram: &[RamRange]) -> Result<(), ContainerError> {
        let mut inner = self.lock();
        for container in &inner.containers {
            // SAFETY: the caller's promise.
            unsafe { map_ranges(container, ram) }?;
        }
        inner.ram.extend_from_slice(ram);
        Ok(())
    }

    /// Opens the device, and its group and container if nobody has yet. It is reset. Add [`Passthrough::group_fds`] to
    /// KVM afterwards (before, the first VM would be kept alive by the device).
    pub fn attach(
        &self,
        config: &DeviceConfig,
        wiring: Wiring,
        windows: &mut Windows,
    ) -> Result<Arc<Turn<VfioPci>>, AttachError> {
        let mut inner = self.lock();
        let device = self.open(&mut inner, config, wiring, windows);
        inner.prune();
        device.map_err(|reason| AttachError {
            id: config.id.clone(),
            path: config.path.clone(),
            reason: Box::new(reason),
        })
    }

    fn open(
        &self,
        inner: &mut Inner,
        config: &DeviceConfig,
        wiring: Wiring,
        windows: &mut Windows,
    ) -> Result<Arc<Turn<VfioPci>>, AttachReason> {
        let (bdf, number) = identify(&config.path)?;
        let name = config.container.as_deref().unwrap_or(DEFAULT_CONTAINER);
        let group = match inner.groups.iter().find(|group| group.number() == number) {
            Some(group) if group.container().name() == name => group.clone(),
            Some(group) => {
                let (is, wanted) = (group.container().name().to_owned(), name.to_owned());
                return Err(GroupError::OtherContainer { number, is, wanted }.into());
            }
            None => {
                let group = self.open_group(inner, number, name)?;
                inner.groups.push(group.clone());
                group
            }
        };
        let fd = group.open_device(&bdf)?;
        let device = VfioDevice::new(&self.fd_store, &bdf, fd).map_err(PassthroughError::from)?;
        let device = VfioPci::new(&config.id, device, group, wiring, windows)?;
        if can_storm(&config.path) {
            log::warn!(
                "device '{}': it cannot be kept from asserting INTx (it knows no DisINTx): while the guest has its MSI-X off it can make the \
                 host switch off an interrupt line that it shares",
                config.id
            );
        }
        Ok(Arc::new(Turn::new(device)))
    }

    fn open_group(&self, inner: &mut Inner, number: u32, name: &str) -> Result<Arc<Group>, AttachReason> {
        if let Some(container) = inner.containers.iter().find(|container| container.name() == name) {
            return Ok(Arc::new(Group::open(&self.fd_store, number, container.clone())?));
        }
        let container = Arc::new(Container::open(&self.fd_store, name)?);
        let group = Arc::new(Group::open(&self.fd_store, number, container.clone())?);
        container.set_iommu()?;
        // SAFETY: what map_ram was promised.
        unsafe { map_ranges(&container, &inner.ram) }?;
        inner.containers.push(container);
        Ok(group)
    }

    /// A container over `type1` with group 7 in it, without a kernel.
    #[cfg(test)]
    pub(super) fn with(fd_store: &FdStore, type1: Box<dyn super::container::Type1>) -> Self {
        use theseus_resources::FdKind;
        let fd = || rustix::fs::memfd_create("vfio", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let container_fd = fd_store.keep("container", FdKind::VfioContainer, fd());
        let container = Arc::new(Container::with(DEFAULT_CONTAINER, container_fd, type1));
        let group = Group::with(7, fd_store.keep("group 7", FdKind::VfioGroup, fd()), container.clone());
        let inner = Inner { containers: vec![container], groups: vec![Arc::new(group)], ram: Vec::new() };
        Self { fd_store: fd_store.clone(), inner: Mutex::new(inner) }
    }

    /// Closes groups and containers that no device uses any more; call it after a device was released and dropped.
    pub fn prune(&self) {
        self.lock().prune();
    }

    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().containers.clone()
    }

    pub fn group(&self, number: u32) -> Option<Arc<Group>> {
        self.lock().groups.iter().find(|group| group.number() == number).cloned()
    }

    /// The groups' fds, for KVM_DEV_VFIO_FILE_ADD.
    pub fn group_fds(&self) -> Vec<StoredFd> {
        self.lock().groups.iter().map(|group| group.fd().clone()).collect()
    }

    /// Why an update is not possible: every reason there is.
    pub fn probe(&self) -> Vec<String> {
        self.containers().iter().flat_map(|container| container.probe()).collect()
    }

    /// Makes way for the next image's addresses in all containers, or in none.
    pub fn invalidate(&self) -> Result<Invalidated, InvalidateError> {
        invalidate_all(&self.containers())
    }

    /// In a new image: gives every mapping of every container its address here.
    /// `bar_vaddr(device, region, offset, size)` is [`VfioPci::bar_vaddr`] of the device with that id. May be called
    /// again after a failure.
    ///
    /// # Safety
    /// `ram` must be mapped from the same memory as in the image that mapped it first, at the same guest addresses.
    pub unsafe fn remap(
        &self,
        ram: &[RamRange],
        bar_vaddr: impl Fn(&str, u32, u64, u64) -> Option<u64>,
    ) -> Result<(), ContainerError> {
        let mut inner = self.lock();
        let vaddr_of = |map: &DmaMap| match &map.source {
            MapSource::Ram => ram.iter().find_map(|range| range.hva_of(map.iova, map.size)),
            MapSource::Bar { device, region, offset } => bar_vaddr(device, *region, *offset, map.size),
        };
        for container in &inner.containers {
            // SAFETY: the caller's promise; the BAR mappings are of the same device fds.
            unsafe { container.remap(vaddr_of) }?;
        }
        inner.ram = ram.to_vec();
        Ok(())
    }

    /// Takes a later state of the same guest: what is mapped may have changed.
    pub fn mend(&self, state: PassthroughState) -> Result<(), MigrateError> {
        let PassthroughState { containers, groups } = state;
        let inner = self.lock();
        let same_number = containers.len() == inner.containers.len() && groups.len() == inner.groups.len();
        let is_same = same_number
            && inner.groups.iter().zip(&groups).all(|(group, state)| group.is(state))
            && inner.containers.iter().zip(containers).all(|(container, state)| container.mend(state));
        let other = || MigrateError::State("containers or groups are others than those that were made ready".into());
        is_same.then_some(()).ok_or_else(other)
    }

    /// The orderly end, after the devices were released: nothing stays mapped.
    pub fn release(&self) {
        for container in self.containers() {
            for map in container.maps() {
                if let Err(e) = container.unmap(map.iova) {
                    log::warn!("{e}");
                }
            }
        }
    }
}

impl Inner {
    fn prune(&mut self) {
        self.groups.retain(|group| Arc::strong_count(group) > 1);
        self.containers.retain(|container| Arc::strong_count(container) > 1);
    }
}

impl Migratable for Passthrough {
    const FORMAT: Format = Format::new("vfio", 1);
    type State = PassthroughState;
    type Parts<'a> = (FdStore, &'a mut Claims);

    fn save(&self) -> Result<PassthroughState, MigrateError> {
        let Self { fd_store: _, inner } = self;
        // `ram` is this image's addresses: the next one gives its own at remap.
        let Inner { containers, groups, ram: _ } = &*look(inner);
        Ok(PassthroughState {
            containers: containers.iter().map(|container| container.save()).collect(),
            groups: groups.iter().map(|group| group.save()).collect(),
        })
    }

    /// Touches nothing in the kernel. Restore the devices next, then [`Passthrough::remap`].
    fn upgrade(_: u16, state: Self::State) -> Result<Self::State, MigrateError> {
        Ok(state)
    }

    fn restore(state: PassthroughState, (fd_store, claims): Self::Parts<'_>) -> Result<Self, MigrateError> {
        let PassthroughState { containers, groups } = state;
        let mut inner = Inner::default();
        for state in containers {
            let container = Container::restore(state, claims).map_err(|e| MigrateError::State(e.to_string()))?;
            inner.containers.push(Arc::new(container));
        }
        for state in groups {
            let find = |name: &str| inner.containers.iter().find(|container| container.name() == name).cloned();
            let group = Group::restore(state, claims, find).map_err(|e| MigrateError::State(e.to_string()))?;
            inner.groups.push(Arc::new(group));
        }
        Ok(Self { fd_store, inner: Mutex::new(inner) })
    }
}

/// # Safety
/// As [`Passthrough::map_ram`].
unsafe fn map_ranges(container: &Container, ram: &[RamRange]) -> Result<(), ContainerError> {
    for range in ram {
        // SAFETY: the caller's promise.
        unsafe { container.map(range.gpa, range.size, range.hva, MapSource::Ram) }?;
    }
    Ok(())
}

/// The PCI address and the IOMMU group of a device in sysfs.
fn identify(path: &Path) -> Result<(String, u32), AttachReason> {
    let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidInput, what.to_owned());
    let real = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => AttachReason::Absent,
        _ => AttachReason::Path(error),
    })?;
    let bdf = real.file_name().and_then(|name| name.to_str());
    let bdf = bdf.ok_or_else(|| AttachReason::Path(invalid("the path has no last component")))?;
    let group = std::fs::read_link(real.join("iommu_group")).map_err(AttachReason::NoGroup)?;
    let number = group.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let number = number.ok_or_else(|| AttachReason::NoGroup(invalid("iommu_group is not a number")))?;
    Ok((bdf.to_owned(), number))
}

/// Whether a device has an interrupt pin and has not taken DisINTx, which is of PCI 2.3. sysfs shows the physical
/// registers.
fn can_storm(path: &Path) -> bool {
    let Ok(config) = std::fs::read(path.join("config")) else { return false };
    let byte = |at: u16| config.get(usize::from(at)).copied();
    byte(INTERRUPT_PIN).is_some_and(|pin| pin != 0) && byte(COMMAND + 1).is_some_and(|high| high & DISABLE_INTX == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysfs_paths() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("0000:01:00.0");
        std::fs::create_dir(&device).unwrap();
        assert!(matches!(identify(&device), Err(AttachReason::NoGroup(_))));
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/12", device.join("iommu_group")).unwrap();
        let link = dir.path().join("nic");
        std::os::unix::fs::symlink(&device, &link).unwrap();
        assert_eq!(identify(&link).unwrap(), ("0000:01:00.0".to_owned(), 12));
        assert!(matches!(identify(&dir.path().join("none")), Err(AttachReason::Absent)));
        assert!(matches!(identify(&device.join("iommu_group/x")), Err(AttachReason::Absent)));
    }

    #[test]
    fn a_device_that_does_not_take_the_bit_can_storm() {
        let dir = tempfile::tempdir().unwrap();
        let with = |pin: u8, high: u8| {
            let mut config = [0; 64];
            (config[0x3D], config[5]) = (pin, high);
            std::fs::write(dir.path().join("config"), config).unwrap();
            can_storm(dir.path())
        };
        assert_eq!([with(1, 0), with(1, 4), with(0, 0)], [true, false, false]);
    }

    #[test]
    fn ram_is_found_by_guest_address() {
        let range = RamRange { gpa: 0x1000, size: 0x3000, hva: 0x7000_0000 };
        assert_eq!(range.hva_of(0x2000, 0x2000), Some(0x7000_1000));
        assert_eq!(range.hva_of(0x2000, 0x2001), None);
        assert_eq!(range.hva_of(0, 0x1000), None);
        assert_eq!(range.hva_of(0x1000, u64::MAX), None);
    }
}
