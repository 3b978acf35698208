/*
 * QTest testcases for the migration capability sparse-ram
 *
 * With the capability, a run of zero pages is one record of the stream.  These
 * tests check that every page still arrives, that no side allocates memory for
 * it, and that the statistics count pages and not records.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#ifdef CONFIG_GNUTLS
# include "crypto/tlscredspsk.h"
# include "tests/unit/crypto-tls-psk-helpers.h"
#endif
#include "qemu/bitmap.h"
#include "qemu/sockets.h"
#include "qobject/qdict.h"
#include "sparse-lab.h"

#define CAPABILITY "sparse-ram"

/* The pages that are written to during a migration; a prime number */
#define REWRITE_PAGES 12289

/* Large, so that what is sent for holes would show; little of it has data */
#define RUNS_SIZE (1 * GiB)
/* All of it is sent */
#define SMALL_SIZE (64 * MiB)
#define ZEROED_SIZE (256 * MiB)
#define SHORT_RUNS_SIZE (64 * MiB)

/* Of that one, in pages: data at its start, and from each data to the next */
#define LEAD_PAGES 8192
#define SHORT_RUN 16

/* What all but RAM may take in the main channel: devices, mostly */
#define MAX_OTHER_BYTES (512 * KiB)

/* The record of a zero page; that of a run; the name in front of some */
#define ZERO_PAGE_BYTES (8 + 1)
#define ZERO_RUN_BYTES (8 + 1 + 8)
#define BLOCK_NAME_BYTES (1 + sizeof(BACKEND_ID) - 1)

/* What a run of populated pages has at least, but for the last one */
#define ZEROED_RUN_PAGES 64

/* A chunk of clear_bmap, in pages: runs end there */
#define SMALL_CHUNKS "-global migration.x-clear-bitmap-shift=6"
#define SMALL_CHUNK_PAGES 64

#define FLUSH_SECTION \
    "-global migration.multifd-flush-after-each-section=on"
#define FLUSH_ROUND "-global migration.multifd-flush-after-each-section=off"

/* TLS with a key that both sides know, and read when they need it */

static char *tls_file(char **dir)
{
    *dir = g_strdup_printf("%s/tls", sparse_env->tmpfs);
#ifdef CONFIG_GNUTLS
    return g_strdup_printf("%s/" QCRYPTO_TLS_CREDS_PSKFILE, *dir);
#else
    return NULL;
#endif
}

static const char *tls_skip_reason(void)
{
#ifdef CONFIG_GNUTLS
    return NULL;
#else
    return "QEMU is built without gnutls, and so without TLS";
#endif
}

static void set_up_tls(SparseGuests *guests)
{
    g_autofree char *dir = NULL;
    g_autofree char *file = tls_file(&dir);

    g_assert_no_errno(g_mkdir_with_parents(dir, 0700));
#ifdef CONFIG_GNUTLS
    test_tls_psk_init(file);
#endif
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'object-add',"
                             "'arguments': { 'qom-type': 'tls-creds-psk',"
                             "'id': 'tls0', 'endpoint': 'client', 'dir': %s,"
                             "'username': 'qemu' } }", dir);
    qtest_qmp_assert_success(guests->to, "{ 'execute': 'object-add',"
                             "'arguments': { 'qom-type': 'tls-creds-psk',"
                             "'id': 'tls0', 'endpoint': 'server',"
                             "'dir': %s } }", dir);
    migrate_set_parameter_str(guests->from, "tls-creds", "tls0");
    migrate_set_parameter_str(guests->to, "tls-creds", "tls0");
}

static void remove_tls_key(void)
{
    g_autofree char *dir = NULL;
    g_autofree char *file = tls_file(&dir);

#ifdef CONFIG_GNUTLS
    test_tls_psk_cleanup(file);
#endif
    rmdir(dir);
}

