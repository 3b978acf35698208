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
#include "migration/framework.h"
#include "migration/sparse-guests.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"

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

static const SparseRoute routes[] = {
    { .name = "precopy" },
    { .name = "runs", .capabilities = { "sparse-ram" } },
    { .name = "multifd", .capabilities = { "multifd" } },
    { .name = "mapped-ram", .capabilities = { "mapped-ram" }, .file = true },
    {
        .name = "postcopy",
        .capabilities = { "postcopy-ram" },
        .postcopy = true,
    },
};

static MigrationTestEnv *env;

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

static int limited_tmpfs(uint64_t bytes)
{
    MountOption options[MAX_OPTIONS] = {
        { "size", g_strdup_printf("%" PRIu64, bytes) },
        { "huge", g_strdup("never") },
    };

    return limited_file("tmpfs", options);
}

/* All of the pages are set aside for it, whoever else takes huge pages */
static int limited_hugetlbfs(unsigned pages)
{
    MountOption options[MAX_OPTIONS] = {
        { "pagesize", g_strdup("2M") },
        { "size", g_strdup_printf("%" PRIu64, pages * HUGETLB_PAGE_SIZE) },
        { "min_size", g_strdup_printf("%" PRIu64, pages * HUGETLB_PAGE_SIZE) },
    };

    sparse_lock_huge_pages();
    return limited_file("hugetlbfs", options);
}

/* The pages that are neither allocated nor, with hugetlbfs, reserved */
static uint64_t free_pages(const GuestRam *ram)
{
    struct statfs st;

    g_assert_cmpint(fstatfs(ram->fd, &st), ==, 0);
    return st.f_bfree;
}

/* Start two guests with the RAM that is described, and prepare the route */
static bool guests_start(SparseGuests *guests, const SparseRoute *route,
                         const char *src_memory, const char *dst_memory)
{
    if (!sparse_guests_start(guests, src_memory, dst_memory)) {
        return false;
    }
    if (!sparse_guests_prepare(guests, route, env)) {
        sparse_guests_end(guests);
        return false;
    }
    return true;
}

/* The same, with the options that @guests->src and ->dst have by themselves */
static bool guests_start_file(SparseGuests *guests, const SparseRoute *route,
                              const char *object_opts)
{
    g_autofree char *src_memory = guest_ram_opts(&guests->src, object_opts);
    g_autofree char *dst_memory = guest_ram_opts(&guests->dst, object_opts);

    return guests_start(guests, route, src_memory, dst_memory);
}

static uint64_t count_kinds(const uint8_t *kinds, uint64_t pages, PageKind kind)
{
    uint64_t page, count = 0;

    for (page = 0; page < pages; page++) {
        count += kinds[page] == kind;
    }
    return count;
}

/*
 * On one side there is space for what is populated, or will be, and not for a
 * page more.
 */
static void tmpfs_full(const SparseRoute *route, bool source)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t pages = PATTERN_SIZE / page_size;
    g_autofree uint8_t *kinds = sparse_pattern_new(PATTERN_MIXED, pages);
    g_autofree unsigned long *data = NULL;
    uint64_t data_pages = count_kinds(kinds, pages, PAGE_DATA);
    uint64_t zero_pages = count_kinds(kinds, pages, PAGE_ZERO);
    uint64_t space = data_pages + (source ? zero_pages : 0);
    SparseGuests guests = { };
    GuestRam *limited = source ? &guests.src : &guests.dst;
    int fd = limited_tmpfs(space * page_size);

    if (fd < 0) {
        return;
    }
    guest_ram_init(source ? &guests.dst : &guests.src, BACKEND_MEMFD,
                   PATTERN_SIZE);
    guest_ram_init_file(limited, BACKEND_FILE, PATTERN_SIZE, fd);
    if (!guests_start_file(&guests, route, NULL)) {
        return;
    }
    g_assert_cmpuint(free_pages(limited), ==, space);
    guest_ram_prepare(&guests.src, kinds);

    sparse_guests_migrate(&guests, route, env);

    guest_ram_report(&guests.src, &guests.dst,
                     (data_pages + zero_pages) * page_size);
    g_assert_cmpuint(free_pages(limited), ==, 0);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.src), ==,
                     (data_pages + zero_pages) * page_size);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.dst), ==,
                     data_pages * page_size);
    data = guest_ram_check_content(&guests.src, &guests.dst, kinds, 0, pages);
    g_assert_cmpuint(bitmap_count_one(data, pages), ==, data_pages);
    sparse_guests_end(&guests);
}

static void test_tmpfs_full_source(const void *opaque)
{
    tmpfs_full(opaque, true);
}

