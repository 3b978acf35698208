/*
 * QTest testcases for sparse guest RAM
 *
 * Guest RAM that is a shared mapping of a memfd or a tmpfs file has no zero
 * page: whoever reads an untouched page allocates it.  These tests check that
 * a migration brings every page over, and that what was a hole or a zero page
 * on the source is not allocated on the destination afterwards.
 *
 * Most guests are never started.  Their RAM is prepared page by page through
 * the file behind it, or, where there is none, through /proc/PID/mem, and is
 * examined on both sides in the same way.  A pread() from a hole of tmpfs or
 * hugetlbfs does not populate it, so looking does not change what is looked at.
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
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
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

/* What most guests have: enough for all that the patterns vary */
#define PATTERN_SIZE (128 * MiB)

/* A guest that runs must have more than it ever writes to */
#define LIVE_SIZE (256 * MiB)

/*
 * The source reads, and so allocates, all of an idle guest.  Once it skips
 * holes, this can be a size that would not fit into the host's memory.
 */
#define IDLE_SIZE (1 * GiB)

/* Huge pages must be there on both sides at the same time */
#define HUGETLB_SIZE (64 * MiB)
#define HUGETLB_PAGE_SIZE (2 * MiB)
#define HUGETLB_SYSFS "/sys/kernel/mm/hugepages/hugepages-2048kB/"

/* What the destination of an idle guest may grow by */
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

#define BACKEND_ID "mem0"

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

static const char *const pattern_names[PATTERN__MAX] = {
    [PATTERN_EMPTY] = "empty",
    [PATTERN_ALTERNATE] = "alternate",
    [PATTERN_DENSE] = "dense",
    [PATTERN_RUNS] = "runs",
    [PATTERN_ENDS] = "ends",
    [PATTERN_ZEROED] = "zeroed",
    [PATTERN_MIXED] = "mixed",
};

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

/* Where the RAM of a guest comes from */
typedef enum SparseBackend {
    BACKEND_MEMFD,
    BACKEND_MEMFD_PRIVATE,
    BACKEND_MEMFD_SEALABLE,     /* a memfd of ours, opened by QEMU as a file */
    BACKEND_HUGETLB,
    BACKEND_SHM_FILE,           /* a file of ours in /dev/shm */
    BACKEND_SHM,
    BACKEND_RAM,
    BACKEND_RAM_SHARED,
} SparseBackend;

typedef struct SparseBackendInfo {
    /* The -object option up to size and, for a file of ours, mem-path */
    const char *object;
    /* How the name of a file of QEMU's begins */
    const char *link;
} SparseBackendInfo;

static const SparseBackendInfo backends[] = {
    [BACKEND_MEMFD] = {
        .object = "memory-backend-memfd,share=on",
        .link = "/memfd:",
    },
    [BACKEND_MEMFD_PRIVATE] = {
        .object = "memory-backend-memfd,share=off",
    },
    [BACKEND_MEMFD_SEALABLE] = {
        .object = "memory-backend-file,share=on",
    },
    [BACKEND_HUGETLB] = {
        .object = "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
        .link = "/memfd:",
    },
    [BACKEND_SHM_FILE] = {
        .object = "memory-backend-file,share=on",
    },
    [BACKEND_SHM] = {
        .object = "memory-backend-shm",
        .link = "/dev/shm/",
    },
    [BACKEND_RAM] = {
        .object = "memory-backend-ram",
    },
    [BACKEND_RAM_SHARED] = {
        .object = "memory-backend-ram,share=on",
        .link = "/memfd:",
    },
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

    /* Destination only */
    const char *object_opts;
    const char *opts;
    /* Old data is in the destination's RAM before the migration */
    bool stale;
    /* The file refuses to be punched (and to be written, but by QEMU) */
    bool sealed;
    /* The migration ends in COLO state, with RAM discarding disabled */
    bool colo;
    /* The guest's RAM is locked into memory */
    bool mem_lock;
    /* What ram_handle_zero_range says, if it is traced */
    TraceExpected trace;
    /* Nothing may be on stderr but, if this is set, one warning */
    bool quiet;
    bool one_warning;
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
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
    }, {
        .name = "memfd-private/plain",
        .backend = BACKEND_MEMFD_PRIVATE,
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
        .name = "shm-file/stale",
        .backend = BACKEND_SHM_FILE,
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_EMPTY | 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_HOLES,
        .stale = true,
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
        .modes = ALL_MODES,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .object_opts = ",prealloc=on",
        .stale = true,
        .quiet = true,
    }, {
        .name = "memfd/mem-lock",
        .backend = BACKEND_MEMFD,
        .modes = 1 << MODE_PRECOPY | 1 << MODE_MULTIFD,
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .opts = "-overcommit mem-lock=on",
        .mem_lock = true,
        .stale = true,
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
        .one_warning = true,
    }, {
        .name = "memfd/colo",
        .backend = BACKEND_MEMFD,
        .size = LIVE_SIZE,
        .modes = 1 << MODE_PRECOPY,
        .patterns = 1 << PATTERN_MIXED,
        /*
         * COLO reads every page that arrives, to have a copy of it, and so
         * would allocate again what has been punched.
         */
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .trace = TRACE_NOT_PUNCHED,
        .colo = true,
        .stale = true,
    },

    /* The way back to what QEMU did without all this */
    {
        .name = "memfd/off",
        .backend = BACKEND_MEMFD,
        /* Multifd did not allocate when it was the first to write a page */
        .modes = ALL_MODES & ~(1 << MODE_MULTIFD),
        .patterns = 1 << PATTERN_MIXED,
        .zero_pages = ZERO_PAGES_ALLOCATED,
        .opts = "-global migration.x-ram-holes=off",
    },
};

