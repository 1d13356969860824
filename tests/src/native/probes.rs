//! Guests of a few instructions for what no kernel does on purpose. Each tells by counts in its memory how it is.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::Result;

use crate::harness::proc;

// Long mode, the first 4 GiB mapped one to one, no IDT, as in [`super::guest`]. Counts: 0x1F00000 what it is about,
// 0x1F00008 that it goes on.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.theseus_probes, "a"

    // Counts how often PVCLOCK_GUEST_STOPPED was set in its kvmclock page, and clears it.
    .global theseus_probe_clock, theseus_probe_clock_end
theseus_probe_clock:
    mov ebp, 0x1F00000
    mov ebx, 0x1F01000
    mov ecx, 0x4B564D01         // MSR_KVM_SYSTEM_TIME_NEW
    lea eax, [rbx + 1]
    xor edx, edx
    wrmsr
31: inc qword ptr [rbp + 8]
    test byte ptr [rbx + 29], 2 // pvclock_vcpu_time_info.flags
    jz 31b
    and byte ptr [rbx + 29], 0xFD
    inc qword ptr [rbp]
    jmp 31b
theseus_probe_clock_end:

    // Halts with its timer in deadline mode and not armed, and counts its interrupts.
    .global theseus_probe_timer, theseus_probe_timer_end
theseus_probe_timer:
    mov ebp, 0x1F00000
    mov esp, 0x1F04000
    mov ebx, 0x1F02000
    lea rax, [rip + 33f]
    mov word ptr [rbx + 0x400], ax // The gate of vector 0x40.
    mov cx, cs
    mov word ptr [rbx + 0x402], cx
    mov word ptr [rbx + 0x404], 0x8E00
    shr rax, 16
    mov word ptr [rbx + 0x406], ax
    mov qword ptr [rbx + 0x408], 0
    mov word ptr [rbx + 0x800], 0x40F
    mov qword ptr [rbx + 0x802], rbx
    lidt [rbx + 0x800]
    mov edi, 0xFEE00000
    mov dword ptr [rdi + 0xF0], 0x1FF
    mov dword ptr [rdi + 0x320], 0x40040
32: inc qword ptr [rbp + 8]
    sti
    hlt
    jmp 32b
33: inc qword ptr [rbp]
    mov dword ptr [rdi + 0xB0], 0
    iretq
theseus_probe_timer_end:

    // Leaves long mode for a code segment with L = 1, which protected mode ignores.
    .global theseus_probe_code, theseus_probe_code_end
theseus_probe_code:
    mov esp, 0x1F04000
    mov ebx, 0x1F02000
    mov qword ptr [rbx], 0
    mov rax, 0x00CF9A000000FFFF
    mov qword ptr [rbx + 0x08], rax
    mov rax, 0x00CF92000000FFFF
    mov qword ptr [rbx + 0x10], rax
    mov rax, 0x00EF9A000000FFFF
    mov qword ptr [rbx + 0x18], rax
    mov word ptr [rbx + 0x40], 0x1F
    mov qword ptr [rbx + 0x42], rbx
    lgdt [rbx + 0x40]
    push 0x08
    lea rax, [rip + 34f]
    push rax
    .byte 0x48, 0xCB            // retfq
    .code32
34: mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov ecx, 0xC0000080         // EFER: without LME
    rdmsr
    and eax, 0xFFFFFEFF
    wrmsr
    call 35f
35: pop eax
    .byte 0x83, 0xC0, 8         // add eax, 36f - 35b
    push 0x18
    push eax
    .byte 0xCB                  // retf
36: inc dword ptr [0x1F00008]
    jmp 36b
    .code64
theseus_probe_code_end:

    // Has KVM write its EOI flag into the first BAR of the device in slot 1, and switches that BAR off.
    .global theseus_probe_eoi, theseus_probe_eoi_end
