/*
 * Holes in guest RAM: reading guest RAM without filling it
 *
 * For readers of guest RAM other than migration, which have no dirty bits.
 * Reading a hole of shared memory through the mapping allocates it.  So ask
 * first, and take zeroes for a hole.  See docs/devel/migration/sparse-ram.rst.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SYSTEM_RAMBLOCK_HOLES_H
#define SYSTEM_RAMBLOCK_HOLES_H

#include "exec/cpu-common.h"
#include "exec/memattrs.h"
#include "qemu/units.h"

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
 * ram_host_extent: the same for an address of this process
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
