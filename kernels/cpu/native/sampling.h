/* Picking a token from each row of logits: what the operation and the functions of a level share. */

#ifndef NYBBLE_SAMPLING_H
#define NYBBLE_SAMPLING_H

#include "nybble_cpu.h"

/* Some columns of a row. The value of a column is (logit - largest) / temperature, in float32, plus Gumbel noise
   from the row's 64 random bits and the column (kernels/random_bits.py). */
struct nybble_draw {
    const float *logits; /* of the row */
    int64_t first;
    int64_t end;
    float largest;
    float temperature;
    uint64_t bits;
};

/* sampling.c. logits: [rows, ...], row_stride floats apart, of which the first num_columns count; temperatures:
   [rows], 0 for the largest logit; bits, picks: [rows]. Of equal values the first column is picked. */
struct nybble_sample {
    const float *logits;
    const float *temperatures;
    const int64_t *bits;
    int64_t *picks;
    int64_t row_stride;
    int64_t rows;
    int64_t num_columns;
};
NYBBLE_API int nybble_sample(nybble_pool *pool, const struct nybble_sample *arguments);

/* The value of one column. */
double nybble_drawn_value(const struct nybble_draw *draw, int64_t column);

/* The output function of SplitMix64. */
static inline uint64_t nybble_mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static inline uint64_t nybble_column_bits(uint64_t bits, int64_t column)
{
    return nybble_mix(bits + ((uint64_t)column + 1) * 0x9E3779B97F4A7C15u);
}

#endif
