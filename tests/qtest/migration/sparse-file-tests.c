/*
 * QTest testcases for sparse guest RAM: files and snapshots that are loaded
 *
 * What is loaded meets a backend that has old data in it, or, with a snapshot,
 * the data of the guest that is there.  None of it may be left, and nothing
 * that is zero may be allocated for it.
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
#include "qobject/qlist.h"

/* As large as an idle guest may become if something goes wrong */
#define IDLE_SIZE (1 * GiB)

/* What an idle guest may grow by; its page tables would be 2 MiB */
#define MAX_IDLE_GROWTH (16 * MiB)
#define MAX_IDLE_TABLES (1 * MiB)

typedef enum FileMode {
    MODE_PLAIN,
    MODE_MAPPED,
    MODE_MAPPED_NONE,       /* without zero page detection */
    MODE_MAPPED_MULTIFD,
    MODE_MAPPED_DIRECT,     /* with multifd */
    MODE_MULTIFD,           /* no file, but a socket */
    MODE__MAX,
} FileMode;

typedef struct FileModeInfo {
    const char *name;
    const char *capabilities[2];
    bool no_detection;
    bool direct_io;
    bool tcp;
} FileModeInfo;

static const FileModeInfo modes[MODE__MAX] = {
    [MODE_PLAIN] = { .name = "plain" },
    [MODE_MAPPED] = {
        .name = "mapped-ram",
        .capabilities = { "mapped-ram" },
    },
    [MODE_MAPPED_NONE] = {
        .name = "mapped-ram-none",
        .capabilities = { "mapped-ram" },
        .no_detection = true,
    },
    [MODE_MAPPED_MULTIFD] = {
        .name = "mapped-ram-multifd",
        .capabilities = { "mapped-ram", "multifd" },
    },
    [MODE_MAPPED_DIRECT] = {
        .name = "mapped-ram-multifd-direct-io",
        .capabilities = { "mapped-ram", "multifd" },
        .direct_io = true,
    },
    [MODE_MULTIFD] = {
        .name = "multifd",
        .capabilities = { "multifd" },
        .tcp = true,
    },
};

#define ALL_MAPPED (1 << MODE_MAPPED | 1 << MODE_MAPPED_MULTIFD | \
                    1 << MODE_MAPPED_DIRECT)
#define ALL_FILES (1 << MODE_PLAIN | ALL_MAPPED)

/* What is allocated on the destination afterwards */
typedef enum Expected {
    EXPECT_DATA,            /* the pages with data, and no other */
    EXPECT_DATA_AND_OLD,    /* and those that were allocated before */
    EXPECT_ANY,
} Expected;

typedef struct FileCase {
    /* Path below /migration/sparse/file, followed by the mode */
    const char *name;
    SparseBackend backend;
    unsigned modes;
    SparsePattern pattern;
    Expected expected;
    /* Old data is in the destination's RAM before */
    bool stale;
    /* Destination only */
    const char *object_opts;
} FileCase;

