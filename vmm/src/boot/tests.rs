//! Whole boots into guest memory, from made-up kernel files.

use std::io::Write;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use tempfile::NamedTempFile;
use vm_memory::GuestMemoryBackend;

use super::*;

const RAM: u64 = 128 << 20;

fn memory(ram_size: u64) -> GuestMemoryMmap {
    let regions: Vec<_> =
        layout::ram_regions(ram_size).iter().map(|(addr, size)| (GuestAddress(*addr), *size as usize)).collect();
    GuestMemoryMmap::from_ranges(&regions).unwrap()
}

fn machine(ram_size: u64) -> MachineShape {
    MachineShape { ram_size, vcpus: 2, pci_window64: layout::pci_window64(ram_size, 40), devices: Vec::new() }
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// A bzImage of 1 setup sector and 4 KiB of 0xAB, with the header fields of Debian's 6.1.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    image.resize(1024 + 4096, 0xAB);
    put(&mut image, 0x1F1, &[1]);
    put(&mut image, 0x1FE, &[0x55, 0xAA]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20Fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]); // loadflags: LOADED_HIGH
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22C, &0x7FFF_FFFFu32.to_le_bytes()); // initrd_addr_max
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1]); // relocatable
    put(&mut image, 0x236, &0x7Fu16.to_le_bytes()); // xloadflags
    put(&mut image, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(&mut image, 0x260, &0x200_0000u32.to_le_bytes()); // init_size
    image
}

const ELF_PADDR: u64 = 0x100_0000;
const ELF_NOTES: usize = 64 + 2 * 56;

/// An ELF file with a PT_LOAD of 32 bytes (64 in memory) and a PT_NOTE of two notes, the second for PVH.
fn elf() -> Vec<u8> {
    let mut notes = Vec::new();
    for (name, kind, descriptor) in [(b"GNU\0", 3u32, [1u8; 8]), (b"Xen\0", 18, (ELF_PADDR + 16).to_le_bytes())] {
        for word in [4, 8, kind] {
            notes.extend_from_slice(&word.to_le_bytes());
        }
        notes.extend_from_slice(name);
        notes.extend_from_slice(&descriptor);
    }
    let code = ELF_NOTES + notes.len();
    let phdr = |kind: u32, offset: usize, paddr: u64, file_size: usize, mem_size: usize| {
        let mut phdr = kind.to_le_bytes().to_vec();
        phdr.extend_from_slice(&5u32.to_le_bytes());
        for word in [offset as u64, paddr, paddr, file_size as u64, mem_size as u64, 4] {
            phdr.extend_from_slice(&word.to_le_bytes());
        }
        phdr
    };
    let mut image = vec![0; 64];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, 2, 0]);
    image.extend(phdr(1, code, ELF_PADDR, 32, 64));
    image.extend(phdr(4, ELF_NOTES, 0, notes.len(), notes.len()));
    image.extend(notes);
    image.extend([0xCD; 32]);
    image
}

fn try_load(kernel: &[u8], cmdline: &str) -> Result<Entry, BootError> {
    load(&memory(RAM), file(kernel).path(), None, cmdline, &machine(RAM))
}

#[track_caller]
fn refused(kernel: &[u8], reason: &str) {
    let message = try_load(kernel, "").unwrap_err().to_string();
    assert!(message.contains(reason), "{message}");
}

