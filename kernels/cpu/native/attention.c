/* The operation paged_attention: which queries and keys each part of it has.

   A part is a KV head and some of a sequence's queries, with all the keys that they see, span after span. Where a
   sequence has only few queries and a long context, its spans are parts of their own, whose results a second
   region merges, in the same order and by the same function. So numbers do not depend on the division. */

#include "attention.h"

#include <math.h>
#include <string.h>

enum { MOST_QUERIES = 32 }; /* of a part, unless a group of heads is larger */

static const float LOG2_E = 1.44269504f;

/* tokens first_token to end_token of a sequence at one KV head. span is -1 for all of its spans, else `partial`
   says which of the partial results is this one's. */
struct item {
    int sequence;
    int head;
    int64_t first_token;
    int64_t end_token;
    int64_t span;
    int64_t partial;
};

struct work {
    const struct nybble_paged_attention *arguments;
    const struct nybble_kernels *kernels;
    struct item *items;
    struct item *merges; /* the first span of each that is divided by spans */
    int num_items;
    int num_merges;
    int64_t num_partials;
    int64_t queries_in_a_part;
    int64_t width; /* of a row of outputs */
    char *partials;
    char *threads;
    size_t softmax_bytes;
    size_t thread_bytes;
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t divided_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t group_size(const struct work *work)
{
    return work->arguments->num_heads / work->arguments->cache->num_kv_heads;
}

static int64_t tokens_in_a_part(const struct work *work)
{
    return work->queries_in_a_part / group_size(work);
}

static int64_t num_spans(const struct work *work, int sequence)
{
    return divided_up(work->arguments->context_lengths[sequence], NYBBLE_KEYS_IN_A_SPAN);
}

/* Memory as the struct says, cut from `at` on. */
static struct nybble_softmax softmax_at(const struct work *work, char *at)
{
    float *outputs = (float *)at;
    float *maxima = outputs + work->queries_in_a_part * work->width;
    return (struct nybble_softmax){outputs, maxima, maxima + nybble_padded(work->queries_in_a_part)};
}

/* Parts of one sequence; only counted where there is no room for them yet. */
static void divide(struct work *work, int sequence)
{
    const struct nybble_paged_attention *a = work->arguments;
    const int64_t start = a->query_starts[sequence], end = a->query_starts[sequence + 1];
    const int64_t tokens = tokens_in_a_part(work), spans = num_spans(work, sequence);
    const bool by_spans = end - start <= tokens && spans > 1;
    for (int head = 0; head < a->cache->num_kv_heads; head++) {
        struct item item = {sequence, head, start, end, -1, 0};
        if (by_spans) {
            for (item.span = 0; item.span < spans; item.span++) {
                item.partial = work->num_partials++;
                if (work->items)
                    work->items[work->num_items] = item;
                if (work->items && item.span == 0)
                    work->merges[work->num_merges] = item;
                work->num_items++;
                work->num_merges += item.span == 0;
            }
            continue;
        }
        for (; item.first_token < end; item.first_token += tokens) {
            item.end_token = smaller(item.first_token + tokens, end);
            if (work->items)
                work->items[work->num_items] = item;
            work->num_items++;
        }
    }
}

static void divide_all(struct work *work)
{
    work->num_items = work->num_merges = 0;
    work->num_partials = 0;
    for (int sequence = 0; sequence < work->arguments->num_sequences; sequence++)
        divide(work, sequence);
}

/* A thread's memory: queries, limits, scores, a tile as float32, and two results. */
struct memory {
    float *queries;
    int64_t *limits;
    float *scores;
    float *widened;
    struct nybble_softmax total;
    struct nybble_softmax next;
};

static size_t query_bytes(const struct work *work)
{
    return (size_t)(work->queries_in_a_part * work->width) * sizeof(float);
}

static size_t limit_bytes(const struct work *work)
{
    return (size_t)nybble_padded(work->queries_in_a_part) * sizeof(int64_t);
}

static size_t score_bytes(const struct work *work)
{
    return (size_t)(work->queries_in_a_part * (NYBBLE_KEYS_IN_A_TILE + NYBBLE_MOST_LANES)) * sizeof(float);
}

static size_t widened_bytes(const struct work *work)
{
    return (size_t)nybble_padded(nybble_widened_size(work->arguments->cache->head_dim)) * sizeof(float);
}

static struct memory memory_of(const struct work *work, int thread)
{
    char *at = work->threads + (size_t)thread * work->thread_bytes;
    struct memory memory = {.queries = (float *)at};
    memory.limits = (int64_t *)(at += query_bytes(work));
    memory.scores = (float *)(at += limit_bytes(work));
    memory.widened = (float *)(at += score_bytes(work));
    memory.total = softmax_at(work, at += widened_bytes(work));
    memory.next = softmax_at(work, at + work->softmax_bytes);
    return memory;
}

/* The last key that an item's queries see, plus 1. */
static int64_t item_end(const struct work *work, const struct item *item)
{
    const struct nybble_paged_attention *a = work->arguments;
    return a->context_lengths[item->sequence] - (a->query_starts[item->sequence + 1] - item->end_token);
}

static void take_queries(const struct work *work, const struct item *item, struct memory *memory)
{
    const struct nybble_paged_attention *a = work->arguments;
    const int64_t head_dim = a->cache->head_dim, group = group_size(work), values = group * head_dim;
    const float scale = LOG2_E * a->cache->key_scale / sqrtf((float)head_dim);
    const int64_t last = item_end(work, item);
    for (int64_t token = item->first_token; token < item->end_token; token++) {
        const int64_t row = (token - item->first_token) * group;
        const float *from = a->query + (token * a->num_heads + item->head * group) * head_dim;
        for (int64_t i = 0; i < values; i++)
            memory->queries[row * head_dim + i] = from[i] * scale;
        for (int64_t i = 0; i < group; i++)
            memory->limits[row + i] = last - (item->end_token - 1 - token);
    }
}

static void give_outputs(const struct work *work, const struct item *item, const struct nybble_softmax *result)
{
    const struct nybble_paged_attention *a = work->arguments;
    const int64_t head_dim = a->cache->head_dim, group = group_size(work);
    for (int64_t token = item->first_token; token < item->end_token; token++)
        for (int64_t i = 0; i < group; i++) {
            const int64_t row = (token - item->first_token) * group + i;
            float *to = a->attended + (token * a->num_heads + item->head * group + i) * head_dim;
            const float factor = a->cache->value_scale / result->sums[row];
            for (int64_t d = 0; d < head_dim; d++)
                to[d] = result->outputs[row * work->width + d] * factor;
        }
}

static void attend_to_span(const struct work *work, const struct item *item, const struct memory *memory,
                           int64_t index, const struct nybble_softmax *result)
{
    const struct nybble_paged_attention *a = work->arguments;
    const int64_t first = index * NYBBLE_KEYS_IN_A_SPAN;
    work->kernels->attend(&(struct nybble_attention_span){
        .cache = a->cache,
        .block_table = a->block_tables + (int64_t)item->sequence * a->max_blocks,
        .head = item->head,
        .num_queries = (int)((item->end_token - item->first_token) * group_size(work)),
        .queries = memory->queries,
        .limits = memory->limits,
        .first = first,
        .end = smaller(first + NYBBLE_KEYS_IN_A_SPAN, item_end(work, item)),
        .scores = memory->scores,
        .widened = memory->widened,
        .result = *result,
    });
}

static void merge(const struct work *work, const struct item *item, const struct nybble_softmax *total,
                  const struct nybble_softmax *next)
{
    const int64_t num_queries = (item->end_token - item->first_token) * group_size(work);
    work->kernels->merge_softmax(total, next, (int)num_queries, work->width);
}

static struct nybble_softmax partial_of(const struct work *work, int64_t partial)
{
    return softmax_at(work, work->partials + (size_t)partial * work->softmax_bytes);
}

static void run_item(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct item *item = &work->items[part];
    struct memory memory = memory_of(work, thread);
    take_queries(work, item, &memory);
    if (item->span >= 0) {
        const struct nybble_softmax result = partial_of(work, item->partial);
        attend_to_span(work, item, &memory, item->span, &result);
        return;
    }
    const int64_t spans = divided_up(item_end(work, item), NYBBLE_KEYS_IN_A_SPAN);
    attend_to_span(work, item, &memory, 0, &memory.total);
    for (int64_t index = 1; index < spans; index++) {
        attend_to_span(work, item, &memory, index, &memory.next);
        merge(work, item, &memory.total, &memory.next);
    }
    give_outputs(work, item, &memory.total);
}

static void merge_item(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct item *item = &work->merges[part];
    const struct nybble_softmax total = partial_of(work, item->partial);
    (void)thread;
    for (int64_t index = 1; index < num_spans(work, item->sequence); index++) {
        const struct nybble_softmax next = partial_of(work, item->partial + index);
        merge(work, item, &total, &next);
    }
    give_outputs(work, item, &total);
}

static size_t cut(size_t *bytes, size_t count)
{
    const size_t start = *bytes;
    *bytes = (start + count + 63) / 64 * 64;
    return start;
}

int nybble_paged_attention(nybble_pool *pool, const struct nybble_paged_attention *arguments)
{
    struct work work = {.arguments = arguments, .kernels = nybble_pool_kernels(pool)};
    const int64_t group = group_size(&work);
    work.queries_in_a_part = group * (group < MOST_QUERIES ? MOST_QUERIES / group : 1);
    work.width = nybble_padded(arguments->cache->head_dim);
    work.softmax_bytes =
        (size_t)(work.queries_in_a_part * work.width + 2 * nybble_padded(work.queries_in_a_part)) * sizeof(float);
    work.thread_bytes = query_bytes(&work) + limit_bytes(&work) + score_bytes(&work) + widened_bytes(&work) +
                        2 * work.softmax_bytes;
    divide_all(&work);

    size_t bytes = 0;
    const size_t items = cut(&bytes, (size_t)work.num_items * sizeof *work.items);
    const size_t merges = cut(&bytes, (size_t)work.num_merges * sizeof *work.merges);
    const size_t partials = cut(&bytes, (size_t)work.num_partials * work.softmax_bytes);
    const size_t threads = cut(&bytes, (size_t)nybble_num_threads(pool) * work.thread_bytes);
    void *scratch;
    const int status = nybble_begin(pool, bytes, &scratch);
    if (status != NYBBLE_OK)
        return status;
    work.items = (struct item *)((char *)scratch + items);
    work.merges = (struct item *)((char *)scratch + merges);
    work.partials = (char *)scratch + partials;
    work.threads = (char *)scratch + threads;
    divide_all(&work);
    nybble_parallel(pool, run_item, &work, work.num_items);
    if (work.num_merges)
        nybble_parallel(pool, merge_item, &work, work.num_merges);
    nybble_end(pool);
    return NYBBLE_OK;
}
