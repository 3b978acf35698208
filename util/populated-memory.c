/*
 * Populated memory: which pages of a mapping the page tables know
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/cutils.h"
#include "qemu/populated-memory.h"

#ifdef CONFIG_LINUX

#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/*
 * Linux 6.7, include/uapi/linux/fs.h; not in the headers of older systems, and
 * under names of our own where it is.
 */
typedef struct PagemapRegion {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
} PagemapRegion;

typedef struct PagemapScan {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
} PagemapScan;

#define PAGEMAP_SCAN_IOCTL      _IOWR('f', 16, PagemapScan)
#define PAGEMAP_IS_PRESENT      (1ULL << 3)
#define PAGEMAP_IS_SWAPPED      (1ULL << 4)

/* Linux, Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_ENTRY_PRESENT   (1ULL << 63)
#define PAGEMAP_ENTRY_SWAPPED   (1ULL << 62)

/*
 * As many entries of pagemap as are read at once, at first and at most: the
 * answer often is in the first few.
 */
#define PAGEMAP_READ_MIN        16
#define PAGEMAP_READ_MAX        512

/*
 * An entry of the page tables that is not a page in memory is "swapped": one
 * that is in the swap, but also one that is being moved at the moment.  The
 * kernel looks with the lock of the page table held (pagemap_scan_pmd_entry()
 * and pagemap_pmd_range() in fs/proc/task_mmu.c), so it sees one or the other.
 */

static int pagemap_scan(int fd, const SparseRange *within, uint64_t categories,
                        SparseRange *populated)
{
    PagemapRegion region;
    PagemapScan scan = {
        .size = sizeof(scan),
        .start = within->start,
        .end = within->end,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_anyof_mask = categories,
    };
    int ret = RETRY_ON_EINTR(ioctl(fd, PAGEMAP_SCAN_IOCTL, &scan));

    if (ret < 0) {
        return -errno;
    }
    if (ret == 0 && scan.walk_end < within->end) {
        /* It has not looked at everything, and nothing says that it may not */
        return -EIO;
    }
    *populated = (SparseRange) { .start = within->end, .end = within->end };
    if (ret > 0) {
        *populated = (SparseRange) {
            .start = region.start,
            .end = region.end,
        };
    }
    return 0;
}

int pagemap_scan_next(int fd, const SparseRange *within,
                      SparseRange *populated)
{
    return pagemap_scan(fd, within, PAGEMAP_IS_PRESENT | PAGEMAP_IS_SWAPPED,
                        populated);
}

int pagemap_read_next(int fd, const SparseRange *within,
                      SparseRange *populated)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t entries[PAGEMAP_READ_MAX];
    uint64_t page = within->start / page_size;
    uint64_t end = within->end / page_size;
    uint64_t count = PAGEMAP_READ_MIN;
    SparseRange found = { };

    while (page < end) {
        size_t size = MIN(end - page, count) * sizeof(uint64_t);
        ssize_t len = RETRY_ON_EINTR(pread(fd, entries, size,
                                           page * sizeof(uint64_t)));

        if (len < 0) {
            return -errno;
        }
        count = MIN(count * 4, PAGEMAP_READ_MAX);
        if (len < sizeof(uint64_t)) {
            /* Not an address that this process can have */
            return -EFAULT;
        }
        for (int i = 0; i < len / sizeof(uint64_t); i++, page++) {
            bool there = entries[i] & (PAGEMAP_ENTRY_PRESENT |
                                       PAGEMAP_ENTRY_SWAPPED);

            if (there) {
                sparse_range_gather(&found, page * page_size, page_size);
            } else if (!sparse_range_is_empty(&found)) {
                *populated = found;
                return 0;
            }
        }
    }
    if (sparse_range_is_empty(&found)) {
        found = (SparseRange) { .start = within->end, .end = within->end };
    }
    *populated = found;
    return 0;
}

