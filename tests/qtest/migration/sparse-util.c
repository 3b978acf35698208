/*
 * QTest helpers for sparse guest RAM
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <elf.h>
#include <linux/falloc.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/statvfs.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

/* Two guests of PATTERN_SIZE, one file of which begins before its RAM */
#define SHM_NEEDED_MIB 258
QEMU_BUILD_BUG_ON(SHM_NEEDED_MIB * MiB < 2 * (PATTERN_SIZE + 1 * MiB));

#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 0x0002U
#endif

const char *const sparse_pattern_names[PATTERN__MAX] = {
    [PATTERN_EMPTY] = "empty",
    [PATTERN_ALTERNATE] = "alternate",
    [PATTERN_DENSE] = "dense",
    [PATTERN_RUNS] = "runs",
    [PATTERN_ENDS] = "ends",
    [PATTERN_ZEROED] = "zeroed",
    [PATTERN_MIXED] = "mixed",
};

typedef struct SparseBackendInfo {
    /* The -object option up to size and, for a file of ours, mem-path */
    const char *object;
    /* How the name of a file of QEMU's begins */
    const char *link;
    /* Where the RAM begins in the file */
    uint64_t offset;
} SparseBackendInfo;

static const SparseBackendInfo backends[] = {
    [BACKEND_MEMFD] = {
        .object = "memory-backend-memfd,share=on",
        .link = "/memfd:",
    },
    [BACKEND_MEMFD_PRIVATE] = {
        .object = "memory-backend-memfd,share=off",
        .link = "/memfd:",
    },
    [BACKEND_MEMFD_SEALABLE] = {
        .object = "memory-backend-file,share=on",
    },
    [BACKEND_HUGETLB] = {
        .object = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
        .link = "/memfd:",
    },
    [BACKEND_SHM_FILE] = {
        .object = "memory-backend-file,share=on",
    },
    [BACKEND_SHM_FILE_OFFSET] = {
        .object = "memory-backend-file,share=on,offset=1044480",
        /* 255 pages, so that no pattern fits if the offset is forgotten */
        .offset = 1020 * KiB,
    },
    [BACKEND_SHM] = {
        .object = "memory-backend-shm",
        .link = "/dev/shm/",
    },
    [BACKEND_RAM] = {
        .object = "memory-backend-ram",
    },
    [BACKEND_RAM_SHARED] = {
        .object = "memory-backend-ram,share=on",
        .link = "/memfd:",
    },
    [BACKEND_FILE] = {
        .object = "memory-backend-file,share=on",
    },
    [BACKEND_HUGETLB_FILE] = {
        .object = "memory-backend-file,share=on",
    },
};

bool guest_ram_is_file(const GuestRam *ram)
{
    return ram->backend != BACKEND_RAM && ram->backend != BACKEND_MEMFD_PRIVATE;
}

static bool is_hugetlb(SparseBackend backend)
{
    return backend == BACKEND_HUGETLB || backend == BACKEND_HUGETLB_FILE;
}

uint64_t guest_ram_pages(const GuestRam *ram)
{
    return ram->size / ram->page_size;
}

static bool is_shm_file(SparseBackend backend)
{
    return backend == BACKEND_SHM_FILE || backend == BACKEND_SHM_FILE_OFFSET;
}

/* Remove the file's name, so that a test that fails leaves nothing behind */
static void ram_unlink(void *opaque)
{
    GuestRam *ram = opaque;

    if (ram->path && is_shm_file(ram->backend)) {
        unlink(ram->path);
    }
    g_clear_pointer(&ram->path, g_free);
}

/* QEMU opens the file of @fd by a name that nobody has to remove */
static void ram_use_file(GuestRam *ram, int fd)
{
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, ram->start + ram->size), ==, 0);
    ram->fd = fd;
    ram->path = g_strdup_printf("/proc/%d/fd/%d", getpid(), fd);
}

