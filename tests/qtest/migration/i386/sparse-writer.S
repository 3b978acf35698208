# SPDX-License-Identifier: GPL-2.0-or-later
#
# Firmware, and all there is, of the guest that sparse-stress-tests.c migrates.
# A BIOS would take longer to start than the test, and would use RAM.
#
# It writes to pages in pseudo-random order, at a limited rate, for ever.  What
# a page has to hold follows from its number and from how often it was written,
# its generation, which is kept in a table of one byte a page.  Before a page is
# written again it is checked.  Each fourth write makes it a page of zeroes.
#
# What is said on the serial port:
#   B  another batch of pages was written, and no page was found to be wrong
#   V  the host set "verify", and all pages are right
#   X  a page is wrong; the guest has stopped
#
# The test sets the parameters at the end of the first 512 bytes before it starts
# the guest, and some of them in the guest's RAM while it runs.
#
# Copyright (c) 2026 the sparse-ram project

#define COM1            0x3f8
#define BATCH           256             /* pages written for each B */
#define TABLE           0x10000         /* up to 0x80000: 448 Ki pages, 1.75 GiB */
#define LOAD            0x7c00          /* where in RAM this runs */
#define STACK           LOAD
#define LENGTH          512             /* of what is copied to RAM */

#define CODE_SELECTOR   0x08
#define DATA_SELECTOR   0x10

/* Where the words are that are written to a page and checked */
#define WORD0           0
#define WORD1           1364
#define WORD2           4092

        .code16
        .text
        .org    LOAD
start:
        xorw    %ax, %ax
        movw    %ax, %ds
        inb     $0x92, %al              # A20
        orb     $2, %al
        outb    %al, $0x92
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al                 # protected mode
        movl    %eax, %cr0
        ljmpl   $CODE_SELECTOR, $start32

        .code32
start32:
        movw    $DATA_SELECTOR, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $STACK, %esp

        movl    $TABLE, %edi            # no page has been written yet
        movl    pages, %ecx
        xorl    %eax, %eax
        rep stosb

        xorl    %ebp, %ebp              # pages written

        # One page a turn
main_loop:
        cmpb    $0, verify
        jne     verify_all

        # Which page: the upper half of seed * pages is evenly distributed
        imull   $1664525, seed, %eax
        addl    $1013904223, %eax
        movl    %eax, seed
        movl    %eax, %ecx
        mull    pages
        movl    %edx, %esi
        testb   $0x60, %ch
        jnz     1f
        shrl    $16, %ecx               # each fourth is one of those that the
        andl    focus_mask, %ecx        # test wants most
        addl    focus, %ecx
        movl    %ecx, %esi
1:
        movzbl  TABLE(%esi), %ebx
        testl   %ebx, %ebx              # reading an untouched page would
        jz      2f                      # populate it before it is written
        call    check_page
2:
        incl    %ebx
        call    expected
        movl    %eax, WORD0(%edi)
        movl    %eax, WORD1(%edi)
        movl    %eax, WORD2(%edi)
        movb    %bl, TABLE(%esi)

        incl    %ebp
        testl   $(BATCH - 1), %ebp
        jnz     3f
        movb    $'B', %al
        call    say
3:
        # Wait, in ticks of the time-stamp counter
        rdtsc
        movl    %eax, %ecx
4:
        pause
        rdtsc
        subl    %ecx, %eax
        cmpl    turn, %eax
        jb      4b
        jmp     main_loop

verify_all:
        xorl    %esi, %esi
1:
        movzbl  TABLE(%esi), %ebx
        call    check_page
        incl    %esi
        cmpl    pages, %esi
        jb      1b
        movb    $0, verify
        movb    $'V', %al
        call    say
        jmp     main_loop

# What page %esi has to hold in generation %bl: its address in %edi, the word in
# %eax.  Zero in each fourth generation, and so for a page that was not written.
expected:
        movl    %esi, %edi
        shll    $12, %edi
        addl    base, %edi
        xorl    %eax, %eax
        testb   $3, %bl
        jz      1f
        imull   $0x9e3779b1, %esi, %eax
        movb    %bl, %al                # not zero: %bl is not
1:
        ret

check_page:
        call    expected
        cmpl    %eax, WORD0(%edi)
        jne     wrong
        cmpl    %eax, WORD1(%edi)
        jne     wrong
        cmpl    %eax, WORD2(%edi)
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

        .p2align 3
gdt:
        .quad   0
        .quad   0x00cf9a000000ffff      # code: 32 bit, from 0, 4 GiB
        .quad   0x00cf92000000ffff      # data: the same
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt

        # Parameters
        .p2align 2
base:           .long   0x01000000      # address of the first page
pages:          .long   1024            # number of pages
turn:           .long   100000          # ticks of the TSC to wait between writes
seed:           .long   1
focus:          .long   0               # first of the pages that are written most
focus_mask:     .long   0xfff           # number of them, less one
verify:         .long   0               # not 0: check all pages, once

        .org    LOAD + LENGTH

        # This part stays in the ROM, of which it is the end.  The processor
        # starts in the last 16 bytes of the segment that %cs is for.
        .code16
copy_to_ram:
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $(start - rom_end), %si
        movw    $LOAD, %di
        movw    $LENGTH, %cx
        rep movsb %cs:(%si), %es:(%di)
        ljmpw   $0, $LOAD

        .org    LOAD + 2 * LENGTH - 16
        jmp     copy_to_ram
        .org    LOAD + 2 * LENGTH
rom_end:
