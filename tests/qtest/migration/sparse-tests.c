/*
 * QTest testcases for sparse guest RAM
 *
 * Guest RAM that is a shared mapping of a memfd or a tmpfs file has no zero
 * page: reading an untouched page allocates it.  These tests check that a
 * migration brings every page over, that it allocates nothing on the source,
 * and that what was a hole or a zero page there is not allocated on the
 * destination afterwards.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-util.h"
#include "qobject/qdict.h"

/* Both sides are the same afterwards, whatever they have allocated */
#define CONTENT_ONLY { SPARSE_ANY, SPARSE_ANY, HOLES_ANY }

/* More than a small host has: neither side may allocate it */
#define IDLE_SIZE (8 * GiB)
#define RUNS_IDLE_SIZE (64 * GiB)
#define MAX_IDLE_GROWTH (16 * MiB)
/* Before Linux 6.5, a run is at most 2 MiB long */
#define MAX_IDLE_BYTES (2 * MiB)

/*
 * The a/b guest writes to each page from start_address to end_address; the
 * rest is for what the firmware does.
 */
#define LIVE_SIZE (256 * MiB)
#define MAX_LIVE_ALLOCATION (X86_TEST_MEM_END + 16 * MiB)

static const SparseWay none = {
    .name = "none/precopy", .parameters = { "zero-page-detection none" },
};

static const SparseWay file = { .name = "file/plain", SPARSE_FILE };

static const SparseWay postcopy_preempt = {
    .name = "postcopy/preempt", SPARSE_POSTCOPY,
    .capabilities = { "postcopy-ram", "postcopy-preempt" },
};

static const SparseWay postcopy_multifd = {
    .name = "postcopy/multifd", SPARSE_POSTCOPY,
    .capabilities = { "postcopy-ram", "multifd" },
};

static const SparseWay snapshot = { .name = "snapshot", SPARSE_SNAPSHOT };

static const SparseWay runs_multifd = {
    .name = "multifd", .capabilities = { "multifd", "sparse-ram" },
};

static const SparseWay runs_postcopy = {
    .name = "postcopy", SPARSE_POSTCOPY,
    .capabilities = { "postcopy-ram", "sparse-ram" },
};

static const SparseWay mapped_ram_multifd = {
    .name = "mapped-ram-multifd", SPARSE_FILE,
    .capabilities = { "mapped-ram", "multifd" },
};

/* A QEMU that fills the host is ended before it has done so */
static void watch_idle_guests(SparseGuests *guests)
{
    g_autofree char *status = NULL;

    do {
        g_assert_cmpuint(guest_ram_allocated_bytes(&guests->src), <=,
                         MAX_IDLE_GROWTH);
        g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), <=,
                         MAX_IDLE_GROWTH);
        g_free(status);
        status = migrate_query_status(guests->from);
        g_usleep(1000);
    } while (!g_str_equal(status, "completed"));
}

static void check_idle_bytes(SparseGuests *guests)
{
    g_assert_cmpuint(read_ram_property_int(guests->from, "transferred"), <,
                     MAX_IDLE_BYTES);
}

/* QEMU maps every other page that is populated */
static void map_populated_pages(SparseGuests *guests)
{
    uint64_t page, populated = 0;

    for (page = MiB / guests->src.page_size; page < guests->src.pages; page++) {
        if (guests->kinds[page] != PAGE_HOLE && populated++ % 2) {
            qtest_readb(guests->from, page * guests->src.page_size);
        }
    }
}

static void dump_elf(SparseGuests *guests)
{
    g_assert(sparse_try(guests->from, "dump-guest-memory %s", guests->file));
}

static void dump_kdump(SparseGuests *guests)
{
    g_assert(sparse_try(guests->from, "dump-guest-memory -z %s", guests->file));
}

