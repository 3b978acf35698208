/*
 * Holes in guest RAM: zero pages on the destination
 *
 * What arrives as zero is left alone where the kernel says that there is a
 * hole.  That it arrives for the first time proves nothing: the backend may be
 * a file with data of an earlier guest in it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "qemu/cutils.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/madvise.h"
#include "qemu/populated-memory.h"
#include "system/memory.h"
#include "migration.h"
#include "options.h"
#include "ram-holes.h"
#include "trace.h"

/*
 * To ask about fewer target pages than this takes longer than to read them
 * may: a system call takes as long as a page fault or a few.
 */
#define PRIVATE_ASK_MIN 32

/*
 * The most bytes that are gathered of private memory, and of files that are
 * read.  That takes some hundred microseconds; the source may have to wait.
 */
#define PRIVATE_RUN_MAX (2 * MiB)

#define ACTION_HOLE     "hole"
#define ACTION_PUNCHED  "punched"
#define ACTION_CLEARED  "cleared"

void ram_clear_memory(void *host, uint64_t length)
{
    size_t page_size = qemu_target_page_size();

    /* By page, so that one byte of data does not write to all of it */
    for (uint64_t done = 0; done < length; done += page_size) {
        size_t size = MIN(page_size, length - done);

        if (!buffer_is_zero(host + done, size)) {
            memset(host + done, 0, size);
        }
    }
}

/* The functions below work on a @range of the file that is behind the block. */

static void *range_host(const RAMBlock *rb, const SparseRange *range)
{
    return rb->host + (range->start - rb->fd_offset);
}

static void trace_zero(RAMBlock *rb, const SparseRange *range,
                       const char *action)
{
    if (!sparse_range_is_empty(range)) {
        trace_ram_handle_zero_range(rb->idstr, range->start - rb->fd_offset,
                                    sparse_range_length(range), action);
    }
}

static void zero_clear(RAMBlock *rb, const SparseRange *range)
{
    trace_zero(rb, range, ACTION_CLEARED);
    ram_clear_memory(range_host(rb, range), sparse_range_length(range));
}

static void zero_punch(RAMBlock *rb, const SparseRange *range)
{
    int ret;

    if (sparse_range_is_empty(range)) {
        return;
    }
    ret = sparse_file_punch(rb->fd, range);
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_PUNCH, ret);
        zero_clear(rb, range);
        return;
    }
    trace_zero(rb, range, ACTION_PUNCHED);
}

/*
 * Zero data that is only a part of what may be a transparent huge page.  If
 * all around it is populated as well, it probably is one, and that is worth
 * more than the few pages that splitting it would free.
 */
static void zero_huge_part(RAMBlock *rb, const SparseRange *part)
{
    uint64_t thp_size = rb->holes->thp_size;
    SparseRange huge;
    uint64_t end;
    int ret;

    if (sparse_range_is_empty(part)) {
        return;
    }
    huge.start = QEMU_ALIGN_DOWN(part->start, thp_size);
    huge.end = huge.start + thp_size;

    ret = sparse_file_next_extent(rb->fd, &huge, &end);
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
        zero_clear(rb, part);
    } else if (ret && end == huge.end) {
        zero_clear(rb, part);
    } else {
        zero_punch(rb, part);
    }
}

static void zero_data(RAMBlock *rb, const SparseRange *data)
{
    SparseRange head, body, tail;

    if (!ram_block_may_punch(rb)) {
        zero_clear(rb, data);
    } else if (!rb->holes->thp_size) {
        zero_punch(rb, data);
    } else {
        sparse_range_split(data, rb->holes->thp_size, &head, &body, &tail);
        zero_huge_part(rb, &head);
        zero_punch(rb, &body);
        zero_huge_part(rb, &tail);
    }
}

static void zero_shmem(RAMBlock *rb, SparseRange todo)
{
    while (!sparse_range_is_empty(&todo)) {
        SparseRange extent = todo;
        int ret = sparse_file_next_extent(rb->fd, &todo, &extent.end);

        if (ret < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
            zero_clear(rb, &todo);
            return;
        }
        if (ret) {
            zero_data(rb, &extent);
        } else {
            trace_zero(rb, &extent, ACTION_HOLE);
        }
        todo.start = extent.end;
    }
}

/*
 * Zero a part of one huge page.  What is not zero belongs to a huge page that
 * is allocated already, so that writing to it allocates nothing.
 */
