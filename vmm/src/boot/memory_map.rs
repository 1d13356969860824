//! The guest's physical memory as the E820 and the PVH memory map say it.

use theseus_resources::layout;

use super::lowmem;

/// The numbers are the same in E820 and in PVH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemoryKind {
    Ram = 1,
    Reserved = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryRange {
    pub addr: u64,
    pub size: u64,
    pub kind: MemoryKind,
}

/// KVM on Intel keeps an identity map page and a 3-page TSS there.
const KVM_PRIVATE_SIZE: u64 = layout::TSS_ADDR + 0x3000 - layout::IDENTITY_MAP_ADDR;

/// Ascending and without overlaps. Nothing reserved lies in a PCI window: Linux would cut it out of the host bridge's
/// windows.
pub(crate) fn memory_map(ram_size: u64) -> Vec<MemoryRange> {
    let range = |addr, size, kind| MemoryRange { addr, size, kind };
    let mut map = vec![
        range(0, lowmem::EBDA, MemoryKind::Ram),
        range(lowmem::EBDA, lowmem::CONVENTIONAL_END - lowmem::EBDA, MemoryKind::Reserved),
        range(lowmem::ACPI, lowmem::HIGH_MEMORY - lowmem::ACPI, MemoryKind::Reserved),
        // Linux takes the MCFG for true only if E820 or the ACPI namespace reserve the ECAM.
        range(layout::ECAM_BASE, layout::ECAM_SIZE, MemoryKind::Reserved),
        range(layout::IDENTITY_MAP_ADDR, KVM_PRIVATE_SIZE, MemoryKind::Reserved),
    ];
    for (addr, size) in layout::ram_regions(ram_size) {
        let start = addr.max(lowmem::HIGH_MEMORY);
        if let Some(size) = size.checked_sub(start - addr).filter(|size| *size > 0) {
            map.push(range(start, size, MemoryKind::Ram));
        }
    }
    map.sort_by_key(|range| range.addr);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ram_size: u64, expected_ram: &[(u64, u64)]) {
        let map = memory_map(ram_size);
        for pair in map.windows(2) {
            assert!(pair[0].addr + pair[0].size <= pair[1].addr, "{pair:x?} overlap");
        }
        let ram: Vec<_> = map.iter().filter(|r| r.kind == MemoryKind::Ram).map(|r| (r.addr, r.size)).collect();
        assert_eq!(ram, expected_ram);
        let window = layout::PCI_WINDOW32;
        assert!(map.iter().all(|r| r.addr + r.size <= window.start || r.addr >= window.end));
        let reserved =
            |addr| map.iter().any(|r| r.kind == MemoryKind::Reserved && r.addr <= addr && addr < r.addr + r.size);
        assert!(reserved(lowmem::ACPI) && reserved(layout::ECAM_BASE) && reserved(layout::TSS_ADDR + 0x2FFF));
    }

    #[test]
    fn below_the_hole() {
        check(512 << 20, &[(0, 0x9_FC00), (1 << 20, 511 << 20)]);
        check(3 << 30, &[(0, 0x9_FC00), (1 << 20, (3 << 30) - (1 << 20))]);
    }

    #[test]
    fn beyond_the_hole() {
        check(6 << 30, &[(0, 0x9_FC00), (1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 3 << 30)]);
    }
}
