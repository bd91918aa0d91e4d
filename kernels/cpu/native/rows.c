/* The operation rows: rows of a table, wherever they stand in it. */

#include "nybble_cpu.h"

#include <string.h>

enum { ROWS_IN_A_PART = 16 };

struct work {
    const struct nybble_rows *arguments;
    int num_parts;
};

static void copy_rows(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_rows *a = work->arguments;
    const size_t bytes = (size_t)a->columns * sizeof *a->out;
    const int64_t end = nybble_part_start(a->num_ids, part + 1, work->num_parts);
    (void)thread;
    for (int64_t i = nybble_part_start(a->num_ids, part, work->num_parts); i < end; i++) {
        const int64_t row = a->ids[i] - a->first_id;
        if (row >= 0 && row < a->num_rows)
            memcpy(a->out + i * a->columns, a->table + row * a->columns, bytes);
        else
            memset(a->out + i * a->columns, 0, bytes);
    }
}

int nybble_rows(nybble_pool *pool, const struct nybble_rows *arguments)
{
    const struct work work = {arguments, (int)((arguments->num_ids + ROWS_IN_A_PART - 1) / ROWS_IN_A_PART)};
    return nybble_run(pool, copy_rows, &work, work.num_parts);
}
