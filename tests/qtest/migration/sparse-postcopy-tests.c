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
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-tests.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

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

#define TIMEOUT (120 * G_USEC_PER_SEC)

typedef struct PostcopyCase {
    /* Path below /migration/sparse/postcopy */
    const char *name;
    SparseBackend backend;
    /* Set on both sides, besides postcopy-ram */
    const char *capabilities[4];
    /* The channel breaks while the destination runs */
    bool recover;
} PostcopyCase;

static const PostcopyCase postcopy_cases[] = {
    {
        .name = "faults/plain",
    }, {
        .name = "faults/preempt",
        .capabilities = { "postcopy-preempt" },
    }, {
        .name = "faults/release-ram",
        .capabilities = { "release-ram" },
    }, {
        .name = "faults/blocktime",
        .capabilities = { "postcopy-blocktime" },
    }, {
        .name = "faults/multifd",
        .capabilities = { "multifd" },
    }, {
        .name = "faults/multifd-preempt",
        .capabilities = { "multifd", "postcopy-preempt" },
    }, {
        .name = "faults/multifd-capability",
        .capabilities = { "multifd", "sparse-ram" },
    }, {
        .name = "faults/capability",
        .capabilities = { "sparse-ram" },
    }, {
        .name = "faults/capability-preempt",
        .capabilities = { "sparse-ram", "postcopy-preempt" },
    }, {
        .name = "faults/shm-file-offset",
        .backend = BACKEND_SHM_FILE_OFFSET,
    }, {
        .name = "faults/hugetlb",
        .backend = BACKEND_HUGETLB,
    }, {
        .name = "faults/hugetlb-capability",
        .backend = BACKEND_HUGETLB,
        .capabilities = { "sparse-ram" },
    }, {
        .name = "recover/plain",
        .recover = true,
    }, {
        .name = "recover/preempt",
        .capabilities = { "postcopy-preempt" },
        .recover = true,
    }, {
        .name = "recover/multifd",
        .capabilities = { "multifd" },
        .recover = true,
    }, {
        .name = "recover/capability",
        .capabilities = { "sparse-ram" },
        .recover = true,
    }, {
        .name = "recover/hugetlb",
        .backend = BACKEND_HUGETLB,
        .recover = true,
    },
};

/*
 * Readers of the destination's RAM other than migration: a page that has not
 * arrived yet looks like a hole, but must not be taken for zero.
 */
static const PostcopyCase reader_cases[] = {
    {
        .name = "readers/plain",
    }, {
        .name = "readers/preempt",
        .capabilities = { "postcopy-preempt" },
    }, {
        .name = "readers/capability",
        .capabilities = { "sparse-ram" },
    }, {
        .name = "readers/shm-file-offset",
        .backend = BACKEND_SHM_FILE_OFFSET,
    }, {
        .name = "readers/hugetlb",
        .backend = BACKEND_HUGETLB,
    }, {
        .name = "readers/recover",
        .recover = true,
    },
};

static MigrationTestEnv *env;

typedef struct PostcopyTest {
    const PostcopyCase *c;
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
    uint8_t *kinds;
    /* Pages of the destination that were accessed, and those written to */
    unsigned long *accessed;
    unsigned long *written;
    /* Where the destination writes its trace */
    char *trace_path;
} PostcopyTest;

static uint64_t ram_size(const PostcopyTest *test)
{
    return test->c->backend == BACKEND_HUGETLB ? HUGETLB_SIZE : PATTERN_SIZE;
}

static uint64_t page_at(const PostcopyTest *test, uint64_t address)
{
    return address / test->src.page_size;
}

