/* Matrices brought to the layout of matrix.h. */

#ifndef NYBBLE_PACK_H
#define NYBBLE_PACK_H

#include "matrix.h"
#include "nybble_cpu.h"

/* A matrix, or a stack of them, whose rows have row_bytes of codes as lines take them, 4 bytes at a time, and
   num_row_scales block scales of one byte; NULL if the kind has none. Row scales are not written. pool may be NULL: then
   the caller's thread does it alone. */
struct nybble_pack {
    const struct nybble_matrix *matrix;
    uint8_t *codes;  /* of the matrix */
    uint8_t *scales; /* of the matrix */
    const uint8_t *source;
    const uint8_t *source_scales;
    int64_t row_bytes;
    int64_t num_row_scales;
};
NYBBLE_API int nybble_pack(nybble_pool *pool, const struct nybble_pack *arguments);

/* Floats [num_matrices, num_rows, num_columns], float32 or bfloat16, as INT8: a block's scale is its largest magnitude
   over 127, and the largest of a row is the row scale. It is NaN for a row with a number that is not finite. */
struct nybble_pack_int8 {
    const struct nybble_matrix *matrix;
    uint8_t *codes;
    uint8_t *scales;
    float *row_scales;
    const void *source;
    int64_t is_bfloat16;
};
NYBBLE_API int nybble_pack_int8(nybble_pool *pool, const struct nybble_pack_int8 *arguments);

#endif
