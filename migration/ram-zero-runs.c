/*
 * Runs of zero pages: finding, sending and loading them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "qemu/bitops.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "options.h"
#include "postcopy-ram.h"
#include "ram.h"
#include "ram-zero-runs.h"
#include "trace.h"

/*
 * The most pages that are taken as one run.  With the capability sparse-ram, a
 * run is one record, and only its number of pages has to fit into an int.
 * Otherwise each page is a record, and ram_save_iterate() has to look at the
 * clock and at the rate limit.  That does not apply to huge pages, for which
 * ram_save_host_page() does it, and a look-up for few of them is expensive.
 */
#define ZERO_RUN_MAX_RECORD (1UL << 30)
#define ZERO_RUN_MAX_HUGE (1UL << 18)
#define ZERO_RUN_MAX (1UL << 12)

/*
 * The same in postcopy, where the guest may wait for a page behind the run: its
 * records take as long as a few pages of data, and the destination may have to
 * place the pages one by one.
 */
#define ZERO_RUN_MAX_POSTCOPY (1UL << 10)

/*
 * The most pages that are read to find out how long a run is: not more than
 * takes a fraction of a millisecond, because ram_save_iterate() does not look
 * at the clock and at the rate limit after each run.
 */
#define ZERO_RUN_SCAN_MAX 256

/* The target pages that make up a host page of @rb */
static unsigned long pages_per_host_page(RAMBlock *rb)
{
    return MAX(qemu_ram_pagesize(rb) >> qemu_target_page_bits(), 1);
}

/* The target page behind the longest run that can start at @page */
static unsigned long run_limit(RAMBlock *rb, unsigned long page)
{
    unsigned long chunk = rb->clear_bmap ? 1UL << rb->clear_bmap_shift : 1;
    unsigned long limit = QEMU_ALIGN_DOWN(page, chunk) + chunk;
    unsigned long host_page = pages_per_host_page(rb);
    unsigned long max = host_page > 1 ? ZERO_RUN_MAX_HUGE : ZERO_RUN_MAX;

    if (migration_in_postcopy()) {
        max = host_page > 1 ? host_page : ZERO_RUN_MAX_POSTCOPY;
    } else if (migrate_sparse_ram() || migrate_mapped_ram()) {
        max = ZERO_RUN_MAX_RECORD;
    }
    limit = MIN(limit, rb->used_length >> qemu_target_page_bits());
    return MIN(limit, page + max);
}

/* In postcopy, host pages are placed as a whole. */
static unsigned long whole_host_pages(RAMBlock *rb, unsigned long page,
                                      unsigned long npages)
{
    unsigned long host_page = pages_per_host_page(rb);

    if (!migration_in_postcopy()) {
        return npages;
    }
    return page % host_page ? 0 : QEMU_ALIGN_DOWN(npages, host_page);
}

unsigned long ram_find_hole_run(RAMBlock *rb, unsigned long page,
                                unsigned long limit, RAMKnownData *data)
{
    unsigned bits = qemu_target_page_bits();
    ram_addr_t offset = (ram_addr_t)page << bits;
    uint64_t length, hole, follows;

    if (!ram_block_reading_allocates(rb) || migrate_rdma() ||
        (data->rb == rb && data->range.start <= offset &&
         offset < data->range.end)) {
        return 0;
    }
    limit = MIN(limit, run_limit(rb, page));
    length = (ram_addr_t)(limit - page) << bits;
    if (ram_block_holes_kind(rb) == RAM_HOLES_SHMEM &&
        sparse_file_is_full(rb->fd)) {
        hole = 0;
        follows = length;
    } else {
        hole = ram_block_hole_length(rb, offset, length, &follows);
    }
    if (follows) {
        data->rb = rb;
        data->range.start = offset + hole;
        data->range.end = data->range.start + follows;
    }
    if (!(hole >> bits)) {
        return 0;
    }
    limit = find_next_zero_bit(rb->bmap, page + (hole >> bits), page + 1);
    return whole_host_pages(rb, page, limit - page);
}

