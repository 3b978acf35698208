/*
 * QTest testcases for sparse guest RAM: everything else that reads it
 *
 * sparse-tests.c has what arrives on the destination.  Here are the other ways
 * in which guest RAM leaves QEMU: none of them may allocate what is a hole, and
 * each has to bring the content over.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <elf.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

/* What may be in a file besides the data of the guest's main memory */
#define FILE_SLACK (3 * MiB)

typedef enum SparseTransport {
    TRANSPORT_TCP,
    TRANSPORT_POSTCOPY,
    TRANSPORT_FILE,
} SparseTransport;

typedef enum SparseFile {
    FILE_ANY,
    FILE_SPARSE,        /* zero pages take no space */
} SparseFile;

typedef struct ModeCase {
    /* Path below /migration/sparse/modes */
    const char *name;
    SparseTransport transport;
    SparseBackend backend;
    SparsePattern pattern;
    /* Set on both sides */
    const char *capabilities[4];
    const char *zero_page_detection;
    const char *compression;
    bool direct_io;
    /* Only on the source: capability background-snapshot */
    bool snapshot;

    RamGrowth source;
    HoleCount holes;
    SparseFile file;
    /* No zero page is allocated on the destination */
    bool sparse_destination;
} ModeCase;

static const ModeCase mode_cases[] = {
    /*
     * Reading a private mapping of a file on tmpfs would fill the file, which
     * can be a template that others use.
     */
    {
        .name = "private/precopy",
        .backend = BACKEND_MEMFD_PRIVATE,
        .pattern = PATTERN_MIXED,
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
    }, {
        .name = "private/capability",
        .backend = BACKEND_MEMFD_PRIVATE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "sparse-ram" },
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
    }, {
        .name = "private/multifd",
        .backend = BACKEND_MEMFD_PRIVATE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
    }, {
        .name = "private/postcopy",
        .transport = TRANSPORT_POSTCOPY,
        .backend = BACKEND_MEMFD_PRIVATE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram" },
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
    }, {
        .name = "private/mapped-ram",
        .transport = TRANSPORT_FILE,
        .backend = BACKEND_MEMFD_PRIVATE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram" },
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
    },
    /*
     * Without zero page detection, what is populated is sent as data.  Holes
     * do not have to be detected.
     */
    {
        .name = "none/precopy",
        .pattern = PATTERN_MIXED,
        .zero_page_detection = "none",
    }, {
        .name = "none/multifd",
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .zero_page_detection = "none",
    }, {
        .name = "none/multifd-zlib",
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .zero_page_detection = "none",
        .compression = "zlib",
    }, {
#ifdef CONFIG_ZSTD
        .name = "none/multifd-zstd",
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .zero_page_detection = "none",
        .compression = "zstd",
    }, {
#endif
        .name = "none/hugetlb/precopy",
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .zero_page_detection = "none",
    }, {
        .name = "none/hugetlb/multifd",
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .zero_page_detection = "none",
    },

    /* Compressed, with detection by the multifd threads */
    {
        .name = "multifd-zlib",
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .compression = "zlib",
        .sparse_destination = true,
    }, {
#ifdef CONFIG_ZSTD
        .name = "multifd-zstd",
        .pattern = PATTERN_MIXED,
        .capabilities = { "multifd" },
        .compression = "zstd",
        .sparse_destination = true,
    }, {
#endif
        .name = "postcopy/plain",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/idle",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_EMPTY,
        .capabilities = { "postcopy-ram" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/preempt",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "postcopy-preempt" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/multifd",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "multifd" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/multifd-idle",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_EMPTY,
        .capabilities = { "postcopy-ram", "multifd" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/multifd-preempt",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "postcopy-preempt", "multifd" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/multifd-legacy",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "multifd" },
        .zero_page_detection = "legacy",
        .sparse_destination = true,
    }, {
        .name = "postcopy/multifd-hugetlb",
        .transport = TRANSPORT_POSTCOPY,
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "multifd" },
    }, {
        .name = "postcopy/release-ram",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "release-ram" },
        .source = RAM_RELEASED,
        .sparse_destination = true,
    }, {
        .name = "postcopy/preempt-release-ram",
        .transport = TRANSPORT_POSTCOPY,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram", "postcopy-preempt", "release-ram" },
        .source = RAM_RELEASED,
        .sparse_destination = true,
    }, {
        .name = "postcopy/shm-file-offset",
        .transport = TRANSPORT_POSTCOPY,
        .backend = BACKEND_SHM_FILE_OFFSET,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram" },
        .sparse_destination = true,
    }, {
        .name = "postcopy/hugetlb",
        .transport = TRANSPORT_POSTCOPY,
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .capabilities = { "postcopy-ram" },
    },

    /* Zero pages stay out of a file */
    {
        .name = "file/plain",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/idle",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_EMPTY,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram" },
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram-shm-file-offset",
        .transport = TRANSPORT_FILE,
        .backend = BACKEND_SHM_FILE_OFFSET,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram" },
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram-hugetlb",
        .transport = TRANSPORT_FILE,
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram" },
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram-none",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram" },
        .zero_page_detection = "none",
    }, {
        .name = "file/mapped-ram-multifd",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram", "multifd" },
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram-multifd-legacy",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram", "multifd" },
        .zero_page_detection = "legacy",
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "file/mapped-ram-multifd-none",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram", "multifd" },
        .zero_page_detection = "none",
    }, {
        .name = "file/mapped-ram-multifd-direct-io",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .capabilities = { "mapped-ram", "multifd" },
        .direct_io = true,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    },

    /*
     * A snapshot of a guest that goes on to run.  Half of what is populated is
     * in the file, but not in the page tables of QEMU.
     */
    {
        .name = "snapshot/plain",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_MIXED,
        .snapshot = true,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "snapshot/idle",
        .transport = TRANSPORT_FILE,
        .pattern = PATTERN_EMPTY,
        .snapshot = true,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "snapshot/shm-file-offset",
        .transport = TRANSPORT_FILE,
        .backend = BACKEND_SHM_FILE_OFFSET,
        .pattern = PATTERN_MIXED,
        .snapshot = true,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    }, {
        .name = "snapshot/hugetlb",
        .transport = TRANSPORT_FILE,
        .backend = BACKEND_HUGETLB,
        .pattern = PATTERN_MIXED,
        .snapshot = true,
        .file = FILE_SPARSE,
        .sparse_destination = true,
    },
};

