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
   each may see; scores: scratch [num_queries, NYBBLE_KEYS_IN_A_TILE + NYBBLE_MOST_LANES]. */
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

static inline int64_t nybble_padded(int64_t count)
{
    return (count + NYBBLE_MOST_LANES - 1) / NYBBLE_MOST_LANES * NYBBLE_MOST_LANES;
}

#endif