static const FileCase file_cases[] = {
    {
        .name = "memfd/fresh",
        .backend = BACKEND_MEMFD,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
    }, {
        .name = "memfd/stale",
        .backend = BACKEND_MEMFD,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
        .stale = true,
    }, {
        /* Nothing is in the file but what is behind the last page with data */
        .name = "memfd/stale-ends",
        .backend = BACKEND_MEMFD,
        .modes = ALL_FILES,
        .pattern = PATTERN_ENDS,
        .stale = true,
    }, {
        .name = "shm-file/stale",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_DATA_AND_OLD,
        .stale = true,
    }, {
        .name = "shm-file/stale-empty",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_FILES,
        .pattern = PATTERN_EMPTY,
        .expected = EXPECT_DATA_AND_OLD,
        .stale = true,
    }, {
        .name = "shm-file-offset/stale",
        .backend = BACKEND_SHM_FILE_OFFSET,
        .modes = ALL_FILES,
        .pattern = PATTERN_RUNS,
        .expected = EXPECT_DATA_AND_OLD,
        .stale = true,
    }, {
        .name = "shm/stale",
        .backend = BACKEND_SHM,
        .modes = 1 << MODE_MAPPED,
        .pattern = PATTERN_ALTERNATE,
        .stale = true,
    }, {
        .name = "ram-shared/stale",
        .backend = BACKEND_RAM_SHARED,
        .modes = 1 << MODE_MAPPED,
        .pattern = PATTERN_MIXED,
        .stale = true,
    }, {
        .name = "hugetlb/fresh",
        .backend = BACKEND_HUGETLB,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
    }, {
        /* Huge pages are not given back, so that reservations are kept. */
        .name = "hugetlb/stale",
        .backend = BACKEND_HUGETLB,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_ANY,
        .stale = true,
    }, {
        .name = "ram/fresh",
        .backend = BACKEND_RAM,
        .modes = ALL_MAPPED,
        .pattern = PATTERN_ENDS,
    }, {
        .name = "ram/stale",
        .backend = BACKEND_RAM,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_ANY,
        .stale = true,
    }, {
        .name = "memfd-private/fresh",
        .backend = BACKEND_MEMFD_PRIVATE,
        .modes = ALL_FILES,
        .pattern = PATTERN_ENDS,
    }, {
        /* Old data in copies of its own, and in the file that it maps */
        .name = "memfd-private/stale",
        .backend = BACKEND_MEMFD_PRIVATE,
        .modes = ALL_FILES,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_ANY,
        .stale = true,
    }, {
        .name = "memfd/none",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_MAPPED_NONE,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_ANY,
        .stale = true,
    }, {
        /* What QEMU has just created has no old data, and is not read */
        .name = "memfd/prealloc",
        .backend = BACKEND_MEMFD,
        .modes = ALL_MAPPED,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_DATA_AND_OLD,
        .object_opts = ",prealloc=on",
    }, {
        .name = "shm-file/prealloc",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_MAPPED,
        .pattern = PATTERN_MIXED,
        .expected = EXPECT_DATA_AND_OLD,
        .stale = true,
        .object_opts = ",prealloc=on",
    },
};

typedef struct FileTest {
    const FileCase *c;
    FileMode mode;
} FileTest;

/* For a job, in microseconds */
#define TIMEOUT (120 * G_USEC_PER_SEC)

static MigrationTestEnv *env;

static uint64_t ram_size(SparseBackend backend)
{
    return backend == BACKEND_HUGETLB ? HUGETLB_SIZE : PATTERN_SIZE;
}

static char *file_path(void)
{
    return g_strdup_printf("%s/%s", env->tmpfs, FILE_TEST_FILENAME);
}

static void set_mode(const FileModeInfo *mode, QTestState *who)
{
    for (int i = 0; i < ARRAY_SIZE(mode->capabilities); i++) {
        if (mode->capabilities[i]) {
            migrate_set_capability(who, mode->capabilities[i], true);
        }
    }
    if (mode->no_detection) {
        migrate_set_parameter_str(who, "zero-page-detection", "none");
    }
    if (mode->direct_io) {
        migrate_set_parameter_bool(who, "direct-io", true);
    }
}

static const char *mode_skip_reason(const FileModeInfo *mode)
{
    if (mode->direct_io && !probe_o_direct_support(env->tmpfs)) {
        return "the file system of the temporary directory has no O_DIRECT";
    }
    return NULL;
}

static void save_file(QTestState *from, QTestState *to, const char *path)
{
    g_autofree char *uri = g_strdup_printf("file:%s", path);

    migrate_ensure_converge(from);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_complete(from);
}

static void load_file(QTestState *to, const char *path)
{
    g_autofree char *uri = g_strdup_printf("file:%s", path);

    migrate_incoming_qmp(to, uri, NULL, "{}");
    wait_for_migration_complete(to);
}

