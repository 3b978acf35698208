/*
 * Holes in guest RAM: where they are, and reading guest RAM without filling them
 *
 * A RAMBlock that is a shared mapping of a sparse file has holes where the
 * guest never wrote.  A hole reads as zero, but reading it through the mapping
 * allocates it.  So ask first, and take zeroes for a hole.  See
 * docs/devel/migration/sparse-ram.rst.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SYSTEM_RAMBLOCK_HOLES_H
#define SYSTEM_RAMBLOCK_HOLES_H

#include "exec/cpu-common.h"
#include "exec/memattrs.h"
#include "qemu/atomic.h"
#include "qemu/units.h"
#include "system/ramblock.h"

/* What kind of memory a block is, as far as holes are concerned */
typedef enum RAMHolesKind {
    /* Nothing is known about holes: keep to the mapping */
    RAM_HOLES_UNKNOWN,
    /* A shared mapping of a file on tmpfs: memfd, /dev/shm */
    RAM_HOLES_SHMEM,
    /* A shared mapping of a file on hugetlbfs */
    RAM_HOLES_HUGETLB,
    /* A shared mapping of a file elsewhere: reading the file fills no mapping */
    RAM_HOLES_OTHER_FILE,
    /* Shared memory without a file: cannot be asked, but can be discarded */
    RAM_HOLES_SHARED_ANONYMOUS,
    /* Private: what is not in the page tables reads as zero */
    RAM_HOLES_PRIVATE_ANONYMOUS,
    /* Private: what is not in the page tables reads as the file on tmpfs does */
    RAM_HOLES_PRIVATE_SHMEM,
    /* The same with a file on hugetlbfs */
    RAM_HOLES_PRIVATE_HUGETLB,
} RAMHolesKind;

/* What the kernel is asked to do, as bits of RAMBlockHoles.failed */
typedef enum RAMHolesOperation {
    /* To find a hole, so as not to populate it */
    RAM_HOLES_FIND = 1 << 0,
    RAM_HOLES_PUNCH = 1 << 1,
    /* To find what is to be cleared on the destination */
    RAM_HOLES_FIND_TO_CLEAR = 1 << 2,
} RAMHolesOperation;

/**
 * RAMBlockHoles: what does not change about a block
 *
 * RAMBlock.holes is NULL, and nothing is known about holes, until something is
 * asked, or a migration begins that the block takes part in.
 */
typedef struct RAMBlockHoles {
    RAMHolesKind kind;
    /* Which RAMHolesOperation the kernel refused (atomic) */
    unsigned int failed;

    /* The rest is set by ram_holes_setup() when a migration begins. */

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
    /* Size in bytes of transparent huge pages in the file, 0 if none */
    uint64_t thp_size;
} RAMBlockHoles;

/**
 * ram_block_holes_init: find out what kind of memory a block is
 *
 * @holes: set to the answer
 * @rb: the block
 */
void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb);

/**
 * ram_block_holes_setup: initialize RAMBlock.holes, unless that has been done
 *
 * May be called by any thread, with the BQL held or within an RCU critical
 * section.  There is no cleanup: the memory lives as long as the block.
 */
void ram_block_holes_setup(RAMBlock *rb);

/* What kind of memory @rb is, RAM_HOLES_UNKNOWN if nothing has asked yet */
static inline RAMHolesKind ram_block_holes_kind(const RAMBlock *rb)
{
    const RAMBlockHoles *holes = qatomic_read(&rb->holes);

    return holes ? holes->kind : RAM_HOLES_UNKNOWN;
}

/**
 * ram_block_holes_known: whether the kernel can tell holes in @rb from data
 *
 * If so, no populated page is ever missed, and a page that is not populated
 * must not be read through the mapping.
 */
static inline bool ram_block_holes_known(const RAMBlock *rb)
{
    RAMHolesKind kind = ram_block_holes_kind(rb);

    return kind == RAM_HOLES_SHMEM || kind == RAM_HOLES_HUGETLB;
}

