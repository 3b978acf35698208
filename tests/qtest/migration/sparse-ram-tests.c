/*
 * QTest testcases for the migration capability sparse-ram
 *
 * With the capability, a run of zero pages that are holes is one record of the
 * stream.  These tests check that every page still arrives, that no side
 * allocates memory for it, and that the statistics count pages and not records.
 *
 * Most guests are stopped (-S).  Their RAM is prepared and examined through the
 * file behind it; what a guest would write meanwhile, qtest writes.
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
#ifdef CONFIG_GNUTLS
# include "crypto/tlscredspsk.h"
# include "tests/unit/crypto-tls-psk-helpers.h"
#endif
#include "qobject/qdict.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/sockets.h"
#include "qemu/units.h"

/* The pages that are written to during a migration; a prime number */
#define REWRITE_PAGES 12289

#define CAPABILITY "sparse-ram"
#define TLS_DIR "tls"

/* Large, so that what is sent for holes would show; little of it has data */
#define RUNS_SIZE (1 * GiB)
/* All of it is sent */
#define SMALL_SIZE (64 * MiB)
/* The guest of the framework needs 150 MiB */
#define LIVE_SIZE (256 * MiB)
#define IDLE_SIZE (64 * GiB)
#define SHORT_RUNS_SIZE (64 * MiB)

/* Of that one, in pages: data at its start, and from each data to the next */
#define LEAD_PAGES 8192
#define SHORT_RUN 16

/* What all but RAM may take in the main channel: devices, mostly */
#define MAX_OTHER_BYTES (512 * KiB)
/* Before Linux 6.5, a run is at most 2 MiB long: see cut_hole() */
#define MAX_IDLE_BYTES (2 * MiB)
#define MAX_IDLE_GROWTH (16 * MiB)

/* The record of a zero page; that of a run; the name in front of some */
#define ZERO_PAGE_BYTES (8 + 1)
#define ZERO_RUN_BYTES (8 + 1 + 8)
#define BLOCK_NAME_BYTES (1 + sizeof(BACKEND_ID) - 1)

/* What a run of populated pages has at least, but for the last one */
#define ZEROED_RUN_PAGES 64

typedef enum Mode {
    MODE_PRECOPY,
    MODE_XBZRLE,
    MODE_MULTIFD,
    MODE_MULTIFD_LEGACY,
    MODE_FILE,
    MODE_FD,
    MODE_POSTCOPY,      /* switched to before anything much was sent */
    MODE_PREEMPT,       /* the same */
    MODE_POSTCOPY_PASS, /* switched to when the first pass is over */
} Mode;

typedef struct CapabilityCase {
    /* Path below /migration/sparse/capability */
    const char *name;
    Mode mode;
    /* In bytes; RUNS_SIZE if 0 */
    uint64_t size;
    /* Both sides */
    const char *opts;
    /* The machine type, if it is not the newest one */
    const char *machine;
    /* One more capability, for both sides */
    const char *capability;
    /* The same, for the destination */
    const char *destination_capability;
    SparseBackend backend;
    bool no_zero_page_detection;
    bool tls;
    /* The source does not have the capability sparse-ram, and sends no runs */
    bool destination_only;
    /* All pages are populated and zero, instead of holes most of them */
    bool zeroed;
    /* Pages are written to while they are migrated */
    bool rewrite;
    /* A chunk of clear_bmap in target pages, where runs are cut; 0: default */
    uint64_t chunk_pages;
} CapabilityCase;

