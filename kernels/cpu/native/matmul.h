/* What the files matmul_LEVEL.c share. */

#ifndef NYBBLE_MATMUL_H
#define NYBBLE_MATMUL_H

#include "level.h"
#include "matrix.h"

#include <string.h>

/* 16 rows of a matrix. */
struct tile {
    const uint8_t *codes;
    const uint8_t *scales;
    const float *row_scales;
    int64_t num_blocks;
};

enum { FETCH_DISTANCE = 4096 }; /* bytes: of 1024 to 32768 the best for a decode step of small matrices */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Twice the values of E2M1 codes, plus 12 so that none is negative. */
#define E2M1_PLUS_12 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0

/* A function NAME_tile of 1 to 4, or 8, tokens, made of BODY(tile, products, num_tokens, words, values), which is
   compiled for each number of tokens, so that its sums are in registers, and for each of nybble_words: with
   NYBBLE_TWO_WHERE_LARGE, each block is asked. */
#define ARGUMENTS                                                                                                      \
    const struct tile *tile, const struct nybble_product *products, const int num_tokens,                            \
        const enum nybble_words words __attribute__((unused)), float (*values)[NYBBLE_TILE_ROWS]
#define CASE(body, n, words)                                                                                           \
    case n:                                                                                                            \
        body(tile, products, n, words, values);                                                                        \
        break;
#define CASES_TO_4(body, words) CASE(body, 1, words) CASE(body, 2, words) CASE(body, 3, words) CASE(body, 4, words)
#define CASES_TO_8(body, words)                                                                                        \
    CASES_TO_4(body, words)                                                                                            \
    CASE(body, 5, words) CASE(body, 6, words) CASE(body, 7, words) CASE(body, 8, words)
#define INTEGER_TILE(body, cases)                                                                                      \
    static void body##_tile(ARGUMENTS)                                                                                 \
    {                                                                                                                  \
        if (words == NYBBLE_TWO_WORDS)                                                                                 \
            switch (num_tokens) { cases(body, NYBBLE_TWO_WORDS) }                                                      \
        else                                                                                                           \
            switch (num_tokens) { cases(body, NYBBLE_TWO_WHERE_LARGE) }                                                \
    }
#define FLOAT_TILE(body, cases)                                                                                        \
    static void body##_tile(ARGUMENTS)                                                                                 \
    {                                                                                                                  \
        switch (num_tokens) { cases(body, NYBBLE_TWO_WHERE_LARGE) }                                                    \
    }

ALWAYS_INLINE const struct nybble_activations *activations_at(const struct nybble_product *product, int64_t block)
{
    return (const struct nybble_activations *)product->activations + block;
}

/* NYBBLE_TWO_WORDS needs not ask: blocks without low words are of zeros or count for nothing. */
ALWAYS_INLINE bool has_low(const struct nybble_activations *x, const enum nybble_words words)
{
    return words == NYBBLE_TWO_WORDS || x->has_low;
}

/* Ask for FP4 codes or scales that are multiplied soon, into the second cache: processors read ahead by themselves, but not
   from one page into the next, and where matrices are small not soon enough. Of matrices with more bytes a column they
   do better without. It may be past the end of all codes, which does no harm. */
ALWAYS_INLINE void fetch_ahead(const uint8_t *codes, int num_bytes)
{
    for (int i = 0; i < num_bytes; i += NYBBLE_LINE_BYTES)
        __builtin_prefetch((const void *)((uintptr_t)codes + FETCH_DISTANCE + (uintptr_t)i), 0, 2);
}

/* Four int8 as they lie. */
ALWAYS_INLINE int32_t four(const int8_t *values)
{
    int32_t word;
    memcpy(&word, values, sizeof word);
    return word;
}

#endif
