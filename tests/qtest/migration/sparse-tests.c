/*
 * QTest testcases for sparse guest RAM
 *
 * Guest RAM that is a shared mapping of a memfd or a tmpfs file has no zero
 * page: whoever reads an untouched page allocates it.  These tests check that
 * a migration brings every page over, that it allocates nothing on the source,
 * and that what was a hole or a zero page there is not allocated on the
 * destination afterwards.
 *
 * Most guests are never started; sparse-util.h says how their RAM is prepared
 * and examined.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/mman.h>

#include "libqtest.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-stress-tests.h"
#include "migration/sparse-tests.h"
#include "migration/sparse-util.h"
#include "qemu/bitmap.h"
#include "qemu/units.h"

#ifndef MFD_ALLOW_SEALING
#define MFD_ALLOW_SEALING 0x0002U
#endif
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* A guest that runs must have more than it ever writes to */
#define LIVE_SIZE (256 * MiB)

/*
 * More than a small host has: neither side may allocate it.  A QEMU that does
 * is ended as soon as it has grown by more than an idle guest may.
 */
#define IDLE_SIZE (8 * GiB)

/* What either side of an idle guest may grow by */
#define MAX_IDLE_GROWTH (16 * MiB)

/*
 * The a/b guest writes to each page from start_address to end_address; the
 * rest is for what the firmware does.
 */
#define MAX_LIVE_ALLOCATION (X86_TEST_MEM_END + 16 * MiB)

/*
 * COLO runs the guest on both sides as soon as its RAM has arrived.  Neither
 * the a/b guest nor the firmware writes to this part.
 */
#define COLO_RANGE_START (128 * MiB)
#define COLO_RANGE_END (LIVE_SIZE - 16 * MiB)

typedef enum SparseMode {
    MODE_PRECOPY,
    MODE_MULTIFD,
    MODE_MULTIFD_LEGACY,    /* zero pages found and sent by the main thread */
    MODE_XBZRLE,            /* a stopped guest has nothing to be encoded */
    MODE__MAX,
} SparseMode;

#define ALL_MODES ((1 << MODE__MAX) - 1)

static const char *const mode_names[MODE__MAX] = {
    [MODE_PRECOPY] = "precopy",
    [MODE_MULTIFD] = "multifd",
    [MODE_MULTIFD_LEGACY] = "multifd-legacy",
    [MODE_XBZRLE] = "xbzrle",
};

/* What is expected of those pages of the destination that read as zero */
typedef enum ZeroPages {
    ZERO_PAGES_ANY,         /* only the content is checked */
    ZERO_PAGES_HOLES,       /* none is allocated */
    ZERO_PAGES_KEPT,        /* those are that were before the migration */
    ZERO_PAGES_ALLOCATED,   /* each is */
} ZeroPages;

typedef enum TraceExpected {
    TRACE_NONE,
    TRACE_FEW_HOLES,        /* only holes, and runs of pages are gathered */
    TRACE_NOT_PUNCHED,      /* no page is given back */
} TraceExpected;

typedef struct SparseCase {
    /* Path below /migration/sparse, followed by the mode and the pattern */
    const char *name;
    SparseBackend backend;
    /* In bytes; PATTERN_SIZE if 0 */
    uint64_t size;
    /* Bits of SparseMode and of SparsePattern */
    unsigned modes;
    unsigned patterns;
    ZeroPages zero_pages;

    /* The source does not grow, and counts holes, unless this says else */
    RamGrowth source;
    HoleCount holes;
    const char *src_opts;

    /* Destination only */
    const char *object_opts;
    const char *opts;
    /* Old data is in the destination's RAM before the migration */
    bool stale;
    /* The destination's file is allocated with fallocate() */
    bool reserved;
    /* The file refuses to be punched (and to be written, but by QEMU) */
    bool sealed;
    /* The migration ends in COLO state, with RAM discarding disabled */
    bool colo;
    /* The guest's RAM is locked into memory */
    bool mem_lock;
    /* What ram_handle_zero_range says, if it is traced */
    TraceExpected trace;
    /* Nothing may be on stderr */
    bool quiet;
} SparseCase;

