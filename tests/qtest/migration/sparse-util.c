/*
 * QTest helpers for sparse guest RAM
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <linux/falloc.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/statvfs.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"

/* What may be in a file besides the data of the guest's main memory */
#define FILE_SLACK (3 * MiB)

#define THP "/sys/kernel/mm/transparent_hugepage/"

MigrationTestEnv *sparse_env;

static uint64_t read_number(const char *path)
{
    g_autofree char *content = NULL;

    return g_file_get_contents(path, &content, NULL, NULL) ?
        g_ascii_strtoull(content, NULL, 10) : 0;
}

static void close_fd(void *opaque)
{
    close(GPOINTER_TO_INT(opaque));
}

void sparse_lock_huge_pages(void)
{
    int fd = open(HUGETLB_SYSFS, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (fd >= 0) {
        g_assert_no_errno(RETRY_ON_EINTR(flock(fd, LOCK_EX)));
        g_test_queue_destroy(close_fd, GINT_TO_POINTER(fd));
    }
}

static const char *hugetlb_skip_reason(void)
{
    sparse_lock_huge_pages();
    return read_number(HUGETLB_SYSFS "free_hugepages") <
           read_number(HUGETLB_SYSFS "resv_hugepages") +
           2 * HUGETLB_SIZE / HUGETLB_PAGE_SIZE
        ? "less than 64 free huge pages of 2 MiB, see /proc/sys/vm/nr_hugepages"
        : NULL;
}

static const char *shm_skip_reason(void)
{
    struct statvfs fs;

    /* A tmpfs of unlimited size has no blocks at all */
    return access("/dev/shm", W_OK) != 0 || statvfs("/dev/shm", &fs) != 0 ||
           (fs.f_blocks &&
            (uint64_t)fs.f_bavail * fs.f_frsize < 2 * PATTERN_SIZE + 2 * MiB)
        ? "/dev/shm is not writable, or has less than 258 MiB free" : NULL;
}

static int open_shm_file(void)
{
    return open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
}

const SparseBackend sparse_memfd = {
    .object = "memory-backend-memfd,share=on",
    .link = "/memfd:",
};

/* What is written to the file can be seen in the mapping */
const SparseBackend sparse_memfd_private = {
    .object = "memory-backend-memfd,share=off",
    .link = "/memfd:",
};

const SparseBackend sparse_hugetlb = {
    .object = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
    .link = "/memfd:",
    .size = HUGETLB_SIZE,
    .page_size = HUGETLB_PAGE_SIZE,
    .skip_reason = hugetlb_skip_reason,
};

/* The file of somebody else */
const SparseBackend sparse_shm_file = {
    .object = "memory-backend-file,share=on",
    .open_file = open_shm_file,
    .skip_reason = shm_skip_reason,
};

const SparseWay sparse_precopy = { .name = "precopy" };

const SparseWay sparse_multifd = {
    .name = "multifd",
    .capabilities = { "multifd" },
    .parameters = { "multifd-channels 16" },
};

const SparseWay sparse_postcopy = {
    .name = "postcopy",
    .transport = SPARSE_POSTCOPY,
    .capabilities = { "postcopy-ram" },
};

const SparseWay sparse_mapped_ram = {
    .name = "mapped-ram",
    .transport = SPARSE_FILE,
    .capabilities = { "mapped-ram" },
};

const SparseWay sparse_runs = {
    .name = "runs",
    .capabilities = { "sparse-ram" },
};

static PageKind mixed_kind(uint64_t page, uint64_t pages)
{
    static const PageKind mixed[] = {
        PAGE_DATA, PAGE_HOLE, PAGE_ZERO, PAGE_HOLE, PAGE_ZERO, PAGE_ZERO,
        PAGE_DATA, PAGE_DATA, PAGE_ZERO, PAGE_HOLE, PAGE_HOLE, PAGE_DATA,
        PAGE_HOLE,
    };

    return mixed[page % ARRAY_SIZE(mixed)];
}

static PageKind hole_kind(uint64_t page, uint64_t pages)
{
    return PAGE_HOLE;
}

const SparsePattern sparse_mixed = { "mixed", mixed_kind };
const SparsePattern sparse_empty = { "empty", hole_kind };

uint8_t *sparse_pattern_new(const SparsePattern *pattern, uint64_t pages)
{
    uint8_t *kinds = g_new(uint8_t, pages);
    uint64_t page;

    for (page = 0; page < pages; page++) {
        kinds[page] = pattern->kind(page, pages);
    }
    return kinds;
}

void sparse_pattern_page(uint64_t *buf, const uint8_t *kinds, uint64_t page,
                         uint64_t page_size)
{
    uint64_t i, word = (page + 1) * 0x9e3779b97f4a7c15ULL;

    for (i = 0; i < page_size / sizeof(*buf); i++) {
        buf[i] = kinds[page] == PAGE_DATA ? word + i : 0;
    }
}

uint64_t sparse_count(const uint8_t *kinds, uint64_t pages, PageKind kind)
{
    uint64_t page, count = 0;

    for (page = 0; page < pages; page++) {
        count += kinds[page] == kind;
    }
    return count;
}

unsigned long *sparse_data_pages(const uint8_t *kinds, uint64_t pages)
{
    unsigned long *data = bitmap_new(pages);
    uint64_t page;

    for (page = 0; page < pages; page++) {
        if (kinds[page] == PAGE_DATA) {
            set_bit(page, data);
        }
    }
    return data;
}

bool guest_ram_init(GuestRam *ram, const SparseBackend *backend, uint64_t size)
{
    *ram = (GuestRam) {
        .backend = backend,
        .fd = -1,
        .file_fd = -1,
        .start = backend->offset,
        .size = size ?: backend->size ?: PATTERN_SIZE,
        .page_size = backend->page_size ?: qemu_real_host_page_size(),
    };
    ram->pages = ram->size / ram->page_size;
    if (!backend->open_file) {
        return true;
    }
    ram->fd = backend->open_file();
    if (ram->fd >= 0) {
        g_assert_no_errno(ftruncate(ram->fd, ram->start + ram->size));
    }
    return ram->fd >= 0;
}

char *guest_ram_opts(const GuestRam *ram, const char *object)
{
    /* A name that nobody has to remove */
    g_autofree char *path = ram->backend->open_file
        ? g_strdup_printf(",mem-path=/proc/%d/fd/%d", getpid(), ram->fd)
        : g_strdup("");

    /* This -m comes after that of the framework, and wins */
    return g_strdup_printf("-m %" PRIu64 "M "
                           "-object %s,id=" BACKEND_ID ",size=%" PRIu64 "%s%s "
                           "-machine memory-backend=" BACKEND_ID,
                           ram->size / MiB, ram->backend->object, ram->size,
                           path, object ?: "");
}

/* Open QEMU's own file descriptor of a file of the right name and size */
static int open_file_of_qemu(const GuestRam *ram)
{
    g_autofree char *dir_path = g_strdup_printf("/proc/%d/fd", ram->pid);
    g_autoptr(GDir) dir = g_dir_open(dir_path, 0, NULL);
    const char *name;

    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(dir_path, name, NULL);
        g_autofree char *target = g_file_read_link(path, NULL);
        struct stat st;

        if (target && g_str_has_prefix(target, ram->backend->link) &&
            stat(path, &st) == 0 && st.st_size == ram->size) {
            /* memory-backend-shm lets nobody open its file, but it is ours */
            if (!(st.st_mode & S_IRUSR)) {
                chmod(path, S_IRUSR | S_IWUSR);
            }
            return open(path, O_RDWR | O_CLOEXEC);
        }
    }
    return -1;
}

