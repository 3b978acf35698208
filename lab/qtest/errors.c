/*
 * QTest testcases for sparse guest RAM: when the kernel says no
 *
 * Memory that is just enough for the guest's data, and files that cannot be
 * written.  A QEMU that touches more than it has to gets a SIGBUS.
 *
 * The file systems of limited size are mounted nowhere, so that nothing has to
 * be cleaned up.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/mman.h>
#include <sys/statfs.h>
#include <sys/syscall.h>

#include "libqtest.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "sparse-lab.h"

/* Linux 5.2, include/uapi/linux/mount.h; the same on all architectures */
#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#define CONFIG_SET_STRING 1
#define CONFIG_CREATE 6

#define MAX_OPTIONS 3

/* Huge pages are few, and the guest does not run */
#define HUGETLB_RAM_SIZE (32 * MiB)

#define NVDIMM_SIZE (64 * MiB)

typedef struct MountOption {
    const char *key;
    char *value;
} MountOption;

/*
 * Create a file on a file system of its own, with options that this function
 * frees.  Returns -1 if that cannot be had, after saying why.
 */
static int limited_file(const char *type, MountOption options[MAX_OPTIONS])
{
    int fs = syscall(SYS_fsopen, type, FD_CLOEXEC);
    int mount = -1, fd = -1, i;
    bool failed = fs < 0;

    for (i = 0; i < MAX_OPTIONS && options[i].key; i++) {
        failed = failed || syscall(SYS_fsconfig, fs, CONFIG_SET_STRING,
                                   options[i].key, options[i].value, 0) < 0;
        g_free(options[i].value);
    }
    if (!failed &&
        syscall(SYS_fsconfig, fs, CONFIG_CREATE, NULL, NULL, 0) == 0) {
        mount = syscall(SYS_fsmount, fs, FD_CLOEXEC, 0);
    }
    if (mount >= 0) {
        fd = openat(mount, "ram", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    }
    if (fd < 0) {
        g_autofree char *reason = g_strdup_printf(
            "no %s of limited size can be mounted: %s (this takes Linux 5.2, "
            "CAP_SYS_ADMIN, and for hugetlbfs 32 free huge pages of 2 MiB, see "
            "/proc/sys/vm/nr_hugepages)", type, strerror(errno));

        g_test_skip(reason);
    }
    if (mount >= 0) {
        close(mount);
    }
    if (fs >= 0) {
        close(fs);
    }
    return fd;
}

static int limited_tmpfs(uint64_t pages)
{
    MountOption options[MAX_OPTIONS] = {
        { "size", g_strdup_printf("%" PRIu64,
                                  pages * qemu_real_host_page_size()) },
        { "huge", g_strdup("never") },
    };

    return limited_file("tmpfs", options);
}

/* All of the pages are set aside for it, whoever else takes huge pages */
static int limited_hugetlbfs(uint64_t pages)
{
    MountOption options[MAX_OPTIONS] = {
        { "pagesize", g_strdup("2M") },
        { "size", g_strdup_printf("%" PRIu64, pages * HUGETLB_PAGE_SIZE) },
        { "min_size", g_strdup_printf("%" PRIu64, pages * HUGETLB_PAGE_SIZE) },
    };

    return limited_file("hugetlbfs", options);
}

/* The pages that are neither allocated nor, with hugetlbfs, reserved */
static uint64_t free_pages(const GuestRam *ram)
{
    struct statfs st;

    g_assert_cmpint(fstatfs(ram->fd, &st), ==, 0);
    return st.f_bfree;
}

/* Small pages: space for what is populated, or will be, and not a page more */

static uint64_t mixed_pages(PageKind kind)
{
    uint64_t pages = PATTERN_SIZE / qemu_real_host_page_size();
    g_autofree uint8_t *kinds = sparse_pattern_new(&sparse_mixed, pages);

    return sparse_count(kinds, pages, kind);
}

static int tmpfs_for_populated(void)
{
    return limited_tmpfs(mixed_pages(PAGE_DATA) + mixed_pages(PAGE_ZERO));
}

static int tmpfs_for_data(void)
{
    return limited_tmpfs(mixed_pages(PAGE_DATA));
}

static const SparseBackend tmpfs_source = {
    .object = "memory-backend-file,share=on",
    .open_file = tmpfs_for_populated,
};

static const SparseBackend tmpfs_destination = {
    .object = "memory-backend-file,share=on",
    .open_file = tmpfs_for_data,
};

static void check_tmpfs_full(SparseGuests *guests)
{
    const GuestRam *limited = guests->row->src_backend == &tmpfs_source
                              ? &guests->src : &guests->dst;

    g_assert_cmpuint(free_pages(limited), ==, 0);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), ==,
                     mixed_pages(PAGE_DATA) * guests->dst.page_size);
}

/* Huge pages */

/* One of three huge pages has data: every other page in it */
#define HUGETLB_STRIDE 3

