/*
 * QTest testcases for sparse guest RAM: backends and ways to migrate
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/mman.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bitmap.h"
#include "sparse-lab.h"

#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 0x0002U
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* Neither side may allocate it; a QEMU that does is ended before */
#define IDLE_SIZE (8 * GiB)
#define FILE_IDLE_SIZE (1 * GiB)
#define MAX_IDLE_GROWTH (16 * MiB)
/* The page tables of FILE_IDLE_SIZE would be 2 MiB */
#define MAX_IDLE_TABLES (1 * MiB)

/*
 * COLO runs the guest on both sides as soon as its RAM has arrived.  Neither
 * the a/b guest nor the firmware writes to this part.
 */
#define COLO_SIZE (256 * MiB)
#define COLO_RANGE_START (128 * MiB)
#define COLO_RANGE_END (COLO_SIZE - 16 * MiB)

#define MULTIFD .capabilities = { "multifd" }
#define POSTCOPY .transport = SPARSE_POSTCOPY

static const SparseWay capability = {
    .name = "capability", .capabilities = { "sparse-ram" },
};
static const SparseWay none_multifd = {
    .name = "multifd", MULTIFD, .parameters = { "zero-page-detection none" },
};
static const SparseWay none_zlib = {
    .name = "multifd-zlib", MULTIFD,
    .parameters = { "zero-page-detection none", "multifd-compression zlib" },
};
static const SparseWay none_zstd = {
    .name = "multifd-zstd", MULTIFD,
    .parameters = { "zero-page-detection none", "multifd-compression zstd" },
};
static const SparseWay none_precopy = {
    .name = "precopy", .parameters = { "zero-page-detection none" },
};
static const SparseWay zlib = {
    .name = "multifd-zlib", MULTIFD,
    .parameters = { "multifd-compression zlib" },
};
static const SparseWay zstd = {
    .name = "multifd-zstd", MULTIFD,
    .parameters = { "multifd-compression zstd" },
};
static const SparseWay postcopy_multifd_legacy = {
    .name = "multifd-legacy", POSTCOPY,
    .capabilities = { "postcopy-ram", "multifd" },
    .parameters = { "zero-page-detection legacy" },
};
static const SparseWay postcopy_preempt_release = {
    .name = "preempt-release-ram", POSTCOPY,
    .capabilities = { "postcopy-ram", "postcopy-preempt", "release-ram" },
};
static const SparseWay mapped_ram_multifd_legacy = {
    .name = "mapped-ram-multifd-legacy", SPARSE_FILE,
    .capabilities = { "mapped-ram", "multifd" },
    .parameters = { "zero-page-detection legacy" },
};
static const SparseWay mapped_ram_multifd_none = {
    .name = "mapped-ram-multifd-none", SPARSE_FILE,
    .capabilities = { "mapped-ram", "multifd" },
    .parameters = { "zero-page-detection none" },
};

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

/* "info migrate" has what query-migrate has */
static void check_hmp(SparseGuests *guests)
{
    int64_t holes = read_ram_property_int(guests->from, "holes");
    g_autofree char *info = qtest_hmp(guests->from, "info migrate");
    g_autofree char *text = g_strdup_printf("(holes=%" PRId64 ")", holes);
    /* QEMU up to 10.0 has a line for each statistic */
    g_autofree char *line = g_strdup_printf("\nholes: %" PRId64 " pages\r",
                                            holes);

    g_assert(strstr(info, text) || strstr(info, line));
}

static const char *trace_skip_reason(void)
{
#ifdef CONFIG_TRACE_LOG
    return NULL;
#else
    return "QEMU is built without the log trace backend";
#endif
}

/*
 * A run of zero pages is one event.  An empty guest is one run, but for where
 * the stream or the stages of the migration cut it.
 */
