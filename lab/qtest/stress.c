/*
 * QTest testcases for sparse guest RAM: a guest that writes all the time
 *
 * A hole is sent as zero without reading it.  What the source has to get right
 * is the order: it may look for holes only after it has cleared the dirty bits
 * of the pages, and has to forget what it saw when the dirty bitmap is synced.
 * If not, a page that is written at the wrong moment is lost for ever.
 *
 * Here that moment comes as often as possible.  The guest, sparse-writer.S,
 * writes to pages in pseudo-random order.  The first round is slow, so that the
 * rate limit stops it within holes.  The guest writes to what is behind it, and
 * again and again into the hole that it has stopped in, in front of it, with a
 * sync of the dirty bitmap before it goes on.  Then come many fast rounds.
 * (With the capability sparse-ram, no round is slow: there is next to nothing
 * to be limited.  The guest writes to all of its pages during the first one,
 * while runs of holes and of pages that are read are taken from the bitmap.)
 * In the end all RAM of both sides is compared, and the guest, now on the
 * destination, is asked to check it, too.
 *
 * The full set goes through all modes with each way to log what is dirty: TCG,
 * KVM, which clears dirty bits in chunks, and KVM with dirty rings; with the
 * smallest chunks and those of the default size; with pages that are populated
 * and zero before the guest writes to them; and with a guest that auto-converge
 * slows down.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "sparse-lab.h"
#include "sparse-writer.h"

#define PAGE_SIZE (4 * KiB)

/* The least that a PC can have */
#define FIRMWARE_SIZE (64 * KiB)

/*
 * QEMU looks at the rate limit only when it has filled a buffer of 32 KiB, so
 * this is how many pages that are zero, 9 bytes each, it sends at least before
 * it stops.
 */
#define PAGES_IN_A_ROW (32 * KiB / 9)

/*
 * What the guest does not touch: the test makes a slice of it dirty for each
 * sync.  That must be more pages than are sent meanwhile.
 */
#define SCRATCH_BASE (8 * MiB)
#define SCRATCH_SLICE (24 * MiB)
QEMU_BUILD_BUG_ON(SCRATCH_SLICE / PAGE_SIZE < PAGES_IN_A_ROW * 3 / 2);

/* What the guest writes to begins behind that, and ends here */
#define WRITER_END_GAP (16 * MiB)

/*
 * Ticks of a time-stamp counter of 2 to 4 GHz.  Slow enough to leave holes, and
 * fast enough that there is something dirty at each sync.
 */
#define WRITER_TURN_SLOW 700000
#define WRITER_TURN_FAST 5000

/*
 * How many pages in a row, a power of 2, are populated or not.  That begins one
 * page before a chunk ends, because a run of which the last chunk is complete
 * would not show that the run has to end with a chunk.
 */
#define POPULATED_PAGES 512
#define POPULATED_SKEW 1

/* Smallest, and the default of QEMU */
#define SHIFT_MIN 6
#define SHIFT_DEFAULT 18

/*
 * How many pages, from the page it is told, the guest writes to most.  Some of
 * them are sent before the sync that it is about.
 */
#define FOCUS_PAGES 16384
QEMU_BUILD_BUG_ON(FOCUS_PAGES < PAGES_IN_A_ROW * 3);

/* Bytes a second; the slow one means PAGES_IN_A_ROW each RATE_LIMIT_PERIOD */
#define SLOW_BANDWIDTH (64 * KiB)
#define FAST_BANDWIDTH (1 * GiB)

/* Less than gets dirty, also with a KVM that is slow */
#define THROTTLED_BANDWIDTH (2 * MiB)

/* The rate limit is kept on average over this time */
#define RATE_LIMIT_PERIOD (G_USEC_PER_SEC / 10)

#define TIMEOUT (300 * G_USEC_PER_SEC)

#define MULTIFD(...) .parameters = { "multifd-channels 4", __VA_ARGS__ }
#define LEGACY "zero-page-detection legacy"
#define POSTCOPY(...) .transport = SPARSE_POSTCOPY, \
    .capabilities = { "postcopy-ram", "postcopy-blocktime", __VA_ARGS__ }

