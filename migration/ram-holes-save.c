/*
 * Holes in guest RAM: reading guest RAM without filling it
 *
 * Reading a hole through the mapping allocates it.  So ask the file behind the
 * block first, and do not read what is a hole.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "migration.h"
#include "postcopy-ram.h"
#include "ram-holes.h"

/*
 * How many huge pages of the file are looked up in the page tables in the time
 * that reading one from the file takes, if it is a hole
 */
#define HUGE_LOOK_UPS_PER_READ 100

/*
 * Whether what the file has allocated is what is in our page tables.
 *
 * What another process had allocated before, and still has, would be in the
 * first sum, and what we have would be in the second.
 */
static bool all_huge_pages_are_mapped(const RAMBlock *rb)
{
    int64_t before = sparse_file_allocated(rb->fd);
    int64_t mapped = 0;

    for (ram_addr_t huge = 0; huge < rb->max_length; huge += rb->page_size) {
        if (ram_huge_page_is_mapped(rb, huge)) {
            mapped += rb->page_size;
        }
    }
    return before == mapped && sparse_file_allocated(rb->fd) == mapped;
}

/*
 * hugetlbfs does not report extents.  What is in our page tables is data.  Of
 * the rest, another process may have written to it: if the sizes do not show
 * that there is nothing of that kind, the file is read, one huge page at a time.
 */
static int next_extent_hugetlb(const RAMBlock *rb, const SparseRange *within,
                               uint64_t *end)
{
    ram_addr_t first = QEMU_ALIGN_DOWN(within->start, rb->page_size);
    ram_addr_t next = first + rb->page_size;
    bool mapped = ram_huge_page_is_mapped(rb, first);
    SparseRange in_file;
    int ret;

    while (next < within->end && ram_huge_page_is_mapped(rb, next) == mapped) {
        next += rb->page_size;
    }
    *end = MIN(within->end, next);
    if (mapped) {
        return 1;
    }
    if ((next - first) / rb->page_size * HUGE_LOOK_UPS_PER_READ >=
        rb->used_length / rb->page_size && all_huge_pages_are_mapped(rb)) {
        return 0;
    }
    *end = MIN(within->end, first + rb->page_size);
    in_file = (SparseRange) {
        .start = within->start + rb->fd_offset,
        .end = *end + rb->fd_offset,
    };
    ret = sparse_file_is_zero(rb->fd, &in_file);
    return ret < 0 ? ret : !ret;
}

static int next_extent_shmem(const RAMBlock *rb, const SparseRange *within,
                             uint64_t *end)
{
    SparseRange in_file = {
        .start = within->start + rb->fd_offset,
        .end = within->end + rb->fd_offset,
    };
    int ret = sparse_file_next_extent(rb->fd, &in_file, end);

    *end -= rb->fd_offset;
    return ret;
}

/*
 * A private mapping of a file on tmpfs: reading what is in neither the page
 * tables nor the file allocates it in the file, which all clones of a template
 * share.
 *
 * The page tables are asked last.  What this process has written is a copy that
 * only they know, and it is there when the write is done.  So all that is
 * written before that question is seen, whatever the file said; a write after
 * it finds the dirty bits cleared, and sets them again.  Asked first, they
 * would miss a write in between, and the file need not know of that either.
 */
static int next_extent_private(const RAMBlock *rb, const SparseRange *within,
                               uint64_t *end)
{
    SparseRange in_file = {
        .start = within->start + rb->fd_offset,
        .end = within->end + rb->fd_offset,
    };
    SparseRange extent = in_file, populated;
    int ret = sparse_file_next_extent(rb->fd, &in_file, &extent.end);

    if (ret == 0) {
        ret = ram_next_populated_private(rb, &extent, &populated);
        if (ret == 0 && populated.start > extent.start) {
            extent.end = populated.start;
        } else if (ret == 0) {
            extent.end = populated.end;
            ret = 1;
        }
    }
    *end = extent.end - rb->fd_offset;
    return ret;
}

/* Returns 1 for data, 0 for a hole, or a negative errno value */
static int next_extent(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                       uint64_t *end)
{
    SparseRange within = { .start = offset, .end = limit };

    if (rb->holes->private_memory == RAM_PRIVATE_TMPFS) {
        return next_extent_private(rb, &within, end);
    }
    if (rb->holes->type == QEMU_FS_TYPE_HUGETLBFS) {
        return next_extent_hugetlb(rb, &within, end);
    }
    return next_extent_shmem(rb, &within, end);
}