static const CapabilityCase capability_cases[] = {
    { .name = "precopy" },
    { .name = "xbzrle", .mode = MODE_XBZRLE },
    {
        .name = "multifd/flush-each-section",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=on",
    }, {
        .name = "multifd/flush-each-round",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=off",
    }, {
        .name = "multifd/legacy",
        .mode = MODE_MULTIFD_LEGACY,
    },
    { .name = "file", .mode = MODE_FILE },
    { .name = "fd", .mode = MODE_FD },
    { .name = "tls/precopy", .tls = true },
    { .name = "tls/multifd", .mode = MODE_MULTIFD, .tls = true },
    { .name = "tls/multifd-legacy", .mode = MODE_MULTIFD_LEGACY, .tls = true },
    { .name = "return-path", .capability = "return-path" },
    {
        .name = "validate-uuid",
        .opts = "-uuid 6f7b0d1c-4f1e-4a55-9d5b-0d6a6b1d1f27",
        .capability = "validate-uuid",
    },
    {
        .name = "destination-only/precopy",
        .size = SMALL_SIZE,
        .destination_only = true,
    }, {
        .name = "destination-only/multifd",
        .mode = MODE_MULTIFD,
        .size = SMALL_SIZE,
        .destination_only = true,
    },
#ifdef CONFIG_REPLICATION
    {
        /* It is the source that would start COLO */
        .name = "destination/x-colo",
        .destination_capability = "x-colo",
    },
#endif
    { .name = "machine/pc-q35-2.12", .machine = "pc-q35-2.12" },
    { .name = "machine/pc-q35-8.0", .machine = "pc-q35-8.0" },
    { .name = "machine/pc-q35-9.0", .machine = "pc-q35-9.0" },
    {
        /* Flushes each section, and finds zero pages in the main thread */
        .name = "machine/pc-q35-8.0/multifd",
        .mode = MODE_MULTIFD,
        .machine = "pc-q35-8.0",
    }, {
        .name = "machine/pc-q35-9.0/multifd",
        .mode = MODE_MULTIFD,
        .machine = "pc-q35-9.0",
    }, {
        .name = "clear-bitmap-shift",
        .opts = "-global migration.x-clear-bitmap-shift=6",
        .chunk_pages = 1 << 6,
    },
    {
        .name = "hugetlb",
        .size = HUGETLB_SIZE,
        .backend = BACKEND_HUGETLB,
    },
    {
        .name = "no-zero-page-detection",
        .size = SMALL_SIZE,
        .no_zero_page_detection = true,
    },

    /* Runs of pages that are no holes, and are read to find out */
    { .name = "zeroed/precopy", .size = LIVE_SIZE, .zeroed = true },
    {
        .name = "zeroed/xbzrle",
        .mode = MODE_XBZRLE,
        .size = LIVE_SIZE,
        .zeroed = true,
    }, {
        .name = "zeroed/multifd-legacy",
        .mode = MODE_MULTIFD_LEGACY,
        .size = LIVE_SIZE,
        .zeroed = true,
    }, {
        /* Found by the threads, and sent in their packets */
        .name = "zeroed/multifd",
        .mode = MODE_MULTIFD,
        .size = LIVE_SIZE,
        .zeroed = true,
    }, {
        .name = "zeroed/clear-bitmap-shift",
        .size = LIVE_SIZE,
        .opts = "-global migration.x-clear-bitmap-shift=6",
        .zeroed = true,
    },

    /* Holes become data and data zero while they are on their way */
    { .name = "rewrite/precopy", .rewrite = true },
    { .name = "rewrite/xbzrle", .mode = MODE_XBZRLE, .rewrite = true },
    {
        .name = "rewrite/multifd/flush-each-section",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=on",
        .rewrite = true,
    }, {
        .name = "rewrite/multifd/flush-each-round",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=off",
        .rewrite = true,
    }, {
        .name = "rewrite/multifd/legacy",
        .mode = MODE_MULTIFD_LEGACY,
        .rewrite = true,
    }, {
        .name = "rewrite/zeroed",
        .size = LIVE_SIZE,
        .zeroed = true,
        .rewrite = true,
    }, {
        .name = "rewrite/zeroed-xbzrle",
        .mode = MODE_XBZRLE,
        .size = LIVE_SIZE,
        .zeroed = true,
        .rewrite = true,
    },
};

static const CapabilityCase postcopy_cases[] = {
    {
        .name = "postcopy/at-once",
        .mode = MODE_POSTCOPY,
        .size = SMALL_SIZE,
    }, {
        .name = "postcopy/at-once-preempt",
        .mode = MODE_PREEMPT,
        .size = SMALL_SIZE,
    }, {
        .name = "postcopy/hugetlb",
        .mode = MODE_POSTCOPY,
        .size = HUGETLB_SIZE,
        .backend = BACKEND_HUGETLB,
    }, {
        .name = "postcopy/tls",
        .mode = MODE_POSTCOPY,
        .size = SMALL_SIZE,
        .tls = true,
    }, {
        /* Another way to connect the preempt channel */
        .name = "postcopy/machine/pc-q35-7.1/preempt",
        .mode = MODE_PREEMPT,
        .size = SMALL_SIZE,
        .machine = "pc-q35-7.1",
    }, {
        .name = "postcopy/after-first-pass",
        .mode = MODE_POSTCOPY_PASS,
        .size = SMALL_SIZE,
        .rewrite = true,
    }, {
        .name = "destination-only/postcopy",
        .mode = MODE_POSTCOPY,
        .size = SMALL_SIZE,
        .destination_only = true,
    },
};

