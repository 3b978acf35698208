/*
 * Holes in guest RAM: the policy, and zero pages on the destination
 *
 * What arrives as zero is left alone where the kernel says that there is a
 * hole.  That it arrives for the first time proves nothing: the backend may be
 * a file with data of an earlier guest in it.
 *
 * This is the one place that knows which blocks may be punched.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#ifdef CONFIG_LINUX
#include <linux/magic.h>
#include <sys/vfs.h>
#endif
#include "exec/target_page.h"
#include "hw/virtio/vhost.h"
#include "migration/misc.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/atomic.h"
#include "qemu/cutils.h"
#include "qemu/madvise.h"
#include "qemu/populated-memory.h"
#include "qemu/units.h"
#include "system/hostmem.h"
#include "system/memory.h"
#include "system/runstate.h"
#include "system/system.h"
#include "migration.h"
#include "options.h"
#include "ram.h"
#include "ram-holes.h"
#include "trace.h"

/*
 * Asking about fewer target pages than this takes longer than reading them
 * may: a system call takes as long as a page fault or a few.
 */
#define PRIVATE_ASK_MIN 32

/*
 * The most bytes that are gathered of private memory, and of files that are
 * read.  That takes some hundred microseconds; the source may have to wait.
 */
#define PRIVATE_RUN_MAX (2 * MiB)

/* The most bytes of a file that are read at once */
#define FILE_READ_MAX (64 * KiB)

#define ACTION_HOLE     "hole"
#define ACTION_PUNCHED  "punched"
#define ACTION_CLEARED  "cleared"

static Object *ram_block_backend(const RAMBlock *rb)
{
    Object *owner = rb->mr ? memory_region_owner(rb->mr) : NULL;

    return owner ? object_dynamic_cast(owner, TYPE_MEMORY_BACKEND) : NULL;
}

/*
 * Whether the user wants the memory of @rb to be allocated at all times.
 * RAM_PREALLOC does not tell: it means that the caller supplied the pointer.
 */
static bool ram_block_keep_populated(const RAMBlock *rb)
{
    Object *backend = ram_block_backend(rb);
    RamDiscardManager *rdm =
        rb->mr ? memory_region_get_ram_discard_manager(rb->mr) : NULL;

    return (backend && MEMORY_BACKEND(backend)->prealloc) ||
           (rdm && ram_discard_manager_keeps_populated(rdm)) ||
           (should_mlock(mlock_state) && !is_mlock_on_fault(mlock_state));
}

/* Whether QEMU itself created the memory, and nobody else has a name for it */
static bool ram_block_is_own(const RAMBlock *rb)
{
    static const char *const types[] = {
        TYPE_MEMORY_BACKEND_MEMFD, TYPE_MEMORY_BACKEND_RAM,
        /* hostmem-shm.c */
        "memory-backend-shm",
    };
    Object *backend = ram_block_backend(rb);

    for (int i = 0; backend && i < ARRAY_SIZE(types); i++) {
        if (object_dynamic_cast(backend, types[i])) {
            return true;
        }
    }
    return !(rb->flags & RAM_PREALLOC) && rb->fd < 0;
}

#ifdef CONFIG_LINUX
/*
 * Some file systems report no blocks for whatever is in a file, and others say
 * that all of it is data; ramfs is one of these, but counts its blocks.
 */
static bool file_is_empty(int fd)
{
    struct statfs fs;

    if (!sparse_file_is_regular(fd) || sparse_file_allocated(fd) != 0 ||
        RETRY_ON_EINTR(fstatfs(fd, &fs)) < 0) {
        return false;
    }
    return fs.f_type == RAMFS_MAGIC ||
           (lseek(fd, 0, SEEK_DATA) < 0 && errno == ENXIO);
}

/* Whether the kernel tells what is populated, and so much is not */
static bool can_ask(const RAMBlock *rb)
{
    SparseRange first = {
        .start = (uintptr_t)rb->host,
        .end = (uintptr_t)rb->host + qemu_real_host_page_size(),
    };
    SparseRange populated;

    if (rb->holes->keep_populated) {
        return false;
    }
    switch (rb->holes->kind) {
    case RAM_HOLES_SHMEM:
    case RAM_HOLES_HUGETLB:
    case RAM_HOLES_PRIVATE_HUGETLB:
        return true;
    case RAM_HOLES_PRIVATE_ANONYMOUS:
    case RAM_HOLES_PRIVATE_SHMEM:
        return populated_memory_next(&first, &populated) == 0;
    default:
        return false;
    }
}

/*
 * Whether the machine does not write to guest RAM when it is reset before an
 * incoming migration.  pseries, for example, writes its device tree.
 */
static bool machine_leaves_ram_alone(void)
{
    return object_resolve_path_type("", "x86-machine", NULL);
}

/*
 * QEMU does not write to the memory of a backend before an incoming migration:
 * ROMs, for example, are not copied to it (rom_reset()).  Other memory, like
 * that of ROMs, has contents.
 */