typedef struct SparseTest {
    const SparseCase *c;
    SparseMode mode;
    SparsePattern pattern;
} SparseTest;

/* The RAM of one QEMU: a file, or a range of /proc/PID/mem */
typedef struct GuestRam {
    int fd;
    /* Where the RAM begins in fd; 0 if fd is the file behind it */
    off_t start;
    uint64_t size;
    uint64_t page_size;
    pid_t pid;
    SparseBackend backend;
    /* The name of the file while it has one */
    char *path;
} GuestRam;

static char *tmpfs;

static bool ram_is_file(const GuestRam *ram)
{
    return ram->backend != BACKEND_RAM && ram->backend != BACKEND_MEMFD_PRIVATE;
}

static uint64_t ram_pages(const GuestRam *ram)
{
    return ram->size / ram->page_size;
}

/* Remove the file's name, so that a test that fails leaves nothing behind */
static void ram_unlink(void *opaque)
{
    GuestRam *ram = opaque;

    if (ram->path && ram->backend == BACKEND_SHM_FILE) {
        unlink(ram->path);
    }
    g_clear_pointer(&ram->path, g_free);
}

/* Before QEMU is started: create the file, if it is not QEMU that does it */
static void ram_init(GuestRam *ram, const SparseCase *c)
{
    *ram = (GuestRam) {
        .fd = -1,
        .size = c->size ? c->size : PATTERN_SIZE,
        .page_size = c->backend == BACKEND_HUGETLB ? HUGETLB_PAGE_SIZE
                                                   : qemu_real_host_page_size(),
        .backend = c->backend,
    };

    switch (c->backend) {
    case BACKEND_SHM_FILE:
        ram->path = g_strdup("/dev/shm/qemu-sparse-test-XXXXXX");
        ram->fd = g_mkstemp_full(ram->path, O_RDWR | O_CLOEXEC, 0600);
        g_assert_cmpint(ram->fd, >=, 0);
        break;
    case BACKEND_MEMFD_SEALABLE:
        ram->fd = memfd_create("qemu-sparse-test",
                               MFD_CLOEXEC | MFD_ALLOW_SEALING);
        g_assert_cmpint(ram->fd, >=, 0);
        g_assert_cmpint(ftruncate(ram->fd, ram->size), ==, 0);
        ram->path = g_strdup_printf("/proc/%d/fd/%d", getpid(), ram->fd);
        break;
    default:
        break;
    }

    qtest_add_abrt_handler(ram_unlink, ram);
}