static const char *tmpfs;

/*
 * The first pages vary from one to the next.  After them there are holes that
 * are long enough to be cut, and one that ends where the block does.
 */
static uint8_t *runs_pattern_new(uint64_t pages)
{
    uint8_t *kinds = sparse_pattern_new(PATTERN_MIXED, pages);

    for (uint64_t page = 4096; page < pages; page++) {
        switch (page % 4099) {
        case 1:
            kinds[page] = PAGE_DATA;
            break;
        case 2:
            kinds[page] = PAGE_ZERO;
            break;
        default:
            kinds[page] = PAGE_HOLE;
            break;
        }
    }
    return kinds;
}

static uint64_t count_kind(const uint8_t *kinds, uint64_t pages, PageKind kind)
{
    uint64_t count = 0;

    for (uint64_t page = 0; page < pages; page++) {
        count += kinds[page] == kind;
    }
    return count;
}

/*
 * Compare both sides.  If pages have been rewritten on the way, they are what
 * they are on the source.
 *
 * Returns the pages that are not zero.
 */
static unsigned long *check_content(const GuestPair *pair, const uint8_t *kinds,
                                    bool rewritten)
{
    uint64_t pages = guest_ram_pages(&pair->src);
    g_autofree uint8_t *unknown = g_new0(uint8_t, pages);

    if (!rewritten) {
        guest_ram_check_pattern(&pair->src, kinds);
    }
    return guest_ram_check_content(&pair->src, &pair->dst,
                                   rewritten ? unknown : kinds, 0, pages);
}

/* The destination has memory for each page of data, and for no other one */
static void check_destination_allocation(const GuestRam *dst,
                                         const unsigned long *data)
{
    if (guest_ram_allocation_unit(dst) != dst->page_size) {
        g_test_message("allocation not compared: the kernel uses huge pages "
                       "for shared memory");
        return;
    }
    g_assert_cmpuint(guest_ram_allocated_bytes(dst), ==,
                     bitmap_count_one(data, guest_ram_pages(dst)) *
                     dst->page_size);
    if (dst->backend != BACKEND_HUGETLB) {
        g_autofree unsigned long *allocated = guest_ram_allocated_pages(dst);

        g_assert(bitmap_equal(allocated, data, guest_ram_pages(dst)));
    }
}

/* The number of runs of pages that are holes */
static uint64_t count_holes(const uint8_t *kinds, uint64_t pages)
{
    uint64_t holes = 0;

    for (uint64_t page = 0; page < pages; page++) {
        holes += kinds[page] == PAGE_HOLE &&
                 (page == 0 || kinds[page - 1] != PAGE_HOLE);
    }
    return holes;
}

/* Migrating */

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

static void run_precopy(const CapabilityCase *c, QTestState *from,
                        QTestState *to, const char *uri)
{
    unsigned round = 0;

    if (c->rewrite) {
        /* So that the last round can be waited for, and some others come */
        migrate_set_capability(from, "pause-before-switchover", true);
        migrate_set_parameter_int(from, "max-bandwidth", 32 * MiB);
        migrate_set_parameter_int(from, "downtime-limit", 1);
    } else {
        migrate_ensure_converge(from);
    }
    migrate_qmp(from, to, uri, NULL, "{}");
    if (c->rewrite) {
        g_autofree char *status = NULL;

        do {
            rewrite_pages(from, round++);
            g_free(status);
            status = migrate_query_status(from);
        } while (g_strcmp0(status, "pre-switchover") != 0 &&
                 get_migration_pass(from) < 4);
        migrate_ensure_converge(from);
        wait_for_migration_status(from, "pre-switchover", NULL);
        rewrite_pages(from, round++);
        g_test_message("rewritten %u times, pass %" PRIu64, round,
                       get_migration_pass(from));
        migrate_continue(from, "pre-switchover");
    }
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
}

