/*
 * Unit tests for zero pages and holes in guest RAM
 *
 * Runs system/ramblock-holes.c, migration/ram-holes*.c and ram-zero-runs.c on a
 * RAMBlock of its own, with stubs in place of the machine, so that decisions
 * can be tested for what is not at hand: memory pinned by a device, RDMA,
 * seals, read-only files.
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
#define RAM_SIZE (64 * TARGET_PAGE)
/* Target pages */
#define PER_HUGE (HUGE_PAGE / TARGET_PAGE)

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

/* One that consists of all of a file, which becomes the block's */
static void test_block_init_file(TestBlock *block, int fd)
{
    test_block_init_mapped(block, fd, 0, lseek(fd, 0, SEEK_END), MAP_SHARED,
                           RAM_SHARED);
}

static void test_block_destroy(TestBlock *block)
{
    if (block->rb.host) {
        munmap(block->rb.host, block->rb.max_length);
    }
    if (block->rb.fd >= 0) {
        close(block->rb.fd);
    }
    *block = (TestBlock) { .rb.fd = -1 };
    memset(&machine, 0, sizeof(machine));
    machine.ram_holes = true;
    mlock_state = MLOCK_OFF;
}

/*
 * What kinds of blocks there are for tests.  Each of these functions returns
 * false if the test has to be skipped, after saying why.
 */

static bool memfd(TestBlock *block)
{
    test_block_init_file(block, memfd_new(RAM_SIZE));
    return true;
}

static bool switched_off(TestBlock *block)
{
    machine.ram_holes = false;
    return memfd(block);
}

/* With x-ignore-shared */
static bool ignored(TestBlock *block)
{
    machine.ignored = true;
    return memfd(block);
}

static bool private_memfd(TestBlock *block)
{
    test_block_init_mapped(block, memfd_new(RAM_SIZE), 0, RAM_SIZE,
                           MAP_PRIVATE, 0);
    return true;
}

static bool shared_anonymous(TestBlock *block)
{
    test_block_init_mapped(block, -1, 0, RAM_SIZE,
                           MAP_SHARED | MAP_ANONYMOUS, RAM_SHARED);
    return true;
}

static void test_block_init_anonymous(TestBlock *block, uint64_t size)
{
    test_block_init_mapped(block, -1, 0, size, MAP_PRIVATE | MAP_ANONYMOUS, 0);
    /* One page is one page */
    madvise(block->rb.host, size, MADV_NOHUGEPAGE);
}

static bool anonymous(TestBlock *block)
{
    test_block_init_anonymous(block, RAM_SIZE);
    return true;
}

/* Two pages, not reserved, so that one that is given up would be missed */
static int hugetlb_new(void)
{
    int fd = memfd_create("test-ram-holes", MFD_CLOEXEC | MFD_HUGETLB |
                                            MFD_HUGE_2MB);
    void *map;

    if (fd < 0) {
        g_test_skip("no hugetlb memfd on this kernel");
        return -1;
    }
    g_assert_no_errno(ftruncate(fd, 2 * HUGE_PAGE));
    map = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        g_test_skip("fewer than two free huge pages of 2 MiB"
                    " (vm.nr_hugepages)");
        close(fd);
        return -1;
    }
    munmap(map, 2 * HUGE_PAGE);
    return fd;
}

static bool hugetlb(TestBlock *block)
{
    int fd = hugetlb_new();

    if (fd >= 0) {
        test_block_init_file(block, fd);
    }
    return fd >= 0;
}

static bool private_hugetlb(TestBlock *block)
{
    int fd = hugetlb_new();

    if (fd >= 0) {
        test_block_init_mapped(block, fd, 0, 2 * HUGE_PAGE,
                               MAP_PRIVATE | MAP_NORESERVE, 0);
        block->rb.page_size = HUGE_PAGE;
    }
    return fd >= 0;
}

/* The file behind a block of huge pages, as another process has it */
static char *hugetlb_map(TestBlock *block)
{
    char *map = mmap(NULL, 2 * HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                     block->rb.fd, 0);

    g_assert_true(map != MAP_FAILED);
    return map;
}

/* The test has one of its own, or more */
static bool none(TestBlock *block)
{
    return true;
}

/* Past the mapping, which knows nothing of it: the first byte of a page */

static void file_put(int fd, uint64_t page, uint8_t byte)
{
    g_assert_cmpint(pwrite(fd, &byte, 1, page * TARGET_PAGE), ==, 1);
}

static uint8_t file_get(int fd, uint64_t page)
{
    uint8_t byte;

    g_assert_cmpint(pread(fd, &byte, 1, page * TARGET_PAGE), ==, 1);
    return byte;
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

static void test_hole_and_punched(TestBlock *block)
{
    zero_pages(block, 0, 63);
    g_assert_cmpint(allocated_pages(block), ==, 0);
    g_assert_cmpint(zero_half(block), ==, 4);
}

static void test_fd_offset(TestBlock *block)
{
    int fd = memfd_new(2 * RAM_SIZE);

    test_block_init_mapped(block, fd, RAM_SIZE, RAM_SIZE, MAP_SHARED,
                           RAM_SHARED);
    /* In front of the block, where its first page would be without offset */
    file_put(fd, 0, DATA);
    fill_pages(block, 0, 1);
    zero_pages(block, 0, 0);
    g_assert_cmpint(allocated_pages(block), ==, 2);
    g_assert_cmpint(file_get(fd, 0), ==, DATA);
    assert_pages(block, 0, 0, 0);
    assert_pages(block, 1, 1, DATA);
}

/* A hole is left alone in all of these, and nothing is punched. */

static void test_discard_disabled(TestBlock *block)
{
    machine.discard_disabled = true;
    g_assert_cmpint(zero_half(block), ==, 8);

    /* A device that goes away gives back the permission */
    machine.discard_disabled = false;
    zero_pages(block, 8, 11);
    g_assert_cmpint(allocated_pages(block), ==, 4 + 4);
}

static void test_rdma(TestBlock *block)
{
    machine.rdma = true;
    g_assert_cmpint(zero_half(block), ==, 8);
}

/* How many pages stay allocated */
static uint64_t zero_half_locked(TestBlock *block, MlockState state)
{
    uint64_t pages;

    mlock_state = state;
    memfd(block);
    pages = zero_half(block);
    test_block_destroy(block);
    return pages;
}

static void test_mlock(TestBlock *block)
{
    g_assert_cmpint(zero_half_locked(block, MLOCK_ON), ==, 8);
    g_assert_cmpint(zero_half_locked(block, MLOCK_ON_FAULT), ==, 4);
}

/* How many pages stay allocated if something manages what is discarded */
static uint64_t zero_half_managed(TestBlock *block, bool keeps_populated)
{
    MemoryRegion mr = { };
    uint64_t pages;

    machine.has_discard_manager = true;
    machine.keeps_populated = keeps_populated;
    memfd(block);
    block->rb.mr = &mr;
    ram_holes_setup_block(&block->rb);
    pages = zero_half(block);
    test_block_destroy(block);
    return pages;
}

static void test_discard_manager(TestBlock *block)
{
    g_assert_cmpint(zero_half_managed(block, false), ==, 4);
    g_assert_cmpint(zero_half_managed(block, true), ==, 8);
}

/* What is reserved stays so, whether the guest wrote to it or not. */
static void test_reserved(TestBlock *block)
{
    int fd = memfd_new(RAM_SIZE);

    g_assert_no_errno(fallocate(fd, 0, 0, RAM_SIZE));
    test_block_init_file(block, fd);
    fill_pages(block, 8, 15);
    zero_pages(block, 0, 11);
    g_assert_cmpint(allocated_pages(block), ==, RAM_SIZE / TARGET_PAGE);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 15, DATA);
}