static void check_few_holes(SparseGuests *guests)
{
    g_autofree char *log = sparse_log(guests);
    unsigned events = lab_count_lines(log, "ram_handle_zero_range", BACKEND_ID);

    g_test_message("%u events for %" PRIu64 " pages", events,
                   guests->dst.pages);
    g_assert_cmpuint(events, >, 0);
    g_assert_cmpuint(events, <, guests->dst.pages / 64);
    g_assert_cmpuint(lab_count_lines(log, BACKEND_ID, "hole"), ==, events);
}

static void reserve_destination(SparseGuests *guests)
{
    g_assert_no_errno(fallocate(guests->dst.fd, 0, guests->dst.start,
                                guests->dst.size));
}

static void make_destination_stale(SparseGuests *guests)
{
    lab_make_private_stale(&guests->dst);
}

/* Can 2 GiB be locked?  (QEMU locks more than the guest's RAM.) */
static const char *lock_skip_reason(void)
{
    bool can = false;
#ifdef MLOCK_ONFAULT
    size_t size = 2 * GiB;
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    g_assert(map != MAP_FAILED);
    can = mlock2(map, size, MLOCK_ONFAULT) == 0;
    munmap(map, size);
#endif
    return can ? NULL : "RLIMIT_MEMLOCK is below 2 GiB";
}

