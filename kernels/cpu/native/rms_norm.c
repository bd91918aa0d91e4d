/* The operation add_rms_norm: rows are divided among the threads. */

#include "nybble_cpu.h"

enum { ROWS_IN_A_PART = 4 };

struct work {
    const struct nybble_add_rms_norm *arguments;
    const struct nybble_kernels *kernels;
    int num_parts;
};

static void norm_rows(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_add_rms_norm *a = work->arguments;
    const int64_t end = nybble_part_start(a->tokens, part + 1, work->num_parts);
    (void)thread;
    for (int64_t row = nybble_part_start(a->tokens, part, work->num_parts); row < end; row++) {
        const int64_t at = row * a->columns;
        work->kernels->add_rms_norm(a->hidden + at, a->update ? a->update + at : NULL, a->weight, a->eps, a->columns,
                                    a->sum ? a->sum + at : NULL, a->normed + at);
    }
}

int nybble_add_rms_norm(nybble_pool *pool, const struct nybble_add_rms_norm *arguments)
{
    const int64_t num_parts = (arguments->tokens + ROWS_IN_A_PART - 1) / ROWS_IN_A_PART;
    const struct work work = {arguments, nybble_pool_kernels(pool), (int)num_parts};
    return nybble_run(pool, norm_rows, &work, work.num_parts);
}
