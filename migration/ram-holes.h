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
#include "system/ramblock.h"
#include "system/ramblock-holes.h"
#include "qemu/atomic.h"
#include "qemu/mmap-alloc.h"
#include "qemu/sparse-file.h"
#include "qemu/units.h"

/* Private memory of which the page tables tell what is certainly zero */
typedef enum RAMPrivateMemory {
    RAM_PRIVATE_UNKNOWN,
    /* What is not in the page tables reads as zero */
    RAM_PRIVATE_ANONYMOUS,
    /* What is not in the page tables reads as the file on tmpfs does */
    RAM_PRIVATE_TMPFS,
    /* What is neither in the page tables nor in the file reads as zero */
    RAM_PRIVATE_HUGETLB,
} RAMPrivateMemory;

/**
 * RAMBlockHoles: what does not change about a block during a migration
 *
 * RAMBlock.holes is NULL, and nothing is known about holes, until a migration
 * begins that the block takes part in.
 */
typedef struct RAMBlockHoles {
    /* QEMU_FS_TYPE_UNKNOWN: holes cannot be told, keep to the mapping */
    QemuFsType type;
    /* Shared memory without a file: cannot be asked, but can be discarded */
    bool shared_anonymous;
    RAMPrivateMemory private_memory;
    /* The user asked for the memory to be there: prealloc=on, mem-lock=on */
    bool keep_populated;
    /*
     * Populated pages may be freed: QEMU created the memory, or the file was
     * empty when the migration began.  Otherwise, it may have been reserved for
     * the guest.
     */
    bool disposable;
    /*
     * The kernel cannot be asked, but the memory was zero when the migration
     * began, and only the migration has written to it since.
     */
    bool pristine;
    /* A migration has begun before, in either direction */
    bool used;
    /* A shared mapping of a file that is on neither tmpfs nor hugetlbfs */
    bool other_file;
    /* Size in bytes of transparent huge pages in the file, 0 if none */
    uint64_t thp_size;
    /* Which RAMHolesOperation the kernel refused (atomic) */
    unsigned int failed;
} RAMBlockHoles;

/* What the kernel is asked to do, as bits of RAMBlockHoles.failed */
typedef enum RAMHolesOperation {
    /* To find a hole, so as not to populate it */
    RAM_HOLES_FIND = 1 << 0,
    RAM_HOLES_PUNCH = 1 << 1,
    /* To find what is to be cleared on the destination */
    RAM_HOLES_FIND_TO_CLEAR = 1 << 2,
} RAMHolesOperation;

/**
 * ram_block_holes_init: find out what may be done about holes in a block
 *
 * @holes: set to the answer
 * @rb: the block
 */
void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb);

/**
 * ram_holes_setup: initialize RAMBlock.holes of all blocks that are migrated
 *
 * To be called when a migration begins, in either direction, with the BQL held
 * or within an RCU critical section.  There is no cleanup: threads of a
 * migration that failed may go on for a while, so the memory lives as long as
 * the block.
 */
void ram_holes_setup(void);

/**
 * ram_block_holes_setup: the same for one block, unless that has been done
 *
 * For readers of guest RAM other than migration.  May be called by any thread.
 */
void ram_block_holes_setup(RAMBlock *rb);

/**
 * ram_block_holes_known: whether the kernel can tell holes in @rb from data
 *
 * If so, no populated page is ever missed, and a page that is not populated
 * must not be read through the mapping.
 */
static inline bool ram_block_holes_known(const RAMBlock *rb)
{
    const RAMBlockHoles *holes = qatomic_read(&rb->holes);

    return holes && holes->type != QEMU_FS_TYPE_UNKNOWN;
}

/**
 * ram_block_is_private_known: whether the page tables tell what is zero in @rb
 *
 * Not the opposite of ram_block_holes_known(): of much memory nothing is known.
 */
static inline bool ram_block_is_private_known(const RAMBlock *rb)
{
    const RAMBlockHoles *holes = qatomic_read(&rb->holes);

    return holes && holes->private_memory != RAM_PRIVATE_UNKNOWN;
}

/**
 * ram_block_reading_allocates: whether reading a hole of @rb allocates it, and
 *                              QEMU can tell where the holes are
 *
 * If so, ram_next_extent() has something to say.  A hole of private anonymous
 * memory reads as the kernel's zero page.
 */