unsigned long ram_find_zero_run(RAMBlock *rb, unsigned long page,
                                unsigned long limit)
{
    size_t page_size = qemu_target_page_size();
    unsigned long next = page + 1;

    limit = MIN(MIN(limit, run_limit(rb, page)), page + ZERO_RUN_SCAN_MAX);
    while (next < limit && test_bit(next, rb->bmap) &&
           buffer_is_zero(rb->host + next * page_size, page_size)) {
        next++;
    }
    return next - page;
}

/* A record that follows one about the page in front of it, or any in its block */
typedef struct QEMU_PACKED ZeroPageRecord {
    uint64_t header;
    uint8_t value;
} ZeroPageRecord;

#define ZERO_PAGE_FLAGS (RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE)

size_t ram_put_zero_pages(QEMUFile *f, ram_addr_t offset, unsigned long npages)
{
    ZeroPageRecord records[256];

    qemu_put_byte(f, RAM_SAVE_ZERO_PAGE);
    for (unsigned long rest = npages - 1; rest; ) {
        unsigned long count = MIN(rest, ARRAY_SIZE(records));

        for (unsigned long i = 0; i < count; i++) {
            offset += qemu_target_page_size();
            stq_be_p(&records[i].header, offset | ZERO_PAGE_FLAGS);
            records[i].value = RAM_SAVE_ZERO_PAGE;
        }
        qemu_put_buffer(f, (uint8_t *)records, count * sizeof(records[0]));
        rest -= count;
        /* A page that is waited for may be sent by another thread */
        if (npages - rest > ZERO_RUN_MAX && !migration_in_postcopy()) {
            migration_rate_limit();
        }
    }
    return 1 + (npages - 1) * sizeof(ZeroPageRecord);
}

size_t ram_put_zero_run(QEMUFile *f, unsigned long npages)
{
    qemu_put_byte(f, RAM_SAVE_ZERO_RUN);
    qemu_put_be64(f, npages);
    return 1 + 8;
}

/**
 * read_zero_run: read and check what follows RAM_SAVE_ZERO_RUN
 *
 * Returns 0 for success or -errno in case of error.
 *
 * @f: QEMUFile where the data comes from
 * @rb: the block
 * @offset: offset in the block of the first page, in bytes
 * @length: length of the block, in bytes
 * @npages: set to the number of target pages in the run
 */
static int read_zero_run(QEMUFile *f, RAMBlock *rb, ram_addr_t offset,
                         ram_addr_t length, uint64_t *npages)
{
    uint64_t max = (length - offset) >> qemu_target_page_bits();
    int ret;

    *npages = qemu_get_be64(f);
    ret = qemu_file_get_error(f);
    if (ret) {
        error_report("Reading a run of zero pages of RAM block '%s' failed",
                     rb->idstr);
        return ret;
    }
    if (!*npages || *npages > max) {
        error_report("RAM block '%s': a run of %" PRIu64 " zero pages at offset"
                     " 0x" RAM_ADDR_FMT " is not between 1 and %" PRIu64,
                     rb->idstr, *npages, offset, max);
        return -EINVAL;
    }
    return 0;
}

int ram_load_zero_run_postcopy(QEMUFile *f, PostcopyTmpPage *tmp_page,
                               RAMBlock *rb, ram_addr_t offset)
{
    bool starts_host_page = tmp_page->target_pages == 1;
    uint64_t npages, length;
    int ret = read_zero_run(f, rb, offset, rb->postcopy_length, &npages);

    postcopy_temp_page_reset(tmp_page);
    if (ret) {
        return ret;
    }
    length = npages << qemu_target_page_bits();
    if (!starts_host_page || !QEMU_IS_ALIGNED(offset, rb->page_size) ||
        !QEMU_IS_ALIGNED(length, rb->page_size)) {
        error_report("RAM block '%s': a run of %" PRIu64 " zero pages at offset"
                     " 0x" RAM_ADDR_FMT " is not made of whole host pages of "
                     "%zu bytes", rb->idstr, npages, offset, rb->page_size);
        return -EINVAL;
    }
    return ram_handle_zero_postcopy(migration_incoming_get_current(), rb,
                                    offset, length);
}

