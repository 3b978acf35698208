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
#include "ram-holes.h"

typedef struct AbsentPages {
    RAMBlock *rb;
    const unsigned long *present;
    uint64_t npages;
} AbsentPages;

/* The functions below work on a @range of the file that is behind the block. */

/* Make those pages zero of which any part is in the range */
static void zero_absent(const AbsentPages *pages, const SparseRange *range)
{
    RAMBlock *rb = pages->rb;
    uint64_t size = qemu_target_page_size();
    uint64_t start = range->start - rb->fd_offset;
    uint64_t end = range->end - rb->fd_offset;
    uint64_t last = MIN(DIV_ROUND_UP(end, size), pages->npages);
    uint64_t page = find_next_zero_bit(pages->present, last, start / size);

    while (page < last) {
        uint64_t next = find_next_bit(pages->present, last, page);

        ram_handle_zero(rb, page * size, (next - page) * size);
        page = find_next_zero_bit(pages->present, last, next);
    }
}

/* How much the file has allocated, in bytes; negative errno value if unknown */
static int64_t allocated_bytes(int fd)
{
#ifdef CONFIG_LINUX
    struct stat st;

    return fstat(fd, &st) < 0 ? -errno : st.st_blocks * 512LL;
#else
    /* There are hosts whose files have no such number */
    return -ENOSYS;
#endif
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
    if (allocated_bytes(rb->fd) != bytes) {
        return NULL;
    }
    return g_steal_pointer(&mapped);
}

static void zero_absent_hugetlb(const AbsentPages *pages,
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

/* Huge pages that were written to are in no file, and nobody tells of holes */
static bool is_private_hugetlb(const RAMBlock *rb)
{
    return !(rb->flags & (RAM_SHARED | RAM_PREALLOC)) && rb->fd >= 0 &&
           qemu_fd_getfs(rb->fd) == QEMU_FS_TYPE_HUGETLBFS;
}

/*
 * To read a huge page that is not there allocates it, and there may be none
 * left.  So do not read what is neither in the page tables nor in the file.
 */
static void zero_absent_private_hugetlb(const AbsentPages *pages,
                                        SparseRange todo)
{
    RAMBlock *rb = pages->rb;
    bool file_is_empty = allocated_bytes(rb->fd) == 0;

    while (!sparse_range_is_empty(&todo)) {
        SparseRange huge = todo;

        huge.end = MIN(todo.end, todo.start + rb->page_size);
        if (ram_huge_page_is_mapped(rb, huge.start - rb->fd_offset) ||
            (!file_is_empty && sparse_file_is_zero(rb->fd, &huge) <= 0)) {
            zero_absent(pages, &huge);
        }
        todo.start = huge.end;
    }
}

/* What there is in a range that may be something else than zero */
static void next_populated(RAMBlock *rb, const SparseRange *range,
                           SparseRange *populated)
{
    int ret;

    if (ram_block_holes_known(rb)) {
        ret = sparse_file_next_data(rb->fd, range, UINT64_MAX, populated);
        if (ret < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_FIND, ret);
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

    if (!migrate_ram_holes() || migrate_ram_is_ignored(rb)) {
        return;
    }
    /*
     * Of virtio-mem it is not known yet what is plugged, because that comes
     * later in the file, with x-early-migration as well.  It discards the rest
     * when it has been loaded.
     */
    if (is_private_hugetlb(rb)) {
        zero_absent_private_hugetlb(&pages, todo);
        return;
    }
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
