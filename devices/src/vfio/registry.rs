//! All DMA domains and groups of a VM: who shares what, and the steps of an update over all of them.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use theseus_resources::alloc::Windows;
use theseus_resources::fd_store::Claims;
use theseus_resources::memory_listener::{MemoryError, MemoryListeners};
use theseus_resources::survivor::look;
use theseus_resources::{FdStore, StoredFd};

use super::device::VfioDevice;
use super::dma::type1::Container;
use super::dma::{DmaDomain, DmaError};
use super::group::{Group, GroupError};
use super::pci::VfioPci;
use super::saved::{DomainHandles, PassthroughHandles};
use super::sysfs::{SysfsError, can_storm, identify};
use super::wiring::{PassthroughError, Wiring};
use crate::migratable::MigrateError;
use crate::turn::Turn;

/// The container of devices that name none.
pub(super) const DEFAULT_CONTAINER: &str = "default";

/// A device to pass through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// In sysfs, e.g. `/sys/bus/pci/devices/0000:01:00.0`.
    pub path: PathBuf,
    /// Its name in this VM: no two devices have one.
    pub id: String,
    /// Devices that name the same one share a DMA domain. None: "default".
    pub container: Option<String>,
}

/// Why a device cannot be passed through. Nothing of it stays open.
#[derive(Debug, thiserror::Error)]
#[error("device '{id}' ({}): {reason}", path.display())]
pub struct AttachError {
    id: String,
    path: PathBuf,
    reason: Box<AttachReason>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum AttachReason {
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    #[error(transparent)]
    Dma(#[from] DmaError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Device(#[from] PassthroughError),
}

#[derive(Default)]
struct Inner {
    domains: Vec<Arc<dyn DmaDomain>>,
    groups: Vec<Arc<Group>>,
}

/// See the module.
pub struct Passthrough {
    fd_store: FdStore,
    /// Each domain is one of these as long as it is here.
    memory: Arc<MemoryListeners>,
    inner: Mutex<Inner>,
}

impl Passthrough {
    /// `memory`: the guest's RAM, which all devices may reach, those too that are attached later.
    pub fn new(fd_store: FdStore, memory: Arc<MemoryListeners>) -> Self {
        Self { fd_store, memory, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Containers and groups enter the lists whole, so a panic elsewhere does not spoil them.
        self.inner.lock()
    }

    /// Opens the device, and its group and container if nobody has yet. It is reset. Add [`Passthrough::group_fds`] to
    /// KVM afterwards (before, the first VM would be kept alive by the device).
    ///
    /// # Errors
    /// With the remedy: the group is not bound to vfio-pci or is another VMM's, the device has no MSI-X, its BARs have
    /// no room. What was opened for it is closed again, and `windows` are as before.
    pub fn attach(
        &self,
        config: &DeviceConfig,
        wiring: Wiring,
        windows: &mut Windows,
    ) -> Result<Arc<Turn<VfioPci>>, AttachError> {
        let mut inner = self.lock();
        let device = self.open(&mut inner, config, wiring, windows);
        inner.prune(&self.memory);
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
            Some(group) if group.domain().name() == name => group.clone(),
            Some(group) => {
                let (is, wanted) = (group.domain().name().to_owned(), name.to_owned());
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
                "device '{}': it cannot be kept from asserting INTx (it knows no DisINTx): while the guest has its \
                 MSI-X off it can make the host switch off an interrupt line that it shares",
                config.id
            );
        }
        Ok(Arc::new(Turn::new(device)))
    }

    fn open_group(&self, inner: &mut Inner, number: u32, name: &str) -> Result<Arc<Group>, AttachReason> {
        if let Some(domain) = inner.domains.iter().find(|domain| domain.name() == name) {
            return Ok(Arc::new(Group::open(&self.fd_store, number, domain.clone())?));
        }
        let container = Arc::new(Container::open(&self.fd_store, name)?);
        let group = Arc::new(Group::open(&self.fd_store, number, container.clone())?);
        container.set_iommu()?;
        self.memory.subscribe(container.clone())?;
        inner.domains.push(container);
        Ok(group)
    }

    /// With group 7 in `domain`, without a kernel.
    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn with(fd_store: &FdStore, domain: Arc<dyn DmaDomain>) -> Self {
        use theseus_resources::FdKind;
        let fd = || rustix::fs::memfd_create("vfio", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let group = Group::with(7, fd_store.keep("group 7", FdKind::VfioGroup, fd()), domain.clone());
        let memory = Arc::new(MemoryListeners::new());
        memory.subscribe_told(domain.clone());
        let inner = Inner { domains: vec![domain], groups: vec![Arc::new(group)] };
        Self { fd_store: fd_store.clone(), memory, inner: Mutex::new(inner) }
    }

    /// Closes groups and containers that no device uses any more; call it after a device was released and dropped.
    pub fn prune(&self) {
        self.lock().prune(&self.memory);
    }

    /// In the order in which they were opened.
    pub fn domains(&self) -> Vec<Arc<dyn DmaDomain>> {
        self.lock().domains.clone()
    }

    /// By the number of its IOMMU group on the host; None: no device of it was attached.
    pub fn group(&self, number: u32) -> Option<Arc<Group>> {
        self.lock().groups.iter().find(|group| group.number() == number).cloned()
    }

    /// The groups' fds, for KVM_DEV_VFIO_FILE_ADD.
    pub fn group_fds(&self) -> Vec<StoredFd> {
        self.lock().groups.iter().map(|group| group.fd().clone()).collect()
    }

    /// Why an update is not possible: every reason there is.
    pub fn blockers(&self) -> Vec<String> {
        self.domains().iter().flat_map(|domain| domain.blockers()).collect()
    }

    /// Takes later handles of the same guest: what is mapped may have changed.
    ///
    /// # Errors
    /// They name other containers or groups. Some containers may have taken theirs: this is of no use then.
    pub fn mend(&self, later: PassthroughHandles) -> Result<(), MigrateError> {
        let PassthroughHandles { containers, groups } = later;
        let inner = self.lock();
        let same_number = containers.len() == inner.domains.len() && groups.len() == inner.groups.len();
        let domains = containers.into_iter().map(DomainHandles::Type1);
        let is_same = same_number
            && inner.groups.iter().zip(&groups).all(|(group, later)| group.is(later))
            && inner.domains.iter().zip(domains).all(|(domain, later)| domain.mend(later));
        let other = || MigrateError::State("containers or groups are others than those that were made ready".into());
        is_same.then_some(()).ok_or_else(other)
    }

    /// The orderly end, after the devices were released: nothing stays mapped.
    pub fn release(&self) {
        for domain in self.domains() {
            self.memory.unsubscribe(&*domain);
            for map in domain.maps() {
                if let Err(e) = domain.unmap(map.iova) {
                    log::warn!("{e}");
                }
            }
        }
    }
}

/// Fds are closed with it, and what is mapped stays while another VMM has them.
impl Drop for Passthrough {
    fn drop(&mut self) {
        self.inner.get_mut().domains.iter().for_each(|domain| self.memory.unsubscribe(&**domain));
    }
}

impl Inner {
    fn prune(&mut self, memory: &MemoryListeners) {
        let Self { domains, groups } = self;
        groups.retain(|group| Arc::strong_count(group) > 1);
        domains.retain(|domain| {
            let is_used = groups.iter().any(|group| group.domain().name() == domain.name());
            if !is_used {
                memory.unsubscribe(&**domain);
            }
            is_used
        });
    }
}

/// The guest sees nothing of it, so it is all handles.
impl Passthrough {
    /// Pure.
    pub fn save(&self) -> PassthroughHandles {
        let Self { fd_store: _, memory: _, inner } = self;
        let Inner { domains, groups } = &*look(inner);
        let mut containers = Vec::new();
        for domain in domains {
            match domain.save() {
                DomainHandles::Type1(handles) => containers.push(handles),
            }
        }
        PassthroughHandles { containers, groups: groups.iter().map(|group| group.save()).collect() }
    }

    /// Touches nothing in the kernel. Restore the devices next, then [`super::remap_all`].
    ///
    /// # Errors
    /// An fd is not in the fd store, or a group's container is not in `handles`.
    pub fn restore(
        handles: PassthroughHandles,
        fd_store: FdStore,
        memory: Arc<MemoryListeners>,
        claims: &mut Claims,
    ) -> Result<Self, MigrateError> {
        let PassthroughHandles { containers, groups } = handles;
        let mut inner = Inner::default();
        for handles in containers {
            let container = Container::restore(handles, claims).map_err(|e| MigrateError::State(e.to_string()))?;
            inner.domains.push(Arc::new(container));
        }
        for handles in groups {
            let find = |name: &str| inner.domains.iter().find(|domain| domain.name() == name).cloned();
            let group = Group::restore(handles, claims, find).map_err(|e| MigrateError::State(e.to_string()))?;
            inner.groups.push(Arc::new(group));
        }
        // What is mapped in them was mapped by the VMM before.
        inner.domains.iter().for_each(|domain| memory.subscribe_told(domain.clone()));
        Ok(Self { fd_store, memory, inner: Mutex::new(inner) })
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
