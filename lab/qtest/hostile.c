/*
 * QTest testcases for the migration capability sparse-ram: hostile streams
 *
 * The start of a real stream is followed by a record that no source sends.  The
 * destination has to refuse it with a message that says why, and must not have
 * touched its memory.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/sockets.h"
#include "sparse-lab.h"

#define PAGE_SIZE (4 * KiB)
#define RAM_SIZE (64 * MiB)
#define LAST_PAGE (RAM_SIZE - PAGE_SIZE)

/* What is in the stream; see migration/ram.c and migration/savevm.[ch] */
#define VM_SECTION_START 0x01
#define VM_SECTION_PART 0x02
#define VM_COMMAND 0x08
#define VM_SECTION_FOOTER 0x7e
#define VM_CMD_OPEN_RETURN_PATH 1
#define VM_CMD_POSTCOPY_ADVISE 3
#define VM_CMD_POSTCOPY_LISTEN 4
#define VM_CMD_POSTCOPY_RUN 5
#define VM_CMD_POSTCOPY_RAM_DISCARD 6
#define VM_CMD_PACKAGED 7
#define RAM_FLAG_ZERO 0x02
#define RAM_FLAG_PAGE 0x08
#define RAM_FLAG_EOS 0x10
#define RAM_FLAG_CONTINUE 0x20
#define ZERO_RUN 1

/* The type and the number of a section; its footer has the same length */
#define SECTION_HEADER_BYTES (1 + 4)
/* The page header of a record with the name of the block */
#define HEADER_BYTES (8 + 1 + sizeof(BACKEND_ID) - 1)

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
    const SparseBackend *backend;
    /* One more capability, for both sides */
    const char *capability;
    /* A run that is good is in front of it */
    bool after_run;
    /* The first pages of the block are, each with a record of its own */
    uint64_t zero_pages;
    /* What the destination says */
    const char *message;
} HostileCase;

static const HostileCase hostile_cases[] = {
    {
        .name = "no-pages",
        .value = ZERO_RUN,
        .message = "RAM block 'mem0': a run of 0 zero pages at offset 0x0 "
                   "is not between 1 and 16384",
    }, {
        .name = "beyond-block",
        .value = ZERO_RUN,
        .npages = RAM_SIZE / (PAGE_SIZE) + 1,
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
        .offset = RAM_SIZE,
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
        /* A block that neither side migrates */
        .name = "ignored-block",
        .backend = &sparse_shm_file,
        .value = ZERO_RUN,
        .npages = 1,
        .capability = "x-ignore-shared",
        .message = "block mem0 should not be migrated !",
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
    }, {
        /* These would be next in a batch of zero pages, but for one thing */
        .name = "zero-pages/value",
        .zero_pages = 100,
        .offset = 100 * PAGE_SIZE,
        .no_name = true,
        .value = 2,
        .message = "Found a zero page with value 2",
    }, {
        .name = "zero-pages/end-of-block",
        .zero_pages = RAM_SIZE / (PAGE_SIZE),
        .offset = RAM_SIZE,
        .no_name = true,
        .message = "Illegal RAM offset 4000000",
    }, {
        .name = "zero-pages/flags",
        .zero_pages = 100,
        .offset = 100 * PAGE_SIZE | RAM_FLAG_EOS,
        .no_name = true,
        .message = "Unknown combination of migration flags: 0x32",
    }, {
        .name = "zero-pages/other-block",
        .zero_pages = 100,
        .offset = 100 * PAGE_SIZE,
        .block = "mem1",
        .message = "Can't find block mem1",
    }, {
        .name = "zero-pages/truncated",
        .zero_pages = 100,
        .offset = 100 * PAGE_SIZE,
        .no_name = true,
        .length = 8,
        .message = "load of migration failed: Input/output error",
    },
};

/* The lowest @bytes bytes of @value */
static void put_be(GByteArray *stream, uint64_t value, size_t bytes)
{
    value = cpu_to_be64(value);
    g_byte_array_append(stream, (uint8_t *)(&value + 1) - bytes, bytes);
}

