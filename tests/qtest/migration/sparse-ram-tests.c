/*
 * QTest testcases for the migration capability sparse-ram
 *
 * With the capability, a run of zero pages that are holes is one record of the
 * stream.  These tests check that every page still arrives, that no side
 * allocates memory for it, that the statistics count pages and not records,
 * and that a stream nobody's QEMU would send is refused.
 *
 * Most guests are stopped (-S).  Their RAM is prepared and examined through the
 * file behind it; what a guest would write meanwhile, qtest writes.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/mman.h>

#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-tests.h"
#include "qobject/qdict.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"

/* The pages that are written to during a migration; a prime number */
#define REWRITE_PAGES 12289

#define CAPABILITY "sparse-ram"
#define BACKEND_ID "mem0"
#define MEMFD_LINK "/memfd:"

/* Large, so that what is sent for holes would show; little of it has data */
#define PATTERN_SIZE (1 * GiB)
/* All of it is sent */
#define SMALL_SIZE (64 * MiB)
/* The guest of the framework needs 150 MiB */
#define LIVE_SIZE (256 * MiB)
#define IDLE_SIZE (64 * GiB)

/* What all but RAM may take in the stream: devices, and packets of multifd */
#define MAX_OTHER_BYTES (512 * KiB)
/* Before Linux 6.5, a run is at most 2 MiB long: see cut_hole() */
#define MAX_IDLE_BYTES (2 * MiB)
#define MAX_IDLE_GROWTH (16 * MiB)

/* The record of a zero page; that of a run; the name in front of some */
#define ZERO_PAGE_BYTES (8 + 1)
#define ZERO_RUN_BYTES (8 + 1 + 8)
#define BLOCK_NAME_BYTES (1 + sizeof(BACKEND_ID) - 1)

/* The stream and what is in it; see migration/ram.c and migration/savevm.h */
#define VM_SECTION_START 0x01
#define VM_SECTION_PART 0x02
#define VM_SECTION_FOOTER 0x7e
#define RAM_FLAG_ZERO 0x02
#define RAM_FLAG_EOS 0x10
#define RAM_FLAG_CONTINUE 0x20
#define ZERO_RUN 1

#define HUGETLB_SYSFS "/sys/kernel/mm/hugepages/hugepages-2048kB/"
#define HUGETLB_PAGE_SIZE (2 * MiB)
#define HUGETLB_SIZE (64 * MiB)

typedef enum PageKind {
    PAGE_HOLE,
    PAGE_DATA,
    PAGE_ZERO,      /* populated, but reads as zero */
} PageKind;

typedef enum Mode {
    MODE_PRECOPY,
    MODE_XBZRLE,
    MODE_MULTIFD,
    MODE_MULTIFD_LEGACY,
    MODE_FILE,
    MODE_POSTCOPY,      /* switched to before anything much was sent */
    MODE_PREEMPT,       /* the same */
    MODE_POSTCOPY_PASS, /* switched to when the first pass is over */
} Mode;

typedef struct CapabilityCase {
    /* Path below /migration/sparse/capability */
    const char *name;
    Mode mode;
    /* In bytes; PATTERN_SIZE if 0 */
    uint64_t size;
    /* Both sides */
    const char *opts;
    /* The machine type, if it is not the newest one */
    const char *machine;
    /* One more capability, for both sides */
    const char *capability;
    bool hugetlb;
    bool no_zero_page_detection;
    /* Pages are written to while they are migrated */
    bool rewrite;
    /* A chunk of clear_bmap in target pages, where runs are cut; 0: default */
    uint64_t chunk_pages;
} CapabilityCase;

static const CapabilityCase capability_cases[] = {
    { .name = "precopy" },
    { .name = "xbzrle", .mode = MODE_XBZRLE },
    {
        .name = "multifd/flush-each-section",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=on",
    }, {
        .name = "multifd/flush-each-round",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=off",
    }, {
        .name = "multifd/legacy",
        .mode = MODE_MULTIFD_LEGACY,
    },
    { .name = "file", .mode = MODE_FILE },
    { .name = "return-path", .capability = "return-path" },
    {
        .name = "validate-uuid",
        .opts = "-uuid 6f7b0d1c-4f1e-4a55-9d5b-0d6a6b1d1f27",
        .capability = "validate-uuid",
    },
    { .name = "machine/pc-q35-8.0", .machine = "pc-q35-8.0" },
    { .name = "machine/pc-q35-9.0", .machine = "pc-q35-9.0" },
    {
        .name = "clear-bitmap-shift",
        .opts = "-global migration.x-clear-bitmap-shift=6",
        .chunk_pages = 1 << 6,
    },
    { .name = "hugetlb", .size = HUGETLB_SIZE, .hugetlb = true },
    {
        .name = "no-zero-page-detection",
        .size = SMALL_SIZE,
        .no_zero_page_detection = true,
    },

    /* Holes become data and data zero while they are on their way */
    { .name = "rewrite/precopy", .rewrite = true },
    { .name = "rewrite/xbzrle", .mode = MODE_XBZRLE, .rewrite = true },
    {
        .name = "rewrite/multifd/flush-each-section",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=on",
        .rewrite = true,
    }, {
        .name = "rewrite/multifd/flush-each-round",
        .mode = MODE_MULTIFD,
        .opts = "-global migration.multifd-flush-after-each-section=off",
        .rewrite = true,
    }, {
        .name = "rewrite/multifd/legacy",
        .mode = MODE_MULTIFD_LEGACY,
        .rewrite = true,
    },
};

