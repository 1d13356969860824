//! What sysfs says of a device of this host.

use std::path::Path;

use crate::pci::regs::{COMMAND, DISABLE_INTX, INTERRUPT_PIN};

#[derive(Debug, thiserror::Error)]
pub(super) enum SysfsError {
    #[error("there is no such PCI device on this host: lspci -D lists those that there are")]
    Absent,
    #[error("not a PCI device in sysfs: {0}")]
    Path(std::io::Error),
    #[error("it has no IOMMU group: is the IOMMU enabled (intel_iommu=on or amd_iommu=on)? {0}")]
    NoGroup(std::io::Error),
}

/// The PCI address and the IOMMU group of a device in sysfs.
pub(super) fn identify(path: &Path) -> Result<(String, u32), SysfsError> {
    let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidInput, what.to_owned());
    let real = path.canonicalize().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => SysfsError::Absent,
        _ => SysfsError::Path(error),
    })?;
    let bdf = real.file_name().and_then(|name| name.to_str());
    let bdf = bdf.ok_or_else(|| SysfsError::Path(invalid("the path has no last component")))?;
    let group = std::fs::read_link(real.join("iommu_group")).map_err(SysfsError::NoGroup)?;
    let number = group.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    let number = number.ok_or_else(|| SysfsError::NoGroup(invalid("iommu_group is not a number")))?;
    Ok((bdf.to_owned(), number))
}

/// Whether a device has an interrupt pin and has not taken DisINTx, which is of PCI 2.3. sysfs shows the physical
/// registers.
pub(super) fn can_storm(path: &Path) -> bool {
    let Ok(config) = std::fs::read(path.join("config")) else { return false };
    let byte = |at: u16| config.get(usize::from(at)).copied();
    byte(INTERRUPT_PIN).is_some_and(|pin| pin != 0) && byte(COMMAND + 1).is_some_and(|high| high & DISABLE_INTX == 0)
}

/// The driver of a device, or "none".
pub(super) fn driver(device: &Path) -> String {
    let link = std::fs::read_link(device.join("driver")).ok();
    link.as_deref().and_then(Path::file_name).map_or("none".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysfs_paths() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("0000:01:00.0");
        std::fs::create_dir(&device).unwrap();
        assert!(matches!(identify(&device), Err(SysfsError::NoGroup(_))));
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/12", device.join("iommu_group")).unwrap();
        let link = dir.path().join("nic");
        std::os::unix::fs::symlink(&device, &link).unwrap();
        assert_eq!(identify(&link).unwrap(), ("0000:01:00.0".to_owned(), 12));
        assert!(matches!(identify(&dir.path().join("none")), Err(SysfsError::Absent)));
        assert!(matches!(identify(&device.join("iommu_group/x")), Err(SysfsError::Absent)));
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
    fn the_driver_of_a_device() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(driver(dir.path()), "none");
        std::os::unix::fs::symlink("../../../bus/pci/drivers/igb", dir.path().join("driver")).unwrap();
        assert_eq!(driver(dir.path()), "igb");
    }
}
