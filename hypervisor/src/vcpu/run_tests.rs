//! Exits of a guest of a few instructions, on this machine's own KVM where it has one.

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_MMIO};
use theseus_resources::FdStore;

use super::*;
use crate::BareVm;

/// In real mode, at 0x1000: mov al, 7; out 0x10, al; mov [0x8000], al; in al, 0x11; mov al, [0x8001]; out 0x12, al
const CODE: [u8; 14] = [0xB0, 0x07, 0xE6, 0x10, 0xA2, 0x00, 0x80, 0xE4, 0x11, 0xA0, 0x01, 0x80, 0xE6, 0x12];
const ENTRY: usize = 0x1000;
/// Of RAM; 0x8000 lies above.
const SIZE: usize = 0x4000;

/// None where there is no KVM.
fn vcpu() -> Option<Vcpu> {
    let hypervisor = Hypervisor::open(&FdStore::new()).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    // SAFETY: a new mapping, which is never unmapped.
    let memory = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), SIZE, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: within the mapping, which nobody else has.
    unsafe { memory.cast::<u8>().add(ENTRY).copy_from_nonoverlapping(CODE.as_ptr(), CODE.len()) };
    let vm = BareVm::new(&hypervisor).unwrap();
    // SAFETY: mapped for ever, and no Rust object.
    unsafe { vm.add_memslot(0, SIZE as u64, memory as u64, false) }.unwrap();
    let vcpu = Vcpu::new(&vm.create_irqchip().unwrap(), 0).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_registers(&kvm_regs { rip: ENTRY as u64, rflags: 2, ..Default::default() }, &sregs).unwrap();
    Some(vcpu)
}

#[test]
fn a_handled_exit_does_not_look_like_one_that_waits() {
    let Some(mut vcpu) = vcpu() else { return };
    assert!(!vcpu.has_unhandled_exit(), "it has not run");
    for (reason, written) in [
        (KVM_EXIT_IO, Some((0x10, 7))),
        (KVM_EXIT_MMIO, Some((0x8000, 7))),
        (KVM_EXIT_IO, None),
        (KVM_EXIT_MMIO, None),
        (KVM_EXIT_IO, Some((0x12, 42))),
    ] {
        let seen = match vcpu.run().unwrap() {
            Exit::IoOut(port, 1, data) => Some((u64::from(port), data[0])),
            Exit::MmioWrite(address, data) => Some((address, data[0])),
            Exit::IoIn(0x11, 1, data) | Exit::MmioRead(0x8001, data) => {
                data[0] = 42;
                None
            }
            _ => panic!("another exit"),
        };
        assert_eq!(seen, written);
        // Who finds it now, has it to do.
        assert_eq!(vcpu.exit_reason().load(Ordering::Relaxed), reason);
        assert!(vcpu.has_unhandled_exit());
        vcpu.exit_handled();
        assert!(!vcpu.has_unhandled_exit());
        // KVM completes it, and the guest takes no step more.
        vcpu.set_immediate_exit(true);
        assert!(matches!(vcpu.run(), Ok(Exit::Interrupted)));
        assert_eq!(vcpu.exit_reason().load(Ordering::Relaxed), HANDLED);
        assert!(!vcpu.has_unhandled_exit());
        vcpu.set_immediate_exit(false);
    }
}
