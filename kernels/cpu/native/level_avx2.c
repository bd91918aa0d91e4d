#include "level.h"

const struct nybble_kernels nybble_kernels_avx2 = {
    .add_rms_norm = nybble_add_rms_norm_avx2,
};
