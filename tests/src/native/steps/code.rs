//! What goes through the steps.

use super::{Kind, Step};

/// The most there can be: places in the table of their lists.
const VCPUS: usize = 8;

// Register use: rbp the vCPU's block, r14 its first step, r15 the step, r13 how often it is still to be done, r12 its
// address or number this time. Block: 0 rounds, 8 steps, 16 exceptions, 24 differences, 32 the first one (what, found,
// expected), 56 last exception, 64 interrupts, 80 top of its stack, 88 whether it comes back from real mode, 96 r12 to
// r15, 0x90 a descriptor of a table.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.theseus_steps, "a"
    .balign 16
    .global theseus_steps, theseus_steps_table, theseus_steps_list
theseus_steps:
    // What a vCPU does from its SIPI on, to where that sends it.
    cld
    lea rsi, [rip + theseus_steps_sipi]
    mov edi, 0x50000
    mov ecx, 0x200
    rep movsb
    lea rax, [rip + theseus_steps_joined]
    mov [0x501E0], rax
    lgdt [0x501D0]
    mov eax, 0x28
    mov ss, eax
    mov ds, eax
    mov es, eax
    // Gates of all vectors, interrupts off.
    lea rax, [rip + theseus_steps_vectors]
    mov edi, 0x1F10000
    mov ecx, 256
2:  mov [rdi], ax
    mov word ptr [rdi + 2], 0x18
    mov word ptr [rdi + 4], 0x8E00
    mov rdx, rax
    shr rdx, 16
    mov [rdi + 6], rdx
    mov dword ptr [rdi + 12], 0
    add rax, 16
    add rdi, 16
    dec ecx
    jnz 2b
    mov word ptr [0x1F11000], 0xFFF
    mov qword ptr [0x1F11002], 0x1F10000
    // The others: INIT, and SIPI to 0x50000 (SDM 3A, 11.6.1).
    mov eax, 0xFEE00000
    mov dword ptr [rax + 0xF0], 0x1FF
    mov dword ptr [rax + 0x300], 0xC4500
    mov dword ptr [rax + 0x300], 0xC4650
    mov esp, 0x1F20000
    push 0x18
    lea rax, [rip + theseus_steps_joined]
    push rax
    .byte 0x48, 0xCB                // retfq

theseus_steps_joined:
    lidt [0x1F11000]
    mov eax, 1
    xor ecx, ecx
    cpuid
    shr ebx, 24
    mov eax, ebx
    shl eax, 8
    lea rbp, [rax + 0x1F00000]
    mov eax, ebx
    inc eax
    shl eax, 12
    lea rsp, [rax + 0x1F20000]
    mov [rbp + 80], rsp
    cmp dword ptr [rbp + 88], 0
    je 3f
    mov dword ptr [rbp + 88], 0
    mov r12, [rbp + 96]
    mov r13, [rbp + 104]
    mov r14, [rbp + 112]
    mov r15, [rbp + 120]
    jmp theseus_steps_next
3:  lea rcx, [rip + theseus_steps_table]
    mov r14, [rcx + rbx * 8]
theseus_steps_round:
    mov r15, r14
theseus_steps_step:
    mov r12, [r15 + 16]
    mov r13, [r15 + 32]
theseus_steps_again:
    inc qword ptr [rbp + 8]
    mov rbx, [r15 + 24]
    mov eax, [r15]
    lea rcx, [rip + theseus_steps_kinds]
    movsxd rax, dword ptr [rcx + rax * 4]
    add rax, rcx
    jmp rax
theseus_steps_next:
    add r12, [r15 + 40]
    dec r13
    jnz theseus_steps_again
    add r15, 48
    jmp theseus_steps_step

    .macro theseus_step name
    .long theseus_steps_\name - theseus_steps_kinds
    .endm
    .balign 4
