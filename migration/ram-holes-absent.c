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

/* Let the main loop run when so much has been looked at */
static void count_bytes(AbsentPages *pages, uint64_t bytes)
{
    pages->done += bytes;
    if (pages->done >= SLICE_MAX) {
        pages->done = 0;
        ram_load_yield();
    }
}

/* Make those pages zero of which any part is in a part of the block */
static void zero_absent(AbsentPages *pages, ram_addr_t offset, uint64_t length)
{
    uint64_t size = qemu_target_page_size();
    uint64_t last = MIN(DIV_ROUND_UP(offset + length, size), pages->npages);
    uint64_t page = find_next_zero_bit(pages->present, last, offset / size);

    while (page < last) {
        uint64_t slice = MIN(last, page + SLICE_MAX / size);
        uint64_t next = find_next_bit(pages->present, slice, page);

        ram_handle_zero(pages->rb, page * size, (next - page) * size);
        count_bytes(pages, (next - page) * size);
        page = find_next_zero_bit(pages->present, last, next);
    }
}

/* Whether a part begins with a hole, and for how long, if that is cheap to ask */
static bool is_hole(AbsentPages *pages, ram_addr_t offset, uint64_t length,
                    uint64_t *extent)
{
    RAMBlock *rb = pages->rb;

    switch (rb->holes->kind) {
    case RAM_HOLES_HUGETLB:
        /* This may read a huge page from the file */
        count_bytes(pages, rb->page_size);
        /* fall through */
    case RAM_HOLES_SHMEM:
    case RAM_HOLES_PRIVATE_ANONYMOUS:
        if (ram_block_extent_raw(rb, offset, MIN(length, ASK_MAX),
                                 extent) == 0) {
            return true;
        }
        /* The kernel has looked at each of these pages */
        count_bytes(pages, *extent);
        return false;
    default:
        /* ram_handle_zero() asks, if anything can be asked */
        *extent = length;
        return false;
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
    uint64_t offset = 0, length = pages.npages * size, extent;

    if (!migrate_ram_holes() || migrate_ram_is_ignored(rb) ||
        ram_block_is_pristine(rb)) {
        return;
    }
    /*
     * The plugged ranges of virtio-mem are not known yet: they come later in the
     * file, with x-early-migration as well.  It discards the rest when it has
     * been loaded.
     */
    for (; length; offset += extent, length -= extent) {
        if (!is_hole(&pages, offset, length, &extent)) {
            zero_absent(&pages, offset, extent);
        }
    }
}
