/*
 * QTest testcases for sparse guest RAM
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_TESTS_H
#define SPARSE_TESTS_H

#include "migration/framework.h"

/* Faults while postcopy is active */
void migration_test_add_sparse_postcopy(MigrationTestEnv *env);

/* The capability sparse-ram; called by migration_test_add_sparse() */
void migration_test_add_sparse_ram(MigrationTestEnv *env);

/* Files and snapshots that are loaded; called by migration_test_add_sparse() */
void migration_test_add_sparse_file(MigrationTestEnv *env);
/* A destination that is short of memory; likewise */
void migration_test_add_sparse_pressure(void);

#endif /* SPARSE_TESTS_H */