void guest_ram_open(GuestRam *ram, QTestState *who)
{
    ram->pid = qtest_pid(who);
    if (ram->backend->link) {
        ram->fd = open_file_of_qemu(ram);
        g_assert_cmpint(ram->fd, >=, 0);
    }
    if (ram->backend->open) {
        ram->backend->open(ram, who);
    }
}

void guest_ram_close(GuestRam *ram)
{
    if (ram->fd >= 0) {
        close(ram->fd);
    }
    if (ram->file_fd >= 0) {
        close(ram->file_fd);
    }
}

void guest_ram_read_page(const GuestRam *ram, uint64_t page, void *buf)
{
    g_assert_cmpint(pread(ram->fd, buf, ram->page_size,
                          ram->start + page * ram->page_size),
                    ==, ram->page_size);
}

void guest_ram_write_page(const GuestRam *ram, uint64_t page, const void *buf)
{
    off_t offset = ram->start + page * ram->page_size;

    if (ram->page_size == HUGETLB_PAGE_SIZE) {
        /* hugetlbfs has no write() */
        void *map = mmap(NULL, ram->page_size, PROT_READ | PROT_WRITE,
                         MAP_SHARED, ram->fd, offset);

        g_assert(map != MAP_FAILED);
        memcpy(map, buf, ram->page_size);
        munmap(map, ram->page_size);
        return;
    }
    g_assert_cmpint(pwrite(ram->fd, buf, ram->page_size, offset),
                    ==, ram->page_size);
}