/* A file that has a page of somebody else, and holes, which stay holes */
static void test_used(TestBlock *block)
{
    int fd = memfd_new(RAM_SIZE);

    file_put(fd, 0, DATA);
    test_block_init_file(block, fd);
    zero_pages(block, 0, 63);
    g_assert_cmpint(allocated_pages(block), ==, 1);
    assert_pages(block, 0, 0, 0);
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
static uint64_t zero_half_of(TestBlock *block, const char *backend)
{
    MemoryRegion mr = { };
    Object *owner = object_new(backend);
    uint64_t pages;

    memfd(block);
    fill_pages(block, 8, 15);
    machine.owner = owner;
    block->rb.mr = &mr;
    ram_holes_setup_block(&block->rb);
    pages = zero_half(block);
    test_block_destroy(block);
    object_unref(owner);
    return pages;
}

static void test_created_by_qemu(TestBlock *block)
{
    g_assert_cmpint(zero_half_of(block, TYPE_MEMORY_BACKEND_MEMFD), ==, 4);
    g_assert_cmpint(zero_half_of(block, TYPE_MEMORY_BACKEND_SHM), ==, 4);
    g_assert_cmpint(zero_half_of(block, TYPE_MEMORY_BACKEND_RAM), ==, 4);
    g_assert_cmpint(zero_half_of(block, TYPE_MEMORY_BACKEND_FILE), ==, 8);
    g_assert_cmpint(zero_half_of(block, TYPE_OTHER_BACKEND), ==, 8);
}

/* Of a snapshot, with and without a process that may have pinned the memory */
static void test_vhost(TestBlock *block)
{
    memfd(block);
    machine.vhost = true;
    g_assert_cmpint(zero_half(block), ==, 4);
    test_block_destroy(block);

    memfd(block);
    machine.has_run = true;
    g_assert_cmpint(zero_half(block), ==, 4);
    machine.vhost = true;
    zero_pages(block, 12, 15);
    /* Reading has allocated the others */
    g_assert_cmpint(allocated_pages(block), ==, 12);
    assert_pages(block, 12, 15, 0);
}

static void test_readonly_fd(TestBlock *block)
{
    block->rb.flags |= RAM_READONLY_FD;
    g_assert_cmpint(zero_half(block), ==, 8);
}

static void test_sealed(TestBlock *block)
{
    if (fcntl(block->rb.fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) < 0) {
        g_test_skip("the kernel has no F_SEAL_FUTURE_WRITE");
    } else {
        stderr_capture();
        g_assert_cmpint(zero_half(block), ==, 8);
        fill_pages(block, 8, 11);
        zero_pages(block, 0, 63);
        /* One warning is enough, and holes can still be told */
        g_assert_cmpint(stderr_release(), ==, 1);
        g_assert_true(ram_block_holes_known(&block->rb));
    }
}

/* Reading populates in all of these: what is asked for is content. */

static void test_switched_off(TestBlock *block)
{
    g_assert_false(ram_block_holes_known(&block->rb));
    g_assert_cmpint(zero_half(block), ==, 12);
}

static void test_not_set_up(TestBlock *block)
{
    block->rb.holes = NULL;
    g_assert_false(ram_block_holes_known(&block->rb));
    g_assert_false(ram_block_may_punch(&block->rb));
    g_assert_cmpint(zero_half(block), ==, 12);
}

/* A look-up that fails is about what was looked up, and nothing else. */
static void test_find_failed(TestBlock *block)
{
    int fd;

    fill_pages(block, 8, 15);
    fd = block->rb.fd;
    /* Punching would fail as well */
    block->holes.disposable = false;
    block->rb.fd = -1;
    stderr_capture();
    zero_pages(block, 6, 11);
    zero_pages(block, 6, 11);
    g_assert_cmpint(stderr_release(), ==, 1);
    assert_pages(block, 6, 11, 0);
    assert_pages(block, 12, 15, DATA);
    g_assert_true(ram_block_holes_known(&block->rb));

    block->rb.fd = fd;
    g_assert_cmpint(allocated_pages(block), ==, 10);
    block->holes.disposable = true;
    zero_pages(block, 0, 11);
    g_assert_cmpint(allocated_pages(block), ==, 4);
    assert_pages(block, 12, 15, DATA);
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

    memfd(&block);
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

static bool postcopy(TestBlock *block)
{
    machine.postcopy = true;
    memfd(block);
    block->rb.postcopy_length = RAM_SIZE;
    block->rb.receivedmap = bitmap_new(RAM_SIZE / TARGET_PAGE);
    incoming.page_requested = g_tree_new(compare_addresses);
    incoming.page_requested_count = 0;
    incoming.postcopy_remote_fds = g_array_new(false, false, 1);
    incoming.postcopy_tmp_zero_page = (void *)ram_zero_page();
    incoming.userfault_fd = -1;
    qemu_mutex_init(&incoming.page_request_mutex);
    return true;
}

static void postcopy_end(TestBlock *block)
{
    if (incoming.userfault_fd >= 0) {
        close(incoming.userfault_fd);
    }
    qemu_mutex_destroy(&incoming.page_request_mutex);
    g_array_free(incoming.postcopy_remote_fds, true);
    g_tree_destroy(incoming.page_requested);
    g_free(block->rb.receivedmap);
    memset(&incoming, 0, sizeof(incoming));
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
    uint64_t pages = RAM_SIZE / TARGET_PAGE;

    g_assert_cmpint(find_first_bit(block->rb.receivedmap, pages), ==, first);
    g_assert_cmpint(find_next_zero_bit(block->rb.receivedmap, pages, first),
                    ==, last + 1);
    g_assert_cmpint(find_next_bit(block->rb.receivedmap, pages, last + 1),
                    ==, pages);
}

/* Before userfaultfd is registered nothing is different */
static void test_postcopy_precopy_phase(TestBlock *block)
{
    g_assert_cmpint(zero_half(block), ==, 4);
}

static void test_postcopy_nobody_waits(TestBlock *block)
{
    zero_pages_postcopy(block, 8, 8);
    zero_pages_postcopy(block, 9, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 0);
    g_assert_cmpint(allocated_pages(block), ==, 0);
}

static void test_postcopy_requested(TestBlock *block)
{
    /* At both ends of what arrives, in the middle, and next to it */
    request_page(block, -3);
    request_page(block, 7);
    request_page(block, 8);
    request_page(block, 20);
    request_page(block, 40);
    request_page(block, 41);
    request_page(block, 100);

    zero_pages_postcopy(block, 8, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 3);
    g_assert_true(machine.placed_at == block->rb.host + 40 * TARGET_PAGE);
    g_assert_cmpint(incoming.page_requested_count, ==, 4);

    zero_pages_postcopy(block, 41, 41);
    g_assert_cmpint(machine.placed, ==, 4);
    g_assert_cmpint(allocated_pages(block), ==, 0);
}

/* Whatever may not be left a hole is placed, page by page. */
static void assert_all_placed(TestBlock *block)
{
    zero_pages_postcopy(block, 8, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 33);
}

static void punch_all(TestBlock *block)
{
    g_assert_no_errno(fallocate(block->rb.fd,
                                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                0, RAM_SIZE));
}

/* In precopy as well: the holes would still be there */
static void assert_not_left_alone(TestBlock *block)
{
    g_assert_cmpint(zero_half(block), ==, 12);
    punch_all(block);
    assert_all_placed(block);
}

/* Faults of a vhost-user backend are answered like our own. */
static void test_postcopy_shared_faults(TestBlock *block)
{
    g_array_set_size(incoming.postcopy_remote_fds, 1);
    g_assert_cmpint(zero_half(block), ==, 4);
    punch_all(block);
    zero_pages_postcopy(block, 8, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 0);
}

static void test_postcopy_keep_populated(TestBlock *block)
{
    block->holes.keep_populated = true;
    assert_not_left_alone(block);
}

/* It does not mark pages as received, so that nobody would answer a fault */
static void test_postcopy_rdma(TestBlock *block)
{
    machine.rdma = true;
    assert_not_left_alone(block);
}

static void test_postcopy_holes_unknown(TestBlock *block)
{
    block->holes.kind = RAM_HOLES_UNKNOWN;
    assert_all_placed(block);
}

/*
 * One page should be a hole, but is not.  To place it will fail, which is
 * better than to take what is there.  That is no reason to allocate the others.
 */
static void test_postcopy_not_a_hole(TestBlock *block)
{
    fill_pages(block, 30, 30);
    zero_pages_postcopy(block, 8, 40);
    assert_received(block, 8, 40);
    g_assert_cmpint(machine.placed, ==, 1);
    g_assert_true(machine.placed_at == block->rb.host + 30 * TARGET_PAGE);
    g_assert_cmpint(allocated_pages(block), ==, 1);
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
                                RAM_SIZE, UFFDIO_REGISTER_MODE_MISSING,
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
static void test_postcopy_fault(TestBlock *block)
{
    GThread *reader;

    if (!register_userfaultfd(block)) {
        g_test_skip("userfaultfd is not available");
        return;
    }
    zero_pages_postcopy(block, 8, 40);

    reader = g_thread_new("reader", read_byte,
                          block->rb.host + 20 * TARGET_PAGE);
    wait_for_fault();
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block->rb,
                                          20 * TARGET_PAGE), ==, 1);
    g_assert_true(g_thread_join(reader) == NULL);
    g_assert_cmpint(allocated_pages(block), ==, 1);

    /* Data that is there already stays there */
    fill_pages(block, 20, 20);
    stderr_capture();
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block->rb,
                                          20 * TARGET_PAGE), ==, 0);
    g_assert_cmpint(stderr_release(), ==, 0);
    assert_pages(block, 20, 20, DATA);
}

