/* Sigmoid scores; of the best groups, which are those whose two best choices have the largest sum, the best choices. A
   choice is score plus bias, compared as an integer key of the same order. Of equal ones the first is taken. */

#include "routing.h"

#include <string.h>

enum { TAKEN = INT32_MIN };

static int32_t key_of(float choice)
{
    int32_t bits;
    if (choice != choice)
        return INT32_MAX;
    memcpy(&bits, &choice, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

static float choice_of(int32_t key)
{
    const int32_t bits = key < 0 ? key ^ INT32_MAX : key;
    float choice;
    memcpy(&choice, &bits, sizeof choice);
    return choice;
}

static int64_t largest(const int32_t *keys, int64_t num_keys)
{
    int64_t best = 0;
    for (int64_t i = 1; i < num_keys; i++)
        if (keys[i] > keys[best])
            best = i;
    return best;
}

/* Of the two largest choices. */
static float sum_of_two(const int32_t *keys, int64_t num_keys)
{
    int32_t first = TAKEN, second = TAKEN;
    for (int64_t i = 0; i < num_keys; i++) {
        if (keys[i] > first) {
            second = first;
            first = keys[i];
        } else if (keys[i] > second) {
            second = keys[i];
        }
    }
    return choice_of(first) + choice_of(second);
}

/* Choices outside the best groups become minus infinity: they are taken last. */
static void mask_weak_groups(const struct nybble_router *router, int32_t *keys, int64_t num_experts)
{
    const int64_t size = num_experts / router->num_groups;
    int32_t strengths[NYBBLE_MAX_GROUPS];
    if (router->top_k_groups == router->num_groups)
        return;
    for (int64_t group = 0; group < router->num_groups; group++)
        strengths[group] = key_of(sum_of_two(keys + group * size, size));
    for (int64_t i = 0; i < router->top_k_groups; i++)
        strengths[largest(strengths, router->num_groups)] = TAKEN;
    for (int64_t group = 0; group < router->num_groups; group++)
        for (int64_t i = 0; strengths[group] != TAKEN && i < size; i++)
            keys[group * size + i] = TAKEN + 1;
}

void nybble_route(const struct nybble_kernels *kernels, const struct nybble_router *router, float *logits, int32_t *keys,
                  int32_t *ids, float *weights)
{
    const int64_t num_experts = router->weight->num_rows;
    float sum = 0;
    kernels->sigmoid(logits, num_experts);
    for (int64_t i = 0; i < num_experts; i++)
        keys[i] = key_of(logits[i] + router->bias[i]);
    mask_weak_groups(router, keys, num_experts);
    for (int64_t rank = 0; rank < router->top_k; rank++) {
        const int64_t id = largest(keys, num_experts);
        keys[id] = TAKEN;
        ids[rank] = (int32_t)id;
        weights[rank] = logits[id];
        sum += logits[id];
    }
    for (int64_t rank = 0; rank < router->top_k; rank++)
        weights[rank] *= router->normalizes ? router->scale / (sum + 1e-20f) : router->scale;
}
