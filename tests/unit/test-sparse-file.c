/*
 * Unit tests for sparse files
 *
 * What is said about memory is checked with the kernel: st_blocks for what is
 * allocated, SEEK_DATA for where.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "qemu/sparse-file.h"
#include "qemu/units.h"

#define LAST UINT64_MAX
/* More than 2^32 pages of 4 KiB */
#define FAR (20 * TiB)

typedef struct GatherCase {
    const char *name;
    SparseRange range;
    uint64_t start;
    uint64_t length;
    bool gathered;
    SparseRange expected;
} GatherCase;

static const GatherCase gather_cases[] = {
    { "first", { 0, 0 }, 8192, 4096, true, { 8192, 12288 } },
    { "first-at-zero", { 0, 0 }, 0, 4096, true, { 0, 4096 } },
    { "first-elsewhere-empty", { 77, 77 }, 8192, 4096, true, { 8192, 12288 } },
    { "nothing", { 4096, 8192 }, 65536, 0, true, { 4096, 8192 } },
    { "nothing-to-nothing", { 0, 0 }, 65536, 0, true, { 0, 0 } },
    { "behind", { 4096, 8192 }, 8192, 4096, true, { 4096, 12288 } },
    { "in-front", { 4096, 8192 }, 0, 4096, true, { 0, 8192 } },
    { "same", { 4096, 8192 }, 4096, 4096, true, { 4096, 8192 } },
    { "inside", { 4096, 65536 }, 8192, 4096, true, { 4096, 65536 } },
    { "around", { 8192, 12288 }, 4096, 65536, true, { 4096, 69632 } },
    { "overlap-behind", { 4096, 12288 }, 8192, 8192, true, { 4096, 16384 } },
    { "overlap-in-front", { 8192, 16384 }, 4096, 8192, true, { 4096, 16384 } },
    { "gap-behind", { 4096, 8192 }, 8193, 4096, false, { 4096, 8192 } },
    { "gap-in-front", { 8192, 12288 }, 0, 8191, false, { 8192, 12288 } },
    { "out-of-order", { 65536, 69632 }, 0, 4096, false, { 65536, 69632 } },
    { "far-behind", { 0, FAR }, FAR, 4096, true, { 0, FAR + 4096 } },
    { "far", { FAR, FAR + 4096 }, 0, FAR, true, { 0, FAR + 4096 } },
    { "to-the-end", { LAST - 8192, LAST - 4096 }, LAST - 4096, 4096, true,
      { LAST - 8192, LAST } },
    { "wraps", { LAST - 8192, LAST - 4096 }, LAST - 4096, 8192, false,
      { LAST - 8192, LAST - 4096 } },
    { "first-wraps", { 0, 0 }, LAST, 2, false, { 0, 0 } },
};

static void test_gather(gconstpointer data)
{
    const GatherCase *c = data;
    SparseRange range = c->range;

    g_assert_cmpint(sparse_range_gather(&range, c->start, c->length), ==,
                    c->gathered);
    g_assert_cmphex(range.start, ==, c->expected.start);
    g_assert_cmphex(range.end, ==, c->expected.end);
}

static void test_overlaps(void)
{
    SparseRange empty = { 8192, 8192 };
    SparseRange a = { 4096, 8192 };
    SparseRange behind = { 8192, 12288 };
    SparseRange around = { 0, LAST };
    SparseRange byte = { 8191, 8192 };

    g_assert_false(sparse_range_overlaps(&a, &behind));
    g_assert_false(sparse_range_overlaps(&behind, &a));
    g_assert_false(sparse_range_overlaps(&a, &empty));
    g_assert_false(sparse_range_overlaps(&empty, &around));
    g_assert_true(sparse_range_overlaps(&a, &a));
    g_assert_true(sparse_range_overlaps(&a, &byte));
    g_assert_true(sparse_range_overlaps(&byte, &a));
    g_assert_true(sparse_range_overlaps(&around, &a));
}