void guest_ram_punch(const GuestRam *ram)
{
    g_assert_no_errno(fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE |
                                FALLOC_FL_KEEP_SIZE, ram->start, ram->size));
}

void guest_ram_prepare(const GuestRam *ram, const uint8_t *kinds)
{
    g_autofree uint64_t *buf = g_malloc(ram->page_size);

    for (uint64_t page = 0; page < ram->pages; page++) {
        if (kinds[page] != PAGE_HOLE) {
            sparse_pattern_page(buf, kinds, page, ram->page_size);
            guest_ram_write_page(ram, page, buf);
        }
    }
}

void guest_ram_make_stale(const GuestRam *ram)
{
    g_autofree void *ones = g_malloc(ram->page_size);
    uint64_t page;

    memset(ones, 0xff, ram->page_size);
    for (page = 0; page < ram->pages; page++) {
        if (page % 11 < 7) {
            guest_ram_write_page(ram, page, ones);
        }
    }
}

uint64_t guest_ram_file_bytes(int fd)
{
    struct stat st;

    g_assert_no_errno(fstat(fd, &st));
    return st.st_blocks * 512ULL;
}

uint64_t guest_ram_allocated_bytes(const GuestRam *ram)
{
    return ram->backend->bytes ? ram->backend->bytes(ram)
                               : guest_ram_file_bytes(ram->fd);
}

/* @pages, unless NULL: set the bits of those that are data, from @start on */
static uint64_t data_bytes(int fd, off_t start, unsigned long *pages)
{
    uint64_t bytes = 0, page_size = qemu_real_host_page_size();
    off_t data, hole = start;

    while ((data = lseek(fd, hole, SEEK_DATA)) >= 0) {
        hole = lseek(fd, data, SEEK_HOLE);
        g_assert_cmpint(hole, >, data);
        bytes += hole - data;
        if (pages) {
            bitmap_set(pages, (data - start) / page_size,
                       (hole - data) / page_size);
        }
    }
    g_assert_cmpint(errno, ==, ENXIO);
    return bytes;
}

unsigned long *guest_ram_allocated_pages(const GuestRam *ram)
{
    unsigned long *pages;

    if (ram->backend->bytes || ram->page_size == HUGETLB_PAGE_SIZE) {
        return NULL;
    }
    pages = bitmap_new(ram->pages);
    data_bytes(ram->fd, ram->start, pages);
    return pages;
}

uint64_t guest_ram_allocation_unit(const GuestRam *ram)
{
    g_autofree char *content = NULL;
    struct stat st = { };

    if (ram->page_size == HUGETLB_PAGE_SIZE) {
        return ram->page_size;
    }
    g_file_get_contents(ram->backend->bytes ? THP "enabled"
                                            : THP "shmem_enabled",
                        &content, NULL, NULL);
    if (content && !strstr(content, "[never]") && !strstr(content, "[deny]")) {
        return read_number(THP "hpage_pmd_size");
    }
    /* What a tmpfs is mounted with takes precedence */
    fstat(ram->fd, &st);
    return MAX(st.st_blksize, ram->page_size);
}

void guest_ram_extend_to_units(const GuestRam *ram, unsigned long *pages)
{
    uint64_t unit = guest_ram_allocation_unit(ram) / ram->page_size;
    uint64_t page, end;

    for (page = 0; unit > 1 && page < ram->pages; page = end) {
        uint64_t in_unit = (ram->start / ram->page_size + page) % unit;

        end = MIN(page - in_unit + unit, ram->pages);
        if (find_next_bit(pages, end, page) < end) {
            bitmap_set(pages, page, end - page);
        }
    }
}

