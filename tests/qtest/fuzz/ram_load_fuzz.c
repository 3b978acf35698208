/*
 * Fuzz the incoming RAM stream
 *
 * An input is one byte of flags, and then what follows the header of a "ram"
 * section in a migration stream, up to and including RAM_SAVE_FLAG_EOS.  More
 * sections may follow directly.  It is given to the handlers that RAM has
 * registered with savevm, in the order of a migration; the rest of savevm and
 * the devices are left out.
 *
 * With FLAG_POSTCOPY, what follows the first section is given to a destination
 * that has switched to postcopy, with userfaultfd registered: whoever touches
 * memory that has not arrived waits for ever, which libFuzzer takes for a hang.
 *
 * Nothing may crash, whatever the input is, and guest RAM that is a memfd may
 * not grow by more than a page for each record that can be in the input.
 *
 * The machine has three RAMBlocks: "mem0", a memfd, "fuzz.anon", anonymous
 * memory, and "fuzz.resizeable", of which only a part is used.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <linux/falloc.h>

#include "system/memory.h"
#include "system/ramblock.h"
#include "io/channel-buffer.h"
#include "migration/migration.h"
#include "migration/options.h"
#include "migration/postcopy-ram.h"
#include "migration/qemu-file.h"
#include "migration/register.h"
#include "migration/vmstate.h"
#include "qapi/error.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "tests/qtest/libqtest.h"
#include "fuzz.h"
#include "ram_load_fuzz.h"

/* Bits of the first byte */
#define FLAG_SPARSE_RAM     0x01
#define FLAG_POSTCOPY       0x02

#define MEMFD_SIZE          (16 * MiB)
#define ANON_SIZE           (1 * MiB)
#define RESIZEABLE_USED     (256 * KiB)
#define RESIZEABLE_MAX      (1 * MiB)

#define RAM_VERSION         4

/* The shortest record is a page header with RAM_SAVE_FLAG_CONTINUE */
#define RECORD_MIN          8

/* What RAM has registered */
static const SaveVMHandlers *ram_handlers;
static void *ram_opaque;

static RAMBlock *memfd_block;
static MemoryRegion resizeable;

int __wrap_register_savevm_live(const char *idstr, uint32_t instance_id,
                                int version_id, const SaveVMHandlers *ops,
                                void *opaque)
{
    if (g_str_equal(idstr, "ram")) {
        ram_handlers = ops;
        ram_opaque = opaque;
    }
    return __real_register_savevm_live(idstr, instance_id, version_id, ops,
                                       opaque);
}

static GString *ram_load_cmdline(FuzzTarget *t)
{
    GString *cmdline = g_string_new("qemu-system -display none -nodefaults");

    g_string_append_printf(cmdline, " -machine none,memory-backend=mem0 -m %dM"
                           " -object memory-backend-memfd,id=mem0,share=on,"
                           "size=%dM -incoming defer",
                           (int)(MEMFD_SIZE / MiB), (int)(MEMFD_SIZE / MiB));
    return cmdline;
}

static void ram_load_pre_fuzz(QTestState *s)
{
    MemoryRegion *anon = g_new0(MemoryRegion, 1);
    sigset_t alarm;

    /* QEMU blocks it, and libFuzzer needs it to find out about hangs */
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarm, NULL);

    memory_region_init_ram(anon, NULL, "fuzz.anon", ANON_SIZE, &error_abort);
    memory_region_init_resizeable_ram(&resizeable, NULL, "fuzz.resizeable",
                                      RESIZEABLE_USED, RESIZEABLE_MAX, NULL,
                                      &error_abort);
    vmstate_register_ram_global(&resizeable);

    /* As at the start of an incoming migration */
    migration_incoming_get_current()->largest_page_size =
        qemu_ram_pagesize_largest();

    memfd_block = qemu_ram_block_by_name("mem0");
    g_assert(memfd_block && memfd_block->fd >= 0);
    g_assert(ram_handlers);
}

/* As if no input had been there before */
static void reset_state(void)
{
    MigrationIncomingState *mis = migration_incoming_get_current();

    memset(mis->last_recv_block, 0, sizeof(mis->last_recv_block));
    if (memory_region_size(&resizeable) != RESIZEABLE_USED) {
        memory_region_ram_resize(&resizeable, RESIZEABLE_USED, &error_abort);
    }
    g_assert(fallocate(memfd_block->fd,
                       FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       0, MEMFD_SIZE) == 0);
}

