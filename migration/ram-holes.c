/*
 * Holes in guest RAM: the policy
 *
 * This is the one place that knows of which blocks the holes can be told, and
 * which blocks may be punched.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/memory.h"
#include "migration/misc.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/atomic.h"
#include "qemu/error-report.h"
#include "system/hostmem.h"
#include "system/system.h"
#include "options.h"
#include "ram.h"
#include "ram-holes.h"

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
    return should_mlock(mlock_state) && !is_mlock_on_fault(mlock_state);
}

void ram_block_holes_init(RAMBlockHoles *holes, const RAMBlock *rb)
{
    bool shared = rb->flags & RAM_SHARED;

    *holes = (RAMBlockHoles) {
        .type = SPARSE_FILE_UNKNOWN,
        .keep_populated = ram_block_keep_populated(rb),
    };

    /*
     * A private mapping has pages of its own, about which the file knows
     * nothing.
     */
    if (!migrate_ram_holes() || !shared) {
        return;
    }
    if (rb->fd < 0) {
#ifdef CONFIG_LINUX
        holes->shared_anonymous = !(rb->flags & RAM_PREALLOC);
#endif
        return;
    }
    holes->type = sparse_file_type(rb->fd);
    if (holes->type == SPARSE_FILE_SHMEM) {
        holes->thp_size = sparse_file_thp_size(rb->fd);
    }
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
        ram_block_holes_setup(rb);
        ram_block_holes_init(rb->holes, rb);
    }
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
    if (holes->type != SPARSE_FILE_SHMEM && !holes->shared_anonymous) {
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