void guest_ram_state_take(GuestRamState *state, const GuestRam *ram)
{
    state->bytes = guest_ram_allocated_bytes(ram);
    g_free(state->pages);
    state->pages = guest_ram_allocated_pages(ram);
}

void guest_ram_state_clear(GuestRamState *state)
{
    g_clear_pointer(&state->pages, g_free);
}

static void check_state(const GuestRam *ram, SparseAllocation expect,
                        const GuestRamState *before, const GuestRamState *now,
                        const unsigned long *data)
{
    bool huge = guest_ram_allocation_unit(ram) > ram->page_size;
    bool keeps = expect == SPARSE_KEPT || expect == SPARSE_RELEASED;
    g_autofree unsigned long *may = bitmap_new(ram->pages);
    uint64_t page, limit, bad = 0;

    g_test_message("process %d has %" PRIu64 " KiB allocated, it had %" PRIu64,
                   ram->pid, now->bytes / KiB, before->bytes / KiB);
    if (expect == SPARSE_ANY) {
        return;
    } else if (expect == SPARSE_GROWS) {
        g_assert_cmpuint(now->bytes, >, before->bytes);
        return;
    } else if (expect == SPARSE_FULL) {
        /* SEEK_DATA does not tell pages that were reserved and never written */
        g_assert_cmpuint(now->bytes, >=, ram->pages * ram->page_size);
        bitmap_fill(may, ram->pages);
    }
    if (data) {
        bitmap_or(may, may, data, ram->pages);
    }
    /* A huge page need not be split */
    if (before->pages && (keeps || huge)) {
        bitmap_or(may, may, before->pages, ram->pages);
    }
    guest_ram_extend_to_units(ram, may);

    for (page = 0; now->pages && page < ram->pages; page++) {
        bool allocated = test_bit(page, now->pages);
        bool must = expect == SPARSE_KEPT && test_bit(page, before->pages);

        if ((allocated ? !test_bit(page, may) : must) && bad++ < 10) {
            g_test_message("page %" PRIu64 " is%s allocated", page,
                           allocated ? "" : " not");
        }
    }
    g_assert_cmpuint(bad, ==, 0);

    limit = bitmap_count_one(may, ram->pages) * ram->page_size +
            (huge ? 2 * guest_ram_allocation_unit(ram) : 0);
    if (keeps && (!data || !before->pages)) {
        limit = before->bytes + (data ? limit : 0);
    }
    g_assert_cmpuint(now->bytes, <=, limit);
    if (expect == SPARSE_KEPT && !data) {
        g_assert_cmpuint(now->bytes, ==, before->bytes);
    }
}

void guest_ram_check_allocation(const GuestRam *ram, SparseAllocation expect,
                                const GuestRamState *before,
                                const unsigned long *data)
{
    g_auto(GuestRamState) now = { };

    guest_ram_state_take(&now, ram);
    check_state(ram, expect, before, &now, data);
}

uint64_t sparse_file_bytes(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t bytes;

    g_assert_cmpint(fd, >=, 0);
    /* XFS allocates more while a file grows; others say that all is data */
    bytes = MIN(data_bytes(fd, 0, NULL), guest_ram_file_bytes(fd));
    close(fd);
    return bytes;
}

unsigned long *guest_ram_content(const GuestRam *ram, const GuestRam *other,
                                 const uint8_t *kinds)
{
    g_autofree uint64_t *buf = g_malloc(ram->page_size);
    g_autofree uint64_t *expected = g_malloc(ram->page_size);
    /* The kernel knows holes; reading gigabytes of them would take its time */
    g_autofree unsigned long *here = guest_ram_allocated_pages(ram);
    g_autofree unsigned long *there = other ? guest_ram_allocated_pages(other)
                                            : NULL;
    unsigned long *data = bitmap_new(ram->pages);
    uint64_t page, bad = 0;

    for (page = 0; page < ram->pages; page++) {
        if (here && !test_bit(page, here) &&
            (kinds ? kinds[page] != PAGE_DATA
                   : there && !test_bit(page, there))) {
            continue;
        }
        guest_ram_read_page(ram, page, buf);
        if (kinds) {
            sparse_pattern_page(expected, kinds, page, ram->page_size);
        } else {
            guest_ram_read_page(other, page, expected);
        }
        if (!buffer_is_zero(buf, ram->page_size)) {
            set_bit(page, data);
        }
        if (memcmp(buf, expected, ram->page_size) && bad++ < 10) {
            g_test_message("page %" PRIu64 " differs: it begins with 0x%" PRIx64
                           ", not with 0x%" PRIx64, page, buf[0], expected[0]);
        }
    }
    g_assert_cmpuint(bad, ==, 0);
    return data;
}