static void run_file(QTestState *from, QTestState *to)
{
    g_autofree char *path = g_strdup_printf("%s/" FILE_TEST_FILENAME, tmpfs);
    g_autofree char *uri = g_strdup_printf("file:%s", path);

    migrate_ensure_converge(from);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_complete(from);
    migrate_incoming_qmp(to, uri, NULL, "{}");
    wait_for_migration_complete(to);
}

static void send_fd(QTestState *who, int fd)
{
    qtest_qmp_fds_assert_success(who, &fd, 1,
                                 "{ 'execute': 'getfd',"
                                 "  'arguments': { 'fdname': 'fd-mig' }}");
    close(fd);
}

static void run_fd(const CapabilityCase *c, QTestState *from, QTestState *to)
{
    int sockets[2];

    g_assert_cmpint(qemu_socketpair(PF_LOCAL, SOCK_STREAM, 0, sockets), ==, 0);
    send_fd(from, sockets[0]);
    send_fd(to, sockets[1]);
    migrate_incoming_qmp(to, "fd:fd-mig", NULL, "{}");
    run_precopy(c, from, to, "fd:fd-mig");
}

/* TLS with a key that both sides know, and read when they need it */
static void set_tls(QTestState *from, QTestState *to)
{
#ifdef CONFIG_GNUTLS
    g_autofree char *dir = g_strdup_printf("%s/" TLS_DIR, tmpfs);
    g_autofree char *file = g_strdup_printf("%s/" QCRYPTO_TLS_CREDS_PSKFILE,
                                            dir);

    g_assert_cmpint(g_mkdir_with_parents(dir, 0700), ==, 0);
    test_tls_psk_init(file);
    qtest_qmp_assert_success(from, "{ 'execute': 'object-add', 'arguments': {"
                             "'qom-type': 'tls-creds-psk', 'id': 'tls0',"
                             "'endpoint': 'client', 'dir': %s,"
                             "'username': 'qemu' } }", dir);
    qtest_qmp_assert_success(to, "{ 'execute': 'object-add', 'arguments': {"
                             "'qom-type': 'tls-creds-psk', 'id': 'tls0',"
                             "'endpoint': 'server', 'dir': %s } }", dir);
    migrate_set_parameter_str(from, "tls-creds", "tls0");
    migrate_set_parameter_str(to, "tls-creds", "tls0");
#else
    g_assert_not_reached();
#endif
}

static void remove_tls_key(void)
{
#ifdef CONFIG_GNUTLS
    g_autofree char *dir = g_strdup_printf("%s/" TLS_DIR, tmpfs);
    g_autofree char *file = g_strdup_printf("%s/" QCRYPTO_TLS_CREDS_PSKFILE,
                                            dir);

    test_tls_psk_cleanup(file);
    rmdir(dir);
#endif
}

/*
 * Write until a later pass.  Returns whether the migration is still going on:
 * on a busy host all may have been sent before the test looks.
 */
static bool rewrite_after_pass(QTestState *from)
{
    g_autofree char *status = NULL;
    unsigned round = 0;

    while (get_migration_pass(from) < 2) {
        rewrite_pages(from, round++);
    }
    /* From here on it cannot come to its end, and no write is too late */
    migrate_set_parameter_int(from, "max-bandwidth", 4 * KiB);
    rewrite_pages(from, round);
    status = migrate_query_status(from);
    return g_str_equal(status, "active");
}

