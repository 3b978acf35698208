/*
 * QTest testcases for sparse guest RAM: everything else that reads or writes it
 *
 * Dumps, dirty rates and snapshots: none of them may allocate what is a hole,
 * and each has to bring the content over.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/ioctl.h>
#include <sys/mman.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bitmap.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "sparse-lab.h"

/* What may be in a file besides the data of the guest's main memory */
#define FILE_SLACK (3 * MiB)

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

/*
 * The guest (or a device) writes while the snapshot is being taken: to a hole,
 * to pages that are populated and mapped, and to such that are not mapped.  The
 * snapshot has what was there before.
 */
static void write_during_snapshot(SparseGuests *guests)
{
    g_autofree char *uri = g_strdup_printf("file:%s", guests->file);
    SlowPipe slow_pipe = { .path = guests->file };
    uint64_t pages[5];
    GThread *drain;
    int i, queued;

    /* The last ones, which are saved late */
    pages[0] = lab_last_of_kind(guests, PAGE_HOLE, guests->src.pages);
    pages[1] = lab_last_of_kind(guests, PAGE_DATA, pages[0]);
    pages[2] = lab_last_of_kind(guests, PAGE_DATA, pages[1]);
    pages[3] = lab_last_of_kind(guests, PAGE_ZERO, pages[2]);
    pages[4] = lab_last_of_kind(guests, PAGE_ZERO, pages[3]);
    qtest_readb(guests->from, pages[2] * guests->src.page_size);
    qtest_readb(guests->from, pages[4] * guests->src.page_size);

    g_assert(g_unix_open_pipe(slow_pipe.fds, FD_CLOEXEC, NULL));
    qtest_qmp_fds_assert_success(guests->from, &slow_pipe.fds[1], 1,
                                 "{ 'execute': 'getfd', 'arguments': {"
                                 "'fdname': 'snapshot' } }");
    close(slow_pipe.fds[1]);
    migrate_qmp(guests->from, guests->to, "fd:snapshot", NULL, "{}");

    /* More than the setup: the memory is protected and is being saved */
    do {
        g_usleep(1000);
        g_assert_cmpint(ioctl(slow_pipe.fds[0], FIONREAD, &queued), ==, 0);
    } while (queued < 32 * KiB);

    drain = g_thread_new("drain", slow_pipe_drain, &slow_pipe);
    for (i = 0; i < ARRAY_SIZE(pages); i++) {
        uint64_t address = pages[i] * guests->src.page_size;

        qtest_writeq(guests->from, address, 0xfeedf00d);
        g_assert_cmphex(qtest_readq(guests->from, address), ==, 0xfeedf00d);
    }
    wait_for_migration_complete(guests->from);
    g_thread_join(drain);
    close(slow_pipe.fds[0]);

    /* Only the hole that was written to may be allocated now */
    if (guest_ram_allocation_unit(&guests->src) > guests->src.page_size) {
        guest_ram_state_take(&guests->src_before, &guests->src);
    } else {
        set_bit(pages[0], guests->src_before.pages);
        guests->src_before.bytes += guests->src.page_size;
    }

    migrate_incoming_qmp(guests->to, uri, NULL, "{}");
    wait_for_migration_complete(guests->to);
    guest_ram_check_pattern(&guests->dst, guests->kinds);
}

/* Where a dump goes to */
typedef enum DumpTarget {
    DUMP_FILE,
    DUMP_FILE_USED,     /* open, with old data in it */
    DUMP_FILE_APPEND,
    DUMP_PIPE,
} DumpTarget;

/* A row, and what it dumps */
typedef struct DumpCase {
    SparseRow row;
    const char *format;
    DumpTarget target;
    bool detach;
    /* Only a part of the memory, unless 0 */
    uint64_t begin;
    uint64_t length;
} DumpCase;

#define DUMP_OLD_SIZE (PATTERN_SIZE / 2 + 12345)
#define DUMP_OLD_DATA 0xa5

/* QEMU writes shorter holes as zeroes */
#define DUMP_HOLE_MIN (64 * KiB)

/* What is left of a hole of the guest: the blocks at its ends have data */
static uint64_t hole_in_dump(uint64_t hole)
{
    return hole < DUMP_HOLE_MIN ? 0 : hole - 2 * qemu_real_host_page_size();
}

