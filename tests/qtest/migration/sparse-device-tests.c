/*
 * QTest testcases for sparse guest RAM: devices, and CPR
 *
 * Memory that virtio-mem has unplugged, that is in the balloon, or that the
 * guest reported as free is out of the file behind it, and has to stay out on
 * both sides of a migration.  With CPR the file itself is handed over.
 *
 * No guest runs: the tests drive the devices.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqos/libqos-malloc.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-guests.h"
#include "migration/sparse-util.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_mem.h"

/* Where the devices are on the bus */
#define DEVICE_SLOT 0x10

/* Guest memory that the tests have for virtqueues and requests */
#define DRIVER_START (1 * MiB)
#define DRIVER_END (2 * MiB)

#define DEVICE_TIMEOUT_US (30 * 1000 * 1000)

/* The size of a memfd tells which it is, so it is not that of the main RAM */
#define VMEM_SIZE (256 * MiB)
#define VMEM_REQUESTED_SIZE (128 * MiB)
#define VMEM_IDLE_SIZE (8 * GiB)
#define VMEM_ID "vmem0"

/* One of CPR_STRIDE pages of the guest has data: 4 MiB in all */
#define CPR_SIZE (256 * GiB)
#define CPR_STRIDE 65536

/*
 * What a process may grow by that hands over a guest of CPR_SIZE.  A dirty
 * bitmap of such a guest has 8 MiB.
 */
#define MAX_CPR_GROWTH (4 * MiB)

typedef struct DeviceMode {
    SparseRoute route;
    /* What DeviceTest.basic is about */
    bool basic;
} DeviceMode;

static const DeviceMode device_modes[] = {
    { .route = { .name = "precopy" }, .basic = true },
    { .route = { .name = "runs", .capabilities = { "sparse-ram" } } },
    {
        .route = { .name = "multifd", .capabilities = { "multifd" } },
        .basic = true,
    }, {
        .route = {
            .name = "postcopy",
            .capabilities = { "postcopy-ram" },
            .postcopy = true,
        },
    },
    { .route = { .name = "file", .file = true } },
    {
        .route = {
            .name = "mapped-ram",
            .capabilities = { "mapped-ram" },
            .file = true,
        },
    }, {
        .route = {
            .name = "mapped-ram-multifd",
            .capabilities = { "mapped-ram", "multifd" },
            .file = true,
        },
    }, {
        .route = {
            .name = "background-snapshot",
            .file = true,
            .snapshot = true,
        },
    },
};

static MigrationTestEnv *env;

/* Start two guests with more options than those for their main RAM */
static bool guests_start(SparseGuests *guests, const char *src_more,
                         const char *dst_more)
{
    g_autofree char *memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;

    *guests = (SparseGuests) { };
    guest_ram_init(&guests->src, BACKEND_MEMFD, PATTERN_SIZE);
    guest_ram_init(&guests->dst, BACKEND_MEMFD, PATTERN_SIZE);
    memory = guest_ram_opts(&guests->src, NULL);
    src_opts = g_strdup_printf("%s %s", memory, src_more);
    dst_opts = g_strdup_printf("%s %s", memory, dst_more);
    return sparse_guests_start(guests, src_opts, dst_opts);
}

static void check_unchanged(const GuestRam *ram, const GuestRamState *before)
{
    g_auto(GuestRamState) after = { };

    guest_ram_state_take(&after, ram);
    guest_ram_check_growth(ram, before, &after, RAM_KEPT,
                           0, guest_ram_pages(ram));
}