typedef struct SplitCase {
    const char *name;
    SparseRange range;
    uint64_t first;
    uint64_t last;
} SplitCase;

/* With units of 2 MiB */
static const SplitCase split_cases[] = {
    { "empty", { 4096, 4096 }, 4096, 4096 },
    { "within-one", { 4096, 8192 }, 8192, 8192 },
    { "across-two", { 2 * MiB - 1, 2 * MiB + 1 }, 2 * MiB + 1, 2 * MiB + 1 },
    { "one", { 2 * MiB, 4 * MiB }, 2 * MiB, 4 * MiB },
    { "start-of-one", { 2 * MiB, 4 * MiB - 1 }, 4 * MiB - 1, 4 * MiB - 1 },
    { "head", { 1 * MiB, 6 * MiB }, 2 * MiB, 6 * MiB },
    { "tail", { 2 * MiB, 7 * MiB }, 2 * MiB, 6 * MiB },
    { "both", { 1 * MiB, 9 * MiB }, 2 * MiB, 8 * MiB },
    { "far", { FAR + 1, FAR + 5 * MiB }, FAR + 2 * MiB, FAR + 4 * MiB },
    { "end-of-space", { LAST - 8191, LAST }, LAST, LAST },
};

static void test_split(gconstpointer data)
{
    const SplitCase *c = data;
    SparseRange head, body, tail;

    sparse_range_split(&c->range, 2 * MiB, &head, &body, &tail);

    g_assert_cmphex(head.start, ==, c->range.start);
    g_assert_cmphex(head.end, ==, body.start);
    g_assert_cmphex(body.end, ==, tail.start);
    g_assert_cmphex(tail.end, ==, c->range.end);
    g_assert_cmphex(sparse_range_length(&body), ==, c->last - c->first);
    if (c->last != c->first) {
        g_assert_cmphex(body.start, ==, c->first);
    }
}

#ifdef CONFIG_LINUX

#include <linux/memfd.h>
#include <sys/mman.h>

#define PAGE ((uint64_t)qemu_real_host_page_size())

static int memfd_new(uint64_t size, unsigned int flags)
{
    int fd = memfd_create("test-sparse-file", MFD_CLOEXEC | flags);

    if (fd >= 0) {
        g_assert_no_errno(ftruncate(fd, size));
    }
    return fd;
}

static void write_bytes(int fd, uint64_t offset, uint64_t length, int byte)
{
    g_autofree uint8_t *buf = g_malloc(length);

    memset(buf, byte, length);
    g_assert_cmpint(pwrite(fd, buf, length, offset), ==, length);
}

static void assert_bytes(int fd, uint64_t offset, uint64_t length, int byte)
{
    g_autofree uint8_t *buf = g_malloc(length);

    g_assert_cmpint(pread(fd, buf, length, offset), ==, length);
    for (uint64_t i = 0; i < length; i++) {
        g_assert_cmpint(buf[i], ==, byte);
    }
}

static uint64_t allocated(int fd)
{
    struct stat st;

    g_assert_no_errno(fstat(fd, &st));
    return st.st_blocks * 512;
}

/* What @within begins with has to be data (1) or a hole (0); returns its end */
static uint64_t assert_extent(int fd, uint64_t start, uint64_t limit, int data)
{
    SparseRange within = { start, limit };
    uint64_t end;

    g_assert_cmpint(sparse_file_next_extent(fd, &within, &end), ==, data);
    g_assert_cmphex(end, >, start);
    g_assert_cmphex(end, <=, limit);
    return end;
}

/* From @from up to @start there is a hole, and then data up to @end */
static void assert_next_data(int fd, uint64_t from, uint64_t to,
                             uint64_t start, uint64_t end)
{
    /* Before Linux 6.5, a large extent is looked at piece by piece */
    while (from < start) {
        from = assert_extent(fd, from, to, 0);
    }
    g_assert_cmphex(from, ==, start);
    while (from < end) {
        from = assert_extent(fd, from, to, 1);
    }
    g_assert_cmphex(from, ==, end);
    if (end < to) {
        assert_extent(fd, end, to, 0);
    }
}