/* A file that refuses to be punched, and to be written, but by QEMU */
static int open_sealable(void)
{
    return memfd_create("qemu-sparse-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

static const char *seal_skip_reason(void)
{
    int fd = open_sealable();
    bool can = fd >= 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0;

    close(fd);
    return can ? NULL : "the kernel has no F_SEAL_FUTURE_WRITE";
}

static void seal_destination(SparseGuests *guests)
{
    g_assert_no_errno(fcntl(guests->dst.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
}

static const SparseBackend sealable = {
    .object = "memory-backend-file,share=on",
    .open_file = open_sealable,
    .skip_reason = seal_skip_reason,
};

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

static const char *pagemap_skip_reason(void)
{
    return access("/proc/self/pagemap", R_OK) == 0
        ? NULL : "/proc/self/pagemap is not readable";
}

/* The content is not looked at, which would make page tables for it */
static void migrate_idle(SparseGuests *guests)
{
    uint64_t before = lab_status_bytes(guests->dst.pid, "VmPTE");

    sparse_migrate(guests, NULL);
    /* There may be less of them than before */
    g_assert_cmpuint(lab_status_bytes(guests->dst.pid, "VmPTE"), <=,
                     before + MAX_IDLE_TABLES);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), <=,
                     MAX_IDLE_GROWTH);
}

static const char *colo_skip_reason(void)
{
#ifdef CONFIG_REPLICATION
    return trace_skip_reason();
#else
    return "QEMU is built without replication, and so without COLO";
#endif
}

/* The migration ends in COLO state, with RAM discarding disabled */
static void migrate_colo(SparseGuests *guests)
{
    const GuestRam *ram = &guests->dst;
    g_autofree unsigned long *after = NULL;
    g_autofree char *log = NULL;
    uint64_t page;

    sparse_set_both(guests, "x-colo");
    /* Has no effect then, and the destination need not have it */
    migrate_set_capability(guests->from, "sparse-ram", true);
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_ensure_converge(guests->from);
    migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
    wait_for_migration_status(guests->from, "colo", NULL);
    wait_for_migration_status(guests->to, "colo", NULL);

    after = guest_ram_allocated_pages(ram);
    for (page = COLO_RANGE_START / ram->page_size;
         page < COLO_RANGE_END / ram->page_size; page++) {
        bool before = test_bit(page, guests->dst_before.pages);
        bool is_data = guests->kinds[page] == PAGE_DATA;
        uint64_t data[512], expected[512];

        g_assert_cmpuint(ram->page_size, ==, sizeof(data));
        guest_ram_read_page(ram, page, data);
        sparse_pattern_page(expected, guests->kinds, page, sizeof(data));
        g_assert(memcmp(data, expected, sizeof(data)) == 0);
        if (test_bit(page, after)) {
            g_assert(before || is_data ||
                     guest_ram_allocation_unit(ram) > sizeof(data));
        } else {
            g_assert(!before && !is_data);
        }
    }
    log = sparse_log(guests);
    g_assert_cmpuint(lab_count_lines(log, BACKEND_ID, ""), >, 0);
    g_assert_cmpuint(lab_count_lines(log, BACKEND_ID, "punched"), ==, 0);
}

/* A file that ends early is refused, as it always was. */
static void migrate_truncated(SparseGuests *guests)
{
    g_autofree char *uri = g_strdup_printf("file:%s", guests->file);
    const char *unwanted[] = { "completed", NULL };

    migrate_ensure_converge(guests->from);
    migrate_qmp(guests->from, guests->to, uri, NULL, "{}");
    wait_for_migration_complete(guests->from);

    /* In the middle of the bitmap of the first block */
    g_assert_no_errno(truncate(guests->file, 2 * KiB));
    migrate_incoming_qmp(guests->to, uri, NULL, "{ 'exit-on-error': false }");
    wait_for_migration_status(guests->to, "failed", unwanted);
}

#define QUIET .log = true, .expect.quiet = true
#define OFF "-global migration.x-ram-holes=off"
#define PRIVATE { SPARSE_RELEASED, SPARSE_ANY, HOLES_ANY }
#define FILE_IDLE \
    .size = FILE_IDLE_SIZE, .patterns = { &sparse_empty }, \
    .skip_reason = pagemap_skip_reason, .act = migrate_idle

static const SparseRow rows[] = {
    /* An idle guest */
    {
        .name = "memfd/idle/%w/%p", .size = IDLE_SIZE, QUIET,
        .patterns = { &sparse_empty },
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
        .during = watch_idle_guests,
    }, {
        .name = "memfd/idle-quiet/%w/%p", .size = IDLE_SIZE, QUIET,
        .patterns = { &sparse_empty },
        .ways = { &sparse_precopy, &sparse_multifd },
        .during = watch_idle_guests,
    }, {
        .name = "memfd/trace/%w/%p",
        .patterns = { &sparse_empty },
        .ways = { &sparse_precopy, &sparse_multifd },
        .dst_opts = "-trace ram_handle_zero_range", .log = true,
        .skip_reason = trace_skip_reason, .check = check_few_holes,
    },

    /* Each way to have RAM in a file or not */
    {
        .name = "memfd/plain/%w/%p",
        .patterns = { &lab_alternate, &lab_dense, &lab_runs, &lab_ends,
                      &lab_zeroed },
        .ways = { &sparse_precopy, &sparse_multifd },
        .check = check_hmp,
    }, {
        .name = "memfd/plain/%w/%p",
        .patterns = { &lab_runs, &sparse_mixed },
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
    }, {
        .name = "shm-file/plain/%w/%p", .backend = &sparse_shm_file,
        .ways = ALL_PRECOPY,
    }, {
        .name = "shm-file/offset/%w/%p", .backend = &lab_shm_file_offset,
        .ways = ALL_PRECOPY,
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "shm/plain/%w/%p", .backend = &lab_shm,
        .ways = { &sparse_precopy, &sparse_multifd },
    }, {
        .name = "ram-shared/plain/%w/%p", .backend = &lab_ram_shared,
        .ways = { &sparse_precopy, &sparse_multifd },
    }, {
        .name = "ram/plain/%w/%p", .backend = &lab_ram,
        .patterns = { &sparse_empty, &sparse_mixed }, .ways = ALL_PRECOPY,
        .expect.holes = HOLES_NOT_COUNTED,
    }, {
        .name = "memfd-private/plain/%w/%p", .backend = &lab_private,
        .ways = ALL_PRECOPY, .expect = PRIVATE,
    }, {
        .name = "hugetlb/plain/%w/%p", .backend = &sparse_hugetlb,
        .patterns = { &sparse_empty }, .ways = ALL_PRECOPY,
    }, {
        .name = "hugetlb/plain/%w/%p", .backend = &sparse_hugetlb,
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
    },

    /*
     * Old data on the destination.  That a zero page arrives for the first
     * time does not mean that it reads as zero.
     */
    {
        .name = "memfd/stale/%w/%p",
        .ways = { &lab_multifd_legacy, &lab_xbzrle }, .stale = true,
    }, {
        .name = "shm-file/stale/%w/%p", .backend = &sparse_shm_file, QUIET,
        .patterns = { &sparse_empty }, .ways = ALL_PRECOPY,
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "shm-file/stale/%w/%p", .backend = &sparse_shm_file, QUIET,
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "shm-file/reserved/%w/%p", .backend = &sparse_shm_file, QUIET,
        .ways = ALL_PRECOPY,
        .prepare = reserve_destination, .expect.dst = SPARSE_FULL,
    }, {
        .name = "ram-shared/stale/%w/%p", .backend = &lab_ram_shared,
        .ways = { &sparse_precopy, &sparse_multifd }, .stale = true,
    }, {
        .name = "ram/stale/%w/%p", .backend = &lab_ram,
        .ways = ALL_PRECOPY, .stale = true,
        .expect = { .dst = SPARSE_ANY, .holes = HOLES_NOT_COUNTED },
    }, {
        /*
         * Whether a huge page is given back, and its reservation with it, is
         * for the destination to say.
         */
        .name = "hugetlb/stale/%w/%p", .backend = &sparse_hugetlb,
        .ways = ALL_PRECOPY, .stale = true, .expect.dst = SPARSE_ANY,
    },

    /* Destinations whose pages have to stay */
    {
        .name = "memfd/prealloc-stale/%w/%p", QUIET,
        .dst_object = ",prealloc=on",
        .stale = true, .expect.dst = SPARSE_FULL,
    }, {
        .name = "memfd/prealloc/%w/%p", QUIET,
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
        .dst_object = ",prealloc=on",
        .stale = true, .expect.dst = SPARSE_FULL,
    }, {
        /* What QEMU has just created has no old data, and is not read */
        .name = "memfd/prealloc-quiet/%w/%p", QUIET,
        .ways = { &sparse_multifd },
        .dst_object = ",prealloc=on", .expect.dst = SPARSE_FULL,
    }, {
        .name = "shm-file/prealloc/%w/%p", .backend = &sparse_shm_file, QUIET,
        .ways = { &sparse_multifd },
        .dst_object = ",prealloc=on",
        .stale = true, .expect.dst = SPARSE_FULL,
    }, {
        .name = "memfd/mem-lock/%w/%p", QUIET,
        .dst_opts = "-overcommit mem-lock=on",
        .skip_reason = lock_skip_reason,
        .stale = true, .expect.dst = SPARSE_FULL,
    }, {
        .name = "memfd/mem-lock/%w/%p", QUIET,
        .ways = { &sparse_multifd },
        .dst_opts = "-overcommit mem-lock=on",
        .skip_reason = lock_skip_reason, .expect.dst = SPARSE_FULL,
    }, {
        .name = "memfd/sealed/%w/%p", .backend = &sealable, QUIET,
        .ways = ALL_PRECOPY, .prepare = seal_destination,
        .stale = true, .expect.dst = SPARSE_KEPT,
    },

    /* The way back to what QEMU did without all this */
    {
        .name = "memfd/off/%w/%p", .opts = OFF,
        .ways = { &lab_multifd_legacy, &lab_xbzrle },
        .expect = { SPARSE_GROWS, SPARSE_FULL, HOLES_NOT_COUNTED },
    }, {
        /* Multifd does not write to a page that arrives as zero at first */
        .name = "memfd/off/%w/%p", .opts = OFF,
        .ways = { &sparse_multifd },
        .expect = { SPARSE_GROWS, SPARSE_KEPT, HOLES_NOT_COUNTED },
    },

    /*
     * Reading a private mapping of a file on tmpfs would fill the file, which
     * can be a template that others use.
     */
    {
        .name = "modes/private/%w", .backend = &lab_private,
        .ways = { &sparse_precopy, &capability, &sparse_multifd,
                  &sparse_postcopy, &sparse_mapped_ram },
        .expect = PRIVATE,
    },

    /*
     * Without zero page detection, what is populated is sent as data.  Holes
     * do not have to be detected.
     */
    {
        .name = "modes/none/%w",
        .ways = { &none_multifd, &none_zlib, &none_zstd },
        .expect.dst = SPARSE_ANY,
    }, {
        .name = "modes/none/hugetlb/%w", .backend = &sparse_hugetlb,
        .ways = { &none_precopy, &none_multifd }, .expect.dst = SPARSE_ANY,
    },
    /* Compressed, with detection by the multifd threads */
    { .name = "modes/%w", .ways = { &zlib, &zstd } },

    {
        .name = "modes/postcopy/idle",
        .patterns = { &sparse_empty }, .ways = { &sparse_postcopy },
    }, {
        .name = "modes/postcopy/%w-idle",
        .patterns = { &sparse_empty }, .ways = { &lab_postcopy_multifd },
    }, {
        .name = "modes/postcopy/%w",
        .ways = { &lab_postcopy_multifd_preempt, &postcopy_multifd_legacy },
    }, {
        .name = "modes/postcopy/%w",
        .ways = { &lab_postcopy_release, &postcopy_preempt_release },
        .expect.src = SPARSE_RELEASED,
    }, {
        .name = "modes/postcopy/shm-file-offset",
        .backend = &lab_shm_file_offset, .ways = { &sparse_postcopy },
    }, {
        .name = "modes/postcopy/%w-hugetlb", .backend = &sparse_hugetlb,
        .ways = { &lab_postcopy_multifd }, .expect.dst = SPARSE_ANY,
    },

    /* Zero pages stay out of a file */
    {
        .name = "modes/file/idle",
        .patterns = { &sparse_empty }, .ways = { &lab_file },
        .expect.sparse_file = true,
    }, {
        .name = "modes/file/%w",
        .ways = { &mapped_ram_multifd_legacy, &lab_mapped_ram_direct },
        .expect.sparse_file = true,
    }, {
        .name = "modes/file/%w",
        .ways = { &lab_mapped_ram_none, &mapped_ram_multifd_none },
        .expect.dst = SPARSE_ANY,
    }, {
        .name = "modes/file/%w-shm-file-offset",
        .backend = &lab_shm_file_offset, .ways = { &sparse_mapped_ram },
        .expect.sparse_file = true,
    }, {
        .name = "modes/file/%w-hugetlb", .backend = &sparse_hugetlb,
        .ways = { &sparse_mapped_ram }, .expect.sparse_file = true,
    },

    /*
     * A snapshot of a guest that goes on to run.  Half of what is populated is
     * in the file, but not in the page tables of QEMU.
     */
    {
        .name = "modes/snapshot/idle",
        .patterns = { &sparse_empty }, .ways = { &lab_snapshot },
        .expect.sparse_file = true,
    }, {
        .name = "modes/snapshot/shm-file-offset",
        .backend = &lab_shm_file_offset, .ways = { &lab_snapshot },
        .prepare = map_populated_pages, .expect.sparse_file = true,
    }, {
        .name = "modes/snapshot/hugetlb", .backend = &sparse_hugetlb,
        .ways = { &lab_snapshot },
        .prepare = map_populated_pages, .expect.sparse_file = true,
    },

    /* What a file does not have meets old data in the backend */
    { .name = "file/memfd/fresh/%w", .ways = ALL_FILES },
    {
        .name = "file/memfd/stale/%w",
        .ways = { &lab_file, &lab_mapped_ram_direct }, .stale = true,
    }, {
        /* Nothing is in the file but what is behind the last page with data */
        .name = "file/memfd/stale-ends/%w",
        .patterns = { &lab_ends }, .ways = ALL_FILES, .stale = true,
    }, {
        .name = "file/shm-file/stale/%w", .backend = &sparse_shm_file,
        .ways = ALL_FILES, .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "file/shm-file/stale-empty/%w", .backend = &sparse_shm_file,
        .patterns = { &sparse_empty }, .ways = ALL_FILES,
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "file/shm-file-offset/stale/%w",
        .backend = &lab_shm_file_offset,
        .patterns = { &lab_runs }, .ways = ALL_FILES,
        .stale = true, .expect.dst = SPARSE_KEPT,
    }, {
        .name = "file/shm/stale/%w", .backend = &lab_shm,
        .patterns = { &lab_alternate }, .ways = { &sparse_mapped_ram },
        .stale = true,
    }, {
        .name = "file/ram-shared/stale/%w", .backend = &lab_ram_shared,
        .ways = { &sparse_mapped_ram }, .stale = true,
    }, {
        .name = "file/hugetlb/fresh/%w", .backend = &sparse_hugetlb,
        .ways = ALL_FILES,
    }, {
        .name = "file/hugetlb/stale/%w", .backend = &sparse_hugetlb,
        .ways = ALL_FILES, .stale = true, .expect.dst = SPARSE_ANY,
    }, {
        .name = "file/ram/fresh/%w", .backend = &lab_ram,
        .patterns = { &lab_ends }, .ways = { ALL_MAPPED },
        .expect.holes = HOLES_NOT_COUNTED,
    }, {
        .name = "file/ram/stale/%w", .backend = &lab_ram,
        .ways = ALL_FILES, .stale = true,
        .expect = { .dst = SPARSE_ANY, .holes = HOLES_NOT_COUNTED },
    }, {
        .name = "file/memfd-private/fresh/%w", .backend = &lab_private,
        .patterns = { &lab_ends }, .ways = ALL_FILES,
        .expect = { SPARSE_RELEASED, SPARSE_DATA, HOLES_ANY },
    }, {
        .name = "file/memfd-private/stale/%w", .backend = &lab_private,
        .ways = ALL_FILES,
        .prepare = make_destination_stale, .expect = PRIVATE,
    }, {
        .name = "file/memfd/none/%w", .ways = { &lab_mapped_ram_none },
        .stale = true, .expect.dst = SPARSE_ANY,
    }, {
        /* What QEMU has just created has no old data, and is not read */
        .name = "file/memfd/prealloc/%w", .ways = { ALL_MAPPED },
        .dst_object = ",prealloc=on", .expect.dst = SPARSE_FULL,
    }, {
        .name = "file/shm-file/prealloc/%w", .backend = &sparse_shm_file,
        .ways = { ALL_MAPPED }, .dst_object = ",prealloc=on",
        .stale = true, .expect.dst = SPARSE_FULL,
    },

    /*
     * What nobody has touched is not touched by the migration either: there
     * are neither pages nor page tables for it.
     */
    {
        .name = "file/memfd/idle/%w", FILE_IDLE,
        .ways = { &sparse_mapped_ram, &lab_mapped_ram_multifd },
    }, {
        .name = "file/memfd-private/idle/%w", FILE_IDLE,
        .backend = &lab_private,
        .ways = { &lab_file, &sparse_mapped_ram, &sparse_multifd },
        .expect.src = SPARSE_RELEASED,
    }, {
        .name = "file/ram/idle/%w", FILE_IDLE, .backend = &lab_ram,
        .ways = { &sparse_mapped_ram, &lab_mapped_ram_multifd,
                  &sparse_multifd },
    }, {
        .name = "file/truncated", .hide_stderr = true,
        .ways = { &sparse_mapped_ram }, .act = migrate_truncated,
    },

    {
        /* Each side complains when the other one is ended */
        .name = "memfd/colo/%w/%p", .size = COLO_SIZE,
        .dst_opts = "-trace ram_handle_zero_range",
        .log = true, .hide_stderr = true, .stale = true,
        .skip_reason = colo_skip_reason, .act = migrate_colo,
        /* The guest runs */
        .expect.src = SPARSE_ANY,
    },
};

void lab_add_rows(void)
{
    sparse_add_rows(rows, ARRAY_SIZE(rows));
}
