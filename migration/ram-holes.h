/*
 * Holes in guest RAM: what migration may do about them
 *
 * A RAMBlock that is a shared mapping of a sparse file has holes where the
 * guest never wrote.  A hole reads as zero, but reading it through the mapping
 * allocates it.  See docs/devel/migration/sparse-ram.rst.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_RAM_HOLES_H
#define QEMU_MIGRATION_RAM_HOLES_H

#include "exec/cpu-common.h"
#include "exec/ramblock.h"
#include "qemu/sparse-file.h"

/**
 * RAMBlockHoles: what does not change about a block during a migration
 *
 * A block has one while RAM is being loaded (RAMBlock.holes); everywhere else
 * the pointer is NULL, and nothing is known about holes.
 */
typedef struct RAMBlockHoles {
    /* SPARSE_FILE_UNKNOWN: holes cannot be told, keep to the mapping */
    SparseFileType type;
    /* Shared memory without a file: cannot be asked, but can be discarded */
    bool shared_anonymous;
    /* The user asked for the memory to be there: prealloc=on, mem-lock=on */
    bool keep_populated;
    /* Size in bytes of transparent huge pages in the file, 0 if none */
    uint64_t thp_size;
    /* Which RAMHolesOperation the kernel refused (atomic) */
    unsigned int failed;
} RAMBlockHoles;

/* What the kernel is asked to do, as bits of RAMBlockHoles.failed */
typedef enum RAMHolesOperation {
    RAM_HOLES_FIND = 1 << 0,
    RAM_HOLES_PUNCH = 1 << 1,
} RAMHolesOperation;

/**
 * ram_block_holes_init: find out what may be done about holes in a block
 *
 * @holes: set to the answer
 * @rb: the block; its size and file must not change from here on
 */
void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb);

/**
 * ram_holes_setup: initialize RAMBlock.holes of all blocks that are migrated
 * ram_holes_cleanup: the opposite; no other thread may use them any more
 *
 * To be called within an RCU critical section or with the BQL held.
 */
void ram_holes_setup(void);
void ram_holes_cleanup(void);

/**
 * ram_block_holes_known: whether the kernel can tell holes in @rb from data
 *
 * If so, no populated page is ever missed, and a page that is not populated
 * must not be read through the mapping.
 */
bool ram_block_holes_known(const RAMBlock *rb);

/**
 * ram_block_may_punch: whether populated pages of @rb may be freed
 *
 * Can change during a migration, when a device starts or stops to forbid it.
 */
bool ram_block_may_punch(const RAMBlock *rb);

/**
 * ram_block_holes_failed: the kernel refused an operation that should work
 *
 * Warns if this is the first one for the block, and stops further attempts:
 * ram_block_holes_known() and ram_block_may_punch() take it into account.
 *
 * @rb: the block
 * @operation: what failed
 * @err: negative errno value
 */
void ram_block_holes_failed(RAMBlock *rb, RAMHolesOperation operation,
                            int err);

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
 * ram_clear_memory: zero memory that may or may not be zero already
 *
 * For memory that is private to the process.  Does not write to what is zero,
 * so that untouched anonymous memory stays backed by the zero page.
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
    SparseRange range;
} RAMZeroRun;

/**
 * ram_zero_run_add: ram_handle_zero(), but maybe later
 *
 * Flushes what was gathered before if the new part does not touch it.
 */
void ram_zero_run_add(RAMZeroRun *run, RAMBlock *rb, ram_addr_t offset,
                      uint64_t length);

/**
 * ram_zero_run_flush: handle what has been gathered
 *
 * Costs nothing if there is nothing.
 */
void ram_zero_run_flush(RAMZeroRun *run);

#endif /* QEMU_MIGRATION_RAM_HOLES_H */