static MigrationTestEnv *env;

static uint64_t default_size(SparseBackend backend)
{
    return backend == BACKEND_HUGETLB ? HUGETLB_SIZE : PATTERN_SIZE;
}

/* Two stopped guests with RAM of the same kind, and the source's pattern */
typedef struct Guests {
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
    uint8_t *kinds;
    GuestRamState before;
} Guests;

/*
 * QEMU cannot take a snapshot of a guest that has not been started yet.  What
 * the firmware has written meanwhile would be no part of the pattern.
 */
static void pause_guest(Guests *guests)
{
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'stop' }");
    guest_ram_punch(&guests->src);
}

/* Returns false if the test has to be skipped, after saying why */
static bool guests_start(Guests *guests, SparseBackend backend,
                         SparsePattern pattern, bool paused)
{
    const char *reason = sparse_backend_skip_reason(backend);
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    MigrateStart args = {};

    if (reason) {
        g_test_skip(reason);
        return false;
    }

    *guests = (Guests) { };
    guest_ram_init(&guests->src, backend, default_size(backend));
    guest_ram_init(&guests->dst, backend, default_size(backend));
    src_memory = guest_ram_opts(&guests->src, NULL);
    dst_memory = guest_ram_opts(&guests->dst, NULL);
    src_opts = g_strdup_printf("-S %s", src_memory);
    dst_opts = g_strdup_printf("-S %s", dst_memory);
    args.opts_source = src_opts;
    args.opts_target = dst_opts;

    if (migrate_start(&guests->from, &guests->to, "defer", &args)) {
        guest_ram_close(&guests->src);
        guest_ram_close(&guests->dst);
        return false;
    }
    guest_ram_open(&guests->src, guests->from);
    guest_ram_open(&guests->dst, guests->to);

    if (paused) {
        pause_guest(guests);
    }
    guests->kinds = sparse_pattern_new(pattern, guest_ram_pages(&guests->src));
    guest_ram_prepare(&guests->src, guests->kinds);
    guest_ram_state_take(&guests->before, &guests->src);
    return true;
}

static void guests_end(Guests *guests)
{
    migrate_end(guests->from, guests->to, false);
    guest_ram_close(&guests->src);
    guest_ram_close(&guests->dst);
    guest_ram_state_clear(&guests->before);
    g_free(guests->kinds);
}