/* A populated page needs a record, and may bring a whole huge page along */
static void check_allocation(size_t size)
{
    struct stat st;
    uint64_t max;

    g_assert(fstat(memfd_block->fd, &st) == 0);
    max = (uint64_t)(size / RECORD_MIN + 1) *
          MAX(st.st_blksize, qemu_real_host_page_size());
    g_assert(st.st_blocks * 512ULL <= max);
}

static void set_capability(MigrationCapability capability, bool on)
{
    migrate_get_current()->capabilities[capability] = on;
}

/* What MIG_CMD_POSTCOPY_ADVISE does; false if the host has no userfaultfd */
static bool postcopy_advise(MigrationIncomingState *mis)
{
    if (!postcopy_ram_supported_by_host(mis, NULL)) {
        return false;
    }
    postcopy_state_set(POSTCOPY_INCOMING_ADVISE);
    g_assert(postcopy_ram_incoming_init(mis) == 0);
    return true;
}

/* What MIG_CMD_POSTCOPY_LISTEN does, but for the thread */
static void postcopy_listen(MigrationIncomingState *mis)
{
    g_autoptr(QIOChannelBuffer) return_path = qio_channel_buffer_new(0);

    g_assert(postcopy_ram_prepare_discard(mis) == 0);
    postcopy_state_set(POSTCOPY_INCOMING_LISTENING);
    /* It may still be set from the input before */
    mis->fault_thread_quit = false;
    mis->to_src_file = qemu_file_new_output(QIO_CHANNEL(return_path));
    g_assert(postcopy_ram_incoming_setup(mis) == 0);
}

static void postcopy_end(MigrationIncomingState *mis)
{
    if (postcopy_state_get() == POSTCOPY_INCOMING_LISTENING) {
        g_assert(postcopy_ram_incoming_cleanup(mis) == 0);
        qemu_fclose(mis->to_src_file);
        mis->to_src_file = NULL;
    }
    postcopy_state_set(POSTCOPY_INCOMING_NONE);
}

static QEMUFile *file_from_data(const unsigned char *data, size_t size)
{
    QIOChannelBuffer *buffer = qio_channel_buffer_new(size);
    QEMUFile *f;

    memcpy(buffer->data, data, size);
    buffer->usage = size;
    f = qemu_file_new_input(QIO_CHANNEL(buffer));
    object_unref(OBJECT(buffer));
    return f;
}

static void ram_load_fuzz(QTestState *s, const unsigned char *data, size_t size)
{
    MigrationIncomingState *mis = migration_incoming_get_current();
    bool postcopy = size && data[0] & FLAG_POSTCOPY;
    QEMUFile *f;
    int ret;

    if (size <= 1) {
        return;
    }
    reset_state();
    set_capability(MIGRATION_CAPABILITY_SPARSE_RAM, data[0] & FLAG_SPARSE_RAM);
    set_capability(MIGRATION_CAPABILITY_POSTCOPY_RAM, postcopy);
    if (postcopy && !postcopy_advise(mis)) {
        return;
    }
    f = file_from_data(data + 1, size - 1);

    g_assert(ram_handlers->load_setup(f, ram_opaque, &error_abort) == 0);
    ret = ram_handlers->load_state(f, ram_opaque, RAM_VERSION);
    if (!ret && postcopy) {
        postcopy_listen(mis);
    }
    /* Until there is nothing left to read, which is an error as well */
    while (!ret) {
        ret = ram_handlers->load_state(f, ram_opaque, RAM_VERSION);
    }
    if (postcopy) {
        postcopy_end(mis);
    }
    check_allocation(size);
    ram_handlers->load_cleanup(ram_opaque);
    qemu_fclose(f);
}

static void register_ram_load_fuzz_target(void)
{
    fuzz_add_target(&(FuzzTarget){
        .name = "ram-load-fuzz",
        .description = "Fuzz the RAM section of an incoming migration stream",
        .get_init_cmdline = ram_load_cmdline,
        .pre_fuzz = ram_load_pre_fuzz,
        .fuzz = ram_load_fuzz,
    });
}

fuzz_target_init(register_ram_load_fuzz_target);
