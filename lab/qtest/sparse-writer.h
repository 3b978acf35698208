/*
 * The guest that stress.c migrates: what it and the test agree on
 *
 * For C and for the assembler.  All that one tells the other are words of 32
 * bits.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_WRITER_H
#define SPARSE_WRITER_H

/* Address in RAM that it runs at */
#define SPARSE_WRITER_LOAD 0x7c00

/* Its parameters, which can be changed while it runs */
#define SPARSE_WRITER_PARAMETERS (SPARSE_WRITER_LOAD + 8)
/* Address of the first page that is written to */
#define SPARSE_WRITER_BASE (SPARSE_WRITER_PARAMETERS + 0)
/* Number of pages */
#define SPARSE_WRITER_PAGES (SPARSE_WRITER_PARAMETERS + 4)
/* Ticks of the time-stamp counter between two writes */
#define SPARSE_WRITER_TURN (SPARSE_WRITER_PARAMETERS + 8)
/* Of the pseudo-random order of pages */
#define SPARSE_WRITER_SEED (SPARSE_WRITER_PARAMETERS + 12)
/* First of the pages that are written to most, counted from the base */
#define SPARSE_WRITER_FOCUS (SPARSE_WRITER_PARAMETERS + 16)
/* Number of them, a power of 2, less one */
#define SPARSE_WRITER_FOCUS_MASK (SPARSE_WRITER_PARAMETERS + 20)
/* Not 0: check all pages, once */
#define SPARSE_WRITER_VERIFY (SPARSE_WRITER_PARAMETERS + 24)

/*
 * Where it is: number of the last write, and of the page, counted from the
 * base, that this goes to.  A guest that is stopped may have written a part of
 * the page; the table below then does not have the number yet.
 */
#define SPARSE_WRITER_SEQUENCE (SPARSE_WRITER_PARAMETERS + 28)
#define SPARSE_WRITER_CURRENT (SPARSE_WRITER_PARAMETERS + 32)
#define SPARSE_WRITER_PARAMETERS_END (SPARSE_WRITER_PARAMETERS + 36)

/*
 * Address of its table of sequence numbers, one for each page: that of the last
 * write to the page, 0 if there was none.  Each fourth write, whose number is a
 * multiple of 4, makes a page of zeroes.
 */
#define SPARSE_WRITER_TABLE 0x100000

/* How many pages are written for each B on the serial port; a power of 2 */
#define SPARSE_WRITER_BATCH 256

#endif /* SPARSE_WRITER_H */