static void migrate_mode(const FileModeInfo *mode, QTestState *from,
                         QTestState *to)
{
    g_autofree char *path = file_path();

    set_mode(mode, from);
    set_mode(mode, to);
    if (mode->tcp) {
        migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
        migrate_ensure_converge(from);
        migrate_qmp(from, to, NULL, NULL, "{}");
        wait_for_migration_complete(from);
        wait_for_migration_complete(to);
    } else {
        save_file(from, to, path);
        load_file(to, path);
        unlink(path);
    }
}

static unsigned long *data_pages(const GuestRam *ram, const uint8_t *kinds)
{
    unsigned long *data = bitmap_new(guest_ram_pages(ram));

    for (uint64_t page = 0; page < guest_ram_pages(ram); page++) {
        if (kinds[page] == PAGE_DATA) {
            set_bit(page, data);
        }
    }
    return data;
}

/* Each page with data is allocated, and no other one than is expected. */
static void check_allocation(const GuestRam *ram, const uint8_t *kinds,
                             Expected expected, const unsigned long *before)
{
    /* Anonymous memory is not looked at before its size has been taken */
    uint64_t bytes = guest_ram_allocated_bytes(ram);
    uint64_t unit_pages = guest_ram_allocation_unit(ram) / ram->page_size;
    g_autofree unsigned long *after = guest_ram_allocated_pages(ram);
    g_autofree unsigned long *data = data_pages(ram, kinds);
    uint64_t bad = 0;

    if (expected == EXPECT_ANY) {
        return;
    }
    if (expected == EXPECT_DATA_AND_OLD) {
        g_assert(before);
        bitmap_or(data, data, before, guest_ram_pages(ram));
    }
    g_test_message("destination has %" PRIu64 " KiB allocated, %" PRIu64
                   " KiB are expected", bytes / KiB,
                   guest_ram_max_allocated_bytes(ram, data) / KiB);
    g_assert_cmpuint(bytes, <=, guest_ram_max_allocated_bytes(ram, data));

    for (uint64_t page = 0; after && page < guest_ram_pages(ram); page++) {
        bool good = test_bit(page, data) ? test_bit(page, after)
            : !test_bit(page, after) ||
              guest_ram_unit_has_any(ram, data, page, unit_pages);

        if (!good && bad++ < 10) {
            g_test_message("page %" PRIu64 " (kind %d) is%s allocated", page,
                           kinds[page], test_bit(page, after) ? "" : " not");
        }
    }
    g_assert_cmpuint(bad, ==, 0);
}

static void make_stale(const GuestRam *ram)
{
    g_autofree uint8_t *ones = NULL;
    GuestRam file = *ram;

    if (ram->private_fd < 0) {
        guest_ram_make_stale(ram);
        return;
    }
    /* Old data in the file, and in copies that the process has of its own */
    file.fd = ram->private_fd;
    file.start = 0;
    guest_ram_make_stale(&file);
    ones = g_malloc(ram->page_size);
    memset(ones, 0xff, ram->page_size);
    for (uint64_t page = 0; page < guest_ram_pages(ram); page += 3) {
        guest_ram_write_page(ram, page, ones);
    }
}

static void test_file(const void *opaque)
{
    const FileTest *test = opaque;
    const FileCase *c = test->c;
    const char *reason = sparse_backend_skip_reason(c->backend);
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_autofree unsigned long *before = NULL;
    MigrateStart args = {};
    QTestState *from, *to;
    GuestRam src, dst;

    if (!reason) {
        reason = mode_skip_reason(&modes[test->mode]);
    }
    if (reason) {
        g_test_skip(reason);
        return;
    }

    /* The source must not be what makes the test fail: it has its own */
    guest_ram_init(&src, BACKEND_MEMFD, ram_size(c->backend));
    guest_ram_init(&dst, c->backend, ram_size(c->backend));
    src.page_size = dst.page_size;
    src_memory = guest_ram_opts(&src, NULL);
    dst_memory = guest_ram_opts(&dst, c->object_opts);
    src_opts = g_strdup_printf("-S %s", src_memory);
    dst_opts = g_strdup_printf("-S %s", dst_memory);
    args.opts_source = src_opts;
    args.opts_target = dst_opts;
    if (migrate_start(&from, &to, "defer", &args)) {
        goto out;
    }
    guest_ram_open(&src, from);
    guest_ram_open(&dst, to);

    kinds = sparse_pattern_new(c->pattern, guest_ram_pages(&src));
    guest_ram_prepare(&src, kinds);
    if (c->stale) {
        make_stale(&dst);
    }
    before = guest_ram_allocated_pages(&dst);

    migrate_mode(&modes[test->mode], from, to);

    check_allocation(&dst, kinds, c->expected, before);
    guest_ram_check_pattern(&dst, kinds);
    migrate_end(from, to, false);
out:
    guest_ram_close(&src);
    guest_ram_close(&dst);
}

