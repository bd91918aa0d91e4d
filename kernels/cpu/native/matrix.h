/* Weight matrices, the rows that they are multiplied with, and the product.

   A matrix [num_rows, num_columns], or one of a stack of them, is cut into tiles of 16 rows and blocks of 32
   columns, both padded with zeros. A tile's blocks lie one after the other, so that it is read as one stream. In
   all of them a 32-bit lane belongs to one row, so that sums stay in lanes; codes of a block are lines of 64 bytes,
   [16 rows][4 bytes], but of FP8 [4 columns][16 rows]:

       kind              line j has of each row columns                     scales of a block
       FP4_BY_16          8j + 0 2 4 6, low nibbles; 8j + 1 3 5 7, high     E4M3 [2 halves][16 rows]
       FP4_BY_32          8j + 0 2 4 6, low nibbles; 8j + 1 3 5 7, high     E8M0 [16 rows]
       INT8               8i + 0 2 4 6 (j = 2i) or 8i + 1 3 5 7             float16 [16 rows]
       FP8                4j .. 4j + 3                                      none
       BFLOAT16           2j, 2j + 1                                        none
       FLOAT32            j                                                 none

   So FP4 and FP8 codes keep the bytes that files have. INT8 codes are stored plus 128. A weight is

       code value * scale of its block * row scale

   where an E2M1 code has twice its value, an E4M3 byte is read as a float16's sign and bits 7..13 (2^-8 of its
   value), an E8M0 byte as a float32's exponent, and the row scale makes up for all of that; the scale of a block is
   1 where it has none. A row of FP8 with a code NaN has row scale NaN. BFLOAT16 and FLOAT32 have no row scales: they
   are NULL.

   What FP4 and INT8 are multiplied with is quantized 32 columns at a time (struct nybble_activations), in the order of
   columns that lines have: to one int8 a number, or to a high and a low one, which cost about twice the products
   (enum nybble_words); other kinds take float32. Sums of products of codes are exact; everything else is float32, in an
   order that depends on neither the number of tokens nor that of threads. */

#ifndef NYBBLE_MATRIX_H
#define NYBBLE_MATRIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { NYBBLE_TILE_ROWS = 16, NYBBLE_BLOCK_COLUMNS = 32, NYBBLE_LINE_BYTES = 64 };

/* The order of Kind in cpu_matrix.py. */
enum nybble_matrix_kind {
    NYBBLE_FP4_BY_16,
    NYBBLE_FP4_BY_32,
    NYBBLE_INT8,
    NYBBLE_FP8,
    NYBBLE_BFLOAT16,
    NYBBLE_FLOAT32
};

struct nybble_matrix {
    const uint8_t *codes;
    const uint8_t *scales;
    const float *row_scales; /* [num_matrices, tiles * 16] */
    int64_t num_matrices;
    int64_t num_rows;
    int64_t num_columns;
    int64_t kind;
};

/* Which blocks of a row have low words. Without, a number is off by up to 1/254 of the largest magnitude of its block,
   with them by 1/128 of that. */
enum nybble_words {
    NYBBLE_TWO_WHERE_LARGE, /* blocks with a magnitude above 3 times the root mean square of the row */
    NYBBLE_TWO_WORDS        /* all, but for blocks of zeros and those with a number that is not finite */
};

/* 32 columns of a row, for FP4 and INT8: whole numbers n = high, or 128 * high + low if has_low, times the scale. The
   products of the codes that are stored, which are too large by 12 or 128, begin with what that adds: -12 times the
   sum of n in each half, -128 times the sum of all. A block that has a number that is not finite has scale NaN.
   Without has_low, low is zeros. */
struct nybble_activations {
    float scale;
    int32_t has_low;
    int32_t start_12[2];
    int32_t start_128;
    int8_t high[NYBBLE_BLOCK_COLUMNS];
    int8_t low[NYBBLE_BLOCK_COLUMNS];
};

/* A row of activations, and where its products with the rows of a matrix go. */
struct nybble_product {
    const void *activations; /* struct nybble_activations or float, [blocks] of 32 columns */
    float *out;
    float factor;
};

/* Products of rows of activations with tiles of a matrix: out[row - out_row] = product, or += factor * product.
   Of rows that the matrix has not, nothing is written. */
struct nybble_multiplication {
    const struct nybble_matrix *matrix;
    int64_t index; /* in the stack */
    int64_t first_tile;
    int64_t end_tile;
    int64_t out_row;
    const struct nybble_product *products;
    int64_t num_products;
    enum nybble_words words; /* as the activations were written with */
    bool is_added;
};

static inline int64_t nybble_num_blocks(int64_t columns)
{
    return (columns + NYBBLE_BLOCK_COLUMNS - 1) / NYBBLE_BLOCK_COLUMNS;
}

static inline int64_t nybble_num_tiles(int64_t rows) { return (rows + NYBBLE_TILE_ROWS - 1) / NYBBLE_TILE_ROWS; }

static inline bool nybble_has_row_scales(int64_t kind) { return kind != NYBBLE_BFLOAT16 && kind != NYBBLE_FLOAT32; }

static inline bool nybble_takes_floats(int64_t kind) { return kind == NYBBLE_FP8 || !nybble_has_row_scales(kind); }

/* Bytes of the codes, and of the scales, of a block of 16 rows x 32 columns. */
static inline int64_t nybble_code_bytes(int64_t kind)
{
    static const int64_t bytes[] = {256, 256, 512, 512, 1024, 2048};
    return bytes[kind];
}

static inline int64_t nybble_scale_bytes(int64_t kind)
{
    static const int64_t bytes[] = {32, 16, 32, 0, 0, 0};
    return bytes[kind];
}

/* Bytes of a block of a row of activations. */
static inline size_t nybble_activation_bytes(int64_t kind)
{
    return nybble_takes_floats(kind) ? NYBBLE_BLOCK_COLUMNS * sizeof(float) : sizeof(struct nybble_activations);
}

/* Bytes from one row of activations to the next: an odd number of lines, so that the same columns of several rows
   do not compete for a set of the cache. */
static inline size_t nybble_activation_stride(int64_t kind, int64_t columns)
{
    const size_t bytes = (size_t)nybble_num_blocks(columns) * nybble_activation_bytes(kind);
    return ((bytes + NYBBLE_LINE_BYTES - 1) / NYBBLE_LINE_BYTES | 1) * NYBBLE_LINE_BYTES;
}

#endif
