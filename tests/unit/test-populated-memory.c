/*
 * Unit tests for populated memory
 *
 * On real mappings.  That asking populates nothing is checked with the kernel:
 * smaps for the pages, and VmPTE for the page tables.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/wait.h>
#include "qemu/populated-memory.h"
#include "qemu/units.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

#define FAR_SIZE (1 * TiB)
/* More than the entries of pagemap that are read at once */
#define MODEL_PAGES 1500
#define HUGE_PAGE (2 * MiB)

typedef struct Way {
    const char *name;
    int (*next)(int fd, const SparseRange *within, SparseRange *populated);
} Way;

static int next_by_default(int fd G_GNUC_UNUSED, const SparseRange *within,
                           SparseRange *populated)
{
    return populated_memory_next(within, populated);
}

static const Way ways[] = {
    { "default", next_by_default },
    { "scan", pagemap_scan_next },
    { "read", pagemap_read_next },
};

static size_t page_size;
static int pagemap = -1;

/* Returns false if this way does not work here, after saying why */
static bool way_works(const Way *way)
{
    uintptr_t page = QEMU_ALIGN_DOWN((uintptr_t)&way, page_size);
    SparseRange within = { .start = page, .end = page + page_size };
    SparseRange populated;
    int ret;

    if (pagemap < 0) {
        g_test_skip("/proc/self/pagemap cannot be opened");
        return false;
    }
    ret = way->next(pagemap, &within, &populated);
    if (ret == -ENOTTY && way->next == pagemap_scan_next) {
        g_test_skip("the kernel has no PAGEMAP_SCAN (Linux 6.7)");
        return false;
    }
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmphex(populated.start, ==, within.start);
    g_assert_cmphex(populated.end, ==, within.end);
    return true;
}

static uint8_t *map(size_t size, int flags, int fd)
{
    uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                      flags | MAP_NORESERVE, fd, 0);

    g_assert_true(p != MAP_FAILED);
    return p;
}

static uint8_t *map_anonymous(size_t size)
{
    uint8_t *p = map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1);

    /* Where transparent huge pages are not wanted: one page is one page */
    madvise(p, size, MADV_NOHUGEPAGE);
    return p;
}

/* Returns false if there is no such mapping here, after saying so */
static bool can_map(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        g_assert_cmpint(errno, ==, ENOMEM);
        g_test_skip("so much cannot be mapped (vm.overcommit_memory is 2, or "
                    "ulimit -v)");
        return false;
    }
    munmap(p, size);
    return true;
}

/* Ask about a part of @p, and compare to what is expected, as offsets in it */
static void assert_next(const Way *way, uint8_t *p, uint64_t start,
                        uint64_t end, uint64_t expect_start,
                        uint64_t expect_end)
{
    SparseRange within = { (uintptr_t)p + start, (uintptr_t)p + end };
    SparseRange populated = { 1, 2 };

    g_assert_cmpint(way->next(pagemap, &within, &populated), ==, 0);
    g_assert_cmphex(populated.start - (uintptr_t)p, ==, expect_start);
    g_assert_cmphex(populated.end - (uintptr_t)p, ==, expect_end);
}

static void assert_nothing(const Way *way, uint8_t *p, uint64_t size)
{
    assert_next(way, p, 0, size, size, size);
}

/* A line of /proc/self/status, in KiB */
static uint64_t read_status(const char *name)
{
    g_autofree char *text = NULL;
    g_autofree char *pattern = g_strdup_printf("\n%s:", name);
    const char *line;

    g_assert_true(g_file_get_contents("/proc/self/status", &text, NULL, NULL));
    line = strstr(text, pattern);
    g_assert_nonnull(line);
    return g_ascii_strtoull(line + strlen(pattern), NULL, 10);
}

/* One terabyte that nobody has touched, and then one page of it */
static void test_far(gconstpointer opaque)
{
    const Way *way = opaque;
    /* One entry of pagemap is 8 bytes, and reading them all takes a while */
    size_t size = way->next == pagemap_read_next ? 16 * (size_t)KiB * MiB
                                                 : FAR_SIZE;
    uint64_t tables, resident, far;
    uint8_t *p;

    if (!way_works(way) || !can_map(size)) {
        return;
    }
    p = map_anonymous(size);
    far = size - 3 * page_size;

    tables = read_status("VmPTE");
    resident = read_status("VmRSS");
    assert_nothing(way, p, size);
    g_assert_cmpuint(read_status("VmPTE"), <=, tables + 64);
    g_assert_cmpuint(read_status("VmRSS"), <=, resident + 1024);

    p[far] = 1;
    assert_next(way, p, 0, size, far, far + page_size);
    assert_next(way, p, far + page_size, size, size, size);
    munmap(p, size);
}

