/* The operation sample: rows of logits are cut into stretches of columns, which are searched in parallel: for the
   largest logit, and then, where there is a temperature, for the largest after noise. */

#include "sampling.h"

#include <math.h>

enum { COLUMNS_IN_A_PART = 16384 };

struct work {
    const struct nybble_sample *arguments;
    const struct nybble_kernels *kernels;
    struct nybble_pick *largest; /* [rows, stretches] */
    struct nybble_pick *drawn;   /* [rows, stretches] */
    int64_t stretches;
};

double nybble_drawn_value(const struct nybble_draw *draw, int64_t column)
{
    const float scaled = (draw->logits[column] - draw->largest) / draw->temperature;
    /* The upper 52 bits, at the middle of their interval. */
    const double uniform = ((double)(nybble_column_bits(draw->bits, column) >> 12) + 0.5) * 0x1p-52;
    return (double)scaled - log(-log(uniform));
}

/* Of equal values the first; NaN is largest. */
static struct nybble_pick best_of(const struct nybble_pick *picks, int64_t count)
{
    struct nybble_pick best = picks[0];
    for (int64_t i = 1; i < count && !isnan(best.value); i++)
        if (picks[i].value > best.value || isnan(picks[i].value) ||
            (picks[i].value == best.value && picks[i].column < best.column))
            best = picks[i];
    return best;
}

static int64_t end_of(const struct work *work, int64_t first)
{
    const int64_t end = first + COLUMNS_IN_A_PART, num_columns = work->arguments->num_columns;
    return end < num_columns ? end : num_columns;
}

static void find_largest(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_sample *a = work->arguments;
    const int64_t row = part / work->stretches, first = part % work->stretches * COLUMNS_IN_A_PART;
    (void)thread;
    work->largest[part] = work->kernels->largest(a->logits + row * a->row_stride, first, end_of(work, first));
}

static void draw_from(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_sample *a = work->arguments;
    const int64_t row = part / work->stretches, first = part % work->stretches * COLUMNS_IN_A_PART;
    const struct nybble_pick largest = best_of(work->largest + row * work->stretches, work->stretches);
    (void)thread;
    if (a->temperatures[row] == 0.0f || !isfinite(largest.value)) {
        work->drawn[part] = largest;
        return;
    }
    const struct nybble_draw draw = {
        .logits = a->logits + row * a->row_stride,
        .first = first,
        .end = end_of(work, first),
        .largest = (float)largest.value,
        .temperature = a->temperatures[row],
        .bits = (uint64_t)a->bits[row],
    };
    const struct nybble_pick start = {nybble_drawn_value(&draw, largest.column), largest.column};
    work->drawn[part] = work->kernels->draw_largest(&draw, start);
}

static void search(nybble_pool *pool, const struct work *work)
{
    const struct nybble_sample *a = work->arguments;
    const int num_parts = (int)(a->rows * work->stretches);
    bool is_drawn = false;
    for (int64_t row = 0; row < a->rows; row++)
        is_drawn |= a->temperatures[row] != 0.0f;
    nybble_parallel(pool, find_largest, work, num_parts);
    if (is_drawn)
        nybble_parallel(pool, draw_from, work, num_parts);
    for (int64_t row = 0; row < a->rows; row++)
        a->picks[row] = best_of((is_drawn ? work->drawn : work->largest) + row * work->stretches, work->stretches).column;
}

int nybble_sample(nybble_pool *pool, const struct nybble_sample *arguments)
{
    const int64_t stretches = (arguments->num_columns + COLUMNS_IN_A_PART - 1) / COLUMNS_IN_A_PART;
    const int64_t count = arguments->rows * stretches;
    void *scratch;
    const int status = nybble_begin(pool, 2 * (size_t)count * sizeof(struct nybble_pick), &scratch);
    if (status != NYBBLE_OK)
        return status;
    struct nybble_pick *picks = scratch;
    search(pool, &(struct work){arguments, nybble_pool_kernels(pool), picks, picks + count, stretches});
    nybble_end(pool);
    return NYBBLE_OK;
}
