/* Scaled logits and keys of as many columns as a vector has lanes, for the level that is being compiled. */

#ifndef NYBBLE_DRAW_LANES_H
#define NYBBLE_DRAW_LANES_H

#include "lanes.h"
#include "sampling.h"

/* nybble_scaled of neighbours; logits: of the first. */
INLINE lanes scaled_lanes(const struct nybble_draw *draw, const float *logits)
{
    return (load_lanes(logits) - draw->largest) / draw->temperature;
}

/* nybble_key of each. */
INLINE int_lanes keys_of(lanes scaled) { return (int_lanes)(to_bits(scaled) & 0x7FFFFFFFu); }

#endif
