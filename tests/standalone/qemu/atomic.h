/* SPDX-License-Identifier: GPL-2.0-or-later */

#ifndef STANDALONE_ATOMIC_H
#define STANDALONE_ATOMIC_H

#define qatomic_read(ptr) __atomic_load_n(ptr, __ATOMIC_RELAXED)

/* Returns what was there before */
#define qatomic_cmpxchg(ptr, old, new)                                  \
    ({                                                                  \
        typeof(*(ptr)) expected_ = (old);                               \
        __atomic_compare_exchange_n(ptr, &expected_, new, false,        \
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        expected_;                                                      \
    })

#endif
