/*
 * Unit tests for zero pages and holes in guest RAM
 *
 * Runs system/ramblock-holes.c, migration/ram-holes*.c and ram-zero-runs.c on a
 * RAMBlock of its own, with stubs in place of the machine, so that decisions can
 * be tested for what is not at hand: memory pinned by a device, RDMA, seals,
 * read-only files.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/filter.h>
#include <linux/memfd.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include "exec/ramlist.h"
#include "exec/target_page.h"
#include "hw/virtio/vhost.h"
#include "migration/misc.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/error-report.h"
#include "qemu/populated-memory.h"
#include "qemu/units.h"
#include "qemu/userfaultfd.h"
#include "qom/object.h"
#include "system/hostmem.h"
#include "system/memory.h"
#include "system/runstate.h"
#include "system/system.h"
#include "../../migration/migration.h"
#include "../../migration/options.h"
#include "../../migration/postcopy-ram.h"
#include "../../migration/ram.h"
#include "../../migration/ram-holes.h"
#include "../../migration/ram-zero-runs.h"

#define TARGET_PAGE (4 * KiB)
#define HUGE_PAGE (2 * MiB)
#define BLOCK_SIZE (64 * TARGET_PAGE)

/* Of ram-holes.c: pages, and bytes */
#define PRIVATE_ASK_MIN 32
#define PRIVATE_RUN_MAX (2 * MiB)
#define DATA 0xa5

/* The machine */

static struct {
    bool ram_holes;
    bool rdma;
    bool postcopy;
    bool discard_disabled;
    /* What a RamDiscardManager says, if there is one */
    bool has_discard_manager;
    bool keeps_populated;
    Object *owner;
    /* The guest has run, with a vhost device or without one */
    bool has_run;
    bool vhost;
    bool ignored;
    RAMBlock *rb;
    unsigned yields;
    /* How often a zero page was placed, and the last one */
    unsigned placed;
    void *placed_at;
    PostcopyState postcopy_state;
} machine;

static MigrationIncomingState incoming;

RAMList ram_list;
MlockState mlock_state;
const TargetPageBits target_page = {
    .decided = true,
    .bits = 12,
    .mask = (int)-TARGET_PAGE,
};

bool migrate_ram_holes(void)
{
    return machine.ram_holes;
}

bool migrate_rdma(void)
{
    return machine.rdma;
}

bool migrate_postcopy_ram(void)
{
    return machine.postcopy;
}

bool migrate_sparse_ram(void)
{
    return false;
}

bool migrate_mapped_ram(void)
{
    return false;
}

bool migration_in_postcopy(void)
{
    return false;
}

bool migration_rate_limit(void)
{
    return false;
}

void postcopy_temp_page_reset(PostcopyTmpPage *tmp_page)
{
    g_assert_not_reached();
}

PostcopyState postcopy_state_get(void)
{
    return machine.postcopy_state;
}

MigrationIncomingState *migration_incoming_get_current(void)
{
    return &incoming;
}

size_t qemu_ram_pagesize(RAMBlock *rb)
{
    return rb->page_size;
}

void ramblock_recv_bitmap_set_range(RAMBlock *rb, void *host_addr, size_t nr)
{
    bitmap_set(rb->receivedmap,
               (host_addr - (void *)rb->host) / TARGET_PAGE, nr);
}

void ram_load_yield(void)
{
    machine.yields++;
}

int postcopy_place_page_zero(MigrationIncomingState *mis, void *host,
                             RAMBlock *rb)
{
    machine.placed++;
    machine.placed_at = host;
    ramblock_recv_bitmap_set_range(rb, host, rb->page_size / TARGET_PAGE);
    if (g_tree_remove(mis->page_requested, host)) {
        mis->page_requested_count--;
    }
    return 0;
}

bool migrate_ram_is_ignored(RAMBlock *rb)
{
    return machine.ignored;
}

bool ram_block_discard_is_disabled(void)
{
    return machine.discard_disabled;
}

bool should_mlock(MlockState state)
{
    return state != MLOCK_OFF;
}

bool is_mlock_on_fault(MlockState state)
{
    return state == MLOCK_ON_FAULT;
}

Object *memory_region_owner(MemoryRegion *mr)
{
    return machine.owner;
}

bool runstate_check(RunState state)
{
    return state == (machine.has_run ? RUN_STATE_RESTORE_VM
                                     : RUN_STATE_INMIGRATE);
}

unsigned int vhost_get_max_memslots(void)
{
    return machine.vhost ? 8 : UINT_MAX;
}

RamDiscardManager *memory_region_get_ram_discard_manager(MemoryRegion *mr)
{
    return machine.has_discard_manager ? (RamDiscardManager *)&machine : NULL;
}

bool ram_discard_manager_keeps_populated(const RamDiscardManager *rdm)
{
    return machine.keeps_populated;
}

RAMBlock *qemu_ram_block_from_host(void *ptr, bool round_offset,
                                   ram_addr_t *offset)
{
    RAMBlock *rb = machine.rb;

    if (!rb || ptr < (void *)rb->host ||
        ptr >= (void *)rb->host + rb->used_length) {
        return NULL;
    }
    *offset = ptr - (void *)rb->host;
    return rb;
}

/* The block */

typedef struct TestBlock {
    RAMBlock rb;
    RAMBlockHoles holes;
} TestBlock;

static void test_block_init_mapped(TestBlock *block, int fd,
                                   uint64_t fd_offset, uint64_t size,
                                   int map_flags, uint32_t flags)
{
    void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, map_flags, fd,
                      fd_offset);

    g_assert_true(host != MAP_FAILED);
    *block = (TestBlock) {
        .rb = {
            .host = host,
            .used_length = size,
            .max_length = size,
            .flags = flags,
            .idstr = "test",
            .fd = fd,
            .fd_offset = fd_offset,
            .page_size = qemu_real_host_page_size(),
        },
    };
    block->rb.holes = &block->holes;
    ram_block_holes_init(&block->holes, &block->rb);
    ram_holes_setup_block(&block->rb);
    block->holes.used = false;
}

