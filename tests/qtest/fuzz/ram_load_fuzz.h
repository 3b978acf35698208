/*
 * Fuzzing the loading of RAM: how its savevm handlers are got at
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef RAM_LOAD_FUZZ_H
#define RAM_LOAD_FUZZ_H

#include "migration/register.h"

/* The linker puts the second in front of the first, see meson.build */
int __real_register_savevm_live(const char *idstr, uint32_t instance_id,
                                int version_id, const SaveVMHandlers *ops,
                                void *opaque);
int __wrap_register_savevm_live(const char *idstr, uint32_t instance_id,
                                int version_id, const SaveVMHandlers *ops,
                                void *opaque);

#endif /* RAM_LOAD_FUZZ_H */
