/*
 * QTest testcases for sparse guest RAM: a destination that is short of memory
 *
 * The destination is put into a memory cgroup that has room for the guest's
 * data and for QEMU, but not for all of the guest's RAM.  Should it need more,
 * the kernel kills it, and nothing else: the limit is that of the cgroup, and
 * there is no other process in it.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include <sys/wait.h>

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "sparse-lab.h"

#define PRESSURE_SIZE (1 * GiB)

/* Runs of data as large as a huge page, so that THP make no more of it */
#define DATA_RUN (2 * MiB)
#define DATA_DISTANCE (64 * MiB)
#define DATA_BYTES (PRESSURE_SIZE / DATA_DISTANCE * DATA_RUN)

/* The data, QEMU itself, and what the kernel needs for both */
#define PRESSURE_LIMIT (DATA_BYTES + 256 * MiB)

static const SparseWay runs = {
    .name = "sparse-ram", .capabilities = { "sparse-ram" },
};
static const SparseWay postcopy_preempt = {
    .name = "postcopy-preempt",
    .transport = SPARSE_POSTCOPY,
    .capabilities = { "postcopy-ram", "postcopy-preempt" },
};

/* Memory cgroups, in either version of the interface */
typedef struct CgroupFiles {
    /* Where they usually are */
    const char *mount;
    const char *limit;
    const char *peak;
    /* Has a line "oom_kill N" */
    const char *events;
    /* What keeps memory from being swapped out instead */
    const char *swap;
    /* NULL: the same as the limit */
    const char *swap_value;
} CgroupFiles;

static const CgroupFiles cgroup_v1 = {
    .mount = "/sys/fs/cgroup/memory",
    .limit = "memory.limit_in_bytes",
    .peak = "memory.max_usage_in_bytes",
    .events = "memory.oom_control",
    .swap = "memory.memsw.limit_in_bytes",
};

static const CgroupFiles cgroup_v2 = {
    .mount = "/sys/fs/cgroup",
    .limit = "memory.max",
    .peak = "memory.peak",
    .events = "memory.events",
    .swap = "memory.swap.max",
    .swap_value = "0",
};

/* A cgroup of ours; path is NULL if there is none */
typedef struct Cgroup {
    const CgroupFiles *files;
    char *path;
} Cgroup;

static bool cgroup_write(const Cgroup *cgroup, const char *file,
                         const char *value)
{
    g_autofree char *path = g_build_filename(cgroup->path, file, NULL);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, value, strlen(value)) == strlen(value);

    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

/* Returns the content of a file of the cgroup, or NULL */
static char *cgroup_read(const Cgroup *cgroup, const char *file)
{
    g_autofree char *path = g_build_filename(cgroup->path, file, NULL);
    char *content = NULL;

    return g_file_get_contents(path, &content, NULL, NULL) ? content : NULL;
}

/* How many processes of the cgroup were killed because it is full */
static uint64_t cgroup_oom_kills(const Cgroup *cgroup)
{
    g_autofree char *events = cgroup_read(cgroup, cgroup->files->events);
    g_auto(GStrv) lines = g_strsplit(events ? events : "", "\n", -1);
    int i;

    for (i = 0; lines[i]; i++) {
        uint64_t kills;

        if (sscanf(lines[i], "oom_kill %" SCNu64, &kills) == 1) {
            return kills;
        }
    }
    g_assert_not_reached();
}

/* Also called if the test fails, when the process in it has been killed */
static void cgroup_remove(void *opaque)
{
    Cgroup *cgroup = opaque;

    if (cgroup->path && rmdir(cgroup->path) != 0) {
        fprintf(stderr, "%s is left behind: %s\n", cgroup->path,
                strerror(errno));
    }
    g_clear_pointer(&cgroup->path, g_free);
}

static void cgroup_end(void *opaque)
{
    cgroup_remove(opaque);
    qtest_remove_abrt_handler(opaque);
}