/* The page tables of a process */
static uint64_t process_table_bytes(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", pid);
    g_autofree char *status = NULL;
    const char *line;

    g_assert(g_file_get_contents(path, &status, NULL, NULL));
    line = strstr(status, "\nVmPTE:");
    g_assert(line);
    return g_ascii_strtoull(line + strlen("\nVmPTE:"), NULL, 10) * KiB;
}

typedef struct IdleCase {
    const char *name;
    SparseBackend backend;
    FileMode mode;
} IdleCase;

static const IdleCase idle_cases[] = {
    { "memfd/idle", BACKEND_MEMFD, MODE_MAPPED },
    { "memfd/idle", BACKEND_MEMFD, MODE_MAPPED_MULTIFD },
    { "memfd-private/idle", BACKEND_MEMFD_PRIVATE, MODE_PLAIN },
    { "memfd-private/idle", BACKEND_MEMFD_PRIVATE, MODE_MAPPED },
    { "memfd-private/idle", BACKEND_MEMFD_PRIVATE, MODE_MULTIFD },
    { "ram/idle", BACKEND_RAM, MODE_MAPPED },
    { "ram/idle", BACKEND_RAM, MODE_MAPPED_MULTIFD },
    { "ram/idle", BACKEND_RAM, MODE_MULTIFD },
};

/*
 * What nobody has touched is not touched by the migration either: there are
 * neither pages nor page tables for it.
 */
static void test_idle(const void *opaque)
{
    const IdleCase *c = opaque;
    const char *reason = sparse_backend_skip_reason(c->backend);
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    MigrateStart args = {};
    QTestState *from, *to;
    uint64_t bytes, tables_before, tables;
    GuestRam src, dst;

    if (!reason && access("/proc/self/pagemap", R_OK) < 0) {
        reason = "/proc/self/pagemap is not readable";
    }
    if (reason) {
        g_test_skip(reason);
        return;
    }
    /* Reading anonymous memory allocates nothing, whatever the source is */
    guest_ram_init(&src, BACKEND_RAM, IDLE_SIZE);
    guest_ram_init(&dst, c->backend, IDLE_SIZE);
    src_memory = guest_ram_opts(&src, NULL);
    dst_memory = guest_ram_opts(&dst, NULL);
    src_opts = g_strdup_printf("-S %s", src_memory);
    dst_opts = g_strdup_printf("-S %s", dst_memory);
    args.opts_source = src_opts;
    args.opts_target = dst_opts;
    if (migrate_start(&from, &to, "defer", &args)) {
        goto out;
    }
    guest_ram_open(&src, from);
    guest_ram_open(&dst, to);

    tables_before = process_table_bytes(dst.pid);
    migrate_mode(&modes[c->mode], from, to);
    tables = process_table_bytes(dst.pid);
    bytes = guest_ram_allocated_bytes(&dst);

    g_test_message("destination has %" PRIu64 " KiB of RAM allocated, and %"
                   PRIu64 " KiB of page tables, it had %" PRIu64, bytes / KiB,
                   tables / KiB, tables_before / KiB);
    g_assert_cmpuint(bytes, <=, MAX_IDLE_GROWTH);
    /* There may be less of them than before */
    g_assert_cmpuint(tables, <=, tables_before + MAX_IDLE_TABLES);
    migrate_end(from, to, false);
out:
    guest_ram_close(&src);
    guest_ram_close(&dst);
}