static inline bool ram_block_reading_allocates(const RAMBlock *rb)
{
    return ram_block_holes_known(rb) ||
           (ram_block_is_private_known(rb) &&
            rb->holes->private_memory == RAM_PRIVATE_TMPFS);
}

/**
 * ram_block_may_punch: whether populated pages of @rb may be freed
 *
 * Can change during a migration, when a device starts or stops to forbid it.
 * Outside of incoming migration, to be called with the BQL held.
 */
bool ram_block_may_punch(const RAMBlock *rb);

/**
 * ram_block_holes_failed: the kernel refused an operation that should work
 *
 * Warns if this is the first one for the block.  Punching is not tried again,
 * see ram_block_may_punch(); what cannot be looked up is data, and the next
 * look-up can succeed.
 *
 * @rb: the block
 * @operation: what failed
 * @err: negative errno value
 */
void ram_block_holes_failed(RAMBlock *rb, RAMHolesOperation operation,
                            int err);

/**
 * ram_block_is_pristine: whether what has not been received is zero
 *
 * Only if that cannot be found out by asking the kernel.  To be used where a
 * zero page that arrives for the first time was always left alone; elsewhere,
 * and for pages that have been received, see ram_handle_zero().
 */
bool ram_block_is_pristine(const RAMBlock *rb);

/**
 * ram_block_may_leave_holes: whether a zero page that arrives may be a hole
 *
 * If not, it has to be populated.
 */
bool ram_block_may_leave_holes(const RAMBlock *rb);

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
 * ram_next_populated_private: find what is in the page tables
 *
 * @rb: a block of which ram_block_is_private_known()
 * @within: the part to search, as a range of the file behind the block (or of
 *          the block itself if there is none)
 * @populated: see populated_memory_next()
 *
 * Returns 0, or a negative errno value if the kernel does not tell.
 */
int ram_next_populated_private(const RAMBlock *rb, const SparseRange *within,
                               SparseRange *populated);

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
 * read into place.  Asks the kernel about all of the block at once: of a block
 * with little in it, holes and what is not populated cost next to nothing.
 * Leaves alone what is not migrated.
 *
 * @rb: the block
 * @present: a bit for each target page from the start of the block; those that
 *           are set are left alone
 * @npages: number of bits; may be more, or less, than the block has pages
 */
void ram_zero_absent_pages(RAMBlock *rb, const unsigned long *present,
                           uint64_t npages);

/**
 * ram_huge_page_is_mapped: whether a huge page is in the page tables
 *
 * If so, reading it allocates nothing.  If not, another process can still have
 * allocated it.
 *
 * @rb: a block of huge pages
 * @offset: offset of the huge page in the block, in bytes
 */
bool ram_huge_page_is_mapped(const RAMBlock *rb, ram_addr_t offset);

/**
 * ram_next_extent: whether a part of a block begins with a hole, and for how
 *                  long
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @limit: end of the part, in bytes, more than @offset
 * @end: set to the end of the extent, more than @offset and @limit at most;
 *       what follows can be of the same kind
 *
 * Returns true for a hole, which reads as zero and must not be read.  Returns
 * false for what can be read: it is populated, or nothing is known about holes
 * in this block, or incoming postcopy is active and the page has not arrived.
 * A populated page may of course be zero.  Of hugetlbfs, a page that another
 * process allocated, that this process has not mapped, and that is zero, counts
 * as a hole.
 *
 * To be called with the BQL held or within an RCU critical section.
 */
bool ram_next_extent(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                     uint64_t *end);

/**
 * ram_next_extent_raw: what the kernel says, whether pages have arrived or not
 *
 * Only for those who load guest RAM.  All others would take a page of which
 * postcopy has not got the data yet for zero: they call ram_next_extent().
 */
bool ram_next_extent_raw(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                         uint64_t *end);

/**
 * ram_find_hole: how much of a part of a block is a hole, from its start
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @limit: end of the part, in bytes
 * @data: data of the block that was found before, as a range of offsets in it,
 *        or an empty range; set to the data behind the hole, as far as that was
 *        followed, unless the hole ends at @limit
 *
 * Remembering data is safe: it gets read.  Remembering a hole is not.
 *
 * Returns a number of bytes, 0 if there is data at @offset.
 */
uint64_t ram_find_hole(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                       SparseRange *data);

/**
 * ram_range_is_zero: whether a part of a block is zero
 *
 * Like buffer_is_zero(), but does not read holes.
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes
 */
bool ram_range_is_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length);

#endif /* QEMU_MIGRATION_RAM_HOLES_H */