/*
 * Another process has written to the page after the fault.  Nobody but us wakes
 * up who waits for it.
 */
static void test_postcopy_fault_elsewhere(TestBlock *block)
{
    GThread *reader;

    if (!register_userfaultfd(block)) {
        g_test_skip("userfaultfd is not available");
        return;
    }
    reader = g_thread_new("reader", read_byte, block->rb.host);
    wait_for_fault();
    file_put(block->rb.fd, 0, DATA);
    g_assert_cmpint(ram_handle_zero_fault(&incoming, &block->rb, 0), ==, 0);
    g_assert_true(g_thread_join(reader) == (void *)DATA);
}

/* The process's own copy of a page must not be taken for the file's hole. */
static void test_private(TestBlock *block)
{
    fill_pages(block, 8, 15);
    zero_pages(block, 4, 11);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 15, DATA);
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

/* Of pages @first to @last, those from @from to @to are, and no others */
static void assert_resident(TestBlock *block, int first, int last, int from,
                            int to)
{
    for (int i = first; i <= last; i++) {
        g_assert_cmpint(is_resident(block, i), ==, i >= from && i <= to);
    }
}

static void test_private_anonymous(TestBlock *block)
{
    if (!have_pagemap()) {
        return;
    }
    fill_pages(block, 8, 15);
    zero_pages(block, 4, 11);
    g_assert_true(is_resident(block, 4));
    zero_pages(block, 14, 14 + PRIVATE_ASK_MIN - 1);
    assert_resident(block, 12, 63, 12, 15);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 13, DATA);
    assert_pages(block, 14, 63, 0);
}

