//! The boot of a guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use theseus_devices::device::Buses;
use theseus_devices::spec::Spec;
use theseus_hypervisor::BareVm;
use theseus_resources::{GuestRam, MemoryListeners, Pages, layout};

use super::passthrough::PassthroughDevices;
use super::spec::{MachineSpec, PayloadSpec};
use super::{Host, Machine, MachineError, devices};
use crate::boot::{self, MachineShape, cpuid};
use crate::build_info;
use crate::memory_errors;
use crate::vcpus::{Start, Vcpus};

impl Machine {
    /// A machine that is ready to run its first instruction; its vCPUs are stopped.
    /// `given_up`: nobody wants it any more.
    pub(crate) fn build(spec: &MachineSpec, host: &Host, given_up: &AtomicBool) -> Result<Self, MachineError> {
        let go_on = || match given_up.load(Ordering::SeqCst) {
            true => Err(MachineError::GivenUp),
            false => Ok(()),
        };
        go_on()?;
        crate::keeper::settings::take_over();
        super::fits::check(spec)?;
        warn_of_vain_wishes(&spec.memory.pages);
        let ram = Arc::new(GuestRam::new(&host.fd_store, spec.memory.size, spec.memory.pages)?);
        let memory = told(&ram)?;
        if spec.memory.prefault {
            ram.prefault()?;
        }
        go_on()?;
        let vm = BareVm::new(&host.hypervisor)?;
        memory.subscribe(vm.handle().clone())?;
        // BARs decode nothing before the guest says so.
        let vm = vm.create_irqchip()?;
        crate::ending::remember(Arc::downgrade(&vm));

        let supported = host.hypervisor.supported_cpuid()?;
        let options = cpuid::CpuidOptions {
            vcpus: spec.vcpus,
            // Hypervisor::open has checked that KVM emulates it.
            tsc_deadline: true,
            nested: false,
            hidden: build_info::HIDDEN_CPUID,
        };
        let cpuid = cpuid::GuestCpuid::new(supported.as_slice(), &options);
        let window64 = layout::pci_window64(ram.size(), cpuid::phys_bits(supported.as_slice()));

        let buses = Buses::empty();
        let on_board = Spec {
            ram_size: ram.size(),
            console: spec.console.clone(),
            revision: build_info::HOST_BRIDGE_REVISION,
            #[cfg(feature = "test-hooks")]
            counting: host.seams.counting_device(),
        };
        let devices = devices::boot(&on_board, &vm, host, &buses)?;
        let passthrough = PassthroughDevices::build(&spec.passthrough, window64.clone(), &vm, &buses, &memory, host)?;

        let shape = MachineShape {
            ram_size: ram.size(),
            vcpus: spec.vcpus,
            pci_window64: window64,
            devices: devices.describe(),
        };
        let PayloadSpec { kernel, initramfs, cmdline } = &spec.payload;
        let entry = boot::load(ram.memory(), kernel, initramfs.as_deref(), cmdline, &shape)?;

        go_on()?;
        let starts = (0..spec.vcpus)
            .map(|index| Start::Boot {
                cpuid: cpuid.for_vcpu(index),
                msrs: boot::boot_msrs(),
                entry: (index == 0).then(|| (entry, ram.clone())),
                host_cpus: spec.host_cpus(index),
            })
            .collect();
        let vcpus = Vcpus::start(&host.for_vcpus(&buses), starts)?.create(&vm)?;
        Ok(Self {
            version: boot::MACHINE_VERSION,
            vcpus,
            passthrough,
            devices,
            memory,
            vm,
            ram,
            clock: None,
            unfilled: false,
            populating: None,
        })
    }
}

/// Logs what the host will not do.
fn warn_of_vain_wishes(pages: &Pages) {
    // Documentation/admin-guide/mm/transhuge.rst
    const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let is_off =
        || std::fs::read_to_string(SWITCH).is_ok_and(|text| text.contains("[never]") || text.contains("[deny]"));
    if *pages == Pages::Transparent && is_off() {
        log::warn!("thp=on gives no huge pages on this host: write advise to {SWITCH}");
    }
}

/// Who has to know of the guest's RAM, which those are told of here that come before the VM.
pub(super) fn told(ram: &GuestRam) -> Result<Arc<MemoryListeners>, MachineError> {
    let memory = Arc::new(MemoryListeners::new());
    memory.subscribe(Arc::new(memory_errors::Watch::new()))?;
    for block in ram.blocks() {
        // SAFETY: guest RAM stays mapped as long as the machine, which drops the listeners first.
        unsafe { memory.add(block) }?;
    }
    Ok(memory)
}