theseus_steps_kinds:
    theseus_step end
    theseus_step from_here
    theseus_step out
    theseus_step in
    theseus_step outs
    theseus_step ins
    theseus_step store
    theseus_step load
    theseus_step move
    theseus_step wrmsr
    theseus_step same_msr
    theseus_step change_msr
    theseus_step settle_msr
    theseus_step cr0
    theseus_step cr2
    theseus_step cr3
    theseus_step cr4
    theseus_step cr8
    theseus_step dr0
    theseus_step dr6
    theseus_step dr7
    theseus_step xcr0
    theseus_step lidt
    theseus_step cli
    theseus_step sti
    theseus_step hlt
    theseus_step undefined
    theseus_step call
    theseus_step hypercall
    theseus_step wait
    theseus_step real_mode
    theseus_step spin

theseus_steps_end:
    inc qword ptr [rbp]
    jmp theseus_steps_round
theseus_steps_from_here:
    lea r14, [r15 + 48]
    jmp theseus_steps_next
theseus_steps_out:
    mov edx, r12d
    mov eax, ebx
    cmp byte ptr [r15 + 8], 2
    jb 2f
    je 3f
    out dx, eax
    jmp theseus_steps_next
2:  out dx, al
    jmp theseus_steps_next
3:  out dx, ax
    jmp theseus_steps_next
theseus_steps_in:
    mov edx, r12d
    cmp byte ptr [r15 + 8], 2
    jb 2f
    je 3f
    in eax, dx
    jmp theseus_steps_next
2:  in al, dx
    jmp theseus_steps_next
3:  in ax, dx
    jmp theseus_steps_next
theseus_steps_outs:
    mov edx, r12d
    mov rsi, rbx
    mov ecx, [r15 + 12]
    cmp byte ptr [r15 + 8], 2
    jb 2f
    je 3f
    rep outsd
    jmp theseus_steps_next
2:  rep outsb
    jmp theseus_steps_next
3:  rep outsw
    jmp theseus_steps_next
theseus_steps_ins:
    mov edx, r12d
    mov rdi, rbx
    mov ecx, [r15 + 12]
    cmp byte ptr [r15 + 8], 2
    jb 2f
    je 3f
    rep insd
    jmp theseus_steps_next
2:  rep insb
    jmp theseus_steps_next
3:  rep insw
    jmp theseus_steps_next
theseus_steps_store:
    cmp byte ptr [r15 + 8], 4
    je 4f
    ja 5f
    cmp byte ptr [r15 + 8], 2
    je 3f
    mov [r12], bl
    jmp theseus_steps_next
3:  mov [r12], bx
    jmp theseus_steps_next
4:  mov [r12], ebx
    jmp theseus_steps_next
5:  mov [r12], rbx
    jmp theseus_steps_next
theseus_steps_load:
    cmp byte ptr [r15 + 8], 4
    je 4f
    ja 5f
    cmp byte ptr [r15 + 8], 2
    je 3f
    mov al, [r12]
    jmp theseus_steps_next
3:  mov ax, [r12]
    jmp theseus_steps_next
4:  mov eax, [r12]
    jmp theseus_steps_next
5:  mov rax, [r12]
    jmp theseus_steps_next
theseus_steps_move:
    mov rsi, r12
    mov rdi, rbx
    mov ecx, [r15 + 12]
    cmp byte ptr [r15 + 8], 1
    je 2f
    rep movsq
    jmp theseus_steps_next
2:  rep movsb
    jmp theseus_steps_next
theseus_steps_wrmsr:
    mov ecx, r12d
    mov rax, rbx
    mov rdx, rbx
    shr rdx, 32
    wrmsr
    jmp theseus_steps_next

    // rax: the MSR r12.
theseus_steps_rdmsr:
    mov ecx, r12d
    rdmsr
    shl rdx, 32
    or rax, rdx
    ret
    // rdi: the note of it. 0 whether it is valid, 8 its value.
theseus_steps_note:
    mov rdi, [r15 + 32]
    sub rdi, r13
    shl rdi, 4
    add rdi, rbx
    ret
theseus_steps_change_msr:
    call theseus_steps_note
    mov qword ptr [rdi], 0
    call theseus_steps_rdmsr
    mov [rdi + 8], rax
    mov qword ptr [rdi], 1
    mov edx, [r15 + 12]
    xor rax, rdx
    mov rdx, rax
    shr rdx, 32
    wrmsr
    call theseus_steps_rdmsr
    mov [rdi + 8], rax
    jmp theseus_steps_next