/* Open QEMU's own file descriptor of a file of the right name and size */
static int ram_open_file(const GuestRam *ram, const char *link)
{
    g_autofree char *dir_path = g_strdup_printf("/proc/%d/fd", ram->pid);
    g_autoptr(GDir) dir = g_dir_open(dir_path, 0, NULL);
    const char *name;

    g_assert(dir);
    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(dir_path, name, NULL);
        g_autofree char *target = g_file_read_link(path, NULL);
        struct stat st;

        if (target && g_str_has_prefix(target, link) &&
            stat(path, &st) == 0 && st.st_size == ram->size) {
            /* memory-backend-shm lets nobody open its file, but it is ours */
            if (!(st.st_mode & S_IRUSR)) {
                chmod(path, S_IRUSR | S_IWUSR);
            }
            return open(path, O_RDWR | O_CLOEXEC);
        }
    }
    return -1;
}

/* The address of the guest's RAM in QEMU */
static off_t ram_host_address(QTestState *who)
{
    g_autofree char *blocks = qtest_hmp(who, "info ramblock");
    g_auto(GStrv) lines = g_strsplit(blocks, "\n", -1);
    int i;

    for (i = 0; lines[i]; i++) {
        char name[256];
        uint64_t host;

        if (sscanf(lines[i], "%255s %*s %*s 0x%*x 0x%*x 0x%*x 0x%" SCNx64,
                   name, &host) == 2 &&
            g_str_has_suffix(name, BACKEND_ID)) {
            return host;
        }
    }
    g_assert_not_reached();
}

/* Once QEMU runs: get hold of its RAM */
static void ram_open(GuestRam *ram, QTestState *who)
{
    const char *link = backends[ram->backend].link;

    ram->pid = qtest_pid(who);
    ram_unlink(ram);

    if (link) {
        ram->fd = ram_open_file(ram, link);
    } else if (!ram_is_file(ram)) {
        g_autofree char *path = g_strdup_printf("/proc/%d/mem", ram->pid);

        ram->fd = open(path, O_RDWR | O_CLOEXEC);
        ram->start = ram_host_address(who);
    }
    if (ram->fd < 0) {
        g_error("RAM of process %d can't be opened: %s",
                ram->pid, strerror(errno));
    }
}

static void ram_close(GuestRam *ram)
{
    ram_unlink(ram);
    qtest_remove_abrt_handler(ram);
    if (ram->fd >= 0) {
        close(ram->fd);
    }
}

static void ram_read_page(const GuestRam *ram, uint64_t page, void *buf)
{
    off_t offset = ram->start + page * ram->page_size;

    g_assert_cmpint(pread(ram->fd, buf, ram->page_size, offset),
                    ==, ram->page_size);
}

static void ram_write_page(const GuestRam *ram, uint64_t page, const void *buf)
{
    off_t offset = ram->start + page * ram->page_size;

    if (ram->backend == BACKEND_HUGETLB) {
        /* hugetlbfs has no write() */
        void *map = mmap(NULL, ram->page_size, PROT_READ | PROT_WRITE,
                         MAP_SHARED, ram->fd, offset);

        g_assert(map != MAP_FAILED);
        memcpy(map, buf, ram->page_size);
        munmap(map, ram->page_size);
        return;
    }
    g_assert_cmpint(pwrite(ram->fd, buf, ram->page_size, offset),
                    ==, ram->page_size);
}

/* The bytes that are allocated to a range of anonymous memory of a process */
static uint64_t process_anonymous_bytes(pid_t pid, uint64_t start,
                                        uint64_t size)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/smaps", pid);
    g_autofree char *smaps = NULL;
    g_auto(GStrv) lines = NULL;
    bool inside = false;
    uint64_t bytes = 0;
    int i;

    g_assert(g_file_get_contents(path, &smaps, NULL, NULL));
    lines = g_strsplit(smaps, "\n", -1);
    for (i = 0; lines[i]; i++) {
        uint64_t from, to, kib;

        if (sscanf(lines[i], "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2) {
            inside = from < start + size && to > start;
        } else if (inside &&
                   sscanf(lines[i], "Anonymous: %" SCNu64 " kB", &kib) == 1) {
            bytes += kib * KiB;
        }
    }
    return bytes;
}

