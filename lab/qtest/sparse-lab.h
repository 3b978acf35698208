/*
 * QTest helpers for the tests that stay with the sparse-ram project
 *
 * Copyright (c) 2026 the sparse-ram project
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SPARSE_LAB_H
#define SPARSE_LAB_H

#include "migration/sparse-util.h"

/* What is below the first MiB of a PC is RAM only up to here */
#define PC_BASE_MEMORY_END (640 * KiB)

/* For what takes its time, in microseconds */
#define LAB_TIMEOUT (120 * G_USEC_PER_SEC)

extern const SparseBackend
    lab_private,            /* a memfd, whose copies in the process count */
    lab_ram,
    lab_ram_shared,
    lab_shm,
    lab_shm_file_offset;    /* the RAM is not at the start of the file */

/* Open what a process has of its own; what is allocated there */
void lab_open_private(GuestRam *ram, QTestState *who);
uint64_t lab_private_bytes(const GuestRam *ram);
/* The file behind it */
GuestRam lab_file_of_private(const GuestRam *ram);
/* Old data in the file, and in copies of its own */
void lab_make_private_stale(const GuestRam *ram);

extern const SparsePattern lab_alternate, lab_dense, lab_runs, lab_ends,
                           lab_zeroed, lab_long_holes;

extern const SparseWay lab_multifd_legacy, lab_xbzrle, lab_file,
                       lab_mapped_ram_multifd, lab_mapped_ram_direct,
                       lab_mapped_ram_none, lab_snapshot, lab_postcopy_preempt,
                       lab_postcopy_release, lab_postcopy_multifd,
                       lab_postcopy_multifd_preempt;

#define ALL_PRECOPY \
    { &sparse_precopy, &sparse_multifd, &lab_multifd_legacy, &lab_xbzrle }
#define ALL_MAPPED \
    &sparse_mapped_ram, &lab_mapped_ram_multifd, &lab_mapped_ram_direct
#define ALL_FILES { &lab_file, ALL_MAPPED }

/* What /proc/PID/status says in KiB, such as VmRSS */
uint64_t lab_status_bytes(pid_t pid, const char *name);

/* Count the lines of a log that have both texts */
unsigned lab_count_lines(const char *log, const char *text, const char *more);

/* Break the channel of postcopy; resume with another one */
void lab_pause_channel(SparseGuests *guests);
void lab_recover_channel(SparseGuests *guests);

/* The last page of a kind before @before */
uint64_t lab_last_of_kind(const SparseGuests *guests, PageKind kind,
                          uint64_t before);

/* As long as devices are being loaded, QEMU ends if anything is wrong */
void lab_wait_for_devices(QTestState *to);

/* Wait for a dump to end, but no longer than @timeout us; whether it has */
bool lab_wait_for_dump(QTestState *who, int64_t timeout);

/* Wait for a dirty rate, which has to be 0 */
void lab_wait_for_dirty_rate(QTestState *who);

/*
 * Compare what an ELF dump has of the RAM of a PC with the pattern.  Unless
 * @length is 0, it is a dump of only this part, which need not begin or end
 * with a page.
 */
void lab_check_elf_dump(const GuestRam *ram, const uint8_t *kinds,
                        const char *path, uint64_t begin, uint64_t length);

void lab_add_test(const char *name, const void *data,
                  void (*test)(const void *));
/* Add one for each of @n cases of @size bytes, whose first member is a name */
void lab_add_cases(const char *prefix, const void *cases, size_t n,
                   size_t size, void (*test)(const void *));
#define LAB_ADD_CASES(prefix, cases, test) \
    lab_add_cases(prefix, cases, ARRAY_SIZE(cases), sizeof((cases)[0]), test)

/* From sparse-writer.S: the end of a ROM, with the processor's entry point */
extern const uint8_t sparse_writer[], sparse_writer_end[];

void lab_add_rows(void);
void lab_add_readers(void);
void lab_add_capability(void);
void lab_add_hostile(void);
void lab_add_devices(void);
void lab_add_postcopy(void);
void lab_add_errors(void);
void lab_add_pressure(void);
void lab_add_stress(void);

#endif /* SPARSE_LAB_H */