static void test_next_data(void)
{
    uint64_t size = 64 * PAGE;
    int fd = memfd_new(size, 0);

    assert_next_data(fd, 0, size, size, size);
    assert_next_data(fd, 0, 0, 0, 0);
    assert_next_data(fd, PAGE, 2 * PAGE, 2 * PAGE, 2 * PAGE);

    write_bytes(fd, 0, 1, 1);
    write_bytes(fd, 8 * PAGE, 2 * PAGE, 1);
    write_bytes(fd, size - 1, 1, 1);

    assert_next_data(fd, 0, size, 0, PAGE);
    assert_next_data(fd, PAGE, size, 8 * PAGE, 10 * PAGE);
    assert_next_data(fd, PAGE, 9 * PAGE, 8 * PAGE, 9 * PAGE);
    assert_next_data(fd, PAGE, 8 * PAGE, 8 * PAGE, 8 * PAGE);
    assert_next_data(fd, 9 * PAGE, size, 9 * PAGE, 10 * PAGE);
    assert_next_data(fd, 10 * PAGE, size, size - PAGE, size);

    /* Looking has not allocated anything */
    g_assert_cmpint(allocated(fd), ==, 4 * PAGE);
    close(fd);
}

static void test_next_data_far(void)
{
    uint64_t size = FAR + 4 * PAGE;
    int fd = memfd_new(size, 0);

    if (assert_extent(fd, 0, size, 0) < size) {
        g_test_skip("the kernel has no cachestat(), it would read 20 TiB");
        close(fd);
        return;
    }
    assert_next_data(fd, 0, size, size, size);
    write_bytes(fd, FAR, 1, 1);
    assert_next_data(fd, 0, size, FAR, FAR + PAGE);
    /* Behind the end of the file there is no data */
    assert_next_data(fd, FAR + PAGE, 2 * FAR, 2 * FAR, 2 * FAR);
    assert_next_data(fd, 2 * FAR, 3 * FAR, 3 * FAR, 3 * FAR);
    close(fd);
}

/*
 * lseek() says that a preallocated page is a hole until it is accessed, as it
 * does for a moment of one with data that is being moved.  Only the first kind
 * can be made at will; it has to be taken for data as well.
 */
static void test_next_data_not_uptodate(void)
{
    uint64_t size = 64 * PAGE;
    int fd = memfd_new(size, 0);

    g_assert_no_errno(fallocate(fd, 0, 7 * PAGE, 5 * PAGE));
    g_assert_cmpint(allocated(fd), ==, 5 * PAGE);
    g_assert_cmpint(lseek(fd, 0, SEEK_DATA), ==, -1);

    if (assert_extent(fd, 0, size, 0) == size) {
        /* What the kernel cannot count has been read, and is zero */
        g_test_skip("the kernel has no cachestat()");
    } else {
        assert_next_data(fd, 0, size, 7 * PAGE, 12 * PAGE);
        assert_next_data(fd, 11 * PAGE, size, 11 * PAGE, 12 * PAGE);

        /* In front of what is data anyway */
        write_bytes(fd, 20 * PAGE, 1, 1);
        assert_next_data(fd, 12 * PAGE, size, 20 * PAGE, 21 * PAGE);
        assert_next_data(fd, 0, size, 7 * PAGE, 12 * PAGE);
    }
    close(fd);
}

