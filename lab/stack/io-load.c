/*
 * A load for a real guest, that notices when a disk or a directory is wrong
 *
 * For each file, a process writes and checks blocks at random, all the time.
 * What a block has to hold follows from its number and from how often it was
 * written, which the process remembers. Nothing is read from the cache, where
 * that can be had.
 *
 * Every second there is a line on standard output, which ends in "end":
 *   io: SECONDS s, NAME BLOCKS, NAME BLOCKS, end
 * with how many blocks were checked of each. What is wrong comes once a second:
 *   load: ERROR ...
 *
 * Usage: io-load NAME FILE [NAME FILE...]
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define BLOCK 65536
#define WORDS (BLOCK / sizeof(uint64_t))
#define BLOCKS 512
#define MAX_FILES 8

typedef struct Target {
    const char *name;
    const char *path;
    /* volatile: shared with the process that reports, which only reads them */
    volatile unsigned long checked;
    bool failed;
    char error[200];
} Target;

static void fill(uint64_t *words, uint64_t number, uint64_t version)
{
    uint64_t x = number << 32 | version;

    for (size_t i = 0; i < WORDS; i++) {
        x = x * 6364136223846793005ULL + 1442695040888963407ULL;
        words[i] = version ? x : 0;
    }
}

static bool fail(Target *target, const char *what, unsigned block)
{
    snprintf(target->error, sizeof(target->error), "%s: %s of block %u: %s",
             target->name, what, block, errno ? strerror(errno) : "wrong data");
    target->failed = true;
    return false;
}

static bool write_block(Target *target, int fd, unsigned block, uint64_t *words)
{
    errno = 0;
    if (pwrite(fd, words, BLOCK, (off_t)block * BLOCK) != BLOCK ||
        fdatasync(fd)) {
        return fail(target, "writing", block);
    }
    return true;
}

static bool check_block(Target *target, int fd, unsigned block,
                        uint64_t *buffer, const uint64_t *words)
{
    errno = 0;
    posix_fadvise(fd, (off_t)block * BLOCK, BLOCK, POSIX_FADV_DONTNEED);
    if (pread(fd, buffer, BLOCK, (off_t)block * BLOCK) != BLOCK) {
        return fail(target, "reading", block);
    }
    errno = 0;
    return !memcmp(buffer, words, BLOCK) || fail(target, "content", block);
}

static int open_target(Target *target)
{
    int fd = open(target->path, O_RDWR | O_CREAT | O_DIRECT, 0644);

    if (fd < 0 && errno == EINVAL) {
        fd = open(target->path, O_RDWR | O_CREAT, 0644);
    }
    if (fd < 0) {
        fail(target, "opening", 0);
    }
    return fd;
}

static void work(Target *target)
{
    static uint64_t version[BLOCKS];
    uint64_t *words = aligned_alloc(4096, BLOCK);
    uint64_t *buffer = aligned_alloc(4096, BLOCK);
    int fd = open_target(target);
    bool good = fd >= 0;

    for (unsigned i = 0; good && i < BLOCKS; i++) {
        fill(words, i, version[i] = 1);
        good = write_block(target, fd, i, words);
    }
    while (good) {
        unsigned block = random() % BLOCKS;

        fill(words, block, version[block]);
        good = check_block(target, fd, block, buffer, words);
        target->checked++;
        if (good && random() % 2) {
            fill(words, block, ++version[block]);
            good = write_block(target, fd, block, words);
        }
    }
    for (;;) {
        pause();
    }
}

static void report(unsigned seconds, Target *targets, int count)
{
    printf("io: %u s", seconds);
    for (int i = 0; i < count; i++) {
        printf(", %s %lu", targets[i].name, targets[i].checked);
    }
    printf(", end\n");
    for (int i = 0; i < count; i++) {
        if (targets[i].failed) {
            printf("load: ERROR %s\n", targets[i].error);
        }
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    int count = (argc - 1) / 2;
    Target *targets = mmap(NULL, sizeof(Target) * MAX_FILES,
                           PROT_READ | PROT_WRITE,
                           MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (argc < 3 || argc % 2 == 0 || count > MAX_FILES ||
        targets == MAP_FAILED) {
        fprintf(stderr, "usage: io-load NAME FILE [NAME FILE...]\n");
        return 2;
    }
    for (int i = 0; i < count; i++) {
        targets[i].name = argv[1 + 2 * i];
        targets[i].path = argv[2 + 2 * i];
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            srandom(i);
            work(&targets[i]);
        }
    }
    for (unsigned seconds = 0; ; seconds++) {
        report(seconds, targets, count);
        sleep(1);
    }
}