static int memfd_new(uint64_t size)
{
    int fd = memfd_create("test-ram-holes", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    g_assert_no_errno(fd);
    g_assert_no_errno(ftruncate(fd, size));
    return fd;
}

static void test_block_init(TestBlock *block)
{
    test_block_init_mapped(block, memfd_new(BLOCK_SIZE), 0, BLOCK_SIZE,
                           MAP_SHARED, RAM_SHARED);
}

static void test_block_destroy(TestBlock *block)
{
    munmap(block->rb.host, block->rb.max_length);
    if (block->rb.fd >= 0) {
        close(block->rb.fd);
    }
    memset(&machine, 0, sizeof(machine));
    machine.ram_holes = true;
    mlock_state = MLOCK_OFF;
}

static uint64_t allocated_pages(TestBlock *block)
{
    struct stat st;

    g_assert_no_errno(fstat(block->rb.fd, &st));
    return st.st_blocks * 512 / TARGET_PAGE;
}

/* Of pages @first to @last, and with a kernel that does not mind allocating */
static void assert_pages(TestBlock *block, unsigned first, unsigned last,
                         int byte)
{
    uint8_t *p = block->rb.host + first * TARGET_PAGE;

    for (uint64_t i = 0; i < (last - first + 1) * TARGET_PAGE; i++) {
        g_assert_cmpint(p[i], ==, byte);
    }
}

static void fill_pages(TestBlock *block, unsigned first, unsigned last)
{
    memset(block->rb.host + first * TARGET_PAGE, DATA,
           (last - first + 1) * TARGET_PAGE);
}

static void ram_block_discard_all(TestBlock *block)
{
    g_assert_no_errno(fallocate(block->rb.fd,
                                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                block->rb.fd_offset, block->rb.max_length));
}

static void zero_pages(TestBlock *block, unsigned first, unsigned last)
{
    ram_handle_zero(&block->rb, first * TARGET_PAGE,
                    (last - first + 1) * TARGET_PAGE);
}

/*
 * Fill pages 8 to 15, zero 4 to 11, and say how many pages are allocated then.
 * Whatever the policy is, the content must be right.
 */
static uint64_t zero_half(TestBlock *block)
{
    uint64_t pages;

    fill_pages(block, 8, 15);
    g_assert_cmpint(allocated_pages(block), ==, 8);
    zero_pages(block, 4, 11);
    pages = allocated_pages(block);
    assert_pages(block, 4, 11, 0);
    assert_pages(block, 12, 15, DATA);
    return pages;
}

/* Standard error goes to a file from stderr_capture() to stderr_release(). */

static int stderr_file = -1, stderr_saved = -1;

static void stderr_capture(void)
{
    stderr_file = memfd_create("stderr", MFD_CLOEXEC);
    stderr_saved = dup(STDERR_FILENO);
    g_assert_no_errno(dup2(stderr_file, STDERR_FILENO));
}

/* Returns the number of lines that have been captured. */
static unsigned stderr_release(void)
{
    unsigned lines = 0;
    char c;

    g_assert_no_errno(dup2(stderr_saved, STDERR_FILENO));
    g_assert_no_errno(lseek(stderr_file, 0, SEEK_SET));
    while (read(stderr_file, &c, 1) == 1) {
        lines += c == '\n';
    }
    close(stderr_saved);
    close(stderr_file);
    return lines;
}

static void test_hole_and_punched(void)
{
    TestBlock block;

    test_block_init(&block);
    zero_pages(&block, 0, 63);
    g_assert_cmpint(allocated_pages(&block), ==, 0);
    g_assert_cmpint(zero_half(&block), ==, 4);
    test_block_destroy(&block);
}

static void test_fd_offset(void)
{
    TestBlock block;
    int fd = memfd_new(2 * BLOCK_SIZE);
    uint8_t byte = DATA;

    test_block_init_mapped(&block, fd, BLOCK_SIZE, BLOCK_SIZE, MAP_SHARED,
                           RAM_SHARED);
    /* In front of the block, where its first page would be without offset */
    g_assert_cmpint(pwrite(fd, &byte, 1, 0), ==, 1);
    fill_pages(&block, 0, 1);
    zero_pages(&block, 0, 0);
    g_assert_cmpint(allocated_pages(&block), ==, 2);
    g_assert_cmpint(pread(fd, &byte, 1, 0), ==, 1);
    g_assert_cmpint(byte, ==, DATA);
    assert_pages(&block, 0, 0, 0);
    assert_pages(&block, 1, 1, DATA);
    test_block_destroy(&block);
}

/* A hole is left alone in all of these, and nothing is punched. */

static void test_discard_disabled(void)
{
    TestBlock block;

    test_block_init(&block);
    machine.discard_disabled = true;
    g_assert_cmpint(zero_half(&block), ==, 8);

    /* A device that goes away gives back the permission */
    machine.discard_disabled = false;
    zero_pages(&block, 8, 11);
    g_assert_cmpint(allocated_pages(&block), ==, 4 + 4);
    test_block_destroy(&block);
}

static void test_rdma(void)
{
    TestBlock block;

    test_block_init(&block);
    machine.rdma = true;
    g_assert_cmpint(zero_half(&block), ==, 8);
    test_block_destroy(&block);
}

static void test_mlock(void)
{
    TestBlock block;

    mlock_state = MLOCK_ON;
    test_block_init(&block);
    g_assert_cmpint(zero_half(&block), ==, 8);
    test_block_destroy(&block);

    mlock_state = MLOCK_ON_FAULT;
    test_block_init(&block);
    g_assert_cmpint(zero_half(&block), ==, 4);
    test_block_destroy(&block);
}

/* How many pages stay allocated if something manages what is discarded */
static uint64_t zero_half_managed(bool keeps_populated)
{
    TestBlock block;
    MemoryRegion mr = { };
    uint64_t pages;

    machine.has_discard_manager = true;
    machine.keeps_populated = keeps_populated;
    test_block_init(&block);
    block.rb.mr = &mr;
    ram_holes_setup_block(&block.rb);
    pages = zero_half(&block);
    test_block_destroy(&block);
    return pages;
}

static void test_discard_manager(void)
{
    g_assert_cmpint(zero_half_managed(false), ==, 4);
    g_assert_cmpint(zero_half_managed(true), ==, 8);
}

/* What is reserved stays so, whether the guest wrote to it or not. */
static void test_reserved(void)
{
    TestBlock block;
    int fd = memfd_new(BLOCK_SIZE);

    g_assert_no_errno(fallocate(fd, 0, 0, BLOCK_SIZE));
    test_block_init_mapped(&block, fd, 0, BLOCK_SIZE, MAP_SHARED, RAM_SHARED);
    fill_pages(&block, 8, 15);
    zero_pages(&block, 0, 11);
    g_assert_cmpint(allocated_pages(&block), ==, BLOCK_SIZE / TARGET_PAGE);
    assert_pages(&block, 0, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    test_block_destroy(&block);
}

/* A file that has a page of somebody else, and holes, which stay holes */
static void test_used(void)
{
    TestBlock block;
    int fd = memfd_new(BLOCK_SIZE);
    uint8_t byte = DATA;

    g_assert_cmpint(pwrite(fd, &byte, 1, 0), ==, 1);
    test_block_init_mapped(&block, fd, 0, BLOCK_SIZE, MAP_SHARED, RAM_SHARED);
    zero_pages(&block, 0, 63);
    g_assert_cmpint(allocated_pages(&block), ==, 1);
    assert_pages(&block, 0, 0, 0);
    test_block_destroy(&block);
}

/* What QEMU created is not reserved, whatever is in it. */

#define TYPE_OTHER_BACKEND "other-backend"
/* hostmem-shm.c */
#define TYPE_MEMORY_BACKEND_SHM "memory-backend-shm"

static const TypeInfo backends[] = {
    {
        .name = TYPE_MEMORY_BACKEND,
        .parent = TYPE_OBJECT,
        .instance_size = sizeof(HostMemoryBackend),
        .class_size = sizeof(HostMemoryBackendClass),
        .abstract = true,
    }, {
        .name = TYPE_MEMORY_BACKEND_MEMFD,
        .parent = TYPE_MEMORY_BACKEND,
    }, {
        .name = TYPE_MEMORY_BACKEND_SHM,
        .parent = TYPE_MEMORY_BACKEND,
    }, {
        .name = TYPE_MEMORY_BACKEND_RAM,
        .parent = TYPE_MEMORY_BACKEND,
    }, {
        .name = TYPE_MEMORY_BACKEND_FILE,
        .parent = TYPE_MEMORY_BACKEND,
    }, {
        .name = TYPE_OTHER_BACKEND,
        .parent = TYPE_MEMORY_BACKEND,
    },
    { .name = "x86-machine", .parent = TYPE_OBJECT },
};

/* How many pages stay allocated of a file with old data behind a backend */
static uint64_t zero_half_of(const char *backend)
{
    TestBlock block;
    MemoryRegion mr = { };
    Object *owner = object_new(backend);
    uint64_t pages;

    test_block_init(&block);
    fill_pages(&block, 8, 15);
    machine.owner = owner;
    block.rb.mr = &mr;
    ram_holes_setup_block(&block.rb);
    pages = zero_half(&block);
    test_block_destroy(&block);
    object_unref(owner);
    return pages;
}

static void test_created_by_qemu(void)
{
    g_assert_cmpint(zero_half_of(TYPE_MEMORY_BACKEND_MEMFD), ==, 4);
    g_assert_cmpint(zero_half_of(TYPE_MEMORY_BACKEND_SHM), ==, 4);
    g_assert_cmpint(zero_half_of(TYPE_MEMORY_BACKEND_RAM), ==, 4);
    g_assert_cmpint(zero_half_of(TYPE_MEMORY_BACKEND_FILE), ==, 8);
    g_assert_cmpint(zero_half_of(TYPE_OTHER_BACKEND), ==, 8);
}

/* Of a snapshot, with and without a process that may have pinned the memory */
static void test_vhost(void)
{
    TestBlock block;

    test_block_init(&block);
    machine.vhost = true;
    g_assert_cmpint(zero_half(&block), ==, 4);
    test_block_destroy(&block);

    test_block_init(&block);
    machine.has_run = true;
    g_assert_cmpint(zero_half(&block), ==, 4);
    machine.vhost = true;
    zero_pages(&block, 12, 15);
    /* Reading has allocated the others */
    g_assert_cmpint(allocated_pages(&block), ==, 12);
    assert_pages(&block, 12, 15, 0);
    test_block_destroy(&block);
}

static void test_readonly_fd(void)
{
    TestBlock block;

    test_block_init(&block);
    block.rb.flags |= RAM_READONLY_FD;
    g_assert_cmpint(zero_half(&block), ==, 8);
    test_block_destroy(&block);
}

static void test_sealed(void)
{
    TestBlock block;

    test_block_init(&block);
    if (fcntl(block.rb.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) < 0) {
        g_test_skip("the kernel has no F_SEAL_FUTURE_WRITE");
    } else {
        stderr_capture();
        g_assert_cmpint(zero_half(&block), ==, 8);
        fill_pages(&block, 8, 11);
        zero_pages(&block, 0, 63);
        /* One warning is enough, and holes can still be told */
        g_assert_cmpint(stderr_release(), ==, 1);
        g_assert_true(ram_block_holes_known(&block.rb));
    }
    test_block_destroy(&block);
}

/* Reading populates in all of these: what is asked for is content. */

static void test_switched_off(void)
{
    TestBlock block;

    machine.ram_holes = false;
    test_block_init(&block);
    g_assert_false(ram_block_holes_known(&block.rb));
    g_assert_cmpint(zero_half(&block), ==, 12);
    test_block_destroy(&block);
}

static void test_not_set_up(void)
{
    TestBlock block;

    test_block_init(&block);
    block.rb.holes = NULL;
    g_assert_false(ram_block_holes_known(&block.rb));
    g_assert_false(ram_block_may_punch(&block.rb));
    g_assert_cmpint(zero_half(&block), ==, 12);
    test_block_destroy(&block);
}

/* A look-up that fails is about what was looked up, and nothing else. */
static void test_find_failed(void)
{
    TestBlock block;
    int fd;

    test_block_init(&block);
    fill_pages(&block, 8, 15);
    fd = block.rb.fd;
    /* Punching would fail as well */
    block.holes.disposable = false;
    block.rb.fd = -1;
    stderr_capture();
    zero_pages(&block, 6, 11);
    zero_pages(&block, 6, 11);
    g_assert_cmpint(stderr_release(), ==, 1);
    assert_pages(&block, 6, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    g_assert_true(ram_block_holes_known(&block.rb));

    block.rb.fd = fd;
    g_assert_cmpint(allocated_pages(&block), ==, 10);
    block.holes.disposable = true;
    zero_pages(&block, 0, 11);
    g_assert_cmpint(allocated_pages(&block), ==, 4);
    assert_pages(&block, 12, 15, DATA);
    test_block_destroy(&block);
}

/*
 * Whatever the kernel refuses and why, the content is right and there is one
 * warning.  Runs in a process of its own, because a seccomp filter stays.
 */

typedef struct Refusal {
    const char *name;
    int syscall;
    int err;
    /* Pages of zero_half() that are allocated */
    uint64_t pages;
} Refusal;

static const Refusal refusals[] = {
    { "fallocate/EOPNOTSUPP", SYS_fallocate, EOPNOTSUPP, 8 },
    { "fallocate/ENOSYS", SYS_fallocate, ENOSYS, 8 },
    { "fallocate/ENOSPC", SYS_fallocate, ENOSPC, 8 },
    { "fallocate/ENOMEM", SYS_fallocate, ENOMEM, 8 },
    { "fallocate/EIO", SYS_fallocate, EIO, 8 },
    { "lseek/EINVAL", SYS_lseek, EINVAL, 12 },
    { "lseek/EIO", SYS_lseek, EIO, 12 },
    { "lseek/ENOSYS", SYS_lseek, ENOSYS, 12 },
};

/* Returns false if the kernel has no seccomp, or another filter forbids it */
static bool refuse(int syscall, int err)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, syscall, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | err),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {
        .len = ARRAY_SIZE(code),
        .filter = code,
    };

    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

#define REFUSED_SKIP 77

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

static void run_refused(const Refusal *refusal)
{
    char line[256] = "";
    TestBlock block;

    test_block_init(&block);
    stderr_capture();
    /* Without cachestat(), which would make lseek() superfluous */
    if (!refuse(SYS_cachestat, ENOSYS) ||
        !refuse(refusal->syscall, refusal->err)) {
        _exit(REFUSED_SKIP);
    }
    g_assert_cmpint(zero_half(&block), ==, refusal->pages);
    zero_pages(&block, 12, 13);
    assert_pages(&block, 12, 13, 0);
    assert_pages(&block, 14, 15, DATA);
    g_assert_true(ram_block_holes_known(&block.rb));
    g_assert_true(ram_block_may_punch(&block.rb) ==
                  (refusal->syscall != SYS_fallocate));

    /* lseek() may be what is refused */
    g_assert_cmpint(pread(stderr_file, line, sizeof(line) - 1, 0), >, 0);
    g_assert_no_errno(dup2(stderr_saved, STDERR_FILENO));
    g_assert_nonnull(strstr(line, strerror(refusal->err)));
    g_assert_true(strchr(line, '\n') == line + strlen(line) - 1);
    test_block_destroy(&block);
}

static void test_refused(const void *opaque)
{
    const Refusal *refusal = opaque;
    pid_t child = fork();
    int status;

    g_assert_no_errno(child);
    if (child == 0) {
        run_refused(refusal);
        _exit(0);
    }
    g_assert_cmpint(waitpid(child, &status, 0), ==, child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == REFUSED_SKIP) {
        g_test_skip("no seccomp filter can be installed");
        return;
    }
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 0);
}

static void add_refusals(void)
{
    int i;

    for (i = 0; i < ARRAY_SIZE(refusals); i++) {
        g_autofree char *path = g_strdup_printf("/ram-holes/refused/%s",
                                                refusals[i].name);

        g_test_add_data_func(path, &refusals[i], test_refused);
    }
}

/* Postcopy */

static gint compare_addresses(gconstpointer a, gconstpointer b)
{
    return ((uintptr_t)a > (uintptr_t)b) - ((uintptr_t)a < (uintptr_t)b);
}

static void postcopy_init(TestBlock *block)
{
    machine.postcopy = true;
    test_block_init(block);
    block->rb.postcopy_length = BLOCK_SIZE;
    block->rb.receivedmap = bitmap_new(BLOCK_SIZE / TARGET_PAGE);
    incoming.page_requested = g_tree_new(compare_addresses);
    incoming.page_requested_count = 0;
    incoming.postcopy_remote_fds = g_array_new(false, false, 1);
    incoming.postcopy_tmp_zero_page = (void *)ram_zero_page();
    incoming.userfault_fd = -1;
    qemu_mutex_init(&incoming.page_request_mutex);
}

static void postcopy_destroy(TestBlock *block)
{
    qemu_mutex_destroy(&incoming.page_request_mutex);
    g_array_free(incoming.postcopy_remote_fds, true);
    incoming.postcopy_remote_fds = NULL;
    g_tree_destroy(incoming.page_requested);
    g_free(block->rb.receivedmap);
    test_block_destroy(block);
}

/* Somebody waits for this page, or for an address that is no page of ours */
static void request_page(TestBlock *block, int64_t page)
{
    g_tree_insert(incoming.page_requested,
                  block->rb.host + page * TARGET_PAGE, (void *)1);
    incoming.page_requested_count++;
}

static void zero_pages_postcopy(TestBlock *block, unsigned first,
                                unsigned last)
{
    g_assert_cmpint(ram_handle_zero_postcopy(&incoming, &block->rb,
                                             first * TARGET_PAGE,
                                             (last - first + 1) * TARGET_PAGE),
                    ==, 0);
}

/* Pages @first to @last have been received, and no others */
static void assert_received(TestBlock *block, unsigned first, unsigned last)
{
    uint64_t pages = BLOCK_SIZE / TARGET_PAGE;

    g_assert_cmpint(find_first_bit(block->rb.receivedmap, pages), ==, first);
    g_assert_cmpint(find_next_zero_bit(block->rb.receivedmap, pages, first),
                    ==, last + 1);
    g_assert_cmpint(find_next_bit(block->rb.receivedmap, pages, last + 1),
                    ==, pages);
}

/* Before userfaultfd is registered nothing is different */
static void test_postcopy_precopy_phase(void)
{
    TestBlock block;

    postcopy_init(&block);
    g_assert_cmpint(zero_half(&block), ==, 4);
    postcopy_destroy(&block);
}

static void test_postcopy_nobody_waits(void)
{
    TestBlock block;

    postcopy_init(&block);
    zero_pages_postcopy(&block, 8, 8);
    zero_pages_postcopy(&block, 9, 40);
    assert_received(&block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 0);
    g_assert_cmpint(allocated_pages(&block), ==, 0);
    postcopy_destroy(&block);
}

static void test_postcopy_requested(void)
{
    TestBlock block;

    postcopy_init(&block);
    /* At both ends of what arrives, in the middle, and next to it */
    request_page(&block, -3);
    request_page(&block, 7);
    request_page(&block, 8);
    request_page(&block, 20);
    request_page(&block, 40);
    request_page(&block, 41);
    request_page(&block, 100);

    zero_pages_postcopy(&block, 8, 40);
    assert_received(&block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 3);
    g_assert_true(machine.placed_at == block.rb.host + 40 * TARGET_PAGE);
    g_assert_cmpint(incoming.page_requested_count, ==, 4);

    zero_pages_postcopy(&block, 41, 41);
    g_assert_cmpint(machine.placed, ==, 4);
    g_assert_cmpint(allocated_pages(&block), ==, 0);
    postcopy_destroy(&block);
}

/* Whatever may not be left a hole is placed, page by page. */
static void assert_all_placed(TestBlock *block)
{
    zero_pages_postcopy(block, 8, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 33);
}

static void test_postcopy_shared_faults(void)
{
    TestBlock block;

    postcopy_init(&block);
    g_array_set_size(incoming.postcopy_remote_fds, 1);
    /* In precopy as well: the holes would still be there */
    g_assert_cmpint(zero_half(&block), ==, 12);
    ram_block_discard_all(&block);
    assert_all_placed(&block);
    postcopy_destroy(&block);
}

static void test_postcopy_keep_populated(void)
{
    TestBlock block;

    postcopy_init(&block);
    block.holes.keep_populated = true;
    g_assert_cmpint(zero_half(&block), ==, 12);
    ram_block_discard_all(&block);
    assert_all_placed(&block);
    postcopy_destroy(&block);
}

/* It does not mark pages as received, so that nobody would answer a fault */
static void test_postcopy_rdma(void)
{
    TestBlock block;

    postcopy_init(&block);
    machine.rdma = true;
    g_assert_cmpint(zero_half(&block), ==, 12);
    ram_block_discard_all(&block);
    assert_all_placed(&block);
    postcopy_destroy(&block);
}

static void test_postcopy_holes_unknown(void)
{
    TestBlock block;

    postcopy_init(&block);
    block.holes.kind = RAM_HOLES_UNKNOWN;
    assert_all_placed(&block);
    postcopy_destroy(&block);
}

/*
 * One page should be a hole, but is not.  To place it will fail, which is
 * better than to take what is there.  That is no reason to allocate the others.
 */
static void test_postcopy_not_a_hole(void)
{
    TestBlock block;

    postcopy_init(&block);
    fill_pages(&block, 30, 30);
    zero_pages_postcopy(&block, 8, 40);
    assert_received(&block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 1);
    g_assert_true(machine.placed_at == block.rb.host + 30 * TARGET_PAGE);
    g_assert_cmpint(allocated_pages(&block), ==, 1);
    postcopy_destroy(&block);
}

static void *read_byte(void *opaque)
{
    return (void *)(uintptr_t)qatomic_read((uint8_t *)opaque);
}

static bool register_userfaultfd(TestBlock *block)
{
    uint64_t features;

    incoming.userfault_fd = uffd_create_fd(0, true);
    return incoming.userfault_fd >= 0 &&
           uffd_query_features(&features) == 0 &&
           uffd_register_memory(incoming.userfault_fd, block->rb.host,
                                BLOCK_SIZE, UFFDIO_REGISTER_MODE_MISSING,
                                NULL) == 0;
}

static void wait_for_fault(void)
{
    struct pollfd pfd = { .fd = incoming.userfault_fd, .events = POLLIN };
    struct uffd_msg msg;

    g_assert_cmpint(poll(&pfd, 1, 10000), ==, 1);
    g_assert_cmpint(uffd_read_events(incoming.userfault_fd, &msg, 1), ==, 1);
    g_assert_cmpint(msg.event, ==, UFFD_EVENT_PAGEFAULT);
}

/* With the real thing: whoever reads a hole gets a zero, and soon. */
static void test_postcopy_fault(void)
{
    TestBlock block;
    GThread *reader;

    postcopy_init(&block);
    if (!register_userfaultfd(&block)) {
        g_test_skip("userfaultfd is not available");
        goto out;
    }
    zero_pages_postcopy(&block, 8, 40);

    reader = g_thread_new("reader", read_byte,
                          block.rb.host + 20 * TARGET_PAGE);
    wait_for_fault();
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block.rb,
                                          20 * TARGET_PAGE), ==, 1);
    g_assert_true(g_thread_join(reader) == NULL);
    g_assert_cmpint(allocated_pages(&block), ==, 1);

    /* Data that is there already stays there */
    fill_pages(&block, 20, 20);
    stderr_capture();
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block.rb,
                                          20 * TARGET_PAGE), ==, 0);
    g_assert_cmpint(stderr_release(), ==, 0);
    assert_pages(&block, 20, 20, DATA);
