/*
 * Sparse files: where the holes are, and how to make them
 *
 * Memory that is a shared mapping of a file on tmpfs (memfd, /dev/shm) or
 * hugetlbfs is allocated by *looking* at it: a read fault on a hole allocates
 * a page, because a shared mapping has no zero page.  The functions here ask
 * the file instead of the mapping, so that nothing gets allocated.
 *
 * What can be asked depends on the file system, which qemu_fd_getfs() tells:
 *
 * - tmpfs: the kernel tells extents with page granularity.
 * - hugetlbfs: lseek() says that the whole file is data, but a read() of a hole
 *   returns zeroes and allocates nothing.
 * - Everything else: nothing.  Where data is written back to a disk, or to
 *   persistent memory, what lseek() says depends on what has been written back.
 *
 * The functions know nothing about guests or migration.  All offsets and
 * lengths are in bytes, offsets count from the start of the file, and no
 * function here reads or writes through a mapping.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_SPARSE_FILE_H
#define QEMU_SPARSE_FILE_H

/**
 * SparseRange: the bytes from @start up to, but without, @end
 *
 * The range is empty if @start == @end; the all-zero initializer is an empty
 * range.  Half-open, unlike Range, because that is what lseek() and
 * fallocate() work with and because an empty range has to be appendable.
 */
typedef struct SparseRange {
    uint64_t start;
    uint64_t end;
} SparseRange;

static inline uint64_t sparse_range_length(const SparseRange *range)
{
    return range->end - range->start;
}

static inline bool sparse_range_is_empty(const SparseRange *range)
{
    return range->start == range->end;
}

/**
 * sparse_range_overlaps: whether two ranges have a byte in common
 *
 * An empty range overlaps nothing.
 */
bool sparse_range_overlaps(const SparseRange *a, const SparseRange *b);

/**
 * sparse_range_gather: make a range larger by a piece that touches it
 *
 * @range: what has been gathered so far, may be empty
 * @start: first byte of the piece
 * @length: length of the piece; 0 changes nothing
 *
 * The piece may be in front of, behind, or overlap @range; the result never
 * covers a byte that was in neither of the two.
 *
 * Returns true if @range includes the piece now; false, with @range as it
 * was, if there is a gap between the two or if the piece wraps around the end
 * of the 64-bit space.
 */
bool sparse_range_gather(SparseRange *range, uint64_t start, uint64_t length);

/**
 * sparse_range_split: cut a range at the boundaries of larger units
 *
 * @range: the range to cut
 * @unit: size of a unit, a power of two
 * @head: set to the part in front of the first whole unit
 * @body: set to the whole units
 * @tail: set to the part behind the last whole unit
 *
 * The parts follow each other without a gap, together they are @range, and
 * each may be empty.  A range that lies within one unit is all @head.
 */
void sparse_range_split(const SparseRange *range, uint64_t unit,
                        SparseRange *head, SparseRange *body,
                        SparseRange *tail);

/**
 * sparse_file_is_regular: whether @fd can have holes at all
 *
 * @fd: an open file, or -1
 *
 * Devices cannot, whatever the file system of their node is: of a node in /dev,
 * statfs() says that it is on tmpfs.
 */
bool sparse_file_is_regular(int fd);

/**
 * sparse_file_next_extent: whether a part of a file begins with data, and for
 *                          how long
 *
 * @fd: a file on tmpfs
 * @within: the part to look at
 * @end: set to the end of the extent that begins at @within->start, in bytes;
 *       it is behind @within->start unless @within is empty, and not behind
 *       @within->end.  What follows there can be of the same kind.
 *
 * All of a hole was a hole, and read as zero, when the function was called.
 * Pages that have been swapped out, or that were allocated in advance, are
 * data, and no page with data is ever missed; but what is called data may still
 * be a hole or zero.  Takes time in proportion to the extent, not to @within.
 * The position of @fd, which nothing in QEMU uses for such files, may change.
 *
 * Returns 1 for data, 0 for a hole, or a negative errno value if the kernel
 * refuses to tell.
 */
int sparse_file_next_extent(int fd, const SparseRange *within, uint64_t *end);

/**
 * sparse_file_allocated: how much memory or disk space a file occupies
 *
 * @fd: an open file
 *
 * Returns a number of bytes, or a negative errno value.
 */
int64_t sparse_file_allocated(int fd);

/**
 * sparse_file_is_full: whether a file has no holes, at a glance
 *
 * @fd: an open file on tmpfs
 *
 * Returns true if as much is allocated as the file is long.
 */
bool sparse_file_is_full(int fd);

/**
 * sparse_file_is_zero: whether a part of a file reads as zero
 *
 * @fd: a readable file on tmpfs or hugetlbfs
 * @range: the part to look at; what is behind the end of the file is zero
 *
 * Reads the file and not the mapping: a hole stays a hole.
 *
 * Returns 1 if all bytes are zero, 0 if not, or a negative errno value.
 */
int sparse_file_is_zero(int fd, const SparseRange *range);

/**
 * sparse_file_punch: make a part of a file read as zero and free its pages
 *
 * @fd: a writable file
 * @range: the part to punch; of a page that is only partly in @range, that
 *         part is zeroed and the page stays allocated
 *
 * Returns 0, or a negative errno value, with which parts of @range may or may
 * not have been zeroed: EPERM if the file is sealed against writing, EBADF if
 * it is not open for writing, ENOSYS or EOPNOTSUPP if the file cannot have
 * holes.
 */
int sparse_file_punch(int fd, const SparseRange *range);

/**
 * sparse_file_thp_size: the size of transparent huge pages @fd may consist of
 *
 * @fd: a file on tmpfs
 *
 * Punching a part of a transparent huge page splits it.  Whether a particular
 * page is huge cannot be asked cheaply; whether there can be one at all is
 * decided by shmem_enabled in /sys/kernel/mm/transparent_hugepage for memfds
 * and by the huge= mount option for files on a tmpfs that is mounted
 * (Linux, Documentation/admin-guide/mm/transhuge.rst).
 *
 * This opens and reads a few small files: ask once and keep the answer.
 *
 * Returns the size in bytes, or 0 if the file has no huge pages.
 */
uint64_t sparse_file_thp_size(int fd);

#endif /* QEMU_SPARSE_FILE_H */
