/*
 * QTest testcases for sparse guest RAM: a guest that writes all the time
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_STRESS_TESTS_H
#define SPARSE_STRESS_TESTS_H

#include "migration/framework.h"

/* Called by migration_test_add_sparse(), for x86 only */
void migration_test_add_sparse_stress(MigrationTestEnv *env);

#endif /* SPARSE_STRESS_TESTS_H */
