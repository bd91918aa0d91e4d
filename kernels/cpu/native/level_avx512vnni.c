#include "level.h"

const struct nybble_kernels nybble_kernels_avx512vnni = {
    .add_rms_norm = nybble_add_rms_norm_avx512vnni,
    .attend = nybble_attend_avx512vnni,
    .merge_softmax = nybble_merge_softmax_avx512vnni,
    .largest = nybble_largest_avx512vnni,
    .draw_largest = nybble_draw_largest_avx512vnni,
    .tally_keys = nybble_tally_keys_avx512vnni,
    .find_key = nybble_find_key_avx512vnni,
    .write_activations = nybble_write_activations_avx512vnni,
    .multiply = nybble_multiply_avx512vnni,
    .silu_multiply = nybble_silu_multiply_avx512vnni,
    .sigmoid = nybble_sigmoid_avx512vnni,
};