theseus_probe_eoi:
    mov ebp, 0x1F00000
    mov edx, 0xCF8
    mov eax, 0x80000810
    out dx, eax
    mov edx, 0xCFC
    in eax, dx
    and eax, 0xFFFFFFF0
    mov ebx, eax
    mov edx, 0xCF8
    mov eax, 0x80000804
    out dx, eax
    mov edx, 0xCFC
    mov eax, 2                  // COMMAND: memory
    out dx, ax
    mov ecx, 0x4B564D04         // MSR_KVM_PV_EOI_EN
    lea eax, [rbx + 1]
    xor edx, edx
    wrmsr
    mov edx, 0xCFC
    xor eax, eax
    out dx, ax
37: inc qword ptr [rbp + 8]
    jmp 37b
theseus_probe_eoi_end:

    // Says lines of 8 hexadecimal digits, which count from 0, until so many are said as the dword at 0x1F00010 is; from
    // there on 0x7FFFFFFF: switches off. Bit 31: its reset.
    .global theseus_probe_words, theseus_probe_words_end
theseus_probe_words:
    mov ebp, 0x1F00000
38: pause
    mov eax, [rbp + 16]
    cmp eax, 0x7FFFFFFF
    jae 41f
    mov ebx, [rbp]
    cmp ebx, eax
    jae 38b
    mov edx, 0x3F8
    mov ecx, 8
39: rol ebx, 4
    mov eax, ebx
    and eax, 15
    add eax, 0x30
    cmp eax, 0x39
    jbe 40f
    add eax, 0x27
40: out dx, al
    dec ecx
    jnz 39b
    mov eax, 10
    out dx, al
    inc dword ptr [rbp]
    jmp 38b
41: ja 42f
    mov edx, 0x600              // ACPI 6.5, 4.8.3.7: SLP_EN, and the type of S5
    mov eax, 0x34
    out dx, al
    jmp 41b
42: mov eax, 0xFE
    out 0x64, al
    jmp 42b
theseus_probe_words_end:

    // Writes to the device that counts, and goes on for as long as that has counted as often (vmm test hook
    // `counting-device`). It blocks what the dword at 0x1F00010 says.
    .global theseus_probe_counting, theseus_probe_counting_end
theseus_probe_counting:
    mov ebp, 0x1F00000
    xor esi, esi
43: mov edx, 0x5F4
    mov eax, [rbp + 16]
    out dx, eax
    mov edx, 0x5F0
    out dx, eax
    inc esi
    in eax, dx
    mov [rbp], rax
    cmp eax, esi
44: jne 44b
    inc qword ptr [rbp + 8]
    jmp 43b
theseus_probe_counting_end:
    .popsection
"#
);

macro_rules! probe {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident) => {
        $(#[$doc])*
        pub fn $name() -> Vec<u8> {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both labels are of the one block of bytes above.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec()
        }
    };
}

probe!(
    /// Counts how often it was told that it stood still.
    clock,
    theseus_probe_clock,
    theseus_probe_clock_end
);
probe!(
    /// Counts interrupts of a timer that it has never armed.
    timer,
    theseus_probe_timer,
    theseus_probe_timer_end
);
probe!(
    /// Runs with CS.L = 1 outside of long mode.
    code_segment,
    theseus_probe_code,
    theseus_probe_code_end
);
probe!(
    /// Has KVM look for its EOI flag where there is no memory any more.
    eoi_flag,
    theseus_probe_eoi,
    theseus_probe_eoi_end
);
probe!(
    /// Says as many lines as it is told to, switches off, or resets itself: see [`tell`].
    words,
    theseus_probe_words,
    theseus_probe_words_end
);

probe!(
    /// Counts by a device, and stops where that has counted otherwise. What [`tell`] tells it blocks an update.
    counting,
    theseus_probe_counting,
    theseus_probe_counting_end
);

/// What [`words`] is to do: to say so many lines in all, or to end.
pub const SWITCH_OFF: u32 = 0x7FFF_FFFF;
pub const RESET: u32 = 1 << 31;

/// Tells the guest [`words`] or [`counting`] of this VMM.
pub fn tell(pid: u32, word: u32) -> Result<()> {
    let ram = proc::open_fd_to(pid, "/memfd:guest-ram", File::options().read(true).write(true))?;
    Ok(ram.write_all_at(&word.to_le_bytes(), 0x1F0_0010)?)
}
