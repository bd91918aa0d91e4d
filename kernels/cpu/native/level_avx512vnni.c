#include "level.h"

const struct nybble_kernels nybble_kernels_avx512vnni = {
    .add_rms_norm = nybble_add_rms_norm_avx512vnni,
};
