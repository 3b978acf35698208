/*
 * Holes in guest RAM: the policy
 *
 * This is the one place that knows of which blocks the holes can be told, and
 * which blocks may be punched.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#ifdef CONFIG_LINUX
#include <linux/magic.h>
#include <sys/vfs.h>
#endif
#include "hw/virtio/vhost.h"
#include "hw/virtio/virtio-mem.h"
#include "migration/misc.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/atomic.h"
#include "qemu/error-report.h"
#include "system/hostmem.h"
#include "system/memory.h"
#include "system/runstate.h"
#include "system/system.h"
#include "options.h"
#include "ram.h"
#include "ram-holes.h"

static Object *ram_block_backend(const RAMBlock *rb)
{
    Object *owner = rb->mr ? memory_region_owner(rb->mr) : NULL;

    return owner ? object_dynamic_cast(owner, TYPE_MEMORY_BACKEND) : NULL;
}

/*
 * virtio-mem decides what is populated, and has a prealloc=on of its own.  Of
 * another RamDiscardManager nothing is known.
 */
static bool discard_manager_keeps_populated(const RAMBlock *rb)
{
    RamDiscardManager *rdm =
        rb->mr ? memory_region_get_ram_discard_manager(rb->mr) : NULL;
    Object *vmem = rdm ? object_dynamic_cast(OBJECT(rdm), TYPE_VIRTIO_MEM)
                       : NULL;

    return vmem ? VIRTIO_MEM(vmem)->prealloc : rdm != NULL;
}

/*
 * Whether the user wants the memory of @rb to be allocated at all times.
 * RAM_PREALLOC does not tell: it means that the caller supplied the pointer.
 */
static bool ram_block_keep_populated(const RAMBlock *rb)
{
    Object *backend = ram_block_backend(rb);

    if (backend && MEMORY_BACKEND(backend)->prealloc) {
        return true;
    }
    if (discard_manager_keeps_populated(rb)) {
        return true;
    }
    return should_mlock(mlock_state) && !is_mlock_on_fault(mlock_state);
}

/* Which kind of sparse file is behind @rb, if any */
static QemuFsType ram_block_fs(const RAMBlock *rb)
{
    return sparse_file_is_regular(rb->fd) ? qemu_fd_getfs(rb->fd)
                                          : QEMU_FS_TYPE_UNKNOWN;
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
 * RAM_PREALLOC means that the caller supplied the pointer, which may map
 * anything.
 */
static RAMPrivateMemory find_private_memory(const RAMBlock *rb)
{
    if (rb->flags & RAM_PREALLOC) {
        return RAM_PRIVATE_UNKNOWN;
    }
    if (rb->fd < 0) {
        return RAM_PRIVATE_ANONYMOUS;
    }
    switch (ram_block_fs(rb)) {
    case QEMU_FS_TYPE_TMPFS:
        return RAM_PRIVATE_TMPFS;
    case QEMU_FS_TYPE_HUGETLBFS:
        return RAM_PRIVATE_HUGETLB;
    default:
        return RAM_PRIVATE_UNKNOWN;
    }
}
#endif

void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb)
{
    *holes = (RAMBlockHoles) {
        .type = QEMU_FS_TYPE_UNKNOWN,
        .keep_populated = ram_block_keep_populated(rb),
        .disposable = ram_block_is_own(rb) ||
                      sparse_file_allocated(rb->fd) == 0,
    };

    if (!migrate_ram_holes()) {
        return;
    }
#ifdef CONFIG_LINUX
    /*
     * A private mapping has pages of its own, about which the file knows
     * nothing.
     */
    if (!(rb->flags & RAM_SHARED)) {
        holes->private_memory = find_private_memory(rb);
        return;
    }
    if (rb->fd < 0) {
        /* MADV_REMOVE refuses locked memory, even if locked on fault only */
        holes->shared_anonymous = !(rb->flags & RAM_PREALLOC) &&
                                  !should_mlock(mlock_state);
        return;
    }
    holes->type = ram_block_fs(rb);
    holes->other_file = holes->type == QEMU_FS_TYPE_UNKNOWN &&
                        sparse_file_is_regular(rb->fd);
    if (holes->type == QEMU_FS_TYPE_TMPFS) {
        holes->thp_size = sparse_file_thp_size(rb->fd);
    }
#endif
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
    const SparseRange first = {
        .start = rb->fd_offset,
        .end = rb->fd_offset + qemu_real_host_page_size(),
    };
    SparseRange populated;

    if (rb->holes->keep_populated) {
        return false;
    }
    return ram_block_holes_known(rb) ||
           rb->holes->private_memory == RAM_PRIVATE_HUGETLB ||
           (ram_block_is_private_known(rb) &&
            ram_next_populated_private(rb, &first, &populated) == 0);
}

/*
 * QEMU does not write to the memory of a backend before an incoming migration:
 * ROMs, for example, are not copied to it (rom_reset()).  Other memory, like
 * that of ROMs, has contents.
 */
static bool find_pristine(const RAMBlock *rb)
{
    return runstate_check(RUN_STATE_INMIGRATE) && !rb->holes->used &&
           migrate_ram_holes() && !(rb->flags & RAM_PREALLOC) &&
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

void ram_holes_setup(void)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        RAMBlockHoles now;

        ram_block_holes_setup(rb);
        ram_block_holes_init(&now, rb);
        /*
         * What can have changed since an earlier migration.  The rest is never
         * written again, because other threads may be looking at it.
         */
        rb->holes->keep_populated = now.keep_populated;
        rb->holes->disposable = now.disposable;
        rb->holes->pristine = find_pristine(rb);
        rb->holes->used = true;
        rb->holes->thp_size = now.thp_size;
        qatomic_set(&rb->holes->failed, 0);
    }
}

bool ram_huge_page_is_mapped(const RAMBlock *rb, ram_addr_t offset)
{
#ifdef CONFIG_LINUX
    unsigned char resident;

    /*
     * For hugetlbfs, mincore() looks at the page tables and no further (Linux,
     * mincore_hugetlb() in mm/mincore.c).
     */
    return mincore(rb->host + offset, qemu_real_host_page_size(),
                   &resident) == 0 && (resident & 1);
#else
    return true;
#endif
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
    if (holes->type != QEMU_FS_TYPE_TMPFS && !holes->shared_anonymous) {
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
