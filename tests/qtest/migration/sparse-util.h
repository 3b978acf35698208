/*
 * QTest helpers for sparse guest RAM
 *
 * The RAM of a guest is prepared page by page through the file behind it, or,
 * where there is none, through /proc/PID/mem, and is examined in the same way.
 * A pread() from a hole of tmpfs or hugetlbfs does not populate it, so looking
 * does not change what is looked at.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_UTIL_H
#define SPARSE_UTIL_H

#include "libqtest.h"
#include "migration/framework.h"
#include "qemu/units.h"

/* What most guests have: enough for all that the patterns vary */
#define PATTERN_SIZE (128 * MiB)

/* Huge pages must be there on both sides at the same time */
#define HUGETLB_SIZE (64 * MiB)
#define HUGETLB_PAGE_SIZE (2 * MiB)
#define HUGETLB_SYSFS "/sys/kernel/mm/hugepages/hugepages-2048kB/"

#define BACKEND_ID "mem0"

/* What is below the first MiB of a PC is RAM only up to here */
#define PC_BASE_MEMORY_END (640 * KiB)

/* What a page of the source is before the migration */
typedef enum PageKind {
    PAGE_HOLE,
    PAGE_DATA,
    PAGE_ZERO,      /* populated, but reads as zero */
} PageKind;

typedef enum SparsePattern {
    PATTERN_EMPTY,
    PATTERN_ALTERNATE,
    PATTERN_DENSE,
    PATTERN_RUNS,
    PATTERN_ENDS,
    PATTERN_ZEROED,
    PATTERN_MIXED,
    PATTERN__MAX,
} SparsePattern;

#define ALL_PATTERNS ((1 << PATTERN__MAX) - 1)

extern const char *const sparse_pattern_names[PATTERN__MAX];

/* Returns what each of @pages pages is to be, as PageKind */
uint8_t *sparse_pattern_new(SparsePattern pattern, uint64_t pages);

/* Make the content of one page; no two pages of data are the same */
void sparse_pattern_page(uint64_t *buf, const uint8_t *kinds, uint64_t page,
                         uint64_t page_size);

/* Where the RAM of a guest comes from */
typedef enum SparseBackend {
    BACKEND_MEMFD,
    BACKEND_MEMFD_PRIVATE,
    BACKEND_MEMFD_SEALABLE,     /* a memfd of ours, opened by QEMU as a file */
    BACKEND_HUGETLB,
    BACKEND_SHM_FILE,           /* a file of ours in /dev/shm */
    BACKEND_SHM_FILE_OFFSET,    /* the same, and the RAM is not at its start */
    BACKEND_SHM,
    BACKEND_RAM,
    BACKEND_RAM_SHARED,
    BACKEND_FILE,               /* the file of guest_ram_init_file() */
    BACKEND_HUGETLB_FILE,       /* the same, on hugetlbfs */
} SparseBackend;

/*
 * Until the end of this test, no other program that asks for this lock, as the
 * tests do, takes huge pages: those that are free now are still free when a
 * guest wants them.
 */
void sparse_lock_huge_pages(void);

/*
 * Returns why the backend cannot be had twice on this host, or NULL.  Takes the
 * lock if it has huge pages.
 */
const char *sparse_backend_skip_reason(SparseBackend backend);

/* The RAM of one QEMU: a file, or a range of /proc/PID/mem */
typedef struct GuestRam {
    int fd;
    /* The file that a private mapping hides, or -1 */
    int private_fd;
    /* Where the RAM begins in fd */
    off_t start;
    uint64_t size;
    uint64_t page_size;
    pid_t pid;
    SparseBackend backend;
    /* The name of the file while it has one */
    char *path;
} GuestRam;

/* Before QEMU is started: create the file, if it is not QEMU that does it */
void guest_ram_init(GuestRam *ram, SparseBackend backend, uint64_t size);

/* The same, with a file that the test has opened; @ram closes @fd */
void guest_ram_init_file(GuestRam *ram, SparseBackend backend, uint64_t size,
                         int fd);

/* The options that give a guest this RAM; @object_opts is NULL or ",..." */
char *guest_ram_opts(const GuestRam *ram, const char *object_opts);

/* Once QEMU runs: get hold of its RAM */
void guest_ram_open(GuestRam *ram, QTestState *who);
void guest_ram_close(GuestRam *ram);

/* Whether the content is that of a file, and not private to the process */
bool guest_ram_is_file(const GuestRam *ram);

uint64_t guest_ram_pages(const GuestRam *ram);
void guest_ram_read_page(const GuestRam *ram, uint64_t page, void *buf);
void guest_ram_write_page(const GuestRam *ram, uint64_t page, const void *buf);

/* Make all of the RAM a hole; only for RAM in a file */
void guest_ram_punch(const GuestRam *ram);

/* Write the pages that are not to be holes */
void guest_ram_prepare(const GuestRam *ram, const uint8_t *kinds);

/*
 * Leave old data in runs of pages that start and end in another place of the
 * source's pattern each time.
 */
void guest_ram_make_stale(const GuestRam *ram);