static const SparseWay xbzrle = {
    .name = "xbzrle",
    .capabilities = { "xbzrle" },
    /* As much as the guest writes to most */
    .parameters = { "xbzrle-cache-size 67108864" },
};
static const SparseWay multifd = {
    .name = "multifd", .capabilities = { "multifd" }, MULTIFD(),
};
static const SparseWay multifd_legacy = {
    .name = "multifd-legacy", .capabilities = { "multifd" }, MULTIFD(LEGACY),
};
static const SparseWay runs = {
    .name = "sparse-ram", .capabilities = { "sparse-ram" },
};
/* The same, and data through other channels */
static const SparseWay runs_multifd = {
    .name = "sparse-ram-multifd",
    .capabilities = { "sparse-ram", "multifd" },
    .parameters = { LEGACY },
};
static const SparseWay postcopy = { .name = "plain", POSTCOPY() };
static const SparseWay postcopy_preempt = {
    .name = "preempt", POSTCOPY("postcopy-preempt"),
};
static const SparseWay postcopy_multifd = {
    .name = "multifd", POSTCOPY("multifd"),
};
static const SparseWay postcopy_multifd_runs = {
    .name = "multifd-capability", POSTCOPY("multifd", "sparse-ram"),
};
static const SparseWay postcopy_runs = {
    .name = "capability", POSTCOPY("sparse-ram"),
};
static const SparseWay postcopy_preempt_runs = {
    .name = "capability-preempt", POSTCOPY("sparse-ram", "postcopy-preempt"),
};

/* How the guest's writes are logged */
typedef struct StressAccel {
    const char *name;
    /* Of the option -accel */
    const char *options;
    /* SPARSE_WRITER_TURN when the guest is to be fast */
    uint32_t turn_fast;
} StressAccel;

static const StressAccel accel_tcg = { "tcg", "tcg", WRITER_TURN_FAST };
/* The only one that keeps its dirty bits until they are cleared */
static const StressAccel accel_kvm = { "kvm", "kvm", WRITER_TURN_FAST };
/*
 * A large ring and a slow guest: a KVM is known that loses writes, with any
 * QEMU, when a ring gets full.  It logs a page as often as it is written to.
 */
static const StressAccel accel_kvm_ring = {
    "kvm-ring", "kvm,dirty-ring-size=65536", WRITER_TURN_SLOW
};

/* What is done to a guest besides migrating it */
typedef enum StressVariant {
    STRESS_PLAIN,
    /* Half of the pages are zero, but populated, before it writes to them */
    STRESS_POPULATED,
    /* Auto-converge slows it down, and not just for show */
    STRESS_THROTTLED,
    STRESS_VARIANT__MAX,
} StressVariant;

/* In front of "shift-N" */
static const char *const variant_names[STRESS_VARIANT__MAX] = {
    [STRESS_PLAIN] = "",
    [STRESS_POPULATED] = "populated-",
    [STRESS_THROTTLED] = "throttled-",
};

typedef struct StressTest {
    /* Path below /migration/sparse/stress */
    const char *name;
    const StressAccel *accel;
    const SparseWay *way;
    StressVariant variant;
    /* x-clear-bitmap-shift */
    unsigned shift;
    /* RAM of the guest, in bytes */
    uint64_t size;
    /* How many syncs there are in the middle of the first round */
    unsigned slow_syncs;
    /* How many syncs are waited for after it */
    unsigned fast_syncs;
    /*
     * Guest RAM is not the first RAM block, and so not at offset 0 of the dirty
     * bits of TCG
     */
    bool second_block;
    /* The channel of postcopy breaks, and is recovered */
    bool recover;
} StressTest;

/* The guest's serial port, and what it has said so far */
typedef struct Serial {
    char *path;
    gsize beats;
    gsize verified;
} Serial;

/* A test that runs */
typedef struct Stress {
    const StressTest *test;
    /* Both sides of the guest, which runs */
    SparseGuests guests;
    QTestMigrationState src_state;
    QTestMigrationState dst_state;
    Serial src_serial;
    Serial dst_serial;
    char *firmware;
} Stress;

static uint64_t writer_base(const StressTest *test)
{
    return SCRATCH_BASE + test->slow_syncs * SCRATCH_SLICE;
}

static uint64_t writer_pages(const StressTest *test)
{
    return (test->size - writer_base(test) - WRITER_END_GAP) / PAGE_SIZE;
}