static void send_fd(QTestState *who, int fd)
{
    qtest_qmp_fds_assert_success(who, &fd, 1, "{ 'execute': 'getfd',"
                                 "'arguments': { 'fdname': 'fd-mig' }}");
    close(fd);
}

static void set_up_fd(SparseGuests *guests)
{
    int sockets[2];

    g_assert_no_errno(qemu_socketpair(PF_LOCAL, SOCK_STREAM, 0, sockets));
    send_fd(guests->from, sockets[0]);
    send_fd(guests->to, sockets[1]);
}

/* So that the last round can be waited for */
static void set_up_rewrite(SparseGuests *guests)
{
    migrate_set_capability(guests->from, "pause-before-switchover", true);
}

/* Ways */

#define REWRITE .bandwidth = 32 * MiB, .set_up = set_up_rewrite
#define TLS .set_up = set_up_tls, .skip_reason = tls_skip_reason
#define RUNS .capabilities = { CAPABILITY }
#define XBZRLE \
    .capabilities = { "xbzrle", CAPABILITY }, \
    .parameters = { "xbzrle-cache-size 33554432" }
#define MULTIFD(...) \
    .capabilities = { "multifd", CAPABILITY }, \
    .parameters = { "multifd-channels 16", __VA_ARGS__ }
#define LEGACY MULTIFD("zero-page-detection legacy")
#define POSTCOPY(...) .transport = SPARSE_POSTCOPY, \
    .capabilities = { "postcopy-ram", CAPABILITY, __VA_ARGS__ }

static const SparseWay precopy = { .name = "precopy", RUNS };
static const SparseWay xbzrle = { .name = "xbzrle", XBZRLE };
static const SparseWay multifd = { .name = "multifd", MULTIFD() };
static const SparseWay legacy = { .name = "multifd-legacy", LEGACY };
static const SparseWay file = { .name = "file", SPARSE_FILE, RUNS };
static const SparseWay fd = {
    .name = "fd", .uri = "fd:fd-mig", RUNS, .set_up = set_up_fd,
};
static const SparseWay return_path = {
    .name = "return-path", .capabilities = { "return-path", CAPABILITY },
};
static const SparseWay validate_uuid = {
    .name = "validate-uuid", .capabilities = { "validate-uuid", CAPABILITY },
};
static const SparseWay no_detection = {
    .name = "no-zero-page-detection", RUNS,
    .parameters = { "zero-page-detection none" },
};
static const SparseWay tls = { .name = "precopy", RUNS, TLS };
static const SparseWay tls_multifd = { .name = "multifd", MULTIFD(), TLS };
static const SparseWay tls_legacy = { .name = "multifd-legacy", LEGACY, TLS };
static const SparseWay rewrite = { .name = "precopy", RUNS, REWRITE };
static const SparseWay rewrite_xbzrle = { .name = "xbzrle", XBZRLE, REWRITE };
static const SparseWay rewrite_multifd = {
    .name = "multifd", MULTIFD(), REWRITE
};
static const SparseWay rewrite_legacy = {
    .name = "multifd-legacy", LEGACY, REWRITE
};
static const SparseWay postcopy = { .name = "at-once", POSTCOPY() };
static const SparseWay postcopy_preempt = {
    .name = "preempt", POSTCOPY("postcopy-preempt"),
};
static const SparseWay postcopy_tls = { .name = "tls", POSTCOPY(), TLS };

/* Hooks */

static void set_source(SparseGuests *guests)
{
    migrate_set_capability(guests->from, CAPABILITY, true);
}

static void set_destination(SparseGuests *guests)
{
    migrate_set_capability(guests->to, CAPABILITY, true);
}

static void set_both(SparseGuests *guests)
{
    sparse_set_both(guests, CAPABILITY);
}

/* It is the source that would start COLO */
static void set_destination_colo(SparseGuests *guests)
{
    sparse_try(guests->to, "migrate_set_capability x-colo on");
}

