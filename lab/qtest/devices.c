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
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qobject/qjson.h"
#include "sparse-lab.h"
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

static const SparseWay file = { .name = "file", SPARSE_FILE };

#define ALL_WAYS \
    { &sparse_precopy, &sparse_runs, &sparse_multifd, &sparse_postcopy, \
      &file, &sparse_mapped_ram, &lab_mapped_ram_multifd, &lab_snapshot }
#define BASIC_WAYS { &sparse_precopy, &sparse_multifd }

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

/* virtio-mem: another memory, besides the main one */

#define VMEM_OPTS(total, size, requested) \
    "-m maxmem=" total " " \
    "-object memory-backend-memfd,share=on,id=" VMEM_ID ",size=" size " " \
    "-device virtio-mem-pci,bus=pcie.0,addr=10," \
    "memdev=" VMEM_ID ",requested-size=" requested

static GuestRam vmem_src, vmem_dst;

static void virtio_mem_open(SparseGuests *guests, uint64_t size)
{
    guest_ram_init(&vmem_src, &sparse_memfd, size);
    guest_ram_init(&vmem_dst, &sparse_memfd, size);
    guest_ram_open(&vmem_src, guests->from);
    guest_ram_open(&vmem_dst, guests->to);
}

static void virtio_mem_close(void)
{
    guest_ram_close(&vmem_src);
    guest_ram_close(&vmem_dst);
}

/* Nothing has been plugged: there is nothing that could be sent */
static void unplugged_prepare(SparseGuests *guests)
{
    virtio_mem_open(guests, VMEM_IDLE_SIZE);
}