static void check_source(const Guests *guests, RamGrowth expect)
{
    g_auto(GuestRamState) after = { };

    guest_ram_state_take(&after, &guests->src);
    guest_ram_check_growth(&guests->src, &guests->before, &after, expect,
                           0, guest_ram_pages(&guests->src));
}

static uint64_t data_bytes(const Guests *guests)
{
    uint64_t page, bytes = 0;

    for (page = 0; page < guest_ram_pages(&guests->src); page++) {
        if (guests->kinds[page] == PAGE_DATA) {
            bytes += guests->src.page_size;
        }
    }
    return bytes;
}

static void check_sparse_destination(const Guests *guests)
{
    const GuestRam *dst = &guests->dst;
    g_autofree unsigned long *data = bitmap_new(guest_ram_pages(dst));
    uint64_t page;

    for (page = 0; page < guest_ram_pages(dst); page++) {
        if (guests->kinds[page] == PAGE_DATA) {
            set_bit(page, data);
        }
    }
    g_assert_cmpuint(guest_ram_allocated_bytes(dst), <=,
                     guest_ram_max_allocated_bytes(dst, data));
}

/*
 * How much of a file has data, in bytes.  What XFS allocates ahead while a file
 * grows has none, and is freed later.
 */
static uint64_t file_data_bytes(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t bytes = 0;
    off_t start, end = 0;
    struct stat st;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(fstat(fd, &st), ==, 0);
    while ((start = lseek(fd, end, SEEK_DATA)) >= 0) {
        end = lseek(fd, start, SEEK_HOLE);
        g_assert_cmpint(end, >, start);
        bytes += end - start;
    }
    g_assert_cmpint(errno, ==, ENXIO);
    close(fd);
    /* A file system that knows no holes says that all of it is data */
    return MIN(bytes, st.st_blocks * 512ULL);
}

static void check_file(const Guests *guests, const char *path)
{
    uint64_t bytes = file_data_bytes(path);

    g_test_message("file has %" PRIu64 " KiB, there are %" PRIu64
                   " KiB of data", bytes / KiB, data_bytes(guests) / KiB);
    g_assert_cmpuint(bytes, <=, data_bytes(guests) + FILE_SLACK);
}

/* QEMU maps every other page that is populated */
static void map_populated_pages(const Guests *guests)
{
    uint64_t page, populated = 0;

    for (page = 0; page < guest_ram_pages(&guests->src); page++) {
        uint64_t address = page * guests->src.page_size;

        if (guests->kinds[page] != PAGE_HOLE && populated++ % 2 &&
            (address < PC_BASE_MEMORY_END || address >= MiB)) {
            qtest_readb(guests->from, address);
        }
    }
}

/* Returns false if the test has to be skipped, after saying why */
static bool set_mode(const ModeCase *c, QTestState *who)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(c->capabilities) && c->capabilities[i]; i++) {
        if (!migrate_try_capability(who, c->capabilities[i])) {
            return false;
        }
    }
    if (c->zero_page_detection) {
        migrate_set_parameter_str(who, "zero-page-detection",
                                  c->zero_page_detection);
    }
    if (c->compression) {
        migrate_set_parameter_str(who, "multifd-compression", c->compression);
    }
    if (c->direct_io) {
        migrate_set_parameter_bool(who, "direct-io", true);
    }
    return true;
}

static void migrate_tcp(const Guests *guests, bool postcopy)
{
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    if (postcopy) {
        migrate_ensure_postcopy(guests->from);
    } else {
        migrate_ensure_converge(guests->from);
    }
    migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
    if (postcopy) {
        qtest_qmp_assert_success(guests->from,
                                 "{ 'execute': 'migrate-start-postcopy' }");
    }
    wait_for_migration_complete(guests->from);
    wait_for_migration_complete(guests->to);
    if (postcopy) {
        check_postcopy(guests->from);
    }
}

static char *test_file(const char *name)
{
    return g_strdup_printf("%s/%s", env->tmpfs, name);
}

static void load_file(const Guests *guests, const char *path)
{
    g_autofree char *uri = g_strdup_printf("file:%s", path);

    migrate_incoming_qmp(guests->to, uri, NULL, "{}");
    wait_for_migration_complete(guests->to);
}

static const char *mode_skip_reason(const ModeCase *c)
{
    if (c->transport == TRANSPORT_POSTCOPY && !env->has_uffd) {
        return "userfaultfd is not available";
    }
    if (c->direct_io && !probe_o_direct_support(env->tmpfs)) {
        return "the file system of the temporary directory has no O_DIRECT";
    }
    return NULL;
}

