/*
 * Fail system calls of a QEMU on purpose: a library for LD_PRELOAD
 *
 * Calls that are about guest RAM fail with the errno that somebody else wants,
 * from the Nth on, a number of times, for ever, or at random.  Who wants that
 * says so in a file that is mapped here, and that can be changed while QEMU
 * runs; it also counts the calls (lab/faults/failcalls.py).
 *
 *   FAIL_CALLS=FILE         the file: a struct Control
 *   FAIL_CALLS_MMAP=ERRNO   no file can be mapped shared, so that the RAM of
 *                           memory-backend-ram,share=on has no file
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>

#define MAGIC 0x6661696c
#define RULES 8

/* Linux 6.5, and the same number on all but the oldest architectures */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

/* Linux 6.7: the ioctl PAGEMAP_SCAN, whose argument has 12 words of 64 bits */
#define PAGEMAP_SCAN_REQUEST _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 12 * 8)

/* In the order of CALLS in failcalls.py */
enum Call {
    CALL_LSEEK,
    CALL_FALLOCATE,
    CALL_FSTAT,
    CALL_CACHESTAT,
    CALL_PREAD,
    CALL_MADVISE,
    CALL_MINCORE,
    CALL_PAGEMAP_OPEN,
    CALL_PAGEMAP_SCAN,
    CALL_PAGEMAP_READ,
    CALL_UFFD_COPY,
};

/* Which calls fail, and how; call is an enum Call, or -1 if there is no rule */
struct Rule {
    int32_t call;
    int32_t error;
    /* The first call that fails, from 0 on, and how many do; 0: all of them */
    uint64_t first;
    uint64_t count;
    /* Which of these fail: chance in 2^32, by seed; UINT32_MAX: all of them */
    uint32_t chance;
    uint32_t seed;
    /* How many calls there were, and how many of them have failed */
    uint64_t seen;
    uint64_t failed;
};

/* What the file has.  Nothing fails until armed is not 0. */
struct Control {
    uint32_t magic;
    uint32_t armed;
    /* The file that is guest RAM; 0 if there is none */
    uint64_t device;
    uint64_t inode;
    struct Rule rules[RULES];
};

static struct Control *control;
static int mmap_error;

static int (*real_open64)(const char *, int, ...);
static off64_t (*real_lseek64)(int, off64_t, int);
static int (*real_fallocate64)(int, int, off64_t, off64_t);
static int (*real_fstat64)(int, struct stat64 *);
static ssize_t (*real_pread64)(int, void *, size_t, off64_t);
static int (*real_madvise)(void *, size_t, int);
static int (*real_mincore)(void *, size_t, unsigned char *);
static int (*real_ioctl)(int, unsigned long, ...);
static long (*real_syscall)(long, ...);
static void *(*real_mmap64)(void *, size_t, int, int, int, off64_t);

static void *find(const char *name)
{
    void *symbol = dlsym(RTLD_NEXT, name);

    if (!symbol) {
        fprintf(stderr, "fail-calls: there is no %s()\n", name);
        abort();
    }
    return symbol;
}

/* Constructors of libraries may come before ours: libnuma's opens a file. */
#define REAL(name) ({                       \
    if (!real_##name) {                     \
        real_##name = find(#name);          \
    }                                       \
    real_##name; })

static struct Control *map_control(const char *path)
{
    int fd = REAL(open64)(path, O_RDWR | O_CLOEXEC);
    void *p = MAP_FAILED;

    if (fd >= 0) {
        p = mmap(NULL, sizeof(struct Control), PROT_READ | PROT_WRITE,
                 MAP_SHARED, fd, 0);
        close(fd);
    }
    if (p == MAP_FAILED || ((struct Control *)p)->magic != MAGIC) {
        fprintf(stderr, "fail-calls: FAIL_CALLS=%s is not to be had, or is "
                "not what failcalls.py has written\n", path);
        abort();
    }
    return p;
}

static void __attribute__((constructor)) set_up(void)
{
    const char *path = getenv("FAIL_CALLS");
    const char *error = getenv("FAIL_CALLS_MMAP");

    mmap_error = error ? atoi(error) : 0;
    control = path ? map_control(path) : NULL;
}

static bool armed(void)
{
    return control && __atomic_load_n(&control->armed, __ATOMIC_ACQUIRE);
}

/* Evenly distributed, and the same for each seed and number (splitmix64) */
static uint32_t dice(uint32_t seed, uint64_t number)
{
    uint64_t x = (((uint64_t)seed << 32) ^ number) + 0x9e3779b97f4a7c15;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return (x ^ (x >> 31)) >> 32;
}

static bool rule_applies(struct Rule *rule)
{
    uint64_t number = __atomic_fetch_add(&rule->seen, 1, __ATOMIC_RELAXED);

    if (number < rule->first ||
        (rule->count && number - rule->first >= rule->count)) {
        return false;
    }
    return rule->chance == UINT32_MAX ||
           dice(rule->seed, number) < rule->chance;
}