static void unplugged_check(SparseGuests *guests)
{
    /* It is not even sent as zero */
    g_assert_cmpint(read_ram_property_int(guests->from, "duplicate"),
                    <, vmem_src.pages);
    g_assert_cmpuint(guest_ram_allocated_bytes(&vmem_src), ==, 0);
    g_assert_cmpuint(guest_ram_allocated_bytes(&vmem_dst), ==, 0);
    virtio_mem_close();
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
    unsigned long *plugged = bitmap_new(ram->pages);
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

static unsigned long *vmem_plugged;
static uint8_t *vmem_kinds;
static GuestRamState vmem_before;

/*
 * Half of the memory is plugged, and has data, zero pages and holes.  Without
 * prealloc=on there is old data in all of the destination's file.  There is a
 * page of data where the guest of the source has nothing plugged, which must
 * not be sent.
 */
static void plugged_prepare(SparseGuests *guests)
{
    g_autofree void *stray = NULL;
    uint64_t page;

    virtio_mem_open(guests, VMEM_SIZE);
    vmem_plugged = virtio_mem_plug_half(guests->from, &vmem_src);
    vmem_kinds = sparse_pattern_new(&sparse_mixed, vmem_src.pages);
    for (page = 0; page < vmem_src.pages; page++) {
        if (!test_bit(page, vmem_plugged)) {
            vmem_kinds[page] = PAGE_HOLE;
        }
    }
    guest_ram_prepare(&vmem_src, vmem_kinds);
    stray = g_malloc(vmem_src.page_size);
    memset(stray, 0x5a, vmem_src.page_size);
    guest_ram_write_page(&vmem_src, vmem_src.pages - 1, stray);
    /* What QEMU has preallocated itself is known to be zero */
    if (!guests->row->dst_opts) {
        guest_ram_make_stale(&vmem_dst);
    }
    guest_ram_state_take(&vmem_before, &vmem_src);
    /* The driver has written to the main memory, too */
    g_clear_pointer(&guests->kinds, g_free);
}

static void plugged_check(SparseGuests *guests)
{
    bool prealloc = guests->row->dst_opts;
    g_autofree unsigned long *data = sparse_data_pages(vmem_kinds,
                                                       vmem_src.pages);
    g_autofree unsigned long *allocated = NULL;
    GuestRamState nothing = { };
    uint64_t page;

    guest_ram_check_allocation(&vmem_src, SPARSE_KEPT, &vmem_before, NULL);
    if (!prealloc) {
        guest_ram_check_allocation(&vmem_dst, SPARSE_DATA, &nothing, data);
    }
    guest_ram_check_pattern(&vmem_dst, vmem_kinds);
    allocated = guest_ram_allocated_pages(&vmem_dst);
    for (page = 0; page < vmem_dst.pages; page++) {
        if (!test_bit(page, vmem_plugged)) {
            g_assert_false(test_bit(page, allocated));
        } else if (prealloc) {
            g_assert_true(test_bit(page, allocated));
        }
    }
    guest_ram_state_clear(&vmem_before);
    g_free(vmem_plugged);
    g_free(vmem_kinds);
    virtio_mem_close();
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

/*
 * All of the guest's memory but that of the driver has data, until the guest
 * gives a part back
 */
static void balloon_shape(SparseGuests *guests)
{
    memset(guests->kinds + DRIVER_START / guests->src.page_size, PAGE_HOLE,
           (DRIVER_END - DRIVER_START) / guests->src.page_size);
}

static void check_balloon(const GuestRam *ram)
{
    g_autofree unsigned long *pages = guest_ram_allocated_pages(ram);
    uint64_t page;

    for (page = 0; page < ram->pages; page++) {
        if (balloon_run_is_out(page / BALLOON_RUN)) {
            g_assert_false(test_bit(page, pages));
        }
    }
}

static void balloon_prepare(SparseGuests *guests)
{
    balloon_give_back(guests->from, guests->src.pages,
                      strstr(guests->row->opts, "reporting=on"));
    check_balloon(&guests->src);
    /* The driver has written to the memory, too */
    g_clear_pointer(&guests->kinds, g_free);
}

static void balloon_check(SparseGuests *guests)
{
    uint64_t page, in = 0;
    g_autofree uint64_t *expected = g_malloc(guests->dst.page_size);
    g_autofree uint64_t *buf = g_malloc(guests->dst.page_size);
    g_autofree uint8_t *kinds = sparse_pattern_new(&lab_dense,
                                                   guests->dst.pages);

    check_balloon(&guests->dst);
    /* What is neither given back nor the driver's is what was written */
    for (page = DRIVER_END / guests->dst.page_size; page < guests->dst.pages;
         page++) {
        if (!balloon_run_is_out(page / BALLOON_RUN)) {
            sparse_pattern_page(expected, kinds, page, guests->dst.page_size);
            guest_ram_read_page(&guests->dst, page, buf);
            g_assert(memcmp(expected, buf, guests->dst.page_size) == 0);
            in++;
        }
    }
    g_assert_cmpuint(in, >, guests->dst.pages / 2);
}

/* CPR */

static PageKind cpr_kind(uint64_t page, uint64_t pages)
{
    return page % CPR_STRIDE == 0 || page + 1 == pages ? PAGE_DATA : PAGE_HOLE;
}

static const SparsePattern cpr_pattern = { "cpr", cpr_kind };

/* What a process occupies, with its page tables */
static uint64_t process_bytes(pid_t pid)
{
    return lab_status_bytes(pid, "VmRSS") + lab_status_bytes(pid, "VmPTE");
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
    guest_ram_check_allocation(src, SPARSE_KEPT, before, NULL);
    guest_ram_check_allocation(dst, SPARSE_KEPT, before, NULL);
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

static void test_cpr_transfer(const void *opaque)
{
    g_autofree char *cpr_path = g_strdup_printf("%s/cpr.sock",
                                                sparse_env->tmpfs);
    g_autofree char *mig_path = g_strdup_printf("%s/migsocket",
                                                sparse_env->tmpfs);
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

    guest_ram_init(&src, &sparse_memfd, CPR_SIZE);
    guest_ram_init(&dst, &sparse_memfd, CPR_SIZE);
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
    kinds = sparse_pattern_new(&cpr_pattern, src.pages);
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

#define VMEM_PLUGGED VMEM_OPTS("384M", "256M", "128M")
#define BALLOON(reporting) \
    "-device virtio-balloon-pci,bus=pcie.0,addr=10," \
    "free-page-reporting=" reporting

static const char *vmem_skip_reason(void)
{
    return qtest_has_device("virtio-mem-pci")
        ? NULL : "QEMU does not have this device";
}

static const char *balloon_skip_reason(void)
{
    return qtest_has_device("virtio-balloon-pci")
        ? NULL : "QEMU does not have this device";
}

static const SparseRow rows[] = {
    {
        .name = "device/virtio-mem/unplugged/%w", .ways = ALL_WAYS,
        .opts = VMEM_OPTS("8320M", "8G", "0"), .patterns = { &sparse_empty },
        .skip_reason = vmem_skip_reason,
        .prepare = unplugged_prepare, .check = unplugged_check,
        .expect.holes = HOLES_ANY,
    }, {
        .name = "device/virtio-mem/plugged/%w", .ways = ALL_WAYS,
        .opts = VMEM_PLUGGED, .patterns = { &sparse_empty },
        .skip_reason = vmem_skip_reason,
        .prepare = plugged_prepare, .check = plugged_check,
        .expect.holes = HOLES_ANY,
    }, {
        .name = "device/virtio-mem/prealloc/%w", .ways = BASIC_WAYS,
        .src_opts = VMEM_PLUGGED, .dst_opts = VMEM_PLUGGED ",prealloc=on",
        .patterns = { &sparse_empty }, .skip_reason = vmem_skip_reason,
        .prepare = plugged_prepare, .check = plugged_check,
        .expect.holes = HOLES_ANY,
    }, {
        .name = "device/balloon/%w", .ways = ALL_WAYS, .opts = BALLOON("off"),
        .skip_reason = balloon_skip_reason,
        .patterns = { &lab_dense }, .shape = balloon_shape,
        .prepare = balloon_prepare, .check = balloon_check,
        .expect.holes = HOLES_ANY,
    }, {
        .name = "device/free-page-reporting/%w", .ways = BASIC_WAYS,
        .opts = BALLOON("on"),
        .skip_reason = balloon_skip_reason,
        .patterns = { &lab_dense }, .shape = balloon_shape,
        .prepare = balloon_prepare, .check = balloon_check,
        .expect.holes = HOLES_ANY,
    },
};

void lab_add_devices(void)
{
    sparse_add_rows(rows, ARRAY_SIZE(rows));
    lab_add_test("cpr/transfer", NULL, test_cpr_transfer);
}