static void test_mode(const void *opaque)
{
    const ModeCase *c = opaque;
    g_autofree char *path = test_file(FILE_TEST_FILENAME);
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    const char *reason = mode_skip_reason(c);
    Guests guests;

    if (reason) {
        g_test_skip(reason);
        return;
    }
    if (!guests_start(&guests, c->backend, c->pattern, c->snapshot)) {
        return;
    }
    if (!set_mode(c, guests.from) || !set_mode(c, guests.to)) {
        goto out;
    }
    if (c->snapshot) {
        if (!migrate_try_capability(guests.from, "background-snapshot")) {
            goto out;
        }
        map_populated_pages(&guests);
    }

    if (c->transport == TRANSPORT_FILE) {
        migrate_ensure_converge(guests.from);
        migrate_qmp(guests.from, guests.to, uri, NULL, "{}");
        wait_for_migration_complete(guests.from);
        if (c->file == FILE_SPARSE) {
            check_file(&guests, path);
        }
        load_file(&guests, path);
    } else {
        migrate_tcp(&guests, c->transport == TRANSPORT_POSTCOPY);
    }

    if (c->sparse_destination) {
        check_sparse_destination(&guests);
    }
    guest_ram_check_pattern(&guests.dst, guests.kinds);
    check_source(&guests, c->source);
    check_hole_statistics(guests.from, &guests.src, &guests.before,
                          guests.kinds, c->holes);
out:
    guests_end(&guests);
}

/* A pipe that is full until somebody comes to empty it into a file */
typedef struct SlowPipe {
    int fds[2];
    const char *path;
} SlowPipe;