static bool find_pristine(const RAMBlock *rb)
{
    return runstate_check(RUN_STATE_INMIGRATE) && !rb->holes->used &&
           migrate_ram_holes() && machine_leaves_ram_alone() &&
           !(rb->flags & RAM_PREALLOC) &&
           ram_block_backend(rb) && !can_ask(rb) &&
           (ram_block_is_own(rb) || file_is_empty(rb->fd));
}
#else
static bool find_pristine(const RAMBlock *rb)
{
    return false;
}
#endif

bool ram_block_is_pristine(const RAMBlock *rb)
{
    /*
     * RDMA does not mark what it has received, and if postcopy can follow, the
     * page has to be there.
     */
    return rb->holes && rb->holes->pristine && !migrate_rdma() &&
           !migrate_postcopy_ram();
}

void ram_holes_setup_block(RAMBlock *rb)
{
    RAMBlockHoles *holes;

    ram_block_holes_setup(rb);
    /*
     * What can have changed since an earlier migration.  The rest is never
     * written again, because other threads may be looking at it.
     */
    holes = rb->holes;
    holes->keep_populated = ram_block_keep_populated(rb);
    holes->disposable = ram_block_is_own(rb) ||
                        sparse_file_allocated(rb->fd) == 0;
    holes->pristine = find_pristine(rb);
    holes->used = true;
    holes->thp_size = holes->kind == RAM_HOLES_SHMEM
                      ? sparse_file_thp_size(rb->fd) : 0;
    qatomic_set(&holes->failed, 0);
}

void ram_holes_setup(void)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        ram_holes_setup_block(rb);
    }
}

/*
 * Whether another process may have been told of guest RAM and may have pinned
 * it for a device, as SPDK and DPDK do: it would go on with pages that are not
 * in the file any more.  A vhost-user backend gets the memory when the guest
 * starts its device, so it has none yet in incoming migration, but it has when
 * a snapshot is loaded.  Other kinds of vhost pass for it.
 */
static bool backends_know_memory(void)
{
    return !runstate_check(RUN_STATE_INMIGRATE) &&
           vhost_get_max_memslots() != UINT_MAX;
}

bool ram_block_may_punch(const RAMBlock *rb)
{
    const RAMBlockHoles *holes = rb->holes;

    if (!holes || holes->keep_populated || (rb->flags & RAM_READONLY_FD)) {
        return false;
    }
    /*
     * Not hugetlbfs: punching a whole huge page gives up its reservation, and
     * the next access could find the pool empty and get SIGBUS.
     */
    if (holes->kind != RAM_HOLES_SHMEM &&
        holes->kind != RAM_HOLES_SHARED_ANONYMOUS) {
        return false;
    }
    if (!holes->disposable || qatomic_read(&holes->failed) & RAM_HOLES_PUNCH) {
        return false;
    }
    if (rb->fd >= 0 && backends_know_memory()) {
        return false;
    }
    /* Memory that is pinned by a device or by RDMA has to stay where it is. */
    return !ram_block_discard_is_disabled() && !migrate_rdma();
}

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

static void trace_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length,
                       const char *action)
{
    trace_ram_handle_zero_range(rb->idstr, offset, length, action);
}

static void zero_clear(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    trace_zero(rb, offset, length, ACTION_CLEARED);
    ram_clear_memory(rb->host + offset, length);
}

/*
 * Pages that were reserved for the guest, but never written, are not in our page
 * tables.  Reading the file leaves them so.
 */
static void zero_reserved(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    uint64_t size;

    for (; length; offset += size, length -= size) {
        SparseRange in_file = { .start = rb->fd_offset + offset };

        size = MIN(length, FILE_READ_MAX);
        in_file.end = in_file.start + size;
        if (sparse_file_is_zero(rb->fd, &in_file) > 0) {
            trace_zero(rb, offset, size, ACTION_HOLE);
        } else {
            zero_clear(rb, offset, size);
        }
    }
}

static void zero_punch(RAMBlock *rb, const SparseRange *in_file)
{
    ram_addr_t offset = in_file->start - rb->fd_offset;
    uint64_t length = sparse_range_length(in_file);
    int ret;

    if (!length) {
        return;
    }
    ret = sparse_file_punch(rb->fd, in_file);
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_PUNCH, ret);
        zero_clear(rb, offset, length);
        return;
    }
    trace_zero(rb, offset, length, ACTION_PUNCHED);
}

/*
 * Zero data that is only a part of what may be a transparent huge page.  If
 * all around it is populated as well, it probably is one, and that is worth
 * more than the few pages that splitting it would free.
 */