/* With the capability sparse-ram */
static bool has_runs(const StressTest *test)
{
    return test->way == &runs || test->way == &runs_multifd;
}

static void put_parameter(uint8_t *code, unsigned address, uint32_t value)
{
    stl_le_p(code + address - SPARSE_WRITER_LOAD, value);
}

/* The guest's firmware: the code is at the end of it */
static char *create_firmware(const StressTest *test)
{
    char *path = g_strdup_printf("%s/sparse-writer", sparse_env->tmpfs);
    g_autofree uint8_t *rom = g_malloc0(FIRMWARE_SIZE);
    size_t length = sparse_writer_end - sparse_writer;
    uint8_t *code = rom + FIRMWARE_SIZE - length;

    memcpy(code, sparse_writer, length);
    put_parameter(code, SPARSE_WRITER_BASE, writer_base(test));
    put_parameter(code, SPARSE_WRITER_PAGES, FOCUS_PAGES);
    put_parameter(code, SPARSE_WRITER_FOCUS_MASK, FOCUS_PAGES - 1);
    put_parameter(code, SPARSE_WRITER_TURN, WRITER_TURN_SLOW);
    put_parameter(code, SPARSE_WRITER_SEED, g_test_rand_int());
    g_assert(g_file_set_contents(path, (char *)rom, FIRMWARE_SIZE, NULL));
    return path;
}

static void read_serial(Serial *serial)
{
    g_autofree char *text = NULL;
    gsize length, i;

    serial->beats = serial->verified = 0;
    if (!g_file_get_contents(serial->path, &text, &length, NULL)) {
        return;
    }
    for (i = 0; i < length; i++) {
        serial->beats += text[i] == 'B';
        serial->verified += text[i] == 'V';
        if (text[i] == 'X') {
            g_error("the guest has found a page that is wrong (%s)",
                    serial->path);
        }
    }
}

static void check_timeout(int64_t start, const char *what)
{
    if (g_get_monotonic_time() - start > TIMEOUT) {
        g_error("timeout while waiting for %s", what);
    }
}

static void wait_for_beats(Serial *serial, gsize more)
{
    int64_t start = g_get_monotonic_time();
    gsize goal;

    read_serial(serial);
    goal = serial->beats + more;
    while (serial->beats < goal) {
        check_timeout(start, "the guest to write");
        g_usleep(10000);
        read_serial(serial);
    }
}

static QTestState *start_guest(const Stress *stress, const char *env,
                               const GuestRam *ram, const char *serial,
                               QTestMigrationState *state, const char *opts)
{
    const StressTest *test = stress->test;
    g_autofree char *machine =
        resolve_machine_version("q35", "QTEST_QEMU_BINARY_SRC",
                                "QTEST_QEMU_BINARY_DST");
    g_autofree char *memory = guest_ram_opts(ram, NULL);
    g_autofree char *args = g_strdup_printf(
        "-accel %s -machine %s %s %s "
        "-global migration.x-clear-bitmap-shift=%u "
        "-nodefaults -bios %s -serial file:%s %s %s",
        test->accel->options, machine,
        test->second_block ? "-object memory-backend-ram,id=pad,size=1G" : "",
        memory, test->shift, stress->firmware, serial, opts,
        /* That the channel breaks is not passed over in silence */
        test->recover ? "2>/dev/null" : "");
    QList *capabilities = qlist_new();
    QTestState *who;

    /* For migrate-recover */
    qlist_append_str(capabilities, "oob");
    who = qtest_init_ext(env, args, capabilities, true);
    qobject_unref(capabilities);
    qtest_qmp_set_event_callback(who, migrate_watch_for_events, state);
    migrate_set_capability(who, "events", true);
    return who;
}

static void stress_end(Stress *stress)
{
    SparseGuests *guests = &stress->guests;

    qtest_quit(guests->from);
    qtest_quit(guests->to);
    guest_ram_close(&guests->src);
    guest_ram_close(&guests->dst);
    unlink(stress->firmware);
    unlink(stress->src_serial.path);
    unlink(stress->dst_serial.path);
    g_free(stress->firmware);
    g_free(stress->src_serial.path);
    g_free(stress->dst_serial.path);
}

