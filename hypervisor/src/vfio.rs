//! The KVM-VFIO pseudo device: tells KVM which VFIO groups belong to the VM (cache coherency, posted interrupts, mdev).

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;
use parking_lot::Mutex;

use crate::{Error, Result, Vm};

#[derive(Default)]
pub(crate) struct VfioFiles(Mutex<State>);

#[derive(Default)]
struct State {
    /// Made with the first group: a VM without passthrough needs none.
    device: Option<DeviceFd>,
    files: BTreeSet<RawFd>,
}

impl Vm {
    /// Adds a group. On first boot: only after a device of it was opened (kernel-facts.md: a VM reference would leak
    /// otherwise).
    pub fn vfio_add(&self, group: BorrowedFd<'_>) -> Result<()> {
        let mut state = self.vfio.0.lock();
        if state.device.is_none() {
            let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
            let device = self.fd().create_device(&mut request).map_err(Error::call("create the KVM-VFIO device"))?;
            state.device = Some(device);
        }
        if !state.files.contains(&group.as_raw_fd()) {
            change(&state, KVM_DEV_VFIO_FILE_ADD, group.as_raw_fd())?;
            state.files.insert(group.as_raw_fd());
        }
        Ok(())
    }

    /// Takes all groups off, at the end of the process: this VM holds their files as long as a vCPU's run page is
    /// mapped.
    pub fn vfio_forget(&self) {
        if let Some(mut state) = self.vfio.0.try_lock() {
            for file in std::mem::take(&mut state.files) {
                let _ = change(&state, KVM_DEV_VFIO_FILE_DEL, file);
            }
        }
    }

    /// Takes a group off this VM: a late release of an old VM would otherwise clear the group's VM pointer under the
    /// new one.
    pub fn vfio_del(&self, group: BorrowedFd<'_>) -> Result<()> {
        let mut state = self.vfio.0.lock();
        if state.files.contains(&group.as_raw_fd()) {
            change(&state, KVM_DEV_VFIO_FILE_DEL, group.as_raw_fd())?;
            state.files.remove(&group.as_raw_fd());
        }
        Ok(())
    }
}

fn change(state: &State, attr: u32, file: RawFd) -> Result<()> {
    let Some(device) = &state.device else { return Ok(()) };
    let attr = kvm_device_attr {
        flags: 0,
        group: KVM_DEV_VFIO_FILE,
        attr: attr.into(),
        // The kernel reads one int from here during the call.
        addr: std::ptr::from_ref(&file) as u64,
    };
    device.set_device_attr(&attr).map_err(Error::call(format!("KVM-VFIO: change of group fd {file}")))
}
