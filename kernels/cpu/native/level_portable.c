#include "level.h"

const struct nybble_kernels nybble_kernels_portable = {
    .add_rms_norm = nybble_add_rms_norm_portable,
    .attend = nybble_attend_portable,
    .merge_softmax = nybble_merge_softmax_portable,
    .largest = nybble_largest_portable,
    .draw_largest = nybble_draw_largest_portable,
    .tally_keys = nybble_tally_keys_portable,
    .find_key = nybble_find_key_portable,
    .write_activations = nybble_write_activations_portable,
    .multiply = nybble_multiply_portable,
    .silu_multiply = nybble_silu_multiply_portable,
    .sigmoid = nybble_sigmoid_portable,
};
