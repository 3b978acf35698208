/*
 * QTest helpers for sparse guest RAM: two guests, and ways between them
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_GUESTS_H
#define SPARSE_GUESTS_H

#include "libqtest.h"
#include "migration/framework.h"
#include "migration/sparse-util.h"

/* Two guests that do not run, and their main RAM */
typedef struct SparseGuests {
    QTestState *from;
    QTestState *to;
    GuestRam src;
    GuestRam dst;
} SparseGuests;

/* How one becomes the other */
typedef struct SparseRoute {
    /* Last part of a test's path */
    const char *name;
    /* Set on both sides */
    const char *capabilities[2];
    /* Through a file, and not a socket */
    bool file;
    bool postcopy;
    /* Only on the source: capability background-snapshot */
    bool snapshot;
} SparseRoute;

/*
 * Start the guests, with RAM that has been initialized.
 *
 * @src_opts, @dst_opts: all options, for the RAM as well
 *
 * Returns false if the test has to be skipped, after saying why; the RAM is
 * closed then.
 */
bool sparse_guests_start(SparseGuests *guests, const char *src_opts,
                         const char *dst_opts);

/*
 * Set what the route needs, before anything is written to the RAM.  All of the
 * source's RAM is a hole afterwards.
 *
 * Returns false if the test has to be skipped, after saying why.
 */
bool sparse_guests_prepare(const SparseGuests *guests,
                           const SparseRoute *route,
                           const MigrationTestEnv *env);

/* Returns when the migration is completed on both sides */
void sparse_guests_migrate(const SparseGuests *guests,
                           const SparseRoute *route,
                           const MigrationTestEnv *env);

void sparse_guests_end(SparseGuests *guests);

#endif /* SPARSE_GUESTS_H */
