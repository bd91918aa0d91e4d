/* Which tokens of a row min_p, top_k and top_p keep, found without a sort.

   A token's key is its scaled logit, (logit - largest) / temperature, as bits of a float without the sign. The
   largest of a row is 0 and all others are negative, so small keys are likely tokens; of equal keys the first
   column comes first. Kept is always a beginning in this order, and three questions give its end: min_p that of
   the keys at once; top_k the token that so many tokens reach; then top_p the one that so much weight reaches.

   The last two are answered by tallies: how many tokens there are, and what they weigh, in each of NYBBLE_PLACES
   intervals of keys. One of them reaches the goal; it is divided into as many again, until it has one token, or one
   key. The first intervals are 1/16 of a scaled logit wide, so few tokens are in the one that is divided.

   Weights are integers, in units of 2^-40 of the likeliest token's: sums are the same in any order, and so on any
   number of threads. Where the border of top_p is as close as some 1e-7 of a row's weight to a token's, the
   reference, which rounds otherwise, may keep one token more or less. */

#ifndef NYBBLE_TOKEN_FILTER_H
#define NYBBLE_TOKEN_FILTER_H

#include "sampling.h"

/* In the first tallies of a row one place more has the keys from 16.0 on. */
enum { NYBBLE_PLACES = 256, NYBBLE_FAR = NYBBLE_PLACES, NYBBLE_NUM_TALLIES, NYBBLE_NOWHERE = NYBBLE_NUM_TALLIES };

struct nybble_tally {
    uint64_t count;
    uint64_t weight;
};

/* Of the tokens with keys in a range. */
struct nybble_tallies {
    struct nybble_tally places[NYBBLE_NUM_TALLIES];
    int32_t first_key; /* the smallest and the largest that there are; INT32_MAX and -1 if none is */
    int32_t last_key;
};

/* Keys from first to last, and what place each of them has: (key - first) >> shift, or, if they are the first
   intervals of a row, the key's float times 16. */
struct nybble_key_range {
    int32_t first;
    int32_t last;
    int shift;
    bool is_row;
    bool has_weights; /* are they wanted? */
};

/* The search for the end of one row. */
struct nybble_token_filter {
    int64_t row;
    double top_p;
    int32_t last_key; /* that min_p keeps */
    bool by_weight;   /* top_k's end is known; now top_p's */
    uint64_t goal;    /* tokens, or weight: the last token kept is the one that reaches it */
    struct nybble_key_range range;
    struct nybble_tally before; /* of smaller keys than the range's */
    struct nybble_kept kept;
    uint64_t num_equal; /* how many tokens of kept.key stay; 0: all */
    bool is_done;
    struct nybble_tallies of_row;
};

/* Begin with what a row asks for. True if that tells what is kept, without tallies. */
bool nybble_begin_filter(struct nybble_token_filter *filter, int64_t top_k, float top_p, float min_p);

/* sums += more */
void nybble_add_tallies(struct nybble_tallies *sums, const struct nybble_tallies *more);

/* Go on by the tallies of filter->range. True if now it is known what is kept. */
bool nybble_narrow_filter(struct nybble_token_filter *filter, const struct nybble_tallies *tallies);

#endif