#[test]
fn bzimage_boot() {
    for ram_size in [RAM, 6 << 30] {
        let (mem, initramfs) = (memory(ram_size), file(&[0x11; 5000]));
        let kernel = file(&bzimage());
        let entry = load(&mem, kernel.path(), Some(initramfs.path()), "console=ttyS0", &machine(ram_size)).unwrap();
        assert_eq!(entry, Entry::Linux64 { rip: 0x10_0200, boot_params: lowmem::ZERO_PAGE });

        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x10_0FFF)).unwrap(), 0xAB);
        let params: boot_params = mem.read_obj(GuestAddress(lowmem::ZERO_PAGE)).unwrap();
        let header = params.hdr;
        assert_eq!((header.boot_flag, header.header, header.type_of_loader), (0xAA55, 0x5372_6448, 0xFF));
        let mut cmdline = [0; 14];
        mem.read_slice(&mut cmdline, GuestAddress(header.cmd_line_ptr.into())).unwrap();
        assert_eq!(&cmdline, b"console=ttyS0\0");
        assert_eq!({ params.acpi_rsdp_addr }, lowmem::ACPI);

        // As high as the header's initrd_addr_max and RAM allow.
        let (addr, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!((u64::from(addr), size), (ram_size.min(0x8000_0000) - 0x2000, 5000));
        assert_eq!(mem.read_obj::<u8>(GuestAddress(u64::from(addr) + 4999)).unwrap(), 0x11);

        let table = params.e820_table;
        let map = memory_map::memory_map(ram_size);
        assert_eq!(usize::from(params.e820_entries), map.len());
        for (entry, range) in table.iter().zip(&map) {
            assert_eq!(({ entry.addr }, { entry.size }, { entry.r#type }), (range.addr, range.size, range.kind as u32));
        }
    }
}

#[test]
fn pvh_boot() {
    let (mem, initramfs) = (memory(RAM), file(&[0x11; 5000]));
    // The segment's BSS is cleared even where memory was not zero.
    mem.write_obj(u64::MAX, GuestAddress(ELF_PADDR + 56)).unwrap();
    let entry = load(&mem, file(&elf()).path(), Some(initramfs.path()), "quiet", &machine(RAM)).unwrap();
    assert_eq!(entry, Entry::Pvh { rip: ELF_PADDR + 16, start_info: lowmem::START_INFO });
    assert_eq!(mem.read_obj::<u8>(GuestAddress(ELF_PADDR + 31)).unwrap(), 0xCD);
    assert_eq!(mem.read_obj::<u64>(GuestAddress(ELF_PADDR + 56)).unwrap(), 0);

    let info: hvm_start_info = mem.read_obj(GuestAddress(lowmem::START_INFO)).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules, info.rsdp_paddr), (0x336e_c578, 1, 1, lowmem::ACPI));
    assert_eq!(mem.read_obj::<[u8; 6]>(GuestAddress(info.cmdline_paddr)).unwrap(), *b"quiet\0");
    let module: hvm_modlist_entry = mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (RAM - 0x2000, 5000));
    let map = memory_map::memory_map(RAM);
    assert_eq!(info.memmap_entries as usize, map.len());
    for (index, range) in map.iter().enumerate() {
        let addr = info.memmap_paddr + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        let entry: hvm_memmap_table_entry = mem.read_obj(GuestAddress(addr)).unwrap();
        assert_eq!((entry.addr, entry.size, entry.type_), (range.addr, range.size, range.kind as u32));
    }
}

#[test]
fn command_line_limits() {
    assert!(try_load(&bzimage(), &"x".repeat(2047)).is_ok());
    for kernel in [bzimage(), elf()] {
        let message = try_load(&kernel, &"x".repeat(2048)).unwrap_err().to_string();
        assert!(message.contains("2048 bytes") && message.contains("at most 2047"), "{message}");
        assert!(matches!(try_load(&kernel, "a\0b"), Err(BootError::CmdlineNul)));
    }
}

#[test]
fn malformed_bzimages() {
    let changed = |offset: usize, value: &[u8]| {
        let mut image = bzimage();
        put(&mut image, offset, value);
        image
    };
    refused(b"", "neither a bzImage nor an ELF");
    refused(b"\x1f\x8b\x08", "gzip -d");
    refused(&[b'M', b'Z', 0, 0], "EFI program");
    refused(&bzimage()[..0x210], "truncated");
    refused(&bzimage()[..1024], "truncated");
    refused(&changed(0x206, &[0x0B, 2]), "boot protocol 2.11");
    refused(&changed(0x211, &[0]), "zImage");
    refused(&changed(0x236, &[0, 0]), "32-bit kernel");
    refused(&changed(0x258, &u64::MAX.to_le_bytes()), "impossible addresses");
    refused(&changed(0x230, &[0; 4]), "impossible addresses");
    refused(&changed(0x260, &0x1000_0000u32.to_le_bytes()), "needs RAM up to 272 MiB");
}

