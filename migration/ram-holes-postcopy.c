/*
 * Holes in guest RAM: zero pages while postcopy is active
 *
 * Placing a zero page with userfaultfd allocates it if the memory is shared.
 * So a zero page that nobody waits for is only marked as received.  A fault on
 * it, should there ever be one, is answered without asking the source; and once
 * userfaultfd is unregistered, it is nothing but a hole.
 *
 * Who asks for a page (migrate_send_rp_req_pages()) and who receives one agree
 * under page_request_mutex: either the fault is in page_requested before the
 * page arrives, and the page is placed, or it finds the page to be received.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/error-report.h"
#ifdef CONFIG_LINUX
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "qemu/userfaultfd.h"
#endif
#include "system/memory.h"
#include "migration.h"
#include "postcopy-ram.h"
#include "ram.h"
#include "ram-holes.h"
#include "trace.h"

/* How many pages are looked at in one go, so that no question takes long */
#define ARRIVED_MAX 32768

/*
 * While userfaultfd is registered, a page that has not arrived looks like a
 * hole, although the source may have data for it; reading it waits for it.
 * Before that, a page that was discarded reads as zero, and reading it would
 * put a page there that postcopy cannot replace.  After that, all pages have
 * arrived.
 *
 * A page is marked when it has been placed, or when a zero page has been left a
 * hole.  So the mark has to be looked at before the file: a page that is marked
 * is what the file says, while one that arrives in between is called data.
 */
bool postcopy_has_arrived(const RAMBlock *rb, uint64_t offset,
                          uint64_t length, uint64_t *extent)
{
    PostcopyState state = postcopy_state_get();
    const unsigned long *received = qatomic_rcu_read(&rb->receivedmap);
    unsigned long page = offset >> qemu_target_page_bits();
    unsigned long last = MIN(DIV_ROUND_UP(offset + length,
                                          qemu_target_page_size()),
                             page + ARRIVED_MAX);
    unsigned long next;
    bool arrived;

    *extent = length;
    if ((state != POSTCOPY_INCOMING_LISTENING &&
         state != POSTCOPY_INCOMING_RUNNING) || !received) {
        return true;
    }
    arrived = test_bit(page, received);
    next = arrived ? find_next_zero_bit(received, last, page)
                   : find_next_bit(received, last, page);
    *extent = MIN(length,
                  ((uint64_t)next << qemu_target_page_bits()) - offset);
    /* Pairs with the atomic operations of ramblock_recv_bitmap_set_range() */
    smp_rmb();
    return arrived;
}

/*
 * Ask before it is left alone.  Memory was punched when postcopy was announced,
 * so that a page that has not been received should be a hole.  If it is not, to
 * place it fails, and that is better than to go on with what somebody else has
 * written.
 *
 * Returns how much of the range is a hole, from its start.
 */
static uint64_t hole_length(RAMBlock *rb, ram_addr_t offset, uint64_t length)
{
    uint64_t done = 0, extent;

    /* For other readers, the page has not arrived yet */
    while (done < length &&
           ram_block_extent_raw(rb, offset + done, length - done,
                                &extent) == 0) {
        done += extent;
    }
    return QEMU_ALIGN_DOWN(done, qemu_ram_pagesize(rb));
}

static int place_zero(MigrationIncomingState *mis, RAMBlock *rb,
                      ram_addr_t offset, uint64_t length)
{
    size_t page_size = qemu_ram_pagesize(rb);

    for (uint64_t done = 0; done < length; done += page_size) {
        int ret = postcopy_place_page_zero(mis, rb->host + offset + done, rb);

        if (ret) {
            return ret;
        }
    }
    return 0;
}

/* A part of a block that has arrived as zero */
typedef struct ZeroArrival {
    RAMBlock *rb;
    /* Start of what has not been looked at yet, and the end */
    char *next;
    char *end;
    /* Host pages that somebody waits for */
    GPtrArray *requested;
} ZeroArrival;

static void mark_received_until(ZeroArrival *zero, char *end)
{
    if (end > zero->next) {
        ramblock_recv_bitmap_set_range(zero->rb, zero->next,
                                       (end - zero->next) /
                                       qemu_target_page_size());
    }
}

