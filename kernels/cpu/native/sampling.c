/* The operation sample: rows of logits are cut into stretches of columns, which are searched in parallel: for the
   largest logit, then, where there is a temperature, for what filters keep and for the largest of that after noise. */

#include "sampling.h"

#include "token_filter.h"

#include <math.h>

struct work {
    const struct nybble_sample *arguments;
    const struct nybble_kernels *kernels;
    int64_t stretches;
    struct nybble_pick *largest;         /* [rows, stretches] */
    struct nybble_pick *drawn;           /* [rows, stretches] */
    struct nybble_kept *kept;            /* [rows] */
    struct nybble_token_filter *filters; /* [filtered rows] */
    struct nybble_token_filter **active; /* [num_active]: those that search on */
    struct nybble_tallies *tallies;      /* [num_active, stretches] */
    int64_t num_active;
};

double nybble_drawn_value(const struct nybble_draw *draw, int64_t column)
{
    /* The upper 52 bits, at the middle of their interval. */
    const double uniform = ((double)(nybble_column_bits(draw->bits, column) >> 12) + 0.5) * 0x1p-52;
    return (double)nybble_scaled(draw, column) - log(-log(uniform));
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

static struct nybble_pick largest_of(const struct work *work, int64_t row)
{
    return best_of(work->largest + row * work->stretches, work->stretches);
}

/* Is a token drawn of the row? Not if its largest logit is infinite or NaN: that is picked. */
static bool is_drawn(const struct work *work, int64_t row)
{
    return work->arguments->temperatures[row] != 0.0f && isfinite(largest_of(work, row).value);
}

static bool is_filtered(const struct nybble_sample *a, int64_t row)
{
    return a->temperatures[row] != 0.0f && (a->top_ks[row] > 0 || a->top_ps[row] < 1.0f || a->min_ps[row] > 0.0f);
}

static int64_t end_of(const struct work *work, int64_t first)
{
    const int64_t end = first + NYBBLE_COLUMNS_IN_A_PART, num_columns = work->arguments->num_columns;
    return end < num_columns ? end : num_columns;
}

/* The columns of one stretch. */
static struct nybble_draw draw_of(const struct work *work, int64_t row, int64_t stretch)
{
    const struct nybble_sample *a = work->arguments;
    const int64_t first = stretch * NYBBLE_COLUMNS_IN_A_PART;
    return (struct nybble_draw){
        .logits = a->logits + row * a->row_stride,
        .first = first,
        .end = end_of(work, first),
        .largest = (float)largest_of(work, row).value,
        .temperature = a->temperatures[row],
        .bits = (uint64_t)a->bits[row],
        .kept = work->kept[row],
    };
}

static void find_largest(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_sample *a = work->arguments;
    const int64_t row = part / work->stretches, first = part % work->stretches * NYBBLE_COLUMNS_IN_A_PART;
    (void)thread;
    work->largest[part] = work->kernels->largest(a->logits + row * a->row_stride, first, end_of(work, first));
}

static void tally(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_token_filter *filter = work->active[part / work->stretches];
    const struct nybble_draw draw = draw_of(work, filter->row, part % work->stretches);
    (void)thread;
    work->kernels->tally_keys(&draw, &filter->range, work->tallies + part);
}

/* The tallies of a row's stretches, added to those of its first. */
static const struct nybble_tallies *add_stretches(const struct work *work, int64_t index)
{
    struct nybble_tallies *sums = work->tallies + index * work->stretches;
    for (int64_t stretch = 1; stretch < work->stretches; stretch++)
        nybble_add_tallies(sums, sums + stretch);
    return sums;
}

static void finish_filter(const struct work *work, struct nybble_token_filter *filter)
{
    if (filter->num_equal) {
        struct nybble_draw row = draw_of(work, filter->row, 0);
        row.end = work->arguments->num_columns;
        filter->kept.column = work->kernels->find_key(&row, filter->kept.key, filter->num_equal);
    }
    work->kept[filter->row] = filter->kept;
}

static void narrow(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    struct nybble_token_filter *filter = work->active[part];
    (void)thread;
    filter->is_done = nybble_narrow_filter(filter, add_stretches(work, part));
    if (filter->is_done)
        finish_filter(work, filter);
}

static void begin_filters(struct work *work)
{
    const struct nybble_sample *a = work->arguments;
    struct nybble_token_filter *filter = work->filters;
    for (int64_t row = 0; row < a->rows; row++) {
        work->kept[row] = (struct nybble_kept){INT32_MAX, INT64_MAX};
        if (!is_filtered(a, row) || !is_drawn(work, row))
            continue;
        filter->row = row;
        if (nybble_begin_filter(filter, a->top_ks[row], a->top_ps[row], a->min_ps[row]))
            work->kept[row] = filter->kept;
        else
            work->active[work->num_active++] = filter++;
    }
}

static void drop_finished(struct work *work)
{
    int64_t count = 0;
    for (int64_t i = 0; i < work->num_active; i++)
        if (!work->active[i]->is_done)
            work->active[count++] = work->active[i];
    work->num_active = count;
}

static void filter_rows(nybble_pool *pool, struct work *work)
{
    begin_filters(work);
    while (work->num_active) {
        nybble_parallel(pool, tally, work, (int)(work->num_active * work->stretches));
        nybble_parallel(pool, narrow, work, (int)work->num_active);
        drop_finished(work);
    }
}

static void draw_from(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const int64_t row = part / work->stretches;
    const struct nybble_pick largest = largest_of(work, row);
    (void)thread;
    if (!is_drawn(work, row)) {
        work->drawn[part] = largest;
        return;
    }
    const struct nybble_draw draw = draw_of(work, row, part % work->stretches);
    struct nybble_pick start = {-INFINITY, INT64_MAX};
    if (nybble_is_kept(&draw, largest.column))
        start = (struct nybble_pick){nybble_drawn_value(&draw, largest.column), largest.column};
    work->drawn[part] = work->kernels->draw_largest(&draw, start);
}

static bool has_drawn(const struct nybble_sample *a)
{
    for (int64_t row = 0; row < a->rows; row++)
        if (a->temperatures[row] != 0.0f)
            return true;
    return false;
}

static void search(nybble_pool *pool, struct work *work)
{
    const struct nybble_sample *a = work->arguments;
    const int num_parts = (int)(a->rows * work->stretches);
    nybble_parallel(pool, find_largest, work, num_parts);
    const struct nybble_pick *picks = work->largest;
    if (has_drawn(a)) {
        filter_rows(pool, work);
        nybble_parallel(pool, draw_from, work, num_parts);
        picks = work->drawn;
    }
    for (int64_t row = 0; row < a->rows; row++)
        a->picks[row] = best_of(picks + row * work->stretches, work->stretches).column;
}

static int64_t num_filtered(const struct nybble_sample *a)
{
    int64_t count = 0;
    for (int64_t row = 0; row < a->rows; row++)
        count += is_filtered(a, row);
    return count;
}

int nybble_sample(nybble_pool *pool, const struct nybble_sample *a)
{
    const int64_t stretches = (a->num_columns + NYBBLE_COLUMNS_IN_A_PART - 1) / NYBBLE_COLUMNS_IN_A_PART;
    const size_t parts = (size_t)(a->rows * stretches), rows = (size_t)a->rows, filtered = (size_t)num_filtered(a);
    void *scratch;
    const int status = nybble_begin(pool,
                                    2 * parts * sizeof(struct nybble_pick) + rows * sizeof(struct nybble_kept) +
                                        filtered * (sizeof(struct nybble_token_filter) + sizeof(void *)) +
                                        filtered * (size_t)stretches * sizeof(struct nybble_tallies),
                                    &scratch);
    if (status != NYBBLE_OK)
        return status;
    struct work work = {.arguments = a, .kernels = nybble_pool_kernels(pool), .stretches = stretches};
    work.largest = scratch;
    work.drawn = work.largest + parts;
    work.kept = (struct nybble_kept *)(work.drawn + parts);
    work.filters = (struct nybble_token_filter *)(work.kept + rows);
    work.active = (struct nybble_token_filter **)(work.filters + filtered);
    work.tallies = (struct nybble_tallies *)(work.active + filtered);
    search(pool, &work);
    nybble_end(pool);
    return NYBBLE_OK;
}