static int zero_huge_page(RAMBlock *rb, const SparseRange *part)
{
    size_t page_size = qemu_target_page_size();
    ram_addr_t offset = part->start - rb->fd_offset;
    SparseRange page = *part;
    int ret;

    /* Reading what is in the page tables is the fastest */
    if (QEMU_IS_ALIGNED(offset, rb->page_size) &&
        ram_huge_page_is_mapped(rb, offset)) {
        zero_clear(rb, part);
        return 0;
    }
    ret = sparse_file_is_zero(rb->fd, part);
    if (ret > 0) {
        trace_zero(rb, part, ACTION_HOLE);
        return 0;
    }
    while (ret >= 0 && page.start < part->end) {
        page.end = MIN(part->end, page.start + page_size);
        ret = sparse_file_is_zero(rb->fd, &page);
        if (ret == 0) {
            zero_clear(rb, &page);
        }
        page.start = page.end;
    }
    return MIN(ret, 0);
}

static void zero_hugetlb(RAMBlock *rb, SparseRange todo)
{
    while (!sparse_range_is_empty(&todo)) {
        ram_addr_t offset = todo.start - rb->fd_offset;
        uint64_t rest = rb->page_size - offset % rb->page_size;
        SparseRange part = todo;
        int ret;

        if (ram_next_extent_raw(rb, offset, todo.end - rb->fd_offset,
                                &part.end)) {
            part.end += rb->fd_offset;
            trace_zero(rb, &part, ACTION_HOLE);
            todo.start = part.end;
            continue;
        }
        part.end = MIN(todo.end, todo.start + rest);
        ret = zero_huge_page(rb, &part);
        if (ret < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
            zero_clear(rb, &part);
        }
        todo.start = part.end;
    }
}

static bool ram_block_is_shared_anonymous(const RAMBlock *rb)
{
    return rb->holes && rb->holes->shared_anonymous;
}

/*
 * Without a file nobody can tell where the holes are, but freeing what is a
 * hole already is cheap.  MADV_DONTNEED would only unmap the pages.
 */
static void zero_shared_anonymous(RAMBlock *rb, const SparseRange *range)
{
    SparseRange head, body, tail;

    sparse_range_split(range, qemu_real_host_page_size(), &head, &body, &tail);
    if (!sparse_range_is_empty(&body) &&
        qemu_madvise(range_host(rb, &body), sparse_range_length(&body),
                     QEMU_MADV_REMOVE) < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_PUNCH, -errno);
        zero_clear(rb, range);
        return;
    }
    trace_zero(rb, &body, ACTION_PUNCHED);
    zero_clear(rb, &head);
    zero_clear(rb, &tail);
}

int ram_next_populated_private(const RAMBlock *rb, const SparseRange *within,
                               SparseRange *populated)
{
    uint64_t address = (uintptr_t)rb->host - rb->fd_offset;
    SparseRange memory = {
        .start = within->start + address,
        .end = within->end + address,
    };
    int ret = populated_memory_next(&memory, populated);

    if (ret == 0) {
        populated->start -= address;
        populated->end -= address;
    }
    return ret;
}

/* Clear what is in the page tables; the rest reads as zero. */
static void zero_private_hole(RAMBlock *rb, SparseRange todo)
{
    while (!sparse_range_is_empty(&todo)) {
        SparseRange populated, hole = todo;

        if (ram_next_populated_private(rb, &todo, &populated) < 0) {
            /* No /proc, for example: so read it */
            zero_clear(rb, &todo);
            return;
        }
        hole.end = populated.start;
        trace_zero(rb, &hole, ACTION_HOLE);
        zero_clear(rb, &populated);
        todo.start = populated.end;
    }
}

/* What is not in the page tables reads as the file does. */
static void zero_private_tmpfs(RAMBlock *rb, SparseRange todo)
{
    while (!sparse_range_is_empty(&todo)) {
        SparseRange extent = todo;
        int ret = sparse_file_next_extent(rb->fd, &todo, &extent.end);

        if (ret < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
            zero_clear(rb, &todo);
            return;
        }
        if (ret) {
            zero_clear(rb, &extent);
        } else {
            zero_private_hole(rb, extent);
        }
        todo.start = extent.end;
    }
}

/*
 * Reading a huge page that is not there allocates it, and there may be none
 * left.  populated_memory_next() does not know huge pages.
 */
static void zero_private_hugetlb(RAMBlock *rb, SparseRange todo)
{
    bool file_is_empty = sparse_file_allocated(rb->fd) == 0;

    while (!sparse_range_is_empty(&todo)) {
        ram_addr_t offset = todo.start - rb->fd_offset;
        ram_addr_t huge = QEMU_ALIGN_DOWN(offset, rb->page_size);
        SparseRange part = {
            .start = todo.start,
            .end = MIN(todo.end, rb->fd_offset + huge + rb->page_size),
        };

        if (!ram_huge_page_is_mapped(rb, huge) &&
            (file_is_empty || sparse_file_is_zero(rb->fd, &part) > 0)) {
            trace_zero(rb, &part, ACTION_HOLE);
        } else {
            zero_clear(rb, &part);
        }
        todo.start = part.end;
    }
}