/* All that can be said about a pattern of pages, run by run */
static void assert_model(const Way *way, uint8_t *p, const bool *model,
                         unsigned first, unsigned last)
{
    uint64_t end = last * page_size;
    uint64_t offset = first * page_size;

    while (offset < end) {
        unsigned page = offset / page_size, start;

        while (page < last && !model[page]) {
            page++;
        }
        start = page;
        while (page < last && model[page]) {
            page++;
        }
        assert_next(way, p, offset, end, start * page_size, page * page_size);
        offset = page * page_size;
    }
}

static void test_model(gconstpointer opaque)
{
    const Way *way = opaque;
    bool model[MODEL_PAGES] = { };
    uint8_t *p;

    if (!way_works(way)) {
        return;
    }
    p = map_anonymous(sizeof(model) * page_size);
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 100; i++) {
            unsigned page = g_test_rand_int_range(0, MODEL_PAGES);
            unsigned pages = g_test_rand_int_range(1, 12);

            pages = MIN(pages, MODEL_PAGES - page);
            memset(model + page, i % 3 != 0, pages);
            if (i % 3) {
                memset(p + page * page_size, 1, pages * page_size);
            } else {
                g_assert_cmpint(madvise(p + page * page_size,
                                        pages * page_size, MADV_DONTNEED),
                                ==, 0);
            }
        }
        assert_model(way, p, model, 0, MODEL_PAGES);
        assert_model(way, p, model, g_test_rand_int_range(0, MODEL_PAGES / 2),
                     g_test_rand_int_range(MODEL_PAGES / 2, MODEL_PAGES));
    }

    /* From one populated page to as many as there are */
    memset(p, 1, MODEL_PAGES * page_size);
    assert_next(way, p, 0, MODEL_PAGES * page_size, 0, MODEL_PAGES * page_size);
    munmap(p, sizeof(model) * page_size);
}

/* What is there although nobody wrote to it */
static void test_zero_page(gconstpointer opaque)
{
    const Way *way = opaque;
    size_t size = 16 * page_size;
    unsigned char resident;
    uint8_t *p;

    if (!way_works(way)) {
        return;
    }
    p = map_anonymous(size);
    g_assert_cmpint(p[page_size], ==, 0);
    assert_next(way, p, 0, size, page_size, 2 * page_size);

    if (madvise(p + 4 * page_size, page_size, MADV_POPULATE_READ) == 0) {
        assert_next(way, p, 2 * page_size, size, 4 * page_size, 5 * page_size);
    }
    /* With the address sanitizer, mlock() does nothing */
    if (mlock(p + 8 * page_size, page_size) == 0 &&
        mincore(p + 8 * page_size, page_size, &resident) == 0 &&
        (resident & 1)) {
        assert_next(way, p, 5 * page_size, size, 8 * page_size, 9 * page_size);
    }
    munmap(p, size);
}

static void test_transparent_huge_page(gconstpointer opaque)
{
    const Way *way = opaque;
    size_t size = 4 * HUGE_PAGE;
    uint8_t *p, *huge;
    SparseRange within, populated;

    if (!way_works(way)) {
        return;
    }
    p = map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    huge = (uint8_t *)QEMU_ALIGN_DOWN((uintptr_t)p + HUGE_PAGE, HUGE_PAGE);
    within.start = (uintptr_t)huge;
    within.end = within.start + 2 * HUGE_PAGE;

    madvise(p, size, MADV_HUGEPAGE);
    huge[HUGE_PAGE / 2] = 1;
    g_assert_cmpint(way->next(pagemap, &within, &populated), ==, 0);
    if (sparse_range_length(&populated) != HUGE_PAGE) {
        g_test_skip("the kernel gave no transparent huge page");
        goto out;
    }
    g_assert_cmphex(populated.start, ==, within.start);

    /* A part of it */
    within.start += HUGE_PAGE / 4;
    within.end = within.start + page_size;
    g_assert_cmpint(way->next(pagemap, &within, &populated), ==, 0);
    g_assert_cmphex(populated.start, ==, within.start);
    g_assert_cmphex(populated.end, ==, within.end);
out:
    munmap(p, size);
}