/* Ends are found exactly, however long the data is */
static void test_next_data_ends(void)
{
    static const unsigned lengths[] = {
        1, 2, 3, 5, 6, 7, 20, 21, 22, 23, 85, 86, 87, 300
    };
    uint64_t size = 1024 * PAGE;

    for (int i = 0; i < ARRAY_SIZE(lengths); i++) {
        uint64_t end = (1 + lengths[i]) * PAGE;

        for (int hole = 1; hole <= 3; hole++) {
            int fd = memfd_new(size, 0);

            write_bytes(fd, PAGE, end - PAGE, 1);
            write_bytes(fd, end + hole * PAGE, 200 * PAGE, 1);
            assert_next_data(fd, 0, size, PAGE, end);
            assert_next_data(fd, end - PAGE, size, end - PAGE, end);
            assert_next_data(fd, end - PAGE, end, end - PAGE, end);
            assert_next_data(fd, end, size, end + hole * PAGE,
                             end + (hole + 200) * PAGE);
            close(fd);
        }
    }
}

/* An extent ends where the question does */
static void test_next_data_max(void)
{
    uint64_t size = 4096 * PAGE;
    int fd = memfd_new(size, 0);

    write_bytes(fd, 300 * PAGE, 700 * PAGE, 1);
    for (uint64_t max = PAGE; max <= 512 * PAGE; max *= 2) {
        assert_next_data(fd, 300 * PAGE, 300 * PAGE + max,
                         300 * PAGE, 300 * PAGE + max);
        assert_next_data(fd, 1000 * PAGE, 1000 * PAGE + max,
                         1000 * PAGE + max, 1000 * PAGE + max);
    }
    close(fd);
}

/* Parts of pages: what has any data is data */
static void test_next_data_unaligned(void)
{
    uint64_t size = 64 * PAGE;
    int fd = memfd_new(size, 0);

    write_bytes(fd, 8 * PAGE + 5, 1, 1);
    g_assert_cmphex(assert_extent(fd, 8 * PAGE - 1, 8 * PAGE + 1, 0), ==,
                    8 * PAGE);
    g_assert_cmphex(assert_extent(fd, 8 * PAGE + 7, 8 * PAGE + 9, 1), ==,
                    8 * PAGE + 9);
    g_assert_cmphex(assert_extent(fd, 8 * PAGE + 7, size, 1), ==, 9 * PAGE);
    g_assert_cmphex(assert_extent(fd, 9 * PAGE + 3, 9 * PAGE + 4, 0), ==,
                    9 * PAGE + 4);

    /* What is left when the extent is searched for is not two pages */
    write_bytes(fd, 16 * PAGE, 3 * PAGE, 1);
    g_assert_cmphex(assert_extent(fd, 16 * PAGE, 19 * PAGE + 5, 1), ==,
                    19 * PAGE);
    g_assert_cmphex(assert_extent(fd, 16 * PAGE, 20 * PAGE - 5, 1), ==,
                    19 * PAGE);
    close(fd);
}

static void test_is_full(void)
{
    int fd = memfd_new(16 * PAGE, 0);

    write_bytes(fd, 0, 15 * PAGE, 1);
    g_assert_false(sparse_file_is_full(fd));
    g_assert_cmpint(sparse_file_allocated(fd), ==, 15 * PAGE);
    write_bytes(fd, 15 * PAGE, 1, 1);
    g_assert_true(sparse_file_is_full(fd));
    close(fd);
    g_assert_false(sparse_file_is_full(-1));
    g_assert_cmpint(sparse_file_allocated(-1), ==, -EBADF);
}

/* Of a device, statfs() says that it is on the tmpfs that its node is on */
static void test_is_regular(void)
{
    int memfd = memfd_new(PAGE, 0);
    int device = open("/dev/zero", O_RDWR);

    g_assert_true(sparse_file_is_regular(memfd));
    g_assert_cmpint(device, >=, 0);
    g_assert_false(sparse_file_is_regular(device));
    g_assert_false(sparse_file_is_regular(-1));
    close(device);
    close(memfd);
}

static void test_next_data_refused(void)
{
    SparseRange within = { 0, PAGE };
    uint64_t end;

    g_assert_cmpint(sparse_file_next_extent(-1, &within, &end), ==, -EBADF);
}