void guest_ram_check_pattern(const GuestRam *ram, const uint8_t *kinds)
{
    g_free(guest_ram_content(ram, NULL, kinds));
}

static void check_holes(const SparseGuests *guests)
{
    const GuestRam *ram = &guests->src;
    const unsigned long *before = guests->src_before.pages;
    QDict *rsp = migrate_query(guests->from);
    QDict *stats = qdict_get_qdict(rsp, "ram");
    /* A QEMU that does not count holes does not find any */
    int64_t holes = qdict_get_try_int(stats, "holes", 0);
    int64_t prepared;

    g_assert_cmpint(holes, <=, qdict_get_int(stats, "duplicate"));
    qobject_unref(rsp);
    if (guests->row->expect.holes == HOLES_NOT_COUNTED) {
        g_assert_cmpint(holes, ==, 0);
    } else if (guests->row->expect.holes == HOLES_COUNTED) {
        prepared = sparse_count(guests->kinds, ram->pages, PAGE_HOLE) *
                   (ram->page_size / qemu_real_host_page_size());
        /* Zero pages of hugetlbfs that are not mapped look like holes */
        g_assert_cmpint(holes, >=, before ? ram->pages -
                        bitmap_count_one(before, ram->pages) : prepared);
        if (before && guest_ram_allocation_unit(ram) == ram->page_size) {
            g_assert_cmpint(holes, ==, prepared);
        }
    }
}

/* Returns false if the test has to be skipped, after saying why */
static bool start_guests(SparseGuests *guests, const SparseRow *row)
{
    const SparseBackend *backend = row->backend ?: &sparse_memfd;
    const char *reason = row->skip_reason ? row->skip_reason() : NULL;
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    MigrateStart args = { .oob = row->oob };
    const char *hide = row->hide_stderr ? "2>/dev/null" : "";

    *guests = (SparseGuests) { .row = row, .way = &sparse_precopy };
    if (!reason && backend->skip_reason) {
        reason = backend->skip_reason();
    }
    if (reason) {
        g_test_skip(reason);
        return false;
    }
    if (!guest_ram_init(&guests->src, row->src_backend ?: backend, row->size)) {
        return false;
    }
    if (!guest_ram_init(&guests->dst, backend, row->size)) {
        guest_ram_close(&guests->src);
        return false;
    }
    src_memory = guest_ram_opts(&guests->src, NULL);
    dst_memory = guest_ram_opts(&guests->dst, row->dst_object);
    guests->file = g_strdup_printf("%s/" FILE_TEST_FILENAME, sparse_env->tmpfs);
    guests->log_path = g_strdup_printf("%s/dest_log", sparse_env->tmpfs);
    /* After postcopy, a destination would start whatever the source did */
    src_opts = g_strdup_printf("-S %s %s %s %s", src_memory, row->opts ?: "",
                               row->src_opts ?: "", hide);
    dst_opts = g_strdup_printf("-S %s %s %s %s%s", dst_memory, row->opts ?: "",
                               row->dst_opts ?: "",
                               row->log ? "2>" : hide,
                               row->log ? guests->log_path : "");
    args.opts_source = src_opts;
    args.opts_target = dst_opts;
    g_assert_cmpint(migrate_start(&guests->from, &guests->to, "defer", &args),
                    ==, 0);
    guest_ram_open(&guests->src, guests->from);
    guest_ram_open(&guests->dst, guests->to);
    return true;
}

bool sparse_try(QTestState *who, const char *format, ...)
{
    g_autofree char *output = NULL;
    va_list args;

    va_start(args, format);
    output = qtest_vhmp(who, format, args);
    va_end(args);
    if (*output) {
        g_test_skip(output);
    }
    return !*output;
}

