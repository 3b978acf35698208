/*
 * QTest helpers for sparse guest RAM: two guests, and ways between them
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "migration/sparse-guests.h"
#include "qobject/qdict.h"

static void close_ram(SparseGuests *guests)
{
    guest_ram_close(&guests->src);
    guest_ram_close(&guests->dst);
}

bool sparse_guests_start(SparseGuests *guests, const char *src_opts,
                         const char *dst_opts)
{
    g_autofree char *src_stopped = g_strdup_printf("-S %s", src_opts);
    g_autofree char *dst_stopped = g_strdup_printf("-S %s", dst_opts);
    MigrateStart args = {
        .opts_source = src_stopped,
        .opts_target = dst_stopped,
    };

    if (migrate_start(&guests->from, &guests->to, "defer", &args)) {
        close_ram(guests);
        return false;
    }
    guest_ram_open(&guests->src, guests->from);
    guest_ram_open(&guests->dst, guests->to);
    return true;
}

/*
 * QEMU cannot take a snapshot of a guest that has not been started yet.  What
 * the firmware has written meanwhile would be no part of the test.
 */
static void pause_guest(const SparseGuests *guests)
{
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'cont' }");
    qtest_qmp_assert_success(guests->from, "{ 'execute': 'stop' }");
    guest_ram_punch(&guests->src);
}

bool sparse_guests_prepare(const SparseGuests *guests,
                           const SparseRoute *route,
                           const MigrationTestEnv *env)
{
    int i;

    if (route->postcopy && !env->has_uffd) {
        g_test_skip("userfaultfd is not available");
        return false;
    }
    for (i = 0; i < ARRAY_SIZE(route->capabilities) && route->capabilities[i];
         i++) {
        if (!migrate_try_capability(guests->from, route->capabilities[i]) ||
            !migrate_try_capability(guests->to, route->capabilities[i])) {
            return false;
        }
    }
    if (route->snapshot) {
        pause_guest(guests);
        return migrate_try_capability(guests->from, "background-snapshot");
    }
    return true;
}

void sparse_guests_migrate(const SparseGuests *guests,
                           const SparseRoute *route,
                           const MigrationTestEnv *env)
{
    g_autofree char *uri = g_strdup_printf("file:%s/%s", env->tmpfs,
                                           FILE_TEST_FILENAME);

    if (route->postcopy) {
        migrate_ensure_postcopy(guests->from);
    } else {
        migrate_ensure_converge(guests->from);
    }
    if (route->file) {
        migrate_qmp(guests->from, guests->to, uri, NULL, "{}");
        wait_for_migration_complete(guests->from);
        migrate_incoming_qmp(guests->to, uri, NULL, "{}");
    } else {
        migrate_incoming_qmp(guests->to, "tcp:127.0.0.1:0", NULL, "{}");
        migrate_qmp(guests->from, guests->to, NULL, NULL, "{}");
        if (route->postcopy) {
            qtest_qmp_assert_success(guests->from, "{ 'execute':"
                                     "'migrate-start-postcopy' }");
        }
        wait_for_migration_complete(guests->from);
    }
    wait_for_migration_complete(guests->to);
    if (route->postcopy) {
        check_postcopy(guests->from);
    }
}

void sparse_guests_end(SparseGuests *guests)
{
    migrate_end(guests->from, guests->to, false);
    close_ram(guests);
}