/* The first page of a kind from @page on */
static uint64_t next_of_kind(const PostcopyTest *test, PageKind kind,
                             uint64_t page)
{
    while (test->kinds[page] != kind) {
        g_assert_cmpuint(++page, <, guest_ram_pages(&test->src));
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
    return g_strcmp0(test->c->capabilities[0], "release-ram") == 0;
}

static uint64_t barrier_size(const PostcopyTest *test)
{
    bool multifd = g_strcmp0(test->c->capabilities[0], "multifd") == 0;

    return BARRIER_SIZE + (multifd ? MULTIFD_BARRIER : 0);
}

/* The end of what follows the barrier */
static uint64_t late_end(const PostcopyTest *test)
{
    return LATE_SIZE + BARRIER_START + barrier_size(test);
}

static uint8_t *make_kinds(const PostcopyTest *test)
{
    uint64_t pages = guest_ram_pages(&test->src);
    uint8_t *kinds = g_malloc0(pages);
    uint64_t page;

    for (page = page_at(test, EARLY_START);
         page < page_at(test, late_end(test)); page++) {
        if (page >= page_at(test, BARRIER_START) &&
            page < page_at(test, BARRIER_START + barrier_size(test))) {
            kinds[page] = PAGE_DATA;
        } else if (page % 8 == 3) {
            /* Little, for it would hold up the migration as well */
            kinds[page] = page % 64 == 3 || test->c->backend == BACKEND_HUGETLB
                          ? PAGE_DATA : PAGE_ZERO;
        }
    }
    return kinds;
}

static void test_end(PostcopyTest *test)
{
    migrate_end(test->from, test->to, false);
    guest_ram_close(&test->src);
    guest_ram_close(&test->dst);
    unlink(test->trace_path);
    g_free(test->trace_path);
    g_free(test->accessed);
    g_free(test->written);
    g_free(test->kinds);
}

/* Returns false if the test has to be skipped, after saying why */
static bool test_start(PostcopyTest *test, const PostcopyCase *c)
{
    const char *reason = sparse_backend_skip_reason(c->backend);
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    MigrateStart args = {
        .hide_stderr = c->recover,
        .oob = c->recover,
    };
    uint64_t pages;
    int i;

    if (!env->has_uffd) {
        reason = "userfaultfd is not available";
    }
    if (reason) {
        g_test_skip(reason);
        return false;
    }
    *test = (PostcopyTest) { .c = c };
    guest_ram_init(&test->src, c->backend, ram_size(test));
    guest_ram_init(&test->dst, c->backend, ram_size(test));
    src_memory = guest_ram_opts(&test->src, NULL);
    dst_memory = guest_ram_opts(&test->dst, NULL);
    test->trace_path = g_strdup_printf("%s/dest_trace", env->tmpfs);
    src_opts = g_strdup_printf("-S %s", src_memory);
    dst_opts = g_strdup_printf("-S %s -D %s -trace ram_handle_zero_fault",
                               dst_memory, test->trace_path);
    args.opts_source = src_opts;
    args.opts_target = dst_opts;
    if (migrate_start(&test->from, &test->to, "defer", &args)) {
        guest_ram_close(&test->src);
        guest_ram_close(&test->dst);
        return false;
    }
    guest_ram_open(&test->src, test->from);
    guest_ram_open(&test->dst, test->to);

    pages = guest_ram_pages(&test->src);
    test->accessed = bitmap_new(pages);
    test->written = bitmap_new(pages);
    test->kinds = make_kinds(test);
    guest_ram_prepare(&test->src, test->kinds);

    migrate_set_both_capability(test->from, test->to, "postcopy-ram");
    for (i = 0; i < ARRAY_SIZE(c->capabilities) && c->capabilities[i]; i++) {
        if (!migrate_try_capability(test->from, c->capabilities[i]) ||
            !migrate_try_capability(test->to, c->capabilities[i])) {
            test_end(test);
            return false;
        }
    }
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
        g_assert_cmpint(g_get_monotonic_time() - start, <, TIMEOUT);
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
static bool was_answered_here(const PostcopyTest *test, uint64_t page)
{
    g_autofree char *line =
        g_strdup_printf("offset: 0x%" PRIx64 " placed: 1",
                        page * test->src.page_size);
    g_autofree char *log = NULL;

    return g_file_get_contents(test->trace_path, &log, NULL, NULL) &&
           strstr(log, line);
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

static void wait_for_status(QTestState *who, const char *goal)
{
    int64_t start = g_get_monotonic_time();

    while (true) {
        g_autofree char *status = migrate_query_status(who);

        if (g_str_equal(status, goal)) {
            return;
        }
        g_assert_cmpint(g_get_monotonic_time() - start, <, TIMEOUT);
        g_usleep(10000);
    }
}

static void pause_channel(PostcopyTest *test)
{
    migrate_pause(test->from);
    wait_for_status(test->to, "postcopy-paused");
    wait_for_status(test->from, "postcopy-paused");
}

static void recover_channel(PostcopyTest *test)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket-recover",
                                           env->tmpfs);

    migrate_recover(test->to, uri);
    migrate_qmp(test->from, test->to, uri, NULL, "{'resume': true}");
    wait_for_status(test->to, "postcopy-active");
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
    uint64_t pages = guest_ram_pages(&test->dst), page;
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
    g_assert_cmpuint(guest_ram_allocated_bytes(&test->dst), <=,
                     guest_ram_max_allocated_bytes(&test->dst, expected));
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
    if (c->backend != BACKEND_HUGETLB) {
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

/* The destination has all of its devices, so that it lets others read */
static void wait_for_devices(QTestState *to)
{
    bool loaded;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            to, "{ 'execute': 'query-status' }");

        loaded = !g_str_equal(qdict_get_str(rsp, "status"), "inmigrate");
        qobject_unref(rsp);
        g_usleep(1000);
    } while (!loaded);
}

/* Wait for a dump to end, but no longer than @timeout us */
static void wait_for_dump(QTestState *who, int64_t timeout)
{
    int64_t start = g_get_monotonic_time();
    bool active;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            who, "{ 'execute': 'query-dump' }");

        g_assert_cmpstr(qdict_get_str(rsp, "status"), !=, "failed");
        active = g_str_equal(qdict_get_str(rsp, "status"), "active");
        qobject_unref(rsp);
        g_usleep(10000);
    } while (active && g_get_monotonic_time() - start < timeout);
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
    g_autofree char *path = g_strdup_printf("%s/dump", env->tmpfs);
    g_autofree char *protocol = g_strdup_printf("file:%s", path);
    PostcopyTest test;

    if (!test_start(&test, c)) {
        return;
    }
    start_postcopy(&test);
    wait_for_devices(test.to);
    if (c->recover) {
        pause_channel(&test);
    }
    qtest_qmp_assert_success(test.to, "{ 'execute': 'dump-guest-memory',"
                             "'arguments': { 'paging': false, 'detach': true,"
                             "'protocol': %s, 'format': 'elf' } }", protocol);
    wait_for_dump(test.to, G_USEC_PER_SEC);
    if (c->recover) {
        recover_channel(&test);
        wait_for_dump(test.to, G_USEC_PER_SEC);
    }
    migrate_set_parameter_int(test.from, "max-postcopy-bandwidth", 0);
    wait_for_dump(test.to, TIMEOUT);
    wait_for_migration_complete(test.from);
    wait_for_migration_complete(test.to);

    check_elf_dump(&test.src, test.kinds, path);
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
    wait_for_devices(test.to);
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

void migration_test_add_sparse_postcopy(MigrationTestEnv *the_env)
{
    static const PostcopyCase dirty_rate;
    int i;

    env = the_env;
    qtest_add_data_func("/migration/sparse/postcopy/readers/dirty-rate",
                        &dirty_rate, test_rate_destination);
    for (i = 0; i < ARRAY_SIZE(reader_cases); i++) {
        g_autofree char *path = g_strdup_printf("/migration/sparse/postcopy/%s",
                                                reader_cases[i].name);

        qtest_add_data_func(path, &reader_cases[i], test_dump_destination);
    }
    for (i = 0; i < ARRAY_SIZE(postcopy_cases); i++) {
        g_autofree char *path = g_strdup_printf("/migration/sparse/postcopy/%s",
                                                postcopy_cases[i].name);

        qtest_add_data_func(path, &postcopy_cases[i], test_postcopy);
    }
}
