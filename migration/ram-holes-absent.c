/*
 * Holes in guest RAM: pages that a mapped-ram file does not have
 *
 * A page that was zero when the file was written is not in it, and reads as
 * zero when it is loaded.  The backend may have come with data in it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "qemu/bitmap.h"
#include "system/memory.h"
#include "options.h"
#include "ram.h"
#include "ram-holes.h"

/*
 * How many bytes are made zero until the main loop has to run again: what is
 * populated may have to be read, which takes a millisecond or a few.
 */
#define SLICE_MAX (8 * MiB)

/* How much is asked about at once: the kernel looks at each populated page. */
#define ASK_MAX (256 * MiB)

typedef struct AbsentPages {
    RAMBlock *rb;
    const unsigned long *present;
    uint64_t npages;
    /* Bytes since the main loop has run */
    uint64_t done;
} AbsentPages;

/* The functions below work on a @range of the file that is behind the block. */

/* Make those pages zero of which any part is in the range */
static void zero_absent(AbsentPages *pages, const SparseRange *range)
{
    RAMBlock *rb = pages->rb;
    uint64_t size = qemu_target_page_size();
    uint64_t start = range->start - rb->fd_offset;
    uint64_t end = range->end - rb->fd_offset;
    uint64_t last = MIN(DIV_ROUND_UP(end, size), pages->npages);
    uint64_t page = find_next_zero_bit(pages->present, last, start / size);

    while (page < last) {
        uint64_t slice = MIN(last, page + SLICE_MAX / size);
        uint64_t next = find_next_bit(pages->present, slice, page);

        ram_handle_zero(rb, page * size, (next - page) * size);
        pages->done += (next - page) * size;
        if (pages->done >= SLICE_MAX) {
            pages->done = 0;
            ram_load_yield();
        }
        page = find_next_zero_bit(pages->present, last, next);
    }
}

/*
 * The huge pages of the file that are allocated, from the start of the block,
 * or NULL if that is not known.  What another process has allocated is not in
 * our page tables; if there is nothing of that kind, the file has as many huge
 * pages as we have.
 */
static unsigned long *find_huge_pages(const RAMBlock *rb, uint64_t *count)
{
    g_autofree unsigned long *mapped = NULL;
    int64_t bytes = 0;

    *count = DIV_ROUND_UP(rb->used_length, rb->page_size);
    mapped = bitmap_new(*count);
    for (uint64_t i = 0; i < *count; i++) {
        if (ram_huge_page_is_mapped(rb, i * rb->page_size)) {
            set_bit(i, mapped);
            bytes += rb->page_size;
        }
    }
    if (sparse_file_allocated(rb->fd) != bytes) {
        return NULL;
    }
    return g_steal_pointer(&mapped);
}

static void zero_absent_hugetlb(AbsentPages *pages,
                                const SparseRange *range)
{
    RAMBlock *rb = pages->rb;
    uint64_t count;
    g_autofree unsigned long *huge_pages = find_huge_pages(rb, &count);

    if (!huge_pages) {
        zero_absent(pages, range);
        return;
    }
    for (uint64_t i = find_first_bit(huge_pages, count); i < count;
         i = find_next_bit(huge_pages, count, i + 1)) {
        SparseRange huge = {
            .start = rb->fd_offset + i * rb->page_size,
            .end = rb->fd_offset + (i + 1) * rb->page_size,
        };

        if (sparse_range_overlaps(&huge, range)) {
            huge.start = MAX(huge.start, range->start);
            huge.end = MIN(huge.end, range->end);
            zero_absent(pages, &huge);
        }
    }
}

/* What there is in a range that may be something else than zero */
static void next_populated(RAMBlock *rb, const SparseRange *range,
                           SparseRange *populated)
{
    int ret;

    if (ram_block_holes_known(rb)) {
        SparseRange within = *range;
        uint64_t end;

        within.end = MIN(within.end, within.start + ASK_MAX);
        *populated = within;
        ret = sparse_file_next_extent(rb->fd, &within, &end);
        if (ret < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
            return;
        } else if (ret) {
            populated->end = end;
        } else {
            populated->start = populated->end = end;
        }
    } else if (ram_block_is_private_known(rb) &&
               rb->holes->private_memory == RAM_PRIVATE_ANONYMOUS) {
        ret = ram_next_populated_private(rb, range, populated);
    } else {
        ret = -ENOTSUP;
    }
    if (ret < 0) {
        *populated = *range;
    }
}

void ram_zero_absent_pages(RAMBlock *rb, const unsigned long *present,
                           uint64_t npages)
{
    uint64_t size = qemu_target_page_size();
    AbsentPages pages = {
        .rb = rb,
        .present = present,
        .npages = MIN(npages, rb->used_length / size),
    };
    SparseRange todo = {
        .start = rb->fd_offset,
        .end = rb->fd_offset + pages.npages * size,
    };

    if (!migrate_ram_holes() || migrate_ram_is_ignored(rb) ||
        ram_block_is_pristine(rb)) {
        return;
    }
    /*
     * Of virtio-mem it is not known yet what is plugged, because that comes
     * later in the file, with x-early-migration as well.  It discards the rest
     * when it has been loaded.
     */
    if (ram_block_holes_known(rb) &&
        rb->holes->type == QEMU_FS_TYPE_HUGETLBFS) {
        zero_absent_hugetlb(&pages, &todo);
        return;
    }
    while (!sparse_range_is_empty(&todo)) {
        SparseRange populated;

        next_populated(rb, &todo, &populated);
        if (!sparse_range_is_empty(&populated)) {
            zero_absent(&pages, &populated);
        }
        todo.start = populated.end;
    }
}