/* Returns false if the test has to be skipped, after saying why */
static bool stress_start(Stress *stress, const StressTest *test)
{
    SparseGuests *guests = &stress->guests;
    bool postcopy = test->way->transport == SPARSE_POSTCOPY;

    *stress = (Stress) {
        .test = test,
        .firmware = create_firmware(test),
        .src_serial.path = g_strdup_printf("%s/src_serial", sparse_env->tmpfs),
        .dst_serial.path = g_strdup_printf("%s/dest_serial", sparse_env->tmpfs),
    };
    guest_ram_init(&guests->src, &sparse_memfd, test->size);
    guest_ram_init(&guests->dst, &sparse_memfd, test->size);
    guests->from = start_guest(stress, "QTEST_QEMU_BINARY_SRC", &guests->src,
                               stress->src_serial.path, &stress->src_state,
                               "-S");
    /* After postcopy, the guest goes on at once */
    guests->to = start_guest(stress, "QTEST_QEMU_BINARY_DST", &guests->dst,
                             stress->dst_serial.path, &stress->dst_state,
                             postcopy ? "-incoming defer"
                                      : "-S -incoming defer");
    guest_ram_open(&guests->src, guests->from);
    guest_ram_open(&guests->dst, guests->to);
    if (!sparse_set_way(guests, test->way)) {
        stress_end(stress);
        return false;
    }
    migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
    return true;
}

/*
 * Auto-converge syncs the dirty bitmap on its own, from another thread and in
 * the middle of a round, if that has not been done for 5 seconds.  It has
 * nothing else to do here until throttled_rounds().
 */
static void set_auto_converge(QTestState *from)
{
    migrate_set_capability(from, "auto-converge", true);
    migrate_set_parameter_int(from, "cpu-throttle-initial", 1);
    migrate_set_parameter_int(from, "max-cpu-throttle", 1);
}

/*
 * From which number of bytes on that are left to be sent the dirty bitmap is
 * synced; if it is not more than that afterwards, the guest is stopped.
 */
static void set_threshold(QTestState *from, uint64_t bytes)
{
    /*
     * The downtime-limit is one second.  1000 bytes are less than a page and as
     * good as nothing, but nothing would not be: then QEMU ends the migration
     * after the first round without another look.
     */
    migrate_set_parameter_int(from, "avail-switchover-bandwidth",
                              MAX(bytes, 1000));
}

static uint64_t syncs(QTestState *from)
{
    return read_ram_property_int(from, "dirty-sync-count");
}

/* It may be still being set up */
static bool is_active(QTestState *from)
{
    g_autofree char *status = migrate_query_status(from);

    g_assert_cmpstr(status, !=, "failed");
    return !g_str_equal(status, "completed");
}

static void write_parameter(QTestState *who, unsigned address, uint32_t value)
{
    qtest_writel(who, address, value);
}

/* The first of the guest's pages that the first round has not come to yet */
static uint32_t first_round_page(const StressTest *test, QTestState *from)
{
    /* Each page is sent once, and the guest's RAM is the first RAM block */
    uint64_t page = read_ram_property_int(from, "duplicate") +
                    read_ram_property_int(from, "normal");
    uint64_t first = writer_base(test) / PAGE_SIZE;

    return page > first ? page - first : 0;
}

static void set_bandwidth(QTestState *from, uint64_t bandwidth)
{
    migrate_set_parameter_int(from, "max-bandwidth", bandwidth);
}

/* Let the guest write behind the first round only. Returns where that is. */
static uint32_t write_behind(const StressTest *test, QTestState *from)
{
    uint32_t page = first_round_page(test, from);

    write_parameter(from, SPARSE_WRITER_FOCUS, 0);
    write_parameter(from, SPARSE_WRITER_PAGES, MAX(page, FOCUS_PAGES));
    return page;
}

/*
 * The rate limit has made the first round stop in the middle of a large hole.
 * Let the guest write into that, and have the dirty bitmap synced before it
 * goes on.  That there is little left to be sent makes QEMU sync it.  That
 * there is more after it, because of the slice, makes QEMU go on.
 */