static void put_be64(GByteArray *stream, uint64_t value)
{
    put_be(stream, value, 8);
}

static void put_byte(GByteArray *stream, uint8_t value)
{
    g_byte_array_append(stream, &value, 1);
}

static void put_name(GByteArray *stream, const char *block)
{
    put_byte(stream, strlen(block));
    g_byte_array_append(stream, (const uint8_t *)block, strlen(block));
}

static void put_run(GByteArray *stream, const char *block, uint64_t offset,
                    uint8_t value, uint64_t npages)
{
    put_be64(stream, offset | RAM_FLAG_ZERO | (block ? 0 : RAM_FLAG_CONTINUE));
    if (block) {
        put_name(stream, block);
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

/* Returns where the section of RAM starts */
static size_t find_ram(const GByteArray *stream)
{
    static const uint8_t ram[] = "\003ram\0\0\0\0\0\0\0\004";
    size_t name = find_bytes(stream, 0, ram, sizeof(ram) - 1);

    g_assert_cmpint(stream->data[name - SECTION_HEADER_BYTES], ==,
                    VM_SECTION_START);
    return name - SECTION_HEADER_BYTES;
}

/*
 * Cut the stream in front of RAM's first section of pages.  Until there, it has
 * the configuration and the sizes of all blocks.
 *
 * Returns the header of such a section, which the caller has to free.
 */
static GByteArray *cut_at_pages(GByteArray *stream)
{
    GByteArray *header = g_byte_array_new();
    size_t start = find_ram(stream), pos = start;

    put_byte(header, VM_SECTION_PART);
    /* The number of the section */
    g_byte_array_append(header, &stream->data[start + 1], 4);
    do {
        pos = find_bytes(stream, pos + 1, header->data, header->len);
    } while (stream->data[pos - SECTION_HEADER_BYTES] != VM_SECTION_FOOTER);
    g_byte_array_set_size(stream, pos);
    return header;
}

static void put_bytes(GByteArray *stream, const GByteArray *bytes)
{
    g_byte_array_append(stream, bytes->data, bytes->len);
}

/* Returns a real stream */
static GByteArray *capture_stream(const SparseGuests *guests)
{
    g_autofree char *uri = g_strdup_printf("file:%s", guests->file);
    gsize length;
    char *data;

    migrate_ensure_converge(guests->from);
    migrate_qmp(guests->from, guests->to, uri, NULL, "{}");
    wait_for_migration_complete(guests->from);
    g_assert(g_file_get_contents(guests->file, &data, &length, NULL));
    return g_byte_array_new_take((uint8_t *)data, length);
}

static void put_hostile(GByteArray *stream, const HostileCase *c)
{
    size_t start;

    if (c->after_run) {
        put_run(stream, BACKEND_ID, 0, ZERO_RUN, RAM_SIZE / PAGE_SIZE);
    }
    for (uint64_t i = 0; i < c->zero_pages; i++) {
        put_run(stream, i ? NULL : BACKEND_ID, i * PAGE_SIZE, 0, 0);
    }
    start = stream->len;
    put_run(stream, c->no_name ? NULL : c->block ?: BACKEND_ID,
            c->offset, c->value, c->npages);
    if (c->length) {
        g_byte_array_set_size(stream, start + c->length);
    } else {
        put_be64(stream, RAM_FLAG_EOS);
    }
}

/* The destination has complained of it */
static void check_message(SparseGuests *guests, const HostileCase *c)
{
    g_autofree char *text = sparse_log(guests);

    g_test_message("stderr: %s", text);
    g_assert(strstr(text, c->message));
}

static void test_hostile(const void *opaque)
{
    const HostileCase *c = opaque;
    const SparseRow row = {
        .backend = c->backend, .size = RAM_SIZE, .log = true,
    };
    g_autofree char *uri = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_autoptr(GByteArray) stream = NULL;
    g_autoptr(GByteArray) section = NULL;
    SparseGuests guests;
    uint64_t cleared;

    if (!sparse_begin(&guests, &row, &sparse_precopy, &sparse_empty)) {
        return;
    }
    uri = g_strdup_printf("file:%s", guests.file);
    /* What is to be there afterwards, but for what good records clear */
    kinds = sparse_pattern_new(&sparse_mixed, guests.dst.pages);
    guest_ram_prepare(&guests.dst, kinds);
    guest_ram_state_take(&guests.dst_before, &guests.dst);

    if (!c->capability_off) {
        sparse_set_both(&guests, "sparse-ram");
    }
    if (c->capability) {
        sparse_set_both(&guests, c->capability);
    }
    stream = capture_stream(&guests);
    section = cut_at_pages(stream);
    put_bytes(stream, section);
    put_hostile(stream, c);
    g_assert(g_file_set_contents(guests.file, (char *)stream->data, stream->len,
                                 NULL));
    /* A signal would be another status */
    qtest_set_expected_status(guests.to, EXIT_FAILURE);
    migrate_incoming_qmp(guests.to, uri, NULL, "{}");
    qtest_wait_qemu(guests.to);

    check_message(&guests, c);
    cleared = c->after_run ? guests.dst.pages : c->zero_pages;
    memset(kinds, PAGE_HOLE, cleared);
    guest_ram_check_pattern(&guests.dst, kinds);
    guest_ram_check_allocation(&guests.dst,
                               cleared ? SPARSE_RELEASED : SPARSE_KEPT,
                               &guests.dst_before, NULL);
    sparse_end(&guests);
}

/*
 * In the middle of postcopy
 *
 * What has been placed belongs to a guest that may be running.
 */

/* What has arrived when the hostile record does, before and after the switch */
#define PRECOPY_PAGE 3
#define POSTCOPY_PAGE 7

static const HostileCase postcopy_cases[] = {
    {
        /* What has been received is not taken back */
        .name = "over-data",
        .value = ZERO_RUN,
        .npages = POSTCOPY_PAGE + 1,
        .message = "uffd_zero_page() failed",
    }, {
        .name = "zero",
        .value = ZERO_RUN,
        .npages = 0,
        .message = "a run of 0 zero pages at offset",
    }, {
        .name = "beyond-block",
        .value = ZERO_RUN,
        .npages = RAM_SIZE / PAGE_SIZE + 1,
        .message = "a run of 16385 zero pages at offset",
    }, {
        .name = "all-ones",
        .value = ZERO_RUN,
        .npages = UINT64_MAX,
        .message = "a run of 18446744073709551615 zero pages at offset",
    }, {
        .name = "value",
        .value = 2,
        .message = "Found a zero page with value 2",
    }, {
        .name = "end-of-block",
        .offset = RAM_SIZE,
        .value = ZERO_RUN,
        .npages = 1,
        .message = "Illegal RAM offset 4000000",
    }, {
        .name = "unknown-block",
        .block = "mem1",
        .value = ZERO_RUN,
        .npages = 1,
        .message = "Can't find block mem1",
    },
};

/* A command, without what belongs to it */
static void put_command(GByteArray *stream, uint16_t command, uint16_t length)
{
    put_byte(stream, VM_COMMAND);
    put_be(stream, command, 2);
    put_be(stream, length, 2);
}

static void put_data(GByteArray *stream, const uint8_t *kinds, uint64_t page)
{
    uint64_t data[PAGE_SIZE / sizeof(uint64_t)];

    put_be64(stream, page * PAGE_SIZE | RAM_FLAG_PAGE);
    put_name(stream, BACKEND_ID);
    sparse_pattern_page(data, kinds, page, PAGE_SIZE);
    g_byte_array_append(stream, (const uint8_t *)data, PAGE_SIZE);
}

/* What is dirty on the source; there has to be something */
static void put_discard(GByteArray *stream, uint64_t page)
{
    put_command(stream, VM_CMD_POSTCOPY_RAM_DISCARD,
                1 + 1 + strlen(BACKEND_ID) + 1 + 2 * 8);
    put_byte(stream, 0);
    put_name(stream, BACKEND_ID);
    put_byte(stream, 0);
    put_be64(stream, page * PAGE_SIZE);
    put_be64(stream, PAGE_SIZE);
}

/*
 * Turn the start of a real stream into one of a migration that switches to
 * postcopy, with one page of data before that.  @section is the header of a
 * section of pages.
 */
static void put_switchover(GByteArray *stream, const GByteArray *section,
                           const uint8_t *kinds)
{
    g_autoptr(GByteArray) setup = g_byte_array_new();
    g_autoptr(GByteArray) package = g_byte_array_new();
    size_t start = find_ram(stream);

    g_byte_array_append(setup, stream->data + start, stream->len - start);
    g_byte_array_set_size(stream, start);

    put_command(stream, VM_CMD_OPEN_RETURN_PATH, 0);
    put_command(stream, VM_CMD_POSTCOPY_ADVISE, 16);
    put_be64(stream, qemu_real_host_page_size());
    put_be64(stream, PAGE_SIZE);
    put_bytes(stream, setup);

    put_bytes(stream, section);
    put_data(stream, kinds, PRECOPY_PAGE);
    put_be64(stream, RAM_FLAG_EOS);
    put_byte(stream, VM_SECTION_FOOTER);
    g_byte_array_append(stream, section->data + 1, 4);

    put_discard(stream, POSTCOPY_PAGE);
    put_command(package, VM_CMD_POSTCOPY_LISTEN, 0);
    put_command(package, VM_CMD_POSTCOPY_RUN, 0);
    put_command(stream, VM_CMD_PACKAGED, 4);
    put_be(stream, package->len, 4);
    put_bytes(stream, package);
}

static void send_all(int fd, const GByteArray *stream)
{
    g_assert_cmpint(qemu_write_full(fd, stream->data, stream->len), ==,
                    stream->len);
}

static void test_hostile_postcopy(const void *opaque)
{
    static const SparseRow row = { .size = RAM_SIZE, .log = true };
    const HostileCase *c = opaque;
    const char *ungoals[] = { "completed", "failed", NULL };
    g_autofree char *path = g_strdup_printf("%s/migsocket", sparse_env->tmpfs);
    g_autofree char *uri = g_strdup_printf("unix:%s", path);
    g_autofree uint8_t *kinds = NULL;
    g_autoptr(GByteArray) stream = NULL;
    g_autoptr(GByteArray) section = NULL;
    g_autoptr(GByteArray) hostile = g_byte_array_new();
    SparseGuests guests;
    int fd;

    if (!sparse_begin(&guests, &row, &sparse_precopy, &sparse_empty)) {
        return;
    }
    sparse_set_both(&guests, "sparse-ram");
    stream = capture_stream(&guests);

    kinds = sparse_pattern_new(&sparse_empty, guests.dst.pages);
    kinds[PRECOPY_PAGE] = kinds[POSTCOPY_PAGE] = PAGE_DATA;
    section = cut_at_pages(stream);
    put_switchover(stream, section, kinds);
    put_bytes(hostile, section);
    put_data(hostile, kinds, POSTCOPY_PAGE);
    put_hostile(hostile, c);

    migrate_set_capability(guests.to, "postcopy-ram", true);
    migrate_incoming_qmp(guests.to, uri, NULL, "{}");
    fd = unix_connect(path, &error_abort);
    send_all(fd, stream);
    lab_wait_for_devices(guests.to);
    send_all(fd, hostile);

    /* As if the connection had been lost: the guest may have run */
    wait_for_migration_status(guests.to, "postcopy-paused", ungoals);
    check_message(&guests, c);
    guest_ram_check_pattern(&guests.dst, kinds);

    close(fd);
    sparse_end(&guests);
}

void lab_add_hostile(void)
{
    LAB_ADD_CASES("capability/hostile/", hostile_cases, test_hostile);
    if (sparse_env->has_uffd) {
        LAB_ADD_CASES("capability/hostile/postcopy/", postcopy_cases,
                      test_hostile_postcopy);
    }
}