static const char *skip_without_machine(const char *machine)
{
    return qtest_has_machine(machine)
        ? NULL : "QEMU does not have this machine type";
}

#define MACHINE(name, type) \
    static const char *name(void) { return skip_without_machine(type); }
MACHINE(machine_2_12, "pc-q35-2.12")
MACHINE(machine_7_1, "pc-q35-7.1")
MACHINE(machine_8_0, "pc-q35-8.0")
MACHINE(machine_9_0, "pc-q35-9.0")

static uint64_t guest_address(uint64_t page)
{
    return page * qemu_real_host_page_size();
}

/*
 * Write to pages all over the first MiBs, as a guest would: holes become data,
 * data becomes zero.  Every call is different.
 */
static void rewrite_pages(QTestState *from, unsigned round)
{
    for (uint64_t i = 0; i < 256; i++) {
        uint64_t page = (i * 61 + round * 7) % REWRITE_PAGES;

        qtest_memset(from, guest_address(page), (i + round) % 3 ? 0xa5 : 0,
                     qemu_real_host_page_size());
    }
}

static void rewrite_during(SparseGuests *guests)
{
    g_autofree char *status = NULL;
    unsigned round = 0;

    do {
        rewrite_pages(guests->from, round++);
        g_free(status);
        status = migrate_query_status(guests->from);
    } while (g_strcmp0(status, "pre-switchover") != 0 &&
             get_migration_pass(guests->from) < 4);
    migrate_ensure_converge(guests->from);
    wait_for_migration_status(guests->from, "pre-switchover", NULL);
    rewrite_pages(guests->from, round++);
    g_test_message("rewritten %u times, pass %" PRIu64, round,
                   get_migration_pass(guests->from));
    migrate_continue(guests->from, "pre-switchover");
    g_clear_pointer(&guests->kinds, g_free);
}

/* The number of runs of pages that are holes */
static uint64_t count_runs(const uint8_t *kinds, uint64_t pages)
{
    uint64_t runs = 0;

    for (uint64_t page = 0; page < pages; page++) {
        runs += kinds[page] == PAGE_HOLE &&
                (page == 0 || kinds[page - 1] != PAGE_HOLE);
    }
    return runs;
}

/* Each hole is counted once, and takes next to nothing in the stream */
static void check_statistics(SparseGuests *guests)
{
    const SparseRow *row = guests->row;
    const SparseWay *way = guests->way;
    const unsigned long *before = guests->src_before.pages;
    uint64_t pages = guests->src.pages;
    uint64_t target_pages = guests->src.page_size / qemu_real_host_page_size();
    uint64_t runs = count_runs(guests->kinds, pages);
    uint64_t holes = read_ram_property_int(guests->from, "holes");
    uint64_t duplicate = read_ram_property_int(guests->from, "duplicate");
    uint64_t normal = read_ram_property_int(guests->from, "normal");
    uint64_t transferred = read_ram_property_int(guests->from, "transferred");
    uint64_t run_bytes;
    bool zeroed = row->patterns[0] == &lab_zeroed;
    /* Otherwise the multifd threads find them */
    bool zero_runs = zeroed && way != &multifd;
    bool destination_only = row->prepare == set_destination;
    bool chunks = g_strcmp0(row->opts, SMALL_CHUNKS) == 0;

    g_test_message("%" PRIu64 " normal, %" PRIu64 " duplicate, %" PRIu64
                   " holes in %" PRIu64 " runs, %" PRIu64 " bytes",
                   normal, duplicate, holes, runs, transferred);

    if (!before) {
        /* A huge page that QEMU has not mapped is one if it reads as zero */
        g_assert_cmpuint(holes, ==, target_pages * (pages - sparse_count(
                             guests->kinds, pages, PAGE_DATA)));
    }
    if (way == &no_detection) {
        /* Holes need none */
        g_assert_cmpuint(duplicate, ==, holes);
        g_assert_cmpuint(runs, >, 0);
        return;
    }
    if (chunks) {
        runs += pages / SMALL_CHUNK_PAGES;
    }
    if (zero_runs) {
        /* All of them; there are no single pages */
        runs = pages / ZEROED_RUN_PAGES;
        holes = duplicate;
    }
    run_bytes = runs * (ZERO_RUN_BYTES + BLOCK_NAME_BYTES);
    if (destination_only) {
        run_bytes = holes * ZERO_PAGE_BYTES;
        g_assert_cmpuint(transferred, >, run_bytes);
    }
    if (g_strcmp0(way->capabilities[0], "multifd") == 0) {
        /*
         * Not what the other channels take: each section of the main one can
         * mean a packet on all of them, and how many sections there are depends
         * on the time.
         */
        transferred -= read_ram_property_int(guests->from, "multifd-bytes");
        normal = 0;
    }
    /*
     * 16: what goes with a page.  Single zero pages of the block have no name
     * in front of them.
     */
    g_assert_cmpuint(transferred, <,
                     normal * (qemu_real_host_page_size() + 16) +
                     (duplicate - holes) * ZERO_PAGE_BYTES +
                     run_bytes + MAX_OTHER_BYTES);
    if (before && !chunks && zero_runs == zeroed && !destination_only) {
        /* So that the limit above is one that single records would break */
        g_assert_cmpuint(holes * ZERO_PAGE_BYTES, >,
                         run_bytes + MAX_OTHER_BYTES);
    }
}

