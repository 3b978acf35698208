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
#include "qobject/qdict.h"
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

static const SparseWay preempt = {
    .name = "preempt", POSTCOPY("postcopy-preempt"),
};
static const SparseWay release = {
    .name = "release-ram", POSTCOPY("release-ram"),
};
static const SparseWay blocktime = {
    .name = "blocktime", POSTCOPY("postcopy-blocktime"),
};
static const SparseWay multifd = { .name = "multifd", POSTCOPY("multifd") };
static const SparseWay multifd_preempt = {
    .name = "multifd-preempt", POSTCOPY("multifd", "postcopy-preempt"),
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

typedef struct PostcopyCase {
    /* Path below /migration/sparse/postcopy */
    const char *name;
    const SparseWay *way;
    const SparseBackend *backend;
    /* The channel breaks while the destination runs */
    bool recover;
} PostcopyCase;

static const PostcopyCase postcopy_cases[] = {
    { "faults/plain", &sparse_postcopy },
    { "faults/preempt", &preempt },
    { "faults/release-ram", &release },
    { "faults/blocktime", &blocktime },
    { "faults/multifd", &multifd },
    { "faults/multifd-preempt", &multifd_preempt },
    { "faults/multifd-capability", &multifd_capability },
    { "faults/capability", &capability },
    { "faults/capability-preempt", &capability_preempt },
    { "faults/shm-file-offset", &sparse_postcopy, &lab_shm_file_offset },
    { "faults/hugetlb", &sparse_postcopy, &sparse_hugetlb },
    { "faults/hugetlb-capability", &capability, &sparse_hugetlb },
    { "recover/plain", &sparse_postcopy, .recover = true },
    { "recover/preempt", &preempt, .recover = true },
    { "recover/multifd", &multifd, .recover = true },
    { "recover/capability", &capability, .recover = true },
    { "recover/hugetlb", &sparse_postcopy, &sparse_hugetlb, .recover = true },
};

/*
 * Readers of the destination's RAM other than migration: a page that has not
 * arrived yet looks like a hole, but must not be taken for zero.
 */
static const PostcopyCase reader_cases[] = {
    { "readers/plain", &sparse_postcopy },
    { "readers/preempt", &preempt },
    { "readers/capability", &capability },
    { "readers/shm-file-offset", &sparse_postcopy, &lab_shm_file_offset },
    { "readers/hugetlb", &sparse_postcopy, &sparse_hugetlb },
    { "readers/recover", &sparse_postcopy, .recover = true },
};

typedef struct PostcopyTest {
    const PostcopyCase *c;
    SparseGuests guests;
    SparseRow row;
    /* Those of the guests */
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
    uint8_t *kinds;
    /* Pages of the destination that were accessed, and those written to */
    unsigned long *accessed;
    unsigned long *written;
} PostcopyTest;

static uint64_t page_at(const PostcopyTest *test, uint64_t address)
{
    return address / test->src.page_size;
}

/* The first page of a kind from @page on */
static uint64_t next_of_kind(const PostcopyTest *test, PageKind kind,
                             uint64_t page)
{
    while (test->kinds[page] != kind) {
        g_assert_cmpuint(++page, <, test->src.pages);
    }
    return page;
}

/* The last page of a kind before @page */
static uint64_t last_of_kind(const PostcopyTest *test, PageKind kind,
                             uint64_t page)
{
    do {
        g_assert_cmpuint(page, >, 0);
        page--;
    } while (test->kinds[page] != kind);
    return page;
}

/* What the source has sent in postcopy is not to be found there any more */
static bool source_is_released(const PostcopyTest *test)
{
    return test->c->way == &release;
}

static uint64_t barrier_size(const PostcopyTest *test)
{
    bool has_multifd = g_strcmp0(test->c->way->capabilities[1],
                                 "multifd") == 0;

    return BARRIER_SIZE + (has_multifd ? MULTIFD_BARRIER : 0);
}

/* The end of what follows the barrier */
static uint64_t late_end(const PostcopyTest *test)
{
    return LATE_SIZE + BARRIER_START + barrier_size(test);
}

static void shape(SparseGuests *guests)
{
    PostcopyTest *test = container_of(guests, PostcopyTest, guests);
    uint64_t page;

    test->src = guests->src;
    for (page = page_at(test, EARLY_START);
         page < page_at(test, late_end(test)); page++) {
        if (page >= page_at(test, BARRIER_START) &&
            page < page_at(test, BARRIER_START + barrier_size(test))) {
            guests->kinds[page] = PAGE_DATA;
        } else if (page % 8 == 3) {
            /* Little, for it would hold up the migration as well */
            guests->kinds[page] = page % 64 == 3 ||
                                  test->c->backend == &sparse_hugetlb
                                  ? PAGE_DATA : PAGE_ZERO;
        }
    }
}

static void test_end(PostcopyTest *test)
{
    sparse_end(&test->guests);
    g_free(test->accessed);
    g_free(test->written);
}

/* Returns false if the test has to be skipped, after saying why */
static bool test_start(PostcopyTest *test, const PostcopyCase *c)
{
    SparseGuests *guests = &test->guests;

    *test = (PostcopyTest) {
        .c = c,
        .row = {
            .backend = c->backend,
            .dst_opts = "-trace ram_handle_zero_fault",
            .log = true,
            .hide_stderr = c->recover,
            .oob = c->recover,
            .shape = shape,
        },
    };
    if (!sparse_start(guests, &test->row)) {
        return false;
    }
    if (!sparse_set_way(guests, c->way)) {
        sparse_end(guests);
        return false;
    }
    sparse_prepare(guests, &sparse_empty);
    test->from = guests->from;
    test->to = guests->to;
    test->src = guests->src;
    test->dst = guests->dst;
    test->kinds = guests->kinds;
    test->accessed = bitmap_new(test->src.pages);
    test->written = bitmap_new(test->src.pages);
    return true;
}

/* Migrate until the first pass is held up by the barrier, then switch */
static void start_postcopy(PostcopyTest *test)
{
    int64_t start = g_get_monotonic_time();
    uint64_t early_pages = BARRIER_START / qemu_real_host_page_size();

    migrate_set_parameter_int(test->from, "max-bandwidth", SLOW_BANDWIDTH);
    migrate_set_parameter_int(test->from, "max-postcopy-bandwidth",
                              SLOW_BANDWIDTH);
    migrate_incoming_qmp(test->to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_qmp(test->from, test->to, NULL, NULL, "{}");
    while (read_ram_property_int(test->from, "duplicate") +
           read_ram_property_int(test->from, "normal") <= early_pages) {
        g_assert_cmpint(g_get_monotonic_time() - start, <, LAB_TIMEOUT);
        g_usleep(1000);
    }
    qtest_qmp_assert_success(test->from,
                             "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_status(test->from, "postcopy-active", NULL);
    wait_for_migration_status(test->to, "postcopy-active", NULL);
}

/* What the page has to hold, in bytes 0 and 8 of it */
static void check_page(const PostcopyTest *test, uint64_t page)
{
    uint64_t address = page * test->src.page_size;
    g_autofree uint64_t *expect = g_malloc(test->src.page_size);

    guest_ram_read_page(&test->src, page, expect);
    g_assert_cmphex(qtest_readq(test->to, address), ==, le64_to_cpu(expect[0]));
    g_assert_cmphex(qtest_readq(test->to, address + 8), ==,
                    le64_to_cpu(expect[1]));
}

static void access_page(PostcopyTest *test, uint64_t page, bool write)
{
    if (write) {
        qtest_writeb(test->to, page * test->src.page_size, WRITTEN);
        set_bit(page, test->written);
    } else if (source_is_released(test)) {
        qtest_readb(test->to, page * test->src.page_size);
    } else {
        check_page(test, page);
    }
    set_bit(page, test->accessed);
}

/* What the destination has said about the fault on this page */
static bool was_answered_here(PostcopyTest *test, uint64_t page)
{
    g_autofree char *line =
        g_strdup_printf("offset: 0x%" PRIx64 " placed: 1",
                        page * test->src.page_size);
    g_autofree char *log = sparse_log(&test->guests);

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
    uint64_t page = next_of_kind(test, kind, from);

    g_assert_cmpuint(page, <, page_at(test, BARRIER_START));
    access_page(test, page, write);
#ifdef CONFIG_TRACE_LOG
    /* The access goes on before the fault thread comes to say so */
    for (int i = 0; i < 1000 && !was_answered_here(test, page); i++) {
        g_usleep(10000);
    }
    g_assert(was_answered_here(test, page));
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
    uint64_t page = last_of_kind(test, kind, before);

    access_page(test, page, write);
#ifdef CONFIG_TRACE_LOG
    g_assert(!was_answered_here(test, page));
#endif
    return page;
}

static void pause_channel(PostcopyTest *test)
{
    migrate_pause(test->from);
    lab_wait_for_status(test->to, "postcopy-paused");
    lab_wait_for_status(test->from, "postcopy-paused");
}

static void recover_channel(PostcopyTest *test)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket-recover",
                                           sparse_env->tmpfs);

    migrate_recover(test->to, uri);
    migrate_qmp(test->from, test->to, uri, NULL, "{'resume': true}");
    lab_wait_for_status(test->to, "postcopy-active");
}

/* Returns the page behind those that were accessed */
static uint64_t break_and_recover(PostcopyTest *test, uint64_t early)
{
    pause_channel(test);

    /* What has been received is there, even if the source is not */
    early = access_received(test, PAGE_HOLE, early, false);
    early = access_received(test, PAGE_HOLE, early, true);

    recover_channel(test);
    return early;
}

/*
 * All content is right, and nothing is allocated but data and what was
 * accessed.
 */
static void check_destination(const PostcopyTest *test)
{
    uint64_t pages = test->dst.pages, page;
    g_autofree uint64_t *src = g_malloc(test->src.page_size);
    g_autofree uint64_t *dst = g_malloc(test->src.page_size);
    g_autofree unsigned long *expected = bitmap_new(pages);

    for (page = 0; page < pages; page++) {
        memset(src, 0, test->src.page_size);
        if (test->kinds[page] == PAGE_DATA) {
            set_bit(page, expected);
            sparse_pattern_page(src, test->kinds, page, test->src.page_size);
        }
        if (!source_is_released(test)) {
            /* It may have been written by QEMU as well */
            guest_ram_read_page(&test->src, page, src);
        }
        if (test_bit(page, test->written)) {
            *(uint8_t *)src = WRITTEN;
        }
        guest_ram_read_page(&test->dst, page, dst);
        if (memcmp(src, dst, test->src.page_size)) {
            g_error("page %" PRIu64 " of the destination differs", page);
        }
    }
    bitmap_or(expected, expected, test->accessed, pages);
    g_test_message("%" PRIu64 " KiB are allocated, %" PRIu64 " KiB are data or "
                   "were accessed",
                   guest_ram_allocated_bytes(&test->dst) / KiB,
                   bitmap_count_one(expected, pages) * test->dst.page_size /
                   KiB);
    guest_ram_extend_to_units(&test->dst, expected);
    g_assert_cmpuint(guest_ram_allocated_bytes(&test->dst), <=,
                     bitmap_count_one(expected, pages) * test->dst.page_size);
}

static void test_postcopy(const void *opaque)
{
    const PostcopyCase *c = opaque;
    PostcopyTest test;
    uint64_t early, late;

    if (!test_start(&test, c)) {
        return;
    }
    start_postcopy(&test);

    early = page_at(&test, EARLY_START);
    early = access_received(&test, PAGE_HOLE, early, false);
    early = access_received(&test, PAGE_HOLE, early, true);

    late = page_at(&test, late_end(&test));
    late = access_late(&test, PAGE_HOLE, late, false);
    late = access_late(&test, PAGE_HOLE, late, true);
    late = access_late(&test, PAGE_DATA, late, false);
    late = access_late(&test, PAGE_DATA, late, true);
    if (c->backend != &sparse_hugetlb) {
        early = access_received(&test, PAGE_ZERO, early, true);
        access_late(&test, PAGE_ZERO, late, false);
    }
    if (c->recover) {
        early = break_and_recover(&test, early);
        access_received(&test, PAGE_HOLE, early, false);
    }

    migrate_set_parameter_int(test.from, "max-postcopy-bandwidth", 0);
    wait_for_migration_complete(test.from);
    wait_for_migration_complete(test.to);

    check_destination(&test);
    test_end(&test);
}

/* What had been received as zero before the barrier has been left alone */
static void check_early_holes(const PostcopyTest *test)
{
    g_autofree unsigned long *allocated = guest_ram_allocated_pages(&test->dst);
    uint64_t page = page_at(test, EARLY_START);

    if (!allocated || guest_ram_allocation_unit(&test->dst) !=
                      test->dst.page_size) {
        return;
    }
    for (; page < page_at(test, BARRIER_START); page++) {
        if (test->kinds[page] != PAGE_DATA && test_bit(page, allocated)) {
            g_error("page %" PRIu64 " has been allocated by reading", page);
        }
    }
}

/*
 * The source does not send the barrier before the dump has come to it, as long
 * as nothing else holds up the dump.
 */
static void test_dump_destination(const void *opaque)
{
    const PostcopyCase *c = opaque;
    g_autofree char *path = g_strdup_printf("%s/dump", sparse_env->tmpfs);
    g_autofree char *protocol = g_strdup_printf("file:%s", path);
    PostcopyTest test;

    if (!test_start(&test, c)) {
        return;
    }
    start_postcopy(&test);
    lab_wait_for_devices(test.to);
    if (c->recover) {
        pause_channel(&test);
    }
    qtest_qmp_assert_success(test.to, "{ 'execute': 'dump-guest-memory',"
                             "'arguments': { 'paging': false, 'detach': true,"
                             "'protocol': %s, 'format': 'elf' } }", protocol);
    lab_wait_for_dump(test.to, G_USEC_PER_SEC);
    if (c->recover) {
        recover_channel(&test);
        lab_wait_for_dump(test.to, G_USEC_PER_SEC);
    }
    migrate_set_parameter_int(test.from, "max-postcopy-bandwidth", 0);
    g_assert(lab_wait_for_dump(test.to, LAB_TIMEOUT));
    wait_for_migration_complete(test.from);
    wait_for_migration_complete(test.to);

    lab_check_elf_dump(&test.src, test.kinds, path);
    check_early_holes(&test);
    unlink(path);
    test_end(&test);
}

/* A page that arrives between two samples must not look like a written one */
static void test_rate_destination(const void *opaque)
{
    const PostcopyCase *c = opaque;
    PostcopyTest test;
    bool measured;

    if (!test_start(&test, c)) {
        return;
    }
    start_postcopy(&test);
    lab_wait_for_devices(test.to);
    qtest_qmp_assert_success(test.to, "{ 'execute': 'calc-dirty-rate',"
                             "'arguments': { 'calc-time': 1,"
                             "'sample-pages': 16384 } }");
    g_usleep(100 * 1000);
    migrate_set_parameter_int(test.from, "max-postcopy-bandwidth", 0);
    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            test.to, "{ 'execute': 'query-dirty-rate' }");

        measured = g_str_equal(qdict_get_str(rsp, "status"), "measured");
        if (measured) {
            g_assert_cmpint(qdict_get_int(rsp, "dirty-rate"), ==, 0);
        }
        qobject_unref(rsp);
        g_usleep(10 * 1000);
    } while (!measured);
    wait_for_migration_complete(test.from);
    wait_for_migration_complete(test.to);
    test_end(&test);
}

void lab_add_postcopy(void)
{
    static const PostcopyCase dirty_rate = { .way = &sparse_postcopy };
    int i;

    lab_add_test("postcopy/readers/dirty-rate", &dirty_rate,
                 test_rate_destination);
    for (i = 0; i < ARRAY_SIZE(reader_cases); i++) {
        g_autofree char *name = g_strdup_printf("postcopy/%s",
                                                reader_cases[i].name);

        lab_add_test(name, &reader_cases[i], test_dump_destination);
    }
    for (i = 0; i < ARRAY_SIZE(postcopy_cases); i++) {
        g_autofree char *name = g_strdup_printf("postcopy/%s",
                                                postcopy_cases[i].name);

        lab_add_test(name, &postcopy_cases[i], test_postcopy);
    }
}