/* Called in the order of addresses */
static gboolean skip_requested(gpointer key, gpointer value, gpointer opaque)
{
    ZeroArrival *zero = opaque;
    char *host = key;

    if (host >= zero->end) {
        return true;
    }
    if (host >= zero->next) {
        mark_received_until(zero, host);
        g_ptr_array_add(zero->requested, host);
        zero->next = host + qemu_ram_pagesize(zero->rb);
    }
    return false;
}

/* Place what somebody waits for, and mark the rest as received. */
static int leave_holes(MigrationIncomingState *mis, RAMBlock *rb,
                       ram_addr_t offset, uint64_t length)
{
    g_autoptr(GPtrArray) requested = g_ptr_array_new();
    char *host = (char *)rb->host + offset;
    ZeroArrival zero = {
        .rb = rb,
        .next = host,
        .end = host + length,
        .requested = requested,
    };

    WITH_QEMU_LOCK_GUARD(&mis->page_request_mutex) {
        g_tree_foreach(mis->page_requested, skip_requested, &zero);
        mark_received_until(&zero, zero.end);
    }
    trace_ram_handle_zero_postcopy(rb->idstr, offset, length, requested->len);

    /* They are not marked yet, so that nobody else places them meanwhile */
    for (guint i = 0; i < requested->len; i++) {
        int ret = postcopy_place_page_zero(mis, g_ptr_array_index(requested, i),
                                           rb);

        if (ret) {
            return ret;
        }
    }
    return 0;
}

int ram_handle_zero_postcopy(MigrationIncomingState *mis, RAMBlock *rb,
                             ram_addr_t offset, uint64_t length)
{
    if (!ram_block_may_leave_holes(rb)) {
        return place_zero(mis, rb, offset, length);
    }
    while (length) {
        uint64_t done = hole_length(rb, offset, length);
        int ret;

        if (done) {
            ret = leave_holes(mis, rb, offset, done);
        } else {
            done = qemu_ram_pagesize(rb);
            ret = place_zero(mis, rb, offset, done);
        }
        if (ret) {
            return ret;
        }
        offset += done;
        length -= done;
    }
    return 0;
}

#ifdef CONFIG_LINUX
int ram_handle_zero_fault(MigrationIncomingState *mis, RAMBlock *rb,
                          ram_addr_t offset)
{
    size_t page_size = qemu_ram_pagesize(rb);
    void *host = rb->host + offset;
    struct uffdio_copy copy = {
        .dst = (uintptr_t)host,
        .src = (uintptr_t)mis->postcopy_tmp_zero_page,
        .len = page_size,
    };
    int ret;

    /* Even if nothing is known any more, because the kernel has refused */
    if (!ram_block_holes_known(rb)) {
        return 0;
    }
    do {
        ret = ioctl(mis->userfault_fd, UFFDIO_COPY, &copy) ? -errno : 0;
    } while (ret == -EAGAIN);

    if (ret == -EEXIST) {
        /* It has been placed since the fault, maybe not by this process */
        uffd_wakeup(mis->userfault_fd, host, page_size);
    } else if (ret) {
        error_report_once("RAM block '%s': cannot allocate the zero page at 0x"
                          RAM_ADDR_FMT ", which is being accessed: %s",
                          rb->idstr, offset, strerror(-ret));
        return ret;
    }
    trace_ram_handle_zero_fault(rb->idstr, offset, !ret);
    return !ret;
}

/*
 * A huge page that is punched gives up its reservation, and if it is left as a
 * hole, the pool may be empty when it is accessed one day.  A mapping reserves
 * what is not reserved, and it stays so for the file when the mapping is gone.
 */
static int reserve_huge_pages(const RAMBlock *rb)
{
    void *p = mmap(NULL, rb->postcopy_length, PROT_READ, MAP_SHARED, rb->fd,
                   rb->fd_offset);

    if (p == MAP_FAILED) {
        return -errno;
    }
    munmap(p, rb->postcopy_length);
    return 0;
}

void ram_block_holes_prepare_postcopy(RAMBlock *rb)
{
    int ret;

    if (ram_block_holes_kind(rb) != RAM_HOLES_HUGETLB ||
        (rb->flags & RAM_NORESERVE)) {
        return;
    }
    ret = reserve_huge_pages(rb);
    if (ret < 0) {
        warn_report("RAM block '%s': cannot reserve huge pages: %s; zero pages "
                    "are allocated instead", rb->idstr, strerror(-ret));
        rb->holes->keep_populated = true;
    }
}
#endif
