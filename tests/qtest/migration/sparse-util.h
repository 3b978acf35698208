/*
 * QTest helpers for sparse guest RAM
 *
 * A test is a row: guest RAM of some kind, a way to migrate it, and what is
 * expected of it afterwards.  The RAM is prepared and examined page by page
 * through the file behind it.  A pread() from a hole of tmpfs or hugetlbfs does
 * not populate it, so looking does not change what is looked at.
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

#define HUGETLB_SIZE (64 * MiB)
#define HUGETLB_PAGE_SIZE (2 * MiB)
#define HUGETLB_SYSFS "/sys/kernel/mm/hugepages/hugepages-2048kB/"

#define BACKEND_ID "mem0"

typedef struct GuestRam GuestRam;
typedef struct SparseGuests SparseGuests;

/* Where guest RAM comes from */
typedef struct SparseBackend {
    /* The option -object, up to id, size and mem-path */
    const char *object;
    /* How the name of a file of QEMU's begins */
    const char *link;
    /* Open a file of the test's; -1 if it cannot be had, after saying why */
    int (*open_file)(void);
    /* Where the RAM begins in the file */
    uint64_t offset;
    /* If 0: PATTERN_SIZE, and that of the host */
    uint64_t size;
    uint64_t page_size;
    /* Why it cannot be had twice on this host, or NULL */
    const char *(*skip_reason)(void);
    /* If it is not what the file has: open it, and what is allocated to it */
    void (*open)(GuestRam *ram, QTestState *who);
    uint64_t (*bytes)(const GuestRam *ram);
} SparseBackend;

extern const SparseBackend sparse_memfd, sparse_memfd_private, sparse_hugetlb,
                           sparse_shm_file;

/* What a page of the source is before the migration */
typedef enum PageKind {
    PAGE_HOLE,
    PAGE_DATA,
    PAGE_ZERO,      /* populated, but reads as zero */
} PageKind;

typedef struct SparsePattern {
    const char *name;
    PageKind (*kind)(uint64_t page, uint64_t pages);
} SparsePattern;

extern const SparsePattern sparse_mixed, sparse_empty;

typedef enum SparseTransport {
    SPARSE_SOCKET,
    SPARSE_POSTCOPY,        /* switched to as soon as it has started */
    SPARSE_FILE,
    SPARSE_SNAPSHOT,        /* capability background-snapshot, into a file */
} SparseTransport;

/* How one guest becomes the other */
typedef struct SparseWay {
    const char *name;
    SparseTransport transport;
    /* If it is not TCP */
    const char *uri;
    /* Of both sides; parameters are "NAME VALUE" */
    const char *capabilities[5];
    const char *parameters[4];
    /* Bytes a second, with the least downtime; if 0, as fast as possible */
    uint64_t bandwidth;
    /* NULL, or why it cannot be had here, and what else both sides need */
    const char *(*skip_reason)(void);
    void (*set_up)(SparseGuests *guests);
} SparseWay;

extern const SparseWay sparse_precopy, sparse_multifd, sparse_postcopy,
                       sparse_mapped_ram, sparse_runs;

/* What is allocated afterwards */
typedef enum SparseAllocation {
    SPARSE_DEFAULT,         /* source: SPARSE_KEPT, destination: SPARSE_DATA */
    SPARSE_KEPT,            /* what was before, and the pages with data */
    SPARSE_RELEASED,        /* the same at most */
    SPARSE_DATA,            /* the pages with data, and no other */
    SPARSE_FULL,            /* all pages */
    SPARSE_GROWS,           /* more than before */
    SPARSE_ANY,
} SparseAllocation;

typedef enum SparseHoles {
    HOLES_COUNTED,          /* all of the source, and there are no others */
    HOLES_NOT_COUNTED,
    HOLES_ANY,
} SparseHoles;

typedef struct SparseExpect {
    SparseAllocation src;
    SparseAllocation dst;
    SparseHoles holes;
    /* Zero pages take no space in the file */
    bool sparse_file;
    /* Nothing is in the log */
    bool quiet;
} SparseExpect;

typedef struct SparseRow {
    /* Path below /migration/sparse; %w is the way's name, %p the pattern's */
    const char *name;
    /* sparse_memfd if NULL; the source can have another one */
    const SparseBackend *backend;
    const SparseBackend *src_backend;
    /* In bytes; the backend's if 0 */
    uint64_t size;
    /* If there is none: sparse_mixed, sparse_precopy */
    const SparsePattern *patterns[8];
    const SparseWay *ways[10];
    /* More options of QEMU, and of the destination's -object */
    const char *opts;
    const char *src_opts;
    const char *dst_opts;
    const char *dst_object;
    /* There is old data in the destination's RAM */
    bool stale;
    /* sparse_log() is wanted; stderr of the others is not; QMP capability */
    bool log;
    bool hide_stderr;
    bool oob;
    SparseExpect expect;

    /* NULL, or why the test cannot run here */
    const char *(*skip_reason)(void);
    /* Change guests->kinds, before anything is written */
    void (*shape)(SparseGuests *guests);
    /* After all is written */
    void (*prepare)(SparseGuests *guests);
    /* What happens, instead of a migration */
    void (*act)(SparseGuests *guests);
    /* While it is migrated */
    void (*during)(SparseGuests *guests);
    /* What else is to be checked */
    void (*check)(SparseGuests *guests);
} SparseRow;

