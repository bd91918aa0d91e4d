/* Threads that run the parts of parallel regions.

   Each thread has a share of the parts: neighbours, so that what it reads is one stretch of memory, and what it
   fetches ahead is its own. It claims them from the front; who has none left claims from the back of the others'
   shares. A claim is the exchange of a share for a smaller one, and only then is read what the region is about.
   That cannot change before the part is finished, since nybble_parallel waits for `unfinished` to become zero. So a
   thread that comes late, or was interrupted between two regions, needs no care: it claims a part of the region
   that is open now, or none.

   A thread without work spins for SPIN_NANOSECONDS, which outlasts the gap between two operations of a step, and
   then sleeps until it is woken by the next region, whose number is news to it. */

#define _GNU_SOURCE /* CPU_SET, sched_getcpu */

#include "nybble_cpu.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NANOSECONDS = 100000, SPINS_BETWEEN_CLOCK_READINGS = 64, CACHE_LINE = 64 };

struct worker {
    nybble_pool *pool;
    pthread_t thread;
    int index; /* of the thread: 1 to num_threads - 1, since 0 is the caller's */
    int core;  /* that it is bound to, or -1 */
};

/* Parts from `first` in the low half to before `end` in the high half, on a line of its own. */
struct share {
    _Alignas(CACHE_LINE) _Atomic uint64_t parts;
};

struct nybble_pool {
    _Alignas(CACHE_LINE) atomic_uint num_regions; /* so far: what threads without work look at */
    _Alignas(CACHE_LINE) atomic_int unfinished;   /* parts */

    /* The region. */
    _Alignas(CACHE_LINE) nybble_task *task;
    const void *argument;

    pthread_mutex_t operation; /* held from nybble_begin to nybble_end */
    pthread_mutex_t sleep;
    pthread_cond_t woken;
    atomic_int num_asleep;
    atomic_bool is_stopping;

    const struct nybble_kernels *kernels;
    void *scratch;
    size_t scratch_bytes;
    pid_t process; /* that has the threads: after a fork the child has none of them */
    int num_threads;
    int num_started; /* of workers */
    struct worker *workers;
    struct share *shares; /* of each thread */
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* ---- Parts ---- */

static uint64_t share_of(uint32_t first, uint32_t end) { return (uint64_t)end << 32 | first; }

/* The first part of a share, or its last one; -1 if it has none. */
static int claim(struct share *share, bool is_own)
{
    uint64_t parts = atomic_load_explicit(&share->parts, memory_order_relaxed);
    for (;;) {
        const uint32_t first = (uint32_t)parts, end = (uint32_t)(parts >> 32);
        if (first >= end)
            return -1;
        const uint64_t rest = is_own ? share_of(first + 1, end) : share_of(first, end - 1);
        if (atomic_compare_exchange_weak_explicit(&share->parts, &parts, rest, memory_order_acquire,
                                                  memory_order_relaxed))
            return (int)(is_own ? first : end - 1);
    }
}

/* Returns how many parts there were. */
static int run_share(nybble_pool *pool, int of, int thread)
{
    int count = 0;
    for (int part = claim(&pool->shares[of], of == thread); part >= 0; count++) {
        pool->task(pool->argument, part, thread);
        part = claim(&pool->shares[of], of == thread);
    }
    return count;
}

static void run_parts(nybble_pool *pool, int thread)
{
    int count = run_share(pool, thread, thread);
    for (int i = 1; i < pool->num_threads; i++)
        count += run_share(pool, (thread + i) % pool->num_threads, thread);
    if (count)
        atomic_fetch_sub_explicit(&pool->unfinished, count, memory_order_release);
}

/* ---- Threads of the pool ---- */

/* seen: regions that the thread knows of. */
static bool has_news(nybble_pool *pool, unsigned seen)
{
    return atomic_load(&pool->num_regions) != seen || atomic_load(&pool->is_stopping);
}

/* Did news come while spinning? */
static bool spin(nybble_pool *pool, unsigned seen)
{
    const int64_t end = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < SPINS_BETWEEN_CLOCK_READINGS; i++) {
            if (has_news(pool, seen))
                return true;
            relax();
        }
    } while (nanoseconds() < end);
    return false;
}