static void check_dump_file(const SparseGuests *guests, const char *path)
{
    const GuestRam *ram = &guests->src;
    uint64_t bytes = sparse_file_bytes(path);
    uint64_t expected = ram->size + FILE_SLACK, hole = 0;

    for (uint64_t page = 0; page < ram->pages; page++) {
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

static void dump_guest(SparseGuests *guests)
{
    const DumpCase *c = container_of(guests->row, DumpCase, row);
    g_autofree char *protocol = NULL;
    QTestState *who = guests->from;
    QDict *args = qdict_new();
    FILE *file;

    unlink(guests->file);
    file = open_dump_target(c->target, guests->file);
    if (file) {
        int fd = fileno(file);

        qtest_qmp_fds_assert_success(who, &fd, 1, "{ 'execute': 'getfd',"
                                     "'arguments': { 'fdname': 'dump' } }");
        protocol = g_strdup("fd:dump");
    } else {
        protocol = g_strdup_printf("file:%s", guests->file);
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
    g_assert(lab_wait_for_dump(who, LAB_TIMEOUT));
    close_dump_target(c->target, file);
}

static void check_dump(SparseGuests *guests)
{
    const DumpCase *c = container_of(guests->row, DumpCase, row);

    if (!g_str_equal(c->format, "elf")) {
        return;
    }
    lab_check_elf_dump(&guests->src, guests->kinds, guests->file,
                       c->begin, c->length);
    if (!c->length &&
        (c->target == DUMP_FILE || c->target == DUMP_FILE_USED)) {
        check_dump_file(guests, guests->file);
    }
}

#define DUMP(dump) \
    .name = "modes/dump/" dump, .act = dump_guest, .check = check_dump
#define ELF(dump) .format = "elf", .row = { DUMP(dump) }
#define RUNS .row.patterns = { &lab_runs }
#define FILTER .begin = 2 * MiB + 0x800, .length = 32 * MiB + 0x100
#define KDUMP(dump) \
    .format = "kdump-zlib", \
    .row = { DUMP(dump), .expect.sparse_file = true }
/*
 * A write to a private mapping allocates a page of the file, too, which stays
 * zero, and which the kernel can free at any time.
 */
#define PRIVATE \
    .row.backend = &lab_private, .row.expect.src = SPARSE_RELEASED

static const DumpCase dump_cases[] = {
    { ELF("elf") },
    { ELF("elf-runs"), RUNS },
    { ELF("elf-detach"), RUNS, .detach = true },
    { ELF("elf-used-file"), RUNS, .target = DUMP_FILE_USED },
    { ELF("elf-append"), RUNS, .target = DUMP_FILE_APPEND },
    { ELF("elf-pipe"), RUNS, .target = DUMP_PIPE },
    { ELF("elf-filter"), FILTER },
    { ELF("elf-shm-file-offset"), .row.backend = &lab_shm_file_offset },
    { ELF("elf-private"), PRIVATE },
    { ELF("elf-hugetlb"), .row.backend = &sparse_hugetlb },
    { ELF("elf-hugetlb-filter"), .row.backend = &sparse_hugetlb, FILTER },
    { KDUMP("kdump-zlib-detach"), RUNS, .detach = true },
    { KDUMP("kdump-zlib-private"), PRIVATE },
    { KDUMP("kdump-zlib-hugetlb"), .row.backend = &sparse_hugetlb },
};

static void measure_dirty_rate(SparseGuests *guests)
{
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'calc-dirty-rate',"
                             "'arguments': { 'calc-time': 100,"
                             "'calc-time-unit': 'millisecond',"
                             "'sample-pages': 4096 } }");
    lab_wait_for_dirty_rate(guests->from);
}

static const SparseRow rows[] = {
    {
        .name = "modes/dirty-rate/shm-file-offset",
        .backend = &lab_shm_file_offset, .act = measure_dirty_rate,
    }, {
        .name = "modes/dirty-rate/memfd-private", .backend = &lab_private,
        .act = measure_dirty_rate, .expect.src = SPARSE_RELEASED,
    }, {
        .name = "modes/snapshot/write", .ways = { &lab_snapshot },
        .act = write_during_snapshot,
    },
};

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
static void test_other_process(const void *opaque)
{
    static const SparseRow row = { };
    g_autofree char *uri = NULL;
    SparseGuests guests;
    uint64_t page;
    char *map;

    if (!sparse_begin(&guests, &row, &sparse_precopy, &sparse_empty)) {
        return;
    }
    uri = g_strdup_printf("file:%s", guests.file);
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
    guest_ram_check_allocation(&guests.src, SPARSE_KEPT, &guests.src_before,
                               NULL);

    g_free(guests.kinds);
    guests.kinds = sparse_pattern_new(&sparse_mixed, guests.src.pages);
    map = mmap(NULL, guests.src.size, PROT_READ | PROT_WRITE, MAP_SHARED,
               guests.src.fd, 0);
    g_assert(map != MAP_FAILED);
    for (page = 0; page < guests.src.pages; page++) {
        if (guests.kinds[page] != PAGE_HOLE) {
            sparse_pattern_page((uint64_t *)(map +
                                             page * guests.src.page_size),
                                guests.kinds, page, guests.src.page_size);
        }
    }
    munmap(map, guests.src.size);
    guest_ram_state_take(&guests.src_before, &guests.src);

    sparse_set_way(&guests, opaque);
    sparse_migrate(&guests, NULL);
    sparse_check(&guests);
    sparse_end(&guests);
}

/* Internal snapshots, of the source, in a qcow2 image */

#define DISK "disk0"
#define TAG "snapshot0"
/* I/O port of the scratch register of a PC's first serial port */
#define SERIAL_SCRATCH 0x3ff

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
        g_assert_cmpint(g_get_monotonic_time() - start, <, LAB_TIMEOUT);
        g_usleep(1000);
    }
    qtest_qmp_assert_success(who, "{ 'execute': 'job-dismiss',"
                             "'arguments': { 'id': %s } }", id);
}