static void *slow_pipe_drain(void *opaque)
{
    SlowPipe *pipe = opaque;
    g_autofree char *buf = g_malloc(MiB);
    int fd = open(pipe->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t len;

    g_assert_cmpint(fd, >=, 0);
    /* Time for the first write to guest RAM to run into the protection */
    g_usleep(200 * 1000);
    while ((len = read(pipe->fds[0], buf, MiB)) > 0) {
        g_assert_cmpint(write(fd, buf, len), ==, len);
    }
    g_assert_cmpint(len, ==, 0);
    close(fd);
    return NULL;
}

/* The last page of each kind, so that it is saved late */
static uint64_t last_page_of_kind(const Guests *guests, PageKind kind,
                                  uint64_t before)
{
    uint64_t page = before;

    do {
        g_assert_cmpuint(page, >, 0);
        page--;
    } while (guests->kinds[page] != kind);
    return page;
}

/*
 * The guest (or a device) writes while the snapshot is being taken: to a hole,
 * to pages that are populated and mapped, and to such that are not mapped.  The
 * snapshot has what was there before.
 */
static void test_snapshot_write(void)
{
    g_autofree char *path = test_file(FILE_TEST_FILENAME);
    SlowPipe slow_pipe = { .path = path };
    uint64_t pages[5];
    GThread *drain;
    Guests guests;
    int i, queued;

    if (!guests_start(&guests, BACKEND_MEMFD, PATTERN_MIXED, true)) {
        return;
    }
    if (!migrate_try_capability(guests.from, "background-snapshot")) {
        goto out;
    }
    pages[0] = last_page_of_kind(&guests, PAGE_HOLE,
                                 guest_ram_pages(&guests.src));
    pages[1] = last_page_of_kind(&guests, PAGE_DATA, pages[0]);
    pages[2] = last_page_of_kind(&guests, PAGE_DATA, pages[1]);
    pages[3] = last_page_of_kind(&guests, PAGE_ZERO, pages[2]);
    pages[4] = last_page_of_kind(&guests, PAGE_ZERO, pages[3]);
    qtest_readb(guests.from, pages[2] * guests.src.page_size);
    qtest_readb(guests.from, pages[4] * guests.src.page_size);

    g_assert(g_unix_open_pipe(slow_pipe.fds, FD_CLOEXEC, NULL));
    qtest_qmp_fds_assert_success(guests.from, &slow_pipe.fds[1], 1,
                                 "{ 'execute': 'getfd', 'arguments': {"
                                 "'fdname': 'snapshot' } }");
    close(slow_pipe.fds[1]);
    migrate_qmp(guests.from, guests.to, "fd:snapshot", NULL, "{}");

    /* More than the setup: the memory is protected and is being saved */
    do {
        g_usleep(1000);
        g_assert_cmpint(ioctl(slow_pipe.fds[0], FIONREAD, &queued), ==, 0);
    } while (queued < 32 * KiB);

    drain = g_thread_new("drain", slow_pipe_drain, &slow_pipe);
    for (i = 0; i < ARRAY_SIZE(pages); i++) {
        uint64_t address = pages[i] * guests.src.page_size;

        qtest_writeq(guests.from, address, 0xfeedf00d);
        g_assert_cmphex(qtest_readq(guests.from, address), ==, 0xfeedf00d);
    }
    wait_for_migration_complete(guests.from);
    g_thread_join(drain);
    close(slow_pipe.fds[0]);

    /* Only the hole that was written to is allocated now */
    set_bit(pages[0], guests.before.pages);
    guests.before.bytes += guest_ram_allocation_unit(&guests.src);

    load_file(&guests, path);
    guest_ram_check_pattern(&guests.dst, guests.kinds);
    if (guest_ram_allocation_unit(&guests.src) == guests.src.page_size) {
        check_source(&guests, RAM_KEPT);
    }
out:
    guests_end(&guests);
}

/*
 * A write to a private mapping allocates a page of the file, too, which stays
 * zero, and which the kernel can free at any time.
 */
static RamGrowth kept(SparseBackend backend)
{
    return backend == BACKEND_MEMFD_PRIVATE ? RAM_RELEASED : RAM_KEPT;
}

/* Where a dump goes to */
typedef enum DumpTarget {
    DUMP_FILE,
    DUMP_FILE_USED,     /* open, with old data in it */
    DUMP_FILE_APPEND,
    DUMP_PIPE,
} DumpTarget;

typedef struct DumpCase {
    const char *name;
    const char *format;
    SparseBackend backend;
    SparsePattern pattern;
    DumpTarget target;
    bool detach;
    /* Only a part of the memory, unless 0 */
    uint64_t begin;
    uint64_t length;
} DumpCase;

#define DUMP_OLD_SIZE (PATTERN_SIZE / 2 + 12345)
#define DUMP_OLD_DATA 0xa5

static const DumpCase dump_cases[] = {
    { "dump/elf", "elf", BACKEND_MEMFD, PATTERN_MIXED },
    { "dump/elf-empty", "elf", BACKEND_MEMFD, PATTERN_EMPTY },
    { "dump/elf-runs", "elf", BACKEND_MEMFD, PATTERN_RUNS },
    { "dump/elf-detach", "elf", BACKEND_MEMFD, PATTERN_RUNS, .detach = true },
    { "dump/elf-used-file", "elf", BACKEND_MEMFD, PATTERN_RUNS,
      DUMP_FILE_USED },
    { "dump/elf-append", "elf", BACKEND_MEMFD, PATTERN_RUNS, DUMP_FILE_APPEND },
    { "dump/elf-pipe", "elf", BACKEND_MEMFD, PATTERN_RUNS, DUMP_PIPE },
    { "dump/elf-filter", "elf", BACKEND_MEMFD, PATTERN_MIXED,
      .begin = 2 * MiB + 0x800, .length = 32 * MiB + 0x100 },
    { "dump/elf-shm-file-offset", "elf", BACKEND_SHM_FILE_OFFSET,
      PATTERN_MIXED },
    { "dump/elf-private", "elf", BACKEND_MEMFD_PRIVATE, PATTERN_MIXED },
    { "dump/elf-hugetlb", "elf", BACKEND_HUGETLB, PATTERN_MIXED },
    { "dump/elf-hugetlb-filter", "elf", BACKEND_HUGETLB, PATTERN_MIXED,
      .begin = 2 * MiB + 0x800, .length = 32 * MiB + 0x100 },
    { "dump/kdump-zlib", "kdump-zlib", BACKEND_MEMFD, PATTERN_MIXED },
    { "dump/kdump-zlib-detach", "kdump-zlib", BACKEND_MEMFD, PATTERN_RUNS,
      .detach = true },
    { "dump/kdump-zlib-private", "kdump-zlib", BACKEND_MEMFD_PRIVATE,
      PATTERN_MIXED },
    { "dump/kdump-zlib-hugetlb", "kdump-zlib", BACKEND_HUGETLB, PATTERN_MIXED },
};

/* Compare a part of the memory that need not begin or end with a page */
static void check_filtered_dump(const Guests *guests, const DumpCase *c,
                                const char *path)
{
    const GuestRam *ram = &guests->src;
    g_autofree char *page = g_malloc(ram->page_size);
    g_autofree char *buf = g_malloc(ram->page_size);
    uint64_t size;
    Elf64_Ehdr header;
    Elf64_Phdr phdr;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(pread(fd, &header, sizeof(header), 0), ==, sizeof(header));
    /* A note, and the part */
    g_assert_cmpint(header.e_phnum, ==, 2);
    g_assert_cmpint(pread(fd, &phdr, sizeof(phdr),
                          header.e_phoff + header.e_phentsize),
                    ==, sizeof(phdr));
    g_assert_cmphex(phdr.p_paddr, ==, c->begin);
    g_assert_cmphex(phdr.p_filesz, ==, c->length);

    for (uint64_t done = 0; done < c->length; done += size) {
        uint64_t address = c->begin + done;
        uint64_t in_page = address % ram->page_size;

        size = MIN(ram->page_size - in_page, c->length - done);
        sparse_pattern_page((uint64_t *)page, guests->kinds,
                            address / ram->page_size, ram->page_size);
        g_assert_cmpint(pread(fd, buf, size, phdr.p_offset + done), ==, size);
        if (memcmp(page + in_page, buf, size)) {
            g_error("guest memory at 0x%" PRIx64 " is wrong", address);
        }
    }
    close(fd);
}

/* QEMU writes shorter holes as zeroes */
#define DUMP_HOLE_MIN (64 * KiB)

/* What is left of a hole of the guest: the blocks at its ends have data */
static uint64_t hole_in_dump(uint64_t hole)
{
    return hole < DUMP_HOLE_MIN ? 0 : hole - 2 * qemu_real_host_page_size();
}

static void check_dump_file(const Guests *guests, const char *path)
{
    const GuestRam *ram = &guests->src;
    uint64_t bytes = file_data_bytes(path);
    uint64_t expected = ram->size + FILE_SLACK, hole = 0;

    for (uint64_t page = 0; page < guest_ram_pages(ram); page++) {
        if (guests->kinds[page] == PAGE_HOLE) {
            hole += ram->page_size;
            continue;
        }
        expected -= hole_in_dump(hole);
        hole = 0;
    }
    expected -= hole_in_dump(hole);
    g_test_message("file has %" PRIu64 " KiB of at most %" PRIu64 " KiB",
                   bytes / KiB, expected / KiB);
    g_assert_cmpuint(bytes, <=, expected);
}

/* Returns the file that is to become the dump, or NULL if QEMU opens it */
static FILE *open_dump_target(DumpTarget target, const char *path)
{
    g_autofree char *old = NULL;
    g_autofree char *command = NULL;

    switch (target) {
    case DUMP_FILE_USED:
        old = g_malloc(DUMP_OLD_SIZE);
        memset(old, DUMP_OLD_DATA, DUMP_OLD_SIZE);
        g_assert(g_file_set_contents(path, old, DUMP_OLD_SIZE, NULL));
        return fopen(path, "r+");
    case DUMP_FILE_APPEND:
        return fopen(path, "a");
    case DUMP_PIPE:
        command = g_strdup_printf("cat > '%s'", path);
        return popen(command, "w");
    default:
        return NULL;
    }
}

static void close_dump_target(DumpTarget target, FILE *file)
{
    if (target == DUMP_PIPE) {
        g_assert_cmpint(pclose(file), ==, 0);
    } else if (file) {
        fclose(file);
    }
}

static void wait_for_dump(QTestState *who)
{
    bool active;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            who, "{ 'execute': 'query-dump' }");

        active = g_str_equal(qdict_get_str(rsp, "status"), "active");
        if (!active) {
            g_assert_cmpstr(qdict_get_str(rsp, "status"), ==, "completed");
            g_assert_cmpint(qdict_get_int(rsp, "completed"), ==,
                            qdict_get_int(rsp, "total"));
        }
        qobject_unref(rsp);
        g_usleep(1000);
    } while (active);
}

