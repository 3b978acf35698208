/*
 * Sparse files: where the holes are, and how to make them
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/host-utils.h"
#include "qemu/sparse-file.h"
#include "qemu/units.h"

#ifdef CONFIG_LINUX
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <linux/falloc.h>
#endif

bool sparse_range_overlaps(const SparseRange *a, const SparseRange *b)
{
    return MAX(a->start, b->start) < MIN(a->end, b->end);
}

bool sparse_range_gather(SparseRange *range, uint64_t start, uint64_t length)
{
    uint64_t end = start + length;

    if (!length) {
        return true;
    }
    if (end < start) {
        return false;
    }
    if (sparse_range_is_empty(range)) {
        *range = (SparseRange) { .start = start, .end = end };
        return true;
    }
    if (start > range->end || end < range->start) {
        return false;
    }
    range->start = MIN(range->start, start);
    range->end = MAX(range->end, end);
    return true;
}

void sparse_range_split(const SparseRange *range, uint64_t unit,
                        SparseRange *head, SparseRange *body,
                        SparseRange *tail)
{
    uint64_t mask = unit - 1;
    uint64_t last = range->end & ~mask;
    uint64_t first = range->start & ~mask;

    assert(is_power_of_2(unit));

    if (first != range->start) {
        first += unit;
    }
    /* first is 0 if rounding up went past the end of the 64-bit space */
    if (first < range->start || first >= last) {
        first = last = range->end;
    }

    *head = (SparseRange) { .start = range->start, .end = first };
    *body = (SparseRange) { .start = first, .end = last };
    *tail = (SparseRange) { .start = last, .end = range->end };
}

#ifdef CONFIG_LINUX

#define SYSFS_THP "/sys/kernel/mm/transparent_hugepage/"

int sparse_file_is_zero(int fd, const SparseRange *range)
{
    uint8_t buf[16 * KiB];
    uint64_t offset = range->start;

    while (offset < range->end) {
        size_t size = MIN(sizeof(buf), range->end - offset);
        ssize_t len = RETRY_ON_EINTR(pread(fd, buf, size, offset));

        if (len < 0) {
            return -errno;
        }
        if (len == 0) {
            break;
        }
        if (!buffer_is_zero(buf, len)) {
            return 0;
        }
        offset += len;
    }
    return 1;
}

/*
 * Linux 6.5, include/uapi/linux/mman.h; not in the headers of older systems.
 * The number is not the same everywhere, on MIPS and Alpha for example.
 */
#if !defined(SYS_cachestat) && \
    (defined(HOST_X86_64) || defined(HOST_AARCH64) || defined(HOST_PPC64) || \
     defined(HOST_S390X))
#define SYS_cachestat 451
#endif

/*
 * How many pages of a part of a file the kernel has, in memory or swapped out,
 * whatever their state.  Less than 0 if it cannot tell.
 */
static int64_t count_pages(int fd, uint64_t start, uint64_t end)
{
#ifdef SYS_cachestat
    struct {
        uint64_t off;
        uint64_t len;
    } range = { start, end - start };
    struct {
        uint64_t nr_cache;
        uint64_t nr_dirty;
        uint64_t nr_writeback;
        uint64_t nr_evicted;
        uint64_t nr_recently_evicted;
    } stat;

    /* A length of 0 would mean the rest of the file */
    assert(start < end);
    if (syscall(SYS_cachestat, fd, &range, &stat, 0) < 0) {
        return -errno;
    }
    return stat.nr_cache + stat.nr_evicted;
#else
    return -ENOSYS;
#endif
}

/*
 * Whether all of a part of a file is a hole, or all of it is data; 0 or 1, or
 * a negative errno value if the kernel does not count pages.
 *
 * cachestat() can miscount a range with large folios (Linux 6.18, a pause of
 * the walk in the middle of a folio).  That there is nothing at all is
 * reliable; a hole that passes for data is read, which is a waste, no more.
 */
static int is_uniform(int fd, uint64_t start, uint64_t end, bool hole)
{
    int64_t pages = count_pages(fd, start, end);

    if (pages < 0) {
        return pages;
    }
    return hole ? pages == 0
                : pages >= DIV_ROUND_UP(end - start,
                                        qemu_real_host_page_size());
}

