//! A guest of a few instructions, for machines whose KVM cannot run a kernel: it writes one word of every page of its
//! memory, over and over, and counts the pages.

use std::path::Path;

use anyhow::{Context, Result};

/// Guest physical address, and offset in the memfd, of the count of pages written (u64, little endian).
pub const COUNTER: u64 = 0x1F0_0000;
/// The first page it writes; below are the VMM's boot structures, its own code, page tables and the counter.
const FIRST_PAGE: u64 = 0x200_0000;
const PAGE: u64 = 4096;
/// RAM lies below 3 GiB, and what does not fit from 4 GiB on.
const LOW_MAX: u64 = 3 << 30;
const HIGH: u64 = 4 << 30;

/// Where the 64-bit entry lies in the image, and the image in the file (boot.rst: one boot sector and one of setup
/// code).
const ENTRY: usize = 0x200;
const IMAGE: usize = 1024;

// Long mode, the first 4 GiB mapped one to one by the page tables at 0x9000 (PDPT at 0xA000), no IDT.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.theseus_guest, "a"
    .balign 16
    .global theseus_guest_start, theseus_guest_ends, theseus_guest_end
theseus_guest_start:
    mov r8, [rip + theseus_guest_ends]
    mov r9, [rip + theseus_guest_ends + 8]
    // Page directories at 16 MiB for what lies above 4 GiB, in pages of 2 MiB.
    mov edi, 0x1000000
    mov esi, 0xA020
    mov rax, 0x100000083
21: cmp rax, r9
    jae 23f
    lea rdx, [rdi + 3]
    mov [rsi], rdx
    add rsi, 8
    mov ecx, 512
22: mov [rdi], rax
    add rdi, 8
    add rax, 0x200000
    dec ecx
    jnz 22b
    jmp 21b
23: mov rdx, cr3
    mov cr3, rdx
    xor ebx, ebx
    mov ebp, 0x1F00000
24: mov edi, 0x2000000
25: inc qword ptr [rdi]
    inc rbx
    mov [rbp], rbx
    add rdi, 4096
    cmp rdi, r8
    jb 25b
    mov rdi, 0x100000000
26: cmp rdi, r9
    jae 24b
    inc qword ptr [rdi]
    inc rbx
    mov [rbp], rbx
    add rdi, 4096
    jmp 26b
    .balign 8
theseus_guest_ends:
    .quad 0, 0
theseus_guest_end:
    .popsection
"#
);

unsafe extern "C" {
    static theseus_guest_start: u8;
    /// Ends of the low and of the high RAM.
    static theseus_guest_ends: u8;
    static theseus_guest_end: u8;
}

/// (end of low RAM, end of high RAM) of a guest with `size` bytes.
fn ends(size: u64) -> (u64, u64) {
    (size.min(LOW_MAX), HIGH + size.saturating_sub(LOW_MAX))
}

/// Pages it writes in one round over its memory.
pub fn pages(size: u64) -> u64 {
    let (low, high) = ends(size);
    (low - FIRST_PAGE + high - HIGH) / PAGE
}

fn code(size: u64) -> Vec<u8> {
    let (start, data, end) =
        (&raw const theseus_guest_start, &raw const theseus_guest_ends, &raw const theseus_guest_end);
    // SAFETY: both labels are of the one block of bytes above.
    let mut code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec();
    let at = data as usize - start as usize;
    let (low, high) = ends(size);
    code[at..at + 8].copy_from_slice(&low.to_le_bytes());
    code[at + 8..at + 16].copy_from_slice(&high.to_le_bytes());
    code
}

/// Writes the guest for `size` bytes of RAM.
pub fn write(path: &Path, size: u64) -> Result<()> {
    write_image(path, &code(size))
}

/// A guest whose vCPUs wait until the byte at 0x51008 is not 0, and then write the 8042's reset command for ever,
/// counting what they write in the dword at 0x51000.
pub fn flood() -> Vec<u8> {
    // For the other vCPUs, in real mode at 0x50000: cli; mov ax, 0x5000; mov ds, ax; wait: cmp byte [0x1008], 0; je
    // wait; write: lock inc dword [0x1000]; mov al, 0xFE; out 0x64, al; jmp write
    const OTHERS: [u8; 25] = [
        0xFA, 0xB8, 0x00, 0x50, 0x8E, 0xD8, 0x80, 0x3E, 0x08, 0x10, 0x00, 0x74, 0xF9, 0xF0, 0x66, 0xFF, 0x06, 0x00,
        0x10, 0xB0, 0xFE, 0xE6, 0x64, 0xEB, 0xF4,
    ];
    let mut code = Vec::new();
    for (at, byte) in OTHERS.iter().enumerate() {
        // mov byte [0x50000 + at], byte
        code.extend([0xC6, 0x04, 0x25, at as u8, 0x00, 0x05, 0x00, *byte]);
    }
    // mov eax, 0xFEE00000; mov dword [rax + 0x300], all but self: INIT; and then SIPI to 0x50000 (SDM 3A, 11.6.1)
    code.extend([0xB8, 0x00, 0x00, 0xE0, 0xFE]);
    for command in [0x000C_4500_u32, 0x000C_4650] {
        code.extend([0xC7, 0x80, 0x00, 0x03, 0x00, 0x00]);
        code.extend(command.to_le_bytes());
    }
    // The same in long mode: wait: cmp byte [0x51008], 0; je wait; write: lock inc dword [0x51000]; mov al, 0xFE; out
    // 0x64, al; jmp write
    code.extend([0x80, 0x3C, 0x25, 0x08, 0x10, 0x05, 0x00, 0x00, 0x74, 0xF6]);
    code.extend([0xF0, 0xFF, 0x04, 0x25, 0x00, 0x10, 0x05, 0x00, 0xB0, 0xFE, 0xE6, 0x64, 0xEB, 0xF2]);
    code
}

/// A bzImage of 64-bit `code`, with just what the boot protocol asks for.
pub fn write_image(path: &Path, code: &[u8]) -> Result<()> {
    let mut file = vec![0_u8; IMAGE + ENTRY];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects
    put(0x1FE, &0xAA55_u16.to_le_bytes()); // boot_flag
    put(0x202, b"HdrS");
    put(0x206, &0x020F_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &255_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x10_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    file.extend(code);
    std::fs::write(path, file).with_context(|| format!("{}", path.display()))
}
