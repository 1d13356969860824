//! What KVM itself makes of irqfds on a level and of ioeventfds. Where there is no KVM there is nothing to test: the
//! rules that the devices' tests hold their fakes to are these.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use rustix::event::{EventfdFlags, eventfd};
use theseus_hypervisor::{BareVm, Hypervisor, IoEventAt, MsiRoute, ReadyVm};
use theseus_resources::FdStore;

/// A hang, not a slow machine.
const PATIENCE: Duration = Duration::from_secs(600);

fn vm() -> Option<(ReadyVm, FdStore)> {
    use rustix::fs::{Access, access};
    access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).ok()?;
    let fd_store = FdStore::new();
    let vm = BareVm::new(&Hypervisor::open(&fd_store).unwrap()).unwrap();
    let vm = vm.create_irqchip().unwrap();
    vm.commit_routes().unwrap();
    Some((vm, fd_store))
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).unwrap();
}

fn count(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// Whether the IOAPIC has the pin's request.
fn is_requested(vm: &ReadyVm, pin: u32) -> bool {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    vm.fd().get_irqchip(&mut chip).unwrap();
    // SAFETY: the kernel has written an IOAPIC.
    unsafe { chip.chip.ioapic }.irr & 1 << pin != 0
}

/// An irqfd that is no MSI's is injected by a work item (irqfd_inject).
fn until(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_level_is_raised_and_falls_with_its_last_irqfd() {
    let Some((vm, _fd_store)) = vm() else { return };
    let (trigger, other, resample) = (event(), event(), event());
    signal(&trigger);
    vm.attach_level_irqfd(17, trigger.as_fd(), resample.as_fd()).unwrap();
    until("what came before is raised", || is_requested(&vm, 17));
    // Another device's on the same pin.
    vm.attach_level_irqfd(17, other.as_fd(), resample.as_fd()).unwrap();
    vm.detach_irqfd(17, other.as_fd()).unwrap();
    assert!(is_requested(&vm, 17));
    vm.detach_irqfd(17, trigger.as_fd()).unwrap();
    assert!(!is_requested(&vm, 17), "an update leaves no level behind");
    signal(&trigger);
    assert_eq!((count(&trigger), is_requested(&vm, 17)), (1, false), "it waits");
}

#[test]
fn an_eventfd_of_an_irqfd_is_given_back() {
    let Some((vm, _fd_store)) = vm() else { return };
    let trigger = event();
    let gsi = vm.allocate_gsis(1).unwrap()[0];
    vm.route_msis(&[(gsi, MsiRoute { address: 0xFEE0_0000, data: 0x41 })]).unwrap();
    vm.attach_irqfd(gsi, trigger.as_fd()).unwrap();
    assert!(vm.attach_irqfd(gsi, trigger.as_fd()).is_err(), "EBUSY");
    vm.detach_irqfd(gsi, trigger.as_fd()).unwrap();
    vm.attach_irqfd(gsi, trigger.as_fd()).unwrap();
}

#[test]
fn an_ioeventfd_is_at_one_place_once() {
    let Some((vm, _fd_store)) = vm() else { return };
    let notify = event();
    for at in [IoEventAt::Mmio(0xC000_3000), IoEventAt::Port(0x1000)] {
        vm.attach_ioeventfd(at, notify.as_fd()).unwrap();
        assert!(vm.attach_ioeventfd(at, notify.as_fd()).is_err(), "EEXIST");
        vm.detach_ioeventfd(at, notify.as_fd()).unwrap();
        assert!(vm.detach_ioeventfd(at, notify.as_fd()).is_err(), "ENOENT");
    }
}

/// Whoever has got a GSI can route it: the pins' entries are in the table too.
#[test]
fn all_gsis_that_are_given_can_be_routed() {
    let Some((vm, _fd_store)) = vm() else { return };
    let mut all = Vec::new();
    while let Ok(gsis) = vm.allocate_gsis(1) {
        all.extend(gsis);
    }
    assert!(all.len() >= 4000, "{}", all.len());
    let routes: Vec<_> = all.iter().map(|gsi| (*gsi, MsiRoute { address: 0xFEE0_0000, data: 0x40 })).collect();
    vm.route_msis(&routes).unwrap();
}
