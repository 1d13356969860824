//! A VFIO group: the devices that the IOMMU cannot tell apart, which go to one owner together.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use theseus_resources::fd_store::{Claims, FdStoreError};
use theseus_resources::{FdKind, FdStore, StoredFd};
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

use super::dma::DmaDomain;
use super::ioctl;
use super::saved::GroupHandles;
use super::sysfs::driver;

const HOW_TO_BIND: &str = "modprobe vfio-pci; then, for each device, write vfio-pci into its driver_override, its \
     address into driver/unbind if it has a driver (both in /sys/bus/pci/devices/ADDRESS), and its address into \
     /sys/bus/pci/drivers_probe";

fn how_to_bind(driver: &str) -> String {
    if driver == "vfio-pci" { String::new() } else { format!(": {HOW_TO_BIND}") }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum GroupError {
    #[error("group {number}: /dev/vfio/{number} is busy: is another VMM using it?")]
    Busy { number: u32 },
    #[error(
        "group {number}: /dev/vfio/{number} does not exist: none of its devices is bound to vfio-pci: {devices}: \
         {HOW_TO_BIND}"
    )]
    Absent { number: u32, devices: String },
    #[error(
        "group {number}: not viable: all devices of the group have to be bound to vfio-pci: {devices}: {HOW_TO_BIND}"
    )]
    NotViable { number: u32, devices: String },
    #[error("group {number}: cannot open device {bdf}, whose driver is {driver}: {source}{}", how_to_bind(driver))]
    Device { number: u32, bdf: String, driver: String, source: io::Error },
    #[error("group {number}: {what}: {source}")]
    Os { number: u32, what: String, source: io::Error },
    #[error(
        "group {number}: it is in container '{is}', and a group cannot be in '{wanted}' too: name the same container \
         for all its devices"
    )]
    OtherContainer { number: u32, is: String, wanted: String },
    #[error("group {number}: its saved state is wrong: {source}")]
    FdStore { number: u32, source: FdStoreError },
    #[error("group {number}: its saved state names container '{container}', which is not there")]
    NoContainer { number: u32, container: String },
}

/// See the module. A group can be opened only once at a time, so its fd is what survives. Dropping it only closes the
/// fd.
pub struct Group {
    number: u32,
    fd: StoredFd,
    domain: Arc<dyn DmaDomain>,
}

/// A VMM that was killed gives its devices back when they are reset, which takes some 100 ms: whoever is started in its
/// place waits for that.
const FREE_WITHIN: Duration = Duration::from_secs(1);

fn open_when_free(path: &str) -> io::Result<File> {
    let until = Instant::now() + FREE_WITHIN;
    loop {
        match File::options().read(true).write(true).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

impl Group {
    /// Opens the group and puts it into `domain`.
    pub(super) fn open(fd_store: &FdStore, number: u32, domain: Arc<dyn DmaDomain>) -> Result<Self, GroupError> {
        let file = open_when_free(&format!("/dev/vfio/{number}"));
        let file = file.map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => GroupError::Busy { number },
            Some(libc::ENOENT) => GroupError::Absent { number, devices: devices(number) },
            _ => GroupError::Os { number, what: format!("cannot open /dev/vfio/{number}"), source },
        })?;
        let fd = fd_store.keep(format!("group {number}"), FdKind::VfioGroup, OwnedFd::from(file));
        let os = |what: &str, source| GroupError::Os { number, what: what.to_owned(), source };
        let flags = ioctl::group_status(fd.as_fd()).map_err(|e| os("VFIO_GROUP_GET_STATUS", e))?;
        if flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(GroupError::NotViable { number, devices: devices(number) });
        }
        ioctl::set_container(fd.as_fd(), domain.fd().as_fd())
            .map_err(|e| os(&format!("cannot join {}", domain.describe()), e))?;
        Ok(Self { number, fd, domain })
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn domain(&self) -> &Arc<dyn DmaDomain> {
        &self.domain
    }

    /// For KVM_DEV_VFIO_FILE_ADD, after the group's devices are open.
    pub fn fd(&self) -> &StoredFd {
        &self.fd
    }

    /// Opens a device of the group by its PCI address.
    pub(super) fn open_device(&self, bdf: &str) -> Result<OwnedFd, GroupError> {
        let os = |source| {
            let driver = driver(&PathBuf::from(format!("/sys/bus/pci/devices/{bdf}")));
            GroupError::Device { number: self.number, bdf: bdf.to_owned(), driver, source }
        };
        let name = CString::new(bdf).map_err(|e| os(e.into()))?;
        ioctl::device_fd(self.fd.as_fd(), &name).map_err(os)
    }

    #[cfg(any(test, feature = "fakes"))]
    pub(super) fn with(number: u32, fd: StoredFd, domain: Arc<dyn DmaDomain>) -> Self {
        Self { number, fd, domain }
    }

    pub(super) fn save(&self) -> GroupHandles {
        let Self { number, fd, domain } = self;
        GroupHandles { number: *number, fd: fd.slot(), container: domain.name().to_owned() }
    }

    /// Whether `later` are handles of the same group.
    pub(super) fn is(&self, later: &GroupHandles) -> bool {
        let GroupHandles { number, fd, container } = later;
        (*number, *fd, &container[..]) == (self.number, self.fd.slot(), self.domain.name())
    }

    /// Touches nothing in the kernel: the group is in use.
    pub(super) fn restore(
        handles: GroupHandles,
        claims: &mut Claims,
        find: impl Fn(&str) -> Option<Arc<dyn DmaDomain>>,
    ) -> Result<Self, GroupError> {
        let GroupHandles { number, fd, container } = handles;
        let domain = find(&container).ok_or(GroupError::NoContainer { number, container })?;
        let fd = claims.claim(fd, FdKind::VfioGroup).map_err(|source| GroupError::FdStore { number, source })?;
        Ok(Self { number, fd, domain })
    }
}

/// "0000:01:00.0 (igb), 0000:01:00.1 (none)"
fn devices(group: u32) -> String {
    let dir = PathBuf::from(format!("/sys/kernel/iommu_groups/{group}/devices"));
    let Ok(entries) = std::fs::read_dir(&dir) else { return format!("see {}", dir.display()) };
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| format!("{} ({})", entry.file_name().to_string_lossy(), driver(&entry.path())))
        .collect();
    names.sort();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let text = GroupError::Absent { number: 12, devices: "0000:01:00.0 (igb)".into() }.to_string();
        assert!(text.contains("0000:01:00.0 (igb)") && text.contains("driver_override"), "{text}");
    }
}