out:
    if (incoming.userfault_fd >= 0) {
        close(incoming.userfault_fd);
    }
    postcopy_destroy(&block);
}

/*
 * Another process has written to the page after the fault.  Nobody but us wakes
 * up who waits for it.
 */
static void test_postcopy_fault_elsewhere(void)
{
    TestBlock block;
    GThread *reader;
    uint8_t byte = DATA;

    postcopy_init(&block);
    if (!register_userfaultfd(&block)) {
        g_test_skip("userfaultfd is not available");
        goto out;
    }
    reader = g_thread_new("reader", read_byte, block.rb.host);
    wait_for_fault();
    g_assert_cmpint(pwrite(block.rb.fd, &byte, 1, 0), ==, 1);
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block.rb, 0), ==, 0);
    g_assert_true(g_thread_join(reader) == (void *)DATA);
out:
    if (incoming.userfault_fd >= 0) {
        close(incoming.userfault_fd);
    }
    postcopy_destroy(&block);
}

/* The process's own copy of a page must not be taken for the file's hole. */
static void test_private(void)
{
    TestBlock block;

    test_block_init_mapped(&block, memfd_new(BLOCK_SIZE), 0, BLOCK_SIZE,
                           MAP_PRIVATE, 0);
    fill_pages(&block, 8, 15);
    zero_pages(&block, 4, 11);
    assert_pages(&block, 4, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    test_block_destroy(&block);
}

static void test_anonymous(void)
{
    TestBlock block;

    test_block_init_mapped(&block, -1, 0, BLOCK_SIZE,
                           MAP_PRIVATE | MAP_ANONYMOUS, 0);
    fill_pages(&block, 8, 15);
    zero_pages(&block, 4, 11);
    assert_pages(&block, 0, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    test_block_destroy(&block);
}

/* Private memory that is in the page tables, so that reading it is free */
static bool is_resident(TestBlock *block, unsigned page)
{
    unsigned char resident;

    g_assert_no_errno(mincore(block->rb.host + page * TARGET_PAGE, TARGET_PAGE,
                              &resident));
    return resident & 1;
}

static bool have_pagemap(void)
{
    if (access("/proc/self/pagemap", R_OK) < 0) {
        g_test_skip("/proc/self/pagemap is not readable");
        return false;
    }
    return true;
}

static void test_block_init_anonymous(TestBlock *block, uint64_t size)
{
    test_block_init_mapped(block, -1, 0, size, MAP_PRIVATE | MAP_ANONYMOUS, 0);
    /* One page is one page */
    madvise(block->rb.host, size, MADV_NOHUGEPAGE);
}

static void assert_resident(TestBlock *block, int first, int last, int only)
{
    for (int i = first; i <= last; i++) {
        g_assert_cmpint(is_resident(block, i), ==, i == only);
    }
}

static void test_private_anonymous(void)
{
    TestBlock block;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_anonymous(&block, BLOCK_SIZE);
    fill_pages(&block, 8, 15);
    zero_pages(&block, 4, 11);
    g_assert_true(is_resident(&block, 4));
    zero_pages(&block, 14, 14 + PRIVATE_ASK_MIN - 1);
    for (int i = 12; i < BLOCK_SIZE / TARGET_PAGE; i++) {
        g_assert_cmpint(is_resident(&block, i), ==, i < 16);
    }
    assert_pages(&block, 0, 11, 0);
    assert_pages(&block, 12, 13, DATA);
    assert_pages(&block, 14, 63, 0);
    test_block_destroy(&block);
}

/* Pages that come one by one are asked about together, but not too many */
static void test_private_run(void)
{
    TestBlock block;
    RAMZeroRun run = { };
    int max = PRIVATE_RUN_MAX / TARGET_PAGE;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_anonymous(&block, 2 * PRIVATE_RUN_MAX);
    fill_pages(&block, 33, 33);
    fill_pages(&block, max + 1, max + 1);
    for (int i = 0; i < max + PRIVATE_ASK_MIN; i++) {
        assert_pages(&block, 33, 33, i < max ? DATA : 0);
        ram_zero_run_add(&run, &block.rb, i * TARGET_PAGE, TARGET_PAGE);
    }
    assert_resident(&block, 0, max - 1, 33);
    assert_pages(&block, max + 1, max + 1, DATA);

    ram_zero_run_flush(&run);
    assert_resident(&block, max, 2 * max - 1, max + 1);
    assert_pages(&block, 0, 2 * max - 1, 0);
    test_block_destroy(&block);
}

/* A page that has been received must not be missing, see test_postcopy() */
static void test_private_postcopy(void)
{
    TestBlock block;
    RAMZeroRun run = { };

    machine.postcopy = true;
    test_block_init_anonymous(&block, BLOCK_SIZE);
    zero_pages(&block, 0, PRIVATE_ASK_MIN - 1);
    ram_zero_run_add(&run, &block.rb, 40 * TARGET_PAGE, TARGET_PAGE);
    for (int i = 0; i < BLOCK_SIZE / TARGET_PAGE; i++) {
        g_assert_cmpint(is_resident(&block, i), ==,
                        i < PRIVATE_ASK_MIN || i == 40);
    }
    test_block_destroy(&block);
}

static void test_private_tmpfs(void)
{
    TestBlock block;
    RAMZeroRun run = { };
    uint64_t pages;
    uint8_t byte = DATA;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_mapped(&block, memfd_new(BLOCK_SIZE), 0, BLOCK_SIZE,
                           MAP_PRIVATE, 0);
    g_assert_cmpint(block.holes.kind, ==, RAM_HOLES_PRIVATE_SHMEM);
    g_assert_cmpint(pwrite(block.rb.fd, &byte, 1, 2 * TARGET_PAGE), ==, 1);
    fill_pages(&block, 8, 15);
    g_assert_cmpint(allocated_pages(&block), ==, 1 + 8);

    zero_pages(&block, 0, 11);
    g_assert_cmpint(allocated_pages(&block), ==, 1 + 8);
    assert_pages(&block, 0, 11, 0);
    assert_pages(&block, 12, 15, DATA);

    /* Pages that come one by one do not populate the file either */
    pages = allocated_pages(&block);
    zero_pages(&block, 24, 24);
    for (int i = 32; i < 40; i++) {
        ram_zero_run_add(&run, &block.rb, i * TARGET_PAGE, TARGET_PAGE);
    }
    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(&block), ==, pages);

    /* What is in the file belongs to the file */
    byte = 0;
    g_assert_cmpint(pread(block.rb.fd, &byte, 1, 2 * TARGET_PAGE), ==, 1);
    g_assert_cmpint(byte, ==, DATA);
    test_block_destroy(&block);
}

/* The caller may have supplied a mapping of anything. */
static void test_private_preallocated(void)
{
    TestBlock block;
    int fd = memfd_new(BLOCK_SIZE);
    uint8_t byte = DATA;

    g_assert_cmpint(pwrite(fd, &byte, 1, 2 * TARGET_PAGE), ==, 1);
    test_block_init_mapped(&block, fd, 0, BLOCK_SIZE, MAP_SHARED,
                           RAM_PREALLOC);
    block.rb.fd = -1;
    ram_block_holes_init(&block.holes, &block.rb);
    g_assert_cmpint(block.holes.kind, ==, RAM_HOLES_UNKNOWN);
    zero_pages(&block, 0, 11);
    assert_pages(&block, 0, 11, 0);
    close(fd);
    test_block_destroy(&block);
}

/*
 * Pages 8 to 23 have data; of the first @npages pages, a file has 12 to 15 and
 * 20.
 */
static void zero_absent(TestBlock *block, uint64_t npages)
{
    g_autofree unsigned long *present = bitmap_new(npages);

    bitmap_set(present, 12, 4);
    if (npages > 20) {
        bitmap_set(present, 20, 1);
    }
    fill_pages(block, 8, 23);
    ram_zero_absent_pages(&block->rb, present, npages);
}

static void assert_absent(TestBlock *block)
{
    assert_pages(block, 12, 15, DATA);
    assert_pages(block, 20, 20, DATA);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 16, 19, 0);
    assert_pages(block, 21, 63, 0);
}