/* A file that ends early is refused, as it always was. */
static void test_truncated(void)
{
    const char *unwanted[] = { "completed", NULL };
    g_autofree char *path = file_path();
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    g_autofree char *memory = NULL;
    g_autofree char *opts = NULL;
    g_autofree uint8_t *kinds = NULL;
    MigrateStart args = { .hide_stderr = true };
    QTestState *from, *to;
    GuestRam src;

    guest_ram_init(&src, BACKEND_MEMFD, PATTERN_SIZE);
    memory = guest_ram_opts(&src, NULL);
    opts = g_strdup_printf("-S %s", memory);
    args.opts_source = opts;
    args.opts_target = opts;
    if (migrate_start(&from, &to, "defer", &args)) {
        goto out;
    }
    guest_ram_open(&src, from);
    kinds = sparse_pattern_new(PATTERN_MIXED, guest_ram_pages(&src));
    guest_ram_prepare(&src, kinds);
    set_mode(&modes[MODE_MAPPED], from);
    set_mode(&modes[MODE_MAPPED], to);
    save_file(from, to, path);

    /* In the middle of the bitmap of the first block */
    g_assert_cmpint(truncate(path, 2 * KiB), ==, 0);
    migrate_incoming_qmp(to, uri, NULL, "{ 'exit-on-error': false }");
    wait_for_migration_status(to, "failed", unwanted);
    unlink(path);
    migrate_end(from, to, false);
out:
    guest_ram_close(&src);
}

/* Internal snapshots: one QEMU, and a qcow2 image that takes them */

#define DISK "disk0"
#define TAG "snapshot0"
/* I/O port of the interrupt mask of a PC's first interrupt controller */
#define PIC_MASK 0x21

static bool job_is_concluded(QTestState *who, const char *id)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'query-jobs' }");
    QListEntry *entry;
    bool concluded = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *job = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_str_equal(qdict_get_str(job, "id"), id) &&
            g_str_equal(qdict_get_str(job, "status"), "concluded")) {
            g_assert_cmpstr(qdict_get_try_str(job, "error"), ==, NULL);
            concluded = true;
        }
    }
    qobject_unref(rsp);
    return concluded;
}

static void wait_for_job(QTestState *who, const char *id)
{
    int64_t start = g_get_monotonic_time();

    while (!job_is_concluded(who, id)) {
        g_assert_cmpint(g_get_monotonic_time() - start, <, TIMEOUT);
        g_usleep(1000);
    }
    qtest_qmp_assert_success(who, "{ 'execute': 'job-dismiss',"
                             "'arguments': { 'id': %s } }", id);
}

/* QEMU makes the image, so that this does not depend on qemu-img */
static void add_disk(QTestState *who, const char *path)
{
    qtest_qmp_assert_success(who, "{ 'execute': 'blockdev-create',"
                             "'arguments': { 'job-id': 'create', 'options': {"
                             "'driver': 'file', 'filename': %s, 'size': 0 } } }",
                             path);
    wait_for_job(who, "create");
    qtest_qmp_assert_success(who, "{ 'execute': 'blockdev-add', 'arguments': {"
                             "'driver': 'file', 'node-name': 'file0',"
                             "'filename': %s } }", path);
    qtest_qmp_assert_success(who, "{ 'execute': 'blockdev-create',"
                             "'arguments': { 'job-id': 'create', 'options': {"
                             "'driver': 'qcow2', 'file': 'file0',"
                             "'size': 1048576 } } }");
    wait_for_job(who, "create");
    qtest_qmp_assert_success(who, "{ 'execute': 'blockdev-add', 'arguments': {"
                             "'driver': 'qcow2', 'node-name': '" DISK "',"
                             "'file': 'file0' } }");
}

