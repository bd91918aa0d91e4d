/* The operation add. */

#include "nybble_cpu.h"

enum { NUMBERS_IN_A_PART = 16384 };

struct work {
    const struct nybble_add *arguments;
    int num_parts;
};

static void add_numbers(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_add *a = work->arguments;
    const int64_t end = nybble_part_start(a->count, part + 1, work->num_parts);
    (void)thread;
    for (int64_t i = nybble_part_start(a->count, part, work->num_parts); i < end; i++)
        a->sum[i] += a->update[i];
}

int nybble_add(nybble_pool *pool, const struct nybble_add *arguments)
{
    const struct work work = {arguments, (int)((arguments->count + NUMBERS_IN_A_PART - 1) / NUMBERS_IN_A_PART)};
    return nybble_run(pool, add_numbers, &work, work.num_parts);
}
