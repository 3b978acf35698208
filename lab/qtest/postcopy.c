/*
 * QTest testcases for sparse guest RAM: faults while postcopy is active
 *
 * A zero page that nobody waits for is left a hole on the destination, whether
 * it arrived before or after the switch to postcopy.  Here the destination
 * accesses such pages, and pages that have not arrived yet, while the migration
 * is held up; also while its channel is broken, and after that has been
 * recovered.  An access that nobody answers would let the test time out.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bitmap.h"
#include "sparse-lab.h"

/*
 * What is in guest RAM, in this order: zero pages and some data, which are sent
 * at once; data, in which the rate limit stops the migration; and the same as
 * at first, which has not been sent yet when postcopy starts.
 */
#define EARLY_START (2 * MiB)
#define BARRIER_START (16 * MiB)
#define BARRIER_SIZE (8 * MiB)
#define LATE_SIZE (32 * MiB)

/* Bytes a second: a minute for the barrier */
#define SLOW_BANDWIDTH (128 * KiB)

/*
 * multifd fills its queue ten times a second, whatever the rate limit is.  So
 * there are so many bytes more in the barrier, for some seconds.
 */
#define MULTIFD_BARRIER (64 * MiB)

#define WRITTEN 0x5a

#define POSTCOPY(...) .transport = SPARSE_POSTCOPY, \
    .capabilities = { "postcopy-ram", __VA_ARGS__ }

static const SparseWay blocktime = {
    .name = "blocktime", POSTCOPY("postcopy-blocktime"),
};
static const SparseWay multifd_capability = {
    .name = "multifd-capability", POSTCOPY("multifd", "sparse-ram"),
};
static const SparseWay capability = {
    .name = "capability", POSTCOPY("sparse-ram"),
};
static const SparseWay capability_preempt = {
    .name = "capability-preempt", POSTCOPY("sparse-ram", "postcopy-preempt"),
};

/* A migration that is held up, and what was done to the destination then */
typedef struct PostcopyTest {
    SparseGuests *guests;
    /* Pages of the destination that were accessed, and those written to */
    unsigned long *accessed;
    unsigned long *written;
} PostcopyTest;

static uint64_t page_at(const SparseGuests *guests, uint64_t address)
{
    return address / guests->src.page_size;
}

/* The first page of a kind from @page on */
static uint64_t next_of_kind(const SparseGuests *guests, PageKind kind,
                             uint64_t page)
{
    while (guests->kinds[page] != kind) {
        g_assert_cmpuint(++page, <, guests->src.pages);
    }
    return page;
}

static bool is_hugetlb(const SparseGuests *guests)
{
    return guests->row->backend == &sparse_hugetlb;
}

/* The channel breaks meanwhile: migrate-recover is an out-of-band command */
static bool is_broken(const SparseGuests *guests)
{
    return guests->row->oob;
}

/* What the source has sent in postcopy is not to be found there any more */
static bool source_is_released(const SparseGuests *guests)
{
    return guests->way == &lab_postcopy_release;
}

static uint64_t barrier_size(const SparseGuests *guests)
{
    bool has_multifd = g_strcmp0(guests->way->capabilities[1], "multifd") == 0;

    return BARRIER_SIZE + (has_multifd ? MULTIFD_BARRIER : 0);
}

/* The end of what follows the barrier */
static uint64_t late_end(const SparseGuests *guests)
{
    return LATE_SIZE + BARRIER_START + barrier_size(guests);
}

static void shape(SparseGuests *guests)
{
    uint64_t barrier_start = page_at(guests, BARRIER_START);
    uint64_t barrier_end = page_at(guests,
                                   BARRIER_START + barrier_size(guests));
    uint64_t page;

    for (page = page_at(guests, EARLY_START);
         page < page_at(guests, late_end(guests)); page++) {
        if (page >= barrier_start && page < barrier_end) {
            guests->kinds[page] = PAGE_DATA;
        } else if (page % 8 == 3) {
            /* Little, for it would hold up the migration as well */
            guests->kinds[page] = page % 64 == 3 || is_hugetlb(guests)
                                  ? PAGE_DATA : PAGE_ZERO;
        }
    }
}