/**
 * count_zero_pages: count zero pages whose records follow each other
 *
 * Looks at those records only that are buffered already, and ends in front of
 * the first one that is not what comes next in the block.
 *
 * Returns the number of records, each of sizeof(ZeroPageRecord) bytes
 *
 * @f: QEMUFile where the data comes from
 * @offset: offset in the block of the page to start with, in bytes
 * @max: how many records to look at, at most
 */
static uint64_t count_zero_pages(QEMUFile *f, ram_addr_t offset, uint64_t max)
{
    size_t page_size = qemu_target_page_size();
    const ZeroPageRecord *record;
    const uint8_t *buf;
    size_t buffered = qemu_file_buffered(f, &buf) / sizeof(*record);
    uint64_t count = 0;

    record = (const ZeroPageRecord *)buf;
    max = MIN(max, buffered);
    while (count < max && record->value == RAM_SAVE_ZERO_PAGE &&
           ldq_be_p(&record->header) == (offset | ZERO_PAGE_FLAGS)) {
        offset += page_size;
        record++;
        count++;
    }
    return count;
}

int ram_load_zero_pages_postcopy(QEMUFile *f, PostcopyTmpPage *tmp_page,
                                 RAMBlock *rb, ram_addr_t offset)
{
    uint64_t per_host_page = rb->page_size / qemu_target_page_size();
    ram_addr_t next = offset + qemu_target_page_size();
    uint64_t count;
    int ret;

    if (tmp_page->target_pages != 1 || !per_host_page ||
        !QEMU_IS_ALIGNED(offset, rb->page_size)) {
        return 0;
    }
    count = count_zero_pages(f, next, (rb->postcopy_length - next) >>
                                      qemu_target_page_bits());
    count = QEMU_ALIGN_DOWN(count + 1, per_host_page);
    if (!count) {
        return 0;
    }
    trace_ram_load_zero_pages(rb->idstr, offset, count);
    qemu_file_skip(f, (count - 1) * sizeof(ZeroPageRecord));
    postcopy_temp_page_reset(tmp_page);
    ret = ram_handle_zero_postcopy(migration_incoming_get_current(), rb, offset,
                                   count << qemu_target_page_bits());
    return ret ? ret : 1;
}

int ram_load_zero_run(QEMUFile *f, RAMZeroRun *zero_run, RAMBlock *rb,
                      ram_addr_t offset)
{
    uint64_t npages;
    int ret = read_zero_run(f, rb, offset, rb->used_length, &npages);

    if (ret) {
        return ret;
    }
    while (npages) {
        uint64_t now = MIN(npages, RAM_LOAD_YIELD_RECORDS);

        ram_zero_run_add(zero_run, rb, offset, now << qemu_target_page_bits());
        ramblock_recv_bitmap_set_range(rb, rb->host + offset, now);
        offset += now << qemu_target_page_bits();
        npages -= now;
        if (npages) {
            ram_zero_run_flush(zero_run);
            ram_load_yield();
        }
    }
    return 0;
}

int ram_load_zero_pages(QEMUFile *f, RAMZeroRun *zero_run, RAMBlock *rb,
                        ram_addr_t offset, int max)
{
    uint64_t in_block = (rb->used_length - offset) >> qemu_target_page_bits();
    uint64_t count = count_zero_pages(f, offset, MIN(max, in_block));

    if (count) {
        trace_ram_load_zero_pages(rb->idstr, offset, count);
        qemu_file_skip(f, count * sizeof(ZeroPageRecord));
        ramblock_recv_bitmap_set_range(rb, rb->host + offset, count);
        ram_zero_run_add(zero_run, rb, offset,
                         count << qemu_target_page_bits());
    }
    return count;
}