/* Pages that come one by one are asked about together, but not too many */
static void test_private_run(TestBlock *block)
{
    RAMZeroRun run = { };
    int max = PRIVATE_RUN_MAX / TARGET_PAGE;

    if (!have_pagemap()) {
        return;
    }
    test_block_init_anonymous(block, 2 * PRIVATE_RUN_MAX);
    fill_pages(block, 33, 33);
    fill_pages(block, max + 1, max + 1);
    for (int i = 0; i < max + PRIVATE_ASK_MIN; i++) {
        assert_pages(block, 33, 33, i < max ? DATA : 0);
        ram_zero_run_add(&run, &block->rb, i * TARGET_PAGE, TARGET_PAGE);
    }
    assert_resident(block, 0, max - 1, 33, 33);
    assert_pages(block, max + 1, max + 1, DATA);

    ram_zero_run_flush(&run);
    assert_resident(block, max, 2 * max - 1, max + 1, max + 1);
    assert_pages(block, 0, 2 * max - 1, 0);
}

/* A page that has been received must not be missing, see test_postcopy() */
static void test_private_postcopy(TestBlock *block)
{
    RAMZeroRun run = { };

    machine.postcopy = true;
    test_block_init_anonymous(block, RAM_SIZE);
    zero_pages(block, 0, PRIVATE_ASK_MIN - 1);
    assert_resident(block, 0, 63, 0, PRIVATE_ASK_MIN - 1);
    ram_zero_run_add(&run, &block->rb, 40 * TARGET_PAGE, TARGET_PAGE);
    assert_resident(block, PRIVATE_ASK_MIN, 63, 40, 40);
}

static void test_private_tmpfs(TestBlock *block)
{
    RAMZeroRun run = { };
    uint64_t pages;

    if (!have_pagemap()) {
        return;
    }
    g_assert_cmpint(block->holes.kind, ==, RAM_HOLES_PRIVATE_SHMEM);
    file_put(block->rb.fd, 2, DATA);
    fill_pages(block, 8, 15);
    g_assert_cmpint(allocated_pages(block), ==, 1 + 8);

    zero_pages(block, 0, 11);
    g_assert_cmpint(allocated_pages(block), ==, 1 + 8);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 15, DATA);

    /* Pages that come one by one do not populate the file either */
    pages = allocated_pages(block);
    zero_pages(block, 24, 24);
    for (int i = 32; i < 40; i++) {
        ram_zero_run_add(&run, &block->rb, i * TARGET_PAGE, TARGET_PAGE);
    }
    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(block), ==, pages);

    /* What is in the file belongs to the file */
    g_assert_cmpint(file_get(block->rb.fd, 2), ==, DATA);
}

