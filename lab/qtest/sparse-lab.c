/*
 * QTest helpers for the tests that stay with the sparse-ram project
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <elf.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bitmap.h"
#include "qobject/qdict.h"
#include "sparse-lab.h"

/* Backends */

static int open_shm_file(void)
{
    return sparse_shm_file.open_file();
}

static const char *shm_skip_reason(void)
{
    return sparse_shm_file.skip_reason();
}

static const char *private_skip_reason(void)
{
    return access("/proc/self/mem", W_OK) == 0
        ? NULL : "/proc/PID/mem is not writable";
}

/* The address of the guest's RAM in QEMU */
static off_t host_address(QTestState *who)
{
    g_autofree char *blocks = qtest_hmp(who, "info ramblock");
    g_auto(GStrv) lines = g_strsplit(blocks, "\n", -1);
    int i;

    for (i = 0; lines[i]; i++) {
        char name[256];
        uint64_t host;

        if (sscanf(lines[i], "%255s %*s %*s 0x%*x 0x%*x 0x%*x 0x%" SCNx64,
                   name, &host) == 2 &&
            g_str_has_suffix(name, BACKEND_ID)) {
            return host;
        }
    }
    g_assert_not_reached();
}

void lab_open_private(GuestRam *ram, QTestState *who)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/mem", ram->pid);

    ram->file_fd = ram->fd;
    ram->fd = open(path, O_RDWR | O_CLOEXEC);
    g_assert_cmpint(ram->fd, >=, 0);
    ram->start = host_address(who);
}

/* The anonymous memory that a process has in a range */
static uint64_t anonymous_bytes(pid_t pid, uint64_t start, uint64_t size)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/smaps", pid);
    g_autofree char *smaps = NULL;
    g_auto(GStrv) lines = NULL;
    bool inside = false;
    uint64_t bytes = 0;
    int i;

    g_assert(g_file_get_contents(path, &smaps, NULL, NULL));
    lines = g_strsplit(smaps, "\n", -1);
    for (i = 0; lines[i]; i++) {
        uint64_t from, to, kib;

        if (sscanf(lines[i], "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) {
            inside = from < start + size && to > start;
        } else if (inside &&
                   sscanf(lines[i], "Anonymous: %" SCNu64 " kB", &kib) == 1) {
            bytes += kib * KiB;
        }
    }
    return bytes;
}

uint64_t lab_private_bytes(const GuestRam *ram)
{
    return anonymous_bytes(ram->pid, ram->start, ram->size) +
           (ram->file_fd < 0 ? 0 : guest_ram_file_bytes(ram->file_fd));
}

GuestRam lab_file_of_private(const GuestRam *ram)
{
    GuestRam file = *ram;

    file.fd = ram->file_fd;
    file.start = 0;
    return file;
}

void lab_make_private_stale(const GuestRam *ram)
{
    const GuestRam file = lab_file_of_private(ram);
    g_autofree void *ones = g_malloc(ram->page_size);
    uint64_t page;

    guest_ram_make_stale(&file);
    memset(ones, 0xff, ram->page_size);
    for (page = 0; page < ram->pages; page += 3) {
        guest_ram_write_page(ram, page, ones);
    }
}

const SparseBackend lab_private = {
    .object = "memory-backend-memfd,share=off",
    .link = "/memfd:",
    .skip_reason = private_skip_reason,
    .open = lab_open_private,
    .bytes = lab_private_bytes,
};

const SparseBackend lab_ram = {
    .object = "memory-backend-ram",
    .skip_reason = private_skip_reason,
    .open = lab_open_private,
    .bytes = lab_private_bytes,
};

const SparseBackend lab_ram_shared = {
    .object = "memory-backend-ram,share=on",
    .link = "/memfd:",
};

const SparseBackend lab_shm = {
    .object = "memory-backend-shm",
    .link = "/dev/shm/",
    .skip_reason = shm_skip_reason,
};

const SparseBackend lab_shm_file_offset = {
    .object = "memory-backend-file,share=on,offset=1044480",
    .open_file = open_shm_file,
    /* 255 pages, so that no pattern fits if the offset is forgotten */
    .offset = 1020 * KiB,
    .skip_reason = shm_skip_reason,
};

/* Patterns */

static PageKind alternate_kind(uint64_t page, uint64_t pages)
{
    return page % 2 ? PAGE_HOLE : PAGE_DATA;
}

static PageKind dense_kind(uint64_t page, uint64_t pages)
{
    return PAGE_DATA;
}

/* One page of data, a hole of one page, two of data, ... */
static PageKind runs_kind(uint64_t page, uint64_t pages)
{
    uint64_t run = 1, start = 0;

    while (page >= start + 2 * run) {
        start += 2 * run++;
    }
    return page < start + run ? PAGE_DATA : PAGE_HOLE;
}