static void test_absent_shmem(void)
{
    TestBlock block;

    test_block_init(&block);
    zero_absent(&block, 64);
    g_assert_cmpint(allocated_pages(&block), ==, 5);
    assert_absent(&block);
    test_block_destroy(&block);
}

static void test_absent_fd_offset(void)
{
    TestBlock block;
    int fd = memfd_new(3 * BLOCK_SIZE);
    char *file = mmap(NULL, 3 * BLOCK_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                      fd, 0);

    g_assert_true(file != MAP_FAILED);
    memset(file, DATA, BLOCK_SIZE);
    memset(file + 2 * BLOCK_SIZE, DATA, BLOCK_SIZE);
    test_block_init_mapped(&block, fd, BLOCK_SIZE, BLOCK_SIZE, MAP_SHARED,
                           RAM_SHARED);
    /* As if the rest of the file were written later */
    block.holes.disposable = true;
    /* A file has more pages than the block does: not our neighbour's */
    zero_absent(&block, 256);
    g_assert_cmpint(allocated_pages(&block), ==, 64 + 5 + 64);
    assert_absent(&block);
    test_block_destroy(&block);
    munmap(file, 3 * BLOCK_SIZE);
}

/* What is behind the end of the bitmap is not the file's. */
static void test_absent_short(void)
{
    TestBlock block;

    test_block_init(&block);
    zero_absent(&block, 18);
    g_assert_cmpint(allocated_pages(&block), ==, 4 + 6);
    assert_pages(&block, 8, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    assert_pages(&block, 16, 17, 0);
    assert_pages(&block, 18, 23, DATA);
    test_block_destroy(&block);
}

static void test_absent_anonymous(void)
{
    TestBlock block;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_anonymous(&block, BLOCK_SIZE);
    zero_absent(&block, 64);
    for (int i = 0; i < 64; i++) {
        g_assert_cmpint(is_resident(&block, i), ==, i >= 8 && i < 24);
    }
    assert_absent(&block);
    test_block_destroy(&block);
}

static void test_absent_shared_anonymous(void)
{
    TestBlock block;

    test_block_init_mapped(&block, -1, 0, BLOCK_SIZE,
                           MAP_SHARED | MAP_ANONYMOUS, RAM_SHARED);
    zero_absent(&block, 64);
    for (int i = 0; i < 64; i++) {
        g_assert_cmpint(is_resident(&block, i), ==,
                        (i >= 12 && i < 16) || i == 20);
    }
    assert_absent(&block);
    test_block_destroy(&block);
}

static void test_absent_private_file(void)
{
    TestBlock block;
    uint8_t byte = DATA;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_mapped(&block, memfd_new(BLOCK_SIZE), 0, BLOCK_SIZE,
                           MAP_PRIVATE, 0);
    g_assert_cmpint(pwrite(block.rb.fd, &byte, 1, 40 * TARGET_PAGE), ==, 1);
    zero_absent(&block, 64);
    g_assert_cmpint(allocated_pages(&block), ==, 16 + 1);
    assert_absent(&block);
    test_block_destroy(&block);
}

/* As it was without all this: nothing is done about them */
/* What has to be read is read in slices. */
static void test_absent_slices(void)
{
    g_autofree unsigned long *present = NULL;
    const uint64_t size = 64 * MiB;
    TestBlock block;

    test_block_init_mapped(&block, memfd_new(size), 0, size, MAP_SHARED,
                           RAM_SHARED);
    block.holes.keep_populated = true;
    zero_absent(&block, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, ==, 0);

    g_assert_no_errno(fallocate(block.rb.fd, 0, 0, size));
    fill_pages(&block, 0, size / TARGET_PAGE - 1);
    zero_absent(&block, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, >=, 7);

    /* Asking about what the file has takes time, too */
    present = bitmap_new(size / TARGET_PAGE);
    bitmap_set(present, 0, size / TARGET_PAGE);
    machine.yields = 0;
    ram_zero_absent_pages(&block.rb, present, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, >, 0);
    g_assert_true(sparse_file_is_zero(block.rb.fd, &(SparseRange) {
        .start = size / 2,
        .end = size,
    }) == 1);
    test_block_destroy(&block);
}

/*
 * Memory that cannot be asked, or is populated for good
 *
 * What has not been received is known to be zero, but only at first.
 */

static void setup(TestBlock *block)
{
    QLIST_INSERT_HEAD(&ram_list.blocks, &block->rb, next);
    ram_holes_setup();
    QLIST_REMOVE(&block->rb, next);
}

static Object *x86_machine;

static void add_x86_machine(void)
{
    x86_machine = object_new("x86-machine");
    object_property_add_child(object_get_root(), "machine", x86_machine);
    object_unref(x86_machine);
}

static void test_pristine(void)
{
    TestBlock block;
    MemoryRegion mr = { };
    Object *owner = object_new(TYPE_MEMORY_BACKEND_MEMFD);

    MEMORY_BACKEND(owner)->prealloc = true;
    test_block_init(&block);
    block.rb.mr = &mr;
    machine.owner = owner;
    fill_pages(&block, 0, 63);

    /* A machine that may write to it when it is reset */
    object_unparent(x86_machine);
    setup(&block);
    g_assert_false(ram_block_is_pristine(&block.rb));
    add_x86_machine();
    block.holes.used = false;

    setup(&block);
    g_assert_true(ram_block_is_pristine(&block.rb));
    zero_absent(&block, 64);
    assert_pages(&block, 0, 63, DATA);

    /* RDMA and postcopy need more than that */
    machine.rdma = true;
    g_assert_false(ram_block_is_pristine(&block.rb));
    machine.rdma = false;
    machine.postcopy = true;
    g_assert_false(ram_block_is_pristine(&block.rb));
    machine.postcopy = false;

    /* A second migration, after one that failed */
    setup(&block);
    g_assert_false(ram_block_is_pristine(&block.rb));

    /* A snapshot, for a guest that has run */
    block.holes.used = false;
    machine.has_run = true;
    setup(&block);
    g_assert_false(ram_block_is_pristine(&block.rb));
    machine.has_run = false;

    /* The kernel can be asked */
    block.holes.used = false;
    MEMORY_BACKEND(owner)->prealloc = false;
    setup(&block);
    g_assert_false(ram_block_is_pristine(&block.rb));

    /* Not the memory of a backend, so that it can be that of a ROM */
    block.holes.used = false;
    machine.owner = NULL;
    setup(&block);
    g_assert_false(ram_block_is_pristine(&block.rb));
    object_unref(owner);
    test_block_destroy(&block);
}

/* A file system that does not report holes in a way that can be relied upon */
static void test_other_file(void)
{
    TestBlock block;
    MemoryRegion mr = { };
    Object *owner = object_new(TYPE_MEMORY_BACKEND_FILE);
    int fd = memfd_new(BLOCK_SIZE);

    for (int i = 0; i < 3; i++) {
        /* A file of tmpfs will do: that is not asked any more */
        test_block_init_mapped(&block, dup(fd), 0, BLOCK_SIZE, MAP_SHARED,
                               RAM_SHARED);
        block.rb.mr = &mr;
        machine.owner = owner;
        block.holes.kind = RAM_HOLES_OTHER_FILE;
        switch (i) {
        case 0:
            setup(&block);
            g_assert_true(ram_block_is_pristine(&block.rb));
            break;
        case 1:
            fill_pages(&block, 8, 15);
            setup(&block);
            g_assert_false(ram_block_is_pristine(&block.rb));
            break;
        case 2:
            zero_pages(&block, 0, 11);
            /* All that one read() got is read through the mapping then */
            assert_pages(&block, 0, 11, 0);
            assert_pages(&block, 12, 15, DATA);
            zero_pages(&block, 16, 63);
            g_assert_cmpint(allocated_pages(&block), <=, 16);
            break;
        }
        test_block_destroy(&block);
    }
    close(fd);
    object_unref(owner);
}

static void test_absent_switched_off(void)
{
    TestBlock block;

    machine.ram_holes = false;
    test_block_init(&block);
    zero_absent(&block, 64);
    g_assert_cmpint(allocated_pages(&block), ==, 16);
    assert_pages(&block, 8, 23, DATA);
    test_block_destroy(&block);
}

/* x-ignore-shared: the memory is what it is, and no file has any of it. */
static void test_absent_ignored(void)
{
    TestBlock block;

    machine.ignored = true;
    test_block_init(&block);
    zero_absent(&block, 64);
    g_assert_cmpint(allocated_pages(&block), ==, 16);
    assert_pages(&block, 8, 23, DATA);
    test_block_destroy(&block);
}

static void test_shared_anonymous(void)
{
    TestBlock block;
    unsigned char resident[BLOCK_SIZE / TARGET_PAGE];

    test_block_init_mapped(&block, -1, 0, BLOCK_SIZE,
                           MAP_SHARED | MAP_ANONYMOUS, RAM_SHARED);
    fill_pages(&block, 8, 15);
    zero_pages(&block, 4, 11);
    g_assert_no_errno(mincore(block.rb.host, BLOCK_SIZE, resident));
    for (int i = 4; i < 16; i++) {
        g_assert_cmpint(resident[i] & 1, ==, i >= 12);
    }
    assert_pages(&block, 4, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    test_block_destroy(&block);
}

/*
 * Sets up a block that consists of two pages of hugetlbfs, or skips the test.
 * With no reservation, so that a page that is given up would be missed.
 */
static bool test_block_init_hugetlb(TestBlock *block)
{
    int fd = memfd_create("test-ram-holes", MFD_CLOEXEC | MFD_HUGETLB |
                                            MFD_HUGE_2MB);
    void *map;

    if (fd < 0) {
        g_test_skip("no hugetlb memfd on this kernel");
        return false;
    }
    g_assert_no_errno(ftruncate(fd, 2 * HUGE_PAGE));
    map = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        g_test_skip("fewer than two free huge pages of 2 MiB"
                    " (vm.nr_hugepages)");
        close(fd);
        return false;
    }
    munmap(map, 2 * HUGE_PAGE);
    test_block_init_mapped(block, fd, 0, 2 * HUGE_PAGE, MAP_SHARED,
                           RAM_SHARED);
    return true;
}

static void test_hugetlb(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    TestBlock block;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    g_assert_true(ram_block_holes_known(&block.rb));
    g_assert_false(ram_block_may_punch(&block.rb));

    zero_pages(&block, 0, 2 * per_huge - 1);
    g_assert_cmpint(allocated_pages(&block), ==, 0);

    fill_pages(&block, 8, 15);
    zero_pages(&block, 4, 11);
    zero_pages(&block, per_huge, 2 * per_huge - 1);
    g_assert_cmpint(allocated_pages(&block), ==, per_huge);
    assert_pages(&block, 0, 11, 0);
    assert_pages(&block, 12, 15, DATA);

    /* All of it zero, but its reservation is kept */
    zero_pages(&block, 0, per_huge - 1);
    g_assert_cmpint(allocated_pages(&block), ==, per_huge);
    assert_pages(&block, 0, per_huge - 1, 0);
    test_block_destroy(&block);
}

/* Page tables are not asked about huge pages, see populated_memory_next() */
static void test_private_hugetlb(void)
{
    TestBlock block;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    /* Old data is in the file, and the mapping becomes a private one */
    fill_pages(&block, 8, 15);
    munmap(block.rb.host, 2 * HUGE_PAGE);
    test_block_init_mapped(&block, block.rb.fd, 0, 2 * HUGE_PAGE,
                           MAP_PRIVATE | MAP_NORESERVE, 0);
    block.rb.page_size = HUGE_PAGE;
    fill_pages(&block, 16, 23);
    zero_pages(&block, 4, 19);
    assert_pages(&block, 0, 19, 0);
    assert_pages(&block, 20, 23, DATA);
    test_block_destroy(&block);
}

/* A huge page that is neither in the page tables nor in the file stays away. */
static void test_private_hugetlb_empty(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    TestBlock block;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    munmap(block.rb.host, 2 * HUGE_PAGE);
    g_assert_no_errno(ftruncate(block.rb.fd, 0));
    g_assert_no_errno(ftruncate(block.rb.fd, 2 * HUGE_PAGE));
    test_block_init_mapped(&block, block.rb.fd, 0, 2 * HUGE_PAGE,
                           MAP_PRIVATE | MAP_NORESERVE, 0);
    block.rb.page_size = HUGE_PAGE;

    zero_pages(&block, 0, 2 * per_huge - 1);
    g_assert_false(populated_huge_page(block.rb.host));
    g_assert_false(populated_huge_page(block.rb.host + HUGE_PAGE));

    fill_pages(&block, per_huge, per_huge + 7);
    zero_pages(&block, per_huge - 4, per_huge + 3);
    g_assert_false(populated_huge_page(block.rb.host));
    assert_pages(&block, per_huge, per_huge + 3, 0);
    assert_pages(&block, per_huge + 4, per_huge + 7, DATA);
    test_block_destroy(&block);
}

/*
 * Another process can have written to a huge page that is not in our page
 * tables.
 */
static void test_absent_hugetlb(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    TestBlock block;
    uint8_t *other;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    zero_absent(&block, 2 * per_huge);
    g_assert_cmpint(allocated_pages(&block), ==, per_huge);
    assert_pages(&block, 8, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    assert_pages(&block, 16, 19, 0);
    assert_pages(&block, 20, 20, DATA);
    assert_pages(&block, 21, per_huge - 1, 0);
    g_assert_cmpint(allocated_pages(&block), ==, per_huge);

    other = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                 block.rb.fd, 0);
    g_assert_true(other != MAP_FAILED);
    other[HUGE_PAGE + 5 * TARGET_PAGE] = DATA;
    zero_absent(&block, 2 * per_huge);
    g_assert_cmpint(other[HUGE_PAGE + 5 * TARGET_PAGE], ==, 0);
    munmap(other, 2 * HUGE_PAGE);
    test_block_destroy(&block);
}

/* There may be no huge page left for what is not there yet. */
static void test_absent_private_hugetlb(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    TestBlock block;
    int fd;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    fd = block.rb.fd;
    g_assert_no_errno(ftruncate(fd, 0));
    g_assert_no_errno(ftruncate(fd, 2 * HUGE_PAGE));
    munmap(block.rb.host, 2 * HUGE_PAGE);
    test_block_init_mapped(&block, fd, 0, 2 * HUGE_PAGE, MAP_PRIVATE, 0);
    block.rb.page_size = HUGE_PAGE;

    zero_absent(&block, 2 * per_huge);
    g_assert_false(populated_huge_page(block.rb.host + HUGE_PAGE));
    assert_pages(&block, 8, 11, 0);
    assert_pages(&block, 12, 15, DATA);
    assert_pages(&block, 16, 19, 0);
    test_block_destroy(&block);
}

/*
 * With transparent huge pages possible, part of a populated one is cleared in
 * place; whole ones, and what cannot be one, are punched.  The pages here are
 * small, but that is more than the code knows.
 */
static void test_thp(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    uint64_t size = 4 * HUGE_PAGE;
    TestBlock block;

    test_block_init_mapped(&block, memfd_new(size), 0, size, MAP_SHARED,
                           RAM_SHARED);
    block.holes.thp_size = HUGE_PAGE;

    fill_pages(&block, 0, 4 * per_huge - 1);
    zero_pages(&block, per_huge / 2, 3 * per_huge + 7);
    g_assert_cmpint(allocated_pages(&block), ==, 2 * per_huge);
    assert_pages(&block, 0, per_huge / 2 - 1, DATA);
    assert_pages(&block, per_huge / 2, per_huge - 1, 0);
    assert_pages(&block, 3 * per_huge, 3 * per_huge + 7, 0);
    assert_pages(&block, 3 * per_huge + 8, 4 * per_huge - 1, DATA);

    /* With a hole next to it, it is not a huge page */
    fill_pages(&block, per_huge + 8, per_huge + 15);
    g_assert_cmpint(allocated_pages(&block), ==, 2 * per_huge + 8);
    zero_pages(&block, per_huge + 8, per_huge + 11);
    g_assert_cmpint(allocated_pages(&block), ==, 2 * per_huge + 4);
    assert_pages(&block, per_huge + 12, per_huge + 15, DATA);
    test_block_destroy(&block);
}

static void test_run(void)
{
    TestBlock block, other;
    RAMZeroRun run = { };

    test_block_init(&block);
    test_block_init(&other);
    ram_zero_run_flush(&run);

    /* Pages that touch are gathered, in either direction */
    fill_pages(&block, 0, 7);
    fill_pages(&other, 0, 7);
    ram_zero_run_add(&run, &block.rb, 2 * TARGET_PAGE, TARGET_PAGE);
    ram_zero_run_add(&run, &block.rb, 3 * TARGET_PAGE, TARGET_PAGE);
    ram_zero_run_add(&run, &block.rb, 1 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(&block), ==, 8);

    /* A gap ends the run */
    ram_zero_run_add(&run, &block.rb, 6 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(&block), ==, 5);
    assert_pages(&block, 0, 0, DATA);
    assert_pages(&block, 4, 7, DATA);

    /* So does another block, even if the offset would fit */
    ram_zero_run_add(&run, &other.rb, 7 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(&block), ==, 4);
    g_assert_cmpint(allocated_pages(&other), ==, 8);

    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(&other), ==, 7);

    /* Nothing is left */
    fill_pages(&other, 7, 7);
    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(&other), ==, 8);
    test_block_destroy(&other);
    test_block_destroy(&block);
}

