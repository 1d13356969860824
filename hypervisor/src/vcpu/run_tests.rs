//! Exits of a guest of a few instructions, on this machine's own KVM where it has one.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_MMIO};
use theseus_resources::memory_listener::{MemoryListener, Rank, Refusal};
use theseus_resources::{FdStore, GuestRam, MemoryListeners, Pages, RamBlock};

use super::*;
use crate::{BareVm, Vm};

/// In real mode, at 0x1000: mov al, 7; out 0x10, al; mov [0x8000], al; in al, 0x11; mov al, [0x8001]; out 0x12, al
const CODE: [u8; 14] = [0xB0, 0x07, 0xE6, 0x10, 0xA2, 0x00, 0x80, 0xE4, 0x11, 0xA0, 0x01, 0x80, 0xE6, 0x12];
const ENTRY: usize = 0x1000;
/// Of RAM; 0x8000 lies above.
const SIZE: usize = 0x4000;

/// Dropped in this order.
struct Rig {
    vcpu: Vcpu,
    vm: Arc<Vm>,
    memory: MemoryListeners,
    ram: GuestRam,
}

/// With [`SIZE`] bytes of RAM, which begin with `code` at [`ENTRY`]. None where there is no KVM.
fn rig(code: &[u8]) -> Option<Rig> {
    let hypervisor = Hypervisor::open(&FdStore::new()).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let ram = GuestRam::new(&FdStore::new(), 128 << 20, Pages::Small).unwrap();
    let block = RamBlock { size: SIZE as u64, ..ram.blocks().next().unwrap() };
    put(&block, ENTRY, code);
    let memory = MemoryListeners::new();
    let vm = BareVm::new(&hypervisor).unwrap();
    memory.subscribe(vm.handle().clone()).unwrap();
    // SAFETY: the listeners are dropped before it.
    unsafe { memory.add(block) }.unwrap();
    let vm = vm.create_irqchip().unwrap();
    let vcpu = Vcpu::new(&vm, 0).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_registers(&kvm_regs { rip: ENTRY as u64, rflags: 2, ..Default::default() }, &sregs).unwrap();
    Some(Rig { vcpu, vm: (*vm).clone(), memory, ram })
}

fn put(block: &RamBlock, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= block.size as usize);
    // SAFETY: within the block, which is mapped; its guest does not run yet.
    unsafe { (block.hva as *mut u8).add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

#[test]
fn a_handled_exit_does_not_look_like_one_that_waits() {
    let Some(mut rig) = rig(&CODE) else { return };
    let vcpu = &mut rig.vcpu;
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

/// A DMA domain whose host has no room.
struct Refuses;

impl MemoryListener for Refuses {
    fn describe(&self) -> String {
        "a domain".into()
    }

    fn rank(&self) -> Rank {
        Rank::Dma
    }

    unsafe fn add(&self, block: &RamBlock) -> std::result::Result<(), Refusal> {
        Err(format!("no room for {:#x}", block.gpa).into())
    }

    fn remove(&self, block: &RamBlock) -> std::result::Result<(), Refusal> {
        Err(format!("it never had {:#x}", block.gpa).into())
    }
}

/// In real mode: 1: mov al, [0x8000]; out 0x12, al; jmp 1b
const READS: [u8; 7] = [0xA0, 0x00, 0x80, 0xE6, 0x12, 0xEB, 0xF9];

#[test]
fn memory_is_added_and_removed_while_the_guest_runs() {
    const NOTHING: u8 = 0xEE;
    let Some(mut rig) = rig(&READS) else { return };
    let Rig { vcpu, vm, memory, ram } = &mut rig;
    let whole = ram.blocks().next().unwrap();
    let block = |gpa| RamBlock { gpa, size: 0x1000, hva: whole.hva + gpa, offset: gpa, file: whole.file.clone() };
    put(&block(0x8000), 0, &[7]);
    let before = vm.memory();
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (tell, told) = channel();
        scope.spawn(|| {
            let (tell, mut last) = (tell, None);
            while !ends.load(Ordering::Relaxed) {
                match vcpu.run().unwrap() {
                    Exit::MmioRead(0x8000, data) => data[0] = NOTHING,
                    Exit::IoOut(0x12, 1, data) => {
                        if last.replace(data[0]) != Some(data[0]) {
                            tell.send(data[0]).unwrap();
                        }
                    }
                    _ => panic!("another exit"),
                }
                vcpu.exit_handled();
            }
        });
        assert_eq!(told.recv(), Ok(NOTHING));
        // SAFETY: here and below, `ram` is dropped last.
        unsafe { memory.add(block(0x8000)) }.unwrap();
        assert_eq!(told.recv(), Ok(7));
        assert_eq!(vm.memory().len(), before.len() + 1);

        // One that refuses in the middle of the list, as it comes after KVM.
        let refuses: Arc<dyn MemoryListener> = Arc::new(Refuses);
        memory.subscribe_told(refuses.clone());
        // SAFETY: as above.
        let refused = unsafe { memory.add(block(0xA000)) }.unwrap_err().to_string();
        assert_eq!(refused, "no room for 0xa000");
        assert_eq!(memory.remove(0x8000).unwrap_err().to_string(), "it never had 0x8000");
        assert_eq!(vm.memory().len(), before.len() + 1, "the one that refused comes first then");
        memory.unsubscribe(&*refuses);

        memory.remove(0x8000).unwrap();
        assert_eq!(told.recv(), Ok(NOTHING));
        assert_eq!(vm.memory(), before);
        ends.store(true, Ordering::Relaxed);
    });
}
