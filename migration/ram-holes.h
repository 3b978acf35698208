/*
 * Holes in guest RAM: what migration does about them
 *
 * See docs/devel/migration/sparse-ram.rst, and system/ramblock-holes.h for
 * where they are.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_RAM_HOLES_H
#define QEMU_MIGRATION_RAM_HOLES_H

#include "exec/cpu-common.h"
#include "qemu/sparse-file.h"
#include "system/ramblock-holes.h"

/**
 * ram_holes_setup: find out about all blocks that are migrated
 *
 * To be called when a migration begins, in either direction, with the BQL held
 * or within an RCU critical section.  There is no cleanup: threads of a
 * migration that failed may go on for a while.
 */
void ram_holes_setup(void);

/**
 * ram_holes_setup_block: the same for one block
 */
void ram_holes_setup_block(RAMBlock *rb);

/**
 * ram_block_may_punch: whether populated pages of @rb may be freed
 *
 * Can change during a migration, when a device starts or stops to forbid it.
 * Outside of incoming migration, to be called with the BQL held.
 */
bool ram_block_may_punch(const RAMBlock *rb);

/**
 * ram_block_may_leave_holes: whether a zero page that arrives may be a hole
 *
 * If not, it has to be populated.
 */
bool ram_block_may_leave_holes(const RAMBlock *rb);

/**
 * ram_block_is_pristine: whether what has not been received is zero
 *
 * Only if that cannot be found out by asking the kernel.  To be used where a
 * zero page that arrives for the first time was always left alone; elsewhere,
 * and for pages that have been received, see ram_handle_zero().
 */
bool ram_block_is_pristine(const RAMBlock *rb);

/**
 * ram_handle_zero: make a part of a block read as zero on the destination
 *
 * Holes are left alone, populated pages are punched where the block allows it,
 * and everything else is cleared in place.  Cannot fail: if the kernel refuses
 * to tell holes or to punch, memory is cleared in place, with one warning.
 *
 * Must not be called once userfaultfd is registered for the block.  Safe to
 * call from several threads for parts that do not overlap.
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes; the part must lie within the block
 */
void ram_handle_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length);

/**
 * ram_handle_zero_postcopy: the same once userfaultfd is registered
 *
 * Of a block that may have holes, only those pages are placed that somebody is
 * waiting for.  All of them are marked as received.
 *
 * @mis: the incoming migration
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes; like @offset a multiple of the block's page size
 *
 * Returns 0 for success, a negative value if a page could not be placed, with
 * an error reported.
 */
int ram_handle_zero_postcopy(MigrationIncomingState *mis, RAMBlock *rb,
                             ram_addr_t offset, uint64_t length);

/**
 * ram_handle_zero_fault: answer a fault on a page that has been received
 *
 * Places a zero page if the page is a hole, and wakes up whoever is waiting
 * for it.  Whether it is a hole is left to userfaultfd, which never replaces
 * what is there.
 *
 * @mis: the incoming migration
 * @rb: the block
 * @offset: offset of the page in the block, a multiple of the block's page
 *          size
 *
 * Returns 1 if the page was placed, 0 if it was there already, or a negative
 * errno value if there is no memory for it, with an error reported the first
 * time; whoever is waiting goes on waiting then.
 */
int ram_handle_zero_fault(MigrationIncomingState *mis, RAMBlock *rb,
                          ram_addr_t offset);

/**
 * ram_block_holes_prepare_postcopy: before userfaultfd is registered
 *
 * To be called when postcopy has discarded what is not to be kept.  Makes sure
 * that the huge pages that are holes can be allocated one day, or else that
 * they are allocated now.
 */
void ram_block_holes_prepare_postcopy(RAMBlock *rb);

/**
 * ram_clear_memory: zero memory that may or may not be zero already
 *
 * Reads all of it, so that holes of shared memory get allocated.  Does not
 * write to what is zero, so that untouched anonymous memory stays backed by the
 * zero page.
 *
 * @host: start of the memory
 * @length: length in bytes
 */
void ram_clear_memory(void *host, uint64_t length);

/**
 * RAMZeroRun: zero pages that follow each other, not yet handled
 *
 * Zero pages come one by one but are cheap only in bulk.  To be initialized
 * with all zeroes, and to be flushed before anything else is written to the
 * pages that it stands for.
 */
typedef struct RAMZeroRun {
    RAMBlock *rb;
    /* How many bytes of @rb to gather at most; 0 if that saves nothing */
    uint64_t max;
    SparseRange range;
} RAMZeroRun;

/**
 * ram_zero_run_add: ram_handle_zero(), but maybe later
 *
 * Flushes what was gathered before if the new part does not touch it.  Nothing
 * is gathered where no system call is saved by that.
 */
void ram_zero_run_add(RAMZeroRun *run, RAMBlock *rb, ram_addr_t offset,
                      uint64_t length);

/**
 * ram_zero_run_flush: handle what has been gathered
 *
 * Costs nothing if there is nothing.
 */
void ram_zero_run_flush(RAMZeroRun *run);

/**
 * ram_zero_absent_pages: make pages read as zero that a file does not have
 *
 * For mapped-ram.  To be called before the pages that the file does have are
 * read into place.  Holes and what is not populated cost next to nothing.
 * Leaves alone what is not migrated.
 *
 * @rb: the block
 * @present: a bit for each target page from the start of the block; those that
 *           are set are left alone
 * @npages: number of bits; may be more, or less, than the block has pages
 */
void ram_zero_absent_pages(RAMBlock *rb, const unsigned long *present,
                           uint64_t npages);

#endif /* QEMU_MIGRATION_RAM_HOLES_H */
