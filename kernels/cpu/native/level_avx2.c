#include "level.h"

const struct nybble_kernels nybble_kernels_avx2 = {
    .add_rms_norm = nybble_add_rms_norm_avx2,
    .attend = nybble_attend_avx2,
    .merge_softmax = nybble_merge_softmax_avx2,
    .largest = nybble_largest_avx2,
    .draw_largest = nybble_draw_largest_avx2,
    .tally_keys = nybble_tally_keys_avx2,
    .find_key = nybble_find_key_avx2,
    .write_activations = nybble_write_activations_avx2,
    .multiply = nybble_multiply_avx2,
    .silu_multiply = nybble_silu_multiply_avx2,
    .sigmoid = nybble_sigmoid_avx2,
};