static const CapabilityCase postcopy_cases[] = {
    {
        .name = "postcopy/at-once",
        .mode = MODE_POSTCOPY,
        .size = SMALL_SIZE,
    }, {
        .name = "postcopy/at-once-preempt",
        .mode = MODE_PREEMPT,
        .size = SMALL_SIZE,
    }, {
        .name = "postcopy/after-first-pass",
        .mode = MODE_POSTCOPY_PASS,
        .size = SMALL_SIZE,
        .rewrite = true,
    },
};

/* The file behind the RAM of one QEMU */
typedef struct GuestRam {
    int fd;
    uint64_t size;
    uint64_t page_size;
} GuestRam;

static const char *tmpfs;

/* Guest RAM */

static uint64_t ram_pages(const GuestRam *ram)
{
    return ram->size / ram->page_size;
}

/* Get hold of the memfd of this size that @who has open */
static void ram_open(GuestRam *ram, QTestState *who, uint64_t size,
                     bool hugetlb)
{
    g_autofree char *dir_path = g_strdup_printf("/proc/%d/fd", qtest_pid(who));
    g_autoptr(GDir) dir = g_dir_open(dir_path, 0, NULL);
    const char *name;

    *ram = (GuestRam) {
        .fd = -1,
        .size = size,
        .page_size = hugetlb ? HUGETLB_PAGE_SIZE : qemu_real_host_page_size(),
    };
    g_assert(dir);
    while (ram->fd < 0 && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(dir_path, name, NULL);
        g_autofree char *target = g_file_read_link(path, NULL);
        struct stat st;

        if (target && g_str_has_prefix(target, MEMFD_LINK) &&
            stat(path, &st) == 0 && st.st_size == size) {
            ram->fd = open(path, O_RDWR | O_CLOEXEC);
        }
    }
    g_assert_cmpint(ram->fd, >=, 0);
}

static uint64_t ram_allocated_bytes(const GuestRam *ram)
{
    struct stat st;

    g_assert_cmpint(fstat(ram->fd, &st), ==, 0);
    return st.st_blocks * 512ULL;
}

/* For hugetlbfs, which says that all of it is data, all pages */
static unsigned long *ram_data_pages(const GuestRam *ram)
{
    unsigned long *pages = bitmap_new(ram_pages(ram));
    off_t data, hole = 0;

    while ((data = lseek(ram->fd, hole, SEEK_DATA)) >= 0) {
        hole = lseek(ram->fd, data, SEEK_HOLE);
        g_assert_cmpint(hole, >, data);
        bitmap_set(pages, data / ram->page_size,
                   (hole - data) / ram->page_size);
    }
    g_assert_cmpint(errno, ==, ENXIO);
    return pages;
}

static void ram_read_page(const GuestRam *ram, uint64_t page, void *buf)
{
    g_assert_cmpint(pread(ram->fd, buf, ram->page_size, page * ram->page_size),
                    ==, ram->page_size);
}

static void ram_write_page(const GuestRam *ram, uint64_t page, const void *buf)
{
    /* Through a mapping, because hugetlbfs has no write() */
    void *map = mmap(NULL, ram->page_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                     ram->fd, page * ram->page_size);

    g_assert(map != MAP_FAILED);
    memcpy(map, buf, ram->page_size);
    munmap(map, ram->page_size);
}

/*
 * The first pages vary from one to the next.  After them there are holes that
 * are long enough to be cut, and one that ends where the block does.
 */
static PageKind page_kind(uint64_t page)
{
    static const PageKind mixed[] = {
        PAGE_DATA, PAGE_HOLE, PAGE_ZERO, PAGE_HOLE, PAGE_ZERO, PAGE_ZERO,
        PAGE_DATA, PAGE_DATA, PAGE_ZERO, PAGE_HOLE, PAGE_HOLE, PAGE_DATA,
        PAGE_HOLE,
    };

    if (page < 4096) {
        return mixed[page % ARRAY_SIZE(mixed)];
    }
    switch (page % 4099) {
    case 1:
        return PAGE_DATA;
    case 2:
        return PAGE_ZERO;
    default:
        return PAGE_HOLE;
    }
}

/* A page of data; no two pages are the same */
static void fill_page(uint64_t *buf, uint64_t page, uint64_t page_size)
{
    uint64_t word = (page + 1) * 0x9e3779b97f4a7c15ULL;

    for (uint64_t i = 0; i < page_size / sizeof(*buf); i++) {
        buf[i] = word + i;
    }
}

static void prepare_source(const GuestRam *ram)
{
    g_autofree uint64_t *buf = g_malloc0(ram->page_size);
    g_autofree uint64_t *zero = g_malloc0(ram->page_size);

    for (uint64_t page = 0; page < ram_pages(ram); page++) {
        PageKind kind = page_kind(page);

        if (kind == PAGE_DATA) {
            fill_page(buf, page, ram->page_size);
            ram_write_page(ram, page, buf);
        } else if (kind == PAGE_ZERO) {
            ram_write_page(ram, page, zero);
        }
    }
}