static void test_clear_memory(void)
{
    uint8_t *p = mmap(NULL, 4 * TARGET_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    g_assert_true(p != MAP_FAILED);
    p[TARGET_PAGE] = DATA;
    p[3 * TARGET_PAGE + 5] = DATA;
    ram_clear_memory(p, 3 * TARGET_PAGE + 5);
    g_assert_cmpint(p[TARGET_PAGE], ==, 0);
    g_assert_cmpint(p[3 * TARGET_PAGE + 5], ==, DATA);
    munmap(p, 4 * TARGET_PAGE);
}

/* The source: what is a hole */

/* How many pages from @page on, up to @limit, are a hole */
static uint64_t hole_pages(TestBlock *block, unsigned page, unsigned limit)
{
    uint64_t bytes = ram_block_hole_length(&block->rb, page * TARGET_PAGE,
                                           (limit - page) * TARGET_PAGE, NULL);

    g_assert_cmpint(bytes % TARGET_PAGE, ==, 0);
    return bytes / TARGET_PAGE;
}

static bool is_hole(TestBlock *block, unsigned page, unsigned npages)
{
    return hole_pages(block, page, page + npages) == npages;
}

static void test_save_find_hole(void)
{
    TestBlock block;
    uint64_t data;

    test_block_init(&block);
    fill_pages(&block, 8, 15);

    g_assert_cmpint(hole_pages(&block, 0, 64), ==, 8);
    g_assert_cmpint(hole_pages(&block, 8, 64), ==, 0);
    g_assert_cmpint(hole_pages(&block, 15, 64), ==, 0);
    g_assert_cmpint(hole_pages(&block, 16, 64), ==, 48);
    g_assert_cmpint(hole_pages(&block, 2, 4), ==, 2);

    g_assert_cmpint(ram_block_hole_length(&block.rb, 0, BLOCK_SIZE, &data), ==,
                    8 * TARGET_PAGE);
    g_assert_cmpint(data, >, 0);
    g_assert_cmpint(data, <=, 8 * TARGET_PAGE);
    g_assert_cmpint(ram_block_hole_length(&block.rb, 0, TARGET_PAGE, &data), ==,
                    TARGET_PAGE);
    g_assert_cmpint(data, ==, 0);

    /* Looking has not allocated anything */
    g_assert_cmpint(allocated_pages(&block), ==, 8);
    test_block_destroy(&block);
}

static void test_save_run(void)
{
    TestBlock block;
    RAMKnownData data = { };

    test_block_init(&block);
    fill_pages(&block, 8, 15);
    block.rb.bmap = bitmap_new(64);
    bitmap_set(block.rb.bmap, 0, 64);
    block.rb.clear_bmap = bitmap_new(4);
    block.rb.clear_bmap_shift = 6;

    g_assert_cmpint(ram_find_hole_run(&block.rb, 0, 64, &data), ==, 8);
    g_assert_true(data.rb == &block.rb);
    g_assert_cmpint(data.range.start, ==, 8 * TARGET_PAGE);
    g_assert_cmpint(data.range.end, >, data.range.start);
    g_assert_cmpint(data.range.end, <=, 16 * TARGET_PAGE);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 2, 4, &data), ==, 2);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 15, 64, &data), ==, 0);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 16, 64, &data), ==, 48);

    /* Data that was found is not looked at again, a hole is */
    data.range = (SparseRange) { 20 * TARGET_PAGE, 24 * TARGET_PAGE };
    g_assert_cmpint(ram_find_hole_run(&block.rb, 21, 64, &data), ==, 0);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 24, 64, &data), ==, 40);
    fill_pages(&block, 30, 30);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 24, 64, &data), ==, 6);

    /* Pages that are not dirty are not sent */
    clear_bit(50, block.rb.bmap);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 40, 64, &data), ==, 10);

    /* The next chunk has dirty bits that have not been cleared yet */
    block.rb.clear_bmap_shift = 4;
    g_assert_cmpint(ram_find_hole_run(&block.rb, 20, 64, &data), ==, 10);
    g_assert_cmpint(ram_find_hole_run(&block.rb, 33, 64, &data), ==, 15);

    g_free(block.rb.clear_bmap);
    g_free(block.rb.bmap);
    test_block_destroy(&block);
}

