/* The search of token_filter.h, but for the tallies, which levels make. */

#include "token_filter.h"

#include <math.h>

#define INFINITY_KEY nybble_key(INFINITY)

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

void nybble_add_tallies(struct nybble_tallies *sums, const struct nybble_tallies *more)
{
    for (int place = 0; place < NYBBLE_NUM_TALLIES; place++) {
        sums->places[place].count += more->places[place].count;
        sums->places[place].weight += more->places[place].weight;
    }
    sums->first_key = smaller(sums->first_key, more->first_key);
    sums->last_key = larger(sums->last_key, more->last_key);
}

/* min_p keeps what is, rounded to float32, at least that part of the likeliest token. */
static int32_t last_key_of(float min_p)
{
    if (!(min_p > 0.0f))
        return INFINITY_KEY;
    const double least = 0.5 * ((double)min_p + nextafterf(min_p, 0.0f));
    const double distance = fmax(0.0, -log(least));
    const float nearest = (float)distance;
    return nybble_key(nearest > distance ? nextafterf(nearest, 0.0f) : nearest);
}

static void begin_search(struct nybble_token_filter *filter, uint64_t goal)
{
    filter->goal = goal;
    filter->before = (struct nybble_tally){0};
    filter->range = (struct nybble_key_range){0, filter->last_key, 0, true, filter->top_p < 1.0};
}

bool nybble_begin_filter(struct nybble_token_filter *filter, int64_t top_k, float top_p, float min_p)
{
    filter->top_p = top_p < 1.0f ? top_p : 1.0;
    filter->last_key = last_key_of(min_p);
    filter->by_weight = false;
    filter->kept = (struct nybble_kept){filter->last_key, INT64_MAX};
    filter->num_equal = 0;
    begin_search(filter, top_k > 0 ? (uint64_t)top_k : UINT64_MAX);
    return top_k <= 0 && filter->top_p == 1.0;
}

/* Divide one place of a range, as far as there are keys, into places. */
static void enter(struct nybble_key_range *range, int place, const struct nybble_tallies *tallies)
{
    int32_t first, last;
    if (range->is_row) {
        first = nybble_key((float)place / 16.0f);
        last = place == NYBBLE_FAR ? INFINITY_KEY : nybble_key((float)(place + 1) / 16.0f) - 1;
    } else {
        first = range->first + (place << range->shift);
        last = first + ((1 << range->shift) - 1);
    }
    range->is_row = false;
    range->first = larger(first, tallies->first_key);
    range->last = smaller(last, tallies->last_key);
    range->shift = 0;
    while ((range->last - range->first) >> range->shift >= NYBBLE_PLACES)
        range->shift++;
}

/* How many tokens of a place stay, which is the range now; 0: that takes another look. */
static uint64_t num_kept(const struct nybble_token_filter *filter, const struct nybble_tally *tally)
{
    if (!filter->by_weight) {
        const uint64_t count = filter->goal - filter->before.count;
        return count == tally->count || filter->range.first == filter->range.last ? count : 0;
    }
    if (tally->count == 1)
        return 1;
    const uint64_t each = tally->weight / tally->count; /* alike, if there is one key */
    const uint64_t rest = filter->goal - filter->before.weight;
    return filter->range.first == filter->range.last ? (rest + each - 1) / each : 0;
}

/* The end of a search lies in a place; `before` becomes all that is kept, if that is known. */
static bool settle(struct nybble_token_filter *filter, int place, const struct nybble_tallies *tallies)
{
    const struct nybble_tally *tally = tallies->places + place;
    enter(&filter->range, place, tallies);
    const uint64_t count = num_kept(filter, tally);
    if (count == 0)
        return false;
    filter->kept.key = filter->range.last;
    filter->num_equal = count < tally->count ? count : 0;
    filter->before.count += count;
    filter->before.weight += count < tally->count ? tally->weight / tally->count * count : tally->weight;
    return true;
}

static bool go_on(struct nybble_token_filter *filter, const struct nybble_tallies *tallies)
{
    const int num_places = filter->range.is_row ? NYBBLE_FAR + 1 : NYBBLE_PLACES;
    for (int place = 0; place < num_places; place++) {
        const struct nybble_tally *tally = tallies->places + place;
        const uint64_t reached = filter->by_weight ? filter->before.weight + tally->weight
                                                   : filter->before.count + tally->count;
        if (reached >= filter->goal)
            return settle(filter, place, tallies);
        filter->before.count += tally->count;
        filter->before.weight += tally->weight;
    }
    return true; /* the row has not as many tokens as top_k */
}

bool nybble_narrow_filter(struct nybble_token_filter *filter, const struct nybble_tallies *tallies)
{
    if (filter->range.is_row)
        filter->of_row = *tallies;
    if (!go_on(filter, tallies))
        return false;
    if (filter->by_weight || filter->top_p == 1.0)
        return true;
    /* The likeliest token stays also for top_p 0. */
    const double goal = ceil(filter->top_p * (double)filter->before.weight);
    filter->by_weight = true;
    begin_search(filter, goal > 1.0 ? (uint64_t)goal : 1);
    return go_on(filter, &filter->of_row);
}
