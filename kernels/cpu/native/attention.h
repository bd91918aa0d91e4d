/* Paged attention: what the operations, and the functions of a level that they are made of, share. */

#ifndef NYBBLE_ATTENTION_H
#define NYBBLE_ATTENTION_H

#include "nybble_cpu.h"

enum nybble_kv_dtype { NYBBLE_KV_FP32, NYBBLE_KV_BF16, NYBBLE_KV_FP8 };

/* A layer's cache. keys: [blocks, num_kv_heads, head_dim, block_size], so that a vector holds a dimension of
   neighbouring keys and scores need no sums across lanes; values: [blocks, num_kv_heads, block_size, head_dim].
   The scales multiply what is stored. */
struct nybble_kv_cache {
    void *keys;
    void *values;
    float key_scale;
    float value_scale;
    int32_t dtype;
    int32_t block_size;
    int32_t num_kv_heads;
    int32_t head_dim;
};

/* Contexts are computed in tiles of keys with one softmax each (its maximum and sum carried along), and in spans
   of tiles whose results are merged in order. Both are the same for every query, whatever else is in its step,
   and so are its numbers. */
enum { NYBBLE_KEYS_IN_A_TILE = 128, NYBBLE_KEYS_IN_A_SPAN = 512 };

/* Padding that lets the functions of every level write whole vectors. */
enum { NYBBLE_MOST_LANES = 16 };

/* Softmax that is under way, of some queries: exponentials with base 2 are relative to `maxima`.
   outputs: [queries, output_width]; maxima, sums: [queries]. */
struct nybble_softmax {
    float *outputs;
    float *maxima;
    float *sums;
};

/* Queries that share a KV head, against keys first to end of one sequence.
   queries: [num_queries, head_dim], times the scale of scores and log2 e; limits: [num_queries], the keys that
   each may see. Scratch: scores [num_queries, NYBBLE_KEYS_IN_A_TILE + NYBBLE_MOST_LANES]; widened
   [nybble_widened_size(head_dim)]. */
struct nybble_attention_span {
    const struct nybble_kv_cache *cache;
    const int32_t *block_table;
    int head;
    int num_queries;
    const float *queries;
    const int64_t *limits;
    int64_t first;
    int64_t end;
    float *scores;
    float *widened;
    struct nybble_softmax result;
};

/* attention.c. query: [T, num_heads, head_dim]; attended: [T, num_heads * head_dim]; query_starts:
   [num_sequences + 1]; context_lengths: [num_sequences], at least 1; block_tables: [num_sequences, max_blocks]. */
struct nybble_paged_attention {
    const struct nybble_kv_cache *cache;
    const float *query;
    float *attended;
    const int32_t *query_starts;
    const int32_t *context_lengths;
    const int32_t *block_tables;
    int64_t max_blocks;
    int32_t num_sequences;
    int32_t num_heads;
};
NYBBLE_API int nybble_paged_attention(nybble_pool *pool, const struct nybble_paged_attention *arguments);

/* Of a layer. bias, query_norm and key_norm may be NULL. The columns of qkv are those of the hidden states, its
   rows the heads of queries, keys and values. The first rotary_dim dimensions of a head are rotated. */
struct nybble_attention_weights {
    const struct nybble_matrix *qkv;
    const float *norm;
    const float *bias;
    const float *query_norm;
    const float *key_norm;
    int64_t hidden_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t rotary_dim;
    float norm_eps;
    float query_eps;
    float key_eps;
};

/* attention_input.c. hidden, update (or NULL), sum: [T, hidden_size]; query: [T, num_heads, head_dim]; cos, sin:
   [T, rotary_dim / 2]; slots: [T]. sum may be hidden. */
struct nybble_attention_input {
    const struct nybble_attention_weights *weights;
    const struct nybble_kv_cache *cache;
    const float *hidden;
    const float *update;
    float *sum;
    float *query;
    const float *cos;
    const float *sin;
    const int64_t *slots;
    int64_t tokens;
};
NYBBLE_API int nybble_attention_input(nybble_pool *pool, const struct nybble_attention_input *arguments);

static inline int64_t nybble_padded(int64_t count)
{
    return (count + NYBBLE_MOST_LANES - 1) / NYBBLE_MOST_LANES * NYBBLE_MOST_LANES;
}

static inline int64_t nybble_widened_size(int64_t head_dim)
{
    return head_dim * (NYBBLE_KEYS_IN_A_TILE + NYBBLE_MOST_LANES) + NYBBLE_KEYS_IN_A_TILE * nybble_padded(head_dim);
}

#endif