static void test_is_zero(void)
{
    uint64_t size = 64 * PAGE;
    int fd = memfd_new(size, 0);
    SparseRange all = { 0, size };
    SparseRange front = { 0, size - 1 };
    SparseRange past = { 0, 2 * size };
    SparseRange none = { PAGE, PAGE };

    g_assert_cmpint(sparse_file_is_zero(fd, &all), ==, 1);
    g_assert_cmpint(sparse_file_is_zero(fd, &past), ==, 1);
    g_assert_cmpint(allocated(fd), ==, 0);

    write_bytes(fd, size - 1, 1, 1);
    g_assert_cmpint(sparse_file_is_zero(fd, &all), ==, 0);
    g_assert_cmpint(sparse_file_is_zero(fd, &past), ==, 0);
    g_assert_cmpint(sparse_file_is_zero(fd, &front), ==, 1);
    g_assert_cmpint(sparse_file_is_zero(fd, &none), ==, 1);
    g_assert_cmpint(allocated(fd), ==, PAGE);

    g_assert_cmpint(sparse_file_is_zero(-1, &all), ==, -EBADF);
    close(fd);
}

static void test_punch(void)
{
    uint64_t size = 16 * PAGE;
    int fd = memfd_new(size, 0);
    SparseRange two = { 4 * PAGE, 6 * PAGE };
    SparseRange part = { 8 * PAGE + 1, 9 * PAGE - 1 };
    SparseRange none = { PAGE, PAGE };
    SparseRange all = { 0, size };

    write_bytes(fd, 0, size, 0xff);
    g_assert_cmpint(sparse_file_punch(fd, &none), ==, 0);
    g_assert_cmpint(allocated(fd), ==, size);

    g_assert_cmpint(sparse_file_punch(fd, &two), ==, 0);
    g_assert_cmpint(allocated(fd), ==, size - 2 * PAGE);
    assert_bytes(fd, 4 * PAGE, 2 * PAGE, 0);
    assert_bytes(fd, 4 * PAGE - 1, 1, 0xff);
    assert_bytes(fd, 6 * PAGE, 1, 0xff);

    /* Part of a page is zeroed in place */
    g_assert_cmpint(sparse_file_punch(fd, &part), ==, 0);
    g_assert_cmpint(allocated(fd), ==, size - 2 * PAGE);
    assert_bytes(fd, 8 * PAGE, 1, 0xff);
    assert_bytes(fd, 8 * PAGE + 1, PAGE - 2, 0);
    assert_bytes(fd, 9 * PAGE - 1, 1, 0xff);

    g_assert_cmpint(sparse_file_punch(fd, &all), ==, 0);
    g_assert_cmpint(allocated(fd), ==, 0);
    close(fd);
}

static void test_punch_refused(void)
{
    int fd = memfd_new(PAGE, MFD_ALLOW_SEALING);
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    SparseRange all = { 0, PAGE };
    int readonly;

    write_bytes(fd, 0, PAGE, 0xff);
    readonly = open(path, O_RDONLY | O_CLOEXEC);
    g_assert_no_errno(readonly);
    g_assert_cmpint(sparse_file_punch(readonly, &all), ==, -EBADF);

    g_assert_no_errno(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE));
    g_assert_cmpint(sparse_file_punch(fd, &all), ==, -EPERM);

    assert_bytes(fd, 0, PAGE, 0xff);
    close(readonly);
    close(fd);
}

/* Reading the mapping is what allocates; if not, all this is not needed. */
static void test_mapping_allocates(void)
{
    int fd = memfd_new(PAGE, 0);
    uint8_t *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    g_assert_true(map != MAP_FAILED);
    g_assert_cmpint(map[0], ==, 0);
    g_assert_cmpint(allocated(fd), ==, PAGE);
    munmap(map, PAGE);
    close(fd);
}

