/*
 * Holes in guest RAM: the policy
 *
 * This is the one place that knows of which blocks the holes can be told, and
 * which blocks may be punched.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "hw/virtio/virtio-mem.h"
#include "migration/misc.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/atomic.h"
#include "qemu/error-report.h"
#include "system/hostmem.h"
#include "system/memory.h"
#include "system/system.h"
#include "options.h"
#include "ram.h"
#include "ram-holes.h"

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
    Object *owner = rb->mr ? memory_region_owner(rb->mr) : NULL;
    Object *backend = owner ? object_dynamic_cast(owner, TYPE_MEMORY_BACKEND)
                            : NULL;

    if (backend && MEMORY_BACKEND(backend)->prealloc) {
        return true;
    }
    if (discard_manager_keeps_populated(rb)) {
        return true;
    }
    return should_mlock(mlock_state) && !is_mlock_on_fault(mlock_state);
}

#ifdef CONFIG_LINUX
/*
 * Not hugetlbfs: see populated_memory_next().  And who supplies the pointer may
 * have mapped anything there.
 */
static RAMPrivateMemory find_private_memory(const RAMBlock *rb)
{
    if (rb->flags & RAM_PREALLOC) {
        return RAM_PRIVATE_UNKNOWN;
    }
    if (rb->fd < 0) {
        return RAM_PRIVATE_ANONYMOUS;
    }
    return qemu_fd_getfs(rb->fd) == QEMU_FS_TYPE_TMPFS ? RAM_PRIVATE_TMPFS
                                                       : RAM_PRIVATE_UNKNOWN;
}
#endif

void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb)
{
    *holes = (RAMBlockHoles) {
        .type = QEMU_FS_TYPE_UNKNOWN,
        .keep_populated = ram_block_keep_populated(rb),
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
    holes->type = qemu_fd_getfs(rb->fd);
    if (holes->type == QEMU_FS_TYPE_TMPFS) {
        holes->thp_size = sparse_file_thp_size(rb->fd);
    }
#endif
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
    if (qatomic_read(&holes->failed)) {
        return false;
    }
    /* Memory that is pinned by a device or by RDMA has to stay where it is. */
    return !ram_block_discard_is_disabled() && !migrate_rdma();
}

void ram_block_holes_failed(RAMBlock *rb, RAMHolesOperation operation,
                            int err)
{
    if (qatomic_fetch_or(&rb->holes->failed, operation)) {
        return;
    }
    warn_report("RAM block '%s': cannot %s holes: %s; zero pages are cleared "
                "in place instead", rb->idstr,
                operation == RAM_HOLES_FIND ? "find" : "punch",
                strerror(-err));
}