/*
 * Compare both sides, and the source with what it was prepared with.
 *
 * Returns the pages that are not zero.
 */
static unsigned long *check_content(const GuestRam *src, const GuestRam *dst,
                                    bool rewritten)
{
    g_autofree unsigned long *src_data = ram_data_pages(src);
    g_autofree unsigned long *dst_data = ram_data_pages(dst);
    g_autofree uint64_t *src_buf = g_malloc(src->page_size);
    g_autofree uint64_t *dst_buf = g_malloc(src->page_size);
    g_autofree uint64_t *expected = g_malloc0(src->page_size);
    unsigned long *data = bitmap_new(ram_pages(src));
    uint64_t bad = 0;

    for (uint64_t page = 0; page < ram_pages(src); page++) {
        PageKind kind = page_kind(page);
        bool good;

        if (kind == PAGE_HOLE && !test_bit(page, src_data) &&
            !test_bit(page, dst_data)) {
            continue;
        }
        ram_read_page(src, page, src_buf);
        ram_read_page(dst, page, dst_buf);
        good = memcmp(src_buf, dst_buf, src->page_size) == 0;
        if (!buffer_is_zero(src_buf, src->page_size)) {
            set_bit(page, data);
        }
        if (rewritten) {
            /* The source is what it is */
        } else if (kind == PAGE_DATA) {
            fill_page(expected, page, src->page_size);
            good &= memcmp(expected, src_buf, src->page_size) == 0;
        } else {
            good &= !test_bit(page, data);
        }
        if (!good && bad++ < 10) {
            g_test_message("page %" PRIu64 " differs (kind %d): source 0x%"
                           PRIx64 ", destination 0x%" PRIx64, page, kind,
                           src_buf[0], dst_buf[0]);
        }
    }
    g_assert_cmpuint(bad, ==, 0);
    return data;
}

/* Does the kernel allocate nothing but what is written to? */
static bool allocation_is_exact(const GuestRam *ram)
{
    g_autofree char *shmem = NULL;

    return ram->page_size == HUGETLB_PAGE_SIZE ||
        !g_file_get_contents(
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled", &shmem,
            NULL, NULL) ||
        strstr(shmem, "[never]") || strstr(shmem, "[advise]") ||
        strstr(shmem, "[deny]");
}

/* The destination has memory for each page of data, and for no other one */
static void check_destination_allocation(const GuestRam *dst,
                                         const unsigned long *data)
{
    if (!allocation_is_exact(dst)) {
        g_test_message("allocation not compared: the kernel uses huge pages "
                       "for shared memory");
        return;
    }
    g_assert_cmpuint(ram_allocated_bytes(dst), ==,
                     bitmap_count_one(data, ram_pages(dst)) * dst->page_size);
    if (dst->page_size != HUGETLB_PAGE_SIZE) {
        g_autofree unsigned long *allocated = ram_data_pages(dst);

        g_assert(bitmap_equal(allocated, data, ram_pages(dst)));
    }
}

/* The number of runs of clear bits */
static uint64_t count_holes(const unsigned long *pages, uint64_t size)
{
    uint64_t holes = 0, next = 0;

    while ((next = find_next_zero_bit(pages, size, next)) < size) {
        holes++;
        next = find_next_bit(pages, size, next);
    }
    return holes;
}

/* Starting QEMUs */

static char *guest_opts(uint64_t size, bool hugetlb, const char *machine,
                        const char *more)
{
    g_autofree char *type = machine ? g_strdup_printf("type=%s,", machine)
                                    : g_strdup("");

    /* These options come after those of the framework, and win */
    return g_strdup_printf("-m %" PRIu64 "M -object memory-backend-memfd,"
                           "id=" BACKEND_ID ",share=on,size=%" PRIu64 "%s "
                           "-machine %smemory-backend=" BACKEND_ID " %s",
                           size / MiB, size,
                           hugetlb ? ",hugetlb=on,hugetlbsize=2M" : "",
                           type, more ? more : "");
}

/* Returns whether both sides have been started; stopped, and waiting */
static bool start_guests(QTestState **from, QTestState **to, uint64_t size,
                         bool hugetlb, const char *machine,
                         const char *opts, const char *opts_target)
{
    g_autofree char *both = guest_opts(size, hugetlb, machine, opts);
    g_autofree char *source = g_strdup_printf("%s -S", both);
    /* After postcopy, a destination would start whatever the source did */
    g_autofree char *target = g_strdup_printf("%s -S %s", both,
                                              opts_target ? opts_target : "");
    MigrateStart args = {
        .opts_source = source,
        .opts_target = target,
    };

    return migrate_start(from, to, "defer", &args) == 0;
}

static void set_capability(QTestState *from, QTestState *to, const char *name)
{
    migrate_set_capability(from, name, true);
    migrate_set_capability(to, name, true);
}

/* A path in the directory of the test, which the caller has to free */
static char *temporary_path(const char *name)
{
    return g_strdup_printf("%s/%s", tmpfs, name);
}

/* Migrating */

static uint64_t guest_address(uint64_t page)
{
    return page * qemu_real_host_page_size();
}

/*
 * Write to pages all over the first MiBs, as a guest would: holes become data,
 * data becomes zero.  Every call is different.
 */