/* The caller may have supplied a mapping of anything. */
static void test_private_preallocated(TestBlock *block)
{
    int fd = memfd_new(RAM_SIZE);

    file_put(fd, 2, DATA);
    test_block_init_mapped(block, fd, 0, RAM_SIZE, MAP_SHARED,
                           RAM_PREALLOC);
    block->rb.fd = -1;
    ram_block_holes_init(&block->holes, &block->rb);
    g_assert_cmpint(block->holes.kind, ==, RAM_HOLES_UNKNOWN);
    zero_pages(block, 0, 11);
    assert_pages(block, 0, 11, 0);
    close(fd);
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

static void test_absent_shmem(TestBlock *block)
{
    zero_absent(block, 64);
    g_assert_cmpint(allocated_pages(block), ==, 5);
    assert_absent(block);
}

static void test_absent_fd_offset(TestBlock *block)
{
    int fd = memfd_new(3 * RAM_SIZE);
    char *file = mmap(NULL, 3 * RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                      fd, 0);

    g_assert_true(file != MAP_FAILED);
    memset(file, DATA, RAM_SIZE);
    memset(file + 2 * RAM_SIZE, DATA, RAM_SIZE);
    test_block_init_mapped(block, fd, RAM_SIZE, RAM_SIZE, MAP_SHARED,
                           RAM_SHARED);
    /* As if the rest of the file were written later */
    block->holes.disposable = true;
    /* A file has more pages than the block does: not our neighbour's */
    zero_absent(block, 256);
    g_assert_cmpint(allocated_pages(block), ==, 64 + 5 + 64);
    assert_absent(block);
    munmap(file, 3 * RAM_SIZE);
}

/* What is behind the end of the bitmap is not the file's. */
static void test_absent_short(TestBlock *block)
{
    zero_absent(block, 18);
    g_assert_cmpint(allocated_pages(block), ==, 4 + 6);
    assert_pages(block, 8, 11, 0);
    assert_pages(block, 12, 15, DATA);
    assert_pages(block, 16, 17, 0);
    assert_pages(block, 18, 23, DATA);
}

static void test_absent_anonymous(TestBlock *block)
{
    if (!have_pagemap()) {
        return;
    }
    zero_absent(block, 64);
    assert_resident(block, 0, 63, 8, 23);
    assert_absent(block);
}

static void test_absent_shared_anonymous(TestBlock *block)
{
    zero_absent(block, 64);
    assert_resident(block, 0, 19, 12, 15);
    assert_resident(block, 20, 63, 20, 20);
    assert_absent(block);
}

static void test_absent_private_file(TestBlock *block)
{
    if (!have_pagemap()) {
        return;
    }
    file_put(block->rb.fd, 40, DATA);
    zero_absent(block, 64);
    g_assert_cmpint(allocated_pages(block), ==, 16 + 1);
    assert_absent(block);
}

/* What has to be read is read in slices. */
static void test_absent_slices(TestBlock *block)
{
    g_autofree unsigned long *present = NULL;
    const uint64_t size = 64 * MiB;

    test_block_init_file(block, memfd_new(size));
    block->holes.keep_populated = true;
    zero_absent(block, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, ==, 0);

    g_assert_no_errno(fallocate(block->rb.fd, 0, 0, size));
    fill_pages(block, 0, size / TARGET_PAGE - 1);
    zero_absent(block, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, >=, 7);

    /* Asking about what the file has takes time, too */
    present = bitmap_new(size / TARGET_PAGE);
    bitmap_set(present, 0, size / TARGET_PAGE);
    machine.yields = 0;
    ram_zero_absent_pages(&block->rb, present, size / TARGET_PAGE);
    g_assert_cmpint(machine.yields, >, 0);
    g_assert_true(sparse_file_is_zero(block->rb.fd, &(SparseRange) {
        .start = size / 2,
        .end = size,
    }) == 1);
}

/*
 * Memory that cannot be asked, or is populated for good
 *
 * What has not been received is known to be zero, but only at first.
 */

/* What starts with a block, whether it is pristine then */
static bool is_pristine_at_start(TestBlock *block)
{
    QLIST_INSERT_HEAD(&ram_list.blocks, &block->rb, next);
    ram_holes_setup();
    QLIST_REMOVE(&block->rb, next);
    return ram_block_is_pristine(&block->rb);
}

static Object *x86_machine;

static void add_x86_machine(void)
{
    x86_machine = object_new("x86-machine");
    object_property_add_child(object_get_root(), "machine", x86_machine);
    object_unref(x86_machine);
}

static void test_pristine(TestBlock *block)
{
    MemoryRegion mr = { };
    Object *owner = object_new(TYPE_MEMORY_BACKEND_MEMFD);

    MEMORY_BACKEND(owner)->prealloc = true;
    memfd(block);
    block->rb.mr = &mr;
    machine.owner = owner;
    fill_pages(block, 0, 63);

    /* A machine that may write to it when it is reset */
    object_unparent(x86_machine);
    g_assert_false(is_pristine_at_start(block));
    add_x86_machine();
    block->holes.used = false;

    g_assert_true(is_pristine_at_start(block));
    zero_absent(block, 64);
    assert_pages(block, 0, 63, DATA);

    /* RDMA and postcopy need more than that */
    machine.rdma = true;
    g_assert_false(ram_block_is_pristine(&block->rb));
    machine.rdma = false;
    machine.postcopy = true;
    g_assert_false(ram_block_is_pristine(&block->rb));
    machine.postcopy = false;

    /* A second migration, after one that failed */
    g_assert_false(is_pristine_at_start(block));

    /* A snapshot, for a guest that has run */
    block->holes.used = false;
    machine.has_run = true;
    g_assert_false(is_pristine_at_start(block));
    machine.has_run = false;

    /* The kernel can be asked */
    block->holes.used = false;
    MEMORY_BACKEND(owner)->prealloc = false;
    g_assert_false(is_pristine_at_start(block));

    /* Not the memory of a backend, so that it can be that of a ROM */
    block->holes.used = false;
    machine.owner = NULL;
    g_assert_false(is_pristine_at_start(block));
    object_unref(owner);
}

/* A file system that does not report holes in a way that can be relied upon */
static void other_file_init(TestBlock *block, int fd, MemoryRegion *mr,
                            Object *owner)
{
    /* A file of tmpfs will do: that is not asked any more */
    test_block_init_file(block, dup(fd));
    block->rb.mr = mr;
    machine.owner = owner;
    block->holes.kind = RAM_HOLES_OTHER_FILE;
}

static void test_other_file(TestBlock *block)
{
    MemoryRegion mr = { };
    Object *owner = object_new(TYPE_MEMORY_BACKEND_FILE);
    int fd = memfd_new(RAM_SIZE);

    other_file_init(block, fd, &mr, owner);
    g_assert_true(is_pristine_at_start(block));
    test_block_destroy(block);

    other_file_init(block, fd, &mr, owner);
    fill_pages(block, 8, 15);
    g_assert_false(is_pristine_at_start(block));
    test_block_destroy(block);

    other_file_init(block, fd, &mr, owner);
    zero_pages(block, 0, 11);
    /* All that one read() got is read through the mapping then */
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 15, DATA);
    zero_pages(block, 16, 63);
    g_assert_cmpint(allocated_pages(block), <=, 16);

    close(fd);
    object_unref(owner);
}

/* The memory is what it is, and no file has any of it. */
static void test_absent_left_alone(TestBlock *block)
{
    zero_absent(block, 64);
    g_assert_cmpint(allocated_pages(block), ==, 16);
    assert_pages(block, 8, 23, DATA);
}

static void test_shared_anonymous(TestBlock *block)
{
    fill_pages(block, 8, 15);
    zero_pages(block, 4, 11);
    assert_resident(block, 4, 15, 12, 15);
    assert_pages(block, 4, 11, 0);
    assert_pages(block, 12, 15, DATA);
}

static void test_hugetlb(TestBlock *block)
{
    g_assert_true(ram_block_holes_known(&block->rb));
    g_assert_false(ram_block_may_punch(&block->rb));

    zero_pages(block, 0, 2 * PER_HUGE - 1);
    g_assert_cmpint(allocated_pages(block), ==, 0);

    fill_pages(block, 8, 15);
    zero_pages(block, 4, 11);
    zero_pages(block, PER_HUGE, 2 * PER_HUGE - 1);
    g_assert_cmpint(allocated_pages(block), ==, PER_HUGE);
    assert_pages(block, 0, 11, 0);
    assert_pages(block, 12, 15, DATA);

    /* All of it zero, but its reservation is kept */
    zero_pages(block, 0, PER_HUGE - 1);
    g_assert_cmpint(allocated_pages(block), ==, PER_HUGE);
    assert_pages(block, 0, PER_HUGE - 1, 0);
}

