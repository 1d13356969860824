//! Machine checks: an uncorrectable error of the host's memory, told to the guest whose page it was.
//!
//! References: Intel SDM 3B, 17.3 and 17.9 (machine-check MSRs, error codes); AMD64 APM 2, 9.3; Linux,
//! arch/x86/kernel/cpu/mce/severity.c, for what a guest makes of it.

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2, kvm_x86_mce};

use super::Vcpu;
use crate::{Hypervisor, Result, raw};

// IA32_MCi_STATUS
const VAL: u64 = 1 << 63;
const UC: u64 = 1 << 61;
const EN: u64 = 1 << 60;
const MISCV: u64 = 1 << 59;
const ADDRV: u64 = 1 << 58;
/// Intel: signalled by a machine check, and action is required.
const S: u64 = 1 << 56;
const AR: u64 = 1 << 55;
/// AMD: not consumed yet, and of poisoned data.
const DEFERRED: u64 = 1 << 44;
const POISON: u64 = 1 << 43;
/// Error codes: data load, and memory scrubbing.
const DATA_LOAD: u64 = 0x134;
const SCRUBBING: u64 = 0xC0;

// IA32_MCG_STATUS
const RIPV: u64 = 1 << 0;
const EIPV: u64 = 1 << 1;
const MCIP: u64 = 1 << 2;

/// IA32_MCi_MISC: a physical address, whose lowest valid bit is that of a page.
const MISC_PAGE: u64 = 2 << 6 | 12;
/// A memory controller's bank, as far as a guest can tell; one for what an AMD guest has yet to find there, or the
/// other would overflow; and one for vCPUs that are only to come along.
const BANK: u8 = 9;
const BANK_DEFERRED: u8 = 10;
const BANK_OF_OTHERS: u8 = 1;

/// Those that are used, and those before them: four MSRs each, which every pause of an update reads. KVM has 32.
const BANKS: u64 = BANK_DEFERRED as u64 + 1;
/// Software error recovery: an Intel guest takes an error as fatal, or for none of its business, without.
const MCG_SER_P: u64 = 1 << 24;
const CR4_MCE: u64 = 1 << 6;

/// In whose way a guest is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vendor {
    /// Of Intel's architecture: a machine check comes to all CPUs at once.
    Intel,
    /// Of AMD's: it comes to the CPU that it concerns.
    #[default]
    Amd,
}

impl Vendor {
    /// By the vendor's name in leaf 0.
    pub fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let leaf = cpuid.iter().find(|leaf| leaf.function == 0);
        let name = leaf.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat());
        match name.as_deref() {
            Some(b"AuthenticAMD" | b"HygonGenuine") => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// What a vCPU is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The instruction at hand needs the page at this guest physical address.
    Required(u64),
    /// The page there is lost, nobody needs it yet.
    Optional(u64),
    /// Another vCPU has been told of one.
    OfOther,
}

impl Check {
    fn to_kvm(self, vendor: Vendor) -> kvm_x86_mce {
        let known = VAL | EN | MISCV | ADDRV;
        let (status, mcg_status) = match (self, vendor) {
            (Self::Required(_), Vendor::Intel) => (known | UC | S | AR | DATA_LOAD, MCIP | RIPV | EIPV),
            (Self::Optional(_), Vendor::Intel) => (known | UC | S | SCRUBBING, MCIP | RIPV),
            (Self::Required(_), Vendor::Amd) => (known | UC | POISON, MCIP | RIPV | EIPV),
            // Found by the guest's polling: KVM raises no exception for it.
            (Self::Optional(_), Vendor::Amd) => (known | DEFERRED | POISON, MCIP | RIPV),
            (Self::OfOther, _) => (VAL | UC, MCIP | RIPV),
        };
        let (bank, addr, misc) = match self {
            Self::Optional(gpa) if vendor == Vendor::Amd => (BANK_DEFERRED, gpa, MISC_PAGE),
            Self::Required(gpa) | Self::Optional(gpa) => (BANK, gpa, MISC_PAGE),
            Self::OfOther => (BANK_OF_OTHERS, 0, 0),
        };
        kvm_x86_mce { status, addr, misc, mcg_status, bank, ..Default::default() }
    }
}

impl Vcpu {
    /// At the guest's boot, after CPUID is set: what a guest needs to know to outlive a machine check.
    pub fn offer_machine_checks(&mut self, hypervisor: &Hypervisor) -> Result<()> {
        let supported = raw::supported_mce(hypervisor.kept());
        // AMD's guests look at CPUID instead.
        let recovery = if self.vendor == Vendor::Intel { supported & MCG_SER_P } else { 0 };
        // Switches all banks on too: KVM drops what is meant for one that the guest has not.
        if supported == 0 { Ok(()) } else { self.set_mcg_cap(Some(BANKS | recovery)) }
    }

    /// None: as KVM has it by itself. Before the MSRs: it resets the banks.
    pub(super) fn set_mcg_cap(&mut self, cap: Option<u64>) -> Result<()> {
        if let Some(cap) = cap {
            raw::setup_mce(&self.fd, cap).map_err(self.io_err("KVM_X86_SETUP_MCE"))?;
        }
        self.mcg_cap = cap;
        Ok(())
    }

    /// Whether one vCPU's machine check is to be told to the others too.
    pub fn broadcasts(&self) -> bool {
        self.vendor == Vendor::Intel
    }

    /// Tells the guest, at its next instruction. One that has machine checks off (CR4.MCE), or is in the middle of one,
    /// shuts down, as a real CPU would: but not because of another CPU's.
    pub fn inject(&self, check: Check) -> Result<()> {
        if check == Check::OfOther {
            let waits = self.fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_UNINITIALIZED);
            if waits || self.sregs()?.cr4 & CR4_MCE == 0 {
                return Ok(());
            }
        }
        raw::set_mce(&self.fd, &check.to_kvm(self.vendor)).map_err(self.io_err("KVM_X86_SET_MCE"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vendor(name: &[u8; 12]) -> Vendor {
        let part = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
        Vendor::of(&[kvm_cpuid_entry2 { ebx: part(0), edx: part(4), ecx: part(8), ..Default::default() }])
    }

    #[test]
    fn a_guest_is_told_in_its_vendors_words() {
        assert_eq!(
            [vendor(b"GenuineIntel"), vendor(b"AuthenticAMD"), vendor(b"HygonGenuine")],
            [Vendor::Intel, Vendor::Amd, Vendor::Amd]
        );
        // IA32_MCi_STATUS of a data load error in recovery (SDM 3B, table 17-9), and of memory scrubbing.
        let required = Check::Required(0x1234_5000).to_kvm(Vendor::Intel);
        assert_eq!((required.status, required.addr), (0xBD80_0000_0000_0134, 0x1234_5000));
        assert_eq!((required.misc, required.mcg_status, required.bank), (0x8C, 7, 9));
        assert_eq!(Check::Optional(0).to_kvm(Vendor::Intel).status, 0xBD00_0000_0000_00C0);
        assert_eq!(Check::Required(0).to_kvm(Vendor::Amd).status, 0xBC00_0800_0000_0000);
        let deferred = Check::Optional(0).to_kvm(Vendor::Amd).status;
        assert_eq!((deferred, deferred & UC), (0x9C00_1800_0000_0000, 0));
        let other = Check::OfOther.to_kvm(Vendor::Intel);
        assert_eq!((other.status & EN, other.bank), (0, 1), "for nobody to act on");
    }
}