static void strike(const StressTest *test, QTestState *from, uint64_t slice)
{
    int64_t start = g_get_monotonic_time();
    uint64_t before = syncs(from);
    uint32_t page = first_round_page(test, from);

    write_parameter(from, SPARSE_WRITER_FOCUS, page);
    qtest_memset(from, slice, 1, SCRATCH_SLICE);
    set_threshold(from, read_ram_property_int(from, "remaining"));
    while (syncs(from) == before && is_active(from)) {
        check_timeout(start, "the dirty bitmap to be synced");
        g_usleep(1000);
    }
    set_threshold(from, 0);
    write_behind(test, from);

    /* Get behind what has been written, and into the next hole */
    while (first_round_page(test, from) < page + FOCUS_PAGES &&
           is_active(from)) {
        check_timeout(start, "the first round");
        g_usleep(10000);
    }
}

/*
 * A first round that takes its time, with syncs in the middle of it
 *
 * On a busy host the round goes on while the test does not, and then there is
 * less left to be sent than the test has asked to stop at.  Returns whether the
 * migration is still active.
 */
static bool slow_round(const StressTest *test, QTestState *from)
{
    int64_t start = g_get_monotonic_time();
    uint64_t slice = SCRATCH_BASE;
    uint64_t pages = writer_pages(test), page;
    unsigned strikes;

    while ((page = write_behind(test, from)) < pages) {
        check_timeout(start, "the first round");
        if (!is_active(from)) {
            return false;
        }
        if (page > FOCUS_PAGES && page + 2 * FOCUS_PAGES < pages &&
            slice < writer_base(test)) {
            strike(test, from, slice);
            slice += SCRATCH_SLICE;
        }
        g_usleep(10000);
    }
    strikes = (slice - SCRATCH_BASE) / SCRATCH_SLICE;
    g_test_message("%u of %u strikes, %" PRIu64 " syncs in a first round of "
                   "%.1f seconds, which found %" PRId64 " holes", strikes,
                   test->slow_syncs, syncs(from),
                   (g_get_monotonic_time() - start) / (double)G_USEC_PER_SEC,
                   read_ram_property_int(from, "holes"));
    return strikes && is_active(from);
}

/* Half of the pages that the guest is going to write to get populated */
static void populate_zeroes(const StressTest *test, const GuestRam *ram)
{
    g_autofree void *zeroes = g_malloc0(PAGE_SIZE);
    uint64_t first = writer_base(test) / PAGE_SIZE, page;

    for (page = first; page < first + writer_pages(test); page++) {
        if ((page + POPULATED_SKEW) & POPULATED_PAGES) {
            guest_ram_write_page(ram, page, zeroes);
        }
    }
}

/*
 * More gets dirty than can be sent, until auto-converge has slowed the guest
 * down.  It syncs the dirty bitmap in the middle of rounds meanwhile.  Returns
 * false if the migration was over before, because the guest did not write.
 */
static bool throttled_rounds(QTestState *from)
{
    int64_t start = g_get_monotonic_time();
    int64_t percentage;

    set_bandwidth(from, THROTTLED_BANDWIDTH);
    migrate_set_parameter_int(from, "throttle-trigger-threshold", 1);
    migrate_set_parameter_int(from, "cpu-throttle-increment", 60);
    migrate_set_parameter_int(from, "max-cpu-throttle", 99);
    do {
        check_timeout(start, "the guest to be slowed down");
        if (!is_active(from)) {
            return false;
        }
        g_usleep(100000);
        percentage = read_migrate_property_int(from, "cpu-throttle-percentage");
    } while (percentage <= 60);
    g_test_message("the guest was slowed down by %" PRId64 " percent after "
                   "%.1f seconds", percentage,
                   (g_get_monotonic_time() - start) / (double)G_USEC_PER_SEC);
    return true;
}

/*
 * Only to a part of the pages: a page that has been lost is not to be written
 * again, and thereby to be sent again.
 */
static bool fast_rounds(const StressTest *test, QTestState *from)
{
    int64_t start = g_get_monotonic_time();
    uint64_t goal = syncs(from) + test->fast_syncs;

    write_parameter(from, SPARSE_WRITER_PAGES, FOCUS_PAGES);
    write_parameter(from, SPARSE_WRITER_TURN, test->accel->turn_fast);
    if (test->variant == STRESS_THROTTLED) {
        return throttled_rounds(from);
    }
    set_bandwidth(from, FAST_BANDWIDTH);
    /* On a busy host the guest may be too slow to keep it going */
    while (syncs(from) < goal && is_active(from)) {
        check_timeout(start, "the dirty bitmap to be synced");
        g_usleep(10000);
    }
    return true;
}

