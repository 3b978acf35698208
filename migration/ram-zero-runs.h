/*
 * Runs of zero pages: finding, sending and loading them
 *
 * A run is a number of zero pages that follow each other in a block.  It is
 * sent as one record for each page, which every QEMU can receive, or, with the
 * capability sparse-ram, as one record.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_RAM_ZERO_RUNS_H
#define QEMU_MIGRATION_RAM_ZERO_RUNS_H

#include "qemu/sparse-file.h"
#include "migration.h"
#include "qemu-file.h"
#include "ram-holes.h"

/*
 * RAMKnownData: data that the search for holes came upon
 *
 * Remembering data is safe: it gets read.  Remembering a hole is not.
 */
typedef struct RAMKnownData {
    RAMBlock *rb;
    /* In bytes from the start of @rb */
    SparseRange range;
} RAMKnownData;

/**
 * ram_find_hole_run: how many dirty pages that follow each other are holes
 *
 * @rb: the block
 * @page: number of the target page at which the run starts; its dirty bit has
 *        been cleared
 * @limit: number of the target page behind the part to look at
 * @data: what is known; changed if the run ends at data
 *
 * Returns the number of target pages, which is 0 if the first one is none, or
 * nothing is known about holes in @rb.  The run ends where the dirty bits of
 * the next chunk are still to be cleared.
 */
unsigned long ram_find_hole_run(RAMBlock *rb, unsigned long page,
                                unsigned long limit, RAMKnownData *data);

/**
 * ram_find_zero_run: how many dirty pages that follow each other are zero
 *
 * A page that is not zero ends the run, and is read again when it is sent.
 * That is cheap: most pages differ from zero where buffer_is_zero() looks
 * first, and the others are in the CPU's cache then.
 *
 * @rb: the block
 * @page: number of the target page at which the run starts, which is zero
 * @limit: number of the target page behind the part that may be read
 *
 * Returns the number of target pages, the first one included.
 */
unsigned long ram_find_zero_run(RAMBlock *rb, unsigned long page,
                                unsigned long limit);

/**
 * ram_put_zero_pages: send a run as one record for each page
 *
 * To be called when the page header of the first page has been written.
 *
 * @f: where the records go to
 * @offset: offset in the block of the first page, in bytes
 * @npages: number of target pages
 *
 * Returns the number of bytes written.
 */
size_t ram_put_zero_pages(QEMUFile *f, ram_addr_t offset, unsigned long npages);

/**
 * ram_put_zero_run: the same as one record
 */
size_t ram_put_zero_run(QEMUFile *f, unsigned long npages);

/**
 * ram_load_zero_run: load what follows RAM_SAVE_ZERO_RUN
 *
 * @f: QEMUFile where the data comes from
 * @zero_run: where zero pages are gathered
 * @rb: the block
 * @offset: offset in the block of the first page, in bytes
 *
 * Returns 0 for success or -errno in case of error, in which case the memory of
 * the block has not been touched.
 */
int ram_load_zero_run(QEMUFile *f, RAMZeroRun *zero_run, RAMBlock *rb,
                      ram_addr_t offset);

/**
 * ram_load_zero_run_postcopy: the same in postcopy
 *
 * @tmp_page: the host page that the run would be a part of; reset
 *
 * Returns 0 for success or a negative value in case of error.
 */
int ram_load_zero_run_postcopy(QEMUFile *f, PostcopyTmpPage *tmp_page,
                               RAMBlock *rb, ram_addr_t offset);

/**
 * ram_load_zero_pages: load zero pages whose records follow each other
 *
 * Takes what is buffered and comes next in the block; all other records are
 * left to the caller's loop, with all of its checks.
 *
 * @f: QEMUFile where the data comes from
 * @zero_run: where zero pages are gathered
 * @rb: the block
 * @offset: offset in the block of the page to start with, in bytes
 * @max: how many records to load at most
 *
 * Returns the number of records that were loaded.
 */
int ram_load_zero_pages(QEMUFile *f, RAMZeroRun *zero_run, RAMBlock *rb,
                        ram_addr_t offset, int max);

/**
 * ram_load_zero_pages_postcopy: the same for whole host pages in postcopy
 *
 * @f: QEMUFile where the data comes from, behind the current record
 * @tmp_page: the host page that the record is a part of; reset if it is loaded
 * @rb: the block
 * @offset: offset in the block of the page that the record is about, in bytes
 *
 * Returns 1 if the host page that the current record belongs to was loaded, and
 * maybe others behind it; 0 if it has to be loaded in another way; a negative
 * value in case of error.
 */
int ram_load_zero_pages_postcopy(QEMUFile *f, PostcopyTmpPage *tmp_page,
                                 RAMBlock *rb, ram_addr_t offset);

#endif /* QEMU_MIGRATION_RAM_ZERO_RUNS_H */
