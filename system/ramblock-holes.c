/*
 * Holes in guest RAM: where they are, and reading guest RAM without filling them
 *
 * The one place that knows what kind of memory a block is, and how to ask the
 * kernel about it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "migration/misc.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/mmap-alloc.h"
#include "qemu/populated-memory.h"
#include "qemu/sparse-file.h"
#include "system/memory.h"
#include "system/ramblock-holes.h"
#include "system/system.h"

/* The most bytes of a file that are read to find out whether they are zero */
#define FILE_READ_MAX (64 * KiB)

/*
 * How many huge pages are looked up in the page tables in the time that reading
 * one from the file takes
 */
#define HUGE_LOOK_UPS_PER_READ 100

#ifdef CONFIG_LINUX
static RAMHolesKind kind_of_shared(const RAMBlock *rb, QemuFsType fs)
{
    if (rb->fd < 0) {
        /* MADV_REMOVE refuses locked memory, even if locked on fault only */
        return (rb->flags & RAM_PREALLOC) || should_mlock(mlock_state)
               ? RAM_HOLES_UNKNOWN : RAM_HOLES_SHARED_ANONYMOUS;
    }
    if (!sparse_file_is_regular(rb->fd)) {
        return RAM_HOLES_UNKNOWN;
    }
    switch (fs) {
    case QEMU_FS_TYPE_TMPFS:
        return RAM_HOLES_SHMEM;
    case QEMU_FS_TYPE_HUGETLBFS:
        return RAM_HOLES_HUGETLB;
    default:
        return RAM_HOLES_OTHER_FILE;
    }
}

/* A private mapping has pages of its own, which the file does not know. */
static RAMHolesKind kind_of_private(const RAMBlock *rb, QemuFsType fs)
{
    /* The caller of qemu_ram_alloc_from_ptr() may have mapped anything. */
    if (rb->flags & RAM_PREALLOC) {
        return RAM_HOLES_UNKNOWN;
    }
    if (rb->fd < 0) {
        return RAM_HOLES_PRIVATE_ANONYMOUS;
    }
    if (!sparse_file_is_regular(rb->fd)) {
        return RAM_HOLES_UNKNOWN;
    }
    switch (fs) {
    case QEMU_FS_TYPE_TMPFS:
        return RAM_HOLES_PRIVATE_SHMEM;
    case QEMU_FS_TYPE_HUGETLBFS:
        return RAM_HOLES_PRIVATE_HUGETLB;
    default:
        return RAM_HOLES_UNKNOWN;
    }
}

static RAMHolesKind find_kind(const RAMBlock *rb)
{
    QemuFsType fs = rb->fd < 0 ? QEMU_FS_TYPE_UNKNOWN : qemu_fd_getfs(rb->fd);

    if (!migrate_ram_holes()) {
        return RAM_HOLES_UNKNOWN;
    }
    return rb->flags & RAM_SHARED ? kind_of_shared(rb, fs)
                                  : kind_of_private(rb, fs);
}
#else
static RAMHolesKind find_kind(const RAMBlock *rb)
{
    return RAM_HOLES_UNKNOWN;
}
#endif

void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb)
{
    *holes = (RAMBlockHoles) { .kind = find_kind(rb) };
}

void ram_block_holes_setup(RAMBlock *rb)
{
    RAMBlockHoles *holes;

    if (qatomic_read(&rb->holes)) {
        return;
    }
    holes = g_new(RAMBlockHoles, 1);
    ram_block_holes_init(holes, rb);
    if (qatomic_cmpxchg(&rb->holes, NULL, holes)) {
        g_free(holes);
    }
}

void ram_block_holes_failed(RAMBlock *rb, RAMHolesOperation operation,
                            int err)
{
    bool punch = operation == RAM_HOLES_PUNCH;

    if (qatomic_fetch_or(&rb->holes->failed, operation)) {
        return;
    }
    warn_report("RAM block '%s': cannot %s holes: %s; %s", rb->idstr,
                punch ? "punch" : "find", strerror(-err),
                operation == RAM_HOLES_FIND
                ? "they are read, which populates them"
                : "zero pages are cleared in place instead");
}

/*
 * The functions below look at the part @within of a block, in bytes from the
 * start of the block.  They return 1 for data, 0 for a hole, or a negative errno
 * value; @end is set to the end of the extent.
 */

static SparseRange range_in_file(const RAMBlock *rb, const SparseRange *within)
{
    return (SparseRange) {
        .start = within->start + rb->fd_offset,
        .end = within->end + rb->fd_offset,
    };
}