static void zero_private(RAMBlock *rb, const SparseRange *range)
{
    if (rb->holes->private_memory == RAM_PRIVATE_TMPFS) {
        zero_private_tmpfs(rb, *range);
    } else if (rb->holes->private_memory == RAM_PRIVATE_HUGETLB) {
        zero_private_hugetlb(rb, *range);
    } else if (sparse_range_length(range) <
               PRIVATE_ASK_MIN * qemu_target_page_size()) {
        zero_clear(rb, range);
    } else {
        zero_private_hole(rb, *range);
    }
}

/* The most bytes of a file that are read at once */
#define FILE_READ_MAX (64 * KiB)

/*
 * Reading a file does not fill the page tables, and what is in the page cache
 * can be dropped.
 */
static void zero_other_file(RAMBlock *rb, SparseRange todo)
{
    while (!sparse_range_is_empty(&todo)) {
        SparseRange part = {
            .start = todo.start,
            .end = MIN(todo.end, todo.start + FILE_READ_MAX),
        };

        if (sparse_file_is_zero(rb->fd, &part) > 0) {
            trace_zero(rb, &part, ACTION_HOLE);
        } else {
            zero_clear(rb, &part);
        }
        todo.start = part.end;
    }
}

/* A vhost-user backend has page faults of its own, that QEMU has to answer */
static bool faults_are_shared(void)
{
    const MigrationIncomingState *mis = migration_incoming_get_current();

    return mis->postcopy_remote_fds && mis->postcopy_remote_fds->len;
}

bool ram_block_may_leave_holes(const RAMBlock *rb)
{
    if (!migrate_postcopy_ram()) {
        return ram_block_holes_known(rb) ||
               ram_block_is_shared_anonymous(rb) ||
               ram_block_is_private_known(rb) ||
               (rb->holes && rb->holes->other_file);
    }
    /*
     * Until postcopy ends, an access to a hole waits until somebody places the
     * page, and nobody does if the holes are not known.  Backends ask for pages
     * even after the thread that answers them has ended.  And postcopy has
     * punched all memory, even what the user asked to be there.  RDMA does not
     * mark what it has received, so the source would be asked for it, in vain.
     */
    return ram_block_holes_known(rb) && !rb->holes->keep_populated &&
           !faults_are_shared() && !migrate_rdma();
}

void ram_handle_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    SparseRange range = {
        .start = rb->fd_offset + offset,
        .end = rb->fd_offset + offset + length,
    };

    if (!ram_block_may_leave_holes(rb)) {
        zero_clear(rb, &range);
    } else if (ram_block_holes_known(rb)) {
        if (rb->holes->type == QEMU_FS_TYPE_HUGETLBFS) {
            zero_hugetlb(rb, range);
        } else {
            zero_shmem(rb, range);
        }
    } else if (ram_block_is_private_known(rb)) {
        zero_private(rb, &range);
    } else if (rb->holes->other_file) {
        zero_other_file(rb, range);
    } else if (ram_block_may_punch(rb)) {
        zero_shared_anonymous(rb, &range);
    } else {
        zero_clear(rb, &range);
    }
}

/* A block was begun, of which this is what has to be known for each page. */
static void ram_zero_run_start(RAMZeroRun *run, RAMBlock *rb)
{
    run->rb = rb;
    run->max = 0;
    if (ram_block_may_leave_holes(rb)) {
        run->max = ram_block_is_private_known(rb) || rb->holes->other_file
                   ? PRIVATE_RUN_MAX : UINT64_MAX;
    }
}

void ram_zero_run_add(RAMZeroRun *run, RAMBlock *rb, ram_addr_t offset,
                      uint64_t length)
{
    if (rb != run->rb) {
        ram_zero_run_flush(run);
        ram_zero_run_start(run, rb);
    }
    if (!run->max) {
        ram_handle_zero(rb, offset, length);
        return;
    }
    if (!sparse_range_gather(&run->range, offset, length)) {
        ram_zero_run_flush(run);
        run->range = (SparseRange) { .start = offset, .end = offset + length };
    }
    if (sparse_range_length(&run->range) >= run->max) {
        ram_zero_run_flush(run);
    }
}

void ram_zero_run_flush(RAMZeroRun *run)
{
    if (!sparse_range_is_empty(&run->range)) {
        ram_handle_zero(run->rb, run->range.start,
                        sparse_range_length(&run->range));
        run->range = (SparseRange) { };
    }
}
