//! A vCPU that is given only what it lacks ends up as the one that was saved, on this machine's own KVM where it has
//! one.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use theseus_resources::FdStore;
use zerocopy::IntoBytes;

use super::*;
use crate::{BareVm, Hypervisor};

/// IA32_SYSENTER_CS, IA32_MTRR_DEF_TYPE, IA32_MC0_STATUS.
const MSRS: [u32; 3] = [0x174, 0x2ff, 0x401];

struct Host(Hypervisor);

impl Host {
    /// None where there is no KVM.
    fn open() -> Option<Self> {
        Hypervisor::open(&FdStore::new()).inspect_err(|error| eprintln!("skipped: {error}")).ok().map(Self)
    }

    fn vcpu(&self, index: u32) -> Vcpu {
        let vm = BareVm::new(&self.0).unwrap().create_irqchip().unwrap();
        (0..index).for_each(|index| drop(Vcpu::new(&vm, index).unwrap()));
        Vcpu::new(&vm, index).unwrap()
    }

    /// As at a guest's boot.
    fn booted(&self, index: u32) -> Vcpu {
        let mut vcpu = self.vcpu(index);
        vcpu.set_cpuid(self.0.supported_cpuid().unwrap().as_slice()).unwrap();
        vcpu.offer_machine_checks(&self.0).unwrap();
        vcpu.keep_to_offers(true).unwrap();
        vcpu.discover_msrs(&self.0).unwrap();
        // Off the reset vector, where KVM lets no vCPU halt (__set_sregs_common).
        vcpu.set_registers(&kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() }, &vcpu.sregs().unwrap()).unwrap();
        vcpu
    }

    /// `old`, in another VM.
    fn moved(&self, old: &Vcpu) -> Vcpu {
        let mut new = self.vcpu(old.index());
        new.prewarm(&old.shape()).unwrap();
        let (state, handles) = old.save().unwrap();
        new.restore_early(&state, &handles).unwrap();
        new.restore_late(&state).unwrap();
        new
    }
}

fn assert_same(new: &Vcpu, old: &Vcpu, what: &str) {
    let [new, old] = [new, old].map(|vcpu| vcpu.save().unwrap().0);
    assert_eq!(new.mp_state, old.mp_state, "{what}");
    assert_eq!(new.regs, old.regs, "{what}");
    assert_eq!(new.sregs.control, old.sregs.control, "{what}");
    assert_eq!(new.xcrs.as_bytes(), old.xcrs.as_bytes(), "{what}");
    assert_eq!(new.debugregs, old.debugregs, "{what}");
    assert_eq!(new.lapic, old.lapic, "{what}");
    assert_eq!(new.events, old.events, "{what}");
    let msrs = |state: &VcpuState| state.msrs.iter().map(|msr| (msr.index, msr.data)).collect::<Vec<_>>();
    assert_eq!(msrs(&new), msrs(&old), "{what}");
}

#[test]
fn what_is_left_out_is_there_and_what_differs_arrives() {
    let Some(host) = Host::open() else { return };
    for index in [0, 1] {
        let old = host.booted(index);
        assert_same(&host.moved(&old), &old, "never run: not what a new VMM guesses");
        for state in [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED] {
            old.fd.set_mp_state(kvm_mp_state { mp_state: state }).unwrap();
            assert_same(&host.moved(&old), &old, "MP state");
        }
        let mut xcrs = old.fd.get_xcrs().unwrap();
        for value in [3, 1] {
            xcrs.xcrs[0].value = value;
            old.fd.set_xcrs(&xcrs).unwrap();
            assert_same(&host.moved(&old), &old, "XCR0");
        }
        for value in [0x1000, 0] {
            let mut debug = old.fd.get_debug_regs().unwrap();
            debug.db[3] = value;
            old.fd.set_debug_regs(&debug).unwrap();
            assert_same(&host.moved(&old), &old, "debug registers");
        }
        for index in MSRS {
            for data in [6, 0] {
                old.set_msrs(&[kvm_msr_entry { index, data, ..Default::default() }]).unwrap();
                assert_same(&host.moved(&old), &old, "MSR");
            }
        }
        for masked in [1, 0] {
            let mut events = old.fd.get_vcpu_events().unwrap();
            events.nmi.masked = masked;
            old.fd.set_vcpu_events(&events).unwrap();
            assert_same(&host.moved(&old), &old, "a masked NMI");
        }
    }
}