static void check_tls(SparseGuests *guests)
{
    if (guests->way->transport != SPARSE_POSTCOPY) {
        check_statistics(guests);
    }
    remove_tls_key();
}

/* Write until a later pass, then switch */
static void postcopy_after_pass(SparseGuests *guests)
{
    g_autofree char *status = NULL;
    unsigned round = 0;

    migrate_set_parameter_int(guests->from, "max-bandwidth", 8 * MiB);
    migrate_set_parameter_int(guests->from, "downtime-limit", 1);
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
    while (get_migration_pass(guests->from) < 2) {
        rewrite_pages(guests->from, round++);
    }
    /* From here on it cannot come to its end, and no write is too late */
    migrate_set_parameter_int(guests->from, "max-bandwidth", 4 * KiB);
    rewrite_pages(guests->from, round);
    status = migrate_query_status(guests->from);
    if (!g_str_equal(status, "active")) {
        g_test_skip("the host is too busy: all was sent before the test "
                    "looked");
        return;
    }
    qtest_qmp_assert_success(guests->from,
                             "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_complete(guests->from);
    wait_for_migration_complete(guests->to);
    g_free(guest_ram_content(&guests->dst, &guests->src, NULL));
}

/* The destination refuses, and the source has lost nothing, and can go on */
static void migrate_source_only(SparseGuests *guests)
{
    const char *ungoals[] = { "completed", NULL };
    g_autofree char *text = NULL;

    migrate_set_capability(guests->from, CAPABILITY, true);
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_set_parameter_int(guests->from, "max-bandwidth", 4 * KiB);
    migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
    wait_for_migration_status(guests->from, "failed", ungoals);
    qtest_set_expected_status(guests->to, EXIT_FAILURE);
    qtest_wait_qemu(guests->to);

    text = sparse_log(guests);
    g_test_message("%s", text);
    g_assert(strstr(text, CAPABILITY));
    g_assert(strstr(text, "is off"));

    guest_ram_check_allocation(&guests->src, SPARSE_KEPT, &guests->src_before,
                               NULL);
    guest_ram_check_pattern(&guests->src, guests->kinds);
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'stop' }");
}

#define LONG_HOLES .patterns = { &lab_long_holes }
#define LARGE .size = RUNS_SIZE, LONG_HOLES, .check = check_statistics
#define SMALL .size = SMALL_SIZE, LONG_HOLES
#define ZEROED .size = ZEROED_SIZE, .patterns = { &lab_zeroed }
#define REWRITTEN \
    .during = rewrite_during, .expect = { SPARSE_ANY, .holes = HOLES_ANY }
