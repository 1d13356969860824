//! The second stage of address translation (EPT, NPT), from guest physical to host physical addresses. KVM makes it for
//! each VM anew, page by page as the guest touches them, with an exit for each.

use std::io;

use kvm_bindings::kvm_pre_fault_memory;

use super::Vcpu;
use crate::{Result, raw};

impl Vcpu {
    /// Makes the second stage of `size` bytes from `gpa` on, in which all pages should have memory: others get some
    /// (kvm_vcpu_pre_fault_memory). For all vCPUs of the VM, which have one second stage together. Since Linux 6.11.
    ///
    /// # Errors
    /// This KVM does not do that, or not there: nothing is lost, the guest makes it as it goes.
    pub fn fill_second_stage(&self, gpa: u64, size: u64) -> Result<()> {
        let mut left = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        while left.size > 0 {
            let before = left.size;
            let done = raw::pre_fault_memory(&self.fd, &mut left);
            // Or it would be called for ever: KVM_PRE_FAULT_MEMORY ends early, and then has done something.
            let done = done.and_then(|()| if left.size < before { Ok(()) } else { Err(io::ErrorKind::Other.into()) });
            done.map_err(self.io_err("KVM_PRE_FAULT_MEMORY"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;

    use theseus_resources::FdStore;
    use vmm_sys_util::ioctl::ioctl;

    use super::*;
    use crate::{BareVm, Hypervisor, ReadyVm};

    const SIZE: usize = 1 << 20;

    /// A number from the VM's statistics (KVM_GET_STATS_FD).
    fn statistic(vm: &ReadyVm, name: &str) -> u64 {
        // SAFETY: a VM fd, no argument.
        let fd = unsafe { ioctl(vm.fd(), vmm_sys_util::ioctl::ioctl_expr(0, 0xAE, 0xCE, 0)) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: new, and nobody else's.
        let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let mut header = [0; 24];
        file.read_exact(&mut header).unwrap();
        let [name_size, count, _, descriptors, data] = [4, 8, 12, 16, 20].map(|at| word(&header, at));
        for number in 0..count {
            let mut descriptor = vec![0; 16 + name_size];
            file.read_exact_at(&mut descriptor, (descriptors + number * (16 + name_size)) as u64).unwrap();
            let found = descriptor[16..].split(|byte| *byte == 0).next().unwrap();
            if found == name.as_bytes() {
                let mut value = [0; 8];
                file.read_exact_at(&mut value, (data + word(&descriptor, 8)) as u64).unwrap();
                return u64::from_le_bytes(value);
            }
        }
        panic!("no statistic '{name}'");
    }

    #[test]
    fn pages_are_there_before_the_guest_is() {
        let hypervisor = match Hypervisor::open(&FdStore::new()) {
            Ok(hypervisor) => hypervisor,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let vm = BareVm::new(&hypervisor).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), SIZE, protection, flags, -1, 0)
        };
        assert_ne!(memory, libc::MAP_FAILED);
        // SAFETY: it stays mapped for as long as this process lives.
        unsafe { vm.handle().add_memslot(0, SIZE as u64, memory as u64, false) }.unwrap();
        let vm = vm.create_irqchip().unwrap();
        let mut vcpu = Vcpu::new(&vm, 0).unwrap();
        vcpu.set_cpuid(hypervisor.supported_cpuid().unwrap().as_slice()).unwrap();
        let before = statistic(&vm, "pages_4k");
        if let Err(error) = vcpu.fill_second_stage(0, SIZE as u64 / 2) {
            return eprintln!("skipped: {error}");
        }
        assert_eq!(statistic(&vm, "pages_4k") - before, SIZE as u64 / 2 / 4096);
        let error = vcpu.fill_second_stage(SIZE as u64, 4096).unwrap_err().to_string();
        assert!(error.contains("vCPU 0: KVM_PRE_FAULT_MEMORY"), "no memory there: {error}");
    }
}