static PageKind ends_kind(uint64_t page, uint64_t pages)
{
    return page == 0 || page + 1 == pages ? PAGE_DATA : PAGE_HOLE;
}

static PageKind zeroed_kind(uint64_t page, uint64_t pages)
{
    return PAGE_ZERO;
}

/*
 * The first pages vary from one to the next.  After them there are holes that
 * are long enough to be cut, and one that ends where the block does.
 */
static PageKind long_holes_kind(uint64_t page, uint64_t pages)
{
    if (page < 4096) {
        return sparse_mixed.kind(page, pages);
    }
    return page % 4099 == 1 ? PAGE_DATA :
           page % 4099 == 2 ? PAGE_ZERO : PAGE_HOLE;
}

const SparsePattern lab_alternate = { "alternate", alternate_kind };
const SparsePattern lab_dense = { "dense", dense_kind };
const SparsePattern lab_runs = { "runs", runs_kind };
const SparsePattern lab_ends = { "ends", ends_kind };
const SparsePattern lab_zeroed = { "zeroed", zeroed_kind };
const SparsePattern lab_long_holes = { "long-holes", long_holes_kind };

/* Ways */

static const char *direct_skip_reason(void)
{
    return probe_o_direct_support(sparse_env->tmpfs) ? NULL :
        "the file system of the temporary directory has no O_DIRECT";
}

/* Zero pages are found and sent by the main thread */
const SparseWay lab_multifd_legacy = {
    .name = "multifd-legacy",
    .capabilities = { "multifd" },
    .parameters = { "multifd-channels 16", "zero-page-detection legacy" },
};

/* A stopped guest has nothing to be encoded */
const SparseWay lab_xbzrle = {
    .name = "xbzrle",
    .capabilities = { "xbzrle" },
    .parameters = { "xbzrle-cache-size 33554432" },
};

const SparseWay lab_file = { .name = "plain", SPARSE_FILE };

const SparseWay lab_mapped_ram_multifd = {
    .name = "mapped-ram-multifd",
    .transport = SPARSE_FILE,
    .capabilities = { "mapped-ram", "multifd" },
};

const SparseWay lab_mapped_ram_direct = {
    .name = "mapped-ram-multifd-direct-io",
    .transport = SPARSE_FILE,
    .capabilities = { "mapped-ram", "multifd" },
    .parameters = { "direct-io on" },
    .skip_reason = direct_skip_reason,
};

const SparseWay lab_mapped_ram_none = {
    .name = "mapped-ram-none",
    .transport = SPARSE_FILE,
    .capabilities = { "mapped-ram" },
    .parameters = { "zero-page-detection none" },
};

const SparseWay lab_snapshot = {
    .name = "background-snapshot", SPARSE_SNAPSHOT,
};

#define POSTCOPY(...) .transport = SPARSE_POSTCOPY, \
    .capabilities = { "postcopy-ram", __VA_ARGS__ }

const SparseWay lab_postcopy_preempt = {
    .name = "preempt", POSTCOPY("postcopy-preempt"),
};

const SparseWay lab_postcopy_release = {
    .name = "release-ram", POSTCOPY("release-ram"),
};

const SparseWay lab_postcopy_multifd = {
    .name = "multifd", POSTCOPY("multifd"),
};

const SparseWay lab_postcopy_multifd_preempt = {
    .name = "multifd-preempt", POSTCOPY("multifd", "postcopy-preempt"),
};

/* Waiting and looking */

uint64_t lab_status_bytes(pid_t pid, const char *name)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", pid);
    g_autofree char *label = g_strdup_printf("\n%s:", name);
    g_autofree char *status = NULL;
    const char *line;

    g_assert(g_file_get_contents(path, &status, NULL, NULL));
    line = strstr(status, label);
    g_assert(line);
    return g_ascii_strtoull(line + strlen(label), NULL, 10) * KiB;
}

unsigned lab_count_lines(const char *log, const char *text, const char *more)
{
    g_auto(GStrv) lines = g_strsplit(log, "\n", -1);
    unsigned i, count = 0;

    for (i = 0; lines[i]; i++) {
        count += strstr(lines[i], text) && strstr(lines[i], more);
    }
    return count;
}

void lab_pause_channel(SparseGuests *guests)
{
    migrate_pause(guests->from);
    wait_for_migration_status(guests->to, "postcopy-paused", NULL);
    wait_for_migration_status(guests->from, "postcopy-paused", NULL);
}

