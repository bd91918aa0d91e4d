/* The thread pool by itself, for the thread sanitizer: regions of all sizes, from two callers, with pauses in which
   threads fall asleep, in pools that come and go. Plain memory is handed from region to region, so that a missing
   barrier is a data race. */

#define _GNU_SOURCE /* usleep */

#include "nybble_cpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { MAX_PARTS = 50, NUM_ROUNDS = 400, NUM_CALLERS = 2 };

/* In place of the levels, which are not looked at here. */
bool nybble_has_level(int level) { return level == NYBBLE_PORTABLE; }
const struct nybble_kernels *nybble_level_kernels(enum nybble_level level)
{
    (void)level;
    return NULL;
}

struct exchange {
    int before[MAX_PARTS], after[MAX_PARTS];
    int num_parts;
};

static void write_own(const void *argument, int part, int thread)
{
    struct exchange *exchange = *(struct exchange *const *)argument;
    (void)thread;
    exchange->before[part] = part + 1;
}

static void read_others(const void *argument, int part, int thread)
{
    struct exchange *exchange = *(struct exchange *const *)argument;
    (void)thread;
    exchange->after[part] += exchange->before[exchange->num_parts - 1 - part];
}

static void run_round(nybble_pool *pool, int round)
{
    struct exchange exchange = {.num_parts = round % MAX_PARTS + 1};
    struct exchange *argument = &exchange;
    void *scratch;
    if (nybble_begin(pool, (size_t)round, &scratch) != NYBBLE_OK)
        abort();
    nybble_parallel(pool, write_own, &argument, exchange.num_parts);
    nybble_parallel(pool, read_others, &argument, exchange.num_parts);
    nybble_end(pool);
    for (int part = 0; part < exchange.num_parts; part++)
        if (exchange.after[part] != exchange.num_parts - part)
            abort();
    if (round % 20 == 0)
        usleep(300);
}

static void *call(void *pool)
{
    for (int round = 0; round < NUM_ROUNDS; round++)
        run_round(pool, round);
    return NULL;
}

int main(void)
{
    for (int num_threads = 1; num_threads <= 4; num_threads++) {
        nybble_pool *pool = nybble_pool_create(num_threads, NYBBLE_PORTABLE, NULL);
        pthread_t callers[NUM_CALLERS];
        for (int i = 0; i < NUM_CALLERS; i++)
            if (!pool || pthread_create(&callers[i], NULL, call, pool) != 0)
                abort();
        for (int i = 0; i < NUM_CALLERS; i++)
            pthread_join(callers[i], NULL);
        nybble_pool_destroy(pool);
    }
    puts("the pool has no data race");
    return 0;
}
