/* The functions that the tables of levels are made of. */

#ifndef NYBBLE_LEVEL_H
#define NYBBLE_LEVEL_H

#include "nybble_cpu.h"

#define NYBBLE_DECLARE_LEVEL(level)                                                                                  \
    extern const struct nybble_kernels nybble_kernels_##level;                                                       \
    void nybble_add_rms_norm_##level(const float *hidden, const float *update, const float *weight, float eps,       \
                                     int64_t columns, float *sum, float *normed);

NYBBLE_DECLARE_LEVEL(portable)
NYBBLE_DECLARE_LEVEL(avx2)
NYBBLE_DECLARE_LEVEL(avx512vnni)

#endif