/* Either the sleeper sees the region, or who opens it sees the sleeper: both write first and then read, in the one
   order that sequentially consistent operations have. */
static void sleep_until_news(nybble_pool *pool, unsigned seen)
{
    pthread_mutex_lock(&pool->sleep);
    atomic_fetch_add(&pool->num_asleep, 1);
    while (!has_news(pool, seen))
        pthread_cond_wait(&pool->woken, &pool->sleep);
    atomic_fetch_sub(&pool->num_asleep, 1);
    pthread_mutex_unlock(&pool->sleep);
}

static void wake_sleepers(nybble_pool *pool)
{
    if (atomic_load(&pool->num_asleep) == 0)
        return;
    pthread_mutex_lock(&pool->sleep);
    pthread_cond_broadcast(&pool->woken);
    pthread_mutex_unlock(&pool->sleep);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    nybble_pool *pool = worker->pool;
    while (!atomic_load(&pool->is_stopping)) {
        const unsigned seen = atomic_load(&pool->num_regions);
        run_parts(pool, worker->index);
        if (!spin(pool, seen))
            sleep_until_news(pool, seen);
    }
    return NULL;
}

/* ---- Cores ---- */

#if defined(__linux__)

static void bind_to(pthread_t thread, int core)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pthread_setaffinity_np(thread, sizeof one, &one); /* if refused, it runs where it may */
}

/* The caller's thread is nobody's to bind. If it has come to a core of one of ours, they would take turns until the
   kernel moves it, after milliseconds; so it is moved to another core and left free again. */
static void step_aside(nybble_pool *pool)
{
    const int core = sched_getcpu();
    cpu_set_t allowed, others;
    for (int i = 0; i < pool->num_started; i++) {
        if (pool->workers[i].core != core)
            continue;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
            return;
        others = allowed;
        for (int j = 0; j < pool->num_started; j++)
            CPU_CLR(pool->workers[j].core, &others);
        if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
            sched_setaffinity(0, sizeof allowed, &allowed);
        return;
    }
}

#else

static void bind_to(pthread_t thread, int core) { (void)thread, (void)core; }

static void step_aside(nybble_pool *pool) { (void)pool; }

#endif

/* ---- The pool ---- */

/* With all signals blocked, so that they are handled where they are expected. */
static bool start_worker(nybble_pool *pool, int core)
{
    struct worker *worker = &pool->workers[pool->num_started];
    sigset_t all, before;
    *worker = (struct worker){.pool = pool, .index = pool->num_started + 1, .core = core};
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool is_started = pthread_create(&worker->thread, NULL, work, worker) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!is_started)
        return false;
    if (core >= 0)
        bind_to(worker->thread, core);
    pool->num_started++;
    return true;
}

static bool start_workers(nybble_pool *pool, const int *cores)
{
    for (int i = 1; i < pool->num_threads; i++)
        if (!start_worker(pool, cores ? cores[i] : -1))
            return false;
    return true;
}

static void stop_workers(nybble_pool *pool)
{
    atomic_store(&pool->is_stopping, true);
    wake_sleepers(pool);
    for (int i = 0; i < pool->num_started; i++)
        pthread_join(pool->workers[i].thread, NULL);
}

static void release(nybble_pool *pool)
{
    pthread_cond_destroy(&pool->woken);
    pthread_mutex_destroy(&pool->sleep);
    pthread_mutex_destroy(&pool->operation);
    free(pool->scratch);
    free(pool->workers);
    free(pool->shares);
    free(pool);
}