/* A page may be larger than what the file consists of. */
static void test_save_large_page(void)
{
    TestBlock block;

    test_block_init(&block);
    fill_pages(&block, 3, 3);
    fill_pages(&block, 12, 12);
    fill_pages(&block, 31, 31);

    /* Hole, then data */
    g_assert_false(is_hole(&block, 2, 2));
    g_assert_true(is_hole(&block, 0, 2));
    /* Data, then hole */
    g_assert_false(is_hole(&block, 12, 2));
    /* Data in the middle, and at the end */
    g_assert_false(is_hole(&block, 8, 8));
    g_assert_false(is_hole(&block, 16, 16));
    g_assert_true(is_hole(&block, 16, 8));
    g_assert_true(is_hole(&block, 32, 16));
    test_block_destroy(&block);
}

/* A look-up that is refused makes what was asked about data, no more */
static void test_save_lseek_refused(void)
{
    TestBlock block;
    int fd;

    test_block_init(&block);
    fd = block.rb.fd;
    block.rb.fd = -1;
    stderr_capture();
    g_assert_false(is_hole(&block, 0, 1));
    g_assert_false(is_hole(&block, 1, 1));
    g_assert_cmpint(stderr_release(), ==, 1);
    block.rb.fd = fd;
    test_block_destroy(&block);
}