#define NO_EFFECT_WAYS .ways = { &sparse_mapped_ram, &lab_snapshot }

static const SparseRow rows[] = {
    {
        .name = "capability/%w", LARGE,
        .ways = { &precopy, &xbzrle, &legacy, &file, &fd, &return_path },
    }, {
        .name = "capability/multifd/flush-each-section", LARGE,
        .ways = { &multifd }, .opts = FLUSH_SECTION,
    }, {
        .name = "capability/multifd/flush-each-round", LARGE,
        .ways = { &multifd }, .opts = FLUSH_ROUND,
    }, {
        .name = "capability/tls/%w", .size = RUNS_SIZE, LONG_HOLES,
        .ways = { &tls, &tls_multifd, &tls_legacy }, .check = check_tls,
    }, {
        .name = "capability/%w", LARGE, .ways = { &validate_uuid },
        .opts = "-uuid 6f7b0d1c-4f1e-4a55-9d5b-0d6a6b1d1f27",
    }, {
        .name = "capability/destination-only/%w", SMALL,
        .ways = { &sparse_precopy, &sparse_multifd },
        .prepare = set_destination, .check = check_statistics,
    },
#ifdef CONFIG_REPLICATION
    {
        .name = "capability/destination/x-colo", LARGE,
        .ways = { &precopy }, .prepare = set_destination_colo,
    },
#endif
    {
        .name = "capability/machine/pc-q35-2.12/%w", LARGE,
        .ways = { &precopy }, .opts = "-machine type=pc-q35-2.12",
        .skip_reason = machine_2_12,
    }, {
        /* Flushes each section, and finds zero pages in the main thread */
        .name = "capability/machine/pc-q35-8.0/%w", LARGE,
        .ways = { &precopy, &multifd }, .opts = "-machine type=pc-q35-8.0",
        .skip_reason = machine_8_0,
    }, {
        .name = "capability/machine/pc-q35-9.0/%w", LARGE,
        .ways = { &precopy, &multifd }, .opts = "-machine type=pc-q35-9.0",
        .skip_reason = machine_9_0,
    }, {
        .name = "capability/clear-bitmap-shift", LARGE,
        .ways = { &precopy }, .opts = SMALL_CHUNKS,
    }, {
        .name = "capability/hugetlb", .backend = &sparse_hugetlb, LONG_HOLES,
        .ways = { &precopy }, .check = check_statistics,
    }, {
        .name = "capability/%w", SMALL,
        .ways = { &no_detection }, .expect.dst = SPARSE_ANY,
        .check = check_statistics,
    },

    /*
     * Runs of pages that are no holes, and are read to find out.  With multifd,
     * the threads find them, and send them in their packets.
     */
    {
        .name = "capability/zeroed/%w", ZEROED,
        .ways = { &precopy, &xbzrle, &legacy, &multifd },
        .check = check_statistics,
    }, {
        .name = "capability/zeroed/clear-bitmap-shift", ZEROED,
        .ways = { &precopy }, .opts = SMALL_CHUNKS, .check = check_statistics,
    },

    /* Holes become data and data zero while they are on their way */
    {
        .name = "capability/rewrite/%w", .size = RUNS_SIZE, LONG_HOLES,
        .ways = { &rewrite, &rewrite_xbzrle, &rewrite_legacy }, REWRITTEN,
    }, {
        .name = "capability/rewrite/multifd/flush-each-section",
        .size = RUNS_SIZE, LONG_HOLES,
        .ways = { &rewrite_multifd }, REWRITTEN, .opts = FLUSH_SECTION,
    }, {
        .name = "capability/rewrite/multifd/flush-each-round",
        .size = RUNS_SIZE, LONG_HOLES,
        .ways = { &rewrite_multifd }, REWRITTEN, .opts = FLUSH_ROUND,
    }, {
        .name = "capability/rewrite/zeroed-%w", ZEROED,
        .ways = { &rewrite, &rewrite_xbzrle }, REWRITTEN,
    },

    {
        .name = "capability/postcopy/%w", SMALL,
        .ways = { &postcopy, &postcopy_preempt },
    }, {
        .name = "capability/postcopy/hugetlb", .backend = &sparse_hugetlb,
        LONG_HOLES, .ways = { &postcopy }, .expect.dst = SPARSE_ANY,
    }, {
        .name = "capability/postcopy/%w", SMALL,
        .ways = { &postcopy_tls }, .check = check_tls,
    }, {
        /* Another way to connect the preempt channel */
        .name = "capability/postcopy/machine/pc-q35-7.1/%w", SMALL,
        .ways = { &postcopy_preempt }, .opts = "-machine type=pc-q35-7.1",
        .skip_reason = machine_7_1,
    }, {
        .name = "capability/destination-only/%w", SMALL,
        .ways = { &sparse_postcopy }, .prepare = set_destination,
    }, {
        .name = "capability/postcopy/after-first-pass", SMALL,
        .ways = { &postcopy }, .act = postcopy_after_pass,
        .expect.src = SPARSE_ANY,
    },

    {
        .name = "capability/source-only", SMALL, .log = true,
        .act = migrate_source_only,
        /* It has run */
        .expect.src = SPARSE_ANY,
    },

    /* With these, it has no effect, whichever side has it */
    {
        .name = "capability/no-effect/%w/source", SMALL, NO_EFFECT_WAYS,
        .prepare = set_source,
    }, {
        .name = "capability/no-effect/%w/destination", SMALL, NO_EFFECT_WAYS,
        .prepare = set_destination,
    }, {
        .name = "capability/no-effect/%w/both", SMALL, NO_EFFECT_WAYS,
        .prepare = set_both,
    },
};

