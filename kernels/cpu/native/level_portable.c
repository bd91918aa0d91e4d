#include "level.h"

const struct nybble_kernels nybble_kernels_portable = {
    .add_rms_norm = nybble_add_rms_norm_portable,
};