static int extent_of_file(const RAMBlock *rb, const SparseRange *within,
                          uint64_t *end)
{
    SparseRange in_file = range_in_file(rb, within);
    int ret = sparse_file_next_extent(rb->fd, &in_file, end);

    *end -= rb->fd_offset;
    return ret;
}

/* Reading the file fills neither the page tables nor a hole. */
static int extent_by_reading(const RAMBlock *rb, const SparseRange *within,
                             uint64_t *end)
{
    SparseRange in_file = range_in_file(rb, within);
    int ret = sparse_file_is_zero(rb->fd, &in_file);

    *end = within->end;
    return ret < 0 ? ret : !ret;
}

/*
 * What is in the page tables is data.  So is everything if the kernel does not tell,
 * because there is no /proc, for example: that is not worth a warning.
 */
static int extent_of_page_tables(const RAMBlock *rb, const SparseRange *within,
                                 uint64_t *end)
{
    uint64_t address = (uintptr_t)rb->host;
    SparseRange memory = {
        .start = within->start + address,
        .end = within->end + address,
    };
    SparseRange populated;
    bool data;

    *end = within->end;
    if (populated_memory_next(&memory, &populated) < 0) {
        return 1;
    }
    data = populated.start == memory.start && !sparse_range_is_empty(&populated);
    *end = (data ? populated.end : populated.start) - address;
    return data;
}

/*
 * Reading a hole of the file allocates it in the file, which all clones of a
 * template share.
 *
 * The page tables are asked last.  What this process has written is a copy that
 * only they know, and it is there when the write is done.  So all that is
 * written before that question is seen, whatever the file said; a write after
 * it finds the dirty bits cleared, and sets them again.  Asked first, they
 * would miss a write in between, and the file need not know of that either.
 */
static int extent_private_shmem(const RAMBlock *rb, const SparseRange *within,
                                uint64_t *end)
{
    SparseRange hole = *within;
    int ret = extent_of_file(rb, within, &hole.end);

    *end = hole.end;
    return ret ? ret : extent_of_page_tables(rb, &hole, end);
}

/*
 * Reading a huge page that is not there allocates it, and there may be none
 * left.
 */
static int extent_private_hugetlb(const RAMBlock *rb, const SparseRange *within,
                                  uint64_t *end)
{
    ram_addr_t huge = QEMU_ALIGN_DOWN(within->start, rb->page_size);
    SparseRange part = {
        .start = within->start,
        .end = MIN(within->end, huge + rb->page_size),
    };

    *end = part.end;
    if (populated_huge_page(rb->host + huge)) {
        return 1;
    }
    return sparse_file_allocated(rb->fd) == 0 ? 0
                                              : extent_by_reading(rb, &part, end);
}

/*
 * Whether the file has just what our page tables have, and nothing of it is in
 * the part @hole.
 *
 * What another process has allocated is not in our page tables, and neither is,
 * for a moment, a page that is being moved: the sizes differ then.  So all is
 * looked at in one pass.
 */
static bool sizes_agree(const RAMBlock *rb, const SparseRange *hole)
{
    uint64_t address = (uintptr_t)rb->host;
    int64_t before = sparse_file_allocated(rb->fd);
    SparseRange all = { .start = address, .end = address + rb->max_length };
    SparseRange memory = {
        .start = hole->start + address,
        .end = hole->end + address,
    };
    int64_t mapped = 0;

    while (!sparse_range_is_empty(&all)) {
        SparseRange populated;

        populated_huge_pages_next(&all, rb->page_size, &populated);
        if (sparse_range_overlaps(&populated, &memory)) {
            return false;
        }
        mapped += sparse_range_length(&populated);
        all.start = populated.end;
    }
    return before == mapped && sparse_file_allocated(rb->fd) == mapped;
}

/*
 * The sizes agree by chance if, during the pass, the guest populates a page in
 * front of it and discards one behind it.
 */
static bool no_huge_page_elsewhere(const RAMBlock *rb, const SparseRange *hole)
{
    return sizes_agree(rb, hole) && sizes_agree(rb, hole);
}

/*
 * hugetlbfs does not report extents.  What is in our page tables is data.
 * Another process may have written to the rest: if the sizes do not show that
 * there is nothing of that kind, the file is read, one huge page at a time.
 */
