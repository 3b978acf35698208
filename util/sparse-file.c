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

/* As much as is asked about page by page where the kernel cannot count pages */
#define PROBE_MAX (64 * MiB)

/*
 * Where the pages end that follow each other from @start on, all of which the
 * kernel has.  It is not after @limit, and nothing behind that is looked at:
 * lseek(SEEK_HOLE) alone would look at each page up to the next hole, which can
 * be all of the guest's, again for each packet of multifd.
 *
 * @start: in a page that the kernel has
 */
static int find_data_end(int fd, uint64_t start, uint64_t limit, uint64_t *end)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t step = page_size;
    off_t hole;

    *end = MIN(QEMU_ALIGN_DOWN(start, page_size) + page_size, limit);
    while (*end < limit) {
        uint64_t next = MIN(*end + step, limit);
        int64_t pages = count_pages(fd, *end, next);

        if (pages < 0) {
            /* Before Linux 6.5 */
            limit = MIN(limit, start + PROBE_MAX);
            while (*end < limit && lseek(fd, *end, SEEK_DATA) == *end) {
                *end = MIN(*end + page_size, limit);
            }
            return 0;
        }
        if (pages == 0) {
            return 0;
        }
        if (pages * page_size < next - *end) {
            /* There is a hole before @next, so this does not look far */
            hole = lseek(fd, *end, SEEK_HOLE);
            if (hole < 0) {
                return -errno;
            }
            *end = MIN(MAX(hole, *end), limit);
            return 0;
        }
        *end = next;
        step *= 4;
    }
    return 0;
}

/*
 * What lseek() calls data, and what it calls a hole in front of that.  Pages
 * that are called a hole may have data for a moment, see cut_hole().
 */
static int seek_data(int fd, const SparseRange *within, uint64_t data_max,
                     SparseRange *data)
{
    uint64_t limit = within->end;
    off_t start;
    int ret;

    *data = (SparseRange) { .start = within->end, .end = within->end };

    start = lseek(fd, within->start, SEEK_DATA);
    if (start < 0) {
        /* ENXIO: no data from here to the end of the file */
        return errno == ENXIO ? 0 : -errno;
    }
    if (start >= within->end) {
        return 0;
    }

    data->start = start;
    if (limit - start > data_max) {
        limit = start + data_max;
    }
    ret = find_data_end(fd, start, limit, &data->end);
    if (ret < 0) {
        *data = (SparseRange) { .start = within->end, .end = within->end };
        /*
         * ENXIO: the file lost this data, or its end, since the first call.
         * That is another way to say that there is a hole.
         */
        return ret == -ENXIO ? 0 : ret;
    }
    return 0;
}

/*
 * @hole is not all hole: find its first page.  Set @hole to what is in front,
 * and @data to pages from there on that are all populated.
 */
static void find_first_page(int fd, SparseRange *hole, SparseRange *data)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t low = hole->start, high = hole->end, end = hole->end;

    while (high - low > page_size) {
        uint64_t middle = QEMU_ALIGN_DOWN(low + (high - low) / 2, page_size);

        if (middle <= low) {
            break;
        }
        if (count_pages(fd, low, middle) == 0) {
            low = middle;
        } else {
            high = middle;
        }
    }
    hole->end = low;
    data->start = low;
    data->end = MIN(low + page_size, end);
    while (data->end < end) {
        uint64_t longer = MIN(low + 2 * (data->end - low), end);

        if (count_pages(fd, low, longer) * page_size != longer - low) {
            break;
        }
        data->end = longer;
    }
}

/* As much as is read at once where the kernel cannot count pages */
#define READ_MAX (2 * MiB)

/*
 * Cut @hole, which comes from lseek(), where it really ends; what follows then
 * goes into @data.
 *
 * lseek() takes a page that is not up to date for a hole, and does not wait for
 * the lock that whoever works on the page holds (Linux, folio_seek_hole_data()
 * in mm/filemap.c).  A populated page looks like that for a moment while it is
 * moved, by compaction or NUMA balancing: the new page is in the file before
 * its flags are (__migrate_folio() in mm/migrate.c).  And a page that has been
 * preallocated with fallocate() looks like that until it is accessed.
 */
static int cut_hole(int fd, SparseRange *hole, SparseRange *data)
{
    int64_t pages = count_pages(fd, hole->start, hole->end);
    int ret;

    if (pages == 0) {
        return 0;
    }
    if (pages > 0) {
        find_first_page(fd, hole, data);
        return 0;
    }

    /* Before Linux 6.5.  Reading waits for the lock of a page. */
    if (sparse_range_length(hole) > READ_MAX) {
        hole->end = hole->start + READ_MAX;
        *data = (SparseRange) { .start = hole->end, .end = hole->end };
    }
    ret = sparse_file_is_zero(fd, hole);
    if (ret == 0) {
        *data = *hole;
        hole->end = hole->start;
    }
    return MIN(ret, 0);
}

int sparse_file_next_data(int fd, const SparseRange *within,
                          uint64_t data_max, SparseRange *data)
{
    SparseRange hole = *within;
    int ret;

    if (sparse_range_is_empty(within)) {
        *data = *within;
        return 0;
    }
    ret = seek_data(fd, within, data_max, data);
    if (ret < 0) {
        return ret;
    }
    hole.end = data->start;
    return sparse_range_is_empty(&hole) ? 0 : cut_hole(fd, &hole, data);
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

int sparse_file_next_data(int fd, const SparseRange *within,
                          uint64_t data_max, SparseRange *data)
{
    return -ENOSYS;
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