static void test_tmpfs_full_destination(const void *opaque)
{
    tmpfs_full(opaque, false);
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

    for (page = 0; page < guest_ram_pages(ram); page += HUGETLB_STRIDE) {
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

    for (page = 0; page < guest_ram_pages(ram); page++) {
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

/* There are @pages huge pages for each side, and no more */
static bool hugetlb_start(SparseGuests *guests, const SparseRoute *route,
                          const char *object_opts, unsigned pages)
{
    int src_fd = limited_hugetlbfs(pages);
    int dst_fd;

    if (src_fd < 0) {
        return false;
    }
    dst_fd = limited_hugetlbfs(pages);
    if (dst_fd < 0) {
        close(src_fd);
        return false;
    }
    guest_ram_init_file(&guests->src, BACKEND_HUGETLB_FILE, HUGETLB_RAM_SIZE,
                        src_fd);
    guest_ram_init_file(&guests->dst, BACKEND_HUGETLB_FILE, HUGETLB_RAM_SIZE,
                        dst_fd);
    return guests_start_file(guests, route, object_opts);
}

/*
 * Nothing is reserved, and there is not one huge page more than those with
 * data.  On the destination they are populated, and full of old data.
 */
static void test_hugetlb_full(const void *opaque)
{
    const SparseRoute *route = opaque;
    unsigned pages = hugetlb_data_pages();
    SparseGuests guests = { };

    if (!hugetlb_start(&guests, route, ",reserve=off", pages)) {
        return;
    }
    fill_huge_pages(&guests.src, false);
    fill_huge_pages(&guests.dst, true);
    g_assert_cmpuint(free_pages(&guests.src), ==, 0);
    g_assert_cmpuint(free_pages(&guests.dst), ==, 0);

    sparse_guests_migrate(&guests, route, env);

    guest_ram_report(&guests.src, &guests.dst, pages * HUGETLB_PAGE_SIZE);
    check_huge_pages(&guests.src);
    check_huge_pages(&guests.dst);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.src), ==,
                     pages * HUGETLB_PAGE_SIZE);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.dst), ==,
                     pages * HUGETLB_PAGE_SIZE);
    sparse_guests_end(&guests);
}

/*
 * All huge pages are reserved for the guest.  They still are when zero pages
 * have arrived: nobody else gets one, and the guest can write to all its RAM.
 */
static void test_hugetlb_reserved(const void *opaque)
{
    const SparseRoute *route = opaque;
    unsigned pages = HUGETLB_RAM_SIZE / HUGETLB_PAGE_SIZE;
    uint64_t stale_bytes = hugetlb_data_pages() * HUGETLB_PAGE_SIZE;
    SparseGuests guests = { };
    uint64_t offset;

    if (!hugetlb_start(&guests, route, ",reserve=on", pages)) {
        return;
    }
    /* The other way round: there is nothing on the source */
    fill_huge_pages(&guests.dst, true);
    g_assert_cmpuint(free_pages(&guests.dst), ==, 0);

    sparse_guests_migrate(&guests, route, env);

    guest_ram_report(&guests.src, &guests.dst, 0);
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.src), ==, 0);
    /* Postcopy punches everything before it starts, and reserves it again */
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.dst), ==,
                     route->postcopy ? 0 : stale_bytes);
    g_assert_cmpuint(free_pages(&guests.dst), ==, 0);
    for (offset = 0; offset < HUGETLB_RAM_SIZE; offset += HUGETLB_PAGE_SIZE) {
        /* 1 MiB into each, so as not to hit what is no RAM on a PC */
        g_assert_cmpuint(qtest_readl(guests.to, offset + MiB), ==, 0);
        qtest_writel(guests.to, offset + MiB, 1);
    }
    g_assert_cmpuint(guest_ram_allocated_bytes(&guests.dst), ==,
                     HUGETLB_RAM_SIZE);
    sparse_guests_end(&guests);
}

/*
 * A template: a file that QEMU has opened read-only and mapped private.  What
 * arrives as zero must not show what the template has there, and the template
 * must not change.
 */