static unsigned hugetlb_data_pages(void)
{
    return DIV_ROUND_UP(HUGETLB_RAM_SIZE / HUGETLB_PAGE_SIZE, HUGETLB_STRIDE);
}

static void *map_huge_page(const GuestRam *ram, uint64_t page)
{
    void *map = mmap(NULL, HUGETLB_PAGE_SIZE, PROT_READ | PROT_WRITE,
                     MAP_SHARED, ram->fd, page * HUGETLB_PAGE_SIZE);

    g_assert(map != MAP_FAILED);
    return map;
}

/*
 * @stale: fill what has data on the source, on the destination, so that the
 *         zero pages in between have to be cleared
 */
static void fill_huge_pages(const GuestRam *ram, bool stale)
{
    uint64_t page, small_size = qemu_real_host_page_size();

    for (page = 0; page < ram->pages; page += HUGETLB_STRIDE) {
        uint8_t *map = map_huge_page(ram, page);
        uint64_t offset;

        for (offset = 0; offset < HUGETLB_PAGE_SIZE; offset += small_size) {
            if (stale) {
                memset(map + offset, 0xff, small_size);
            } else if (offset / small_size % 2) {
                memset(map + offset, 1 + page, small_size);
            }
        }
        munmap(map, HUGETLB_PAGE_SIZE);
    }
}

static void check_huge_pages(const GuestRam *ram)
{
    uint64_t page, small_size = qemu_real_host_page_size();
    g_autofree uint8_t *buf = g_malloc(HUGETLB_PAGE_SIZE);
    g_autofree uint8_t *expected = g_malloc(small_size);

    for (page = 0; page < ram->pages; page++) {
        uint64_t offset;

        guest_ram_read_page(ram, page, buf);
        for (offset = 0; offset < HUGETLB_PAGE_SIZE; offset += small_size) {
            bool data = page % HUGETLB_STRIDE == 0 &&
                        offset / small_size % 2;

            memset(expected, data ? 1 + page : 0, small_size);
            g_assert(memcmp(buf + offset, expected, small_size) == 0);
        }
    }
}

static int hugetlbfs_for_data(void)
{
    return limited_hugetlbfs(hugetlb_data_pages());
}

static int hugetlbfs_for_all(void)
{
    return limited_hugetlbfs(HUGETLB_RAM_SIZE / HUGETLB_PAGE_SIZE);
}

static const char *lock_huge_pages(void)
{
    sparse_lock_huge_pages();
    return NULL;
}

#define HUGETLB(reserve) \
    .object = "memory-backend-file,share=on,reserve=" reserve, \
    .size = HUGETLB_RAM_SIZE, .page_size = HUGETLB_PAGE_SIZE, \
    .skip_reason = lock_huge_pages

static const SparseBackend hugetlb_unreserved = {
    HUGETLB("off"), .open_file = hugetlbfs_for_data,
};

static const SparseBackend hugetlb_reserved = {
    HUGETLB("on"), .open_file = hugetlbfs_for_all,
};

/*
 * Nothing is reserved, and there is not one huge page more than those with
 * data.  On the destination they are populated, and full of old data.
 */
static void fill_both(SparseGuests *guests)
{
    fill_huge_pages(&guests->src, false);
    fill_huge_pages(&guests->dst, true);
    g_assert_cmpuint(free_pages(&guests->src), ==, 0);
    g_assert_cmpuint(free_pages(&guests->dst), ==, 0);
    g_clear_pointer(&guests->kinds, g_free);
}

static void check_hugetlb_full(SparseGuests *guests)
{
    uint64_t bytes = hugetlb_data_pages() * HUGETLB_PAGE_SIZE;

    check_huge_pages(&guests->src);
    check_huge_pages(&guests->dst);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->src), ==, bytes);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), ==, bytes);
}

/*
 * All huge pages are reserved for the guest.  They still are when zero pages
 * have arrived: nobody else gets one, and the guest can write to all its RAM.
 * The other way round: there is nothing on the source.
 */
static void fill_destination(SparseGuests *guests)
{
    fill_huge_pages(&guests->dst, true);
    g_assert_cmpuint(free_pages(&guests->dst), ==, 0);
}

static void check_hugetlb_reserved(SparseGuests *guests)
{
    uint64_t stale_bytes = hugetlb_data_pages() * HUGETLB_PAGE_SIZE;
    uint64_t offset;

    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->src), ==, 0);
    /* Postcopy punches everything before it starts, and reserves it again */
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), ==,
                     guests->way == &sparse_postcopy ? 0 : stale_bytes);
    g_assert_cmpuint(free_pages(&guests->dst), ==, 0);
    for (offset = 0; offset < HUGETLB_RAM_SIZE; offset += HUGETLB_PAGE_SIZE) {
        /* 1 MiB into each, so as not to hit what is no RAM on a PC */
        g_assert_cmpuint(qtest_readl(guests->to, offset + MiB), ==, 0);
        qtest_writel(guests->to, offset + MiB, 1);
    }
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests->dst), ==,
                     HUGETLB_RAM_SIZE);
}