static const SparseCase sparse_cases[] = {
    /* An idle guest */
    {
        .name = "memfd/idle",
        .backend = BACKEND_MEMFD,
        .size = IDLE_SIZE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY,
        .zero_pages = ZERO_PAGES_HOLES,
        .quiet = true,
    }, {
        .name = "memfd/trace",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_EMPTY,
        .zero_pages = ZERO_PAGES_HOLES,
        .trace = TRACE_FEW_HOLES,
    },

    /* Each way to have RAM in a file or not */
    {
        .name = "memfd/plain",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = ALL_PATTERNS & ~(1 << PATTERN_EMPTY),
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "memfd/plain",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_MULTIFD_LEGACY | 1 << MODE_XBZRLE,
        .patterns = 1 << PATTERN_RUNS | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "shm-file/plain",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "shm-file/offset",
        .backend = BACKEND_SHM_FILE_OFFSET,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_KEPT,
        .stale = true,
    }, {
        .name = "shm/plain",
        .backend = BACKEND_SHM,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "ram-shared/plain",
        .backend = BACKEND_RAM_SHARED,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "ram/plain",
        .backend = BACKEND_RAM,
        .holes = HOLES_NOT_COUNTED,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "memfd-private/plain",
        .backend = BACKEND_MEMFD_PRIVATE,
        .source = RAM_RELEASED,
        .holes = HOLES_ANY,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ANY,
    }, {
        .name = "hugetlb/plain",
        .backend = BACKEND_HUGETLB,
        .size = HUGETLB_SIZE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    },

    /*
     * Old data on the destination.  That a zero page arrives for the first
     * time does not mean that it reads as zero.
     */
    {
        .name = "memfd/stale",
        .backend = BACKEND_MEMFD,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
        .stale = true,
    }, {
        /* A file that is not QEMU's own is not given back */
        .name = "shm-file/stale",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_KEPT,
        .stale = true,
        .quiet = true,
    }, {
        .name = "shm-file/reserved",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .reserved = true,
        .quiet = true,
    }, {
        .name = "ram-shared/stale",
        .backend = BACKEND_RAM_SHARED,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
        .stale = true,
    }, {
        .name = "ram/stale",
        .backend = BACKEND_RAM,
        .holes = HOLES_NOT_COUNTED,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ANY,
        .stale = true,
    }, {
        .name = "hugetlb/stale",
        .backend = BACKEND_HUGETLB,
        .size = HUGETLB_SIZE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        /*
         * Whether a huge page is given back, and its reservation with it,
         * is for the destination to say.
         */
        .zero_pages = ZERO_PAGES_ANY,
        .stale = true,
    },

    /* Destinations whose pages have to stay */
    {
        .name = "memfd/prealloc",
        .backend = BACKEND_MEMFD,
        .modes = ALL_MODES & ~(1 << MODE_MULTIFD),
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .object_opts = ",prealloc=on",
        .stale = true,
        .quiet = true,
    }, {
        /* What QEMU has just created has no old data, and is not read */
        .name = "memfd/prealloc",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .object_opts = ",prealloc=on",
        .quiet = true,
    }, {
        .name = "shm-file/prealloc",
        .backend = BACKEND_SHM_FILE,
        .modes = 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .object_opts = ",prealloc=on",
        .stale = true,
        .quiet = true,
    }, {
        .name = "memfd/mem-lock",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_PRECOPY,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .opts = "-overcommit mem-lock=on",
        .mem_lock = true,
        .stale = true,
        .quiet = true,
    }, {
        .name = "memfd/mem-lock",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .opts = "-overcommit mem-lock=on",
        .mem_lock = true,
        .quiet = true,
    }, {
        .name = "memfd/sealed",
        .backend = BACKEND_MEMFD_SEALABLE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_KEPT,
        .stale = true,
        .sealed = true,
        .quiet = true,
    }, {
        .name = "memfd/colo",
        .backend = BACKEND_MEMFD,
        .size = LIVE_SIZE,
        .modes = 1 << MODE_PRECOPY,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_KEPT,
        .trace = TRACE_NOT_PUNCHED,
        .colo = true,
        .stale = true,
        /* Pages that the guest has written since are sent again */
        .holes = HOLES_ANY,
    },

    /* The way back to what QEMU did without all this */
    {
        .name = "memfd/off",
        .backend = BACKEND_MEMFD,
        .modes = ALL_MODES & ~(1 << MODE_MULTIFD),
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .opts = "-global migration.x-ram-holes=off",
        .src_opts = "-global migration.x-ram-holes=off",
        .source = RAM_GROWS,
        .holes = HOLES_NOT_COUNTED,
    }, {
        /* Multifd does not write to a page that arrives as zero at first */
        .name = "memfd/off",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_KEPT,
        .opts = "-global migration.x-ram-holes=off",
        .src_opts = "-global migration.x-ram-holes=off",
        .source = RAM_GROWS,
        .holes = HOLES_NOT_COUNTED,
    },
};