/* Whether this call, which has to be of the kind, fails; sets errno if so */
static bool fails(enum Call call)
{
    for (int i = 0; i < RULES; i++) {
        struct Rule *rule = &control->rules[i];

        if (rule->call == (int)call && rule_applies(rule)) {
            __atomic_fetch_add(&rule->failed, 1, __ATOMIC_RELAXED);
            errno = rule->error;
            return true;
        }
    }
    return false;
}

static bool is_ram(int fd)
{
    struct stat64 st;
    int saved = errno;
    bool same = REAL(fstat64)(fd, &st) == 0 && control->inode &&
                st.st_dev == control->device && st.st_ino == control->inode;

    errno = saved;
    return same;
}

static bool is_pagemap(const char *path)
{
    const char *name = strrchr(path, '/');

    return name && strcmp(name, "/pagemap") == 0;
}

static bool is_pagemap_fd(int fd)
{
    char link[32], path[64];
    int saved = errno;
    ssize_t length;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof(path) - 1);
    errno = saved;
    if (length < 0) {
        return false;
    }
    path[length] = 0;
    return is_pagemap(path);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    if ((whence == SEEK_DATA || whence == SEEK_HOLE) && armed() &&
        is_ram(fd) && fails(CALL_LSEEK)) {
        return -1;
    }
    return REAL(lseek64)(fd, offset, whence);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    if ((mode & FALLOC_FL_PUNCH_HOLE) && armed() && is_ram(fd) &&
        fails(CALL_FALLOCATE)) {
        return -1;
    }
    return REAL(fallocate64)(fd, mode, offset, length);
}

int fstat64(int fd, struct stat64 *st)
{
    if (armed() && is_ram(fd) && fails(CALL_FSTAT)) {
        return -1;
    }
    return REAL(fstat64)(fd, st);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset)
{
    if (armed()) {
        if (is_ram(fd) ? fails(CALL_PREAD)
                       : is_pagemap_fd(fd) && fails(CALL_PAGEMAP_READ)) {
            return -1;
        }
    }
    return REAL(pread64)(fd, buffer, size, offset);
}

/* What pread() of a program that is compiled with _FORTIFY_SOURCE calls */
ssize_t __pread64_chk(int fd, void *buffer, size_t size, off64_t offset,
                      size_t buffer_size)
{
    if (size > buffer_size) {
        abort();
    }
    return pread64(fd, buffer, size, offset);
}

int madvise(void *address, size_t length, int advice)
{
    if (advice == MADV_REMOVE && armed() && fails(CALL_MADVISE)) {
        return -1;
    }
    return REAL(madvise)(address, length, advice);
}

int mincore(void *address, size_t length, unsigned char *vector)
{
    if (armed() && fails(CALL_MINCORE)) {
        return -1;
    }
    return REAL(mincore)(address, length, vector);
}

int ioctl(int fd, unsigned long request, ...)
{
    void *argument;
    va_list arguments;

    va_start(arguments, request);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PAGEMAP_SCAN_REQUEST && armed() &&
        fails(CALL_PAGEMAP_SCAN)) {
        return -1;
    }
    if (request == UFFDIO_COPY && armed() && fails(CALL_UFFD_COPY)) {
        ((struct uffdio_copy *)argument)->copy = -errno;
        return -1;
    }
    return REAL(ioctl)(fd, request, argument);
}

long syscall(long number, ...)
{
    long argument[6];
    va_list arguments;

    va_start(arguments, number);
    for (int i = 0; i < 6; i++) {
        argument[i] = va_arg(arguments, long);
    }
    va_end(arguments);
    if (number == SYS_cachestat && armed() && is_ram(argument[0]) &&
        fails(CALL_CACHESTAT)) {
        return -1;
    }
    return REAL(syscall)(number, argument[0], argument[1], argument[2],
                        argument[3], argument[4], argument[5]);
}

static int open_pagemap(const char *path, int flags, mode_t mode)
{
    if (is_pagemap(path) && armed() && fails(CALL_PAGEMAP_OPEN)) {
        return -1;
    }
    return REAL(open64)(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    mode_t mode = 0;
    va_list arguments;

    if (flags & (O_CREAT | O_TMPFILE)) {
        va_start(arguments, flags);
        mode = va_arg(arguments, mode_t);
        va_end(arguments);
    }
    return open_pagemap(path, flags, mode);
}

/* The same for a program that is compiled with _FORTIFY_SOURCE */
int __open64_2(const char *path, int flags)
{
    return open_pagemap(path, flags, 0);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd,
             off64_t offset)
{
    if (mmap_error && fd >= 0 && (flags & MAP_SHARED) &&
        (protection & PROT_WRITE)) {
        errno = mmap_error;
        return MAP_FAILED;
    }
    return REAL(mmap64)(address, length, protection, flags, fd, offset);
}