static void zero_part_of_thp(RAMBlock *rb, const SparseRange *in_file)
{
    uint64_t thp_size = rb->holes->thp_size;
    ram_addr_t offset = in_file->start - rb->fd_offset;
    uint64_t length = sparse_range_length(in_file), end;
    SparseRange huge;
    int ret;

    if (!length) {
        return;
    }
    huge.start = QEMU_ALIGN_DOWN(in_file->start, thp_size);
    huge.end = huge.start + thp_size;
    ret = sparse_file_next_extent(rb->fd, &huge, &end);
    if (ret < 0) {
        ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
        zero_clear(rb, offset, length);
    } else if (ret && end == huge.end) {
        zero_clear(rb, offset, length);
    } else {
        zero_punch(rb, in_file);
    }
}

static void zero_shmem(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    SparseRange in_file = {
        .start = rb->fd_offset + offset,
        .end = rb->fd_offset + offset + length,
    };
    SparseRange head, body, tail;

    if (!rb->holes->thp_size) {
        zero_punch(rb, &in_file);
        return;
    }
    sparse_range_split(&in_file, rb->holes->thp_size, &head, &body, &tail);
    zero_part_of_thp(rb, &head);
    zero_punch(rb, &body);
    zero_part_of_thp(rb, &tail);
}

/*
 * Without a file nobody can tell where the holes are, but freeing what is a
 * hole already is cheap.  MADV_DONTNEED would only unmap the pages.
 */
static void zero_shared_anonymous(RAMBlock *rb, ram_addr_t offset,
                                  uint64_t length)
{
    SparseRange range = { .start = offset, .end = offset + length };
    SparseRange head, body, tail;

    sparse_range_split(&range, qemu_real_host_page_size(), &head, &body, &tail);
    if (!sparse_range_is_empty(&body)) {
        if (qemu_madvise(rb->host + body.start, sparse_range_length(&body),
                         QEMU_MADV_REMOVE) < 0) {
            ram_block_holes_failed(rb, RAM_HOLES_PUNCH, -errno);
            zero_clear(rb, offset, length);
            return;
        }
        trace_zero(rb, body.start, sparse_range_length(&body), ACTION_PUNCHED);
    }
    ram_clear_memory(rb->host + head.start, sparse_range_length(&head));
    ram_clear_memory(rb->host + tail.start, sparse_range_length(&tail));
}

/* Zero what is not a hole, as far as the kernel tells */
static void zero_data(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    switch (rb->holes->kind) {
    case RAM_HOLES_SHMEM:
        if (ram_block_may_punch(rb)) {
            zero_shmem(rb, offset, length);
        } else if (rb->holes->keep_populated) {
            zero_clear(rb, offset, length);
        } else {
            zero_reserved(rb, offset, length);
        }
        break;
    case RAM_HOLES_SHARED_ANONYMOUS:
        if (ram_block_may_punch(rb)) {
            zero_shared_anonymous(rb, offset, length);
            break;
        }
        /* fall through */
    default:
        zero_clear(rb, offset, length);
    }
}

bool ram_block_may_leave_holes(const RAMBlock *rb)
{
    if (!migrate_postcopy_ram()) {
        return ram_block_holes_kind(rb) != RAM_HOLES_UNKNOWN;
    }
    /*
     * Until postcopy ends, an access to a hole waits until somebody places the
     * page, and nobody does if the holes are not known.  And postcopy has
     * punched all memory, even what the user asked to be there.  RDMA does not
     * mark what it has received, so the source would be asked for it, in vain.
     */
    return ram_block_holes_known(rb) && !rb->holes->keep_populated &&
           !migrate_rdma();
}

void ram_handle_zero(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    RAMHolesKind kind = ram_block_holes_kind(rb);
    uint64_t extent;

    if (!ram_block_may_leave_holes(rb) ||
        (kind == RAM_HOLES_PRIVATE_ANONYMOUS &&
         length < PRIVATE_ASK_MIN * qemu_target_page_size())) {
        zero_clear(rb, offset, length);
        return;
    }
    for (; length; offset += extent, length -= extent) {
        int ret = ram_block_extent_raw(rb, offset, length, &extent);

        if (ret == 0) {
            trace_zero(rb, offset, extent, ACTION_HOLE);
        } else if (ret > 0) {
            zero_data(rb, offset, extent);
        } else {
            ram_block_holes_failed(rb, RAM_HOLES_FIND_TO_CLEAR, ret);
            zero_clear(rb, offset, extent);
        }
    }
}

/* Whether asking about a block means to read it, or to walk its page tables */
static bool asking_takes_long(const RAMBlock *rb)
{
    switch (rb->holes->kind) {
    case RAM_HOLES_OTHER_FILE:
    case RAM_HOLES_PRIVATE_ANONYMOUS:
    case RAM_HOLES_PRIVATE_SHMEM:
    case RAM_HOLES_PRIVATE_HUGETLB:
        return true;
    default:
        return false;
    }
}

/* A block was begun, of which this is what has to be known for each page. */
static void ram_zero_run_start(RAMZeroRun *run, RAMBlock *rb)
{
    run->rb = rb;
    run->max = 0;
    if (ram_block_may_leave_holes(rb)) {
        run->max = asking_takes_long(rb) ? PRIVATE_RUN_MAX : UINT64_MAX;
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