typedef struct SparseTest {
    const SparseCase *c;
    SparseMode mode;
    SparsePattern pattern;
} SparseTest;

static char *tmpfs;

static void check_zero_pages(const GuestRam *dst, ZeroPages expect,
                             const unsigned long *data,
                             const unsigned long *anchors,
                             const unsigned long *before,
                             const unsigned long *after,
                             uint64_t first, uint64_t last)
{
    uint64_t unit_pages = guest_ram_allocation_unit(dst) / dst->page_size;
    uint64_t page, bad = 0;

    for (page = first; page < last; page++) {
        bool allocated = test_bit(page, after);
        bool good = false;

        if (test_bit(page, data)) {
            good = allocated;
        } else {
            switch (expect) {
            case ZERO_PAGES_HOLES:
                good = !allocated ||
                       guest_ram_unit_has_any(dst, anchors, page, unit_pages);
                break;
            case ZERO_PAGES_KEPT:
                good = allocated == test_bit(page, before) ||
                       (allocated && unit_pages > 1);
                break;
            case ZERO_PAGES_ALLOCATED:
                good = allocated;
                break;
            default:
                g_assert_not_reached();
            }
        }
        if (!good && bad++ < 10) {
            g_test_message("page %" PRIu64 " of the destination is%s allocated,"
                           " it has%s data and was%s allocated before", page,
                           allocated ? "" : " not",
                           test_bit(page, data) ? "" : " no",
                           test_bit(page, before) ? "" : " not");
        }
    }
    g_assert_cmpuint(bad, ==, 0);
}

static void check_ram(const SparseTest *test, const GuestRam *src,
                      const GuestRam *dst, const uint8_t *kinds,
                      const GuestRamState *src_before,
                      const unsigned long *before)
{
    const SparseCase *c = test->c;
    uint64_t first = c->colo ? COLO_RANGE_START / dst->page_size : 0;
    uint64_t last = c->colo ? COLO_RANGE_END / dst->page_size
                            : guest_ram_pages(dst);
    /* Anonymous memory is not looked at before its size has been taken */
    uint64_t bytes = guest_ram_allocated_bytes(dst);
    g_autofree unsigned long *after = guest_ram_allocated_pages(dst);
    g_autofree unsigned long *data = NULL;
    g_autofree unsigned long *anchors = NULL;
    g_auto(GuestRamState) src_after = { };

    guest_ram_state_take(&src_after, src);
    data = guest_ram_check_content(src, dst, kinds, first, last);
    anchors = guest_ram_anchors(dst, data, before);

    g_test_message("destination has %" PRIu64 " KiB allocated, %" PRIu64
                   " KiB are not zero", bytes / KiB,
                   bitmap_count_one(data, guest_ram_pages(dst)) *
                   dst->page_size / KiB);

    if (c->zero_pages != ZERO_PAGES_ANY && after) {
        check_zero_pages(dst, c->zero_pages, data, anchors, before, after,
                         first, last);
    }
    if (c->zero_pages == ZERO_PAGES_HOLES) {
        g_assert_cmpuint(bytes, <=,
                         guest_ram_max_allocated_bytes(dst, anchors));
        if (test->pattern == PATTERN_EMPTY && !c->stale) {
            g_assert_cmpuint(bytes, <=, MAX_IDLE_GROWTH);
        }
    }
    guest_ram_check_growth(src, src_before, &src_after, c->source, first, last);
}

