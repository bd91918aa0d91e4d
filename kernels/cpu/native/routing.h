/* Each token's choice of experts. */

#ifndef NYBBLE_ROUTING_H
#define NYBBLE_ROUTING_H

#include "matrix.h"
#include "nybble_cpu.h"

enum { NYBBLE_MAX_GROUPS = 64 };

/* weight: of kind FLOAT32 [num_experts, columns]; bias: [num_experts], used to choose and never to weigh. num_groups
   divides num_experts; top_k_groups groups have at least top_k experts. */
struct nybble_router {
    const struct nybble_matrix *weight;
    const float *bias;
    int64_t top_k;
    int64_t num_groups;
    int64_t top_k_groups;
    int64_t normalizes;
    float scale;
};

/* Of one token: logits [num_experts] become scores, keys [num_experts] are scratch, ids and weights [top_k] are written.
   Whatever the logits, ids are distinct and name experts. NaN counts as the largest. */
void nybble_route(const struct nybble_kernels *kernels, const struct nybble_router *router, float *logits, int32_t *keys,
                  int32_t *ids, float *weights);

#endif
