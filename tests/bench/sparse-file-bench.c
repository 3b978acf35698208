/*
 * How long it takes to ask the kernel about holes, and to make them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/memfd.h"
#include "qemu/populated-memory.h"
#include "qemu/sparse-file.h"
#include "qemu/units.h"

#define FILE_SIZE (64 * MiB)

typedef struct Bench {
    const char *name;
    /* One page of this many is populated; 0: none */
    unsigned populated;
    void (*run)(int fd, void *mapping, const SparseRange *range);
} Bench;

static void populate(uint8_t *mapping, const Bench *bench, uint64_t length)
{
    uint64_t step = bench->populated * qemu_real_host_page_size();

    for (uint64_t offset = 0; step && offset < length; offset += step) {
        mapping[offset] = 1;
    }
}

static void look_up(int fd, void *mapping, const SparseRange *range)
{
    SparseRange rest = *range;

    while (!sparse_range_is_empty(&rest)) {
        int ret = sparse_file_next_extent(fd, &rest, &rest.start);

        g_assert_cmpint(ret, >=, 0);
    }
}

static void look_up_pages(int fd, void *mapping, const SparseRange *range)
{
    SparseRange rest = {
        .start = (uintptr_t)mapping + range->start,
        .end = (uintptr_t)mapping + range->end,
    };
    SparseRange populated;

    while (!sparse_range_is_empty(&rest)) {
        int ret = populated_memory_next(&rest, &populated);

        g_assert_cmpint(ret, ==, 0);
        rest.start = populated.end;
    }
}

static void punch(int fd, void *mapping, const SparseRange *range)
{
    g_assert_cmpint(sparse_file_punch(fd, range), ==, 0);
}

static const Bench benches[] = {
    { "look-up/hole", 0, look_up },
    { "look-up/data", 1, look_up },
    { "look-up/every-second-page", 2, look_up },
    { "page-tables/hole", 0, look_up_pages },
    { "page-tables/data", 1, look_up_pages },
    { "page-tables/every-second-page", 2, look_up_pages },
    { "punch/hole", 0, punch },
    { "punch/data", 1, punch },
};

static void test(const void *opaque)
{
    const Bench *bench = opaque;
    size_t page_size = qemu_real_host_page_size();
    int fd = qemu_memfd_create("bench", FILE_SIZE, false, 0, 0, NULL);
    void *mapping;

    if (fd < 0) {
        g_test_skip("no memfd");
        return;
    }
    mapping = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    g_assert(mapping != MAP_FAILED);
    for (uint64_t length = page_size; length <= FILE_SIZE; length *= 128) {
        SparseRange range = { 0, length };
        double total = 0.0, us;
        uint64_t runs = 0;

        do {
            /* Which is not measured: punching takes it away each time */
            populate(mapping, bench, length);
            g_test_timer_start();
            bench->run(fd, mapping, &range);
            total += g_test_timer_elapsed();
            runs++;
        } while (total < 0.2 && runs < 100000);
        us = total / runs * 1e6;
        g_test_message("%6" PRIu64 " pages %11.2f us %9.4f us/page",
                       length / page_size, us, us * page_size / length);
    }
    munmap(mapping, FILE_SIZE);
    close(fd);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < ARRAY_SIZE(benches); i++) {
        g_autofree char *path = g_strdup_printf("/sparse-file/%s",
                                                benches[i].name);

        g_test_add_data_func(path, &benches[i], test);
    }
    return g_test_run();
}