static void dump_guest(const DumpCase *c, QTestState *who, const char *path)
{
    g_autofree char *protocol = NULL;
    QDict *args = qdict_new();
    FILE *file = open_dump_target(c->target, path);

    if (file) {
        int fd = fileno(file);

        qtest_qmp_fds_assert_success(who, &fd, 1, "{ 'execute': 'getfd',"
                                     "'arguments': { 'fdname': 'dump' } }");
        protocol = g_strdup("fd:dump");
    } else {
        protocol = g_strdup_printf("file:%s", path);
    }
    qdict_put_bool(args, "paging", false);
    qdict_put_bool(args, "detach", c->detach);
    qdict_put_str(args, "protocol", protocol);
    qdict_put_str(args, "format", c->format);
    if (c->length) {
        qdict_put_int(args, "begin", c->begin);
        qdict_put_int(args, "length", c->length);
    }
    qtest_qmp_assert_success(who, "{ 'execute': 'dump-guest-memory',"
                             "'arguments': %p }", args);
    wait_for_dump(who);
    close_dump_target(c->target, file);
}

static void test_dump(const void *opaque)
{
    const DumpCase *c = opaque;
    g_autofree char *path = test_file("dump");
    Guests guests;

    if (!guests_start(&guests, c->backend, c->pattern, false)) {
        return;
    }
    unlink(path);
    dump_guest(c, guests.from, path);
    if (!g_str_equal(c->format, "elf")) {
        check_file(&guests, path);
    } else if (c->length) {
        check_filtered_dump(&guests, c, path);
    } else {
        check_elf_dump(&guests.src, guests.kinds, path);
        if (c->target == DUMP_FILE || c->target == DUMP_FILE_USED) {
            check_dump_file(&guests, path);
        }
    }
    check_source(&guests, kept(c->backend));
    unlink(path);
    guests_end(&guests);
}