/* The pages that have data are allocated, and no others */
static void check_allocated(const GuestRam *ram, const uint8_t *kinds)
{
    g_autofree unsigned long *pages = guest_ram_allocated_pages(ram);
    g_autofree unsigned long *data = bitmap_new(guest_ram_pages(ram));
    uint64_t unit_pages = guest_ram_allocation_unit(ram) / ram->page_size;
    uint64_t page, bad = 0;

    for (page = 0; page < guest_ram_pages(ram); page++) {
        if (kinds[page] == PAGE_DATA) {
            set_bit(page, data);
        }
    }
    for (page = 0; page < guest_ram_pages(ram); page++) {
        bool allocated = test_bit(page, pages);

        if (allocated != test_bit(page, data) &&
            !guest_ram_unit_has_any(ram, data, page, unit_pages) &&
            bad++ < 10) {
            g_test_message("page %" PRIu64 " (kind %d) is%s allocated", page,
                           kinds[page], allocated ? "" : " not");
        }
    }
    g_assert_cmpuint(bad, ==, 0);
}

/* A virtio device, driven without a guest */

typedef struct Device {
    QTestState *qts;
    QGuestAllocator alloc;
    QPCIBus *bus;
    QVirtioPCIDevice *pci;
    QVirtioDevice *virtio;
    QVirtQueue *vq;
    unsigned queue;
} Device;

static void device_start(Device *device, QTestState *qts, unsigned queue)
{
    QPCIAddress address = { .devfn = QPCI_DEVFN(DEVICE_SLOT, 0) };
    uint64_t features;

    *device = (Device) { .qts = qts, .queue = queue };
    alloc_init(&device->alloc, ALLOC_NO_FLAGS, DRIVER_START, DRIVER_END, 4096);
    device->bus = qpci_new_pc(qts, &device->alloc);
    device->pci = virtio_pci_new(device->bus, &address);
    g_assert(device->pci);
    device->virtio = &device->pci->vdev;
    qvirtio_pci_device_enable(device->pci);
    qvirtio_start_device(device->virtio);

    features = qvirtio_get_features(device->virtio);
    features &= ~(QVIRTIO_F_BAD_FEATURE | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
                  1ull << VIRTIO_RING_F_EVENT_IDX |
                  1ull << VIRTIO_BALLOON_F_PAGE_POISON);
    qvirtio_set_features(device->virtio, features);

    device->vq = qvirtqueue_setup(device->virtio, &device->alloc, queue);
    qvirtio_set_driver_ok(device->virtio);
}

static void device_end(Device *device)
{
    qvirtqueue_cleanup(device->virtio->bus, device->vq, &device->alloc);
    qvirtio_pci_device_disable(device->pci);
    g_free(device->pci->pdev);
    g_free(device->pci);
    qpci_free_pc(device->bus);
    alloc_destroy(&device->alloc);
}

static void device_wait(Device *device, uint32_t head)
{
    qvirtqueue_kick(device->qts, device->virtio, device->vq, head);
    qvirtio_wait_used_elem(device->qts, device->virtio, device->vq, head, NULL,
                           DEVICE_TIMEOUT_US);
}

/* virtio-mem */

typedef struct VirtioMem {
    SparseGuests guests;
    GuestRam src;
    GuestRam dst;
} VirtioMem;

static char *virtio_mem_opts(uint64_t size, uint64_t requested_size,
                             const char *more)
{
    return g_strdup_printf("-m maxmem=%" PRIu64 "M "
                           "-object memory-backend-memfd,share=on,id=%s,"
                           "size=%" PRIu64 " "
                           "-device virtio-mem-pci,bus=pcie.0,addr=%x,"
                           "memdev=%s,requested-size=%" PRIu64 "%s",
                           (PATTERN_SIZE + size) / MiB, VMEM_ID, size,
                           DEVICE_SLOT, VMEM_ID, requested_size,
                           more ? more : "");
}

static bool virtio_mem_start(VirtioMem *vmem, uint64_t size,
                             uint64_t requested_size, const char *dst_more)
{
    g_autofree char *src_opts = virtio_mem_opts(size, requested_size, NULL);
    g_autofree char *dst_opts = virtio_mem_opts(size, requested_size, dst_more);

    if (!guests_start(&vmem->guests, src_opts, dst_opts)) {
        return false;
    }
    guest_ram_init(&vmem->src, BACKEND_MEMFD, size);
    guest_ram_init(&vmem->dst, BACKEND_MEMFD, size);
    guest_ram_open(&vmem->src, vmem->guests.from);
    guest_ram_open(&vmem->dst, vmem->guests.to);
    return true;
}