/* The RAM of one QEMU */
struct GuestRam {
    const SparseBackend *backend;
    int fd;
    /* If fd is not the backend's file: that one, or -1 */
    int file_fd;
    /* Where it begins in fd */
    off_t start;
    uint64_t size;
    uint64_t page_size;
    uint64_t pages;
    pid_t pid;
};

typedef struct GuestRamState {
    uint64_t bytes;
    /* NULL if the kernel does not tell */
    unsigned long *pages;
} GuestRamState;

/* Two guests that do not run */
struct SparseGuests {
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
    const SparseRow *row;
    const SparseWay *way;
    /* PageKind of the source's pages; NULL: only compare the two sides */
    uint8_t *kinds;
    GuestRamState src_before;
    GuestRamState dst_before;
    /* Where a way through a file has its file */
    char *file;
    char *log_path;
    off_t log_start;
};

extern MigrationTestEnv *sparse_env;

void sparse_add_rows(const SparseRow *rows, size_t n);

/*
 * The steps of a row, for tests that need them one by one.  Those that return
 * bool return false if the test has to be skipped, after saying why.  After
 * sparse_begin() has returned true, sparse_end() is due.
 */
bool sparse_begin(SparseGuests *guests, const SparseRow *row,
                  const SparseWay *way, const SparsePattern *pattern);
bool sparse_set_way(SparseGuests *guests, const SparseWay *way);
/* @during: NULL, or called in the middle */
void sparse_migrate(SparseGuests *guests, void (*during)(SparseGuests *));
void sparse_check(SparseGuests *guests);
void sparse_end(SparseGuests *guests);

/* All of them */
void sparse_run(const SparseRow *row, const SparseWay *way,
                const SparsePattern *pattern);

/* What the destination has written to stderr since the migration was begun */
char *sparse_log(SparseGuests *guests);

/* Give HMP a command that is silent if it succeeds; false: see above */
bool sparse_try(QTestState *who, const char *format, ...) G_GNUC_PRINTF(2, 3);
/* Switch a capability on, on both sides */
void sparse_set_both(const SparseGuests *guests, const char *capability);

uint8_t *sparse_pattern_new(const SparsePattern *pattern, uint64_t pages);
/* Make the content of one page; no two pages of data are the same */
void sparse_pattern_page(uint64_t *buf, const uint8_t *kinds, uint64_t page,
                         uint64_t page_size);
uint64_t sparse_count(const uint8_t *kinds, uint64_t pages, PageKind kind);
unsigned long *sparse_data_pages(const uint8_t *kinds, uint64_t pages);

/* Nobody else who asks for this lock takes huge pages while the test runs */
void sparse_lock_huge_pages(void);

/* Before QEMU is started; false if the file cannot be had */
bool guest_ram_init(GuestRam *ram, const SparseBackend *backend, uint64_t size);
/* The options that give a guest this RAM; @object is NULL or ",..." */
char *guest_ram_opts(const GuestRam *ram, const char *object);
/* Once QEMU runs */
void guest_ram_open(GuestRam *ram, QTestState *who);
void guest_ram_close(GuestRam *ram);

void guest_ram_read_page(const GuestRam *ram, uint64_t page, void *buf);
void guest_ram_write_page(const GuestRam *ram, uint64_t page, const void *buf);
/* Make all of it a hole */
void guest_ram_punch(const GuestRam *ram);
/* Write the pages that are not to be holes */
void guest_ram_prepare(const GuestRam *ram, const uint8_t *kinds);
/* Leave old data in runs that start and end elsewhere in a pattern each time */
void guest_ram_make_stale(const GuestRam *ram);

uint64_t guest_ram_file_bytes(int fd);
uint64_t guest_ram_allocated_bytes(const GuestRam *ram);
/* NULL if the kernel does not tell; hugetlbfs says that all of it is data */
unsigned long *guest_ram_allocated_pages(const GuestRam *ram);
/* With transparent huge pages, pages are allocated together */
uint64_t guest_ram_allocation_unit(const GuestRam *ram);
/* Add the pages that are in an allocation unit with one of @pages */
void guest_ram_extend_to_units(const GuestRam *ram, unsigned long *pages);
/* How much of a file has data, in bytes */
uint64_t sparse_file_bytes(const char *path);

void guest_ram_state_take(GuestRamState *state, const GuestRam *ram);
void guest_ram_state_clear(GuestRamState *state);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(GuestRamState, guest_ram_state_clear)

/* @data: the pages that have data now, or NULL if that has not changed */
void guest_ram_check_allocation(const GuestRam *ram, SparseAllocation expect,
                                const GuestRamState *before,
                                const unsigned long *data);

/*
 * Compare all pages with the pattern, where holes have to read as zero; or, if
 * @kinds is NULL, with those of @other.  Returns the pages that are not zero.
 */
unsigned long *guest_ram_content(const GuestRam *ram, const GuestRam *other,
                                 const uint8_t *kinds);
void guest_ram_check_pattern(const GuestRam *ram, const uint8_t *kinds);

#endif /* SPARSE_UTIL_H */