/*
 * Data first, which takes a second at the least bandwidth, then short holes
 * with a page of data between each two, so that packets of multifd get full.
 */
static PageKind short_runs_kind(uint64_t page, uint64_t pages)
{
    return page < LEAD_PAGES || page % SHORT_RUN == 0 ? PAGE_DATA : PAGE_HOLE;
}

/*
 * Have the main thread of a QEMU wait, in fopen(), until a FIFO is opened.
 * Returns what to open.
 */
static char *block_main_thread(QTestState *who)
{
    char *fifo = g_strdup_printf("%s/fifo", sparse_env->tmpfs);

    g_assert_no_errno(mkfifo(fifo, 0600));
    qtest_qmp_send(who, "{ 'execute': 'pmemsave', 'arguments': {"
                   "'val': 0, 'size': 1, 'filename': %s } }", fifo);
    return fifo;
}

static void unblock_main_thread(QTestState *who, const char *fifo)
{
    int fd = open(fifo, O_RDONLY);
    QDict *response;
    char byte;

    g_assert_no_errno(fd);
    g_assert_cmpint(read(fd, &byte, 1), ==, 1);
    close(fd);
    unlink(fifo);
    response = qtest_qmp_receive(who);
    g_assert(qdict_haskey(response, "return"));
    qobject_unref(response);
}

/*
 * With multifd, data overtakes what is sent by the main channel.  So the
 * guest's write to a page of a run that has been sent must not be sent in the
 * same round, wherever in that round the guest is stopped.
 */