static void virtio_mem_end(VirtioMem *vmem)
{
    guest_ram_close(&vmem->src);
    guest_ram_close(&vmem->dst);
    sparse_guests_end(&vmem->guests);
}

/* Nothing has been plugged: there is nothing that could be sent */
static void test_virtio_mem_unplugged(const void *opaque)
{
    const DeviceMode *mode = opaque;
    VirtioMem vmem;

    if (!virtio_mem_start(&vmem, VMEM_IDLE_SIZE, 0, NULL)) {
        return;
    }
    if (sparse_guests_prepare(&vmem.guests, &mode->route, env)) {
        sparse_guests_migrate(&vmem.guests, &mode->route, env);
        guest_ram_report(&vmem.src, &vmem.dst, 0);
        /* It is not even sent as zero */
        g_assert_cmpint(read_ram_property_int(vmem.guests.from, "duplicate"),
                        <, guest_ram_pages(&vmem.src));
        g_assert_cmpuint(guest_ram_allocated_bytes(&vmem.src), ==, 0);
        g_assert_cmpuint(guest_ram_allocated_bytes(&vmem.dst), ==, 0);
    }
    virtio_mem_end(&vmem);
}

static uint64_t virtio_mem_config(const Device *device, size_t offset)
{
    return qvirtio_config_readq(device->virtio, offset);
}

static void virtio_mem_plug(Device *device, uint64_t address)
{
    struct virtio_mem_req req = {
        .type = cpu_to_le16(VIRTIO_MEM_REQ_PLUG),
        .u.plug.addr = cpu_to_le64(address),
        .u.plug.nb_blocks = cpu_to_le16(1),
    };
    struct virtio_mem_resp resp = { .type = 0xffff };
    uint64_t req_address = guest_alloc(&device->alloc, sizeof(req));
    uint64_t resp_address = guest_alloc(&device->alloc, sizeof(resp));
    uint32_t head;

    qtest_memwrite(device->qts, req_address, &req, sizeof(req));
    qtest_memwrite(device->qts, resp_address, &resp, sizeof(resp));
    head = qvirtqueue_add(device->qts, device->vq, req_address, sizeof(req),
                          false, true);
    qvirtqueue_add(device->qts, device->vq, resp_address, sizeof(resp),
                   true, false);
    device_wait(device, head);
    qtest_memread(device->qts, resp_address, &resp, sizeof(resp));
    g_assert_cmpuint(le16_to_cpu(resp.type), ==, VIRTIO_MEM_RESP_ACK);

    guest_free(&device->alloc, req_address);
    guest_free(&device->alloc, resp_address);
}

/* Plug every other block.  Returns which pages are plugged then. */
static unsigned long *virtio_mem_plug_half(QTestState *qts,
                                           const GuestRam *ram)
{
    unsigned long *plugged = bitmap_new(guest_ram_pages(ram));
    uint64_t start, block_size, offset;
    Device device;

    device_start(&device, qts, 0);
    start = virtio_mem_config(&device, offsetof(struct virtio_mem_config,
                                                addr));
    block_size = virtio_mem_config(&device, offsetof(struct virtio_mem_config,
                                                     block_size));
    for (offset = 0; offset < ram->size; offset += 2 * block_size) {
        virtio_mem_plug(&device, start + offset);
        bitmap_set(plugged, offset / ram->page_size,
                   block_size / ram->page_size);
    }
    g_assert_cmpuint(virtio_mem_config(&device,
                                       offsetof(struct virtio_mem_config,
                                                plugged_size)),
                     ==, VMEM_REQUESTED_SIZE);
    device_end(&device);
    return plugged;
}

/*
 * Half of the memory is plugged, and has data, zero pages and holes.  Without
 * prealloc=on there is old data in all of the destination's file.  There is a
 * page of data where the guest of the source has nothing plugged, which must
 * not be sent.
 */