/*
 * Rounds that take no time, while the guest writes everywhere.  Nothing is
 * written to its parameters here, because the migration may end at any time.
 */
static bool rounds_of_runs(const StressTest *test, QTestState *from)
{
    int64_t start = g_get_monotonic_time();

    /*
     * The guest's code and table are enough to stop the first round.  A round
     * that is over before QEMU has looked at the threshold would be the last.
     */
    g_usleep(3 * RATE_LIMIT_PERIOD);
    if (test->variant == STRESS_THROTTLED) {
        return throttled_rounds(from);
    }
    set_bandwidth(from, FAST_BANDWIDTH);
    while (syncs(from) < test->fast_syncs && is_active(from)) {
        check_timeout(start, "the dirty bitmap to be synced");
        /* Zero pages, so that there is something to send at each time */
        qtest_memset(from, SCRATCH_BASE, 0, 4 * MiB);
    }
    return true;
}

/* The guest's own opinion, and that it goes on */
static void check_by_guest(Stress *stress)
{
    QTestState *to = stress->guests.to;
    Serial *serial = &stress->dst_serial;
    int64_t start = g_get_monotonic_time();

    write_parameter(to, SPARSE_WRITER_PAGES, writer_pages(stress->test));
    write_parameter(to, SPARSE_WRITER_VERIFY, 1);
    qtest_qmp_assert_success(to, "{ 'execute': 'cont' }");
    do {
        check_timeout(start, "the guest to check its pages");
        g_usleep(10000);
        read_serial(serial);
    } while (!serial->verified);
    wait_for_beats(serial, 2);
}

static void test_stress(const void *opaque)
{
    const StressTest *test = opaque;
    Stress stress;
    QTestState *from;
    bool in_time;
    uint64_t written;

    if (!stress_start(&stress, test)) {
        return;
    }
    from = stress.guests.from;
    set_auto_converge(from);
    if (has_runs(test) || test->variant == STRESS_POPULATED) {
        populate_zeroes(test, &stress.guests.src);
    }
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    wait_for_beats(&stress.src_serial, 1);
    written = stress.src_serial.beats;

    if (has_runs(test)) {
        write_parameter(from, SPARSE_WRITER_PAGES, writer_pages(test));
        write_parameter(from, SPARSE_WRITER_TURN, test->accel->turn_fast);
    }
    set_bandwidth(from, SLOW_BANDWIDTH);
    migrate_set_parameter_int(from, "downtime-limit", 1000);
    set_threshold(from, 0);
    migrate_qmp(from, stress.guests.to, NULL, NULL, "{}");

    if (has_runs(test)) {
        in_time = rounds_of_runs(test, from);
    } else {
        in_time = slow_round(test, from) && fast_rounds(test, from);
    }
    migrate_ensure_converge(from);
    set_threshold(from, 1 * GiB);
    wait_for_migration_complete(from);
    wait_for_migration_complete(stress.guests.to);

    read_serial(&stress.src_serial);
    written = stress.src_serial.beats - written;
    g_test_message("%" PRIu64 " syncs, the guest has written to %" PRIu64
                   " pages meanwhile, %" PRIu64 " holes were sent",
                   syncs(from), written * SPARSE_WRITER_BATCH,
                   (uint64_t)read_ram_property_int(from, "holes"));

    /* What the test has written to the source in vain would be a difference */
    if (in_time) {
        g_free(guest_ram_content(&stress.guests.dst, &stress.guests.src, NULL));
    }
    if (!in_time || !written) {
        g_test_skip("the host was too busy: the migration was over before the "
                    "guest had written what it should; that it has lost "
                    "nothing was checked");
    }
    check_by_guest(&stress);
    stress_end(&stress);
}

/*
 * Postcopy: the guest goes on on the destination when half of its pages have
 * been sent, and accesses pages that have been received as zero, pages that
 * come while it waits for them, and pages that come in between.  Data that has
 * yet to be sent, which takes minutes at the slow rate, keeps postcopy from its
 * end, which would free a guest that waits for ever.
 */
