/* SPDX-License-Identifier: GPL-2.0-or-later */

#ifndef STANDALONE_UNITS_H
#define STANDALONE_UNITS_H

#define KiB (INT64_C(1) << 10)
#define MiB (INT64_C(1) << 20)
#define TiB (INT64_C(1) << 40)

#endif