static void test_template(const void *opaque)
{
    const SparseRoute *route = opaque;
    g_autofree uint8_t *kinds = NULL;
    g_autofree unsigned long *data = NULL;
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree uint8_t *buf = NULL;
    GuestRam template;
    SparseGuests guests = { };
    uint64_t page;

    guest_ram_init_file(&template, BACKEND_FILE, PATTERN_SIZE,
                        memfd_create("qemu-sparse-test", MFD_CLOEXEC));
    guest_ram_make_stale(&template);
    dst_memory = g_strdup_printf("-m %" PRIu64 "M -object memory-backend-file,"
                                 "id=" BACKEND_ID ",size=%" PRIu64 ","
                                 "mem-path=%s,share=off,readonly=on,rom=off "
                                 "-machine memory-backend=" BACKEND_ID,
                                 PATTERN_SIZE / MiB, PATTERN_SIZE,
                                 template.path);
    guest_ram_init(&guests.src, BACKEND_MEMFD, PATTERN_SIZE);
    guest_ram_init(&guests.dst, BACKEND_MEMFD_PRIVATE, PATTERN_SIZE);
    src_memory = guest_ram_opts(&guests.src, NULL);
    if (!guests_start(&guests, route, src_memory, dst_memory)) {
        goto out;
    }
    kinds = sparse_pattern_new(PATTERN_MIXED, guest_ram_pages(&guests.src));
    guest_ram_prepare(&guests.src, kinds);

    sparse_guests_migrate(&guests, route, env);

    data = guest_ram_check_content(&guests.src, &guests.dst, kinds,
                                   0, guest_ram_pages(&guests.src));
    g_assert_cmpuint(bitmap_count_one(data, guest_ram_pages(&guests.src)), ==,
                     count_kinds(kinds, guest_ram_pages(&guests.src),
                                 PAGE_DATA));
    /* See guest_ram_make_stale() */
    buf = g_malloc(template.page_size);
    for (page = 0; page < guest_ram_pages(&template); page++) {
        guest_ram_read_page(&template, page, buf);
        g_assert_true(buf[0] == (page % 11 < 7 ? 0xff : 0) &&
                      buf[template.page_size - 1] == buf[0]);
    }
    sparse_guests_end(&guests);
out:
    guest_ram_close(&template);
}

static char *nvdimm_opts(const GuestRam *main_ram, const GuestRam *nvdimm)
{
    g_autofree char *memory = guest_ram_opts(main_ram, NULL);

    return g_strdup_printf("%s -m slots=1,maxmem=%" PRIu64 "M "
                           "-machine nvdimm=on -object memory-backend-file,"
                           "id=nvmem,size=%" PRIu64 ",mem-path=%s,share=on,"
                           "readonly=on -device nvdimm,memdev=nvmem,unarmed=on",
                           memory, (main_ram->size + nvdimm->size) / MiB,
                           nvdimm->size, nvdimm->path);
}

/*
 * An NVDIMM that QEMU has opened and mapped read-only, and that is empty on
 * both sides.  A read through the mapping would allocate it all the same.  If
 * there were data, it could not be migrated: QEMU writes to the mapping.
 */
static void test_readonly_nvdimm(const void *opaque)
{
    const SparseRoute *route = opaque;
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    GuestRam src, dst;
    SparseGuests guests = { };

    guest_ram_init_file(&src, BACKEND_FILE, NVDIMM_SIZE,
                        memfd_create("qemu-sparse-test", MFD_CLOEXEC));
    guest_ram_init_file(&dst, BACKEND_FILE, NVDIMM_SIZE,
                        memfd_create("qemu-sparse-test", MFD_CLOEXEC));
    guest_ram_init(&guests.src, BACKEND_MEMFD, PATTERN_SIZE);
    guest_ram_init(&guests.dst, BACKEND_MEMFD, PATTERN_SIZE);
    src_memory = nvdimm_opts(&guests.src, &src);
    dst_memory = nvdimm_opts(&guests.dst, &dst);
    if (guests_start(&guests, route, src_memory, dst_memory)) {
        sparse_guests_migrate(&guests, route, env);
        guest_ram_report(&src, &dst, 0);
        g_assert_cmpuint(guest_ram_allocated_bytes(&src), ==, 0);
        g_assert_cmpuint(guest_ram_allocated_bytes(&dst), ==, 0);
        sparse_guests_end(&guests);
    }
    guest_ram_close(&src);
    guest_ram_close(&dst);
}

typedef struct ErrorTest {
    /* Path below /migration/sparse/error */
    const char *name;
    void (*test)(const void *opaque);
    /* Postcopy starts with punching everything, which a read-only fd forbids */
    bool read_only;
} ErrorTest;

static const ErrorTest error_tests[] = {
    { "tmpfs-full-source", test_tmpfs_full_source },
    { "tmpfs-full-destination", test_tmpfs_full_destination },
    { "hugetlb-full", test_hugetlb_full },
    { "hugetlb-reserved", test_hugetlb_reserved },
    { "template", test_template, true },
    { "readonly-nvdimm", test_readonly_nvdimm, true },
};

void migration_test_add_sparse_errors(MigrationTestEnv *the_env)
{
    int i, j;

    env = the_env;

    for (i = 0; i < ARRAY_SIZE(error_tests); i++) {
        for (j = 0; j < ARRAY_SIZE(routes); j++) {
            g_autofree char *path = g_strdup_printf(
                "/migration/sparse/error/%s/%s", error_tests[i].name,
                routes[j].name);

            if (!routes[j].postcopy || !error_tests[i].read_only) {
                qtest_add_data_func(path, &routes[j],
                                    error_tests[i].test);
            }
        }
    }
}
