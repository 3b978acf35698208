/*
 * Firmware, and all there is, of the guest that stress.c migrates
 *
 * A BIOS would take longer to start than the test, and would use RAM.
 *
 * It writes to pages in pseudo-random order, at a limited rate, for ever.  The
 * writes are numbered, and what a page has to hold follows from the number of
 * the last write to it, which is kept in a table, and from its own number.
 * Before a page is written again it is checked.
 *
 * A page has the sequence number of the write, then words that follow from that
 * and from the number of the page, and at its end their checksum.  Each fourth
 * write makes it a page of zeroes.
 *
 * What is said on the serial port:
 *   B  another batch of pages was written, and no page was found to be wrong
 *   V  the host set "verify", and all pages are right
 *   X  a page is wrong; the guest has stopped
 *
 * This is assembled as data of the test program, for the processor of an x86
 * host.  It runs elsewhere: so that nothing has to be relocated, each address is
 * a difference of two labels.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "sparse-writer.h"

#define ADDRESS(label) (label - sparse_writer + SPARSE_WRITER_LOAD)

#define COM1            0x3f8
#define STACK           SPARSE_WRITER_LOAD

#define CODE_SELECTOR   0x08
#define DATA_SELECTOR   0x10

#define PAGE_SHIFT      12
#define PAGE_MASK       0xfff
#define STRIDE          512             /* from word to word of a page */

        .section .rodata.sparse_writer, "a"
        .globl  sparse_writer
        .globl  sparse_writer_end

        .code16
sparse_writer:
        jmp     start16

        .org    SPARSE_WRITER_PARAMETERS - SPARSE_WRITER_LOAD
base:           .long   0x01000000
pages:          .long   1024
turn:           .long   100000
seed:           .long   1
focus:          .long   0
focus_mask:     .long   0xfff
verify:         .long   0

sequence:       .long   0               /* of the last write, or this one */
current:        .long   0
        .org    SPARSE_WRITER_PARAMETERS_END - SPARSE_WRITER_LOAD

        .p2align 3
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff      /* code: 32 bit, from 0, 4 GiB */
        .quad   0x00cf92000000ffff      /* data: the same */
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   ADDRESS(gdt)

start16:
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              /* A20 */
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   ADDRESS(gdt_pointer)
        movl    %cr0, %eax
        orb     $1, %al                 /* protected mode */
        movl    %eax, %cr0
        ljmpl   $CODE_SELECTOR, $ADDRESS(start32)

        .code32
start32:
        movw    $DATA_SELECTOR, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $STACK, %esp

        /* One page a turn */
main_loop:
        cmpl    $0, ADDRESS(verify)
        jne     verify_all

        /* Which: the upper half of seed * pages is evenly distributed */
        imull   $1664525, ADDRESS(seed), %eax
        addl    $1013904223, %eax
        movl    %eax, ADDRESS(seed)
        movl    %eax, %ecx
        mull    ADDRESS(pages)
        movl    %edx, %esi
        testb   $0x60, %ch
        jnz     1f
        shrl    $16, %ecx               /* each fourth is one of those that */
        andl    ADDRESS(focus_mask), %ecx   /* the test wants most */
        addl    ADDRESS(focus), %ecx
        movl    %ecx, %esi
1:
        movl    SPARSE_WRITER_TABLE(, %esi, 4), %ebx
        testl   %ebx, %ebx              /* reading an untouched page would */
        jz      2f                      /* populate it before it is written */
        call    check_page
2:
        movl    %esi, ADDRESS(current)
        movl    ADDRESS(sequence), %ebx
        incl    %ebx
        movl    %ebx, ADDRESS(sequence)
        call    write_page
        movl    %ebx, SPARSE_WRITER_TABLE(, %esi, 4)

        testl   $(SPARSE_WRITER_BATCH - 1), %ebx
        jnz     3f
        movb    $'B', %al
        call    say
3:
        rdtsc
        movl    %eax, %ecx
4:
        pause
        rdtsc
        subl    %ecx, %eax
        cmpl    ADDRESS(turn), %eax
        jb      4b
        jmp     main_loop

verify_all:
        xorl    %esi, %esi
1:
        movl    SPARSE_WRITER_TABLE(, %esi, 4), %ebx
        call    check_page
        incl    %esi
        cmpl    ADDRESS(pages), %esi
        jb      1b
        movl    $0, ADDRESS(verify)
        movb    $'V', %al
        call    say
        jmp     main_loop

        /*
         * What page %esi has to hold after write %ebx: its address in %edi, the
         * first word in %eax, what is added to it for each next one in %edx.
         * %ecx is where the checksum begins.
         */
expected:
        movl    %esi, %edi
        shll    $PAGE_SHIFT, %edi
        addl    ADDRESS(base), %edi
        xorl    %eax, %eax
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        testb   $3, %bl
        jz      1f
        movl    %ebx, %eax
        imull   $0x9e3779b1, %esi, %edx
        incl    %edx
1:
        ret

write_page:
        call    expected
1:
        movl    %eax, (%edi)
        roll    $5, %ecx
        addl    %eax, %ecx
        addl    %edx, %eax
        addl    $STRIDE, %edi
        testl   $PAGE_MASK, %edi
        jnz     1b
        movl    %ecx, -4(%edi)
        ret

check_page:
        call    expected
1:
        cmpl    %eax, (%edi)
        jne     wrong
        roll    $5, %ecx
        addl    %eax, %ecx
        addl    %edx, %eax
        addl    $STRIDE, %edi
        testl   $PAGE_MASK, %edi
        jnz     1b
        cmpl    %ecx, -4(%edi)
        jne     wrong
        ret

wrong:
        movb    $'X', %al
        call    say
1:
        hlt
        jmp     1b

say:
        movw    $COM1, %dx
        outb    %al, %dx
        ret
loaded_end:

        /*
         * This part stays in the ROM, of which it is the end.  The processor
         * starts in the last 16 bytes of the segment that %cs is for.
         */
        .code16
copy_to_ram:
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $(sparse_writer - sparse_writer_end), %si
        movw    $SPARSE_WRITER_LOAD, %di
        movw    $(loaded_end - sparse_writer), %cx
        rep movsb %cs:(%si), %es:(%di)
        ljmpw   $0, $SPARSE_WRITER_LOAD

        .p2align 4
entry:
        jmp     copy_to_ram
        .org    entry - sparse_writer + 16
sparse_writer_end:

        .section .note.GNU-stack, "", @progbits