theseus_steps_settle_msr:
    call theseus_steps_note
    cmp qword ptr [rdi], 0
    je theseus_steps_next
    call theseus_steps_rdmsr
    cmp rax, [rdi + 8]
    je theseus_steps_next
    mov qword ptr [rdi], 0
    jmp theseus_steps_next
theseus_steps_same_msr:
    call theseus_steps_note
    cmp qword ptr [rdi], 0
    je theseus_steps_next
    call theseus_steps_rdmsr
    cmp rax, [rdi + 8]
    je theseus_steps_next
    cmp qword ptr [rbp + 24], 0
    jne 2f
    mov [rbp + 32], r12
    mov [rbp + 40], rax
    mov rax, [rdi + 8]
    mov [rbp + 48], rax
2:  inc qword ptr [rbp + 24]
    jmp theseus_steps_next

theseus_steps_cr0:
    mov cr0, r12
    jmp theseus_steps_next
theseus_steps_cr2:
    mov cr2, r12
    jmp theseus_steps_next
theseus_steps_cr3:
    mov cr3, r12
    jmp theseus_steps_next
theseus_steps_cr4:
    mov cr4, r12
    jmp theseus_steps_next
theseus_steps_cr8:
    mov cr8, r12
    jmp theseus_steps_next
theseus_steps_dr0:
    mov dr0, r12
    jmp theseus_steps_next
theseus_steps_dr6:
    mov dr6, r12
    jmp theseus_steps_next
theseus_steps_dr7:
    mov dr7, r12
    jmp theseus_steps_next
theseus_steps_xcr0:
    xor ecx, ecx
    mov rax, r12
    mov rdx, r12
    shr rdx, 32
    xsetbv
    jmp theseus_steps_next
theseus_steps_lidt:
    mov [rbp + 0x90], bx
    mov [rbp + 0x92], r12
    lidt [rbp + 0x90]
    jmp theseus_steps_next
theseus_steps_cli:
    cli
    jmp theseus_steps_next
theseus_steps_sti:
    sti
    nop
    jmp theseus_steps_next
theseus_steps_hlt:
    hlt
    jmp theseus_steps_next
theseus_steps_undefined:
    ud2
    jmp theseus_steps_next
theseus_steps_call:
    call r12
    jmp theseus_steps_next
theseus_steps_hypercall:
    mov rax, r12
    mov rcx, rbx
    mov rdx, rbx
    mov rsi, rbx
    vmmcall
    jmp theseus_steps_next
theseus_steps_wait:
    inc qword ptr [rbp + 8]
    pause
    cmp dword ptr [r12], 0
    je theseus_steps_wait
    jmp theseus_steps_next
theseus_steps_spin:
    mov rcx, r12
2:  dec rcx
    jnz 2b
    jmp theseus_steps_next

    // By compatibility mode and protected mode; back by what a SIPI does.
theseus_steps_real_mode:
    cli
    mov [rbp + 96], r12
    mov [rbp + 104], r13
    mov [rbp + 112], r14
    mov [rbp + 120], r15
    mov dword ptr [rbp + 88], 1
    mov ebx, r12d
    push 0x08
    push 0x50080
    .byte 0x48, 0xCB                // retfq

    .balign 16
theseus_steps_vectors:
    .set theseus_steps_vector, 0
    .rept 256
    .balign 16
    .if theseus_steps_vector == 8 || theseus_steps_vector == 17 || theseus_steps_vector == 21
    .elseif theseus_steps_vector >= 10 && theseus_steps_vector <= 14
    .elseif theseus_steps_vector == 29 || theseus_steps_vector == 30
    .else
    .byte 0x6A, 0                   // push 0: there is no error code
    .endif
    .byte 0x68                      // push its number
    .long theseus_steps_vector
    jmp theseus_steps_taken
    .set theseus_steps_vector, theseus_steps_vector + 1
    .endr
theseus_steps_taken:
    cmp dword ptr [rsp], 2
    je 3f
    cmp dword ptr [rsp], 32
    jae 4f
    inc qword ptr [rbp + 16]
    pop qword ptr [rbp + 56]
    lea rax, [rip + theseus_steps_next]
    mov [rsp + 8], rax
    mov rax, [rbp + 80]
    mov [rsp + 32], rax
    add rsp, 8
    iretq