/* A look-up that fails makes data of what it was about, and of nothing else */
static bool starts_with_hole(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                             uint64_t *end, RAMHolesOperation operation)
{
    int ret = 1;

    *end = limit;
    if (ram_block_reading_allocates(rb)) {
        ret = next_extent(rb, offset, limit, end);
    }
    if (ret < 0) {
        ram_block_holes_failed(rb, operation, ret);
        *end = MIN(limit, QEMU_ALIGN_DOWN(offset, rb->page_size) +
                          rb->page_size);
    }
    return ret == 0;
}

bool ram_next_extent_raw(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                         uint64_t *end)
{
    return starts_with_hole(rb, offset, limit, end, RAM_HOLES_FIND_TO_CLEAR);
}

/* How many pages are looked at in one go, so that no question takes long */
#define ARRIVED_MAX 32768

/*
 * Whether the page at @offset has arrived, as far as an incoming postcopy
 * migration is concerned.  @end is set to the end of what is alike.
 *
 * While userfaultfd is registered, a page that has not arrived looks like a
 * hole, although the source may have data for it; reading it waits for it.
 * Before that, a page that was discarded reads as zero, and reading it would
 * put a page there that postcopy cannot replace.  After that, all pages have
 * arrived.
 *
 * A page is marked when it has been placed, or when a zero page has been left a
 * hole.  So the mark has to be looked at before the file: a page that is marked
 * is what the file says, while one that arrives in between is called data.
 */
static bool ram_has_arrived(const RAMBlock *rb, ram_addr_t offset,
                            uint64_t limit, uint64_t *end)
{
    PostcopyState state = postcopy_state_get();
    const unsigned long *received = qatomic_rcu_read(&rb->receivedmap);
    unsigned long page = offset >> qemu_target_page_bits();
    unsigned long last = MIN(DIV_ROUND_UP(limit, qemu_target_page_size()),
                             page + ARRIVED_MAX);
    unsigned long next;
    bool arrived;

    *end = limit;
    if ((state != POSTCOPY_INCOMING_LISTENING &&
         state != POSTCOPY_INCOMING_RUNNING) || !received) {
        return true;
    }
    arrived = test_bit(page, received);
    next = arrived ? find_next_zero_bit(received, last, page)
                   : find_next_bit(received, last, page);
    *end = MIN(limit, (uint64_t)next << qemu_target_page_bits());
    /* Pairs with the atomic operations of ramblock_recv_bitmap_set_range() */
    smp_rmb();
    return arrived;
}

bool ram_next_extent(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                     uint64_t *end)
{
    return ram_has_arrived(rb, offset, limit, end) &&
           starts_with_hole(rb, offset, *end, end, RAM_HOLES_FIND);
}

uint64_t ram_find_hole(RAMBlock *rb, ram_addr_t offset, uint64_t limit,
                       SparseRange *data)
{
    uint64_t next = offset, end = offset;

    if (data->start <= offset && offset < data->end) {
        return 0;
    }
    while (next < limit && ram_next_extent(rb, next, limit, &end)) {
        next = end;
    }
    if (next < limit) {
        *data = (SparseRange) { .start = next, .end = end };
    }
    return next - offset;
}

bool ram_range_is_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    uint64_t limit = offset + length, end;

    for (; offset < limit; offset = end) {
        if (!ram_next_extent(rb, offset, limit, &end) &&
            !buffer_is_zero(rb->host + offset, end - offset)) {
            return false;
        }
    }
    return true;
}

bool ram_block_extent(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                      uint64_t *extent)
{
    uint64_t end;
    bool hole;

    if (offset >= rb->used_length) {
        *extent = length;
        return false;
    }
    ram_block_holes_setup(rb);
    hole = ram_next_extent(rb, offset, MIN(offset + length, rb->used_length),
                           &end);
    *extent = end - offset;
    return hole;
}

bool ram_host_extent(const void *host, uint64_t length, uint64_t *extent)
{
    ram_addr_t offset;
    RAMBlock *rb = qemu_ram_block_from_host((void *)host, false, &offset);

    if (!rb) {
        *extent = length;
        return false;
    }
    return ram_block_extent(rb, offset, length, extent);
}

const void *ram_page_to_read(const void *host, size_t length)
{
    SparseRange data = { };
    ram_addr_t offset;
    RAMBlock *rb = qemu_ram_block_from_host((void *)host, false, &offset);

    if (!rb) {
        return host;
    }
    assert(length <= RAM_ZERO_PAGE_SIZE);
    ram_block_holes_setup(rb);
    return ram_find_hole(rb, offset, offset + length, &data) == length
           ? ram_zero_page() : host;
}

const void *ram_zero_page(void)
{
    static const uint8_t zeroes[RAM_ZERO_PAGE_SIZE];

    return zeroes;
}