static uint64_t ram_allocated_bytes(const GuestRam *ram)
{
    struct stat st;

    if (!ram_is_file(ram)) {
        return process_anonymous_bytes(ram->pid, ram->start, ram->size);
    }
    g_assert_cmpint(fstat(ram->fd, &st), ==, 0);
    return st.st_blocks * 512ULL;
}

/*
 * The pages that are allocated, or NULL if this cannot be told: there is no
 * file, or it is one of hugetlbfs, which says that all of it is data.
 */
static unsigned long *ram_allocated_pages(const GuestRam *ram)
{
    unsigned long *allocated;
    off_t data, hole = 0;

    if (!ram_is_file(ram) || ram->backend == BACKEND_HUGETLB) {
        return NULL;
    }

    allocated = bitmap_new(ram_pages(ram));
    while ((data = lseek(ram->fd, hole, SEEK_DATA)) >= 0) {
        hole = lseek(ram->fd, data, SEEK_HOLE);
        g_assert_cmpint(hole, >, data);
        bitmap_set(allocated, data / ram->page_size,
                   (hole - data) / ram->page_size);
    }
    g_assert_cmpint(errno, ==, ENXIO);
    return allocated;
}

static uint64_t read_sysfs_number(const char *path)
{
    g_autofree char *content = NULL;

    return g_file_get_contents(path, &content, NULL, NULL) ?
        g_ascii_strtoull(content, NULL, 10) : 0;
}

/*
 * The unit in which the kernel allocates the RAM.  With transparent huge
 * pages, those around a page with data can be allocated together with it.
 */