/* QEMU makes the image, so that this does not depend on qemu-img */
static void add_disk(QTestState *who, const char *path)
{
    /* The disk that the framework gives it takes no snapshots */
    g_assert(sparse_try(who, "drive_del d0"));
    qtest_qmp_assert_success(who, "{ 'execute': 'blockdev-create',"
                             "'arguments': { 'job-id': 'create', 'options': {"
                             "'driver': 'file', 'filename': %s,"
                             "'size': 0 } } }", path);
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

/* A row, whose .expect.dst is what is allocated when it has been loaded */
typedef struct SnapshotCase {
    SparseRow row;
    bool hmp;
    /* The capability sparse-ram, which snapshots ignore, is on meanwhile */
    bool capability_save;
    bool capability_load;
} SnapshotCase;

static void load(const SnapshotCase *c, QTestState *who)
{
    if (c->hmp) {
        snapshot_hmp(who, "loadvm");
    } else {
        snapshot(who, "snapshot-load");
    }
}

static void check_loaded(const SparseGuests *guests,
                         const GuestRamState *before)
{
    const GuestRam *ram = &guests->src;
    g_autofree unsigned long *data = sparse_data_pages(guests->kinds,
                                                       ram->pages);

    guest_ram_check_allocation(ram, guests->row->expect.dst ?: SPARSE_DATA,
                               before, data);
    guest_ram_check_pattern(ram, guests->kinds);
}

/* A guest goes back to what it was; what it has become since is gone. */
static void save_and_load(SparseGuests *guests)
{
    const SnapshotCase *c = container_of(guests->row, SnapshotCase, row);
    const GuestRam *ram = &guests->src;
    g_auto(GuestRamState) before = { };
    QTestState *who = guests->from;

    add_disk(who, guests->file);
    /* The stock QEMU does not have it, but fails because of what follows */
    if (c->capability_save) {
        migrate_set_capability(who, "sparse-ram", true);
    }
    if (c->hmp) {
        snapshot_hmp(who, "savevm");
    } else {
        snapshot(who, "snapshot-save");
    }
    if (c->capability_load != c->capability_save) {
        migrate_set_capability(who, "sparse-ram", c->capability_load);
    }
    if (!ram->backend->bytes) {
        guest_ram_check_allocation(ram, SPARSE_KEPT, &guests->src_before, NULL);
    }
    guest_ram_check_pattern(ram, guests->kinds);

    if (ram->file_fd >= 0) {
        lab_make_private_stale(ram);
    } else {
        guest_ram_make_stale(ram);
    }
    guest_ram_state_take(&before, ram);
    load(c, who);
    check_loaded(guests, &before);

    /* Once more, to a guest that has nothing at all */
    if (!guests->row->expect.dst) {
        guest_ram_punch(ram);
        guest_ram_state_take(&before, ram);
        load(c, who);
        check_loaded(guests, &before);
    }
}

/* QEMU 10.0 has no snapshots with mapped RAM: it says so before it resets */
static void check_mapped_ram_refused(SparseGuests *guests)
{
    QTestState *who = guests->from;
    g_autofree char *output = NULL;

    migrate_set_capability(who, "mapped-ram", false);
    snapshot(who, "snapshot-save");
    migrate_set_capability(who, "mapped-ram", true);
    /* It is 0 after a reset */
    qtest_outb(who, SERIAL_SCRATCH, 0x5a);
    output = qtest_hmp(who, "loadvm " TAG);
    g_assert(strstr(output, "mapped-ram"));
    g_assert_cmphex(qtest_inb(who, SERIAL_SCRATCH), ==, 0x5a);
    guest_ram_check_pattern(&guests->src, guests->kinds);
}

/* Pages that are not in the snapshot were zero, whatever is there now. */
static void save_and_load_mapped_ram(SparseGuests *guests)
{
    g_auto(GuestRamState) before = { };
    g_autofree char *output = NULL;

    add_disk(guests->from, guests->file);
    migrate_set_capability(guests->from, "mapped-ram", true);
    output = qtest_hmp(guests->from, "savevm " TAG);
    if (*output) {
        g_assert(strstr(output, "mapped-ram"));
        check_mapped_ram_refused(guests);
        return;
    }
    guest_ram_make_stale(&guests->src);
    guest_ram_state_take(&before, &guests->src);
    snapshot_hmp(guests->from, "loadvm");
    check_loaded(guests, &before);
}

static const SparseBackend prealloc = {
    .object = "memory-backend-memfd,share=on,prealloc=on",
    .link = "/memfd:",
};

/* The source is not what it was before: that is looked at when it is loaded */
#define LOADVM(test) \
    .row = { \
        .name = "loadvm/" test, .act = save_and_load, .expect.src = SPARSE_ANY \
    }

static const SnapshotCase snapshot_cases[] = {
    { LOADVM("memfd/mixed") },
    { LOADVM("memfd/ends"), .row.patterns = { &lab_ends } },
    { LOADVM("memfd/empty"), .row.patterns = { &sparse_empty } },
    { LOADVM("memfd/hmp"), .hmp = true },
    {
        LOADVM("memfd/prealloc"), .row.backend = &prealloc,
        .row.expect.dst = SPARSE_FULL,
    },
    { LOADVM("memfd/capability-save"), .capability_save = true },
    { LOADVM("memfd/capability-load"), .capability_load = true },
    {
        LOADVM("memfd/capability"),
        .capability_save = true, .capability_load = true,
    }, {
        LOADVM("shm-file-offset/mixed"), .row.backend = &lab_shm_file_offset,
        .row.expect.dst = SPARSE_RELEASED,
    },
    { LOADVM("ram-shared/mixed"), .row.backend = &lab_ram_shared },
    {
        LOADVM("hugetlb/mixed"), .row.backend = &sparse_hugetlb,
        .row.expect.dst = SPARSE_ANY,
    }, {
        LOADVM("ram/mixed"), .row.backend = &lab_ram,
        .row.expect.dst = SPARSE_ANY,
    }, {
        LOADVM("memfd-private/mixed"), .row.backend = &lab_private,
        .row.expect.dst = SPARSE_ANY,
    }, {
        .row = {
            .name = "loadvm/mapped-ram", .act = save_and_load_mapped_ram,
            .expect.src = SPARSE_ANY,
        },
    },
};

void lab_add_readers(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(dump_cases); i++) {
        sparse_add_rows(&dump_cases[i].row, 1);
    }
    sparse_add_rows(rows, ARRAY_SIZE(rows));
    lab_add_test("modes/other-process/precopy", &sparse_precopy,
                 test_other_process);
    lab_add_test("modes/other-process/multifd", &sparse_multifd,
                 test_other_process);
    for (i = 0; i < ARRAY_SIZE(snapshot_cases); i++) {
        sparse_add_rows(&snapshot_cases[i].row, 1);
    }
}