uint64_t guest_ram_allocated_bytes(const GuestRam *ram);

/* Say what is allocated on both sides; @before is that of the source */
void guest_ram_report(const GuestRam *src, const GuestRam *dst,
                      uint64_t before);

/*
 * The pages that are allocated, or NULL if this cannot be told: there is no
 * file, or it is one of hugetlbfs, which says that all of it is data.
 */
unsigned long *guest_ram_allocated_pages(const GuestRam *ram);

/*
 * The unit in which the kernel allocates the RAM.  With transparent huge
 * pages, those around a page with data can be allocated together with it.
 */
uint64_t guest_ram_allocation_unit(const GuestRam *ram);

/* Is a page of @pages in the allocation unit that @page is in? */
bool guest_ram_unit_has_any(const GuestRam *ram, const unsigned long *pages,
                            uint64_t page, uint64_t unit_pages);

/*
 * The pages that make the allocation unit that they are in an allocated one:
 * those with data, and what was in a huge page before, which need not be split
 */
unsigned long *guest_ram_anchors(const GuestRam *ram,
                                 const unsigned long *data,
                                 const unsigned long *before);

/* The most that may be allocated when zero pages are holes */
uint64_t guest_ram_max_allocated_bytes(const GuestRam *ram,
                                       const unsigned long *anchors);

/*
 * Compare the pages [@first, @last) of both sides, and those that were
 * prepared with what they were prepared with.
 *
 * Returns the pages that are not zero.
 */
unsigned long *guest_ram_check_content(const GuestRam *src, const GuestRam *dst,
                                       const uint8_t *kinds, uint64_t first,
                                       uint64_t last);

/* Compare all pages with the pattern; holes have to read as zero */
void guest_ram_check_pattern(const GuestRam *ram, const uint8_t *kinds);

/* What is allocated at one time */
typedef struct GuestRamState {
    uint64_t bytes;
    unsigned long *pages;
} GuestRamState;

void guest_ram_state_take(GuestRamState *state, const GuestRam *ram);
void guest_ram_state_clear(GuestRamState *state);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(GuestRamState, guest_ram_state_clear)

typedef enum RamGrowth {
    RAM_KEPT,           /* exactly the same pages are allocated as before */
    RAM_RELEASED,       /* none that was not; pages may have been freed */
    RAM_GROWS,
} RamGrowth;

/* Compare what is allocated to the pages [@first, @last) of @ram */
void guest_ram_check_growth(const GuestRam *ram, const GuestRamState *before,
                            const GuestRamState *after, RamGrowth expect,
                            uint64_t first, uint64_t last);

typedef enum HoleCount {
    HOLES_COUNTED,      /* all of @ram, and there are no others */
    HOLES_NOT_COUNTED,
    HOLES_ANY,
} HoleCount;

/* Check what query-migrate and "info migrate" say about holes */
void check_hole_statistics(QTestState *from, const GuestRam *ram,
                           const GuestRamState *before, const uint8_t *kinds,
                           HoleCount expect);

/* Two guests with RAM of the same kind */
typedef struct GuestPair {
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
} GuestPair;

/*
 * Start a guest that is stopped, and one that waits for it and does not start
 * by itself either.
 *
 * @opts are for both sides, @opts_target for the destination; each may be NULL
 *
 * Returns whether that was done; if not, it has been said why
 */
bool guest_pair_start(GuestPair *pair, SparseBackend backend, uint64_t size,
                      const char *opts, const char *opts_target);
void guest_pair_end(GuestPair *pair);

/*
 * Compare what an ELF dump has of the main memory with the pattern @kinds; of
 * the main memory only what is RAM at the reset of a PC
 */
void check_elf_dump(const GuestRam *ram, const uint8_t *kinds,
                    const char *path);

/* What a QEMU has printed to a file, which is removed */
char *take_stderr(const char *path);

/*
 * Switch a capability on if QEMU and the host have it, and it goes with the
 * others.
 *
 * Returns whether that was done; if not, the test is skipped, with what QEMU
 * says
 */
bool migrate_try_capability(QTestState *who, const char *name);

/* Switch a capability on, on both sides */
void migrate_set_both_capability(QTestState *from, QTestState *to,
                                 const char *name);

/*
 * Let precopy be so slow that it cannot be over before postcopy has started,
 * if there are thousands of holes or some data to send
 */
void migrate_ensure_postcopy(QTestState *from);

/* After a migration: postcopy must have sent something */
void check_postcopy(QTestState *from);

/* Switch multifd on, on both sides, with a good many channels */
void migrate_set_multifd(QTestState *from, QTestState *to);

/* Add the tests of sparse-modes-tests.c */
void migration_test_add_sparse_modes(MigrationTestEnv *the_env);

/* Add the tests of sparse-hostile-tests.c */
void migration_test_add_sparse_hostile(MigrationTestEnv *env);
/* Add the tests of sparse-device-tests.c */
void migration_test_add_sparse_devices(MigrationTestEnv *the_env);

/* Add the tests of sparse-error-tests.c */
void migration_test_add_sparse_errors(MigrationTestEnv *the_env);

#endif /* SPARSE_UTIL_H */
