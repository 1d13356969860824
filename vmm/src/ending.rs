//! The end of this process where it is not the orderly end of its guest: the guest has a new VMM, or the keeper was
//! killed.
//!
//! A process gives up its memory before its files (do_exit), and a guest's memory takes long: so files go first, and
//! before them what would keep a device in use beyond its file.

use std::sync::Weak;

use parking_lot::Mutex;
use theseus_hypervisor::Vm;

/// The VM of this process.
static VM: Mutex<Weak<Vm>> = Mutex::new(Weak::new());

/// What is to be let go at the end.
pub(crate) fn remember(vm: Weak<Vm>) {
    *VM.lock() = vm;
}

/// The guest is another VMM's: nothing of it is touched.
pub(crate) fn retire() -> ! {
    // Whoever runs the guest needs the time more.
    let _ = rustix::process::setpriority_process(None, 19);
    leave(crate::EXIT_OK)
}

/// The guest ends with this process, at once.
pub(crate) fn abandon(code: i32) -> ! {
    leave(code)
}

fn leave(code: i32) -> ! {
    // If somebody is in the middle of it, the kernel does it later.
    if let Some(vm) = VM.try_lock()
        && let Some(vm) = vm.upgrade()
    {
        vm.vfio_forget();
    }
    // SAFETY: this process makes no access to a device any more that could not as well be its last.
    unsafe { theseus_devices::vfio::unmap_bars() };
    // SAFETY: nothing is done with a descriptor any more, and no destructor runs.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        libc::_exit(code)
    }
}