nybble_pool *nybble_pool_create(int num_threads, int level, const int *cores)
{
    if (num_threads < 1 || !nybble_has_level(level))
        return NULL;
    nybble_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool);
    struct worker *workers = calloc((size_t)num_threads, sizeof *workers);
    struct share *shares = aligned_alloc(CACHE_LINE, (size_t)num_threads * sizeof *shares);
    if (!pool || !workers || !shares) {
        free(pool);
        free(workers);
        free(shares);
        return NULL;
    }
    *pool = (nybble_pool){
        .kernels = nybble_level_kernels((enum nybble_level)level),
        .process = getpid(),
        .num_threads = num_threads,
        .workers = workers,
        .shares = shares,
    };
    for (int i = 0; i < num_threads; i++)
        atomic_init(&shares[i].parts, 0);
    pthread_mutex_init(&pool->operation, NULL);
    pthread_mutex_init(&pool->sleep, NULL);
    pthread_cond_init(&pool->woken, NULL);
    if (!start_workers(pool, cores)) {
        nybble_pool_destroy(pool);
        return NULL;
    }
    return pool;
}

void nybble_pool_destroy(nybble_pool *pool)
{
    if (pool->process != getpid())
        return; /* threads that are not here cannot be joined: its memory stays until the process ends */
    stop_workers(pool);
    release(pool);
}

int nybble_num_threads(const nybble_pool *pool) { return pool->num_threads; }

const struct nybble_kernels *nybble_pool_kernels(const nybble_pool *pool) { return pool->kernels; }

/* ---- Operations ---- */

static int reserve(nybble_pool *pool, size_t bytes)
{
    if (bytes <= pool->scratch_bytes)
        return NYBBLE_OK;
    if (bytes > SIZE_MAX - CACHE_LINE)
        return NYBBLE_NO_MEMORY;
    const size_t rounded = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    free(pool->scratch);
    pool->scratch = aligned_alloc(CACHE_LINE, rounded);
    pool->scratch_bytes = pool->scratch ? rounded : 0;
    return pool->scratch ? NYBBLE_OK : NYBBLE_NO_MEMORY;
}

int nybble_begin(nybble_pool *pool, size_t scratch_bytes, void **scratch)
{
    if (pool->process != getpid())
        return NYBBLE_OTHER_PROCESS;
    pthread_mutex_lock(&pool->operation);
    const int status = reserve(pool, scratch_bytes);
    if (status != NYBBLE_OK) {
        pthread_mutex_unlock(&pool->operation);
        return status;
    }
    step_aside(pool);
    *scratch = pool->scratch;
    return NYBBLE_OK;
}

void nybble_end(nybble_pool *pool) { pthread_mutex_unlock(&pool->operation); }

/* The last parts may be with threads that the kernel has interrupted: then give them this core. */
static void wait_for_parts(nybble_pool *pool)
{
    const int64_t end = nanoseconds() + SPIN_NANOSECONDS;
    while (atomic_load_explicit(&pool->unfinished, memory_order_acquire) > 0) {
        for (int i = 0; i < SPINS_BETWEEN_CLOCK_READINGS; i++) {
            if (atomic_load_explicit(&pool->unfinished, memory_order_acquire) == 0)
                return;
            relax();
        }
        if (nanoseconds() > end)
            sched_yield();
    }
}

void nybble_parallel(nybble_pool *pool, nybble_task *task, const void *argument, int num_parts)
{
    if (num_parts == 1 || pool->num_threads == 1) {
        for (int part = 0; part < num_parts; part++)
            task(argument, part, 0);
        return;
    }
    if (num_parts < 1)
        return;
    pool->task = task;
    pool->argument = argument;
    atomic_store_explicit(&pool->unfinished, num_parts, memory_order_relaxed);
    for (int i = 0; i < pool->num_threads; i++) {
        const int64_t first = nybble_part_start(num_parts, i, pool->num_threads);
        const int64_t end = nybble_part_start(num_parts, i + 1, pool->num_threads);
        atomic_store_explicit(&pool->shares[i].parts, share_of((uint32_t)first, (uint32_t)end), memory_order_release);
    }
    atomic_fetch_add(&pool->num_regions, 1);
    wake_sleepers(pool);
    run_parts(pool, 0);
    wait_for_parts(pool);
}

int nybble_run(nybble_pool *pool, nybble_task *task, const void *argument, int num_parts)
{
    void *scratch;
    const int status = nybble_begin(pool, 0, &scratch);
    if (status != NYBBLE_OK)
        return status;
    nybble_parallel(pool, task, argument, num_parts);
    nybble_end(pool);
    return NYBBLE_OK;
}