static void check_trace(TraceExpected expect, const GuestRam *dst,
                        const char *log)
{
    g_auto(GStrv) lines = g_strsplit(log, "\n", -1);
    uint64_t events = 0, holes = 0, punched = 0;
    int i;

    for (i = 0; lines[i]; i++) {
        if (strstr(lines[i], "ram_handle_zero_range") &&
            strstr(lines[i], BACKEND_ID)) {
            events++;
            holes += !!strstr(lines[i], "hole");
            punched += !!strstr(lines[i], "punched");
        }
    }
    g_test_message("%" PRIu64 " events for %" PRIu64 " pages: %" PRIu64
                   " holes, %" PRIu64 " punched", events, guest_ram_pages(dst),
                   holes, punched);

    g_assert_cmpuint(events, >, 0);
    if (expect == TRACE_NOT_PUNCHED) {
        g_assert_cmpuint(punched, ==, 0);
        return;
    }
    /*
     * A run of zero pages is one event.  An empty guest is one run, but for
     * where the stream or the stages of the migration cut it.
     */
    g_assert_cmpuint(events, <, guest_ram_pages(dst) / 64);
    g_assert_cmpuint(holes, ==, events);
}

static void check_stderr(const char *log)
{
    g_auto(GStrv) lines = g_strsplit(log, "\n", -1);
    int i, warnings = 0, others = 0;

    for (i = 0; lines[i]; i++) {
        if (!*lines[i]) {
            continue;
        }
        g_test_message("destination's stderr: %s", lines[i]);
        if (strstr(lines[i], "warning:")) {
            warnings++;
        } else {
            others++;
        }
    }
    g_assert_cmpint(warnings, ==, 0);
    g_assert_cmpint(others, ==, 0);
}