/* Page tables are not asked about huge pages, see populated_memory_next() */
static void test_private_hugetlb(TestBlock *block)
{
    char *file = hugetlb_map(block);

    /* Old data is in the file */
    memset(file + 8 * TARGET_PAGE, DATA, 8 * TARGET_PAGE);
    munmap(file, 2 * HUGE_PAGE);
    fill_pages(block, 16, 23);
    zero_pages(block, 4, 19);
    assert_pages(block, 0, 19, 0);
    assert_pages(block, 20, 23, DATA);
}

/* A huge page that is neither in the page tables nor in the file stays away. */
static void test_private_hugetlb_empty(TestBlock *block)
{
    zero_pages(block, 0, 2 * PER_HUGE - 1);
    g_assert_false(populated_huge_page(block->rb.host));
    g_assert_false(populated_huge_page(block->rb.host + HUGE_PAGE));

    fill_pages(block, PER_HUGE, PER_HUGE + 7);
    zero_pages(block, PER_HUGE - 4, PER_HUGE + 3);
    g_assert_false(populated_huge_page(block->rb.host));
    assert_pages(block, PER_HUGE, PER_HUGE + 3, 0);
    assert_pages(block, PER_HUGE + 4, PER_HUGE + 7, DATA);
}

/*
 * Another process can have written to a huge page that is not in our page
 * tables.
 */
static void test_absent_hugetlb(TestBlock *block)
{
    char *other;

    zero_absent(block, 2 * PER_HUGE);
    g_assert_cmpint(allocated_pages(block), ==, PER_HUGE);
    assert_pages(block, 8, 11, 0);
    assert_pages(block, 12, 15, DATA);
    assert_pages(block, 16, 19, 0);
    assert_pages(block, 20, 20, DATA);
    assert_pages(block, 21, PER_HUGE - 1, 0);
    g_assert_cmpint(allocated_pages(block), ==, PER_HUGE);

    other = hugetlb_map(block);
    other[HUGE_PAGE + 5 * TARGET_PAGE] = 1;
    zero_absent(block, 2 * PER_HUGE);
    g_assert_cmpint(other[HUGE_PAGE + 5 * TARGET_PAGE], ==, 0);
    munmap(other, 2 * HUGE_PAGE);
}

/* There may be no huge page left for what is not there yet. */
static void test_absent_private_hugetlb(TestBlock *block)
{
    zero_absent(block, 2 * PER_HUGE);
    g_assert_false(populated_huge_page(block->rb.host + HUGE_PAGE));
    assert_pages(block, 8, 11, 0);
    assert_pages(block, 12, 15, DATA);
    assert_pages(block, 16, 19, 0);
}

/*
 * With transparent huge pages possible, part of a populated one is cleared in
 * place; whole ones, and what cannot be one, are punched.  The pages here are
 * small, but that is more than the code knows.
 */
static void test_thp(TestBlock *block)
{
    test_block_init_file(block, memfd_new(4 * HUGE_PAGE));
    block->holes.thp_size = HUGE_PAGE;

    fill_pages(block, 0, 4 * PER_HUGE - 1);
    zero_pages(block, PER_HUGE / 2, 3 * PER_HUGE + 7);
    g_assert_cmpint(allocated_pages(block), ==, 2 * PER_HUGE);
    assert_pages(block, 0, PER_HUGE / 2 - 1, DATA);
    assert_pages(block, PER_HUGE / 2, PER_HUGE - 1, 0);
    assert_pages(block, 3 * PER_HUGE, 3 * PER_HUGE + 7, 0);
    assert_pages(block, 3 * PER_HUGE + 8, 4 * PER_HUGE - 1, DATA);

    /* With a hole next to it, it is not a huge page */
    fill_pages(block, PER_HUGE + 8, PER_HUGE + 15);
    g_assert_cmpint(allocated_pages(block), ==, 2 * PER_HUGE + 8);
    zero_pages(block, PER_HUGE + 8, PER_HUGE + 11);
    g_assert_cmpint(allocated_pages(block), ==, 2 * PER_HUGE + 4);
    assert_pages(block, PER_HUGE + 12, PER_HUGE + 15, DATA);
}

static void test_run(TestBlock *block)
{
    TestBlock other;
    RAMZeroRun run = { };

    memfd(&other);
    ram_zero_run_flush(&run);

    /* Pages that touch are gathered, in either direction */
    fill_pages(block, 0, 7);
    fill_pages(&other, 0, 7);
    ram_zero_run_add(&run, &block->rb, 2 * TARGET_PAGE, TARGET_PAGE);
    ram_zero_run_add(&run, &block->rb, 3 * TARGET_PAGE, TARGET_PAGE);
    ram_zero_run_add(&run, &block->rb, 1 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(block), ==, 8);

    /* A gap ends the run */
    ram_zero_run_add(&run, &block->rb, 6 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(block), ==, 5);
    assert_pages(block, 0, 0, DATA);
    assert_pages(block, 4, 7, DATA);

    /* So does another block, even if the offset would fit */
    ram_zero_run_add(&run, &other.rb, 7 * TARGET_PAGE, TARGET_PAGE);
    g_assert_cmpint(allocated_pages(block), ==, 4);
    g_assert_cmpint(allocated_pages(&other), ==, 8);

    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(&other), ==, 7);

    /* Nothing is left */
    fill_pages(&other, 7, 7);
    ram_zero_run_flush(&run);
    g_assert_cmpint(allocated_pages(&other), ==, 8);
    test_block_destroy(&other);
}

static void test_clear_memory(TestBlock *block)
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

static void test_save_find_hole(TestBlock *block)
{
    uint64_t data;

    fill_pages(block, 8, 15);

    g_assert_cmpint(hole_pages(block, 0, 64), ==, 8);
    g_assert_cmpint(hole_pages(block, 8, 64), ==, 0);
    g_assert_cmpint(hole_pages(block, 15, 64), ==, 0);
    g_assert_cmpint(hole_pages(block, 16, 64), ==, 48);
    g_assert_cmpint(hole_pages(block, 2, 4), ==, 2);

    g_assert_cmpint(ram_block_hole_length(&block->rb, 0, RAM_SIZE, &data), ==,
                    8 * TARGET_PAGE);
    g_assert_cmpint(data, >, 0);
    g_assert_cmpint(data, <=, 8 * TARGET_PAGE);
    g_assert_cmpint(ram_block_hole_length(&block->rb, 0, TARGET_PAGE, &data),
                    ==, TARGET_PAGE);
    g_assert_cmpint(data, ==, 0);

    /* Looking has not allocated anything */
    g_assert_cmpint(allocated_pages(block), ==, 8);
}

