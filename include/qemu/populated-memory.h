/*
 * Populated memory: which pages of a mapping the page tables know
 *
 * Private anonymous memory that is not in the page tables reads as zero.
 * Looking whether it does would put the kernel's zero page there, and that
 * takes page tables and time: so ask the kernel instead.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_POPULATED_MEMORY_H
#define QEMU_POPULATED_MEMORY_H

#include "qemu/sparse-file.h"

/**
 * populated_memory_next: find the first populated pages in a part of a mapping
 *
 * @within: addresses of this process, which need not be at page boundaries
 * @populated: set to the first run of populated pages, cut off at both ends of
 *             @within; set to an empty range at the end of @within if there is
 *             none
 *
 * Everything between @within->start and @populated->start was not in the page
 * tables, neither as a page in memory nor as one that is swapped out or being
 * moved, when the function was called.  What is called populated may still be
 * zero, or the zero page.  Nothing gets populated by asking, and no page tables
 * get allocated.
 *
 * What it means that a page is not there depends on the mapping:
 *
 * - private and anonymous: it reads as zero;
 * - private, of a file: it reads as the file does;
 * - shared: nothing, another process can have written it.
 *
 * For huge pages, see populated_huge_pages_next().
 *
 * May be called by any thread.  Asks /proc/self/pagemap, which is opened at the
 * first call, and only then, and stays open; a child process opens its own.
 *
 * Returns 0, or a negative errno value if the kernel does not tell: there is no
 * /proc, or this process may not look at it.
 */
int populated_memory_next(const SparseRange *within, SparseRange *populated);

/**
 * populated_huge_pages_next: the same for a shared mapping of huge pages
 *
 * Cannot fail.  But a page that is being moved is not there for a moment.
 *
 * @within: addresses of this process, at boundaries of huge pages
 * @page_size: size of a huge page, in bytes
 * @populated: see populated_memory_next()
 */
void populated_huge_pages_next(const SparseRange *within, uint64_t page_size,
                               SparseRange *populated);

/**
 * populated_huge_page: whether a huge page is in the page tables
 *
 * If so, reading it allocates nothing.
 *
 * @host: where it begins
 */
bool populated_huge_page(void *host);

/**
 * pagemap_scan_next, pagemap_read_next: the two ways to ask
 *
 * populated_memory_next() takes the first that works.  By themselves they are
 * of use to tests only.
 *
 * @fd: /proc/self/pagemap
 * @within: addresses at boundaries of host pages
 * @populated: see populated_memory_next()
 *
 * Returns 0, or a negative errno value: -ENOTTY from pagemap_scan_next() before
 * Linux 6.7.
 */
int pagemap_scan_next(int fd, const SparseRange *within,
                      SparseRange *populated);
int pagemap_read_next(int fd, const SparseRange *within,
                      SparseRange *populated);

#endif /* QEMU_POPULATED_MEMORY_H */