static void virtio_mem_plugged(const DeviceMode *mode, bool prealloc)
{
    g_autofree unsigned long *plugged = NULL;
    g_autofree unsigned long *allocated = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_autofree void *stray = NULL;
    g_auto(GuestRamState) before = { };
    VirtioMem vmem;
    uint64_t page;

    if (!virtio_mem_start(&vmem, VMEM_SIZE, VMEM_REQUESTED_SIZE,
                          prealloc ? ",prealloc=on" : NULL)) {
        return;
    }
    if (!sparse_guests_prepare(&vmem.guests, &mode->route, env)) {
        goto out;
    }

    plugged = virtio_mem_plug_half(vmem.guests.from, &vmem.src);
    kinds = sparse_pattern_new(PATTERN_MIXED, guest_ram_pages(&vmem.src));
    for (page = 0; page < guest_ram_pages(&vmem.src); page++) {
        if (!test_bit(page, plugged)) {
            kinds[page] = PAGE_HOLE;
        }
    }
    guest_ram_prepare(&vmem.src, kinds);
    stray = g_malloc(vmem.src.page_size);
    memset(stray, 0x5a, vmem.src.page_size);
    guest_ram_write_page(&vmem.src, guest_ram_pages(&vmem.src) - 1, stray);
    /* What QEMU has preallocated itself is known to be zero */
    if (!prealloc) {
        guest_ram_make_stale(&vmem.dst);
    }
    guest_ram_state_take(&before, &vmem.src);

    sparse_guests_migrate(&vmem.guests, &mode->route, env);

    guest_ram_report(&vmem.src, &vmem.dst, before.bytes);
    check_unchanged(&vmem.src, &before);
    guest_ram_check_pattern(&vmem.dst, kinds);
    allocated = guest_ram_allocated_pages(&vmem.dst);
    for (page = 0; page < guest_ram_pages(&vmem.dst); page++) {
        if (!test_bit(page, plugged)) {
            g_assert_false(test_bit(page, allocated));
        } else if (prealloc) {
            g_assert_true(test_bit(page, allocated));
        }
    }
    if (!prealloc) {
        check_allocated(&vmem.dst, kinds);
    }
out:
    virtio_mem_end(&vmem);
}

static void test_virtio_mem_plugged(const void *opaque)
{
    virtio_mem_plugged(opaque, false);
}

static void test_virtio_mem_prealloc(const void *opaque)
{
    virtio_mem_plugged(opaque, true);
}

/* virtio-balloon */

/* Queues of the device, if it has no other features */
#define BALLOON_INFLATE 0
#define BALLOON_REPORTING 3

/* What is given back: runs of pages */
#define BALLOON_RUN 16
#define BALLOON_RUNS_PER_REQUEST 16

static bool balloon_run_is_out(uint64_t run)
{
    return run * BALLOON_RUN * 4096 >= DRIVER_END && run % 3 == 1;
}

/* The pages of a number of runs, one by one */
static void balloon_inflate(Device *device, const uint64_t *runs, unsigned n)
{
    uint32_t pfns[BALLOON_RUNS_PER_REQUEST * BALLOON_RUN];
    uint64_t address = guest_alloc(&device->alloc, sizeof(pfns));
    unsigned i;

    for (i = 0; i < n * BALLOON_RUN; i++) {
        pfns[i] = cpu_to_le32(runs[i / BALLOON_RUN] * BALLOON_RUN +
                              i % BALLOON_RUN);
    }
    qtest_memwrite(device->qts, address, pfns, i * sizeof(pfns[0]));
    device_wait(device, qvirtqueue_add(device->qts, device->vq, address,
                                       i * sizeof(pfns[0]), false, false));
    guest_free(&device->alloc, address);
}

