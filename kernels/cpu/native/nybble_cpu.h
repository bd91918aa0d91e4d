/* The native CPU backend: what its source files share, and what Python calls.

   Plain C11. Nothing here knows of Python or torch: memory comes as pointers, whose sizes the Python side has
   checked. Matrices are row-major.

   A level is an instruction set. What is worth writing for each one is a function in `struct nybble_kernels`;
   NAME_LEVEL.c is compiled with that level's flags and every other file for any machine (the list of flags is in
   scripts/native_build.py). Functions that differ only by how they are compiled stand in a .inc file that the
   three include.

   Python calls operations: int nybble_NAME(nybble_pool *, const struct nybble_NAME *), which return a status. */

#ifndef NYBBLE_CPU_H
#define NYBBLE_CPU_H

#include "matrix.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NYBBLE_API __attribute__((visibility("default")))

/* From slowest to fastest; the order of LEVELS in native_library.py. */
enum nybble_level { NYBBLE_PORTABLE, NYBBLE_AVX2, NYBBLE_AVX512VNNI, NYBBLE_NUM_LEVELS };

enum nybble_status { NYBBLE_OK, NYBBLE_NO_MEMORY, NYBBLE_OTHER_PROCESS };

struct nybble_attention_span;
struct nybble_softmax;
struct nybble_draw;
struct nybble_key_range;
struct nybble_tallies;

/* A column of a row of logits, and its value. */
struct nybble_pick {
    double value;
    int64_t column;
};
struct nybble_multiplication;

/* What a level does in its own way. One constant table for each level, in level_LEVEL.c. */
struct nybble_kernels {
    /* sum = hidden + update (hidden alone if update is NULL), normed = sum / rms(sum) * weight, all [columns].
       sum may be hidden, or NULL if it is not wanted. */
    void (*add_rms_norm)(const float *hidden, const float *update, const float *weight, float eps,
                         int64_t columns, float *sum, float *normed);

    /* The softmax of a span of keys, from its beginning (attention.h). */
    void (*attend)(const struct nybble_attention_span *span);

    /* Merge the softmax of the keys that follow into `total`. width: of a row of outputs. */
    void (*merge_softmax)(const struct nybble_softmax *total, const struct nybble_softmax *next, int num_queries,
                          int64_t width);

    /* The first of the largest of the columns first to end of x (sampling.h). */
    struct nybble_pick (*largest)(const float *x, int64_t first, int64_t end);

    /* The largest of the kept columns of a draw after noise, or `best`, if it is that. */
    struct nybble_pick (*draw_largest)(const struct nybble_draw *draw, struct nybble_pick best);

    /* token_filter.h: how many columns of a draw there are in each interval of a range of keys, and what they weigh. */
    void (*tally_keys)(const struct nybble_draw *draw, const struct nybble_key_range *range,
                       struct nybble_tallies *tallies);

    /* The column of a draw that is the count-th to have a key. */
    int64_t (*find_key)(const struct nybble_draw *draw, int32_t key, uint64_t count);

    /* matrix.h: x [columns] as activations of a kind of matrix, the last block padded with zeros. */
    void (*write_activations)(int64_t kind, enum nybble_words words, const float *x, int64_t columns, void *activations);
    /* matrix.h */
    void (*multiply)(const struct nybble_multiplication *multiplication);

    /* out [n] = silu(gate) * up; x [n] = sigmoid(x). */
    void (*silu_multiply)(const float *gate, const float *up, int64_t n, float *out);
    void (*sigmoid)(float *x, int64_t n);
};

/* Of all source files, as scripts/native_build.py computes it. */
NYBBLE_API const char *nybble_sources_digest(void);

/* Can this machine run the level, and was it compiled? */
NYBBLE_API bool nybble_has_level(int level);

/* The table of a level that this machine has. */
const struct nybble_kernels *nybble_level_kernels(enum nybble_level level);

/* Threads that work together: num_threads - 1 of its own, and the one that calls. */
typedef struct nybble_pool nybble_pool;

/* NULL if memory or threads cannot be had, or the machine lacks the level. num_threads >= 1. Thread i is bound to
   cores[i], but for the caller's, thread 0: it keeps off the others' cores when an operation begins. If cores is
   NULL, no thread is bound. */
NYBBLE_API nybble_pool *nybble_pool_create(int num_threads, int level, const int *cores);
NYBBLE_API void nybble_pool_destroy(nybble_pool *pool);

/* An operation begins and ends with these, so that it has the pool for itself. Between them it has scratch_bytes
   of memory, at a multiple of 64, which holds anything at first. If the status is not NYBBLE_OK, the operation
   returns it and does not call nybble_end. */
int nybble_begin(nybble_pool *pool, size_t scratch_bytes, void **scratch);
void nybble_end(nybble_pool *pool);

/* One part of a parallel region. thread: 0 to num_threads - 1, for memory of its own. Must not call
   nybble_parallel. */
typedef void nybble_task(const void *argument, int part, int thread);

/* Run parts 0 .. num_parts - 1, each once, and return when all are done; what they wrote is then seen by all.
   Within nybble_begin and nybble_end. */
void nybble_parallel(nybble_pool *pool, nybble_task *task, const void *argument, int num_parts);

/* A whole operation of one region that needs no memory: nybble_begin, nybble_parallel, nybble_end. */
int nybble_run(nybble_pool *pool, nybble_task *task, const void *argument, int num_parts);

int nybble_num_threads(const nybble_pool *pool);
const struct nybble_kernels *nybble_pool_kernels(const nybble_pool *pool);

/* The first of the items 0 .. num_items - 1 that belong to a part, of num_parts parts as equal as can be.
   Part p has those from nybble_part_start(n, p, parts) to nybble_part_start(n, p + 1, parts). */
static inline int64_t nybble_part_start(int64_t num_items, int64_t part, int64_t num_parts)
{
    return num_items / num_parts * part + (part < num_items % num_parts ? part : num_items % num_parts);
}

/* rms_norm.c: the add_rms_norm of each row. hidden, update, sum, normed: [tokens, columns]; weight: [columns]. */
struct nybble_add_rms_norm {
    const float *hidden;
    const float *update;
    const float *weight;
    float *sum;
    float *normed;
    int64_t tokens;
    int64_t columns;
    float eps;
};
NYBBLE_API int nybble_add_rms_norm(nybble_pool *pool, const struct nybble_add_rms_norm *arguments);

/* rows.c: out [num_ids, columns] = the rows ids - first_id of table [num_rows, columns], zeros for those it has not. */
struct nybble_rows {
    const float *table;
    const int64_t *ids;
    float *out;
    int64_t num_ids;
    int64_t first_id;
    int64_t num_rows;
    int64_t columns;
};
NYBBLE_API int nybble_rows(nybble_pool *pool, const struct nybble_rows *arguments);

/* add.c: sum [count] += update. */
struct nybble_add {
    float *sum;
    const float *update;
    int64_t count;
};
NYBBLE_API int nybble_add(nybble_pool *pool, const struct nybble_add *arguments);

/* replay.c: operations with their arguments, up to the first whose status is not NYBBLE_OK. An operation's second
   argument points to a structure of its own, which is passed as any pointer is. */
struct nybble_call {
    int (*operation)(nybble_pool *pool, const void *arguments);
    const void *arguments;
};
struct nybble_replay {
    const struct nybble_call *calls;
    int64_t num_calls;
};
NYBBLE_API int nybble_replay(nybble_pool *pool, const struct nybble_replay *arguments);

#endif
