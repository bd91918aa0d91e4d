/* The feed-forward part of a layer, dense or with routed experts, in one operation. */

#ifndef NYBBLE_FEED_FORWARD_H
#define NYBBLE_FEED_FORWARD_H

#include "matrix.h"
#include "routing.h"

/* gate_up: [2I, H], gate above up; down: [H, I]; or stacks of them. */
struct nybble_mlp {
    const struct nybble_matrix *gate_up;
    const struct nybble_matrix *down;
};

/* experts: stacks of those from first_expert on; router.top_k is 0 without any. mlp: the shared expert, or all of a dense
   layer. */
struct nybble_layer {
    const float *norm_weight;
    struct nybble_router router;
    struct nybble_mlp experts;
    struct nybble_mlp mlp;
    int64_t first_expert;
    float eps;
};

/* hidden [num_tokens, H] += update, unless that is NULL; out [num_tokens, H] = the layer's experts of its norm. */
struct nybble_feed_forward {
    const struct nybble_layer *layer;
    float *hidden;
    const float *update;
    float *out;
    int64_t num_tokens;
};
NYBBLE_API int nybble_feed_forward(nybble_pool *pool, const struct nybble_feed_forward *arguments);

#endif