3:  inc qword ptr [rbp + 64]
    add rsp, 16
    iretq
4:  inc qword ptr [rbp + 64]
    push rax
    push rcx
    push rdx
    mov ecx, 0x1B
    rdmsr
    and eax, 0xC00
    cmp eax, 0xC00
    je 5f
    mov eax, 0xFEE00000
    mov dword ptr [rax + 0xB0], 0
    jmp 6f
5:  mov ecx, 0x80B
    xor eax, eax
    xor edx, edx
    wrmsr
6:  pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

    // At 0x50000, in real mode.
    .code16
theseus_steps_sipi:
    cli
    mov ax, 0x5000
    mov ds, ax
    lgdt [0x1D0]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xEA                // jmp 0x08:0x50040
    .long 0x50040
    .word 0x08
    .code32
    .org theseus_steps_sipi + 0x40
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, 0x20                   // CR4.PAE
    mov cr4, eax
    mov eax, 0x9000
    mov cr3, eax
    mov ecx, 0xC0000080             // EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80000031             // CR0.PG, NE, ET, PE
    mov cr0, eax
    .byte 0xEA                      // jmp 0x18:0x50100
    .long 0x50100
    .word 0x18
    // Out of long mode.
    .org theseus_steps_sipi + 0x80
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ecx, ebx
2:  dec ecx
    jnz 2b
    mov eax, 0x31
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    and eax, 0xFFFFFEFF
    wrmsr
    mov ecx, ebx
2:  dec ecx
    jnz 2b
    .byte 0xEA                      // jmp 0x20:0x140
    .long 0x140
    .word 0x20
    .code64
    .org theseus_steps_sipi + 0x100
    mov eax, 0x28
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov rax, [0x501E0]
    jmp rax
    .code16
    .org theseus_steps_sipi + 0x140
    mov ecx, ebx
2:  dec ecx
    jnz 2b
    mov eax, 0x30
    mov cr0, eax
    .byte 0xEA                      // jmp 0x5000:0x160
    .word 0x160, 0x5000
    .org theseus_steps_sipi + 0x160
    mov ecx, ebx
2:  dec ecx
    jnz 2b
    .byte 0xEA                      // jmp 0x5000:0
    .word 0, 0x5000
    .org theseus_steps_sipi + 0x180
    .code64
    .quad 0
    .quad 0x00CF9B000000FFFF        // 0x08: code of 32 bits
    .quad 0x00CF93000000FFFF        // 0x10: data
    .quad 0x00AF9B000000FFFF        // 0x18: code of 64 bits
    .quad 0x00009B050000FFFF        // 0x20: code of 16 bits, at 0x50000
    .quad 0x00CF93000000FFFF        // 0x28: data
    .org theseus_steps_sipi + 0x1D0
    .word 47
    .quad 0x50180
    .org theseus_steps_sipi + 0x200

    .balign 8
theseus_steps_table:
    .quad 0, 0, 0, 0, 0, 0, 0, 0
theseus_steps_list:
    .popsection
"#
);

unsafe extern "C" {
    static theseus_steps: u8;
    static theseus_steps_table: u8;
    static theseus_steps_list: u8;
}

/// The code of a guest whose vCPU `n` goes through `vcpus[n]`; those that there are more, through the last.
pub fn guest(vcpus: &[Vec<Step>]) -> Vec<u8> {
    const LOADED: u64 = 0x10_0200;
    let (start, table, end) = (&raw const theseus_steps, &raw const theseus_steps_table, &raw const theseus_steps_list);
    // SAFETY: the labels are of the one block of bytes above.
    let mut code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec();
    let table = table as usize - start as usize;
    let mut lists = Vec::new();
    for steps in vcpus {
        lists.push(LOADED + code.len() as u64);
        code.extend(steps.iter().chain([&Step::new(Kind::End, 0, 0)]).flat_map(Step::bytes));
    }
    for (vcpu, place) in code[table..].chunks_exact_mut(8).take(VCPUS).enumerate() {
        let list = lists.get(vcpu).or(lists.last()).copied().unwrap_or_default();
        place.copy_from_slice(&list.to_le_bytes());
    }
    code
}