static void test_save_unknown(void)
{
    TestBlock block;

    machine.ram_holes = false;
    test_block_init(&block);
    g_assert_false(is_hole(&block, 0, 1));
    test_block_destroy(&block);

    test_block_init_mapped(&block, memfd_new(BLOCK_SIZE), 0, BLOCK_SIZE,
                           MAP_PRIVATE, 0);
    block.rb.host[0] = DATA;
    g_assert_false(is_hole(&block, 0, 1));
    test_block_destroy(&block);
}

static void test_save_hugetlb(void)
{
    uint64_t per_huge = HUGE_PAGE / TARGET_PAGE;
    TestBlock block;
    uint8_t *other;

    if (!test_block_init_hugetlb(&block)) {
        return;
    }
    block.rb.page_size = HUGE_PAGE;
    g_assert_true(is_hole(&block, 0, 2 * per_huge));
    g_assert_true(is_hole(&block, per_huge + 3, 1));

    /* The sizes show that there is one huge page, and which */
    block.rb.host[0] = DATA;
    g_assert_false(is_hole(&block, 0, 1));
    g_assert_false(is_hole(&block, per_huge - 1, 1));
    g_assert_true(is_hole(&block, per_huge, per_huge));
    g_assert_cmpint(allocated_pages(&block), ==, per_huge);

    /* Written by another process, which this one cannot see */
    other = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                 block.rb.fd, 0);
    g_assert_true(other != MAP_FAILED);
    other[2 * HUGE_PAGE - 1] = DATA;
    g_assert_false(is_hole(&block, per_huge, per_huge));
    munmap(other, 2 * HUGE_PAGE);
    test_block_destroy(&block);
}

