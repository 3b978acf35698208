/*
 * What files of util/ and their tests use of QEMU, for building them without a
 * QEMU tree (see meson.build at the top).  Never part of a QEMU build.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef STANDALONE_OSDEP_H
#define STANDALONE_OSDEP_H

#ifdef __linux__
#define CONFIG_LINUX 1
#endif

#ifdef __x86_64__
#define HOST_X86_64 1
#endif
#ifdef __aarch64__
#define HOST_AARCH64 1
#endif

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <glib.h>

#define ARRAY_SIZE(x) G_N_ELEMENTS(x)
#define DIV_ROUND_UP(n, d) (((n) + (d) - 1) / (d))
#define QEMU_ALIGN_DOWN(n, m) ((n) / (m) * (m))
#define QEMU_ALIGN_UP(n, m) QEMU_ALIGN_DOWN((n) + (m) - 1, (m))
/* The C library has a macro for this as well, which may be more complete. */
#undef RETRY_ON_EINTR
#define RETRY_ON_EINTR(expr) TEMP_FAILURE_RETRY(expr)

static inline size_t qemu_real_host_page_size(void)
{
    return sysconf(_SC_PAGESIZE);
}

#endif