static void test_save_run(TestBlock *block)
{
    RAMKnownData data = { };

    fill_pages(block, 8, 15);
    block->rb.bmap = bitmap_new(64);
    bitmap_set(block->rb.bmap, 0, 64);
    block->rb.clear_bmap = bitmap_new(4);
    block->rb.clear_bmap_shift = 6;

    g_assert_cmpint(ram_find_hole_run(&block->rb, 0, 64, &data), ==, 8);
    g_assert_true(data.rb == &block->rb);
    g_assert_cmpint(data.range.start, ==, 8 * TARGET_PAGE);
    g_assert_cmpint(data.range.end, >, data.range.start);
    g_assert_cmpint(data.range.end, <=, 16 * TARGET_PAGE);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 2, 4, &data), ==, 2);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 15, 64, &data), ==, 0);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 16, 64, &data), ==, 48);

    /* Data that was found is not looked at again, a hole is */
    data.range = (SparseRange) { 20 * TARGET_PAGE, 24 * TARGET_PAGE };
    g_assert_cmpint(ram_find_hole_run(&block->rb, 21, 64, &data), ==, 0);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 24, 64, &data), ==, 40);
    fill_pages(block, 30, 30);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 24, 64, &data), ==, 6);

    /* Pages that are not dirty are not sent */
    clear_bit(50, block->rb.bmap);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 40, 64, &data), ==, 10);

    /* The next chunk has dirty bits that have not been cleared yet */
    block->rb.clear_bmap_shift = 4;
    g_assert_cmpint(ram_find_hole_run(&block->rb, 20, 64, &data), ==, 10);
    g_assert_cmpint(ram_find_hole_run(&block->rb, 33, 64, &data), ==, 15);

    g_free(block->rb.clear_bmap);
    g_free(block->rb.bmap);
}

/* A page may be larger than what the file consists of. */
static void test_save_large_page(TestBlock *block)
{
    fill_pages(block, 3, 3);
    fill_pages(block, 12, 12);
    fill_pages(block, 31, 31);

    /* Hole, then data */
    g_assert_false(is_hole(block, 2, 2));
    g_assert_true(is_hole(block, 0, 2));
    /* Data, then hole */
    g_assert_false(is_hole(block, 12, 2));
    /* Data in the middle, and at the end */
    g_assert_false(is_hole(block, 8, 8));
    g_assert_false(is_hole(block, 16, 16));
    g_assert_true(is_hole(block, 16, 8));
    g_assert_true(is_hole(block, 32, 16));
}

/* A look-up that is refused makes what was asked about data, no more */
static void test_save_lseek_refused(TestBlock *block)
{
    int fd;

    fd = block->rb.fd;
    block->rb.fd = -1;
    stderr_capture();
    g_assert_false(is_hole(block, 0, 1));
    g_assert_false(is_hole(block, 1, 1));
    g_assert_cmpint(stderr_release(), ==, 1);
    block->rb.fd = fd;
}

static void test_save_unknown(TestBlock *block)
{
    g_assert_false(is_hole(block, 0, 1));
    test_block_destroy(block);

    private_memfd(block);
    block->rb.host[0] = DATA;
    g_assert_false(is_hole(block, 0, 1));
}

static void test_save_hugetlb(TestBlock *block)
{
    char *other;

    block->rb.page_size = HUGE_PAGE;
    g_assert_true(is_hole(block, 0, 2 * PER_HUGE));
    g_assert_true(is_hole(block, PER_HUGE + 3, 1));

    /* The sizes show that there is one huge page, and which */
    block->rb.host[0] = DATA;
    g_assert_false(is_hole(block, 0, 1));
    g_assert_false(is_hole(block, PER_HUGE - 1, 1));
    g_assert_true(is_hole(block, PER_HUGE, PER_HUGE));
    g_assert_cmpint(allocated_pages(block), ==, PER_HUGE);

    /* Written by another process, which this one cannot see */
    other = hugetlb_map(block);
    other[2 * HUGE_PAGE - 1] = DATA;
    g_assert_false(is_hole(block, PER_HUGE, PER_HUGE));
    munmap(other, 2 * HUGE_PAGE);
}

/* Until a page has arrived, a reader has to wait for it in the mapping */
static void test_save_not_arrived(TestBlock *block)
{
    static const PostcopyState active[] = {
        POSTCOPY_INCOMING_LISTENING, POSTCOPY_INCOMING_RUNNING,
    };

    fill_pages(block, 20, 20);
    block->rb.receivedmap = bitmap_new(RAM_SIZE / TARGET_PAGE);
    bitmap_set(block->rb.receivedmap, 8, 16);
    for (int i = 0; i < ARRAY_SIZE(active); i++) {
        uint64_t length;

        machine.postcopy_state = active[i];
        g_assert_false(is_hole(block, 0, 1));
        g_assert_false(is_hole(block, 7, 2));
        g_assert_true(is_hole(block, 8, 12));
        g_assert_false(is_hole(block, 20, 1));
        g_assert_true(is_hole(block, 21, 3));
        g_assert_false(is_hole(block, 24, 1));
        g_assert_false(ram_block_extent(&block->rb, 0, RAM_SIZE, &length));
        g_assert_cmpint(length, ==, 8 * TARGET_PAGE);
        /* The loader itself knows better */
        g_assert_cmpint(ram_block_extent_raw(&block->rb, 0, RAM_SIZE, &length),
                        ==, 0);
        g_assert_cmpint(length, ==, 20 * TARGET_PAGE);
    }
    machine.postcopy_state = POSTCOPY_INCOMING_END;
    g_assert_true(is_hole(block, 0, 20));
    machine.postcopy_state = POSTCOPY_INCOMING_NONE;
    g_free(block->rb.receivedmap);
}