void guest_ram_init(GuestRam *ram, SparseBackend backend, uint64_t size)
{
    *ram = (GuestRam) {
        .fd = -1,
        .private_fd = -1,
        .start = backends[backend].offset,
        .size = size,
        .page_size = is_hugetlb(backend) ? HUGETLB_PAGE_SIZE
                                         : qemu_real_host_page_size(),
        .backend = backend,
    };

    switch (backend) {
    case BACKEND_SHM_FILE:
    case BACKEND_SHM_FILE_OFFSET:
        ram->path = g_strdup("/dev/shm/qemu-sparse-test-XXXXXX");
        ram->fd = g_mkstemp_full(ram->path, O_RDWR | O_CLOEXEC, 0600);
        g_assert_cmpint(ram->fd, >=, 0);
        break;
    case BACKEND_MEMFD_SEALABLE:
        ram_use_file(ram, memfd_create("qemu-sparse-test",
                                       MFD_CLOEXEC | MFD_ALLOW_SEALING));
        break;
    default:
        break;
    }

    qtest_add_abrt_handler(ram_unlink, ram);
}

void guest_ram_init_file(GuestRam *ram, SparseBackend backend, uint64_t size,
                         int fd)
{
    guest_ram_init(ram, backend, size);
    ram_use_file(ram, fd);
}

