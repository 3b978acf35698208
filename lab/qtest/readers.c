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

#include <elf.h>
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

typedef struct DumpCase {
    const char *name;
    const char *format;
    const SparseBackend *backend;
    const SparsePattern *pattern;
    DumpTarget target;
    bool detach;
    /* Only a part of the memory, unless 0 */
    uint64_t begin;
    uint64_t length;
} DumpCase;

#define DUMP_OLD_SIZE (PATTERN_SIZE / 2 + 12345)
#define DUMP_OLD_DATA 0xa5

static const DumpCase dump_cases[] = {
    { "dump/elf", "elf", &sparse_memfd, &sparse_mixed },
    { "dump/elf-runs", "elf", &sparse_memfd, &lab_runs },
    { "dump/elf-detach", "elf", &sparse_memfd, &lab_runs, .detach = true },
    { "dump/elf-used-file", "elf", &sparse_memfd, &lab_runs,
      DUMP_FILE_USED },
    { "dump/elf-append", "elf", &sparse_memfd, &lab_runs, DUMP_FILE_APPEND },
    { "dump/elf-pipe", "elf", &sparse_memfd, &lab_runs, DUMP_PIPE },
    { "dump/elf-filter", "elf", &sparse_memfd, &sparse_mixed,
      .begin = 2 * MiB + 0x800, .length = 32 * MiB + 0x100 },
    { "dump/elf-shm-file-offset", "elf", &lab_shm_file_offset,
      &sparse_mixed },
    { "dump/elf-private", "elf", &lab_private, &sparse_mixed },
    { "dump/elf-hugetlb", "elf", &sparse_hugetlb, &sparse_mixed },
    { "dump/elf-hugetlb-filter", "elf", &sparse_hugetlb, &sparse_mixed,
      .begin = 2 * MiB + 0x800, .length = 32 * MiB + 0x100 },
    { "dump/kdump-zlib-detach", "kdump-zlib", &sparse_memfd, &lab_runs,
      .detach = true },
    { "dump/kdump-zlib-private", "kdump-zlib", &lab_private,
      &sparse_mixed },
    { "dump/kdump-zlib-hugetlb", "kdump-zlib", &sparse_hugetlb, &sparse_mixed },
};

/* Compare a part of the memory that need not begin or end with a page */
static void check_filtered_dump(const SparseGuests *guests, const DumpCase *c,
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
    g_assert(lab_wait_for_dump(who, LAB_TIMEOUT));
    close_dump_target(c->target, file);
}

/* There is no migration */
static void is_dumped(SparseGuests *guests)
{
}

static void test_dump(const void *opaque)
{
    const DumpCase *c = opaque;
    SparseRow row = {
        .backend = c->backend,
        /*
         * A write to a private mapping allocates a page of the file, too, which
         * stays zero, and which the kernel can free at any time.
         */
        .expect.src = c->backend == &lab_private ? SPARSE_RELEASED : 0,
        .expect.sparse_file = !g_str_equal(c->format, "elf"),
        .act = is_dumped,
    };
    SparseGuests guests;

    if (!sparse_begin(&guests, &row, &sparse_precopy, c->pattern)) {
        return;
    }
    unlink(guests.file);
    dump_guest(c, guests.from, guests.file);
    sparse_check(&guests);
    if (c->length) {
        check_filtered_dump(&guests, c, guests.file);
    } else if (g_str_equal(c->format, "elf")) {
        lab_check_elf_dump(&guests.src, guests.kinds, guests.file);
        if (c->target == DUMP_FILE || c->target == DUMP_FILE_USED) {
            check_dump_file(&guests, guests.file);
        }
    }
    sparse_end(&guests);
}

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
        g_assert_cmpint(g_get_monotonic_time() - start, <, LAB_TIMEOUT);
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
    const char *name;
    const SparseBackend *backend;
    const SparsePattern *pattern;
    SparseAllocation expect;
    const char *object_opts;
    bool hmp;
    /* The capability sparse-ram, which snapshots ignore, is on meanwhile */
    bool capability_save;
    bool capability_load;
} SnapshotCase;

static const SnapshotCase snapshot_cases[] = {
    { "memfd/mixed", &sparse_memfd, &sparse_mixed },
    { "memfd/ends", &sparse_memfd, &lab_ends },
    { "memfd/empty", &sparse_memfd, &sparse_empty },
    { "memfd/hmp", &sparse_memfd, &sparse_mixed, .hmp = true },
    { "memfd/prealloc", &sparse_memfd, &sparse_mixed, SPARSE_FULL,
      ",prealloc=on" },
    { "memfd/capability-save", &sparse_memfd, &sparse_mixed,
      .capability_save = true },
    { "memfd/capability-load", &sparse_memfd, &sparse_mixed,
      .capability_load = true },
    { "memfd/capability", &sparse_memfd, &sparse_mixed,
      .capability_save = true, .capability_load = true },
    { "shm-file-offset/mixed", &lab_shm_file_offset, &sparse_mixed,
      SPARSE_RELEASED },
    { "ram-shared/mixed", &lab_ram_shared, &sparse_mixed },
    { "hugetlb/mixed", &sparse_hugetlb, &sparse_mixed, SPARSE_ANY },
    { "ram/mixed", &lab_ram, &sparse_mixed, SPARSE_ANY },
    { "memfd-private/mixed", &lab_private, &sparse_mixed, SPARSE_ANY },
};

static void load(const SnapshotCase *c, QTestState *who)
{
    if (c->hmp) {
        snapshot_hmp(who, "loadvm");
    } else {
        snapshot(who, "snapshot-load");
    }
}

