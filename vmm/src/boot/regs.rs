//! The boot vCPU's state at the kernel's entry. The other vCPUs are left as KVM made them, waiting for INIT and SIPI.

use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryMmap;

use super::{BootError, Entry, lowmem};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set; interrupts, traps and virtual-8086 mode are off.
const RFLAGS: u64 = 1 << 1;

const PTE_PRESENT_WRITE: u64 = 0b11;
const PDE_LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;

/// Selectors as the Linux boot protocol wants them: __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const TYPE_CODE: u8 = 0b1011;
const TYPE_DATA: u8 = 0b0011;
/// Busy TSS, as one that is loaded must be.
const TYPE_TSS: u8 = 0b1011;

const MSR_IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MISC_ENABLE_BTS_UNAVAILABLE: u64 = 1 << 11;
const MISC_ENABLE_PEBS_UNAVAILABLE: u64 = 1 << 12;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Writes the GDT (and page tables, for [`Entry::Linux64`]) into guest memory, changes in `sregs`, as KVM returned them
/// for the new vCPU, what the entry asks for, and returns the general registers. The FPU stays as KVM made it.
pub(crate) fn boot_regs(mem: &GuestMemoryMmap, entry: Entry, sregs: &mut kvm_sregs) -> Result<kvm_regs, BootError> {
    let long_mode = matches!(entry, Entry::Linux64 { .. });
    let code = flat_segment(CODE_SELECTOR, TYPE_CODE, long_mode);
    let data = flat_segment(DATA_SELECTOR, TYPE_DATA, false);
    let tss = tss_segment();

    write_gdt(mem, &[code, data, tss])?;
    sregs.gdt = kvm_dtable { base: lowmem::GDT, limit: GDT_SIZE - 1, ..Default::default() };
    // Until the kernel loads its own, an exception is a shutdown.
    sregs.idt = kvm_dtable::default();
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };

    match entry {
        Entry::Linux64 { rip, boot_params } => {
            write_page_tables(mem)?;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
            sregs.cr3 = lowmem::PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            Ok(kvm_regs { rip, rsi: boot_params, rsp: lowmem::STACK_TOP, rflags: RFLAGS, ..Default::default() })
        }
        Entry::Pvh { rip, start_info } => {
            // "All the other writeable bits are cleared": ET is not writeable.
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
            Ok(kvm_regs { rip, rbx: start_info, rflags: RFLAGS, ..Default::default() })
        }
    }
}

/// MSRs that firmware would have set, for every vCPU: KVM starts with all memory uncached.
pub(crate) fn boot_msrs() -> Vec<kvm_msr_entry> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    vec![
        msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ]
}

fn flat_segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        // Intel SDM 3.4.5: D must be clear where L is set.
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn tss_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, selector: TSS_SELECTOR, type_: TYPE_TSS, present: 1, ..Default::default() }
}

/// Two null descriptors, code, data, and a TSS, which takes two slots in long mode.
const GDT_SIZE: u16 = 6 * 8;

fn write_gdt(mem: &GuestMemoryMmap, segments: &[kvm_segment; 3]) -> Result<(), BootError> {
    let [code, data, tss] = segments.map(|segment| descriptor(&segment));
    let gdt: Vec<u8> = [0, 0, code, data, tss, 0].iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    super::write(mem, &gdt, lowmem::GDT)
}

/// Segment descriptor (Intel SDM, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let base = segment.base;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.avl) | u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(mem: &GuestMemoryMmap) -> Result<(), BootError> {
    let directory = |index| lowmem::PAGE_DIRECTORIES + index * 0x1000;
    let pml4 = [lowmem::PDPT | PTE_PRESENT_WRITE];
    let pdpt: Vec<u64> = (0..DIRECTORIES).map(|index| directory(index) | PTE_PRESENT_WRITE).collect();
    let pages: Vec<u64> = (0..DIRECTORIES * ENTRIES).map(|page| (page << 21) | PDE_LARGE | PTE_PRESENT_WRITE).collect();
    for (addr, entries) in [(lowmem::PML4, pml4.as_slice()), (lowmem::PDPT, &pdpt), (lowmem::PAGE_DIRECTORIES, &pages)]
    {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        super::write(mem, &bytes, addr)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn descriptors() {
        // The values Linux has in its own boot GDT.
        assert_eq!(descriptor(&flat_segment(CODE_SELECTOR, TYPE_CODE, true)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(&flat_segment(CODE_SELECTOR, TYPE_CODE, false)), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(&flat_segment(DATA_SELECTOR, TYPE_DATA, false)), 0x00CF_9300_0000_FFFF);
        assert_eq!(descriptor(&tss_segment()), 0x0000_8B00_0000_0067);
    }

    /// Walks the tables as the CPU does.
    fn translate(mem: &GuestMemoryMmap, vaddr: u64) -> Option<u64> {
        let entry = |table: u64, shift: u64| -> Option<u64> {
            let entry: u64 = mem.read_obj(GuestAddress((table & !0xFFF) + ((vaddr >> shift) & 511) * 8)).unwrap();
            (entry & 1 == 1).then_some(entry)
        };
        let large = entry(entry(entry(lowmem::PML4, 39)?, 30)?, 21)?;
        assert_ne!(large & PDE_LARGE, 0);
        Some((large & !0x1F_FFFF) | (vaddr & 0x1F_FFFF))
    }

    #[test]
    fn linux64() {
        let mem = memory();
        let mut sregs = kvm_sregs { apic_base: 0xFEE0_0900, cr0: 0x6000_0010, ..Default::default() };
        let regs = boot_regs(&mem, Entry::Linux64 { rip: 0x10_0200, boot_params: 0x7000 }, &mut sregs).unwrap();
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x10_0200, 0x7000, 2));
        assert_eq!(sregs.apic_base, 0xFEE0_0900, "KVM's own state stays");
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0031, 0x20, 0x500));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector, sregs.ds.selector), (1, 0, 0x10, 0x18));
        for addr in [0, 0x7008, 0x10_0200, 0xBFFF_FFFF, 0xFEC0_0000, 0xFFFF_FFFF] {
            assert_eq!(translate(&mem, addr), Some(addr));
        }
        assert_eq!(translate(&mem, 1 << 32), None);
        let code: u64 = mem.read_obj(GuestAddress(sregs.gdt.base + u64::from(CODE_SELECTOR))).unwrap();
        assert_eq!(code, descriptor(&sregs.cs));
    }

    #[test]
    fn pvh() {
        let mem = memory();
        let mut sregs = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        let regs = boot_regs(&mem, Entry::Pvh { rip: 0x100_0000, start_info: 0x6000 }, &mut sregs).unwrap();
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit, sregs.tr.limit), (0, 1, u32::MAX, 0x67));
    }
}
