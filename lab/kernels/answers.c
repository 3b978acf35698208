/*
 * Say what this kernel answers to the questions that sparse guest RAM has
 *
 * One line for each: "answer: NAME yes", or no and the error.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE (4 * 1024 * 1024)

/* Neither is in the headers of all distributions */
#define CACHESTAT 451

typedef struct Range {
    uint64_t offset, length;
} Range;

typedef struct ScanArg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, mask, anyof, returned;
} ScanArg;

#define SCAN _IOWR('f', 16, ScanArg)
#define PAGE_IS_PRESENT (1 << 3)

static void answer(const char *name, bool yes)
{
    printf("answer: %s %s%s\n", name, yes ? "yes" : "no, ",
           yes ? "" : errno ? strerror(errno) : "wrong");
}

static void ask_file(int fd)
{
    uint64_t stat[5] = { 0 };
    Range range = { 0, SIZE };

    errno = 0;
    answer("cachestat", !syscall(CACHESTAT, fd, &range, stat, 0) &&
           stat[0] == 1);
    errno = 0;
    answer("SEEK_DATA", lseek(fd, 0, SEEK_DATA) == SIZE / 2);
}

static void ask_pagemap(void *memory)
{
    uint64_t regions[3];
    ScanArg arg = {
        .size = sizeof(arg), .start = (uintptr_t)memory,
        .end = (uintptr_t)memory + SIZE, .vec = (uintptr_t)regions,
        .vec_len = 1, .mask = PAGE_IS_PRESENT, .returned = PAGE_IS_PRESENT,
    };
    int fd = open("/proc/self/pagemap", O_RDONLY);

    errno = 0;
    answer("PAGEMAP_SCAN", ioctl(fd, SCAN, &arg) == 1);
    close(fd);
}

static void ask_userfaultfd(void)
{
    struct uffdio_api api = { .api = UFFD_API };
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    errno = 0;
    answer("userfaultfd of shared memory", !ioctl(fd, UFFDIO_API, &api) &&
           api.features & UFFD_FEATURE_MISSING_SHMEM);
    close(fd);
}

int main(void)
{
    int fd = memfd_create("answers", 0);
    char *memory;

    if (fd < 0 || ftruncate(fd, SIZE)) {
        perror("memfd");
        return 1;
    }
    memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    memory[SIZE / 2] = 1;
    ask_file(fd);
    ask_pagemap(memory);
    ask_userfaultfd();
    return 0;
}