/* Open QEMU's own file descriptor of a file of the right name and size */
static int ram_open_file(const GuestRam *ram, const char *link)
{
    g_autofree char *dir_path = g_strdup_printf("/proc/%d/fd", ram->pid);
    g_autoptr(GDir) dir = g_dir_open(dir_path, 0, NULL);
    const char *name;

    g_assert(dir);
    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(dir_path, name, NULL);
        g_autofree char *target = g_file_read_link(path, NULL);
        struct stat st;

        if (target && g_str_has_prefix(target, link) &&
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

/* The address of the guest's RAM in QEMU */
static off_t ram_host_address(QTestState *who)
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

void guest_ram_open(GuestRam *ram, QTestState *who)
{
    const char *link = backends[ram->backend].link;

    ram->pid = qtest_pid(who);
    ram_unlink(ram);

    if (!guest_ram_is_file(ram)) {
        g_autofree char *path = g_strdup_printf("/proc/%d/mem", ram->pid);

        ram->fd = open(path, O_RDWR | O_CLOEXEC);
        ram->start = ram_host_address(who);
        if (link) {
            ram->private_fd = ram_open_file(ram, link);
            g_assert_cmpint(ram->private_fd, >=, 0);
        }
    } else if (link) {
        ram->fd = ram_open_file(ram, link);
    }
    if (ram->fd < 0) {
        g_error("RAM of process %d can't be opened: %s",
                ram->pid, strerror(errno));
    }
}

void guest_ram_close(GuestRam *ram)
{
    ram_unlink(ram);
    qtest_remove_abrt_handler(ram);
    if (ram->fd >= 0) {
        close(ram->fd);
    }
    if (ram->private_fd >= 0) {
        close(ram->private_fd);
    }
}

void guest_ram_read_page(const GuestRam *ram, uint64_t page, void *buf)
{
    off_t offset = ram->start + page * ram->page_size;

    g_assert_cmpint(pread(ram->fd, buf, ram->page_size, offset),
                    ==, ram->page_size);
}

void guest_ram_write_page(const GuestRam *ram, uint64_t page, const void *buf)
{
    off_t offset = ram->start + page * ram->page_size;

    if (is_hugetlb(ram->backend)) {
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

/* The bytes that are allocated to a range of anonymous memory of a process */
static uint64_t process_anonymous_bytes(pid_t pid, uint64_t start,
                                        uint64_t size)
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

static uint64_t file_bytes(int fd)
{
    struct stat st;

    g_assert_cmpint(fstat(fd, &st), ==, 0);
    return st.st_blocks * 512ULL;
}

uint64_t guest_ram_allocated_bytes(const GuestRam *ram)
{
    uint64_t bytes;

    if (guest_ram_is_file(ram)) {
        return file_bytes(ram->fd);
    }
    bytes = process_anonymous_bytes(ram->pid, ram->start, ram->size);
    return ram->private_fd < 0 ? bytes : bytes + file_bytes(ram->private_fd);
}

void guest_ram_report(const GuestRam *src, const GuestRam *dst,
                      uint64_t before)
{
    g_test_message("source has %" PRIu64 " KiB allocated, it had %" PRIu64
                   ", destination %" PRIu64 " KiB",
                   guest_ram_allocated_bytes(src) / KiB, before / KiB,
                   guest_ram_allocated_bytes(dst) / KiB);
}

unsigned long *guest_ram_allocated_pages(const GuestRam *ram)
{
    unsigned long *allocated;
    off_t data, hole = ram->start;

    if (!guest_ram_is_file(ram) || is_hugetlb(ram->backend)) {
        return NULL;
    }

    allocated = bitmap_new(guest_ram_pages(ram));
    while ((data = lseek(ram->fd, hole, SEEK_DATA)) >= 0) {
        hole = lseek(ram->fd, data, SEEK_HOLE);
        g_assert_cmpint(hole, >, data);
        bitmap_set(allocated, (data - ram->start) / ram->page_size,
                   (hole - data) / ram->page_size);
    }
    g_assert_cmpint(errno, ==, ENXIO);
    return allocated;
}

static uint64_t read_sysfs_number(const char *path)
{
    g_autofree char *content = NULL;

    return g_file_get_contents(path, &content, NULL, NULL) ?
        g_ascii_strtoull(content, NULL, 10) : 0;
}

uint64_t guest_ram_allocation_unit(const GuestRam *ram)
{
    g_autofree char *path =
        g_strdup_printf("/sys/kernel/mm/transparent_hugepage/%senabled",
                        guest_ram_is_file(ram) ? "shmem_" : "");
    g_autofree char *content = NULL;
    struct stat st;
    uint64_t huge;

    if (is_hugetlb(ram->backend)) {
        return ram->page_size;
    }
    /* What tmpfs is mounted with takes precedence in a file of it */
    if (guest_ram_is_file(ram) && fstat(ram->fd, &st) == 0 &&
        st.st_blksize > ram->page_size) {
        return st.st_blksize;
    }
    if (!g_file_get_contents(path, &content, NULL, NULL) ||
        strstr(content, "[never]") || strstr(content, "[deny]")) {
        return ram->page_size;
    }
    huge = read_sysfs_number(
        "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    return MAX(huge, ram->page_size);
}

/* A page of data; no two pages are the same */
static void fill_page(uint64_t *buf, uint64_t page, uint64_t page_size)
{
    uint64_t i, word = (page + 1) * 0x9e3779b97f4a7c15ULL;

    for (i = 0; i < page_size / sizeof(*buf); i++) {
        buf[i] = word + i;
    }
}

void sparse_pattern_page(uint64_t *buf, const uint8_t *kinds, uint64_t page,
                         uint64_t page_size)
{
    if (kinds[page] == PAGE_DATA) {
        fill_page(buf, page, page_size);
    } else {
        memset(buf, 0, page_size);
    }
}

uint8_t *sparse_pattern_new(SparsePattern pattern, uint64_t pages)
{
    static const PageKind mixed[] = {
        PAGE_DATA, PAGE_HOLE, PAGE_ZERO, PAGE_HOLE, PAGE_ZERO, PAGE_ZERO,
        PAGE_DATA, PAGE_DATA, PAGE_ZERO, PAGE_HOLE, PAGE_HOLE, PAGE_DATA,
        PAGE_HOLE,
    };
    uint8_t *kinds = g_new0(uint8_t, pages);
    uint64_t i, run;

    QEMU_BUILD_BUG_ON(PAGE_HOLE != 0);

    switch (pattern) {
    case PATTERN_EMPTY:
        break;
    case PATTERN_ALTERNATE:
        for (i = 0; i < pages; i += 2) {
            kinds[i] = PAGE_DATA;
        }
        break;
    case PATTERN_DENSE:
        memset(kinds, PAGE_DATA, pages);
        break;
    case PATTERN_RUNS:
        /* One page of data, a hole of one page, two of data, ... */
        for (i = 0, run = 1; i < pages; i += 2 * run, run++) {
            memset(kinds + i, PAGE_DATA, MIN(run, pages - i));
        }
        break;
    case PATTERN_ENDS:
        kinds[0] = PAGE_DATA;
        kinds[pages - 1] = PAGE_DATA;
        break;
    case PATTERN_ZEROED:
        memset(kinds, PAGE_ZERO, pages);
        break;
    case PATTERN_MIXED:
        for (i = 0; i < pages; i++) {
            kinds[i] = mixed[i % ARRAY_SIZE(mixed)];
        }
        break;
    default:
        g_assert_not_reached();
    }
    return kinds;
}

void guest_ram_punch(const GuestRam *ram)
{
    g_assert(guest_ram_is_file(ram));
    g_assert_cmpint(fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE |
                              FALLOC_FL_KEEP_SIZE, ram->start, ram->size),
                    ==, 0);
}

void guest_ram_prepare(const GuestRam *ram, const uint8_t *kinds)
{
    g_autofree uint64_t *buf = g_malloc(ram->page_size);
    uint64_t page;

    for (page = 0; page < guest_ram_pages(ram); page++) {
        if (kinds[page] != PAGE_HOLE) {
            sparse_pattern_page(buf, kinds, page, ram->page_size);
            guest_ram_write_page(ram, page, buf);
        }
    }
}

void guest_ram_make_stale(const GuestRam *ram)
{
    g_autofree void *buf = g_malloc(ram->page_size);
    uint64_t page;

    memset(buf, 0xff, ram->page_size);
    for (page = 0; page < guest_ram_pages(ram); page++) {
        if (page % 11 < 7) {
            guest_ram_write_page(ram, page, buf);
        }
    }
}

/*
 * Whether neither side has allocated a page, so that it reads as zero on both.
 * The kernel says so, and reading gigabytes of holes would take its time.
 */
static bool is_hole_everywhere(uint64_t page, const unsigned long *src_pages,
                               const unsigned long *dst_pages)
{
    return src_pages && dst_pages &&
           !test_bit(page, src_pages) && !test_bit(page, dst_pages);
}

unsigned long *guest_ram_check_content(const GuestRam *src, const GuestRam *dst,
                                       const uint8_t *kinds, uint64_t first,
                                       uint64_t last)
{
    unsigned long *data = bitmap_new(guest_ram_pages(dst));
    g_autofree unsigned long *src_pages = guest_ram_allocated_pages(src);
    g_autofree unsigned long *dst_pages = guest_ram_allocated_pages(dst);
    g_autofree uint64_t *src_buf = g_malloc(src->page_size);
    g_autofree uint64_t *dst_buf = g_malloc(src->page_size);
    g_autofree uint64_t *expected = g_malloc0(src->page_size);
    uint64_t page, bad = 0;

    for (page = first; page < last; page++) {
        bool good;

        if (kinds[page] != PAGE_DATA &&
            is_hole_everywhere(page, src_pages, dst_pages)) {
            continue;
        }
        guest_ram_read_page(src, page, src_buf);
        guest_ram_read_page(dst, page, dst_buf);
        good = memcmp(src_buf, dst_buf, src->page_size) == 0;

        if (!buffer_is_zero(dst_buf, dst->page_size)) {
            set_bit(page, data);
        }
        if (kinds[page] == PAGE_DATA) {
            fill_page(expected, page, src->page_size);
            good &= memcmp(expected, dst_buf, src->page_size) == 0;
        } else if (kinds[page] == PAGE_ZERO) {
            good &= !test_bit(page, data);
        }
        if (!good && bad++ < 10) {
            g_test_message("page %" PRIu64 " differs (kind %d): source 0x%"
                           PRIx64 ", destination 0x%" PRIx64, page,
                           kinds[page], src_buf[0], dst_buf[0]);
        }
    }
    g_assert_cmpuint(bad, ==, 0);
    return data;
}

void guest_ram_check_pattern(const GuestRam *ram, const uint8_t *kinds)
{
    g_autofree uint64_t *buf = g_malloc(ram->page_size);
    g_autofree uint64_t *expected = g_malloc(ram->page_size);
    g_autofree unsigned long *allocated = guest_ram_allocated_pages(ram);
    uint64_t page, bad = 0;

    for (page = 0; page < guest_ram_pages(ram); page++) {
        if (kinds[page] != PAGE_DATA &&
            is_hole_everywhere(page, allocated, allocated)) {
            continue;
        }
        guest_ram_read_page(ram, page, buf);
        sparse_pattern_page(expected, kinds, page, ram->page_size);
        if (memcmp(buf, expected, ram->page_size) && bad++ < 10) {
            g_test_message("page %" PRIu64 " (kind %d) begins with 0x%" PRIx64
                           ", not with 0x%" PRIx64, page, kinds[page],
                           buf[0], expected[0]);
        }
    }
    g_assert_cmpuint(bad, ==, 0);
}

/* The number of pages from the start of an allocation unit to @page */
static uint64_t page_in_unit(const GuestRam *ram, uint64_t page,
                             uint64_t unit_pages)
{
    return (ram->start / ram->page_size + page) % unit_pages;
}

bool guest_ram_unit_has_any(const GuestRam *ram, const unsigned long *pages,
                            uint64_t page, uint64_t unit_pages)
{
    uint64_t in_unit = page_in_unit(ram, page, unit_pages);
    uint64_t start = page - MIN(page, in_unit);
    uint64_t end = MIN(page - in_unit + unit_pages, guest_ram_pages(ram));

    return find_next_bit(pages, end, start) < end;
}

unsigned long *guest_ram_anchors(const GuestRam *ram,
                                 const unsigned long *data,
                                 const unsigned long *before)
{
    unsigned long *anchors = bitmap_new(guest_ram_pages(ram));

    bitmap_copy(anchors, data, guest_ram_pages(ram));
    if (before && guest_ram_allocation_unit(ram) > ram->page_size) {
        bitmap_or(anchors, anchors, before, guest_ram_pages(ram));
    }
    return anchors;
}

uint64_t guest_ram_max_allocated_bytes(const GuestRam *ram,
                                       const unsigned long *anchors)
{
    uint64_t unit_pages = guest_ram_allocation_unit(ram) / ram->page_size;
    uint64_t page, bytes = 0;

    for (page = 0; page < guest_ram_pages(ram);
         page += unit_pages - page_in_unit(ram, page, unit_pages)) {
        if (guest_ram_unit_has_any(ram, anchors, page, unit_pages)) {
            bytes += unit_pages * ram->page_size;
        }
    }
    return bytes;
}

void guest_ram_state_take(GuestRamState *state, const GuestRam *ram)
{
    *state = (GuestRamState) {
        .bytes = guest_ram_allocated_bytes(ram),
        .pages = guest_ram_allocated_pages(ram),
    };
}

void guest_ram_state_clear(GuestRamState *state)
{
    g_clear_pointer(&state->pages, g_free);
}

void guest_ram_check_growth(const GuestRam *ram, const GuestRamState *before,
                            const GuestRamState *after, RamGrowth expect,
                            uint64_t first, uint64_t last)
{
    uint64_t page, bad = 0;
    bool whole = first == 0 && last == guest_ram_pages(ram);

    g_test_message("source has %" PRIu64 " KiB allocated, it had %" PRIu64,
                   after->bytes / KiB, before->bytes / KiB);

    if (expect == RAM_GROWS) {
        g_assert_cmpuint(after->bytes, >, before->bytes);
        return;
    }
    for (page = first; after->pages && page < last; page++) {
        bool is = test_bit(page, after->pages);
        bool was = test_bit(page, before->pages);

        if ((is && !was) || (!is && was && expect == RAM_KEPT)) {
            if (bad++ < 10) {
                g_test_message("page %" PRIu64 " of the source is%s allocated",
                               page, is ? "" : " no longer");
            }
        }
    }
    g_assert_cmpuint(bad, ==, 0);
    if (whole && expect == RAM_KEPT) {
        g_assert_cmpuint(after->bytes, ==, before->bytes);
    } else if (whole) {
        g_assert_cmpuint(after->bytes, <=, before->bytes);
    }
}

static int64_t read_statistic(QTestState *who, const char *name)
{
    QDict *rsp = migrate_query(who);
    QDict *ram = qdict_get_qdict(rsp, "ram");
    int64_t value;

    /* A QEMU that does not count holes does not find any */
    value = ram ? qdict_get_try_int(ram, name, 0) : 0;
    qobject_unref(rsp);
    return value;
}

static void check_hmp_statistics(QTestState *from, int64_t holes)
{
    g_autofree char *info = qtest_hmp(from, "info migrate");
    g_autofree char *text = g_strdup_printf("(holes=%" PRId64 ")", holes);
    /* QEMU up to 10.0 has a line for each statistic */
    g_autofree char *line = g_strdup_printf("\nholes: %" PRId64 " pages\r",
                                            holes);

    g_assert_true(strstr(info, text) || strstr(info, line));
}

void check_hole_statistics(QTestState *from, const GuestRam *ram,
                           const GuestRamState *before, const uint8_t *kinds,
                           HoleCount expect)
{
    int64_t holes = read_statistic(from, "holes");
    uint64_t target_pages = ram->page_size / qemu_real_host_page_size();
    uint64_t page, prepared = 0;

    g_assert_cmpint(holes, <=, read_statistic(from, "duplicate"));
    for (page = 0; page < guest_ram_pages(ram); page++) {
        prepared += kinds[page] == PAGE_HOLE;
    }
    prepared *= target_pages;

    switch (expect) {
    case HOLES_COUNTED:
        if (!before->pages) {
            /*
             * Zero pages of hugetlbfs that are not mapped cannot be told from
             * holes.
             */
            g_assert_cmpint(holes, >=, prepared);
        } else {
            g_assert_cmpint(holes, ==, guest_ram_pages(ram) -
                            bitmap_count_one(before->pages,
                                             guest_ram_pages(ram)));
            if (guest_ram_allocation_unit(ram) == ram->page_size) {
                g_assert_cmpint(holes, ==, prepared);
            }
        }
        check_hmp_statistics(from, holes);
        break;
    case HOLES_NOT_COUNTED:
        g_assert_cmpint(holes, ==, 0);
        break;
    case HOLES_ANY:
        break;
    }
}

bool guest_pair_start(GuestPair *pair, SparseBackend backend, uint64_t size,
                      const char *opts, const char *opts_target)
{
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *source = NULL;
    g_autofree char *target = NULL;
    MigrateStart args = { };

    guest_ram_init(&pair->src, backend, size);
    guest_ram_init(&pair->dst, backend, size);
    src_memory = guest_ram_opts(&pair->src, NULL);
    dst_memory = guest_ram_opts(&pair->dst, NULL);
    source = g_strdup_printf("-S %s %s", src_memory, opts ? opts : "");
    /* After postcopy, a destination would start whatever the source did */
    target = g_strdup_printf("-S %s %s %s", dst_memory, opts ? opts : "",
                             opts_target ? opts_target : "");
    args.opts_source = source;
    args.opts_target = target;

    if (migrate_start(&pair->from, &pair->to, "defer", &args)) {
        guest_ram_close(&pair->src);
        guest_ram_close(&pair->dst);
        return false;
    }
    guest_ram_open(&pair->src, pair->from);
    guest_ram_open(&pair->dst, pair->to);
    return true;
}

void guest_pair_end(GuestPair *pair)
{
    migrate_end(pair->from, pair->to, false);
    guest_ram_close(&pair->src);
    guest_ram_close(&pair->dst);
}

/* A page of guest RAM and what it is expected to be */
static void check_dump_page(const GuestRam *ram, const uint8_t *kinds, int fd,
                            off_t offset, uint64_t address,
                            uint64_t *expected_page)
{
    size_t size = qemu_real_host_page_size();
    g_autofree uint64_t *buf = g_malloc(size);

    if (address % ram->page_size == 0) {
        sparse_pattern_page(expected_page, kinds, address / ram->page_size,
                            ram->page_size);
    }
    g_assert_cmpint(pread(fd, buf, size, offset), ==, size);
    if (memcmp(buf, (char *)expected_page + address % ram->page_size, size)) {
        g_error("guest memory at 0x%" PRIx64 " is wrong in the dump", address);
    }
}

void check_elf_dump(const GuestRam *ram, const uint8_t *kinds, const char *path)
{
    uint64_t size = ram->size;
    uint64_t page_size = qemu_real_host_page_size();
    g_autofree uint64_t *expected_page = g_malloc0(ram->page_size);
    uint64_t compared = 0;
    Elf64_Ehdr header;
    int i, fd = open(path, O_RDONLY | O_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(pread(fd, &header, sizeof(header), 0), ==, sizeof(header));
    g_assert_cmpmem(header.e_ident, SELFMAG, ELFMAG, SELFMAG);
    g_assert_cmpint(header.e_ident[EI_CLASS], ==, ELFCLASS64);

    for (i = 0; i < header.e_phnum; i++) {
        Elf64_Phdr phdr;
        uint64_t done;

        g_assert_cmpint(pread(fd, &phdr, sizeof(phdr),
                              header.e_phoff + i * header.e_phentsize),
                        ==, sizeof(phdr));
        if (phdr.p_type != PT_LOAD) {
            continue;
        }
        for (done = 0; done < phdr.p_filesz; done += page_size) {
            uint64_t address = phdr.p_paddr + done;

            if (address < PC_BASE_MEMORY_END ||
                (address >= MiB && address < size)) {
                check_dump_page(ram, kinds, fd, phdr.p_offset + done, address,
                                expected_page);
                compared += page_size;
            }
        }
    }
    close(fd);
    g_assert_cmpuint(compared, ==, size - (MiB - PC_BASE_MEMORY_END));
}

char *take_stderr(const char *path)
{
    char *text = NULL;

    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    unlink(path);
    g_test_message("stderr: %s", text);
    return text;
}

bool migrate_try_capability(QTestState *who, const char *name)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'migrate-set-capabilities',"
                           "'arguments': { 'capabilities': [ {"
                           "'capability': %s, 'state': true } ] } }", name);
    bool supported = qdict_haskey(rsp, "return");

    if (!supported) {
        g_test_skip(qdict_get_str(qdict_get_qdict(rsp, "error"), "desc"));
    }
    qobject_unref(rsp);
    return supported;
}

void migrate_set_both_capability(QTestState *from, QTestState *to,
                                 const char *name)
{
    migrate_set_capability(from, name, true);
    migrate_set_capability(to, name, true);
}

void migrate_set_multifd(QTestState *from, QTestState *to)
{
    migrate_set_parameter_int(from, "multifd-channels", 16);
    migrate_set_parameter_int(to, "multifd-channels", 16);
    migrate_set_both_capability(from, to, "multifd");
}

void migrate_ensure_postcopy(QTestState *from)
{
    migrate_set_parameter_int(from, "max-bandwidth", 4 * KiB);
    migrate_set_parameter_int(from, "downtime-limit", 1);
}

void check_postcopy(QTestState *from)
{
    g_assert_cmpint(read_statistic(from, "postcopy-bytes"), >, 0);
}

static int huge_pages_lock = -1;

static void unlock_huge_pages(void *opaque)
{
    close(huge_pages_lock);
    huge_pages_lock = -1;
}

void sparse_lock_huge_pages(void)
{
    if (huge_pages_lock >= 0) {
        return;
    }
    huge_pages_lock = open(HUGETLB_SYSFS, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (huge_pages_lock >= 0) {
        g_test_queue_destroy(unlock_huge_pages, NULL);
        g_assert_cmpint(RETRY_ON_EINTR(flock(huge_pages_lock, LOCK_EX)),
                        ==, 0);
    }
}

static bool have_huge_pages(uint64_t pages)
{
    uint64_t free_pages = read_sysfs_number(HUGETLB_SYSFS "free_hugepages");
    uint64_t reserved = read_sysfs_number(HUGETLB_SYSFS "resv_hugepages");

    return free_pages >= reserved + pages;
}

/* Whether it is there, and has room for two guests that are filled */
static bool have_shm(void)
{
    struct statvfs fs;

    if (access("/dev/shm", W_OK) != 0 || statvfs("/dev/shm", &fs) != 0) {
        return false;
    }
    /* A tmpfs of unlimited size has no blocks at all */
    return fs.f_blocks == 0 ||
           (uint64_t)fs.f_bavail * fs.f_frsize >= SHM_NEEDED_MIB * MiB;
}

static bool have_process_memory(void)
{
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

const char *sparse_backend_skip_reason(SparseBackend backend)
{
    if (backend == BACKEND_HUGETLB) {
        sparse_lock_huge_pages();
    }
    if (backend == BACKEND_HUGETLB &&
        !have_huge_pages(2 * HUGETLB_SIZE / HUGETLB_PAGE_SIZE)) {
        return "less than 64 free huge pages of 2 MiB "
               "(see /proc/sys/vm/nr_hugepages)";
    }
    if ((is_shm_file(backend) || backend == BACKEND_SHM) &&
        !have_shm()) {
        return "/dev/shm is not writable, or has less than "
               stringify(SHM_NEEDED_MIB) " MiB free";
    }
    if ((backend == BACKEND_RAM || backend == BACKEND_MEMFD_PRIVATE) &&
        !have_process_memory()) {
        return "/proc/PID/mem is not writable";
    }
    return NULL;
}

char *guest_ram_opts(const GuestRam *ram, const char *object_opts)
{
    g_autofree char *path_opt =
        ram->path ? g_strdup_printf(",mem-path=%s", ram->path) : g_strdup("");

    /* This -m comes after that of the framework, and wins */
    return g_strdup_printf("-m %" PRIu64 "M "
                           "-object %s,id=" BACKEND_ID ",size=%" PRIu64 "%s%s "
                           "-machine memory-backend=" BACKEND_ID,
                           ram->size / MiB, backends[ram->backend].object,
                           ram->size, path_opt, object_opts ? object_opts : "");
}