/* Each run as one element of a request */
static void balloon_report(Device *device, const uint64_t *runs, unsigned n)
{
    uint32_t head = 0;
    unsigned i;

    for (i = 0; i < n; i++) {
        uint32_t desc = qvirtqueue_add(device->qts, device->vq,
                                       runs[i] * BALLOON_RUN * 4096,
                                       BALLOON_RUN * 4096, true, i + 1 < n);

        if (i == 0) {
            head = desc;
        }
    }
    device_wait(device, head);
    /* libqos does not give back descriptors */
    device->vq->free_head = 0;
    device->vq->num_free = device->vq->size;
}

static void balloon_give_back(QTestState *qts, uint64_t pages, bool report)
{
    uint64_t runs[BALLOON_RUNS_PER_REQUEST];
    uint64_t run;
    unsigned n = 0;
    Device device;

    device_start(&device, qts, report ? BALLOON_REPORTING : BALLOON_INFLATE);
    for (run = 0; run < pages / BALLOON_RUN; run++) {
        if (balloon_run_is_out(run)) {
            runs[n++] = run;
        }
        if (n == BALLOON_RUNS_PER_REQUEST ||
            (n && run + 1 == pages / BALLOON_RUN)) {
            if (report) {
                balloon_report(&device, runs, n);
            } else {
                balloon_inflate(&device, runs, n);
            }
            n = 0;
        }
    }
    device_end(&device);
}

/* All of the guest's memory has data, until the guest gives a part back */
static void balloon_test(const DeviceMode *mode, bool report)
{
    g_autofree char *opts = g_strdup_printf(
        "-device virtio-balloon-pci,bus=pcie.0,addr=%x,"
        "free-page-reporting=%s", DEVICE_SLOT, report ? "on" : "off");
    g_autofree uint8_t *kinds = NULL;
    g_autofree unsigned long *data = NULL;
    g_auto(GuestRamState) before = { };
    SparseGuests guests;
    uint64_t page, pages;

    if (!guests_start(&guests, opts, opts)) {
        return;
    }
    if (!sparse_guests_prepare(&guests, &mode->route, env)) {
        goto out;
    }

    pages = guest_ram_pages(&guests.src);
    kinds = sparse_pattern_new(PATTERN_DENSE, pages);
    /* The driver's memory is not looked at: what is in it differs */
    memset(kinds + DRIVER_START / guests.src.page_size, PAGE_HOLE,
           (DRIVER_END - DRIVER_START) / guests.src.page_size);
    guest_ram_prepare(&guests.src, kinds);
    balloon_give_back(guests.from, pages, report);
    for (page = 0; page < pages; page++) {
        if (balloon_run_is_out(page / BALLOON_RUN)) {
            kinds[page] = PAGE_HOLE;
        }
    }
    guest_ram_state_take(&before, &guests.src);
    for (page = 0; page < pages; page++) {
        if (balloon_run_is_out(page / BALLOON_RUN)) {
            g_assert_false(test_bit(page, before.pages));
        }
    }

    sparse_guests_migrate(&guests, &mode->route, env);

    guest_ram_report(&guests.src, &guests.dst, before.bytes);
    check_unchanged(&guests.src, &before);
    data = guest_ram_check_content(&guests.src, &guests.dst, kinds, 0, pages);
    for (page = 0; page < pages; page++) {
        kinds[page] = test_bit(page, data) ? PAGE_DATA : PAGE_ZERO;
        if (balloon_run_is_out(page / BALLOON_RUN)) {
            g_assert_false(test_bit(page, data));
        }
    }
    check_allocated(&guests.dst, kinds);
out:
    sparse_guests_end(&guests);
}

static void test_balloon(const void *opaque)
{
    balloon_test(opaque, false);
}

static void test_free_page_reporting(const void *opaque)
{
    balloon_test(opaque, true);
}

/* CPR */

static uint8_t *cpr_pattern_new(uint64_t pages)
{
    uint8_t *kinds = g_new0(uint8_t, pages);
    uint64_t page;

    for (page = 0; page < pages; page += CPR_STRIDE) {
        kinds[page] = PAGE_DATA;
    }
    kinds[pages - 1] = PAGE_DATA;
    return kinds;
}