static void snapshot(QTestState *who, const char *command)
{
    qtest_qmp_assert_success(who, "{ 'execute': %s, 'arguments': {"
                             "'job-id': 'job', 'tag': '" TAG "',"
                             "'vmstate': '" DISK "',"
                             "'devices': [ '" DISK "' ] } }", command);
    wait_for_job(who, "job");
}

static void snapshot_hmp(QTestState *who, const char *command)
{
    g_autofree char *output = qtest_hmp(who, "%s " TAG, command);

    g_assert_cmpstr(output, ==, "");
}

typedef struct SnapshotCase {
    /* Path below /migration/sparse/loadvm */
    const char *name;
    SparseBackend backend;
    SparsePattern pattern;
    Expected expected;
    const char *object_opts;
    bool hmp;
    /* The capability sparse-ram, which snapshots ignore, is on meanwhile */
    bool capability_save;
    bool capability_load;
} SnapshotCase;

static const SnapshotCase snapshot_cases[] = {
    { "memfd/mixed", BACKEND_MEMFD, PATTERN_MIXED },
    { "memfd/ends", BACKEND_MEMFD, PATTERN_ENDS },
    { "memfd/empty", BACKEND_MEMFD, PATTERN_EMPTY },
    { "memfd/hmp", BACKEND_MEMFD, PATTERN_MIXED, .hmp = true },
    { "memfd/prealloc", BACKEND_MEMFD, PATTERN_MIXED, EXPECT_DATA_AND_OLD,
      ",prealloc=on" },
    { "memfd/capability-save", BACKEND_MEMFD, PATTERN_MIXED,
      .capability_save = true },
    { "memfd/capability-load", BACKEND_MEMFD, PATTERN_MIXED,
      .capability_load = true },
    { "memfd/capability", BACKEND_MEMFD, PATTERN_MIXED,
      .capability_save = true, .capability_load = true },
    { "shm-file-offset/mixed", BACKEND_SHM_FILE_OFFSET, PATTERN_MIXED,
      EXPECT_DATA_AND_OLD },
    { "ram-shared/mixed", BACKEND_RAM_SHARED, PATTERN_MIXED },
    { "hugetlb/mixed", BACKEND_HUGETLB, PATTERN_MIXED, EXPECT_ANY },
    { "ram/mixed", BACKEND_RAM, PATTERN_MIXED, EXPECT_ANY },
    { "memfd-private/mixed", BACKEND_MEMFD_PRIVATE, PATTERN_MIXED, EXPECT_ANY },
};

/* A guest goes back to what it was; what it has become since is gone. */
static void test_snapshot(const void *opaque)
{
    const SnapshotCase *c = opaque;
    const char *reason = sparse_backend_skip_reason(c->backend);
    void (*take)(QTestState *, const char *) = c->hmp ? snapshot_hmp : snapshot;
    g_autofree char *path = g_strdup_printf("%s/disk", env->tmpfs);
    g_autofree char *memory = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_auto(GuestRamState) before = { };
    g_auto(GuestRamState) saved = { };
    g_auto(GuestRamState) dirty = { };
    QTestState *who;
    GuestRam ram;

    if (reason) {
        g_test_skip(reason);
        return;
    }
    guest_ram_init(&ram, c->backend, ram_size(c->backend));
    memory = guest_ram_opts(&ram, c->object_opts);
    who = qtest_initf("-nodefaults -machine q35 -S %s", memory);
    guest_ram_open(&ram, who);
    add_disk(who, path);

    kinds = sparse_pattern_new(c->pattern, guest_ram_pages(&ram));
    if (guest_ram_is_file(&ram) && !c->object_opts) {
        /* What the firmware has written is no part of the pattern */
        guest_ram_punch(&ram);
    }
    guest_ram_prepare(&ram, kinds);
    guest_ram_state_take(&before, &ram);
    migrate_set_capability(who, "sparse-ram", c->capability_save);
    take(who, c->hmp ? "savevm" : "snapshot-save");
    migrate_set_capability(who, "sparse-ram", c->capability_load);
    guest_ram_state_take(&saved, &ram);
    if (guest_ram_is_file(&ram)) {
        guest_ram_check_growth(&ram, &before, &saved, RAM_KEPT, 0,
                               guest_ram_pages(&ram));
    }
    guest_ram_check_pattern(&ram, kinds);

    make_stale(&ram);
    guest_ram_state_take(&dirty, &ram);
    take(who, c->hmp ? "loadvm" : "snapshot-load");
    check_allocation(&ram, kinds, c->expected, dirty.pages);
    guest_ram_check_pattern(&ram, kinds);

    /* Once more, to a guest that has nothing at all */
    if (guest_ram_is_file(&ram) && c->expected == EXPECT_DATA) {
        guest_ram_punch(&ram);
        take(who, c->hmp ? "loadvm" : "snapshot-load");
        check_allocation(&ram, kinds, EXPECT_DATA, NULL);
        guest_ram_check_pattern(&ram, kinds);
    }
    qtest_quit(who);
    unlink(path);
    guest_ram_close(&ram);
}