static int extent_hugetlb(const RAMBlock *rb, const SparseRange *within,
                          uint64_t *end)
{
    uint64_t address = (uintptr_t)rb->host;
    ram_addr_t first = QEMU_ALIGN_DOWN(within->start, rb->page_size);
    SparseRange memory = {
        .start = address + first,
        .end = address + QEMU_ALIGN_UP(within->end, rb->page_size),
    };
    SparseRange populated, hole;

    populated_huge_pages_next(&memory, rb->page_size, &populated);
    if (populated.start == memory.start) {
        *end = MIN(within->end, populated.end - address);
        return 1;
    }
    hole = (SparseRange) { .start = first, .end = populated.start - address };
    if (sparse_range_length(&hole) * HUGE_LOOK_UPS_PER_READ >=
        rb->used_length && no_huge_page_elsewhere(rb, &hole)) {
        *end = MIN(within->end, hole.end);
        return 0;
    }
    hole.start = within->start;
    hole.end = MIN(within->end, first + rb->page_size);
    return extent_by_reading(rb, &hole, end);
}

int ram_block_extent_raw(const RAMBlock *rb, ram_addr_t offset, uint64_t length,
                         uint64_t *extent)
{
    SparseRange within = { .start = offset, .end = offset + length };
    uint64_t end = within.end;
    int ret = 1;

    switch (ram_block_holes_kind(rb)) {
    case RAM_HOLES_SHMEM:
        ret = extent_of_file(rb, &within, &end);
        break;
    case RAM_HOLES_HUGETLB:
        ret = extent_hugetlb(rb, &within, &end);
        break;
    case RAM_HOLES_OTHER_FILE:
        within.end = MIN(within.end, offset + FILE_READ_MAX);
        ret = extent_by_reading(rb, &within, &end);
        break;
    case RAM_HOLES_PRIVATE_ANONYMOUS:
        ret = extent_of_page_tables(rb, &within, &end);
        break;
    case RAM_HOLES_PRIVATE_SHMEM:
        ret = extent_private_shmem(rb, &within, &end);
        break;
    case RAM_HOLES_PRIVATE_HUGETLB:
        ret = extent_private_hugetlb(rb, &within, &end);
        break;
    case RAM_HOLES_SHARED_ANONYMOUS:
    case RAM_HOLES_UNKNOWN:
        break;
    }
    if (ret < 0) {
        /* One look-up that fails makes this data, and nothing else */
        end = MIN(offset + length,
                  QEMU_ALIGN_DOWN(offset, rb->page_size) + rb->page_size);
    }
    *extent = end - offset;
    return ret;
}

bool ram_block_extent(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                      uint64_t *extent)
{
    uint64_t limit = offset + length;
    int ret;

    *extent = length;
    if (offset >= rb->used_length) {
        return false;
    }
    ram_block_holes_setup(rb);
    if (!ram_block_reading_allocates(rb)) {
        return false;
    }
    limit = MIN(limit, rb->used_length);
    if (!postcopy_has_arrived(rb, offset, limit - offset, extent)) {
        return false;
    }
    ret = ram_block_extent_raw(rb, offset, *extent, extent);
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_FIND, ret);
    }
    return ret == 0;
}

uint64_t ram_block_hole_length(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                               uint64_t *data)
{
    uint64_t done = 0, extent = 0;

    while (done < length &&
           ram_block_extent(rb, offset + done, length - done, &extent)) {
        done += extent;
    }
    if (data) {
        *data = done < length ? extent : 0;
    }
    return done;
}

bool ram_block_is_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    uint64_t limit = offset + length, extent;

    for (; offset < limit; offset += extent) {
        if (!ram_block_extent(rb, offset, limit - offset, &extent) &&
            !buffer_is_zero(rb->host + offset, extent)) {
            return false;
        }
    }
    return true;
}

bool ram_host_extent(const void *host, uint64_t length, uint64_t *extent)
{
    ram_addr_t offset;
    RAMBlock *rb = qemu_ram_block_from_host((void *)host, false, &offset);

    *extent = length;
    return rb && ram_block_extent(rb, offset, length, extent);
}

const void *ram_page_to_read(const void *host, size_t length)
{
    ram_addr_t offset;
    RAMBlock *rb = qemu_ram_block_from_host((void *)host, false, &offset);

    assert(length <= RAM_ZERO_PAGE_SIZE);
    return rb && ram_block_hole_length(rb, offset, length, NULL) == length
           ? ram_zero_page() : host;
}

const void *ram_zero_page(void)
{
    static const uint8_t zeroes[RAM_ZERO_PAGE_SIZE];

    return zeroes;
}