static void rewrite_pages(QTestState *from, unsigned round)
{
    for (uint64_t i = 0; i < 256; i++) {
        uint64_t page = (i * 61 + round * 7) % REWRITE_PAGES;

        qtest_memset(from, guest_address(page), (i + round) % 3 ? 0xa5 : 0,
                     qemu_real_host_page_size());
    }
}

static void run_precopy(const CapabilityCase *c, QTestState *from,
                        QTestState *to)
{
    unsigned round = 0;

    if (c->rewrite) {
        /* So that the last round can be waited for, and some others come */
        migrate_set_capability(from, "pause-before-switchover", true);
        migrate_set_parameter_int(from, "max-bandwidth", 32 * MiB);
        migrate_set_parameter_int(from, "downtime-limit", 1);
    } else {
        migrate_ensure_converge(from);
    }
    migrate_qmp(from, to, NULL, NULL, "{}");
    if (c->rewrite) {
        g_autofree char *status = NULL;

        do {
            rewrite_pages(from, round++);
            g_free(status);
            status = migrate_query_status(from);
        } while (g_strcmp0(status, "pre-switchover") != 0 &&
                 get_migration_pass(from) < 4);
        migrate_ensure_converge(from);
        wait_for_migration_status(from, "pre-switchover", NULL);
        rewrite_pages(from, round++);
        g_test_message("rewritten %u times, pass %" PRIu64, round,
                       get_migration_pass(from));
        migrate_continue(from, "pre-switchover");
    }
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
}

static void run_file(QTestState *from, QTestState *to)
{
    g_autofree char *path = temporary_path(FILE_TEST_FILENAME);
    g_autofree char *uri = g_strdup_printf("file:%s", path);

    migrate_ensure_converge(from);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_complete(from);
    migrate_incoming_qmp(to, uri, NULL, "{}");
    wait_for_migration_complete(to);
}