void lab_recover_channel(SparseGuests *guests)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket-recover",
                                           sparse_env->tmpfs);

    migrate_recover(guests->to, uri);
    migrate_qmp(guests->from, guests->to, uri, NULL, "{'resume': true}");
    wait_for_migration_status(guests->to, "postcopy-active", NULL);
}

uint64_t lab_last_of_kind(const SparseGuests *guests, PageKind kind,
                          uint64_t before)
{
    do {
        g_assert_cmpuint(before, >, 0);
        before--;
    } while (guests->kinds[before] != kind);
    return before;
}

void lab_wait_for_devices(QTestState *to)
{
    bool loading;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            to, "{ 'execute': 'query-status' }");

        loading = g_str_equal(qdict_get_str(rsp, "status"), "inmigrate");
        qobject_unref(rsp);
        g_usleep(1000);
    } while (loading);
}

bool lab_wait_for_dump(QTestState *who, int64_t timeout)
{
    int64_t start = g_get_monotonic_time();
    bool active;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            who, "{ 'execute': 'query-dump' }");

        g_assert_cmpstr(qdict_get_str(rsp, "status"), !=, "failed");
        active = g_str_equal(qdict_get_str(rsp, "status"), "active");
        g_assert(active || qdict_get_int(rsp, "completed") ==
                           qdict_get_int(rsp, "total"));
        qobject_unref(rsp);
        g_usleep(1000);
    } while (active && g_get_monotonic_time() - start < timeout);
    return !active;
}

void lab_wait_for_dirty_rate(QTestState *who)
{
    bool measured;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            who, "{ 'execute': 'query-dirty-rate' }");

        measured = g_str_equal(qdict_get_str(rsp, "status"), "measured");
        if (measured) {
            g_assert_cmpint(qdict_get_int(rsp, "dirty-rate"), ==, 0);
        }
        qobject_unref(rsp);
        g_usleep(10 * 1000);
    } while (!measured);
}

/* Of a segment, compare what is main memory; returns how many bytes are */
static uint64_t check_segment(const GuestRam *ram, const uint8_t *kinds, int fd,
                              const Elf64_Phdr *phdr)
{
    uint64_t host_page = qemu_real_host_page_size(), compared = 0, done, size;
    g_autofree char *expected = g_malloc(ram->page_size);
    g_autofree char *buf = g_malloc(host_page);

    for (done = 0; done < phdr->p_filesz; done += size) {
        uint64_t address = phdr->p_paddr + done;

        size = MIN(host_page - address % host_page, phdr->p_filesz - done);
        if (address >= ram->size ||
            (address >= PC_BASE_MEMORY_END && address < MiB)) {
            continue;
        }
        sparse_pattern_page((uint64_t *)expected, kinds,
                            address / ram->page_size, ram->page_size);
        g_assert_cmpint(pread(fd, buf, size, phdr->p_offset + done), ==, size);
        if (memcmp(buf, expected + address % ram->page_size, size)) {
            g_error("0x%" PRIx64 " is wrong in the dump", address);
        }
        compared += size;
    }
    return compared;
}

void lab_check_elf_dump(const GuestRam *ram, const uint8_t *kinds,
                        const char *path, uint64_t begin, uint64_t length)
{
    int i, fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t compared = 0;
    Elf64_Ehdr header;
    Elf64_Phdr phdr;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(pread(fd, &header, sizeof(header), 0), ==, sizeof(header));
    g_assert_cmpmem(header.e_ident, SELFMAG, ELFMAG, SELFMAG);
    for (i = 0; i < header.e_phnum; i++) {
        g_assert_cmpint(pread(fd, &phdr, sizeof(phdr),
                              header.e_phoff + i * header.e_phentsize),
                        ==, sizeof(phdr));
        if (phdr.p_type != PT_LOAD) {
            continue;
        }
        if (length) {
            g_assert_cmphex(phdr.p_paddr, ==, begin);
            g_assert_cmphex(phdr.p_filesz, ==, length);
        }
        compared += check_segment(ram, kinds, fd, &phdr);
    }
    close(fd);
    g_assert_cmpuint(compared, ==,
                     length ?: ram->size - (MiB - PC_BASE_MEMORY_END));
}

void lab_add_test(const char *name, const void *data,
                  void (*test)(const void *))
{
    g_autofree char *path = g_strdup_printf("/migration/sparse/%s", name);

    qtest_add_data_func(path, data, test);
}

void lab_add_cases(const char *prefix, const void *cases, size_t n,
                   size_t size, void (*test)(const void *))
{
    for (size_t i = 0; i < n; i++) {
        const void *c = cases + i * size;
        g_autofree char *name = g_strconcat(prefix, *(const char *const *)c,
                                            NULL);

        lab_add_test(name, c, test);
    }
}