/* Until a page has arrived, a reader has to wait for it in the mapping */
static void test_save_not_arrived(void)
{
    static const PostcopyState active[] = {
        POSTCOPY_INCOMING_LISTENING, POSTCOPY_INCOMING_RUNNING,
    };
    TestBlock block;

    test_block_init(&block);
    fill_pages(&block, 20, 20);
    block.rb.receivedmap = bitmap_new(BLOCK_SIZE / TARGET_PAGE);
    bitmap_set(block.rb.receivedmap, 8, 16);
    for (int i = 0; i < ARRAY_SIZE(active); i++) {
        uint64_t length;

        machine.postcopy_state = active[i];
        g_assert_false(is_hole(&block, 0, 1));
        g_assert_false(is_hole(&block, 7, 2));
        g_assert_true(is_hole(&block, 8, 12));
        g_assert_false(is_hole(&block, 20, 1));
        g_assert_true(is_hole(&block, 21, 3));
        g_assert_false(is_hole(&block, 24, 1));
        g_assert_false(ram_block_extent(&block.rb, 0, BLOCK_SIZE, &length));
        g_assert_cmpint(length, ==, 8 * TARGET_PAGE);
        /* The loader itself knows better */
        g_assert_cmpint(ram_block_extent_raw(&block.rb, 0, BLOCK_SIZE, &length),
                        ==, 0);
        g_assert_cmpint(length, ==, 20 * TARGET_PAGE);
    }
    machine.postcopy_state = POSTCOPY_INCOMING_END;
    g_assert_true(is_hole(&block, 0, 20));
    machine.postcopy_state = POSTCOPY_INCOMING_NONE;
    g_free(block.rb.receivedmap);
    test_block_destroy(&block);
}

static void test_block_is_zero(void)
{
    TestBlock block;

    test_block_init(&block);
    g_assert_true(ram_block_is_zero(&block.rb, 0, BLOCK_SIZE));
    fill_pages(&block, 8, 8);
    g_assert_false(ram_block_is_zero(&block.rb, 0, BLOCK_SIZE));
    g_assert_true(ram_block_is_zero(&block.rb, 9 * TARGET_PAGE,
                                    BLOCK_SIZE - 9 * TARGET_PAGE));
    memset(block.rb.host + 8 * TARGET_PAGE, 0, TARGET_PAGE);
    g_assert_true(ram_block_is_zero(&block.rb, 0, BLOCK_SIZE));
    g_assert_cmpint(allocated_pages(&block), ==, 1);
    test_block_destroy(&block);
}

static void test_page_to_read(void)
{
    TestBlock block;
    uint8_t *host;

    test_block_init(&block);
    host = block.rb.host;
    machine.rb = &block.rb;
    fill_pages(&block, 1, 1);

    g_assert_true(ram_page_to_read(host, TARGET_PAGE) == ram_zero_page());
    g_assert_true(ram_page_to_read(host + TARGET_PAGE, TARGET_PAGE) ==
                  host + TARGET_PAGE);
    /* As large as a dump's pages can be, with data behind the first page */
    g_assert_true(ram_page_to_read(host, RAM_ZERO_PAGE_SIZE) == host);
    g_assert_true(ram_page_to_read(host + 16 * TARGET_PAGE,
                                   RAM_ZERO_PAGE_SIZE) == ram_zero_page());
    /* Not guest RAM */
    g_assert_true(ram_page_to_read(&block, 1) == &block);
    g_assert_cmpint(allocated_pages(&block), ==, 1);
    test_block_destroy(&block);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    error_init(argv[0]);
    module_call_init(MODULE_INIT_QOM);
    type_register_static_array(backends, ARRAY_SIZE(backends));
    add_x86_machine();
    machine.ram_holes = true;

    g_test_add_func("/ram-holes/hole-and-punched", test_hole_and_punched);
    g_test_add_func("/ram-holes/fd-offset", test_fd_offset);
    g_test_add_func("/ram-holes/keep/discard-disabled", test_discard_disabled);
    g_test_add_func("/ram-holes/keep/rdma", test_rdma);
    g_test_add_func("/ram-holes/keep/mlock", test_mlock);
    g_test_add_func("/ram-holes/keep/reserved", test_reserved);
    g_test_add_func("/ram-holes/keep/used", test_used);
    g_test_add_func("/ram-holes/keep/created-by-qemu", test_created_by_qemu);
    g_test_add_func("/ram-holes/keep/vhost", test_vhost);
    g_test_add_func("/ram-holes/keep/readonly-fd", test_readonly_fd);
    g_test_add_func("/ram-holes/keep/sealed", test_sealed);
    g_test_add_func("/ram-holes/keep/discard-manager", test_discard_manager);
    g_test_add_func("/ram-holes/postcopy/precopy-phase",
                    test_postcopy_precopy_phase);
    g_test_add_func("/ram-holes/postcopy/nobody-waits",
                    test_postcopy_nobody_waits);
    g_test_add_func("/ram-holes/postcopy/requested", test_postcopy_requested);
    g_test_add_func("/ram-holes/postcopy/shared-faults",
                    test_postcopy_shared_faults);
    g_test_add_func("/ram-holes/postcopy/keep-populated",
                    test_postcopy_keep_populated);
    g_test_add_func("/ram-holes/postcopy/rdma", test_postcopy_rdma);
    g_test_add_func("/ram-holes/postcopy/holes-unknown",
                    test_postcopy_holes_unknown);
    g_test_add_func("/ram-holes/postcopy/not-a-hole",
                    test_postcopy_not_a_hole);
    g_test_add_func("/ram-holes/postcopy/fault", test_postcopy_fault);
    g_test_add_func("/ram-holes/postcopy/fault-elsewhere",
                    test_postcopy_fault_elsewhere);
    g_test_add_func("/ram-holes/unknown/switched-off", test_switched_off);
    g_test_add_func("/ram-holes/unknown/not-set-up", test_not_set_up);
    g_test_add_func("/ram-holes/unknown/find-failed", test_find_failed);
    g_test_add_func("/ram-holes/unknown/private", test_private);
    add_refusals();
    g_test_add_func("/ram-holes/unknown/anonymous", test_anonymous);
    g_test_add_func("/ram-holes/shared-anonymous", test_shared_anonymous);
    g_test_add_func("/ram-holes/private/anonymous", test_private_anonymous);
    g_test_add_func("/ram-holes/private/run", test_private_run);
    g_test_add_func("/ram-holes/private/postcopy", test_private_postcopy);
    g_test_add_func("/ram-holes/private/tmpfs", test_private_tmpfs);
    g_test_add_func("/ram-holes/private/hugetlb", test_private_hugetlb);
    g_test_add_func("/ram-holes/private/hugetlb-empty",
                    test_private_hugetlb_empty);
    g_test_add_func("/ram-holes/private/preallocated",
                    test_private_preallocated);
    g_test_add_func("/ram-holes/absent/shmem", test_absent_shmem);
    g_test_add_func("/ram-holes/absent/fd-offset", test_absent_fd_offset);
    g_test_add_func("/ram-holes/absent/short", test_absent_short);
    g_test_add_func("/ram-holes/absent/anonymous", test_absent_anonymous);
    g_test_add_func("/ram-holes/absent/shared-anonymous",
                    test_absent_shared_anonymous);
    g_test_add_func("/ram-holes/absent/private-file", test_absent_private_file);
    g_test_add_func("/ram-holes/absent/hugetlb", test_absent_hugetlb);
    g_test_add_func("/ram-holes/absent/private-hugetlb",
                    test_absent_private_hugetlb);
    g_test_add_func("/ram-holes/absent/switched-off", test_absent_switched_off);
    g_test_add_func("/ram-holes/absent/slices", test_absent_slices);
    g_test_add_func("/ram-holes/pristine", test_pristine);
    g_test_add_func("/ram-holes/other-file", test_other_file);
    g_test_add_func("/ram-holes/absent/ignored", test_absent_ignored);
    g_test_add_func("/ram-holes/hugetlb", test_hugetlb);
    g_test_add_func("/ram-holes/thp", test_thp);
    g_test_add_func("/ram-holes/run", test_run);
    g_test_add_func("/ram-holes/clear-memory", test_clear_memory);
    g_test_add_func("/ram-holes/save/find-hole", test_save_find_hole);
    g_test_add_func("/ram-holes/save/run", test_save_run);
    g_test_add_func("/ram-holes/save/large-page", test_save_large_page);
    g_test_add_func("/ram-holes/save/lseek-refused", test_save_lseek_refused);
    g_test_add_func("/ram-holes/save/unknown", test_save_unknown);
    g_test_add_func("/ram-holes/save/hugetlb", test_save_hugetlb);
    g_test_add_func("/ram-holes/save/not-arrived", test_save_not_arrived);
    g_test_add_func("/ram-holes/save/is-zero", test_block_is_zero);
    g_test_add_func("/ram-holes/save/page-to-read", test_page_to_read);

    return g_test_run();
}