/*
 * How much is looked at as a whole first: a packet of multifd.  Counting that
 * many pages takes some microseconds.
 */
#define WHOLE_MAX (512 * KiB)

/*
 * The extent at @within->start, by counting pages: larger and larger parts, as
 * long as they are the same, and then a bisection.  So the work is bounded by
 * the length of the extent, wherever @within ends.  lseek() alone would go on
 * to the next page that is up to date, or to the next hole, which can be at
 * the end of the file; and it takes a page that is being moved for a hole.
 */
static int next_extent_counted(int fd, const SparseRange *within,
                               uint64_t *end)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t step = page_size;
    uint64_t low = MIN(QEMU_ALIGN_DOWN(within->start, page_size) + page_size,
                       within->end);
    uint64_t high = low;
    int hole;

    /* Most short questions are about zero pages that arrive for a hole */
    if (sparse_range_length(within) <= WHOLE_MAX) {
        hole = is_uniform(fd, within->start, within->end, true);
        if (hole) {
            *end = within->end;
            return MIN(hole, 0);
        }
    }
    hole = is_uniform(fd, within->start, low, true);
    if (hole < 0) {
        return hole;
    }
    while (low < within->end) {
        high = MIN(low + step, within->end);
        if (is_uniform(fd, low, high, hole) != 1) {
            break;
        }
        low = high;
        step *= 4;
    }
    while (high - low > page_size) {
        /* The last page of the part need not be a whole one */
        uint64_t middle = low + MAX(QEMU_ALIGN_DOWN((high - low) / 2, page_size),
                                    page_size);

        if (is_uniform(fd, low, middle, hole) == 1) {
            low = middle;
        } else {
            high = middle;
        }
    }
    *end = low;
    return !hole;
}

/*
 * How much is looked at in one go where the kernel cannot count pages.  No answer
 * ends in the middle of a transparent huge page.
 */
#define SEEK_MAX (2 * MiB)

/*
 * The same before Linux 6.5.
 *
 * lseek() takes a page that is not up to date for a hole, and does not wait for
 * the lock that whoever works on the page holds (Linux, folio_seek_hole_data()
 * in mm/filemap.c).  A populated page looks like that for a moment while it is
 * moved, by compaction or NUMA balancing: the new page is in the file before
 * its flags are (__migrate_folio() in mm/migrate.c).  Reading waits for the
 * lock, so read what is called a hole.
 */
static int next_extent_seek(int fd, const SparseRange *within, uint64_t *end)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t limit = MIN(within->end, QEMU_ALIGN_DOWN(within->start, SEEK_MAX) +
                                      SEEK_MAX);
    SparseRange hole = { .start = within->start };
    off_t data = lseek(fd, within->start, SEEK_DATA);
    int ret;

    if (data < 0 && errno != ENXIO) {
        return -errno;
    }
    if (data == within->start) {
        *end = QEMU_ALIGN_DOWN(within->start, page_size) + page_size;
        while (*end < limit && lseek(fd, *end, SEEK_DATA) == *end) {
            *end += page_size;
        }
        *end = MIN(*end, limit);
        return 1;
    }
    /* ENXIO: no data from here to the end of the file */
    hole.end = data > hole.start ? MIN(data, limit) : limit;
    ret = sparse_file_is_zero(fd, &hole);
    if (ret < 0) {
        return ret;
    }
    *end = hole.end;
    return !ret;
}

int sparse_file_next_extent(int fd, const SparseRange *within, uint64_t *end)
{
    int ret;

    if (sparse_range_is_empty(within)) {
        *end = within->end;
        return 1;
    }
    ret = next_extent_counted(fd, within, end);
    return ret < 0 ? next_extent_seek(fd, within, end) : ret;
}

