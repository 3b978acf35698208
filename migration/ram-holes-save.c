/*
 * Holes in guest RAM: pages on the source
 *
 * A hole is sent as a zero page without reading it, because reading it through
 * the mapping would allocate it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "qemu/cutils.h"
#include "ram-holes.h"

static bool range_covers(const SparseRange *range, const SparseRange *part)
{
    return range->start <= part->start && part->end <= range->end;
}

/* To and from a range of the block's file */
static SparseRange range_shift(const SparseRange *range, uint64_t distance)
{
    return (SparseRange) {
        .start = range->start + distance,
        .end = range->end + distance,
    };
}

static int find_data_shmem(RAMBlock *rb, const SparseRange *within,
                           uint64_t ahead, SparseRange *data)
{
    SparseRange in_file = range_shift(within, rb->fd_offset);
    int ret = sparse_file_next_data(rb->fd, &in_file, ahead, data);

    *data = range_shift(data, -rb->fd_offset);
    return ret;
}

/*
 * Nobody tells the extents of hugetlbfs.  Look at one huge page: if it is not
 * mapped it may still have been written by another process, so read the file.
 */
static int find_data_hugetlb(RAMBlock *rb, const SparseRange *within,
                             SparseRange *data)
{
    SparseRange huge = {
        .start = QEMU_ALIGN_DOWN(within->start, rb->page_size),
        .end = QEMU_ALIGN_DOWN(within->start, rb->page_size) + rb->page_size,
    };
    SparseRange part = {
        .start = within->start,
        .end = MIN(within->end, huge.end),
    };
    SparseRange in_file = range_shift(&part, rb->fd_offset);
    int ret = 0;

    if (!ram_huge_page_is_mapped(rb, huge.start)) {
        ret = sparse_file_is_zero(rb->fd, &in_file);
        if (ret < 0) {
            return ret;
        }
    }
    *data = part;
    if (ret) {
        data->start = part.end;
    }
    return 0;
}

/* As far as data is followed from a page that was not expected */
#define AHEAD_MIN (64 * KiB)

/*
 * How far to follow data from @offset, in bytes.  That takes time for each
 * page, which is wasted where few pages are dirty, or a page is requested.  So
 * look further only while the search goes on where the last answer ended.
 */
static uint64_t look_ahead(const RAMHoleCache *cache, const RAMBlock *rb,
                           ram_addr_t offset)
{
    bool goes_on = cache->rb == rb && offset >= cache->data.end &&
                   offset - cache->data.end < cache->ahead;

    return goes_on ? MIN(cache->ahead * 4, GiB) : AHEAD_MIN;
}

bool ram_page_is_hole(RAMHoleCache *cache, RAMBlock *rb, ram_addr_t offset,
                      uint64_t length, uint64_t limit)
{
    SparseRange page = { .start = offset, .end = offset + length };
    SparseRange within = { .start = offset, .end = limit };
    SparseRange data;
    uint64_t ahead;
    int ret;

    if (!ram_block_holes_known(rb)) {
        return false;
    }
    if (cache->rb == rb) {
        if (range_covers(&cache->hole, &page)) {
            return true;
        }
        if (sparse_range_overlaps(&cache->data, &page)) {
            return false;
        }
    }

    ahead = look_ahead(cache, rb, offset);
    if (rb->holes->type == QEMU_FS_TYPE_HUGETLBFS) {
        ret = find_data_hugetlb(rb, &within, &data);
    } else {
        ret = find_data_shmem(rb, &within, ahead, &data);
    }
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_FIND, ret);
        ram_hole_cache_reset(cache);
        return false;
    }
    cache->rb = rb;
    cache->hole = (SparseRange) { .start = offset, .end = data.start };
    cache->data = data;
    cache->ahead = ahead;
    return range_covers(&cache->hole, &page);
}

void ram_hole_cache_reset(RAMHoleCache *cache)
{
    *cache = (RAMHoleCache) { };
}

bool ram_page_is_hole_in_chunk(RAMHoleCache *cache, RAMBlock *rb,
                               ram_addr_t offset)
{
    size_t page_size = qemu_target_page_size();
    uint64_t chunk_size, limit;

    /*
     * Why what is remembered here cannot go stale: a page is sent as zero
     * because of a look-up at time T, and the dirty bits of the whole chunk
     * were cleared at their origin (KVM, TCG, vhost) at a time C before T.
     *
     * - A write before C populated the page, so the look-up sees data.
     * - A write after C sets the dirty bit again.  The next sync finds it, and
     *   the page is sent again; it does not matter whether the write was
     *   before or after T, or before or after the page was sent.
     *
     * Both need that C is before T, for the page in question and not just for
     * the one at which the look-up started.  So the look-up ends where the
     * chunk of clear_bmap ends, and migration_bitmap_clear_dirty() for the
     * page is called before this function.
     *
     * The second point also needs that no sync comes between the write and
     * the use: that sync would move the dirty bit to the migration bitmap and
     * the chunk would be cleared again, at a C' after T.  So everything is
     * forgotten where the bit is moved, in ramblock_sync_dirty_bitmap(), and
     * under the same lock under which it is used: another thread can sync while
     * the migration thread is in the middle of a chunk (cpu-throttle.c).
     *
     * With TCG, C is when memory_global_after_dirty_log_sync() returns: before,
     * a vCPU may have marked the page and not have stored to it yet.  So
     * everything is forgotten once more then.
     *
     * Once the guest has stopped for the last stage, or for postcopy, QEMU does
     * not clear dirty bits at their origin any more (after 10.0).  Nobody writes
     * then, and what was remembered before was forgotten in the last sync.
     */
    chunk_size = page_size;
    if (rb->clear_bmap) {
        chunk_size <<= rb->clear_bmap_shift;
    }
    limit = MIN(QEMU_ALIGN_DOWN(offset, chunk_size) + chunk_size,
                rb->used_length);
    return ram_page_is_hole(cache, rb, offset, page_size, limit);
}

bool ram_range_is_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    RAMHoleCache cache = { };
    uint64_t end = offset + length;

    while (offset < end) {
        uint64_t next = end;

        if (ram_page_is_hole(&cache, rb, offset, 1, end)) {
            next = cache.hole.end;
        } else {
            /* Holes may have become unknown, and then nothing is remembered */
            if (cache.rb && cache.data.end > offset) {
                next = MIN(cache.data.end, end);
            }
            if (!buffer_is_zero(rb->host + offset, next - offset)) {
                return false;
            }
        }
        offset = next;
    }
    return true;
}

const void *ram_page_to_read(RAMHoleCache *cache, const void *host,
                             size_t length)
{
    RAMHoleCache for_this_page = { };
    ram_addr_t offset;
    RAMBlock *rb = qemu_ram_block_from_host((void *)host, false, &offset);
    uint64_t limit = offset + length;

    if (!rb) {
        return host;
    }
    assert(length <= RAM_ZERO_PAGE_SIZE);
    ram_block_holes_setup(rb);
    if (cache) {
        limit = MAX(limit, rb->used_length);
    } else {
        cache = &for_this_page;
    }
    return ram_page_is_hole(cache, rb, offset, length, limit) ? ram_zero_page()
                                                              : host;
}

const void *ram_zero_page(void)
{
    static const uint8_t zeroes[RAM_ZERO_PAGE_SIZE];

    assert(qemu_target_page_size() <= RAM_ZERO_PAGE_SIZE);
    return zeroes;
}