/* What a process occupies, with its page tables, in bytes */
static uint64_t process_bytes(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", pid);
    g_autofree char *status = NULL;
    g_auto(GStrv) lines = NULL;
    uint64_t bytes = 0;
    int i;

    g_assert(g_file_get_contents(path, &status, NULL, NULL));
    lines = g_strsplit(status, "\n", -1);
    for (i = 0; lines[i]; i++) {
        uint64_t kib;

        if (sscanf(lines[i], "VmRSS: %" SCNu64 " kB", &kib) == 1 ||
            sscanf(lines[i], "VmPTE: %" SCNu64 " kB", &kib) == 1) {
            bytes += kib * KiB;
        }
    }
    g_assert_cmpuint(bytes, >, 0);
    return bytes;
}

/*
 * The destination connects its monitor only after it has read the CPR channel,
 * so nothing else tells that it listens.
 */
static void wait_for_listener(const char *path)
{
    int64_t end = g_get_monotonic_time() + DEVICE_TIMEOUT_US;

    while (true) {
        g_autofree char *sockets = NULL;
        g_auto(GStrv) lines = NULL;
        int i;

        g_assert(g_file_get_contents("/proc/net/unix", &sockets, NULL, NULL));
        lines = g_strsplit(sockets, "\n", -1);
        for (i = 0; lines[i]; i++) {
            unsigned flags;

            if (g_str_has_suffix(lines[i], path) &&
                sscanf(lines[i], "%*s %*s %*s %x", &flags) == 1 &&
                (flags & 0x10000 /* __SO_ACCEPTCON */)) {
                return;
            }
        }
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

/* Both processes have the same file, and what is in it has not changed */
static void check_handed_over(QTestState *to, const GuestRam *src,
                              const GuestRam *dst, const uint8_t *kinds,
                              const GuestRamState *before)
{
    uint64_t hole = CPR_SIZE / 2 / src->page_size + 1;
    g_autofree uint64_t *buf = g_malloc(src->page_size);
    struct stat src_stat, dst_stat;

    g_assert_cmpint(fstat(src->fd, &src_stat), ==, 0);
    g_assert_cmpint(fstat(dst->fd, &dst_stat), ==, 0);
    g_assert_cmpuint(src_stat.st_dev, ==, dst_stat.st_dev);
    g_assert_cmpuint(src_stat.st_ino, ==, dst_stat.st_ino);
    check_unchanged(src, before);
    check_unchanged(dst, before);
    guest_ram_check_pattern(src, kinds);
    guest_ram_check_pattern(dst, kinds);

    /* It is the guest's memory in the new process: above the hole below 4G */
    g_assert_cmpint(kinds[hole], ==, PAGE_HOLE);
    qtest_writeq(to, hole * src->page_size + 2 * GiB, 0x12345678);
    guest_ram_read_page(src, hole, buf);
    g_assert_cmpuint(le64_to_cpu(buf[0]), ==, 0x12345678);
    g_assert_cmpuint(guest_ram_allocated_bytes(src), ==,
                     before->bytes + src->page_size);
}

static void test_cpr_transfer(void)
{
    g_autofree char *cpr_path = g_strdup_printf("%s/cpr.sock", env->tmpfs);
    g_autofree char *mig_path = g_strdup_printf("%s/migsocket", env->tmpfs);
    g_autofree char *uri = g_strdup_printf("unix:%s", mig_path);
    g_autofree char *channels = g_strdup_printf(
        "[ { 'channel-type': 'main',"
        "    'addr': { 'transport': 'socket', 'type': 'unix', 'path': '%s' } },"
        "  { 'channel-type': 'cpr',"
        "    'addr': { 'transport': 'socket', 'type': 'unix', 'path': '%s' } }"
        " ]", mig_path, cpr_path);
    g_autofree char *memory = NULL;
    g_autofree char *src_opts = NULL;
    g_autofree char *dst_opts = NULL;
    g_autofree uint8_t *kinds = NULL;
    g_auto(GuestRamState) before = { };
    MigrateStart args = { .defer_target_connect = true };
    uint64_t src_bytes, src_after, dst_after;
    GuestRam src, dst;
    QTestState *from, *to;

    guest_ram_init(&src, BACKEND_MEMFD, CPR_SIZE);
    guest_ram_init(&dst, BACKEND_MEMFD, CPR_SIZE);
    memory = guest_ram_opts(&src, NULL);
    /* The display and the ROMs have memory as well, which is handed over */
    src_opts = g_strdup_printf("-S %s -machine aux-ram-share=on -nodefaults "
                               "-vga std", memory);
    dst_opts = g_strdup_printf("%s -incoming cpr,addr.transport=socket,"
                               "addr.type=unix,addr.path=%s", src_opts,
                               cpr_path);
    args.opts_source = src_opts;
    args.opts_target = dst_opts;
    if (migrate_start(&from, &to, uri, &args)) {
        goto out;
    }
    guest_ram_open(&src, from);
    kinds = cpr_pattern_new(guest_ram_pages(&src));
    guest_ram_prepare(&src, kinds);
    guest_ram_state_take(&before, &src);
    src_bytes = process_bytes(src.pid);

    migrate_set_parameter_str(from, "mode", "cpr-transfer");
    wait_for_listener(cpr_path);
    migrate_qmp(from, to, NULL, qobject_from_json(channels, &error_abort),
                "{}");
    qtest_connect(to);
    qtest_qmp_handshake(to, NULL);
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);

    guest_ram_open(&dst, to);
    src_after = process_bytes(src.pid);
    dst_after = process_bytes(dst.pid);
    g_test_message("source: %" PRIu64 " KiB, it had %" PRIu64
                   "; destination: %" PRIu64 " KiB", src_after / KiB,
                   src_bytes / KiB, dst_after / KiB);
    g_assert_cmpuint(src_after, <=, src_bytes + MAX_CPR_GROWTH);
    g_assert_cmpuint(dst_after, <=, src_bytes + MAX_CPR_GROWTH);
    check_handed_over(to, &src, &dst, kinds, &before);

    migrate_end(from, to, false);
out:
    guest_ram_close(&src);
    guest_ram_close(&dst);
}

typedef struct DeviceTest {
    /* Path below /migration/sparse/device */
    const char *name;
    const char *device;
    void (*test)(const void *opaque);
    /* Not in all modes, but in those with nothing of their own */
    bool basic;
} DeviceTest;

static const DeviceTest device_tests[] = {
    {
        .name = "virtio-mem/unplugged",
        .device = "virtio-mem-pci",
        .test = test_virtio_mem_unplugged,
    }, {
        .name = "virtio-mem/plugged",
        .device = "virtio-mem-pci",
        .test = test_virtio_mem_plugged,
    }, {
        .name = "virtio-mem/prealloc",
        .device = "virtio-mem-pci",
        .test = test_virtio_mem_prealloc,
        .basic = true,
    }, {
        .name = "balloon",
        .device = "virtio-balloon-pci",
        .test = test_balloon,
    }, {
        .name = "free-page-reporting",
        .device = "virtio-balloon-pci",
        .test = test_free_page_reporting,
        .basic = true,
    },
};

void migration_test_add_sparse_devices(MigrationTestEnv *the_env)
{
    int i, j;

    env = the_env;

    for (i = 0; i < ARRAY_SIZE(device_tests); i++) {
        const DeviceTest *test = &device_tests[i];

        if (!qtest_has_device(test->device)) {
            continue;
        }
        for (j = 0; j < ARRAY_SIZE(device_modes); j++) {
            g_autofree char *path = g_strdup_printf(
                "/migration/sparse/device/%s/%s", test->name,
                device_modes[j].route.name);

            if (!test->basic || device_modes[j].basic) {
                qtest_add_data_func(path, &device_modes[j], test->test);
            }
        }
    }
    migration_test_add("/migration/sparse/cpr/transfer", test_cpr_transfer);
}