void sparse_set_both(const SparseGuests *guests, const char *capability)
{
    migrate_set_capability(guests->from, capability, true);
    migrate_set_capability(guests->to, capability, true);
}

static bool set_side(QTestState *who, const SparseWay *way)
{
    int i;

    for (i = 0; way->capabilities[i]; i++) {
        if (!sparse_try(who, "migrate_set_capability %s on",
                        way->capabilities[i])) {
            return false;
        }
    }
    for (i = 0; way->parameters[i]; i++) {
        if (!sparse_try(who, "migrate_set_parameter %s", way->parameters[i])) {
            return false;
        }
    }
    return true;
}

bool sparse_set_way(SparseGuests *guests, const SparseWay *way)
{
    const char *reason = way->skip_reason ? way->skip_reason() : NULL;

    guests->way = way;
    if (way->transport == SPARSE_POSTCOPY && !sparse_env->has_uffd) {
        reason = "userfaultfd is not available";
    }
    if (reason) {
        g_test_skip(reason);
        return false;
    }
    if (!set_side(guests->from, way) || !set_side(guests->to, way)) {
        return false;
    }
    if (way->set_up) {
        way->set_up(guests);
    }
    if (way->transport == SPARSE_SNAPSHOT) {
        /*
         * QEMU takes no snapshot of a guest that has never run.  What the
         * firmware has written meanwhile would be no part of the test.
         */
        qtest_qmp_assert_success(guests->from, "{ 'execute': 'cont' }");
        qtest_qmp_assert_success(guests->from, "{ 'execute': 'stop' }");
        guest_ram_punch(&guests->src);
        return sparse_try(guests->from,
                          "migrate_set_capability background-snapshot on");
    }
    return true;
}

static void prepare_guests(SparseGuests *guests, const SparsePattern *pattern)
{
    const SparseRow *row = guests->row;
    struct stat st;

    guests->kinds = sparse_pattern_new(pattern, guests->src.pages);
    if (row->shape) {
        row->shape(guests);
    }
    guest_ram_prepare(&guests->src, guests->kinds);
    if (row->stale) {
        guest_ram_make_stale(&guests->dst);
    }
    if (row->prepare) {
        row->prepare(guests);
    }
    guest_ram_state_take(&guests->src_before, &guests->src);
    guest_ram_state_take(&guests->dst_before, &guests->dst);
    /* What QEMU said while it started is not about the migration */
    if (row->log) {
        g_assert_no_errno(stat(guests->log_path, &st));
        guests->log_start = st.st_size;
    }
}

bool sparse_begin(SparseGuests *guests, const SparseRow *row,
                  const SparseWay *way, const SparsePattern *pattern)
{
    if (!start_guests(guests, row)) {
        return false;
    }
    if (!sparse_set_way(guests, way)) {
        sparse_end(guests);
        return false;
    }
    prepare_guests(guests, pattern);
    return true;
}

void sparse_migrate(SparseGuests *guests, void (*during)(SparseGuests *))
{
    /* Neither will go on: there is no need to wait for a timeout */
    const char *ungoals[] = { "failed", "postcopy-paused", NULL };
    const SparseWay *way = guests->way;
    g_autofree char *file = g_strdup_printf("file:%s", guests->file);
    bool postcopy = way->transport == SPARSE_POSTCOPY;
    bool has_file = way->transport == SPARSE_FILE ||
                    way->transport == SPARSE_SNAPSHOT;

    if (postcopy || way->bandwidth) {
        migrate_set_parameter_int(guests->from, "max-bandwidth",
                                  way->bandwidth ?: 4 * KiB);
        migrate_set_parameter_int(guests->from, "downtime-limit", 1);
    } else {
        migrate_ensure_converge(guests->from);
    }
    if (!has_file) {
        migrate_incoming_qmp(guests->to, way->uri ?: "tcp:127.0.0.1:0", NULL,
                             "{}");
    }
    migrate_qmp(guests->from, guests->to, has_file ? file : way->uri, NULL,
                "{}");
    if (during) {
        during(guests);
    }
    if (postcopy) {
        qtest_qmp_assert_success(guests->from,
                                 "{ 'execute': 'migrate-start-postcopy' }");
    }
    wait_for_migration_status(guests->from, "completed", ungoals);
    if (has_file) {
        migrate_incoming_qmp(guests->to, file, NULL, "{}");
    }
    wait_for_migration_complete(guests->to);
    if (postcopy) {
        g_assert_cmpint(read_ram_property_int(guests->from, "postcopy-bytes"),
                        >, 0);
    } else if (g_strcmp0(way->capabilities[0], "multifd") == 0) {
        g_assert_cmpint(read_ram_property_int(guests->from, "multifd-bytes"),
                        >, 0);
    }
}