/* Page sampling hashes pages all over the memory, holes included */
static void measure_dirty_rate(SparseGuests *guests)
{
    QDict *rsp = NULL;

    qtest_qmp_assert_success(guests->from, "{ 'execute': 'calc-dirty-rate',"
                             "'arguments': { 'calc-time': 100,"
                             "'calc-time-unit': 'millisecond',"
                             "'sample-pages': 4096 } }");
    do {
        g_usleep(10 * 1000);
        qobject_unref(rsp);
        rsp = qtest_qmp_assert_success_ref(guests->from,
                                           "{ 'execute': 'query-dirty-rate' }");
    } while (!g_str_equal(qdict_get_str(rsp, "status"), "measured"));
    g_assert_cmpint(qdict_get_int(rsp, "dirty-rate"), ==, 0);
    qobject_unref(rsp);
}

/* A CPU that has been reset takes physical addresses, so that both do */
static void save_memory(SparseGuests *guests)
{
    static const char *const commands[] = { "memsave", "pmemsave" };
    const GuestRam *ram = &guests->src;
    uint64_t first = 2 * MiB / ram->page_size, size = 16 * MiB, at;
    g_autofree uint64_t *page = g_malloc(ram->page_size);
    int i;

    for (i = 0; i < ARRAY_SIZE(commands); i++) {
        g_autofree char *saved = NULL;

        g_assert(sparse_try(guests->from, "%s %d %d \"%s\"", commands[i],
                            (int)(2 * MiB), (int)size, guests->file));
        g_assert(g_file_get_contents(guests->file, &saved, NULL, NULL));
        for (at = 0; at < size; at += ram->page_size) {
            sparse_pattern_page(page, guests->kinds, first + at /
                                ram->page_size, ram->page_size);
            g_assert(memcmp(saved + at, page, ram->page_size) == 0);
        }
    }
    /* Not at a page boundary */
    g_assert(sparse_try(guests->from, "pmemsave %d %d \"%s\"",
                        (int)(20 * MiB + 0x333), (int)size, guests->file));
    g_free(qtest_hmp(guests->from, "xp /8192gx 0x%x", (int)(40 * MiB)));
    g_free(qtest_hmp(guests->from, "x /8192gx 0x%x", (int)(50 * MiB)));
}

static const SparseRow rows[] = {
    /* Fixes: a page that arrives as zero for the first time has old data */
    {
        .name = "content/%w/%p", .ways = { &sparse_multifd },
        .stale = true, .expect = CONTENT_ONLY,
    },

    /* Core */
    {
        .name = "memfd/idle/%w/%p", .size = IDLE_SIZE,
        .patterns = { &sparse_empty },
        .ways = { &sparse_precopy, &sparse_multifd },
        .during = watch_idle_guests,
    }, {
        .name = "memfd/plain/%w/%p",
        .ways = { &sparse_precopy, &sparse_multifd },
    }, {
        /* A file that is not QEMU's own is not given back */
        .name = "shm-file/stale/%w/%p", .backend = &sparse_shm_file,
        .ways = { &sparse_precopy, &sparse_multifd },
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "memfd/prealloc/%w/%p",
        .ways = { &sparse_precopy, &sparse_multifd },
        .dst_object = ",prealloc=on", .expect.dst = SPARSE_FULL,
    }, {
        .name = "memfd/off/%w/%p",
        .opts = "-global migration.x-ram-holes=off",
        .expect = { SPARSE_GROWS, SPARSE_FULL, HOLES_NOT_COUNTED },
    }, {
        /* Holes do not have to be detected */
        .name = "modes/%w", .ways = { &none }, .expect.dst = SPARSE_ANY,
    },
    { .name = "modes/%w", .ways = { &file }, .expect.sparse_file = true },

    /* Punch */
    {
        .name = "memfd/stale/%w/%p",
        .ways = { &sparse_precopy, &sparse_multifd }, .stale = true,
    },

    /* Postcopy */
    { .name = "modes/%w/plain", .ways = { &sparse_postcopy } },
    { .name = "modes/%w", .ways = { &postcopy_preempt, &postcopy_multifd } },

    /* Huge pages */
    {
        .name = "hugetlb/plain/%w/%p", .backend = &sparse_hugetlb,
        .ways = { &sparse_precopy, &sparse_multifd },
    }, {
        .name = "modes/%w/hugetlb", .backend = &sparse_hugetlb,
        .ways = { &sparse_postcopy }, .expect.dst = SPARSE_ANY,
    },

    /* Readers */
    {
        .name = "modes/%w/plain", .ways = { &snapshot },
        .prepare = map_populated_pages, .expect.sparse_file = true,
    }, {
        .name = "modes/dump/elf-empty", .patterns = { &sparse_empty },
        .act = dump_elf, .expect.sparse_file = true,
    }, {
        .name = "modes/dump/kdump-zlib",
        .act = dump_kdump, .expect.sparse_file = true,
    },
    { .name = "modes/dirty-rate/memfd", .act = measure_dirty_rate },
    { .name = "modes/debuggers", .act = save_memory },

    /* Runs: the capability sparse-ram */
    { .name = "runs/%w/%p", .ways = { &runs_multifd, &runs_postcopy } },
    {
        .name = "capability/idle", .size = RUNS_IDLE_SIZE,
        .patterns = { &sparse_empty }, .ways = { &sparse_runs },
        .during = watch_idle_guests, .check = check_idle_bytes,
    },

    /* Files: what mapped-ram does not have, and private memory */
    {
        .name = "modes/file/%w",
        .ways = { &sparse_mapped_ram, &mapped_ram_multifd },
        .expect.sparse_file = true,
    }, {
        .name = "file/memfd/stale/%w",
        .ways = { &sparse_mapped_ram, &mapped_ram_multifd }, .stale = true,
    }, {
        /* The file that it maps, which can be a template, must not grow */
        .name = "template/%w", .src_backend = &sparse_memfd_private,
        .ways = { &sparse_precopy, &sparse_multifd, &sparse_mapped_ram },
        .expect.holes = HOLES_ANY,
    },
};