/* Whether a process of this user may be moved there: let a new one try */
static bool cgroup_accepts_processes(const Cgroup *cgroup)
{
    int status = 1;
    pid_t pid = fork();

    if (pid == 0) {
        _exit(cgroup_write(cgroup, "cgroup.procs", "0") ? 0 : 1);
    }
    return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

/* Make one in the directory of another one */
static bool cgroup_make_in(Cgroup *cgroup, const char *parent, uint64_t limit)
{
    g_autofree char *value = g_strdup_printf("%" PRIu64, limit);
    g_autofree char *events = NULL;

    cgroup->path = g_strdup_printf("%s/qemu-sparse-test-%d", parent, getpid());
    if (mkdir(cgroup->path, 0755) != 0) {
        g_clear_pointer(&cgroup->path, g_free);
        return false;
    }
    qtest_add_abrt_handler(cgroup_remove, cgroup);
    events = cgroup_read(cgroup, cgroup->files->events);
    if (events && strstr(events, "oom_kill ") &&
        cgroup_write(cgroup, cgroup->files->limit, value) &&
        cgroup_accepts_processes(cgroup)) {
        /* Kernels without swap do not have it */
        cgroup_write(cgroup, cgroup->files->swap,
                     cgroup->files->swap_value ?: value);
        return true;
    }
    cgroup_end(cgroup);
    return false;
}

/* Where the cgroup is that limits the memory of this process, or NULL */
static char *own_cgroup(const CgroupFiles **files)
{
    g_autofree char *content = NULL;
    g_autofree char *v2_path = NULL;
    g_auto(GStrv) lines = NULL;
    int i;

    if (!g_file_get_contents("/proc/self/cgroup", &content, NULL, NULL)) {
        return NULL;
    }
    lines = g_strsplit(content, "\n", -1);
    for (i = 0; lines[i]; i++) {
        /* Hierarchy, controllers, path */
        g_auto(GStrv) fields = g_strsplit(lines[i], ":", 3);

        if (g_strv_length(fields) != 3) {
            continue;
        }
        if (g_str_equal(fields[1], "memory")) {
            *files = &cgroup_v1;
            return g_strconcat(cgroup_v1.mount, fields[2], NULL);
        }
        if (g_str_equal(fields[0], "0")) {
            v2_path = g_strconcat(cgroup_v2.mount, fields[2], NULL);
        }
    }
    *files = &cgroup_v2;
    return g_steal_pointer(&v2_path);
}

/*
 * Make a cgroup that limits memory.  With version 2, a cgroup that has
 * processes cannot have children with limits, so that it will be one next to
 * that of this process, or next to an ancestor of it.  In a container, the
 * directory of that of this process may not be there.
 */
static bool cgroup_make(Cgroup *cgroup, uint64_t limit)
{
    char *path;
    bool made = false;

    *cgroup = (Cgroup) { };
    path = own_cgroup(&cgroup->files);
    while (path && !made && g_str_has_prefix(path, cgroup->files->mount)) {
        g_autofree char *place = path;

        made = cgroup_make_in(cgroup, place, limit);
        path = g_path_get_dirname(place);
    }
    g_free(path);
    return made;
}

static void cgroup_add_process(const Cgroup *cgroup, pid_t pid)
{
    g_autofree char *value = g_strdup_printf("%d", pid);

    g_assert(cgroup_write(cgroup, "cgroup.procs", value));
}

/* Runs of data, far from each other */
static PageKind pressure_kind(uint64_t page, uint64_t pages)
{
    return page * (PRESSURE_SIZE / pages) % DATA_DISTANCE < DATA_RUN
        ? PAGE_DATA : PAGE_HOLE;
}

static const SparsePattern pressure_pattern = { "pressure", pressure_kind };

static Cgroup cgroup;

/* Before QEMU is started, and so removed when the process in it is gone */
static const char *make_cgroup(void)
{
    if (!cgroup_make(&cgroup, PRESSURE_LIMIT)) {
        return "no cgroup with a memory limit can be made (needs root, or a "
               "cgroup delegated with its memory controller)";
    }
    g_test_queue_destroy(cgroup_end, &cgroup);
    return NULL;
}

static void add_destination(SparseGuests *guests)
{
    cgroup_add_process(&cgroup, guests->dst.pid);
}

static void check_peak(SparseGuests *guests)
{
    g_autofree char *peak = cgroup_read(&cgroup, cgroup.files->peak);

    g_test_message("of %" PRIu64 " bytes the destination has used %s",
                   (uint64_t)PRESSURE_LIMIT, peak ?: "(unknown)");
    g_assert_cmpuint(cgroup_oom_kills(&cgroup), ==, 0);
}

static const SparseRow rows[] = {
    {
        .name = "pressure/%w", .size = PRESSURE_SIZE,
        .patterns = { &pressure_pattern },
        .ways = { &sparse_precopy, &lab_xbzrle, &sparse_multifd,
                  &lab_multifd_legacy, &runs, &sparse_postcopy,
                  &postcopy_preempt },
        .skip_reason = make_cgroup,
        .prepare = add_destination, .check = check_peak,
    },
};

void lab_add_pressure(void)
{
    sparse_add_rows(rows, ARRAY_SIZE(rows));
}