/*
 * A template: a file that QEMU has opened read-only and mapped private.  What
 * arrives as zero must not show what the template has there, and the template
 * must not change.
 */
static int open_template(void)
{
    return memfd_create("qemu-sparse-test", MFD_CLOEXEC);
}

static const SparseBackend template = {
    .object = "memory-backend-file,share=off,readonly=on,rom=off",
    .open_file = open_template,
    .open = lab_open_private,
    .bytes = lab_private_bytes,
};

static void fill_template(SparseGuests *guests)
{
    const GuestRam file = lab_file_of_private(&guests->dst);

    guest_ram_make_stale(&file);
}

static void check_template(SparseGuests *guests)
{
    const GuestRam file = lab_file_of_private(&guests->dst);
    g_autofree uint8_t *buf = g_malloc(file.page_size);
    uint64_t page;

    /* See guest_ram_make_stale() */
    for (page = 0; page < file.pages; page++) {
        guest_ram_read_page(&file, page, buf);
        g_assert_true(buf[0] == (page % 11 < 7 ? 0xff : 0) &&
                      buf[file.page_size - 1] == buf[0]);
    }
}

/*
 * An NVDIMM that QEMU has opened and mapped read-only, and that is empty on
 * both sides.  A read through the mapping would allocate it all the same.  If
 * there were data, it could not be migrated: QEMU writes to the mapping.
 */
static char *nvdimm_opts(int fd)
{
    return g_strdup_printf("-m slots=1,maxmem=%" PRIu64 "M "
                           "-machine nvdimm=on -object memory-backend-file,"
                           "id=nvmem,size=%" PRIu64 ",mem-path=/proc/%d/fd/%d,"
                           "share=on,readonly=on "
                           "-device nvdimm,memdev=nvmem,unarmed=on",
                           (PATTERN_SIZE + NVDIMM_SIZE) / MiB, NVDIMM_SIZE,
                           getpid(), fd);
}

static void test_readonly_nvdimm(const void *opaque)
{
    int src = open_template(), dst = open_template();
    g_autofree char *src_opts = nvdimm_opts(src);
    g_autofree char *dst_opts = nvdimm_opts(dst);
    const SparseRow row = {
        .src_opts = src_opts,
        .dst_opts = dst_opts,
        .expect.holes = HOLES_ANY,
    };

    g_assert_no_errno(ftruncate(src, NVDIMM_SIZE));
    g_assert_no_errno(ftruncate(dst, NVDIMM_SIZE));
    sparse_run(&row, opaque, &sparse_empty);
    g_assert_cmpuint(guest_ram_file_bytes(src), ==, 0);
    g_assert_cmpuint(guest_ram_file_bytes(dst), ==, 0);
    close(src);
    close(dst);
}

/* Postcopy starts with punching everything, which a read-only fd forbids */
#define READ_ONLY_WAYS \
    { &sparse_precopy, &sparse_runs, &sparse_multifd, &sparse_mapped_ram }
#define WAYS \
    { &sparse_precopy, &sparse_runs, &sparse_multifd, &sparse_mapped_ram, \
      &sparse_postcopy }

static const SparseRow rows[] = {
    {
        .name = "error/tmpfs-full-source/%w", .ways = WAYS,
        .backend = &sparse_memfd, .src_backend = &tmpfs_source,
        .check = check_tmpfs_full,
    }, {
        .name = "error/tmpfs-full-destination/%w", .ways = WAYS,
        .backend = &tmpfs_destination, .src_backend = &sparse_memfd,
        .check = check_tmpfs_full,
    }, {
        .name = "error/hugetlb-full/%w", .ways = WAYS,
        .backend = &hugetlb_unreserved,
        .patterns = { &sparse_empty }, .prepare = fill_both,
        .expect = { .dst = SPARSE_ANY, .holes = HOLES_ANY },
        .check = check_hugetlb_full,
    }, {
        .name = "error/hugetlb-reserved/%w", .ways = WAYS,
        .backend = &hugetlb_reserved,
        .patterns = { &sparse_empty }, .prepare = fill_destination,
        .expect = { .dst = SPARSE_ANY, .holes = HOLES_ANY },
        .check = check_hugetlb_reserved,
    }, {
        .name = "error/template/%w", .ways = READ_ONLY_WAYS,
        .backend = &template, .src_backend = &sparse_memfd,
        .prepare = fill_template, .expect.dst = SPARSE_ANY,
        .check = check_template,
    },
};

void lab_add_errors(void)
{
    static const SparseWay *const ways[] = READ_ONLY_WAYS;
    int i;

    sparse_add_rows(rows, ARRAY_SIZE(rows));
    for (i = 0; i < ARRAY_SIZE(ways); i++) {
        g_autofree char *name = g_strdup_printf("error/readonly-nvdimm/%s",
                                                ways[i]->name);

        lab_add_test(name, ways[i], test_readonly_nvdimm);
    }
}