/* Returns whether there was a postcopy */
static bool run_postcopy(const CapabilityCase *c, QTestState *from,
                         QTestState *to)
{
    bool after_pass = c->mode == MODE_POSTCOPY_PASS;

    /* So slowly that it cannot be over before the switch */
    migrate_set_parameter_int(from, "max-bandwidth",
                              after_pass ? 8 * MiB : 4 * KiB);
    migrate_set_parameter_int(from, "downtime-limit", 1);
    migrate_qmp(from, to, NULL, NULL, "{}");
    if (!after_pass) {
        wait_for_migration_status(from, "active", NULL);
    } else if (!rewrite_after_pass(from)) {
        return false;
    }
    qtest_qmp_assert_success(from, "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
    return true;
}

/* Returns whether what is to be tested has happened */
static bool migrate_case(const CapabilityCase *c, QTestState *from,
                         QTestState *to)
{
    migrate_set_capability(from, CAPABILITY, !c->destination_only);
    migrate_set_capability(to, CAPABILITY, true);
    if (c->capability) {
        migrate_set_both_capability(from, to, c->capability);
    }
    if (c->destination_capability) {
        migrate_set_capability(to, c->destination_capability, true);
    }
    if (c->tls) {
        set_tls(from, to);
    }
    if (c->no_zero_page_detection) {
        migrate_set_parameter_str(from, "zero-page-detection", "none");
    }

    switch (c->mode) {
    case MODE_FILE:
        run_file(from, to);
        return true;
    case MODE_FD:
        run_fd(c, from, to);
        return true;
    case MODE_MULTIFD:
    case MODE_MULTIFD_LEGACY:
        migrate_set_multifd(from, to);
        migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
        if (c->mode == MODE_MULTIFD_LEGACY) {
            migrate_set_parameter_str(from, "zero-page-detection", "legacy");
        }
        run_precopy(c, from, to, NULL);
        return true;
    case MODE_XBZRLE:
        migrate_set_parameter_int(from, "xbzrle-cache-size", 32 * MiB);
        migrate_set_both_capability(from, to, "xbzrle");
        break;
    case MODE_PREEMPT:
    case MODE_POSTCOPY:
    case MODE_POSTCOPY_PASS:
        migrate_set_both_capability(from, to, "postcopy-ram");
        if (c->mode == MODE_PREEMPT) {
            migrate_set_both_capability(from, to, "postcopy-preempt");
        }
        migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
        return run_postcopy(c, from, to);
    default:
        break;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    run_precopy(c, from, to, NULL);
    return true;
}

/* Each hole is counted once, and takes next to nothing in the stream */
static void check_statistics(const CapabilityCase *c, QTestState *from,
                             const GuestRam *src, const uint8_t *kinds,
                             const unsigned long *before)
{
    uint64_t target_pages = src->page_size / qemu_real_host_page_size();
    uint64_t pages = guest_ram_pages(src);
    uint64_t runs = count_holes(kinds, pages);
    uint64_t holes = read_ram_property_int(from, "holes");
    uint64_t duplicate = read_ram_property_int(from, "duplicate");
    uint64_t normal = read_ram_property_int(from, "normal");
    uint64_t transferred = read_ram_property_int(from, "transferred");
    uint64_t page_bytes = qemu_real_host_page_size();
    uint64_t hole_pages, run_bytes;
    /* Otherwise the multifd threads find them */
    bool zero_runs = c->zeroed && c->mode != MODE_MULTIFD;

    g_test_message("%" PRIu64 " normal, %" PRIu64 " duplicate, %" PRIu64
                   " holes in %" PRIu64 " runs, %" PRIu64 " bytes",
                   normal, duplicate, holes, runs, transferred);

    if (before) {
        hole_pages = pages - bitmap_count_one(before, pages);
    } else {
        /* A huge page that QEMU has not mapped is one if it reads as zero */
        hole_pages = (pages - count_kind(kinds, pages, PAGE_DATA)) *
                     target_pages;
    }
    g_assert_cmpuint(holes, ==, hole_pages);
    if (c->no_zero_page_detection) {
        /* Holes need none */
        g_assert_cmpuint(duplicate, ==, holes);
        g_assert_cmpuint(runs, >, 0);
        return;
    }
    g_assert_cmpuint(duplicate, >=, holes);
    if (c->chunk_pages) {
        runs += pages / c->chunk_pages;
    }
    if (zero_runs) {
        /* All of them; there are no single pages */
        runs = pages / ZEROED_RUN_PAGES;
        holes = duplicate;
    }
    run_bytes = runs * (ZERO_RUN_BYTES + BLOCK_NAME_BYTES);
    if (c->destination_only) {
        run_bytes = holes * ZERO_PAGE_BYTES;
        g_assert_cmpuint(transferred, >, run_bytes);
    }
    if (c->mode == MODE_MULTIFD || c->mode == MODE_MULTIFD_LEGACY) {
        /*
         * Not what the other channels take: each section of the main one can
         * mean a packet on all of them, and how many sections there are depends
         * on the time.
         */
        transferred -= read_ram_property_int(from, "multifd-bytes");
        normal = 0;
    }
    /*
     * 16: what goes with a page.  Single zero pages of the block have no name
     * in front of them.
     */
    g_assert_cmpuint(transferred, <, normal * (page_bytes + 16) +
                     (duplicate - holes) * ZERO_PAGE_BYTES +
                     run_bytes + MAX_OTHER_BYTES);
    if (before && !c->chunk_pages && zero_runs == c->zeroed &&
        !c->destination_only) {
        /* So that the limit above is one that single records would break */
        g_assert_cmpuint(holes * ZERO_PAGE_BYTES, >,
                         run_bytes + MAX_OTHER_BYTES);
    }
}

/* Returns why the test cannot run here, or NULL */
static const char *skip_reason(const CapabilityCase *c)
{
    if (c->machine && !qtest_has_machine(c->machine)) {
        return "QEMU does not have this machine type";
    }
#ifndef CONFIG_GNUTLS
    if (c->tls) {
        return "QEMU is built without gnutls, and so without TLS";
    }
#endif
    return sparse_backend_skip_reason(c->backend);
}

static void test_capability(const void *opaque)
{
    const CapabilityCase *c = opaque;
    const char *reason = skip_reason(c);
    bool postcopy = c->mode >= MODE_POSTCOPY;
    g_autofree char *opts = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_autofree unsigned long *data = NULL;
    g_auto(GuestRamState) before = { };
    GuestPair pair;

    if (reason) {
        g_test_skip(reason);
        return;
    }
    opts = g_strdup_printf("%s%s %s", c->machine ? "-machine type=" : "",
                           c->machine ? c->machine : "",
                           c->opts ? c->opts : "");
    if (!guest_pair_start(&pair, c->backend, c->size ? c->size : RUNS_SIZE,
                          opts, NULL)) {
        return;
    }
    kinds = c->zeroed
        ? sparse_pattern_new(PATTERN_ZEROED, guest_ram_pages(&pair.src))
        : runs_pattern_new(guest_ram_pages(&pair.src));
    guest_ram_prepare(&pair.src, kinds);
    guest_ram_state_take(&before, &pair.src);

    if (!migrate_case(c, pair.from, pair.to)) {
        g_test_skip("the host is too busy: all was sent before the test "
                    "looked");
        guest_pair_end(&pair);
        return;
    }

    if (!c->rewrite) {
        g_auto(GuestRamState) after = { };

        /* Looking at a hole of the source must not have filled it */
        guest_ram_state_take(&after, &pair.src);
        guest_ram_check_growth(&pair.src, &before, &after, RAM_KEPT, 0,
                               guest_ram_pages(&pair.src));
    }
    if (!c->rewrite && !postcopy) {
        check_statistics(c, pair.from, &pair.src, kinds, before.pages);
    }
    data = check_content(&pair, kinds, c->rewrite);
    /* After the switch, UFFDIO_ZEROPAGE allocates pages of shared memory */
    if (!postcopy && !c->no_zero_page_detection) {
        check_destination_allocation(&pair.dst, data);
    }

    guest_pair_end(&pair);
    if (c->tls) {
        remove_tls_key();
    }
}

/*
 * Data first, which takes a second at the least bandwidth, then short holes
 * with a page of data between each two, so that packets of multifd get full.
 */
static uint8_t *short_runs_pattern_new(uint64_t pages)
{
    uint8_t *kinds = g_new(uint8_t, pages);

    for (uint64_t page = 0; page < pages; page++) {
        kinds[page] = page < LEAD_PAGES || page % SHORT_RUN == 0 ? PAGE_DATA
                                                                 : PAGE_HOLE;
    }
    return kinds;
}

/*
 * Have the main thread of a QEMU wait, in fopen(), until a FIFO is opened.
 * Returns what to open.
 */
static char *block_main_thread(QTestState *who)
{
    char *fifo = g_strdup_printf("%s/fifo", tmpfs);

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
    g_autofree uint8_t *kinds = NULL;
    g_autofree char *fifo = NULL;
    uint64_t pages;
    GuestPair pair;

    if (!guest_pair_start(&pair, BACKEND_MEMFD, SHORT_RUNS_SIZE, NULL, NULL)) {
        return;
    }
    pages = guest_ram_pages(&pair.src);
    kinds = short_runs_pattern_new(pages);
    guest_ram_prepare(&pair.src, kinds);

    migrate_set_both_capability(pair.from, pair.to, CAPABILITY);
    migrate_set_multifd(pair.from, pair.to);
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
    for (uint64_t page = LEAD_PAGES; page < pages; page++) {
        if (page % SHORT_RUN == SHORT_RUN / 2) {
            qtest_memset(pair.from, guest_address(page), 0xa5, 8);
        }
    }
    migrate_continue(pair.from, "pre-switchover");
    wait_for_migration_complete(pair.from);
    unblock_main_thread(pair.to, fifo);
    wait_for_migration_complete(pair.to);

    g_free(check_content(&pair, kinds, true));
    guest_pair_end(&pair);
}

static void test_write_behind_run(void)
{
    /* Each has its end where a run is the last that was sent, or a page is */
    for (int i = 0; i < 3; i++) {
        migrate_writing_behind_run();
    }
}

static void test_idle(void)
{
    uint64_t src_before, dst_before, transferred;
    GuestPair pair;

    if (!guest_pair_start(&pair, BACKEND_MEMFD, IDLE_SIZE, NULL, NULL)) {
        return;
    }
    src_before = guest_ram_allocated_bytes(&pair.src);
    dst_before = guest_ram_allocated_bytes(&pair.dst);

    migrate_case(&(CapabilityCase) { }, pair.from, pair.to);

    transferred = read_ram_property_int(pair.from, "transferred");
    g_test_message("%" PRIu64 " bytes for %" PRIu64 " holes", transferred,
                   read_ram_property_int(pair.from, "holes"));
    g_assert_cmpuint(transferred, <, MAX_IDLE_BYTES);
    g_assert_cmpuint(read_ram_property_int(pair.from, "holes"), ==,
                     (IDLE_SIZE - src_before) / qemu_real_host_page_size());
    g_assert_cmpuint(guest_ram_allocated_bytes(&pair.src), <=,
                     src_before + MAX_IDLE_GROWTH);
    g_assert_cmpuint(guest_ram_allocated_bytes(&pair.dst), <=,
                     dst_before + MAX_IDLE_GROWTH);

    guest_pair_end(&pair);
}

/*
 * The guest runs, and the framework looks at what it finds on the destination.
 * It also touches what arrived as a hole before the switch, which the source
 * does not send again.
 */

static void *start_hook_capability(QTestState *from, QTestState *to)
{
    migrate_set_both_capability(from, to, CAPABILITY);
    return NULL;
}

static void *start_hook_preempt(QTestState *from, QTestState *to)
{
    migrate_set_both_capability(from, to, "postcopy-ram");
    migrate_set_both_capability(from, to, "postcopy-preempt");
    return start_hook_capability(from, to);
}

static void test_postcopy_live(bool preempt, bool recovery)
{
    const GuestRam ram = { .backend = BACKEND_MEMFD, .size = LIVE_SIZE };
    g_autofree char *opts = guest_ram_opts(&ram, NULL);
    MigrateCommon args = {
        .start.opts_source = opts,
        .start.opts_target = opts,
        .start_hook = preempt ? start_hook_preempt : start_hook_capability,
    };

    if (recovery) {
        test_postcopy_recovery_common(&args);
    } else {
        test_postcopy_common(&args);
    }
}

static void test_postcopy_live_plain(void)
{
    test_postcopy_live(false, false);
}

static void test_postcopy_live_preempt(void)
{
    test_postcopy_live(true, false);
}

static void test_postcopy_live_recovery(void)
{
    test_postcopy_live(false, true);
}

static void test_source_only(void)
{
    const char *ungoals[] = { "completed", NULL };
    g_autofree char *stderr_path = g_strdup_printf("%s/dest_stderr", tmpfs);
    g_autofree char *redirection = g_strdup_printf("2>%s", stderr_path);
    g_autofree char *text = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_auto(GuestRamState) before = { }, after = { };
    GuestPair pair;

    if (!guest_pair_start(&pair, BACKEND_MEMFD, SMALL_SIZE, NULL,
                          redirection)) {
        return;
    }
    kinds = runs_pattern_new(guest_ram_pages(&pair.src));
    guest_ram_prepare(&pair.src, kinds);
    guest_ram_state_take(&before, &pair.src);

    migrate_set_capability(pair.from, CAPABILITY, true);
    migrate_incoming_qmp(pair.to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_set_parameter_int(pair.from, "max-bandwidth", 4 * KiB);
    migrate_qmp(pair.from, pair.to, NULL, NULL, "{}");
    wait_for_migration_status(pair.from, "failed", ungoals);
    qtest_set_expected_status(pair.to, EXIT_FAILURE);
    qtest_wait_qemu(pair.to);

    text = take_stderr(stderr_path);
    g_assert(strstr(text, CAPABILITY));
    g_assert(strstr(text, "is off"));

    /* The source has lost nothing, and can go on */
    guest_ram_state_take(&after, &pair.src);
    guest_ram_check_growth(&pair.src, &before, &after, RAM_KEPT, 0,
                           guest_ram_pages(&pair.src));
    guest_ram_check_pattern(&pair.src, kinds);
    qtest_qmp_assert_success(pair.from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(pair.from, "{ 'execute': 'stop' }");

    guest_pair_end(&pair);
}

/* Capabilities with which this one has no effect */

typedef struct NoEffectCase {
    const char *name;
    const char *property;
    /* Otherwise the source has it */
    bool both_sides;
    bool file;
} NoEffectCase;

static const NoEffectCase no_effect_cases[] = {
    { "mapped-ram", "mapped-ram", .both_sides = true, .file = true },
    { "background-snapshot", "x-background-snapshot", .file = true },
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

static void migrate_no_effect(const NoEffectCase *c, bool source,
                              bool destination)
{
    g_autofree uint8_t *kinds = NULL;
    GuestPair pair;

    if (!guest_pair_start(&pair, BACKEND_MEMFD, SMALL_SIZE, NULL, NULL)) {
        return;
    }
    /* QEMU can take no background snapshot of a guest that was never started */
    qtest_qmp_assert_success(pair.from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(pair.from, "{ 'execute': 'stop' }");
    /* Its firmware may have written something */
    guest_ram_punch(&pair.src);
    kinds = runs_pattern_new(guest_ram_pages(&pair.src));
    guest_ram_prepare(&pair.src, kinds);

    if (migrate_try_capability(pair.from, c->name)) {
        migrate_set_capability(pair.to, c->name, c->both_sides);
        migrate_set_capability(pair.from, CAPABILITY, source);
        migrate_set_capability(pair.to, CAPABILITY, destination);
        run_file(pair.from, pair.to);
        g_free(check_content(&pair, kinds, false));
    }
    guest_pair_end(&pair);
}

/* It makes no difference which side has it */
static void test_no_effect_file(const void *opaque)
{
    migrate_no_effect(opaque, true, false);
    migrate_no_effect(opaque, false, true);
    migrate_no_effect(opaque, true, true);
}

static void add_cases(const CapabilityCase *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        g_autofree char *path =
            g_strdup_printf("/migration/sparse/capability/%s", cases[i].name);

        qtest_add_data_func(path, &cases[i], test_capability);
    }
}

static void add_no_effect_case(const NoEffectCase *c)
{
    g_autofree char *set =
        g_strdup_printf("/migration/sparse/capability/no-effect/%s/set",
                        c->name);
    g_autofree char *file =
        g_strdup_printf("/migration/sparse/capability/no-effect/%s/file",
                        c->name);

    qtest_add_data_func(set, c, test_no_effect_set);
    if (c->file) {
        qtest_add_data_func(file, c, test_no_effect_file);
    }
}

#define LIVE_PREFIX "/migration/sparse/capability/postcopy/live/"

void migration_test_add_sparse_ram(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    add_cases(capability_cases, ARRAY_SIZE(capability_cases));
    if (env->has_uffd) {
        add_cases(postcopy_cases, ARRAY_SIZE(postcopy_cases));
    }
    if (sizeof(void *) > 4) {
        migration_test_add("/migration/sparse/capability/idle", test_idle);
    }
    migration_test_add("/migration/sparse/capability/multifd/write-behind-run",
                       test_write_behind_run);
    migration_test_add("/migration/sparse/capability/source-only",
                       test_source_only);
    for (size_t i = 0; i < ARRAY_SIZE(no_effect_cases); i++) {
        add_no_effect_case(&no_effect_cases[i]);
    }
    if (env->full_set && env->has_uffd) {
        migration_test_add(LIVE_PREFIX "plain", test_postcopy_live_plain);
        migration_test_add(LIVE_PREFIX "preempt", test_postcopy_live_preempt);
        migration_test_add(LIVE_PREFIX "recovery", test_postcopy_live_recovery);
    }
}
