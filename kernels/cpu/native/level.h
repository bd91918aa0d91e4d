/* The functions that the tables of levels are made of. */

#ifndef NYBBLE_LEVEL_H
#define NYBBLE_LEVEL_H

#include "nybble_cpu.h"

#define NYBBLE_DECLARE_LEVEL(level)                                                                                   \
    extern const struct nybble_kernels nybble_kernels_##level;                                                        \
    void nybble_add_rms_norm_##level(const float *hidden, const float *update, const float *weight, float eps,        \
                                     int64_t columns, float *sum, float *normed);                                     \
    void nybble_attend_##level(const struct nybble_attention_span *span);                                             \
    void nybble_merge_softmax_##level(const struct nybble_softmax *total, const struct nybble_softmax *next,          \
                                      int num_queries, int64_t width);                                                \
    struct nybble_pick nybble_largest_##level(const float *x, int64_t first, int64_t end);                            \
    struct nybble_pick nybble_draw_largest_##level(const struct nybble_draw *draw, struct nybble_pick best);          \
    void nybble_tally_keys_##level(const struct nybble_draw *draw, const struct nybble_key_range *range,              \
                                   struct nybble_tallies *tallies);                                                   \
    int64_t nybble_find_key_##level(const struct nybble_draw *draw, int32_t key, uint64_t count);                     \
    void nybble_write_activations_##level(int64_t kind, enum nybble_words words, const float *x, int64_t columns,     \
                                          void *activations);                                                         \
    void nybble_multiply_##level(const struct nybble_multiplication *multiplication);                                 \
    void nybble_silu_multiply_##level(const float *gate, const float *up, int64_t n, float *out);                     \
    void nybble_sigmoid_##level(float *x, int64_t n);

NYBBLE_DECLARE_LEVEL(portable)
NYBBLE_DECLARE_LEVEL(avx2)
NYBBLE_DECLARE_LEVEL(avx512vnni)

#endif