/* Guests that run: a page is sent as zero first, and with data later */

static void check_live_allocation(QTestState *from, QTestState *to,
                                  void *opaque)
{
    QTestState *sides[] = { from, to };
    int i;

    for (i = 0; i < ARRAY_SIZE(sides); i++) {
        GuestRam ram;

        guest_ram_init(&ram, &sparse_memfd, LIVE_SIZE);
        guest_ram_open(&ram, sides[i]);
        g_assert_cmpuint(guest_ram_allocated_bytes(&ram), <=,
                         MAX_LIVE_ALLOCATION);
        guest_ram_close(&ram);
    }
}

static void *start_multifd(QTestState *from, QTestState *to)
{
    migrate_set_capability(from, "multifd", true);
    migrate_set_capability(to, "multifd", true);
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    return NULL;
}

static void run_live(TestMigrateStartHook start_hook, bool postcopy)
{
    const GuestRam ram = { .backend = &sparse_memfd, .size = LIVE_SIZE };
    g_autofree char *opts = guest_ram_opts(&ram, NULL);
    MigrateCommon args = {
        .start.opts_source = opts,
        .start.opts_target = opts,
        .listen_uri = start_hook ? "defer" : "tcp:127.0.0.1:0",
        .start_hook = start_hook,
        .end_hook = check_live_allocation,
        .live = true,
    };

    if (postcopy) {
        test_postcopy_common(&args);
    } else {
        test_precopy_common(&args);
    }
}

static void test_live_precopy(void)
{
    run_live(NULL, false);
}

static void test_live_multifd(void)
{
    run_live(start_multifd, false);
}

static void test_live_postcopy(void)
{
    run_live(NULL, true);
}

void migration_test_add_sparse(MigrationTestEnv *env)
{
    sparse_env = env;
    /*
     * Which sizes a machine can have, and what its firmware writes to while
     * it is being reset, differ.  Only the x86 machines have been tried.
     */
    if (!env->is_x86) {
        return;
    }
    sparse_add_rows(rows, ARRAY_SIZE(rows));
    if (!env->full_set) {
        return;
    }
    migration_test_add("/migration/sparse/memfd/live/precopy",
                       test_live_precopy);
    migration_test_add("/migration/sparse/memfd/live/multifd",
                       test_live_multifd);
    if (env->has_uffd) {
        migration_test_add("/migration/sparse/memfd/live/postcopy",
                           test_live_postcopy);
    }
}