/* A snapshot has no mapped RAM: loadvm must say so before it resets anything */
static void test_snapshot_mapped_ram(void)
{
    g_autofree char *path = g_strdup_printf("%s/disk", env->tmpfs);
    g_autofree uint8_t *kinds = NULL;
    g_autofree char *memory = NULL;
    g_autofree char *output = NULL;
    QTestState *who;
    GuestRam ram;

    guest_ram_init(&ram, BACKEND_MEMFD, ram_size(BACKEND_MEMFD));
    memory = guest_ram_opts(&ram, NULL);
    who = qtest_initf("-nodefaults -machine q35 -S %s", memory);
    guest_ram_open(&ram, who);
    add_disk(who, path);
    snapshot(who, "snapshot-save");

    kinds = sparse_pattern_new(PATTERN_MIXED, guest_ram_pages(&ram));
    guest_ram_punch(&ram);
    guest_ram_prepare(&ram, kinds);
    /* The interrupt mask is 0 after a reset */
    qtest_outb(who, PIC_MASK, 0x5a);
    migrate_set_capability(who, "mapped-ram", true);
    output = qtest_hmp(who, "loadvm " TAG);
    g_test_message("%s", output);
    g_assert(strstr(output, "mapped-ram"));
    g_assert_cmphex(qtest_inb(who, PIC_MASK), ==, 0x5a);
    guest_ram_check_pattern(&ram, kinds);

    qtest_quit(who);
    unlink(path);
    guest_ram_close(&ram);
}

static void add_file_case(const FileCase *c)
{
    for (FileMode mode = 0; mode < MODE__MAX; mode++) {
        g_autofree char *path = g_strdup_printf("/migration/sparse/file/%s/%s",
                                                c->name, modes[mode].name);
        FileTest *test;

        if (!(c->modes & (1 << mode))) {
            continue;
        }
        test = g_new(FileTest, 1);
        *test = (FileTest) { c, mode };
        qtest_add_data_func_full(path, test, test_file, g_free);
    }
}

void migration_test_add_sparse_file(MigrationTestEnv *the_env)
{
    env = the_env;

    for (int i = 0; i < ARRAY_SIZE(file_cases); i++) {
        add_file_case(&file_cases[i]);
    }
    for (int i = 0; i < ARRAY_SIZE(idle_cases); i++) {
        g_autofree char *path =
            g_strdup_printf("/migration/sparse/file/%s/%s", idle_cases[i].name,
                            modes[idle_cases[i].mode].name);

        qtest_add_data_func(path, &idle_cases[i], test_idle);
    }
    migration_test_add("/migration/sparse/file/truncated", test_truncated);
    migration_test_add("/migration/sparse/loadvm/mapped-ram",
                       test_snapshot_mapped_ram);
    for (int i = 0; i < ARRAY_SIZE(snapshot_cases); i++) {
        g_autofree char *path = g_strdup_printf("/migration/sparse/loadvm/%s",
                                                snapshot_cases[i].name);

        qtest_add_data_func(path, &snapshot_cases[i], test_snapshot);
    }
}