static uint64_t ram_allocation_unit(const GuestRam *ram)
{
    g_autofree char *path =
        g_strdup_printf("/sys/kernel/mm/transparent_hugepage/%senabled",
                        ram_is_file(ram) ? "shmem_" : "");
    g_autofree char *content = NULL;
    struct stat st;
    uint64_t huge;

    if (ram->backend == BACKEND_HUGETLB) {
        return ram->page_size;
    }
    /* What tmpfs is mounted with takes precedence in a file of it */
    if (ram_is_file(ram) && fstat(ram->fd, &st) == 0 &&
        st.st_blksize > ram->page_size) {
        return st.st_blksize;
    }
    if (!g_file_get_contents(path, &content, NULL, NULL) ||
        strstr(content, "[never]") || strstr(content, "[deny]")) {
        return ram->page_size;
    }
    huge = read_sysfs_number(
        "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    return MAX(huge, ram->page_size);
}

/* A page of data; no two pages are the same */
static void fill_page(uint64_t *buf, uint64_t page, uint64_t page_size)
{
    uint64_t i, word = (page + 1) * 0x9e3779b97f4a7c15ULL;

    for (i = 0; i < page_size / sizeof(*buf); i++) {
        buf[i] = word + i;
    }
}

/* Returns what each of @pages pages is to be */
static uint8_t *pattern_new(SparsePattern pattern, uint64_t pages)
{
    static const PageKind mixed[] = {
        PAGE_DATA, PAGE_HOLE, PAGE_ZERO, PAGE_HOLE, PAGE_ZERO, PAGE_ZERO,
        PAGE_DATA, PAGE_DATA, PAGE_ZERO, PAGE_HOLE, PAGE_HOLE, PAGE_DATA,
        PAGE_HOLE,
    };
    uint8_t *kinds = g_new0(uint8_t, pages);
    uint64_t i, run;

    QEMU_BUILD_BUG_ON(PAGE_HOLE != 0);

    switch (pattern) {
    case PATTERN_EMPTY:
        break;
    case PATTERN_ALTERNATE:
        for (i = 0; i < pages; i += 2) {
            kinds[i] = PAGE_DATA;
        }
        break;
    case PATTERN_DENSE:
        memset(kinds, PAGE_DATA, pages);
        break;
    case PATTERN_RUNS:
        /* One page of data, a hole of one page, two of data, ... */
        for (i = 0, run = 1; i < pages; i += 2 * run, run++) {
            memset(kinds + i, PAGE_DATA, MIN(run, pages - i));
        }
        break;
    case PATTERN_ENDS:
        kinds[0] = PAGE_DATA;
        kinds[pages - 1] = PAGE_DATA;
        break;
    case PATTERN_ZEROED:
        memset(kinds, PAGE_ZERO, pages);
        break;
    case PATTERN_MIXED:
        for (i = 0; i < pages; i++) {
            kinds[i] = mixed[i % ARRAY_SIZE(mixed)];
        }
        break;
    default:
        g_assert_not_reached();
    }
    return kinds;
}

static void prepare_source(const GuestRam *ram, const uint8_t *kinds)
{
    g_autofree uint64_t *buf = g_malloc0(ram->page_size);
    g_autofree uint64_t *zero = g_malloc0(ram->page_size);
    uint64_t page;

    for (page = 0; page < ram_pages(ram); page++) {
        if (kinds[page] == PAGE_DATA) {
            fill_page(buf, page, ram->page_size);
            ram_write_page(ram, page, buf);
        } else if (kinds[page] == PAGE_ZERO) {
            ram_write_page(ram, page, zero);
        }
    }
}

/*
 * Leave old data in runs of pages that start and end in another place of the
 * source's pattern each time.
 */
static void prepare_stale_destination(const GuestRam *ram)
{
    g_autofree void *buf = g_malloc(ram->page_size);
    uint64_t page;

    memset(buf, 0xff, ram->page_size);
    for (page = 0; page < ram_pages(ram); page++) {
        if (page % 11 < 7) {
            ram_write_page(ram, page, buf);
        }
    }
}

/*
 * Compare the pages [@first, @last) of both sides, and those that were
 * prepared with what they were prepared with.
 *
 * Returns the pages that are not zero.
 */
static unsigned long *check_content(const GuestRam *src, const GuestRam *dst,
                                    const uint8_t *kinds, uint64_t first,
                                    uint64_t last)
{
    unsigned long *data = bitmap_new(ram_pages(dst));
    g_autofree uint64_t *src_buf = g_malloc(src->page_size);
    g_autofree uint64_t *dst_buf = g_malloc(src->page_size);
    g_autofree uint64_t *expected = g_malloc0(src->page_size);
    uint64_t page, bad = 0;

    for (page = first; page < last; page++) {
        bool good;

        ram_read_page(src, page, src_buf);
        ram_read_page(dst, page, dst_buf);
        good = memcmp(src_buf, dst_buf, src->page_size) == 0;

        if (!buffer_is_zero(dst_buf, dst->page_size)) {
            set_bit(page, data);
        }
        if (kinds[page] == PAGE_DATA) {
            fill_page(expected, page, src->page_size);
            good &= memcmp(expected, dst_buf, src->page_size) == 0;
        } else if (kinds[page] == PAGE_ZERO) {
            good &= !test_bit(page, data);
        }
        if (!good && bad++ < 10) {
            g_test_message("page %" PRIu64 " differs (kind %d): source 0x%"
                           PRIx64 ", destination 0x%" PRIx64, page,
                           kinds[page], src_buf[0], dst_buf[0]);
        }
    }
    g_assert_cmpuint(bad, ==, 0);
    return data;
}

/* Is a page of @pages in the allocation unit that @page is in? */
static bool unit_has_any(const GuestRam *ram, const unsigned long *pages,
                         uint64_t page, uint64_t unit_pages)
{
    uint64_t start = QEMU_ALIGN_DOWN(page, unit_pages);
    uint64_t end = MIN(start + unit_pages, ram_pages(ram));

    return find_next_bit(pages, end, start) < end;
}

/*
 * The pages that make the allocation unit that they are in an allocated one:
 * those with data, and what was in a huge page before, which need not be split
 */
static unsigned long *anchor_pages(const GuestRam *ram,
                                   const unsigned long *data,
                                   const unsigned long *before)
{
    unsigned long *anchors = bitmap_new(ram_pages(ram));

    bitmap_copy(anchors, data, ram_pages(ram));
    if (before && ram_allocation_unit(ram) > ram->page_size) {
        bitmap_or(anchors, anchors, before, ram_pages(ram));
    }
    return anchors;
}

/* The most that may be allocated when zero pages are holes */
static uint64_t max_allocated_bytes(const GuestRam *ram,
                                    const unsigned long *anchors)
{
    uint64_t unit_pages = ram_allocation_unit(ram) / ram->page_size;
    uint64_t page, bytes = 0;

    for (page = 0; page < ram_pages(ram); page += unit_pages) {
        if (unit_has_any(ram, anchors, page, unit_pages)) {
            bytes += unit_pages * ram->page_size;
        }
    }
    return bytes;
}

static void check_zero_pages(const GuestRam *dst, ZeroPages expect,
                             const unsigned long *data,
                             const unsigned long *anchors,
                             const unsigned long *before,
                             const unsigned long *after,
                             uint64_t first, uint64_t last)
{
    uint64_t unit_pages = ram_allocation_unit(dst) / dst->page_size;
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
                       unit_has_any(dst, anchors, page, unit_pages);
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
                      const unsigned long *before)
{
    const SparseCase *c = test->c;
    uint64_t first = c->colo ? COLO_RANGE_START / dst->page_size : 0;
    uint64_t last = c->colo ? COLO_RANGE_END / dst->page_size : ram_pages(dst);
    /* Anonymous memory is not looked at before its size has been taken */
    uint64_t bytes = ram_allocated_bytes(dst);
    g_autofree unsigned long *after = ram_allocated_pages(dst);
    g_autofree unsigned long *data = check_content(src, dst, kinds,
                                                   first, last);
    g_autofree unsigned long *anchors = anchor_pages(dst, data, before);

    g_test_message("destination has %" PRIu64 " KiB allocated, %" PRIu64
                   " KiB are not zero", bytes / KiB,
                   bitmap_count_one(data, ram_pages(dst)) *
                   dst->page_size / KiB);

    if (c->zero_pages == ZERO_PAGES_ANY) {
        return;
    }
    if (after) {
        check_zero_pages(dst, c->zero_pages, data, anchors, before, after,
                         first, last);
    }
    if (c->zero_pages == ZERO_PAGES_HOLES) {
        g_assert_cmpuint(bytes, <=, max_allocated_bytes(dst, anchors));
        if (test->pattern == PATTERN_EMPTY && !c->stale) {
            g_assert_cmpuint(bytes, <=, MAX_IDLE_GROWTH);
        }
    }
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
                   " holes, %" PRIu64 " punched", events, ram_pages(dst),
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
    g_assert_cmpuint(events, <, ram_pages(dst) / 64);
    g_assert_cmpuint(holes, ==, events);
}

static void check_stderr(const SparseCase *c, const char *log)
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
    g_assert_cmpint(warnings, ==, c->one_warning);
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

static bool have_huge_pages(uint64_t pages)
{
    uint64_t free_pages = read_sysfs_number(HUGETLB_SYSFS "free_hugepages");
    uint64_t reserved = read_sysfs_number(HUGETLB_SYSFS "resv_hugepages");

    return free_pages >= reserved + pages;
}

static bool have_process_memory(void)
{
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

/* Returns why the test cannot run on this host, or NULL */
static const char *skip_reason(const SparseCase *c)
{
    if (c->backend == BACKEND_HUGETLB &&
        !have_huge_pages(2 * HUGETLB_SIZE / HUGETLB_PAGE_SIZE)) {
        return "less than 64 free huge pages of 2 MiB "
               "(see /proc/sys/vm/nr_hugepages)";
    }
    if ((c->backend == BACKEND_SHM_FILE || c->backend == BACKEND_SHM) &&
        access("/dev/shm", W_OK) != 0) {
        return "/dev/shm is not writable";
    }
    if ((c->backend == BACKEND_RAM || c->backend == BACKEND_MEMFD_PRIVATE) &&
        !have_process_memory()) {
        return "/proc/PID/mem is not writable";
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

/* The options that give a guest of @size bytes its RAM */
static char *memory_opts(SparseBackend backend, uint64_t size,
                         const char *path, const char *object_opts)
{
    g_autofree char *path_opt = path ? g_strdup_printf(",mem-path=%s", path)
                                     : g_strdup("");

    /* This -m comes after that of the framework, and wins */
    return g_strdup_printf("-m %" PRIu64 "M "
                           "-object %s,id=" BACKEND_ID ",size=%" PRIu64 "%s%s "
                           "-machine memory-backend=" BACKEND_ID,
                           size / MiB, backends[backend].object, size,
                           path_opt, object_opts ? object_opts : "");
}

static void set_mode(SparseMode mode, QTestState *from, QTestState *to)
{
    switch (mode) {
    case MODE_MULTIFD:
    case MODE_MULTIFD_LEGACY:
        migrate_hook_start_precopy_tcp_multifd_common(from, to, "none");
        if (mode == MODE_MULTIFD_LEGACY) {
            migrate_set_parameter_str(from, "zero-page-detection", "legacy");
        }
        return;
    case MODE_XBZRLE:
        migrate_set_parameter_int(from, "xbzrle-cache-size", 32 * MiB);
        migrate_set_capability(from, "xbzrle", true);
        migrate_set_capability(to, "xbzrle", true);
        break;
    default:
        break;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
}

static void migrate_stopped(const SparseTest *test, QTestState *from,
                            QTestState *to)
{
    if (test->c->colo) {
        migrate_set_capability(from, "x-colo", true);
        migrate_set_capability(to, "x-colo", true);
    }
    set_mode(test->mode, from, to);
    migrate_ensure_converge(from);
    migrate_qmp(from, to, NULL, NULL, "{}");

    if (test->c->colo) {
        wait_for_migration_status(from, "colo", NULL);
        wait_for_migration_status(to, "colo", NULL);
    } else {
        wait_for_migration_complete(from);
        wait_for_migration_complete(to);
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
    MigrateStart args = {};
    GuestRam src, dst;
    QTestState *from, *to;
    int stderr_fd = -1, trace_fd = -1;

    if (reason) {
        g_test_skip(reason);
        return;
    }

    ram_init(&src, c);
    ram_init(&dst, c);

    src_memory = memory_opts(c->backend, src.size, src.path, NULL);
    src_opts = g_strdup_printf("-S %s", src_memory);
    args.opts_source = src_opts;

    dst_memory = memory_opts(c->backend, dst.size, dst.path, c->object_opts);
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
    ram_open(&src, from);
    ram_open(&dst, to);

    kinds = pattern_new(test->pattern, ram_pages(&src));
    prepare_source(&src, kinds);
    if (c->stale) {
        prepare_stale_destination(&dst);
    }
    if (c->sealed) {
        g_assert_cmpint(fcntl(dst.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE),
                        ==, 0);
    }
    before = ram_allocated_pages(&dst);

    if (c->quiet) {
        stderr_fd = open_log(stderr_path);
        /* What QEMU said while it started is not about the migration */
        g_free(read_log(stderr_fd));
    }
    if (c->trace) {
        trace_fd = open_log(trace_path);
        unlink(trace_path);
    }

    migrate_stopped(test, from, to);

    check_ram(test, &src, &dst, kinds, before);
    if (c->quiet) {
        g_autofree char *log = read_log(stderr_fd);

        check_stderr(c, log);
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
    ram_close(&src);
    ram_close(&dst);
}

/* The guest has run on the source, and its RAM has arrived */
static void check_live_allocation(QTestState *from, QTestState *to,
                                  void *opaque)
{
    const SparseCase c = { .backend = BACKEND_MEMFD, .size = LIVE_SIZE };
    GuestRam dst;
    uint64_t bytes;

    ram_init(&dst, &c);
    ram_open(&dst, to);
    bytes = ram_allocated_bytes(&dst);
    g_test_message("destination has %" PRIu64 " KiB allocated", bytes / KiB);
    g_assert_cmpuint(bytes, <=, MAX_LIVE_ALLOCATION);
    ram_close(&dst);
}

static void *migrate_hook_start_multifd(QTestState *from, QTestState *to)
{
    return migrate_hook_start_precopy_tcp_multifd_common(from, to, "none");
}

/*
 * Live, because only then a page is sent as zero first and with data later,
 * or the other way round, while zero pages are still being gathered.
 */
static void test_live(TestMigrateStartHook start_hook)
{
    g_autofree char *opts = memory_opts(BACKEND_MEMFD, LIVE_SIZE,
                                        NULL, NULL);
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
                                mode_names[mode], pattern_names[pattern]);
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

    if (!env->full_set) {
        return;
    }

    migration_test_add("/migration/sparse/memfd/live/precopy",
                       test_live_precopy);
    migration_test_add("/migration/sparse/memfd/live/multifd",
                       test_live_multifd);
}