static void run_postcopy(const CapabilityCase *c, QTestState *from,
                         QTestState *to)
{
    bool after_pass = c->mode == MODE_POSTCOPY_PASS;
    unsigned round = 0;

    /* So slowly that it cannot be over before the switch */
    migrate_set_parameter_int(from, "max-bandwidth",
                              after_pass ? 32 * MiB : 4 * KiB);
    migrate_set_parameter_int(from, "downtime-limit", 1);
    migrate_qmp(from, to, NULL, NULL, "{}");
    if (after_pass) {
        while (get_migration_pass(from) < 2) {
            rewrite_pages(from, round++);
        }
        rewrite_pages(from, round);
    } else {
        wait_for_migration_status(from, "active", NULL);
    }
    qtest_qmp_assert_success(from, "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
}

static void migrate_case(const CapabilityCase *c, QTestState *from,
                         QTestState *to)
{
    set_capability(from, to, CAPABILITY);
    if (c->capability) {
        set_capability(from, to, c->capability);
    }
    if (c->no_zero_page_detection) {
        migrate_set_parameter_str(from, "zero-page-detection", "none");
    }

    switch (c->mode) {
    case MODE_FILE:
        run_file(from, to);
        return;
    case MODE_MULTIFD:
    case MODE_MULTIFD_LEGACY:
        migrate_hook_start_precopy_tcp_multifd_common(from, to, "none");
        if (c->mode == MODE_MULTIFD_LEGACY) {
            migrate_set_parameter_str(from, "zero-page-detection", "legacy");
        }
        run_precopy(c, from, to);
        return;
    case MODE_XBZRLE:
        migrate_set_parameter_int(from, "xbzrle-cache-size", 32 * MiB);
        set_capability(from, to, "xbzrle");
        break;
    case MODE_PREEMPT:
    case MODE_POSTCOPY:
    case MODE_POSTCOPY_PASS:
        set_capability(from, to, "postcopy-ram");
        if (c->mode == MODE_PREEMPT) {
            set_capability(from, to, "postcopy-preempt");
        }
        migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
        run_postcopy(c, from, to);
        return;
    default:
        break;
    }
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    run_precopy(c, from, to);
}

/* Each hole is counted once, and takes next to nothing in the stream */
static void check_statistics(const CapabilityCase *c, QTestState *from,
                             const GuestRam *src, const unsigned long *before)
{
    uint64_t target_pages = src->page_size / qemu_real_host_page_size();
    uint64_t pages = ram_pages(src);
    uint64_t hole_pages = 0;
    uint64_t runs = count_holes(before, pages);
    uint64_t holes = read_ram_property_int(from, "holes");
    uint64_t duplicate = read_ram_property_int(from, "duplicate");
    uint64_t normal = read_ram_property_int(from, "normal");
    uint64_t transferred = read_ram_property_int(from, "transferred");
    uint64_t page_bytes = qemu_real_host_page_size();
    uint64_t run_bytes;

    g_test_message("%" PRIu64 " normal, %" PRIu64 " duplicate, %" PRIu64
                   " holes in %" PRIu64 " runs, %" PRIu64 " bytes",
                   normal, duplicate, holes, runs, transferred);

    if (c->no_zero_page_detection) {
        g_assert_cmpuint(holes, ==, 0);
        g_assert_cmpuint(duplicate, ==, 0);
        g_assert_cmpuint(transferred, >, pages * page_bytes);
        return;
    }
    for (uint64_t page = 0; page < pages; page++) {
        /* A huge page that QEMU has not mapped is one if it reads as zero */
        if (!test_bit(page, before) ||
            (c->hugetlb && page_kind(page) == PAGE_ZERO)) {
            hole_pages += target_pages;
        }
    }
    g_assert_cmpuint(holes, ==, hole_pages);
    g_assert_cmpuint(duplicate, >=, holes);
    if (c->chunk_pages) {
        runs += pages / c->chunk_pages;
    }
    run_bytes = runs * (ZERO_RUN_BYTES + BLOCK_NAME_BYTES);
    /*
     * 16: what goes with a page, of multifd too, and its share of the packet.
     * Single zero pages of the block have no name in front of them.
     */
    g_assert_cmpuint(transferred, <, normal * (page_bytes + 16) +
                     (duplicate - holes) * ZERO_PAGE_BYTES +
                     run_bytes + MAX_OTHER_BYTES);
    if (!c->hugetlb && !c->chunk_pages) {
        /* So that the limit above is one that single records would break */
        g_assert_cmpuint(holes * ZERO_PAGE_BYTES, >,
                         run_bytes + MAX_OTHER_BYTES);
    }
}

/* For hugetlbfs, which cannot be asked: what was written by the test */
static unsigned long *populated_pages(const GuestRam *ram, bool hugetlb)
{
    unsigned long *pages;

    if (!hugetlb) {
        return ram_data_pages(ram);
    }
    pages = bitmap_new(ram_pages(ram));
    for (uint64_t page = 0; page < ram_pages(ram); page++) {
        if (page_kind(page) != PAGE_HOLE) {
            set_bit(page, pages);
        }
    }
    return pages;
}

static uint64_t read_sysfs_number(const char *path)
{
    g_autofree char *content = NULL;

    return g_file_get_contents(path, &content, NULL, NULL) ?
        g_ascii_strtoull(content, NULL, 10) : 0;
}

/* Returns why the test cannot run here, or NULL */
static const char *skip_reason(const CapabilityCase *c)
{
    if (c->hugetlb) {
        uint64_t free_pages = read_sysfs_number(HUGETLB_SYSFS
                                                "free_hugepages");
        uint64_t reserved = read_sysfs_number(HUGETLB_SYSFS "resv_hugepages");

        if (free_pages < reserved + 2 * HUGETLB_SIZE / HUGETLB_PAGE_SIZE) {
            return "less than 64 free huge pages of 2 MiB "
                   "(see /proc/sys/vm/nr_hugepages)";
        }
    }
    if (c->machine && !qtest_has_machine(c->machine)) {
        return "QEMU does not have this machine type";
    }
    return NULL;
}

static void test_capability(const void *opaque)
{
    const CapabilityCase *c = opaque;
    const char *reason = skip_reason(c);
    uint64_t size = c->size ? c->size : PATTERN_SIZE;
    bool postcopy = c->mode >= MODE_POSTCOPY;
    g_autofree unsigned long *before = NULL;
    g_autofree unsigned long *data = NULL;
    QTestState *from, *to;
    GuestRam src, dst;

    if (reason) {
        g_test_skip(reason);
        return;
    }
    if (!start_guests(&from, &to, size, c->hugetlb, c->machine, c->opts,
                      NULL)) {
        return;
    }
    ram_open(&src, from, size, c->hugetlb);
    ram_open(&dst, to, size, c->hugetlb);
    prepare_source(&src);
    before = populated_pages(&src, c->hugetlb);

    migrate_case(c, from, to);

    if (!c->rewrite) {
        /* Looking at a hole of the source must not have filled it */
        g_assert_cmpuint(ram_allocated_bytes(&src), ==,
                         bitmap_count_one(before, ram_pages(&src)) *
                         src.page_size);
    }
    if (!c->rewrite && !postcopy) {
        check_statistics(c, from, &src, before);
    }
    if (c->no_zero_page_detection) {
        g_assert_cmpuint(ram_allocated_bytes(&dst), ==, size);
    }
    data = check_content(&src, &dst, c->rewrite);
    /* After the switch, UFFDIO_ZEROPAGE allocates pages of shared memory */
    if (!postcopy && !c->no_zero_page_detection) {
        check_destination_allocation(&dst, data);
    }

    close(src.fd);
    close(dst.fd);
    migrate_end(from, to, false);
}

static void test_idle(void)
{
    QTestState *from, *to;
    uint64_t src_before, dst_before, transferred;
    GuestRam src, dst;

    if (!start_guests(&from, &to, IDLE_SIZE, false, NULL, NULL, NULL)) {
        return;
    }
    ram_open(&src, from, IDLE_SIZE, false);
    ram_open(&dst, to, IDLE_SIZE, false);
    src_before = ram_allocated_bytes(&src);
    dst_before = ram_allocated_bytes(&dst);

    migrate_case(&(CapabilityCase) { }, from, to);

    transferred = read_ram_property_int(from, "transferred");
    g_test_message("%" PRIu64 " bytes for %" PRIu64 " holes", transferred,
                   read_ram_property_int(from, "holes"));
    g_assert_cmpuint(transferred, <, MAX_IDLE_BYTES);
    g_assert_cmpuint(read_ram_property_int(from, "holes"), ==,
                     (IDLE_SIZE - src_before) / qemu_real_host_page_size());
    g_assert_cmpuint(ram_allocated_bytes(&src), <=,
                     src_before + MAX_IDLE_GROWTH);
    g_assert_cmpuint(ram_allocated_bytes(&dst), <=,
                     dst_before + MAX_IDLE_GROWTH);

    close(src.fd);
    close(dst.fd);
    migrate_end(from, to, false);
}

/*
 * The guest runs, and the framework looks at what it finds on the destination.
 * It also touches what arrived as a hole before the switch, which the source
 * does not send again.
 */

static void *start_hook_capability(QTestState *from, QTestState *to)
{
    set_capability(from, to, CAPABILITY);
    return NULL;
}

static void test_postcopy_live(bool preempt)
{
    g_autofree char *opts = guest_opts(LIVE_SIZE, false, NULL, NULL);
    MigrateCommon args = {
        .start.opts_source = opts,
        .start.opts_target = opts,
        .start_hook = start_hook_capability,
        .postcopy_preempt = preempt,
    };

    test_postcopy_common(&args);
}

static void test_postcopy_live_plain(void)
{
    test_postcopy_live(false);
}

static void test_postcopy_live_preempt(void)
{
    test_postcopy_live(true);
}

/* What the destination has to say */

static char *stderr_redirection(const char *path)
{
    return g_strdup_printf("2>%s", path);
}

static char *read_stderr(const char *path)
{
    char *text = NULL;

    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    unlink(path);
    g_test_message("destination's stderr: %s", text);
    return text;
}

static void test_mismatch(bool source_has_it)
{
    const char *ungoals[] = { "completed", NULL };
    g_autofree char *stderr_path = temporary_path("dest_stderr");
    g_autofree char *redirection = stderr_redirection(stderr_path);
    g_autofree char *text = NULL;
    g_autofree unsigned long *before = NULL;
    g_autofree unsigned long *after = NULL;
    QTestState *from, *to;
    GuestRam src;

    if (!start_guests(&from, &to, SMALL_SIZE, false, NULL, NULL,
                      redirection)) {
        return;
    }
    ram_open(&src, from, SMALL_SIZE, false);
    prepare_source(&src);
    before = ram_data_pages(&src);

    migrate_set_capability(source_has_it ? from : to, CAPABILITY, true);
    migrate_incoming_qmp(to, "tcp:127.0.0.1:0", NULL, "{}");
    migrate_set_parameter_int(from, "max-bandwidth", 4 * KiB);
    migrate_qmp(from, to, NULL, NULL, "{}");
    wait_for_migration_status(from, "failed", ungoals);
    qtest_set_expected_status(to, EXIT_FAILURE);
    qtest_wait_qemu(to);

    text = read_stderr(stderr_path);
    g_assert(strstr(text, CAPABILITY));
    g_assert(strstr(text, source_has_it ? "is off" : "is on"));

    /* The source has lost nothing, and can go on */
    after = ram_data_pages(&src);
    g_assert(bitmap_equal(before, after, ram_pages(&src)));
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");

    close(src.fd);
    migrate_end(from, to, false);
}

static void test_mismatch_source_on(void)
{
    test_mismatch(true);
}

static void test_mismatch_destination_on(void)
{
    test_mismatch(false);
}

/* Combinations that are refused */

static QDict *try_capabilities(QTestState *who, const char *one,
                               const char *two)
{
    return qtest_qmp(who, "{ 'execute': 'migrate-set-capabilities',"
                     "'arguments': { 'capabilities': ["
                     "{ 'capability': %s, 'state': true },"
                     "{ 'capability': %s, 'state': true } ] } }", one, two);
}

/* Returns the description of the error, or NULL if there is none */
static const char *error_desc(QDict *rsp)
{
    QDict *error = qdict_get_qdict(rsp, "error");

    return error ? qdict_get_str(error, "desc") : NULL;
}

static void check_refusal(QDict *rsp, const char *other)
{
    const char *desc = error_desc(rsp);
    g_autofree char *lower = NULL;

    g_assert(desc);
    g_test_message("%s", desc);
    lower = g_ascii_strdown(desc, -1);
    g_assert(strstr(lower, CAPABILITY));
    g_assert(strstr(lower, other));
}

static void test_refused(const void *opaque)
{
    const char *other = opaque;
    QTestState *who = qtest_init("-machine none");
    QDict *rsp = try_capabilities(who, other, other);

    if (error_desc(rsp)) {
        g_test_skip("this QEMU or host does not have the other capability");
        goto out;
    }
    /* While the other one is on, */
    qobject_unref(rsp);
    rsp = try_capabilities(who, CAPABILITY, CAPABILITY);
    check_refusal(rsp, other);
    migrate_set_capability(who, other, false);
    /* when both are set at the same time, */
    qobject_unref(rsp);
    rsp = try_capabilities(who, other, CAPABILITY);
    check_refusal(rsp, other);
    /* and the other one while this one is on */
    migrate_set_capability(who, CAPABILITY, true);
    qobject_unref(rsp);
    rsp = try_capabilities(who, other, other);
    check_refusal(rsp, other);
out:
    qobject_unref(rsp);
    qtest_quit(who);
}

/* Streams that nobody sends */

typedef struct HostileCase {
    const char *name;
    /* The record: page header without flags, and flags */
    uint64_t offset;
    bool no_name;           /* RAM_FLAG_CONTINUE, without a block before */
    const char *block;      /* BACKEND_ID if NULL */
    uint8_t value;
    uint64_t npages;
    /* Bytes of the record that are sent; all if 0 */
    size_t length;
    bool capability_off;
    /* A run that is good is in front of it */
    bool after_run;
    /* What the destination says */
    const char *message;
} HostileCase;

#define LAST_PAGE (SMALL_SIZE - 4 * KiB)
#define HEADER_BYTES (8 + 1 + sizeof(BACKEND_ID) - 1)

static const HostileCase hostile_cases[] = {
    {
        .name = "no-pages",
        .value = ZERO_RUN,
        .message = "RAM block 'mem0': a run of 0 zero pages at offset 0x0 "
                   "is not between 1 and 16384",
    }, {
        .name = "beyond-block",
        .value = ZERO_RUN,
        .npages = SMALL_SIZE / (4 * KiB) + 1,
        .message = "RAM block 'mem0': a run of 16385 zero pages at offset 0x0 "
                   "is not between 1 and 16384",
    }, {
        .name = "beyond-block-from-last-page",
        .offset = LAST_PAGE,
        .value = ZERO_RUN,
        .npages = 2,
        .message = "RAM block 'mem0': a run of 2 zero pages at offset "
                   "0x3fff000 is not between 1 and 1",
    }, {
        .name = "all-ones",
        .value = ZERO_RUN,
        .npages = UINT64_MAX,
        .message = "RAM block 'mem0': a run of 18446744073709551615 zero "
                   "pages at offset 0x0 is not between 1 and 16384",
    }, {
        /* 2^64 bytes, and one page more, which is 4096 bytes if not checked */
        .name = "overflow",
        .value = ZERO_RUN,
        .npages = (1ULL << 52) + 1,
        .message = "RAM block 'mem0': a run of 4503599627370497 zero pages at "
                   "offset 0x0 is not between 1 and 16384",
    }, {
        .name = "end-of-block",
        .offset = SMALL_SIZE,
        .value = ZERO_RUN,
        .npages = 1,
        .message = "Illegal RAM offset 4000000",
    }, {
        .name = "far-offset",
        .offset = -4096ULL,
        .value = ZERO_RUN,
        .npages = 2,
        .message = "Illegal RAM offset fffffffffffff000",
    }, {
        .name = "unknown-block",
        .block = "mem1",
        .value = ZERO_RUN,
        .npages = 1,
        .message = "Can't find block mem1",
    }, {
        .name = "no-block",
        .no_name = true,
        .value = ZERO_RUN,
        .npages = 1,
        .message = "Ack, bad migration stream!",
    }, {
        .name = "truncated-before-count",
        .value = ZERO_RUN,
        .length = HEADER_BYTES + 1,
        .message = "Reading a run of zero pages of RAM block 'mem0' failed",
    }, {
        .name = "truncated-count",
        .value = ZERO_RUN,
        .npages = 1,
        .length = HEADER_BYTES + 1 + 7,
        .message = "Reading a run of zero pages of RAM block 'mem0' failed",
    }, {
        .name = "value",
        .value = 2,
        .npages = 1,
        .message = "Found a zero page with value 2",
    }, {
        .name = "capability-off",
        .value = ZERO_RUN,
        .npages = 1,
        .capability_off = true,
        .message = "Found a zero page with value 1",
    }, {
        .name = "after-a-run",
        .value = ZERO_RUN,
        .npages = 1ULL << 40,
        .after_run = true,
        .message = "RAM block 'mem0': a run of 1099511627776 zero pages at "
                   "offset 0x0 is not between 1 and 16384",
    },
};

static void put_be64(GByteArray *stream, uint64_t value)
{
    uint8_t bytes[8];

    stq_be_p(bytes, value);
    g_byte_array_append(stream, bytes, sizeof(bytes));
}

static void put_byte(GByteArray *stream, uint8_t value)
{
    g_byte_array_append(stream, &value, 1);
}

static void put_run(GByteArray *stream, const char *block, uint64_t offset,
                    uint8_t value, uint64_t npages)
{
    put_be64(stream, offset | RAM_FLAG_ZERO | (block ? 0 : RAM_FLAG_CONTINUE));
    if (block) {
        put_byte(stream, strlen(block));
        g_byte_array_append(stream, (const uint8_t *)block, strlen(block));
    }
    put_byte(stream, value);
    if (value) {
        put_be64(stream, npages);
    }
}

/* Returns where @needle is in @stream, from @start on */
static size_t find_bytes(const GByteArray *stream, size_t start,
                         const void *needle, size_t length)
{
    const uint8_t *found = memmem(stream->data + start, stream->len - start,
                                  needle, length);

    g_assert(found);
    return found - stream->data;
}

/*
 * Cut the stream after the header of RAM's first section of pages.  Until
 * there, it has the configuration and the sizes of all blocks.
 */
static void cut_at_pages(GByteArray *stream)
{
    static const uint8_t ram[] = "\003ram\0\0\0\0\0\0\0\004";
    size_t name = find_bytes(stream, 0, ram, sizeof(ram) - 1);
    uint8_t part[5] = { VM_SECTION_PART };
    size_t pos = name;

    g_assert_cmpint(stream->data[name - 5], ==, VM_SECTION_START);
    memcpy(part + 1, &stream->data[name - 4], 4);
    do {
        pos = find_bytes(stream, pos + 1, part, sizeof(part));
    } while (stream->data[pos - 5] != VM_SECTION_FOOTER);
    g_byte_array_set_size(stream, pos + sizeof(part));
}

/* Returns the start of a real stream */
static GByteArray *capture_stream(QTestState *from, QTestState *to,
                                  const char *uri, const char *path)
{
    GByteArray *stream;
    gsize length;
    char *data;

    migrate_ensure_converge(from);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_complete(from);
    g_assert(g_file_get_contents(path, &data, &length, NULL));
    stream = g_byte_array_new_take((uint8_t *)data, length);
    cut_at_pages(stream);
    return stream;
}

static void put_hostile(GByteArray *stream, const HostileCase *c)
{
    size_t start;

    if (c->after_run) {
        put_run(stream, BACKEND_ID, 0, ZERO_RUN, SMALL_SIZE / (4 * KiB));
    }
    start = stream->len;
    put_run(stream,
            c->no_name ? NULL : c->block ? c->block : BACKEND_ID,
            c->offset, c->value, c->npages);
    if (c->length) {
        g_byte_array_set_size(stream, start + c->length);
    } else {
        put_be64(stream, RAM_FLAG_EOS);
    }
}

static void test_hostile(const void *opaque)
{
    const HostileCase *c = opaque;
    g_autofree char *path = temporary_path(FILE_TEST_FILENAME);
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    g_autofree char *stderr_path = temporary_path("dest_stderr");
    g_autofree char *redirection = stderr_redirection(stderr_path);
    g_autofree char *text = NULL;
    g_autofree char *canary = g_malloc(4 * KiB);
    g_autofree char *buf = g_malloc(4 * KiB);
    g_autoptr(GByteArray) stream = NULL;
    uint64_t allocated;
    QTestState *from, *to;
    GuestRam dst;

    if (!start_guests(&from, &to, SMALL_SIZE, false, NULL, NULL,
                      redirection)) {
        return;
    }
    /* In the last page, which only "after-a-run" may clear */
    ram_open(&dst, to, SMALL_SIZE, false);
    memset(canary, 0x5a, 4 * KiB);
    ram_write_page(&dst, ram_pages(&dst) - 1, canary);
    allocated = ram_allocated_bytes(&dst);

    if (!c->capability_off) {
        set_capability(from, to, CAPABILITY);
    }
    stream = capture_stream(from, to, uri, path);
    put_hostile(stream, c);
    g_assert(g_file_set_contents(path, (char *)stream->data, stream->len,
                                 NULL));
    /* A signal would be another status */
    qtest_set_expected_status(to, EXIT_FAILURE);
    migrate_incoming_qmp(to, uri, NULL, "{}");
    qtest_wait_qemu(to);

    text = read_stderr(stderr_path);
    g_assert(strstr(text, c->message));
    g_assert_cmpuint(ram_allocated_bytes(&dst), <=, allocated);
    if (!c->after_run) {
        ram_read_page(&dst, ram_pages(&dst) - 1, buf);
        g_assert(memcmp(buf, canary, 4 * KiB) == 0);
    }
    close(dst.fd);
    migrate_end(from, to, false);
}

static void add_cases(const CapabilityCase *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        g_autofree char *path =
            g_strdup_printf("/migration/sparse/capability/%s", cases[i].name);

        qtest_add_data_func(path, &cases[i], test_capability);
    }
}