/* The file descriptor, or a negative errno value if it cannot be opened */
#define PAGEMAP_NOT_OPENED (-ENODATA)
static int pagemap_fd = PAGEMAP_NOT_OPENED;

/* The file that a child process inherits is about its parent. */
static void pagemap_forget(void)
{
    if (pagemap_fd >= 0) {
        close(pagemap_fd);
    }
    pagemap_fd = PAGEMAP_NOT_OPENED;
}

/* Returns the file descriptor, or a negative errno value */
static int pagemap_open(void)
{
    static gsize atfork;
    int fd = qatomic_read(&pagemap_fd), other;

    if (fd != PAGEMAP_NOT_OPENED) {
        return fd;
    }
    if (g_once_init_enter(&atfork)) {
        pthread_atfork(NULL, NULL, pagemap_forget);
        g_once_init_leave(&atfork, 1);
    }
    /* Once: that it is refused may be written to a log each time (AppArmor) */
    fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        fd = -errno;
    }
    other = qatomic_cmpxchg(&pagemap_fd, PAGEMAP_NOT_OPENED, fd);
    if (other != PAGEMAP_NOT_OPENED) {
        if (fd >= 0) {
            close(fd);
        }
        fd = other;
    }
    return fd;
}

int populated_memory_next(const SparseRange *within, SparseRange *populated)
{
    uint64_t page_size = qemu_real_host_page_size();
    SparseRange pages = {
        .start = QEMU_ALIGN_DOWN(within->start, page_size),
        .end = QEMU_ALIGN_UP(within->end, page_size),
    };
    int fd, ret;

    if (sparse_range_is_empty(within)) {
        *populated = (SparseRange) { .start = within->end, .end = within->end };
        return 0;
    }
    fd = pagemap_open();
    if (fd < 0) {
        return fd;
    }
    ret = pagemap_scan_next(fd, &pages, populated);
    if (ret < 0) {
        /* Before Linux 6.7, or something that later kernels do not like */
        ret = pagemap_read_next(fd, &pages, populated);
    }
    if (ret < 0) {
        return ret;
    }
    populated->start = MIN(MAX(populated->start, within->start), within->end);
    populated->end = MIN(populated->end, within->end);
    return 0;
}

bool populated_huge_page(void *host)
{
    unsigned char resident;

    /*
     * For hugetlbfs, mincore() looks at the page tables and no further (Linux,
     * mincore_hugetlb() in mm/mincore.c).
     */
    return mincore(host, qemu_real_host_page_size(), &resident) == 0 &&
           (resident & 1);
}

void populated_huge_pages_next(const SparseRange *within, uint64_t page_size,
                               SparseRange *populated)
{
    int fd = pagemap_open();
    uint64_t next = within->start;

    /*
     * Not what is "swapped": a hole of which userfaultfd remembers that it is
     * write-protected looks like that.  Huge pages are never swapped out.
     */
    if (fd >= 0 &&
        pagemap_scan(fd, within, PAGEMAP_IS_PRESENT, populated) == 0) {
        return;
    }
    /* Before Linux 6.7, or without /proc */
    while (next < within->end &&
           !populated_huge_page((void *)(uintptr_t)next)) {
        next += page_size;
    }
    populated->start = next;
    while (next < within->end && populated_huge_page((void *)(uintptr_t)next)) {
        next += page_size;
    }
    populated->end = next;
}

#else /* !CONFIG_LINUX */

bool populated_huge_page(void *host)
{
    return true;
}

void populated_huge_pages_next(const SparseRange *within, uint64_t page_size,
                               SparseRange *populated)
{
    *populated = *within;
}

int pagemap_scan_next(int fd, const SparseRange *within,
                      SparseRange *populated)
{
    return -ENOSYS;
}

int pagemap_read_next(int fd, const SparseRange *within,
                      SparseRange *populated)
{
    return -ENOSYS;
}

int populated_memory_next(const SparseRange *within, SparseRange *populated)
{
    return -ENOSYS;
}

#endif /* CONFIG_LINUX */