/* Page sampling hashes pages all over the memory, holes included */
static void test_dirty_rate(const void *opaque)
{
    const SparseBackend *backend = opaque;
    bool measured;
    Guests guests;

    if (!guests_start(&guests, *backend, PATTERN_MIXED, false)) {
        return;
    }
    qtest_qmp_assert_success(guests.from, "{ 'execute': 'calc-dirty-rate',"
                             "'arguments': { 'calc-time': 100,"
                             "'calc-time-unit': 'millisecond',"
                             "'sample-pages': 4096 } }");
    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            guests.from, "{ 'execute': 'query-dirty-rate' }");

        measured = g_str_equal(qdict_get_str(rsp, "status"), "measured");
        if (measured) {
            g_assert_cmpint(qdict_get_int(rsp, "dirty-rate"), ==, 0);
        }
        qobject_unref(rsp);
        g_usleep(10 * 1000);
    } while (!measured);
    check_source(&guests, kept(*backend));
    guests_end(&guests);
}

/* The main memory in a file that pmemsave or memsave has written */
static void check_saved(const Guests *guests, const char *path, uint64_t start,
                        uint64_t size)
{
    const GuestRam *ram = &guests->src;
    g_autofree char *saved = NULL;
    g_autofree uint64_t *page = g_malloc(ram->page_size);
    gsize length;

    g_assert(g_file_get_contents(path, &saved, &length, NULL));
    g_assert_cmpuint(length, ==, size);
    for (uint64_t done = 0; done < size; done += ram->page_size) {
        sparse_pattern_page(page, guests->kinds,
                            (start + done) / ram->page_size, ram->page_size);
        if (memcmp(saved + done, page, ram->page_size)) {
            g_error("0x%" PRIx64 " is wrong in the file", start + done);
        }
    }
}

/* A CPU that has been reset takes physical addresses, so that both do */
static void test_debuggers(void)
{
    g_autofree char *path = test_file("memory");
    uint64_t start = 2 * MiB, size = 16 * MiB;
    Guests guests;

    if (!guests_start(&guests, BACKEND_MEMFD, PATTERN_MIXED, false)) {
        return;
    }
    qtest_qmp_assert_success(guests.from, "{ 'execute': 'pmemsave',"
                             "'arguments': { 'val': %" PRIu64 ","
                             "'size': %" PRIu64 ", 'filename': %s } }",
                             start, size, path);
    check_saved(&guests, path, start, size);
    qtest_qmp_assert_success(guests.from, "{ 'execute': 'memsave',"
                             "'arguments': { 'val': %" PRIu64 ","
                             "'size': %" PRIu64 ", 'filename': %s } }",
                             start, size, path);
    check_saved(&guests, path, start, size);
    /* Not at a page boundary */
    qtest_qmp_assert_success(guests.from, "{ 'execute': 'pmemsave',"
                             "'arguments': { 'val': %" PRIu64 ","
                             "'size': %" PRIu64 ", 'filename': %s } }",
                             start + 0x333, size, path);
    g_free(qtest_hmp(guests.from, "xp /8192gx 0x%" PRIx64, start + size));
    g_free(qtest_hmp(guests.from, "x /8192gx 0x%" PRIx64, start + size));
    check_source(&guests, RAM_KEPT);
    unlink(path);
    guests_end(&guests);
}