/* How many Bs to wait for at a time */
#define POSTCOPY_BEATS 8

/* Fast enough for the data that the guest has written, until the switch */
#define PRECOPY_BANDWIDTH (1 * MiB)

#define WRITER_TURN_POSTCOPY 50000

/* Let the first round come half way, in holes */
static void half_round(const StressTest *test, QTestState *from)
{
    int64_t start = g_get_monotonic_time();

    while (write_behind(test, from) < writer_pages(test) / 2) {
        check_timeout(start, "the first round");
        g_usleep(10000);
    }
}

/*
 * What the guest has neither written nor read should be a hole: how many pages
 * are not
 */
static uint64_t count_untouched_allocated(const StressTest *test,
                                          const GuestRam *ram)
{
    uint64_t first = writer_base(test) / PAGE_SIZE;
    size_t table_size = writer_pages(test) * sizeof(uint32_t);
    g_autofree uint32_t *table = g_malloc(table_size);
    g_autofree unsigned long *touched = bitmap_new(ram->pages);
    g_autofree unsigned long *allocated = guest_ram_allocated_pages(ram);
    uint64_t page, untouched = 0, bad = 0;
    uint32_t current;

    g_assert_cmpint(pread(ram->fd, table, table_size, SPARSE_WRITER_TABLE),
                    ==, table_size);
    for (page = 0; page < writer_pages(test); page++) {
        if (table[page]) {
            set_bit(first + page, touched);
        }
    }
    /* It may have been stopped before it put this one into the table */
    g_assert_cmpint(pread(ram->fd, &current, sizeof(current),
                          SPARSE_WRITER_CURRENT), ==, sizeof(current));
    g_assert_cmpuint(current, <, writer_pages(test));
    set_bit(first + current, touched);
    guest_ram_extend_to_units(ram, touched);
    for (page = first; page < first + writer_pages(test); page++) {
        if (!test_bit(page, touched)) {
            untouched++;
            bad += test_bit(page, allocated);
        }
    }
    g_test_message("%" PRIu64 " of %" PRIu64 " pages were not touched, %" PRIu64
                   " of them are allocated", untouched, writer_pages(test),
                   bad);
    g_assert_cmpuint(untouched, >, 0);
    return bad;
}

static void test_postcopy_stress(const void *opaque)
{
    const StressTest *test = opaque;
    Stress stress;
    g_autofree char *status = NULL;
    QTestState *from, *to;
    uint64_t untouched_allocated;

    if (!stress_start(&stress, test)) {
        return;
    }
    from = stress.guests.from;
    to = stress.guests.to;
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    wait_for_beats(&stress.src_serial, 1);

    set_bandwidth(from, PRECOPY_BANDWIDTH);
    migrate_set_parameter_int(from, "max-postcopy-bandwidth", SLOW_BANDWIDTH);
    set_threshold(from, 0);
    migrate_qmp(from, to, NULL, NULL, "{}");
    half_round(test, from);
    qtest_memset(from, SCRATCH_BASE, 1, writer_base(test) - SCRATCH_BASE);
    qtest_qmp_assert_success(from, "{ 'execute': 'migrate-start-postcopy' }");
    wait_for_migration_status(to, "postcopy-active", NULL);

    write_parameter(to, SPARSE_WRITER_TURN, WRITER_TURN_POSTCOPY);
    write_parameter(to, SPARSE_WRITER_PAGES, writer_pages(test));
    wait_for_beats(&stress.dst_serial, POSTCOPY_BEATS);
    if (test->recover) {
        lab_pause_channel(&stress.guests);
        /* Time for the guest to get stuck */
        g_usleep(G_USEC_PER_SEC / 2);
        lab_recover_channel(&stress.guests);
        wait_for_beats(&stress.dst_serial, POSTCOPY_BEATS);
    }
    status = migrate_query_status(to);
    g_assert_cmpstr(status, ==, "postcopy-active");

    /* However long the rest takes, some pages are to remain untouched */
    write_parameter(to, SPARSE_WRITER_TURN, WRITER_TURN_SLOW);
    migrate_set_parameter_int(from, "max-postcopy-bandwidth", 0);
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
    read_blocktime(to);
    wait_for_beats(&stress.dst_serial, 1);

    qtest_qmp_assert_success(to, "{ 'execute': 'stop' }");
    /* The guest is going to read all of it */
    untouched_allocated = count_untouched_allocated(test, &stress.guests.dst);
    check_by_guest(&stress);
    stress_end(&stress);
    /* Last, so that a QEMU that fails here has at least lost nothing */
    g_assert_cmpuint(untouched_allocated, ==, 0);
}