/* Migrate until the first pass is held up by the barrier, then switch */
static void start_postcopy(SparseGuests *guests)
{
    int64_t start = g_get_monotonic_time();
    uint64_t early_pages = BARRIER_START / qemu_real_host_page_size();

    migrate_set_parameter_int(guests->from, "max-bandwidth", SLOW_BANDWIDTH);
    migrate_set_parameter_int(guests->from, "max-postcopy-bandwidth",
                              SLOW_BANDWIDTH);
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
    while (read_ram_property_int(guests->from, "duplicate") +
           read_ram_property_int(guests->from, "normal") <= early_pages) {
        g_assert_cmpint(g_get_monotonic_time() - start, <, LAB_TIMEOUT);
        g_usleep(1000);
    }
    qtest_qmp_assert_success(guests->from,
                             "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_status(guests->from, "postcopy-active", NULL);
    wait_for_migration_status(guests->to, "postcopy-active", NULL);
}

/* Let it go on to its end */
static void complete(SparseGuests *guests)
{
    migrate_set_parameter_int(guests->from, "max-postcopy-bandwidth", 0);
    wait_for_migration_complete(guests->from);
    wait_for_migration_complete(guests->to);
}

/* What the page has to hold, in bytes 0 and 8 of it */
static void check_page(const SparseGuests *guests, uint64_t page)
{
    uint64_t address = page * guests->src.page_size;
    g_autofree uint64_t *expect = g_malloc(guests->src.page_size);

    guest_ram_read_page(&guests->src, page, expect);
    g_assert_cmphex(qtest_readq(guests->to, address), ==,
                    le64_to_cpu(expect[0]));
    g_assert_cmphex(qtest_readq(guests->to, address + 8), ==,
                    le64_to_cpu(expect[1]));
}

static void access_page(PostcopyTest *test, uint64_t page, bool write)
{
    SparseGuests *guests = test->guests;
    uint64_t address = page * guests->src.page_size;

    if (write) {
        qtest_writeb(guests->to, address, WRITTEN);
        set_bit(page, test->written);
    } else if (source_is_released(guests)) {
        qtest_readb(guests->to, address);
    } else {
        check_page(guests, page);
    }
    set_bit(page, test->accessed);
}

/* What the destination has said about the fault on this page */
static bool was_answered_here(SparseGuests *guests, uint64_t page)
{
    g_autofree char *line =
        g_strdup_printf("offset: 0x%" PRIx64 " placed: 1",
                        page * guests->src.page_size);
    g_autofree char *log = sparse_log(guests);

    return strstr(log, line);
}

/*
 * Access a zero page that has been received, and see that nobody is asked.
 *
 * Returns the page behind it.
 */
static uint64_t access_received(PostcopyTest *test, PageKind kind,
                                uint64_t from, bool write)
{
    uint64_t page = next_of_kind(test->guests, kind, from);

    g_assert_cmpuint(page, <, page_at(test->guests, BARRIER_START));
    access_page(test, page, write);
#ifdef CONFIG_TRACE_LOG
    /* The access goes on before the fault thread comes to say so */
    for (int i = 0; i < 1000 && !was_answered_here(test->guests, page); i++) {
        g_usleep(10000);
    }
    g_assert(was_answered_here(test->guests, page));
#endif
    return page + 1;
}

/*
 * The same for one that the source has to be asked for.  From the end, because
 * the source goes on from what it was asked for.
 *
 * Returns the page.
 */
static uint64_t access_late(PostcopyTest *test, PageKind kind, uint64_t before,
                            bool write)
{
    uint64_t page = lab_last_of_kind(test->guests, kind, before);

    access_page(test, page, write);
#ifdef CONFIG_TRACE_LOG
    g_assert(!was_answered_here(test->guests, page));
#endif
    return page;
}

/* Returns the page behind those that were accessed */
static uint64_t break_and_recover(PostcopyTest *test, uint64_t early)
{
    lab_pause_channel(test->guests);

    /* What has been received is there, even if the source is not */
    early = access_received(test, PAGE_HOLE, early, false);
    early = access_received(test, PAGE_HOLE, early, true);

    lab_recover_channel(test->guests);
    return early;
}

/*
 * All content is right, and nothing is allocated but data and what was
 * accessed.
 */
static void check_destination(const PostcopyTest *test)
{
    const SparseGuests *guests = test->guests;
    const GuestRam *ram = &guests->dst;
    g_autofree uint64_t *src = g_malloc(ram->page_size);
    g_autofree uint64_t *dst = g_malloc(ram->page_size);
    g_autofree unsigned long *expected = sparse_data_pages(guests->kinds,
                                                           ram->pages);
    uint64_t page, limit;

    for (page = 0; page < ram->pages; page++) {
        sparse_pattern_page(src, guests->kinds, page, ram->page_size);
        if (!source_is_released(guests)) {
            /* It may have been written by QEMU as well */
            guest_ram_read_page(&guests->src, page, src);
        }
        if (test_bit(page, test->written)) {
            *(uint8_t *)src = WRITTEN;
        }
        guest_ram_read_page(ram, page, dst);
        if (memcmp(src, dst, ram->page_size)) {
            g_error("page %" PRIu64 " of the destination differs", page);
        }
    }
    bitmap_or(expected, expected, test->accessed, ram->pages);
    guest_ram_extend_to_units(ram, expected);
    limit = bitmap_count_one(expected, ram->pages) * ram->page_size;
    g_test_message("%" PRIu64 " KiB are allocated, %" PRIu64 " KiB are data or "
                   "were accessed", guest_ram_allocated_bytes(ram) / KiB,
                   limit / KiB);
    g_assert_cmpuint(guest_ram_allocated_bytes(ram), <=, limit);
}

/* Accesses of each kind, on both sides of the barrier */
static void access_destination(SparseGuests *guests)
{
    g_autofree unsigned long *accessed = bitmap_new(guests->dst.pages);
    g_autofree unsigned long *written = bitmap_new(guests->dst.pages);
    PostcopyTest test = { guests, accessed, written };
    uint64_t early = page_at(guests, EARLY_START);
    uint64_t late = page_at(guests, late_end(guests));

    start_postcopy(guests);
    early = access_received(&test, PAGE_HOLE, early, false);
    early = access_received(&test, PAGE_HOLE, early, true);

    late = access_late(&test, PAGE_HOLE, late, false);
    late = access_late(&test, PAGE_HOLE, late, true);
    late = access_late(&test, PAGE_DATA, late, false);
    late = access_late(&test, PAGE_DATA, late, true);
    if (!is_hugetlb(guests)) {
        early = access_received(&test, PAGE_ZERO, early, true);
        access_late(&test, PAGE_ZERO, late, false);
    }
    if (is_broken(guests)) {
        early = break_and_recover(&test, early);
        access_received(&test, PAGE_HOLE, early, false);
    }
    complete(guests);
    check_destination(&test);
}

/* What had been received as zero before the barrier has been left alone */
static void check_early_holes(const SparseGuests *guests)
{
    const GuestRam *ram = &guests->dst;
    g_autofree unsigned long *allocated = guest_ram_allocated_pages(ram);
    uint64_t page = page_at(guests, EARLY_START);

    if (!allocated || guest_ram_allocation_unit(ram) != ram->page_size) {
        return;
    }
    for (; page < page_at(guests, BARRIER_START); page++) {
        if (guests->kinds[page] != PAGE_DATA && test_bit(page, allocated)) {
            g_error("page %" PRIu64 " has been allocated by reading", page);
        }
    }
}

/*
 * Readers of the destination's RAM other than migration: a page that has not
 * arrived yet looks like a hole, but must not be taken for zero.
 *
 * The source does not send the barrier before the dump has come to it, as long
 * as nothing else holds up the dump.
 */
static void dump_destination(SparseGuests *guests)
{
    g_autofree char *protocol = g_strdup_printf("file:%s", guests->file);

    start_postcopy(guests);
    lab_wait_for_devices(guests->to);
    if (is_broken(guests)) {
        lab_pause_channel(guests);
    }
    qtest_qmp_assert_success(guests->to, "{ 'execute': 'dump-guest-memory',"
                             "'arguments': { 'paging': false, 'detach': true,"
                             "'protocol': %s, 'format': 'elf' } }", protocol);
    lab_wait_for_dump(guests->to, G_USEC_PER_SEC);
    if (is_broken(guests)) {
        lab_recover_channel(guests);
        lab_wait_for_dump(guests->to, G_USEC_PER_SEC);
    }
    migrate_set_parameter_int(guests->from, "max-postcopy-bandwidth", 0);
    g_assert(lab_wait_for_dump(guests->to, LAB_TIMEOUT));
    complete(guests);

    lab_check_elf_dump(&guests->src, guests->kinds, guests->file, 0, 0);
    check_early_holes(guests);
}

/* A page that arrives between two samples must not look like a written one */
static void measure_destination(SparseGuests *guests)
{
    start_postcopy(guests);
    lab_wait_for_devices(guests->to);
    qtest_qmp_assert_success(guests->to, "{ 'execute': 'calc-dirty-rate',"
                             "'arguments': { 'calc-time': 1,"
                             "'sample-pages': 16384 } }");
    g_usleep(100 * 1000);
    migrate_set_parameter_int(guests->from, "max-postcopy-bandwidth", 0);
    lab_wait_for_dirty_rate(guests->to);
    complete(guests);
}

#define HELD_UP \
    .patterns = { &sparse_empty }, .shape = shape, .log = true, \
    .dst_opts = "-trace ram_handle_zero_fault"
#define FAULTS HELD_UP, .act = access_destination
#define READERS HELD_UP, .act = dump_destination
/* See is_broken(); QEMU complains of that */
#define RECOVER .oob = true, .hide_stderr = true

static const SparseRow rows[] = {
    { .name = "postcopy/faults/plain", FAULTS, .ways = { &sparse_postcopy } },
    {
        .name = "postcopy/faults/%w", FAULTS,
        .ways = { &lab_postcopy_preempt, &blocktime, &lab_postcopy_multifd,
                  &lab_postcopy_multifd_preempt, &multifd_capability,
                  &capability, &capability_preempt },
    }, {
        .name = "postcopy/faults/%w", FAULTS,
        .ways = { &lab_postcopy_release }, .expect.src = SPARSE_RELEASED,
    }, {
        .name = "postcopy/faults/shm-file-offset", FAULTS,
        .backend = &lab_shm_file_offset, .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/faults/hugetlb", FAULTS,
        .backend = &sparse_hugetlb, .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/faults/hugetlb-%w", FAULTS,
        .backend = &sparse_hugetlb, .ways = { &capability },
    }, {
        .name = "postcopy/recover/plain", FAULTS, RECOVER,
        .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/recover/%w", FAULTS, RECOVER,
        .ways = { &lab_postcopy_preempt, &lab_postcopy_multifd, &capability },
    }, {
        .name = "postcopy/recover/hugetlb", FAULTS, RECOVER,
        .backend = &sparse_hugetlb, .ways = { &sparse_postcopy },
    },

    { .name = "postcopy/readers/plain", READERS, .ways = { &sparse_postcopy } },
    {
        .name = "postcopy/readers/%w", READERS,
        .ways = { &lab_postcopy_preempt, &capability },
    }, {
        .name = "postcopy/readers/shm-file-offset", READERS,
        .backend = &lab_shm_file_offset, .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/readers/hugetlb", READERS,
        .backend = &sparse_hugetlb, .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/readers/recover", READERS, RECOVER,
        .ways = { &sparse_postcopy },
    }, {
        .name = "postcopy/readers/dirty-rate", HELD_UP,
        .ways = { &sparse_postcopy }, .act = measure_destination,
    },
};

void lab_add_postcopy(void)
{
    sparse_add_rows(rows, ARRAY_SIZE(rows));
}