/**
 * ram_block_reading_allocates: whether reading a hole of @rb allocates it, and
 *                              QEMU can tell where the holes are
 *
 * A hole of private anonymous memory reads as the kernel's zero page.
 */
static inline bool ram_block_reading_allocates(const RAMBlock *rb)
{
    return ram_block_holes_known(rb) ||
           ram_block_holes_kind(rb) == RAM_HOLES_PRIVATE_SHMEM;
}

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
 * ram_block_extent_raw: what the kernel says about the start of a part
 *
 * Only for loading guest RAM.  Other readers would take a page that postcopy is
 * still to bring for zero: they call ram_block_extent().
 *
 * @rb: the block, of which RAMBlock.holes is initialized
 * @offset: offset in the block, in bytes
 * @length: length in bytes, more than 0; the part must lie within the block
 * @extent: set to the length of the extent in bytes, more than 0 and @length at
 *          most, even after an error; what follows can be of the same kind
 *
 * Returns 1 for data, which may be zero; 0 for what reads as zero; a negative
 * errno value if the kernel refuses to tell.  Of hugetlbfs, a page that another
 * process allocated, that this process has not mapped, and that is zero, counts
 * as a hole.
 */
int ram_block_extent_raw(const RAMBlock *rb, ram_addr_t offset, uint64_t length,
                         uint64_t *extent);

/**
 * ram_block_extent: whether a part of a block begins with a hole, and for how
 *                   long
 *
 * To be called with the BQL held or within an RCU critical section.
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes, more than 0
 * @extent: set to the length of the extent in bytes, more than 0 and @length at
 *          most; what follows can be of the same kind
 *
 * Returns true for a hole, which reads as zero and should not be read.  Returns
 * false for what can be read: it is populated, or nothing is known about holes
 * in this block, or an incoming postcopy migration is still to bring it.
 */
bool ram_block_extent(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                      uint64_t *extent);

/**
 * ram_block_hole_length: how much of a part of a block is a hole, from its start
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes
 * @data: if not NULL, set to how many bytes of data are known to follow the hole
 *
 * Returns a number of bytes, 0 if there is data at @offset.
 */
uint64_t ram_block_hole_length(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                               uint64_t *data);

/**
 * ram_block_is_zero: whether a part of a block is zero
 *
 * Like buffer_is_zero(), but does not read holes.
 *
 * @rb: the block
 * @offset: offset in the block, in bytes
 * @length: length in bytes
 */
bool ram_block_is_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length);

/**
 * ram_host_extent: ram_block_extent() for an address of this process
 *
 * @host: address of the memory, normally in guest RAM; must not reach beyond a
 *        block
 */
bool ram_host_extent(const void *host, uint64_t length, uint64_t *extent);

/**
 * ram_page_to_read: where to read a page of guest RAM without allocating it
 *
 * To be called with the BQL held or within an RCU critical section.
 *
 * @host: address of the memory, normally in guest RAM
 * @length: how much to read, in bytes, up to RAM_ZERO_PAGE_SIZE
 *
 * Returns @host, or zeroes of the same length if all of it is a hole.
 */
const void *ram_page_to_read(const void *host, size_t length);

/* No target has larger pages, nor has any format of a dump. */
#define RAM_ZERO_PAGE_SIZE (64 * KiB)

/**
 * ram_zero_page: zeroes, to be used in place of a hole
 *
 * Returns RAM_ZERO_PAGE_SIZE bytes that are read-only and never freed.
 */
const void *ram_zero_page(void);

/**
 * address_space_read_debug: read from an address space for a debugger
 *
 * Like address_space_read(), but leaves holes of guest RAM alone, so that
 * looking at memory that the guest has never used does not allocate it.
 *
 * @as: the address space
 * @addr: address in it
 * @attrs: memory transaction attributes
 * @buf: where the data goes to
 * @len: length in bytes
 */
MemTxResult address_space_read_debug(AddressSpace *as, hwaddr addr,
                                     MemTxAttrs attrs, void *buf, hwaddr len);

#endif /* SYSTEM_RAMBLOCK_HOLES_H */