static int64_t holes_sent(QTestState *who)
{
    QDict *rsp = migrate_query_not_failed(who);
    QDict *ram = qdict_get_qdict(rsp, "ram");
    int64_t holes = ram ? qdict_get_try_int(ram, "holes", 0) : 0;

    g_assert_cmpstr(qdict_get_str(rsp, "status"), !=, "completed");
    qobject_unref(rsp);
    return holes;
}

/*
 * Another process has the memory mapped, as a vhost-user backend does, and
 * writes to what QEMU has found to be a hole in a migration that was cancelled.
 */
static void test_other_process(bool multifd)
{
    g_autofree char *path = test_file(FILE_TEST_FILENAME);
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    Guests guests;
    uint64_t page;
    char *map;

    if (!guests_start(&guests, BACKEND_MEMFD, PATTERN_EMPTY, false)) {
        return;
    }
    /*
     * A zero page takes 9 bytes: all of them would take a minute, and those
     * that fit into a buffer no time at all.
     */
    migrate_set_parameter_int(guests.from, "max-bandwidth", 4 * KiB);
    migrate_qmp(guests.from, guests.to, uri, NULL, "{}");
    while (holes_sent(guests.from) < 1000) {
        g_usleep(1000);
    }
    migrate_cancel(guests.from);
    wait_for_migration_status(guests.from, "cancelled", NULL);
    check_source(&guests, RAM_KEPT);

    g_free(guests.kinds);
    guests.kinds = sparse_pattern_new(PATTERN_MIXED,
                                      guest_ram_pages(&guests.src));
    map = mmap(NULL, guests.src.size, PROT_READ | PROT_WRITE, MAP_SHARED,
               guests.src.fd, 0);
    g_assert(map != MAP_FAILED);
    for (page = 0; page < guest_ram_pages(&guests.src); page++) {
        if (guests.kinds[page] != PAGE_HOLE) {
            sparse_pattern_page((uint64_t *)(map +
                                             page * guests.src.page_size),
                                guests.kinds, page, guests.src.page_size);
        }
    }
    munmap(map, guests.src.size);
    guest_ram_state_clear(&guests.before);
    guest_ram_state_take(&guests.before, &guests.src);

    if (multifd) {
        migrate_set_both_capability(guests.from, guests.to, "multifd");
    }
    migrate_tcp(&guests, false);
    check_sparse_destination(&guests);
    guest_ram_check_pattern(&guests.dst, guests.kinds);
    check_source(&guests, RAM_KEPT);
    check_hole_statistics(guests.from, &guests.src, &guests.before,
                          guests.kinds, HOLES_COUNTED);
    guests_end(&guests);
}

static void test_other_process_precopy(void)
{
    test_other_process(false);
}

static void test_other_process_multifd(void)
{
    test_other_process(true);
}

static void add_test(const char *name, const void *data,
                     void (*test)(const void *))
{
    g_autofree char *path = g_strdup_printf("/migration/sparse/modes/%s", name);

    qtest_add_data_func(path, data, test);
}

void migration_test_add_sparse_modes(MigrationTestEnv *the_env)
{
    static const SparseBackend memfd = BACKEND_MEMFD;
    static const SparseBackend shm_file_offset = BACKEND_SHM_FILE_OFFSET;
    static const SparseBackend memfd_private = BACKEND_MEMFD_PRIVATE;
    int i;

    env = the_env;

    for (i = 0; i < ARRAY_SIZE(mode_cases); i++) {
        add_test(mode_cases[i].name, &mode_cases[i], test_mode);
    }
    for (i = 0; i < ARRAY_SIZE(dump_cases); i++) {
        add_test(dump_cases[i].name, &dump_cases[i], test_dump);
    }
    add_test("dirty-rate/memfd", &memfd, test_dirty_rate);
    add_test("dirty-rate/shm-file-offset", &shm_file_offset, test_dirty_rate);
    add_test("dirty-rate/memfd-private", &memfd_private, test_dirty_rate);
    migration_test_add("/migration/sparse/modes/debuggers", test_debuggers);
    migration_test_add("/migration/sparse/modes/snapshot/write",
                       test_snapshot_write);
    migration_test_add("/migration/sparse/modes/other-process/precopy",
                       test_other_process_precopy);
    migration_test_add("/migration/sparse/modes/other-process/multifd",
                       test_other_process_multifd);
}
