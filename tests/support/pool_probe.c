/* An operation that says which part of a parallel region ran where. */

#define _GNU_SOURCE /* sched_getcpu */

#include "nybble_cpu.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

struct nybble_probe {
    atomic_int *counts;       /* [num_parts]: how often each part ran, over all regions */
    atomic_int *thread_parts; /* [num_threads]: how many parts each thread ran */
    int32_t *cores;           /* [num_threads]: where it ran its last part */
    int64_t scratch_bytes;
    int32_t num_parts;
    int32_t num_regions;
    int32_t busy_microseconds; /* that each part takes */
};

static int64_t microseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

static void count(const void *argument, int part, int thread)
{
    const struct nybble_probe *probe = argument;
    const int64_t end = microseconds() + probe->busy_microseconds;
    while (probe->busy_microseconds && microseconds() < end)
        ;
    atomic_fetch_add(&probe->counts[part], 1);
    atomic_fetch_add(&probe->thread_parts[thread], 1);
    probe->cores[thread] = sched_getcpu();
}

NYBBLE_API int nybble_probe(nybble_pool *pool, const struct nybble_probe *probe);

int nybble_probe(nybble_pool *pool, const struct nybble_probe *probe)
{
    void *scratch;
    const int status = nybble_begin(pool, (size_t)probe->scratch_bytes, &scratch);
    if (status != NYBBLE_OK)
        return status;
    if (probe->scratch_bytes)
        memset(scratch, 0xff, (size_t)probe->scratch_bytes);
    for (int region = 0; region < probe->num_regions; region++)
        nybble_parallel(pool, count, probe, probe->num_parts);
    nybble_end(pool);
    return NYBBLE_OK;
}
