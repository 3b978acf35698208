/*
 * QTest testcases for sparse guest RAM that are not sent to QEMU
 *
 * They run as migration-test does, with the rows of sparse-util.h.
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "libqtest.h"
#include "qemu/module.h"
#include "sparse-lab.h"

/* --full is for migration-test's set of slow tests */
static bool take_full(int *argc, char **argv)
{
    bool full = false;
    int i, kept = 0;

    for (i = 0; i < *argc; i++) {
        if (g_str_equal(argv[i], "--full")) {
            full = true;
        } else {
            argv[kept++] = argv[i];
        }
    }
    argv[kept] = NULL;
    *argc = kept;
    return full;
}

int main(int argc, char **argv)
{
    bool full = take_full(&argc, argv);
    int failed;

    g_test_init(&argc, &argv, NULL);
    sparse_env = migration_get_env();
    sparse_env->full_set = full;
    module_call_init(MODULE_INIT_QOM);

    lab_add_rows();
    lab_add_readers();
    lab_add_capability();
    lab_add_hostile();
    lab_add_devices();
    lab_add_postcopy();
    lab_add_errors();
    lab_add_pressure();
    lab_add_stress();

    failed = g_test_run();
    return migration_env_clean(sparse_env) || failed;
}