bool sparse_file_is_regular(int fd)
{
    struct stat st;

    return fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

int64_t sparse_file_allocated(int fd)
{
    struct stat st;

    return fstat(fd, &st) < 0 ? -errno : st.st_blocks * 512LL;
}

bool sparse_file_is_full(int fd)
{
    struct stat st;

    return fstat(fd, &st) == 0 && st.st_blocks * 512LL >= st.st_size;
}

int sparse_file_punch(int fd, const SparseRange *range)
{
    if (sparse_range_is_empty(range)) {
        return 0;
    }
    if (RETRY_ON_EINTR(fallocate(fd, FALLOC_FL_PUNCH_HOLE |
                                 FALLOC_FL_KEEP_SIZE, range->start,
                                 sparse_range_length(range))) < 0) {
        return -errno;
    }
    return 0;
}

/*
 * The chosen word of a sysfs file like "always [madvise] never", or the whole
 * line of a file with a single value.  NULL if there is no such file.
 */
static char *sysfs_choice(const char *path)
{
    g_autofree char *text = NULL;
    char *open, *close;

    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return NULL;
    }
    open = strchr(text, '[');
    close = open ? strchr(open, ']') : NULL;
    if (close) {
        return g_strndup(open + 1, close - open - 1);
    }
    return g_strdup(g_strstrip(text));
}

/*
 * The value of huge= of the mounted tmpfs with device number @dev; "never" if
 * it has no such option, and NULL if nothing with that number is mounted: then
 * it is the kernel's own mount, on which memfds are.
 */
static char *tmpfs_huge_option(dev_t dev)
{
    g_autofree char *text = NULL;
    g_autofree char *number = g_strdup_printf("%u:%u", major(dev), minor(dev));
    g_auto(GStrv) lines = NULL;

    if (!g_file_get_contents("/proc/self/mountinfo", &text, NULL, NULL)) {
        return NULL;
    }
    lines = g_strsplit(text, "\n", -1);

    for (int i = 0; lines[i]; i++) {
        g_auto(GStrv) fields = g_strsplit(lines[i], " ", -1);
        const char *options;

        if (g_strv_length(fields) < 3 || !g_str_equal(fields[2], number)) {
            continue;
        }
        /* The options of the file system are the last field (proc(5)). */
        options = strrchr(lines[i], ' ');
        options = strstr(options, "huge=");
        if (!options) {
            return g_strdup("never");
        }
        options += strlen("huge=");
        return g_strndup(options, strcspn(options, ","));
    }
    return NULL;
}

/* Whether a word from sysfs or from the mount options allows huge pages */
static bool huge_allowed(const char *word)
{
    return word && !g_str_equal(word, "never") && !g_str_equal(word, "deny") &&
           !g_str_equal(word, "inherit");
}

uint64_t sparse_file_thp_size(int fd)
{
    g_autofree char *size = sysfs_choice(SYSFS_THP "hpage_pmd_size");
    g_autofree char *global = sysfs_choice(SYSFS_THP "shmem_enabled");
    g_autofree char *path = NULL;
    g_autofree char *of_size = NULL;
    g_autofree char *mount = NULL;
    uint64_t bytes = size ? g_ascii_strtoull(size, NULL, 10) : 0;
    struct stat st;

    if (!is_power_of_2(bytes) || !global || g_str_equal(global, "deny") ||
        fstat(fd, &st) < 0) {
        return 0;
    }
    if (g_str_equal(global, "force")) {
        return bytes;
    }
    mount = tmpfs_huge_option(st.st_dev);
    if (mount) {
        return huge_allowed(mount) ? bytes : 0;
    }
    /* Since Linux 6.11 each size can be switched on by itself */
    path = g_strdup_printf(SYSFS_THP "hugepages-%" PRIu64 "kB/shmem_enabled",
                           (uint64_t)(bytes / KiB));
    of_size = sysfs_choice(path);
    return huge_allowed(global) || huge_allowed(of_size) ? bytes : 0;
}

#else /* !CONFIG_LINUX */

bool sparse_file_is_regular(int fd)
{
    return false;
}

int sparse_file_next_extent(int fd, const SparseRange *within, uint64_t *end)
{
    return -ENOSYS;
}

int64_t sparse_file_allocated(int fd)
{
    return -ENOSYS;
}

bool sparse_file_is_full(int fd)
{
    return true;
}

int sparse_file_is_zero(int fd, const SparseRange *range)
{
    return -ENOSYS;
}

int sparse_file_punch(int fd, const SparseRange *range)
{
    return -ENOSYS;
}

uint64_t sparse_file_thp_size(int fd)
{
    return 0;
}

#endif /* CONFIG_LINUX */
