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

/*
 * Called by migration_test_add_sparse(), for x86 only.  The guest is assembled
 * by the compiler of the host, which has to be one for x86, too.
 */
#if defined(HOST_X86_64) || defined(HOST_I386)
/* From sparse-writer.S: the end of a ROM, with the processor's entry point */
extern const uint8_t sparse_writer[], sparse_writer_end[];

void migration_test_add_sparse_stress(MigrationTestEnv *env);
#else
static inline void migration_test_add_sparse_stress(MigrationTestEnv *env) {}
#endif

#endif /* SPARSE_STRESS_TESTS_H */