char *sparse_log(SparseGuests *guests)
{
    char *text;

    g_assert(g_file_get_contents(guests->log_path, &text, NULL, NULL));
    memmove(text, text + guests->log_start,
            strlen(text + guests->log_start) + 1);
    return text;
}

void sparse_check(SparseGuests *guests)
{
    const SparseExpect *expect = &guests->row->expect;
    g_autofree unsigned long *data = NULL;
    g_auto(GuestRamState) now = { };

    if (!guests->row->act) {
        /* Looking at the content of anonymous memory allocates some */
        guest_ram_state_take(&now, &guests->dst);
        data = guest_ram_content(&guests->dst, &guests->src, guests->kinds);
        check_state(&guests->dst, expect->dst ?: SPARSE_DATA,
                    &guests->dst_before, &now, data);
    }
    guest_ram_check_allocation(&guests->src, expect->src ?: SPARSE_KEPT,
                               &guests->src_before, NULL);
    if (!guests->row->act) {
        check_holes(guests);
    }
    if (expect->quiet) {
        g_autofree char *text = sparse_log(guests);

        g_assert_cmpstr(text, ==, "");
    }
    if (expect->sparse_file) {
        g_assert_cmpuint(sparse_file_bytes(guests->file), <=,
                         sparse_count(guests->kinds, guests->src.pages,
                                      PAGE_DATA) * guests->src.page_size +
                         FILE_SLACK);
    }
}

void sparse_end(SparseGuests *guests)
{
    migrate_end(guests->from, guests->to, false);
    guest_ram_close(&guests->src);
    guest_ram_close(&guests->dst);
    guest_ram_state_clear(&guests->src_before);
    guest_ram_state_clear(&guests->dst_before);
    unlink(guests->log_path);
    g_free(guests->log_path);
    g_free(guests->file);
    g_free(guests->kinds);
}

void sparse_run(const SparseRow *row, const SparseWay *way,
                const SparsePattern *pattern)
{
    SparseGuests guests;

    if (!sparse_begin(&guests, row, way, pattern)) {
        return;
    }
    if (row->act) {
        row->act(&guests);
    } else {
        sparse_migrate(&guests, row->during);
    }
    sparse_check(&guests);
    if (row->check) {
        row->check(&guests);
    }
    sparse_end(&guests);
}

typedef struct SparseTest {
    const SparseRow *row;
    const SparseWay *way;
    const SparsePattern *pattern;
} SparseTest;

static void run_test(const void *opaque)
{
    const SparseTest *test = opaque;

    sparse_run(test->row, test->way, test->pattern);
}

static void add_test(const SparseRow *row, const SparseWay *way,
                     const SparsePattern *pattern)
{
    g_auto(GStrv) at_way = g_strsplit(row->name, "%w", -1);
    g_autofree char *name = g_strjoinv(way->name, at_way);
    g_auto(GStrv) at_pattern = g_strsplit(name, "%p", -1);
    g_autofree char *rest = g_strjoinv(pattern->name, at_pattern);
    g_autofree char *path = g_strdup_printf("/migration/sparse/%s", rest);
    SparseTest *test = g_new(SparseTest, 1);

    *test = (SparseTest) { row, way, pattern };
    qtest_add_data_func_full(path, test, run_test, g_free);
}

void sparse_add_rows(const SparseRow *rows, size_t n)
{
    const SparseRow *row;
    int i, j;

    for (row = rows; row < rows + n; row++) {
        for (i = 0; i == 0 || row->ways[i]; i++) {
            for (j = 0; j == 0 || row->patterns[j]; j++) {
                add_test(row, row->ways[i] ?: &sparse_precopy,
                         row->patterns[j] ?: &sparse_mixed);
            }
        }
    }
}