static void test_thp_size(void)
{
    int fd = memfd_new(PAGE, 0);
    uint64_t size = sparse_file_thp_size(fd);
    g_autofree char *enabled = NULL;

    if (!g_file_get_contents("/sys/kernel/mm/transparent_hugepage/"
                             "shmem_enabled", &enabled, NULL, NULL)) {
        g_assert_cmpint(size, ==, 0);
    } else if (strstr(enabled, "[deny]")) {
        g_assert_cmpint(size, ==, 0);
    } else if (!strstr(enabled, "[never]")) {
        g_assert_cmpint(size, >, PAGE);
        g_assert_true(is_power_of_2(size));
    } else {
        /* Unless switched on for this size alone */
        g_assert_true(size == 0 || is_power_of_2(size));
    }
    close(fd);
}

#define HUGE (2 * MiB)

static void test_hugetlb(void)
{
    int fd = memfd_new(2 * HUGE, MFD_HUGETLB | MFD_HUGE_2MB);
    SparseRange all = { 0, 2 * HUGE };
    SparseRange second = { HUGE, 2 * HUGE };
    uint8_t *map;

    if (fd < 0) {
        g_autofree char *why = g_strdup_printf("no hugetlb memfd: %s",
                                               strerror(errno));
        g_test_skip(why);
        return;
    }

    map = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        g_test_skip("fewer than two free huge pages of 2 MiB"
                    " (vm.nr_hugepages)");
        close(fd);
        return;
    }
    g_assert_cmpint(sparse_file_is_zero(fd, &all), ==, 1);
    g_assert_cmpint(allocated(fd), ==, 0);

    map[12345] = 1;
    g_assert_cmpint(sparse_file_is_zero(fd, &all), ==, 0);
    g_assert_cmpint(sparse_file_is_zero(fd, &second), ==, 1);
    g_assert_cmpint(allocated(fd), ==, HUGE);
    munmap(map, 2 * HUGE);
    close(fd);
}

static void add_file_tests(void)
{
    g_test_add_func("/sparse-file/next-data", test_next_data);
    g_test_add_func("/sparse-file/next-data/far", test_next_data_far);
    g_test_add_func("/sparse-file/next-data/not-uptodate",
                    test_next_data_not_uptodate);
    g_test_add_func("/sparse-file/next-data/ends", test_next_data_ends);
    g_test_add_func("/sparse-file/next-data/max", test_next_data_max);
    g_test_add_func("/sparse-file/next-data/unaligned",
                    test_next_data_unaligned);
    g_test_add_func("/sparse-file/is-full", test_is_full);
    g_test_add_func("/sparse-file/is-regular", test_is_regular);
    g_test_add_func("/sparse-file/next-data/refused", test_next_data_refused);
    g_test_add_func("/sparse-file/is-zero", test_is_zero);
    g_test_add_func("/sparse-file/punch", test_punch);
    g_test_add_func("/sparse-file/punch/refused", test_punch_refused);
    g_test_add_func("/sparse-file/mapping-allocates", test_mapping_allocates);
    g_test_add_func("/sparse-file/thp-size", test_thp_size);
    g_test_add_func("/sparse-file/hugetlb", test_hugetlb);
}

#else /* !CONFIG_LINUX */

static void add_file_tests(void)
{
}

#endif

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    for (int i = 0; i < ARRAY_SIZE(gather_cases); i++) {
        g_autofree char *path = g_strdup_printf("/sparse-range/gather/%s",
                                                gather_cases[i].name);
        g_test_add_data_func(path, &gather_cases[i], test_gather);
    }
    for (int i = 0; i < ARRAY_SIZE(split_cases); i++) {
        g_autofree char *path = g_strdup_printf("/sparse-range/split/%s",
                                                split_cases[i].name);
        g_test_add_data_func(path, &split_cases[i], test_split);
    }
    g_test_add_func("/sparse-range/overlaps", test_overlaps);
    add_file_tests();

    return g_test_run();
}
