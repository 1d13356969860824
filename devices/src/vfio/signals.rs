//! MSI-X of a device and of VFIO in line: VFIO signals the eventfds exactly while the guest has MSI-X on.
//!
//! The guest cannot be told of a failure: it sees MSI-X on, and no interrupt. So what the host refuses is tried again
//! at the next access to the device, before a save, and when the guest goes on; a saved state says what the guest wants
//! and what VFIO has.

use super::device::{DeviceError, VfioDevice};
use crate::pci::msix::{Msix, MsixError};

/// Who refuses; the caller adds the device's name.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignalsError {
    #[error("{0}: tried again at the next access to it")]
    Device(#[from] DeviceError),
    #[error("{0}: tried again at the next access to it")]
    Msix(#[from] MsixError),
}

/// Takes a write of message control.
pub(super) fn set_control(device: &VfioDevice, msix: &mut Msix, control: u16) -> Result<(), SignalsError> {
    let was = msix.enabled();
    // The device stops first, so that nothing signals the eventfds any more when they are drained.
    let stopped = if Msix::enables(control) { Ok(()) } else { align(device, msix, false) };
    msix.set_control(control);
    stopped.and_then(|()| if was == msix.enabled() { Ok(()) } else { align(device, msix, msix.enabled()) })
}

/// Tries again what was refused, if anything.
pub(super) fn settle(device: &VfioDevice, msix: &mut Msix) -> Result<(), SignalsError> {
    let (wanted, late) = (msix.enabled(), msix.enabled() != device.signals());
    if late {
        align(device, msix, wanted)?;
        if wanted {
            // What the device had to say meanwhile nobody has heard; a spurious interrupt is legal.
            msix.signal_all();
        }
    }
    Ok(msix.settle()?)
}

fn align(device: &VfioDevice, msix: &mut Msix, on: bool) -> Result<(), SignalsError> {
    if device.signals() == on {
        return Ok(());
    }
    if !on {
        return Ok(device.disable_msix()?);
    }
    let eventfds = msix.eventfds()?;
    let usable = eventfds.len().min(device.vectors() as usize);
    let enabled = device.enable_msix(&eventfds[..usable]);
    // Of eventfds that were made just now none is attached yet.
    msix.attach_missing()?;
    Ok(enabled?)
}
