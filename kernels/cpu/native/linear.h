/* x times the transpose of a matrix, for use inside operations. */

#ifndef NYBBLE_LINEAR_H
#define NYBBLE_LINEAR_H

#include "matrix.h"
#include "nybble_cpu.h"

/* Bytes that nybble_linear_within needs. */
size_t nybble_linear_scratch(const struct nybble_matrix *matrix, int64_t num_tokens);

/* y [num_tokens, N] = x [num_tokens, K] times the transpose of the first matrix of a stack. Two parallel regions; to be
   called between nybble_begin and nybble_end. scratch: at a multiple of 64. */
void nybble_linear_within(nybble_pool *pool, const struct nybble_matrix *matrix, const float *x, float *y,
                          int64_t num_tokens, void *scratch);

/* The operation: the same with memory of its own. */
struct nybble_linear {
    const struct nybble_matrix *matrix;
    const float *x;
    float *y;
    int64_t num_tokens;
};
NYBBLE_API int nybble_linear(nybble_pool *pool, const struct nybble_linear *arguments);

#endif