static int open_log(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* Of a test that fails, show what the destination wanted to say */
static void dump_stderr(void *opaque)
{
    const char *path = opaque;
    g_autofree char *log = NULL;

    if (g_file_get_contents(path, &log, NULL, NULL)) {
        fputs(log, stderr);
        unlink(path);
    }
}

/* Read a log from where @fd is at to its end */
static char *read_log(int fd)
{
    GString *log = g_string_new(NULL);
    char buf[4096];
    ssize_t len;

    while ((len = read(fd, buf, sizeof(buf))) > 0) {
        g_string_append_len(log, buf, len);
    }
    g_assert_cmpint(len, ==, 0);
    return g_string_free(log, false);
}

/* Can 2 GiB be locked?  (QEMU locks more than the guest's RAM.) */
static bool can_lock_memory(void)
{
#ifdef MLOCK_ONFAULT
    size_t size = 2 * GiB;
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    bool ret;

    g_assert(map != MAP_FAILED);
    ret = mlock2(map, size, MLOCK_ONFAULT) == 0;
    munmap(map, size);
    return ret;
#else
    return false;
#endif
}

static bool can_seal_future_writes(void)
{
    int fd = memfd_create("qemu-sparse-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    bool ret = fd >= 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0;

    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

/* Returns why the test cannot run on this host, or NULL */
static const char *skip_reason(const SparseCase *c)
{
    const char *reason = sparse_backend_skip_reason(c->backend);

    if (reason) {
        return reason;
    }
    if (c->sealed && !can_seal_future_writes()) {
        return "the kernel has no F_SEAL_FUTURE_WRITE";
    }
    if (c->mem_lock && !can_lock_memory()) {
        return "RLIMIT_MEMLOCK is below 2 GiB";
    }
#ifndef CONFIG_REPLICATION
    if (c->colo) {
        return "QEMU is built without replication, and so without COLO";
    }
#endif
#ifndef CONFIG_TRACE_LOG
    if (c->trace) {
        return "QEMU is built without the log trace backend";
    }
#endif
    return NULL;
}

static void set_mode(SparseMode mode, QTestState *from, QTestState *to)
{
    switch (mode) {
    case MODE_MULTIFD:
    case MODE_MULTIFD_LEGACY:
        migrate_set_multifd(from, to);
        if (mode == MODE_MULTIFD_LEGACY) {
            migrate_set_parameter_str(from, "zero-page-detection", "legacy");
        }
        break;
    case MODE_XBZRLE:
        migrate_set_parameter_int(from, "xbzrle-cache-size", 32 * MiB);
        migrate_set_both_capability(from, to, "xbzrle");
        break;
    default:
        break;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
}

/* Let neither side of an idle guest fill the host while it migrates */
static void watch_idle_guest(QTestState *from, const GuestRam *src,
                             const GuestRam *dst)
{
    while (true) {
        g_autofree char *status = migrate_query_status(from);

        g_assert_cmpuint(guest_ram_allocated_bytes(src), <=, MAX_IDLE_GROWTH);
        g_assert_cmpuint(guest_ram_allocated_bytes(dst), <=, MAX_IDLE_GROWTH);
        if (g_str_equal(status, "completed") || g_str_equal(status, "failed")) {
            return;
        }
        g_usleep(1000);
    }
}

static void migrate_stopped(const SparseTest *test, QTestState *from,
                            QTestState *to, const GuestRam *src,
                            const GuestRam *dst)
{
    if (test->c->colo) {
        migrate_set_both_capability(from, to, "x-colo");
        /* Has no effect then, and the destination need not have it */
        migrate_set_capability(from, "sparse-ram", true);
    }
    set_mode(test->mode, from, to);
    migrate_ensure_converge(from);
    migrate_qmp(from, to, NULL, NULL, "{}");

    if (src->size == IDLE_SIZE) {
        watch_idle_guest(from, src, dst);
    }
    if (test->c->colo) {
        wait_for_migration_status(from, "colo", NULL);
        wait_for_migration_status(to, "colo", NULL);
    } else {
        wait_for_migration_complete(from);
        wait_for_migration_complete(to);
    }
    if (test->mode == MODE_MULTIFD) {
        g_assert_cmpint(read_ram_property_int(from, "multifd-bytes"), >, 0);
    }
}

static void test_sparse(const void *opaque)
{
    const SparseTest *test = opaque;
    const SparseCase *c = test->c;
    const char *reason = skip_reason(c);
    g_autofree char *stderr_path = g_strdup_printf("%s/dest_stderr", tmpfs);
    g_autofree char *trace_path = g_strdup_printf("%s/dest_trace", tmpfs);
    g_autofree char *src_memory = NULL;
    g_autofree char *dst_memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_autofree unsigned long *before = NULL;
    g_autoptr(GString) dst_opts = NULL;
    g_auto(GuestRamState) src_before = { };
    MigrateStart args = {};
    GuestRam src, dst;
    QTestState *from, *to;
    int stderr_fd = -1, trace_fd = -1;

    if (reason) {
        g_test_skip(reason);
        return;
    }

    guest_ram_init(&src, c->backend, c->size ? c->size : PATTERN_SIZE);
    guest_ram_init(&dst, c->backend, src.size);

    src_memory = guest_ram_opts(&src, NULL);
    src_opts = g_strdup_printf("-S %s %s", src_memory,
                               c->src_opts ? c->src_opts : "");
    args.opts_source = src_opts;

    dst_memory = guest_ram_opts(&dst, c->object_opts);
    dst_opts = g_string_new(dst_memory);
    if (c->opts) {
        g_string_append_printf(dst_opts, " %s", c->opts);
    }
    if (c->trace) {
        g_string_append_printf(dst_opts, " -D %s -trace ram_handle_zero_range",
                               trace_path);
    }
    if (c->quiet) {
        g_string_append_printf(dst_opts, " 2>%s", stderr_path);
        qtest_add_abrt_handler(dump_stderr, stderr_path);
    }
    args.opts_target = dst_opts->str;
    /* Each side of COLO complains when the other one is ended */
    args.hide_stderr = c->colo;

    if (migrate_start(&from, &to, "defer", &args)) {
        /* It has said why */
        if (c->quiet) {
            qtest_remove_abrt_handler(stderr_path);
        }
        goto out;
    }
    guest_ram_open(&src, from);
    guest_ram_open(&dst, to);

    kinds = sparse_pattern_new(test->pattern, guest_ram_pages(&src));
    guest_ram_prepare(&src, kinds);
    if (c->stale) {
        guest_ram_make_stale(&dst);
    }
    if (c->reserved) {
        g_assert_cmpint(fallocate(dst.fd, 0, dst.start, dst.size), ==, 0);
    }
    if (c->sealed) {
        g_assert_cmpint(fcntl(dst.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE),
                        ==, 0);
    }
    guest_ram_state_take(&src_before, &src);
    before = guest_ram_allocated_pages(&dst);

    if (c->quiet) {
        stderr_fd = open_log(stderr_path);
        /* What QEMU said while it started is not about the migration */
        g_free(read_log(stderr_fd));
    }
    if (c->trace) {
        trace_fd = open_log(trace_path);
        unlink(trace_path);
    }

    migrate_stopped(test, from, to, &src, &dst);

    check_ram(test, &src, &dst, kinds, &src_before, before);
    check_hole_statistics(from, &src, &src_before, kinds, c->holes);
    if (c->quiet) {
        g_autofree char *log = read_log(stderr_fd);

        check_stderr(log);
        close(stderr_fd);
        qtest_remove_abrt_handler(stderr_path);
        unlink(stderr_path);
    }
    if (c->trace) {
        g_autofree char *log = read_log(trace_fd);

        check_trace(c->trace, &dst, log);
        close(trace_fd);
    }

    migrate_end(from, to, false);
out:
    guest_ram_close(&src);
    guest_ram_close(&dst);
}

/* The guest has run on the source, and its RAM has arrived */
static void check_live_allocation(QTestState *from, QTestState *to,
                                  void *opaque)
{
    QTestState *sides[] = { from, to };
    int i;

    for (i = 0; i < ARRAY_SIZE(sides); i++) {
        GuestRam ram;
        uint64_t bytes;

        guest_ram_init(&ram, BACKEND_MEMFD, LIVE_SIZE);
        guest_ram_open(&ram, sides[i]);
        bytes = guest_ram_allocated_bytes(&ram);
        g_test_message("%s has %" PRIu64 " KiB allocated",
                       i ? "destination" : "source", bytes / KiB);
        g_assert_cmpuint(bytes, <=, MAX_LIVE_ALLOCATION);
        guest_ram_close(&ram);
    }
}

static void *migrate_hook_start_multifd(QTestState *from, QTestState *to)
{
    migrate_set_multifd(from, to);
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    return NULL;
}

/*
 * Live, because only then a page is sent as zero first and with data later,
 * or the other way round, while zero pages are still being gathered.
 */
static void test_live(TestMigrateStartHook start_hook)
{
    const GuestRam ram = { .backend = BACKEND_MEMFD, .size = LIVE_SIZE };
    g_autofree char *opts = guest_ram_opts(&ram, NULL);
    MigrateCommon args = {
        .start.opts_source = opts,
        .start.opts_target = opts,
        .listen_uri = start_hook ? "defer" : "tcp:127.0.0.1:0",
        .start_hook = start_hook,
        .end_hook = check_live_allocation,
        .live = true,
    };

    test_precopy_common(&args);
}

static void test_live_precopy(void)
{
    test_live(NULL);
}

static void test_live_multifd(void)
{
    test_live(migrate_hook_start_multifd);
}

static void add_case(const SparseCase *c)
{
    SparseMode mode;
    SparsePattern pattern;

    for (mode = 0; mode < MODE__MAX; mode++) {
        for (pattern = 0; pattern < PATTERN__MAX; pattern++) {
            g_autofree char *path =
                g_strdup_printf("/migration/sparse/%s/%s/%s", c->name,
                                mode_names[mode],
                                sparse_pattern_names[pattern]);
            SparseTest *test;

            if (!(c->modes & (1 << mode)) ||
                !(c->patterns & (1 << pattern))) {
                continue;
            }
            test = g_new(SparseTest, 1);
            *test = (SparseTest) { c, mode, pattern };
            qtest_add_data_func_full(path, test, test_sparse, g_free);
        }
    }
}

void migration_test_add_sparse(MigrationTestEnv *env)
{
    int i;

    tmpfs = env->tmpfs;

    /*
     * Which sizes a machine can have, and what its firmware writes to while
     * it is being reset, differ.  Only the x86 machines have been tried.
     */
    if (!env->is_x86) {
        return;
    }

    for (i = 0; i < ARRAY_SIZE(sparse_cases); i++) {
        add_case(&sparse_cases[i]);
    }
    migration_test_add_sparse_modes(env);
    migration_test_add_sparse_file(env);
    migration_test_add_sparse_devices(env);
    migration_test_add_sparse_errors(env);
    migration_test_add_sparse_postcopy(env);
    migration_test_add_sparse_ram(env);
    migration_test_add_sparse_hostile(env);
    migration_test_add_sparse_stress(env);
    migration_test_add_sparse_pressure();

    if (!env->full_set) {
        return;
    }

    migration_test_add("/migration/sparse/memfd/live/precopy",
                       test_live_precopy);
    migration_test_add("/migration/sparse/memfd/live/multifd",
                       test_live_multifd);
}