void migration_test_add_sparse_ram(MigrationTestEnv *env)
{
    static const char *const incompatible[] = {
        "mapped-ram", "background-snapshot", "x-colo",
    };

    tmpfs = env->tmpfs;

    add_cases(capability_cases, ARRAY_SIZE(capability_cases));
    if (env->has_uffd) {
        add_cases(postcopy_cases, ARRAY_SIZE(postcopy_cases));
    }
    if (sizeof(void *) > 4) {
        migration_test_add("/migration/sparse/capability/idle", test_idle);
    }
    migration_test_add("/migration/sparse/capability/mismatch/source-on",
                       test_mismatch_source_on);
    migration_test_add("/migration/sparse/capability/mismatch/destination-on",
                       test_mismatch_destination_on);
    for (size_t i = 0; i < ARRAY_SIZE(incompatible); i++) {
        g_autofree char *path =
            g_strdup_printf("/migration/sparse/capability/refused/%s",
                            incompatible[i]);

        qtest_add_data_func(path, incompatible[i], test_refused);
    }
    for (size_t i = 0; i < ARRAY_SIZE(hostile_cases); i++) {
        g_autofree char *path =
            g_strdup_printf("/migration/sparse/capability/hostile/%s",
                            hostile_cases[i].name);

        qtest_add_data_func(path, &hostile_cases[i], test_hostile);
    }

    if (env->full_set && env->has_uffd) {
        migration_test_add("/migration/sparse/capability/postcopy/live/plain",
                           test_postcopy_live_plain);
        migration_test_add("/migration/sparse/capability/postcopy/live/preempt",
                           test_postcopy_live_preempt);
    }
}