/* A page of the file is not in the page tables, but is not zero either */
static void test_private_file(gconstpointer opaque)
{
    const Way *way = opaque;
    size_t size = 16 * page_size;
    int fd = memfd_create("test-populated-memory", MFD_CLOEXEC);
    uint8_t byte = 1, *p;

    if (!way_works(way)) {
        close(fd);
        return;
    }
    g_assert_cmpint(ftruncate(fd, size), ==, 0);
    g_assert_cmpint(pwrite(fd, &byte, 1, page_size), ==, 1);
    p = map(size, MAP_PRIVATE, fd);
    assert_nothing(way, p, size);

    /* A copy of its own */
    p[4 * page_size] = 1;
    assert_next(way, p, 2 * page_size, size, 4 * page_size, 5 * page_size);
    g_assert_cmpint(p[page_size], ==, 1);
    munmap(p, size);
    close(fd);
}

static void test_swapped(gconstpointer opaque)
{
    const Way *way = opaque;
    size_t size = 64 * page_size;
    unsigned char resident[64];
    unsigned pages = 0;
    uint8_t *p;

    if (!way_works(way)) {
        return;
    }
    p = map_anonymous(size);
    memset(p, 1, size / 2);
    if (madvise(p, size, MADV_PAGEOUT) == 0 &&
        mincore(p, size, resident) == 0) {
        for (int i = 0; i < 32; i++) {
            pages += resident[i] & 1;
        }
    }
    if (pages == 32) {
        g_test_skip("nothing was swapped out: no swap, or no MADV_PAGEOUT");
    }
    assert_next(way, p, 0, size, 0, size / 2);
    munmap(p, size);
}

static void test_not_aligned(void)
{
    uint8_t *p;

    if (!way_works(&ways[0])) {
        return;
    }
    p = map_anonymous(16 * page_size);
    memset(p + 4 * page_size, 1, 2 * page_size);

    assert_next(&ways[0], p, 100, 100, 100, 100);
    assert_next(&ways[0], p, 100, 300, 300, 300);
    assert_next(&ways[0], p, 100, 4 * page_size, 4 * page_size, 4 * page_size);
    assert_next(&ways[0], p, 100, 4 * page_size + 50,
                4 * page_size, 4 * page_size + 50);
    assert_next(&ways[0], p, 4 * page_size + 100, 4 * page_size + 200,
                4 * page_size + 100, 4 * page_size + 200);
    assert_next(&ways[0], p, 5 * page_size + 100, 16 * page_size,
                5 * page_size + 100, 6 * page_size);
    munmap(p, 16 * page_size);
}

/* What a child process is told is about itself, and not about its parent */
static void test_fork(void)
{
    uint8_t *p;
    pid_t pid;
    int status;

    if (!way_works(&ways[0])) {
        return;
    }
    p = map_anonymous(4 * page_size);
    assert_nothing(&ways[0], p, 4 * page_size);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (pid == 0) {
        SparseRange within = {
            .start = (uintptr_t)p,
            .end = (uintptr_t)p + 4 * page_size,
        };
        SparseRange populated;

        p[page_size] = 1;
        _exit(populated_memory_next(&within, &populated) == 0 &&
              populated.start == (uintptr_t)p + page_size &&
              populated.end == (uintptr_t)p + 2 * page_size ? 0 : 1);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 0);
    assert_nothing(&ways[0], p, 4 * page_size);
    munmap(p, 4 * page_size);
}

static void test_refused(void)
{
    uint8_t *p = map_anonymous(page_size);
    SparseRange within = { (uintptr_t)p, (uintptr_t)p + page_size };
    SparseRange populated;
    int pipes[2];

    g_assert_cmpint(pipe(pipes), ==, 0);
    g_assert_cmpint(pagemap_scan_next(pipes[0], &within, &populated), <, 0);
    g_assert_cmpint(pagemap_read_next(pipes[0], &within, &populated), <, 0);
    close(pipes[0]);
    close(pipes[1]);
    munmap(p, page_size);
}

static void add_test(const char *name, const Way *way, GTestDataFunc test)
{
    g_autofree char *path = g_strdup_printf("/populated-memory/%s/%s",
                                            way->name, name);

    g_test_add_data_func(path, way, test);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    page_size = qemu_real_host_page_size();
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    for (int i = 0; i < ARRAY_SIZE(ways); i++) {
        add_test("far", &ways[i], test_far);
        add_test("model", &ways[i], test_model);
        add_test("zero-page", &ways[i], test_zero_page);
        add_test("transparent-huge-page", &ways[i],
                 test_transparent_huge_page);
        add_test("private-file", &ways[i], test_private_file);
        add_test("swapped", &ways[i], test_swapped);
    }
    g_test_add_func("/populated-memory/not-aligned", test_not_aligned);
    g_test_add_func("/populated-memory/fork", test_fork);
    g_test_add_func("/populated-memory/refused", test_refused);
    return g_test_run();
}