static QTestState *start_with_disk(GuestRam *ram, const SparseBackend *backend,
                                   const char *object, const char *path)
{
    g_autofree char *memory = NULL;
    QTestState *who;

    g_assert(guest_ram_init(ram, backend, 0));
    memory = guest_ram_opts(ram, object);
    who = qtest_initf("-nodefaults -machine q35 -S %s", memory);
    guest_ram_open(ram, who);
    add_disk(who, path);
    return who;
}

static void check_loaded(const SnapshotCase *c, const GuestRam *ram,
                         const uint8_t *kinds, const GuestRamState *before)
{
    g_autofree unsigned long *data = sparse_data_pages(kinds, ram->pages);

    guest_ram_check_allocation(ram, c->expect ?: SPARSE_DATA, before, data);
    guest_ram_check_pattern(ram, kinds);
}

/* A guest goes back to what it was; what it has become since is gone. */
static void test_snapshot(const void *opaque)
{
    const SnapshotCase *c = opaque;
    const char *reason = c->backend->skip_reason ? c->backend->skip_reason()
                                                 : NULL;
    g_autofree char *path = g_strdup_printf("%s/disk", sparse_env->tmpfs);
    g_autofree uint8_t *kinds = NULL;
    g_auto(GuestRamState) before = { };
    SparseGuests stale = { };
    QTestState *who;
    GuestRam ram;

    if (reason) {
        g_test_skip(reason);
        return;
    }
    who = start_with_disk(&ram, c->backend, c->object_opts, path);
    kinds = sparse_pattern_new(c->pattern, ram.pages);
    if (!c->backend->bytes && !c->object_opts) {
        /* What the firmware has written is no part of the pattern */
        guest_ram_punch(&ram);
    }
    guest_ram_prepare(&ram, kinds);
    guest_ram_state_take(&before, &ram);
    migrate_set_capability(who, "sparse-ram", c->capability_save);
    if (c->hmp) {
        snapshot_hmp(who, "savevm");
    } else {
        snapshot(who, "snapshot-save");
    }
    migrate_set_capability(who, "sparse-ram", c->capability_load);
    if (!c->backend->bytes) {
        guest_ram_check_allocation(&ram, SPARSE_KEPT, &before, NULL);
    }
    guest_ram_check_pattern(&ram, kinds);

    stale.dst = ram;
    if (ram.file_fd >= 0) {
        lab_make_private_stale(&stale);
    } else {
        guest_ram_make_stale(&ram);
    }
    guest_ram_state_take(&before, &ram);
    load(c, who);
    check_loaded(c, &ram, kinds, &before);

    /* Once more, to a guest that has nothing at all */
    if (!c->expect) {
        guest_ram_punch(&ram);
        guest_ram_state_take(&before, &ram);
        load(c, who);
        check_loaded(c, &ram, kinds, &before);
    }
    qtest_quit(who);
    unlink(path);
    guest_ram_close(&ram);
}

/* QEMU 10.0 has no snapshots with mapped RAM: it says so before it resets */
static void check_mapped_ram_refused(QTestState *who, GuestRam *ram,
                                     const uint8_t *kinds)
{
    g_autofree char *output = NULL;

    migrate_set_capability(who, "mapped-ram", false);
    snapshot(who, "snapshot-save");
    migrate_set_capability(who, "mapped-ram", true);
    /* The interrupt mask is 0 after a reset */
    qtest_outb(who, PIC_MASK, 0x5a);
    output = qtest_hmp(who, "loadvm " TAG);
    g_assert(strstr(output, "mapped-ram"));
    g_assert_cmphex(qtest_inb(who, PIC_MASK), ==, 0x5a);
    guest_ram_check_pattern(ram, kinds);
}

/* Pages that are not in the snapshot were zero, whatever is there now. */
static void check_mapped_ram_loaded(QTestState *who, GuestRam *ram,
                                    const uint8_t *kinds)
{
    g_autofree unsigned long *data = sparse_data_pages(kinds, ram->pages);
    g_auto(GuestRamState) before = { };

    guest_ram_make_stale(ram);
    guest_ram_state_take(&before, ram);
    snapshot_hmp(who, "loadvm");
    guest_ram_check_allocation(ram, SPARSE_DATA, &before, data);
    guest_ram_check_pattern(ram, kinds);
}

static void test_snapshot_mapped_ram(const void *opaque)
{
    g_autofree char *path = g_strdup_printf("%s/disk", sparse_env->tmpfs);
    g_autofree uint8_t *kinds = NULL;
    g_autofree char *output = NULL;
    QTestState *who;
    GuestRam ram;

    who = start_with_disk(&ram, &sparse_memfd, NULL, path);
    kinds = sparse_pattern_new(&sparse_mixed, ram.pages);
    guest_ram_punch(&ram);
    guest_ram_prepare(&ram, kinds);
    migrate_set_capability(who, "mapped-ram", true);
    output = qtest_hmp(who, "savevm " TAG);
    if (*output) {
        g_assert(strstr(output, "mapped-ram"));
        check_mapped_ram_refused(who, &ram, kinds);
    } else {
        check_mapped_ram_loaded(who, &ram, kinds);
    }

    qtest_quit(who);
    unlink(path);
    guest_ram_close(&ram);
}

void lab_add_readers(void)
{
    LAB_ADD_CASES("modes/", dump_cases, test_dump);
    sparse_add_rows(rows, ARRAY_SIZE(rows));
    lab_add_test("modes/other-process/precopy", &sparse_precopy,
                 test_other_process);
    lab_add_test("modes/other-process/multifd", &sparse_multifd,
                 test_other_process);
    LAB_ADD_CASES("loadvm/", snapshot_cases, test_snapshot);
    lab_add_test("loadvm/mapped-ram", NULL, test_snapshot_mapped_ram);
}