#[test]
fn malformed_elf_files() {
    let changed = |offset: usize, value: &[u8]| {
        let mut image = elf();
        put(&mut image, offset, value);
        image
    };
    const LOAD: usize = 64;
    const NOTE: usize = 64 + 56;
    refused(&elf()[..20], "truncated");
    refused(&changed(4, &[1]), "another machine");
    refused(&changed(18, &[183]), "another machine");
    refused(&changed(56, &[0, 0]), "no program headers");
    refused(&changed(32, &u64::MAX.to_le_bytes()), "truncated");
    refused(&changed(LOAD + 24, &0x9000u64.to_le_bytes()), "1 MiB or above");
    refused(&changed(LOAD + 24, &u64::MAX.to_le_bytes()), "larger than the file or memory");
    refused(&changed(LOAD + 32, &64u64.to_le_bytes()), "larger than the file or memory");
    refused(&changed(LOAD + 40, &RAM.to_le_bytes()), "needs RAM up to 144 MiB");
    refused(&changed(NOTE, &[0; 4]), "without a PVH entry note");
    refused(&changed(NOTE + 32, &u64::MAX.to_le_bytes()), "bytes of notes");
    // A first note so long that the second is not found.
    refused(&changed(ELF_NOTES, &u32::MAX.to_le_bytes()), "without a PVH entry note");
    refused(&changed(ELF_NOTES + 24 + 16, &0x9_0000u64.to_le_bytes()), "in no loaded segment");
    refused(&changed(ELF_NOTES + 24 + 16, &(1u64 << 32).to_le_bytes()), "32-bit address");
}

#[test]
fn initramfs_refusals() {
    let kernel = file(&bzimage());
    let message = |initramfs: &Path| {
        load(&memory(RAM), kernel.path(), Some(initramfs), "", &machine(RAM)).unwrap_err().to_string()
    };
    assert!(message(file(b"").path()).contains("is empty"));
    assert!(message(Path::new("/nonexistent/initrd")).contains("/nonexistent/initrd"));
    let large = file(b"");
    large.as_file().set_len(RAM - 0x300_0000 + 1).unwrap();
    assert!(message(large.path()).contains("give the guest more memory"));
    let folder = tempfile::tempdir().unwrap();
    assert!(message(folder.path()).contains("not a regular file"));
}

#[test]
fn machine_limits() {
    let kernel = file(&bzimage());
    for (vcpus, ram_size) in [(0, RAM), (65, RAM), (1, 1 << 20)] {
        let machine = MachineShape { vcpus, ..machine(ram_size) };
        assert!(load(&memory(RAM), kernel.path(), None, "", &machine).is_err());
    }
}

/// `THESEUS_KERNEL=FILE cargo test -- --ignored real_kernel`: a kernel as a distribution packages it is loaded whole.
#[test]
#[ignore = "needs a kernel file"]
fn real_kernel() {
    let path = std::path::PathBuf::from(std::env::var_os("THESEUS_KERNEL").expect("THESEUS_KERNEL names a file"));
    let mem = memory(RAM);
    let entry = load(&mem, &path, None, "", &machine(RAM)).unwrap();
    println!("{entry:x?}");
    if let Entry::Linux64 { boot_params, .. } = entry {
        let params: boot_params = mem.read_obj(GuestAddress(boot_params)).unwrap();
        println!("{:x?}", params.hdr);
        let image = std::fs::read(&path).unwrap();
        let code = &image[(usize::from(params.hdr.setup_sects) + 1) * 512..];
        let mut loaded = vec![0; code.len()];
        mem.read_slice(&mut loaded, GuestAddress(lowmem::HIGH_MEMORY)).unwrap();
        assert!(loaded == code);
    }
    assert!(mem.check_range(GuestAddress(0), RAM as usize));
}

/// The words are those of a boot, so that it does not matter which one a caller meets.
#[test]
fn a_file_is_looked_at_without_being_opened() {
    let folder = tempfile::tempdir().unwrap();
    let (file, fifo, none) = (folder.path().join("file"), folder.path().join("fifo"), folder.path().join("none"));
    std::fs::write(&file, "").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    look_at(&file).unwrap();
    let said = |path: &Path| theseus_api::ApiError::chain(400, &look_at(path).unwrap_err()).causes;
    let missing = "No such file or directory (os error 2); give a file that exists and that the VMM may read";
    assert_eq!(said(&none), [format!("cannot open {}: {missing}", none.display())]);
    for path in [fifo.as_path(), folder.path()] {
        assert!(said(path)[0].contains("is not a regular file"), "{:?}", said(path));
    }
    let vm_memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    let booted = kernel::load(&vm_memory, &none, 64 << 20).unwrap_err();
    assert_eq!(theseus_api::ApiError::chain(500, &booted).causes, said(&none));
}