static void test_block_is_zero(TestBlock *block)
{
    g_assert_true(ram_block_is_zero(&block->rb, 0, RAM_SIZE));
    fill_pages(block, 8, 8);
    g_assert_false(ram_block_is_zero(&block->rb, 0, RAM_SIZE));
    g_assert_true(ram_block_is_zero(&block->rb, 9 * TARGET_PAGE,
                                    RAM_SIZE - 9 * TARGET_PAGE));
    memset(block->rb.host + 8 * TARGET_PAGE, 0, TARGET_PAGE);
    g_assert_true(ram_block_is_zero(&block->rb, 0, RAM_SIZE));
    g_assert_cmpint(allocated_pages(block), ==, 1);
}

static void test_page_to_read(TestBlock *block)
{
    uint8_t *host;

    host = block->rb.host;
    machine.rb = &block->rb;
    fill_pages(block, 1, 1);

    g_assert_true(ram_page_to_read(host, TARGET_PAGE) == ram_zero_page());
    g_assert_true(ram_page_to_read(host + TARGET_PAGE, TARGET_PAGE) ==
                  host + TARGET_PAGE);
    /* As large as a dump's pages can be, with data behind the first page */
    g_assert_true(ram_page_to_read(host, RAM_ZERO_PAGE_SIZE) == host);
    g_assert_true(ram_page_to_read(host + 16 * TARGET_PAGE,
                                   RAM_ZERO_PAGE_SIZE) == ram_zero_page());
    /* Not guest RAM */
    g_assert_true(ram_page_to_read(block, 1) == block);
    g_assert_cmpint(allocated_pages(block), ==, 1);
}

typedef struct BlockTest {
    /* Path below /ram-holes */
    const char *name;
    /* What it gets, see memfd() */
    bool (*setup)(TestBlock *block);
    void (*run)(TestBlock *block);
} BlockTest;

static const BlockTest tests[] = {
    { "hole-and-punched", memfd, test_hole_and_punched },
    { "fd-offset", none, test_fd_offset },
    { "keep/discard-disabled", memfd, test_discard_disabled },
    { "keep/rdma", memfd, test_rdma },
    { "keep/mlock", none, test_mlock },
    { "keep/reserved", none, test_reserved },
    { "keep/used", none, test_used },
    { "keep/created-by-qemu", none, test_created_by_qemu },
    { "keep/vhost", none, test_vhost },
    { "keep/readonly-fd", memfd, test_readonly_fd },
    { "keep/sealed", memfd, test_sealed },
    { "keep/discard-manager", none, test_discard_manager },
    { "postcopy/precopy-phase", postcopy, test_postcopy_precopy_phase },
    { "postcopy/nobody-waits", postcopy, test_postcopy_nobody_waits },
    { "postcopy/requested", postcopy, test_postcopy_requested },
    { "postcopy/shared-faults", postcopy, test_postcopy_shared_faults },
    { "postcopy/keep-populated", postcopy, test_postcopy_keep_populated },
    { "postcopy/rdma", postcopy, test_postcopy_rdma },
    { "postcopy/holes-unknown", postcopy, test_postcopy_holes_unknown },
    { "postcopy/not-a-hole", postcopy, test_postcopy_not_a_hole },
    { "postcopy/fault", postcopy, test_postcopy_fault },
    { "postcopy/fault-elsewhere", postcopy, test_postcopy_fault_elsewhere },
    { "unknown/switched-off", switched_off, test_switched_off },
    { "unknown/not-set-up", memfd, test_not_set_up },
    { "unknown/find-failed", memfd, test_find_failed },
    { "unknown/private", private_memfd, test_private },
    { "unknown/anonymous", anonymous, test_private },
    { "shared-anonymous", shared_anonymous, test_shared_anonymous },
    { "private/anonymous", anonymous, test_private_anonymous },
    { "private/run", none, test_private_run },
    { "private/postcopy", none, test_private_postcopy },
    { "private/tmpfs", private_memfd, test_private_tmpfs },
    { "private/hugetlb", private_hugetlb, test_private_hugetlb },
    { "private/hugetlb-empty", private_hugetlb, test_private_hugetlb_empty },
    { "private/preallocated", none, test_private_preallocated },
    { "absent/shmem", memfd, test_absent_shmem },
    { "absent/fd-offset", none, test_absent_fd_offset },
    { "absent/short", memfd, test_absent_short },
    { "absent/anonymous", anonymous, test_absent_anonymous },
    { "absent/shared-anonymous", shared_anonymous,
      test_absent_shared_anonymous },
    { "absent/private-file", private_memfd, test_absent_private_file },
    { "absent/hugetlb", hugetlb, test_absent_hugetlb },
    { "absent/private-hugetlb", private_hugetlb, test_absent_private_hugetlb },
    { "absent/switched-off", switched_off, test_absent_left_alone },
    { "absent/slices", none, test_absent_slices },
    { "pristine", none, test_pristine },
    { "other-file", none, test_other_file },
    { "absent/ignored", ignored, test_absent_left_alone },
    { "hugetlb", hugetlb, test_hugetlb },
    { "thp", none, test_thp },
    { "run", memfd, test_run },
    { "clear-memory", none, test_clear_memory },
    { "save/find-hole", memfd, test_save_find_hole },
    { "save/run", memfd, test_save_run },
    { "save/large-page", memfd, test_save_large_page },
    { "save/lseek-refused", memfd, test_save_lseek_refused },
    { "save/unknown", switched_off, test_save_unknown },
    { "save/hugetlb", hugetlb, test_save_hugetlb },
    { "save/not-arrived", memfd, test_save_not_arrived },
    { "save/is-zero", memfd, test_block_is_zero },
    { "save/page-to-read", memfd, test_page_to_read },
};

static void run_test(const void *opaque)
{
    const BlockTest *test = opaque;
    TestBlock block = { .rb.fd = -1 };

    if (test->setup(&block)) {
        test->run(&block);
    }
    if (test->setup == postcopy) {
        postcopy_end(&block);
    }
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

    for (int i = 0; i < ARRAY_SIZE(tests); i++) {
        g_autofree char *path = g_strdup_printf("/ram-holes/%s", tests[i].name);

        g_test_add_data_func(path, &tests[i], run_test);
    }
    add_refusals();
    return g_test_run();
}