#define SHORT .accel = &accel_tcg, .size = 512 * MiB, \
    .slow_syncs = 3, .fast_syncs = 10

static const StressTest short_tests[] = {
    {
        "short/tcg/precopy/shift-18", SHORT, .way = &sparse_precopy,
        .shift = SHIFT_DEFAULT,
    },
    { "short/tcg/multifd/shift-6", SHORT, .way = &multifd, .shift = SHIFT_MIN },
    { "short/tcg/sparse-ram/shift-6", SHORT, .way = &runs, .shift = SHIFT_MIN },
    {
        "short/tcg/second-block", SHORT, .way = &sparse_precopy,
        .shift = SHIFT_DEFAULT, .second_block = true,
    },
};

#define POSTCOPY_GUEST .accel = &accel_tcg, .size = 256 * MiB, \
    .slow_syncs = 3, .shift = SHIFT_DEFAULT

static const StressTest postcopy_tests[] = {
    { "postcopy/plain", POSTCOPY_GUEST, .way = &postcopy },
    { "postcopy/preempt", POSTCOPY_GUEST, .way = &postcopy_preempt },
    { "postcopy/multifd", POSTCOPY_GUEST, .way = &postcopy_multifd },
    {
        "postcopy/multifd-capability", POSTCOPY_GUEST,
        .way = &postcopy_multifd_runs,
    },
    { "postcopy/capability", POSTCOPY_GUEST, .way = &postcopy_runs },
    { "postcopy/recover", POSTCOPY_GUEST, .way = &postcopy, .recover = true },
    {
        "postcopy/recover-preempt", POSTCOPY_GUEST, .way = &postcopy_preempt,
        .recover = true,
    }, {
        "postcopy/recover-capability-preempt", POSTCOPY_GUEST,
        .way = &postcopy_preempt_runs, .recover = true,
    },
};

static void add_long(const StressAccel *accel, const SparseWay *way,
                     StressVariant variant, unsigned shift)
{
    StressTest *test = g_new(StressTest, 1);
    g_autofree char *path =
        g_strdup_printf("/migration/sparse/stress/long/%s/%s/%sshift-%u",
                        accel->name, way->name, variant_names[variant], shift);

    *test = (StressTest) {
        .accel = accel,
        .way = way,
        .variant = variant,
        .shift = shift,
        .size = 1 * GiB,
        .slow_syncs = 8,
        .fast_syncs = 100,
    };
    qtest_add_data_func_full(path, test, test_stress, g_free);
}

static void add_all_long(const StressAccel *accel)
{
    static const SparseWay *const ways[] = {
        &sparse_precopy, &xbzrle, &multifd, &multifd_legacy, &runs,
        &runs_multifd,
    };

    for (int i = 0; i < ARRAY_SIZE(ways); i++) {
        add_long(accel, ways[i], STRESS_PLAIN, SHIFT_MIN);
        add_long(accel, ways[i], STRESS_PLAIN, SHIFT_DEFAULT);
        add_long(accel, ways[i], STRESS_THROTTLED, SHIFT_MIN);
        /* With runs, pages are always populated */
        if (ways[i] != &runs && ways[i] != &runs_multifd) {
            add_long(accel, ways[i], STRESS_POPULATED, SHIFT_MIN);
        }
    }
}

void lab_add_stress(void)
{
    const MigrationTestEnv *env = sparse_env;

    if (env->has_tcg) {
        LAB_ADD_CASES("stress/", short_tests, test_stress);
    }
    if (env->has_tcg && env->has_uffd) {
        LAB_ADD_CASES("stress/", postcopy_tests, test_postcopy_stress);
    }
    if (!env->full_set) {
        return;
    }
    if (env->has_tcg) {
        add_all_long(&accel_tcg);
    }
    if (env->has_kvm) {
        add_all_long(&accel_kvm);
    }
    if (env->has_dirty_ring) {
        add_all_long(&accel_kvm_ring);
    }
}
