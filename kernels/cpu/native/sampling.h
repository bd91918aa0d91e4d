/* Picking a token from each row of logits: what the operation and the functions of a level share. */

#ifndef NYBBLE_SAMPLING_H
#define NYBBLE_SAMPLING_H

#include "nybble_cpu.h"

#include <string.h>

/* Rows are cut into stretches of so many columns, which threads share. */
enum { NYBBLE_COLUMNS_IN_A_PART = 16384 };

/* Kept is a column whose key (nybble_key) is smaller than this one, or is this one up to that column. */
struct nybble_kept {
    int32_t key;
    int64_t column;
};

/* Some columns of a row. The value of a column is its scaled logit, (logit - largest) / temperature in float32,
   plus Gumbel noise from the row's 64 random bits and the column (kernels/random_bits.py). */
struct nybble_draw {
    const float *logits; /* of the row */
    int64_t first;
    int64_t end;
    float largest;
    float temperature;
    uint64_t bits;
    struct nybble_kept kept;
};

/* sampling.c. logits: [rows, ...], row_stride floats apart, of which the first num_columns count, at most 2^22.
   [rows] each: temperatures, 0 for the largest logit; top_ks, 0 for all; top_ps, 1 for all; min_ps, 0 for all; bits;
   picks. Of equal values the first column is picked. */
struct nybble_sample {
    const float *logits;
    const float *temperatures;
    const int64_t *top_ks;
    const float *top_ps;
    const float *min_ps;
    const int64_t *bits;
    int64_t *picks;
    int64_t row_stride;
    int64_t rows;
    int64_t num_columns;
};
NYBBLE_API int nybble_sample(nybble_pool *pool, const struct nybble_sample *arguments);

static inline float nybble_scaled(const struct nybble_draw *draw, int64_t column)
{
    return (draw->logits[column] - draw->largest) / draw->temperature;
}

/* Of a scaled logit: the smaller, the likelier. */
static inline int32_t nybble_key(float scaled)
{
    int32_t bits;
    memcpy(&bits, &scaled, sizeof bits);
    return bits & INT32_MAX;
}

static inline bool nybble_is_kept(const struct nybble_draw *draw, int64_t column)
{
    const int32_t key = nybble_key(nybble_scaled(draw, column));
    return key < draw->kept.key || (key == draw->kept.key && column <= draw->kept.column);
}

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
