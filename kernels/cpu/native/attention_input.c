/* The operation attention_input: norm, q/k/v projection, per-head norms, rotation, and writing to the cache. */

#include "attention.h"
#include "kv_element.h"
#include "linear.h"

enum { TOKENS_IN_A_PART = 4 };

struct work {
    const struct nybble_attention_input *arguments;
    const struct nybble_kernels *kernels;
    float *normed; /* [T, hidden_size] */
    float *qkv;    /* [T, (num_heads + 2 num_kv_heads) * head_dim] */
    int num_parts;
};

static int64_t qkv_width(const struct nybble_attention_weights *weights)
{
    return ((int64_t)weights->num_heads + 2 * (int64_t)weights->num_kv_heads) * weights->head_dim;
}

static void norm_tokens(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_attention_input *a = work->arguments;
    const int64_t end = nybble_part_start(a->tokens, part + 1, work->num_parts), width = a->weights->hidden_size;
    (void)thread;
    for (int64_t token = nybble_part_start(a->tokens, part, work->num_parts); token < end; token++) {
        const int64_t at = token * width;
        work->kernels->add_rms_norm(a->hidden + at, a->update ? a->update + at : NULL, a->weights->norm,
                                    a->weights->norm_eps, width, a->update ? a->sum + at : NULL, work->normed + at);
    }
}

/* Dimension i is paired with i + half. */
static void rotate(float *head, const float *cos, const float *sin, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i] + first * sin[i];
    }
}

static void norm_and_rotate(const struct work *work, float *head, const float *norm, float eps, int64_t token)
{
    const struct nybble_attention_input *a = work->arguments;
    const int64_t half = a->weights->rotary_dim / 2;
    if (norm)
        work->kernels->add_rms_norm(head, NULL, norm, eps, a->weights->head_dim, NULL, head);
    rotate(head, a->cos + token * half, a->sin + token * half, half);
}

/* element `at` of what is stored is x[0], and x[i] stands i * stride further. */
static void store(void *to, int64_t at, int64_t stride, const float *x, int64_t count, float scale, int32_t dtype)
{
    const float factor = 1.0f / scale;
    if (dtype == NYBBLE_KV_FP32)
        for (int64_t i = 0; i < count; i++)
            store_kv(to, at + i * stride, x[i], NYBBLE_KV_FP32);
    else if (dtype == NYBBLE_KV_BF16)
        for (int64_t i = 0; i < count; i++)
            store_kv(to, at + i * stride, x[i], NYBBLE_KV_BF16);
    else
        for (int64_t i = 0; i < count; i++)
            store_kv(to, at + i * stride, x[i] * factor, NYBBLE_KV_FP8);
}

static void finish_heads(const struct work *work, float *qkv, int64_t token)
{
    const struct nybble_attention_input *a = work->arguments;
    const struct nybble_attention_weights *weights = a->weights;
    const struct nybble_kv_cache *cache = a->cache;
    const int64_t head_dim = weights->head_dim, size = cache->block_size, query_width = weights->num_heads * head_dim;
    const int64_t block = a->slots[token] / size, offset = a->slots[token] % size;
    for (int64_t head = 0; head < weights->num_heads; head++)
        norm_and_rotate(work, qkv + head * head_dim, weights->query_norm, weights->query_eps, token);
    memcpy(a->query + token * query_width, qkv, (size_t)query_width * sizeof *qkv);
    for (int64_t head = 0; head < weights->num_kv_heads; head++) {
        float *key = qkv + query_width + head * head_dim, *value = key + weights->num_kv_heads * head_dim;
        const int64_t at = (block * weights->num_kv_heads + head) * size * head_dim;
        norm_and_rotate(work, key, weights->key_norm, weights->key_eps, token);
        store(cache->keys, at + offset, size, key, head_dim, cache->key_scale, cache->dtype);
        store(cache->values, at + offset * head_dim, 1, value, head_dim, cache->value_scale, cache->dtype);
    }
}

static void finish_tokens(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_attention_input *a = work->arguments;
    const int64_t end = nybble_part_start(a->tokens, part + 1, work->num_parts), width = qkv_width(a->weights);
    (void)thread;
    for (int64_t token = nybble_part_start(a->tokens, part, work->num_parts); token < end; token++) {
        float *qkv = work->qkv + token * width;
        if (a->weights->bias)
            for (int64_t i = 0; i < width; i++)
                qkv[i] += a->weights->bias[i];
        finish_heads(work, qkv, token);
    }
}

int nybble_attention_input(nybble_pool *pool, const struct nybble_attention_input *arguments)
{
    const struct nybble_attention_weights *weights = arguments->weights;
    const int64_t tokens = arguments->tokens;
    const int64_t normed_size = nybble_padded(tokens * weights->hidden_size);
    const int64_t qkv_size = nybble_padded(tokens * qkv_width(weights));
    const size_t own_bytes = (size_t)(normed_size + qkv_size) * sizeof(float);
    void *scratch;
    const int status = nybble_begin(pool, own_bytes + nybble_linear_scratch(weights->qkv, tokens), &scratch);
    if (status != NYBBLE_OK)
        return status;
    const struct work work = {
        .arguments = arguments,
        .kernels = nybble_pool_kernels(pool),
        .normed = scratch,
        .qkv = (float *)scratch + normed_size,
        .num_parts = (int)((tokens + TOKENS_IN_A_PART - 1) / TOKENS_IN_A_PART),
    };
    nybble_parallel(pool, norm_tokens, &work, work.num_parts);
    nybble_linear_within(pool, weights->qkv, work.normed, work.qkv, tokens, (char *)scratch + own_bytes);
    nybble_parallel(pool, finish_tokens, &work, work.num_parts);
    nybble_end(pool);
    return NYBBLE_OK;
}