static void migrate_writing_behind_run(void)
{
    static const SparsePattern short_runs = { "short-runs", short_runs_kind };
    static const SparseRow row = { .size = SHORT_RUNS_SIZE };
    g_autofree char *fifo = NULL;
    SparseGuests pair;

    if (!sparse_begin(&pair, &row, &multifd, &short_runs)) {
        return;
    }
    migrate_set_capability(pair.from, "pause-before-switchover", true);
    /* Some packets at a time, with a tenth of a second between them */
    migrate_set_parameter_int(pair.from, "max-bandwidth", 4 * KiB);
    migrate_set_parameter_int(pair.from, "downtime-limit", 1);
    migrate_incoming_qmp(pair.to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_qmp(pair.from, pair.to, NULL, NULL, "{}");
    wait_for_migration_status(pair.from, "active", NULL);
    while (!read_ram_property_int(pair.from, "normal")) {
        g_usleep(1000);
    }

    /* Records of runs will be late */
    fifo = block_main_thread(pair.to);
    while (!read_ram_property_int(pair.from, "holes")) {
        g_usleep(1000);
    }
    migrate_set_parameter_int(pair.from, "avail-switchover-bandwidth",
                              1024 * GiB);
    migrate_set_parameter_int(pair.from, "downtime-limit", 60 * 1000);
    wait_for_migration_status(pair.from, "pre-switchover", NULL);
    for (uint64_t page = LEAD_PAGES; page < pair.src.pages; page++) {
        if (page % SHORT_RUN == SHORT_RUN / 2) {
            qtest_memset(pair.from, guest_address(page), 0xa5, 8);
        }
    }
    migrate_continue(pair.from, "pre-switchover");
    wait_for_migration_complete(pair.from);
    unblock_main_thread(pair.to, fifo);
    wait_for_migration_complete(pair.to);

    g_free(guest_ram_content(&pair.dst, &pair.src, NULL));
    sparse_end(&pair);
}

static void test_write_behind_run(const void *opaque)
{
    /* Each has its end where a run is the last that was sent, or a page is */
    for (int i = 0; i < 3; i++) {
        migrate_writing_behind_run();
    }
}

/* Capabilities with which this one has no effect */

typedef struct NoEffectCase {
    const char *name;
    const char *property;
} NoEffectCase;

static const NoEffectCase no_effect_cases[] = {
    { "mapped-ram", "mapped-ram" },
    { "background-snapshot", "x-background-snapshot" },
    { "x-colo", "x-colo" },
};

static bool try_capabilities(QTestState *who, const char *one, const char *two)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'migrate-set-capabilities',"
                           "'arguments': { 'capabilities': ["
                           "{ 'capability': %s, 'state': true },"
                           "{ 'capability': %s, 'state': true } ] } }",
                           one, two);
    bool done = qdict_haskey(rsp, "return");

    qobject_unref(rsp);
    return done;
}

static void test_no_effect_set(const void *opaque)
{
    const NoEffectCase *c = opaque;
    QTestState *who = qtest_init("-machine none");
    bool can_set = try_capabilities(who, c->name, c->name);

    if (!can_set) {
        g_test_skip("this QEMU or host does not have the other capability");
        qtest_quit(who);
        return;
    }
    /* While the other one is on, */
    migrate_set_capability(who, CAPABILITY, true);
    migrate_set_capability(who, CAPABILITY, false);
    migrate_set_capability(who, c->name, false);
    /* when both are set at the same time, */
    g_assert(try_capabilities(who, c->name, CAPABILITY));
    migrate_set_capability(who, c->name, false);
    /* and the other one while this one is on */
    migrate_set_capability(who, c->name, true);
    qtest_quit(who);

    who = qtest_initf("-machine none -global migration." CAPABILITY "=on "
                      "-global migration.%s=on", c->property);
    qtest_quit(who);
    who = qtest_init("-machine none -global migration." CAPABILITY "=on");
    migrate_set_capability(who, c->name, true);
    qtest_quit(who);
}

void lab_add_capability(void)
{
    sparse_add_rows(rows, ARRAY_SIZE(rows));
    lab_add_test("capability/multifd/write-behind-run", NULL,
                 test_write_behind_run);
    LAB_ADD_CASES("capability/no-effect/set/", no_effect_cases,
                  test_no_effect_set);
}
