/* Operations of a native library for another program, which sends their memory and gets it back: `emulated_calls
   LIBRARY` writes the digest of the library's sources, and then a reply to each request. emulated_native.py is the other
   side; all numbers are as they lie in memory. */

#include "nybble_cpu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 16, LINE = 64 };

/* Then: the sizes of the areas; their pointers; what they hold. The first is the operation's arguments. */
struct request {
    char operation[64];
    int64_t num_threads; /* of the pool; 0 for none */
    int64_t num_areas;
    int64_t num_pointers;
};

/* What an area has `at` bytes from its beginning is the address of what another has there. */
struct pointer {
    int64_t area, at, other_area, other_at;
};

/* The address modulo LINE is what it was at the other side. */
struct area {
    int64_t size, misalignment;
};

typedef int operation(nybble_pool *pool, const void *arguments);
typedef const char *sources_digest(void);
typedef nybble_pool *pool_create(int num_threads, int level, const int *cores);

static void *library;

static void fail(const char *reason)
{
    fprintf(stderr, "emulated_calls: %s\n", reason);
    exit(1);
}

static void *allocate(size_t size)
{
    void *const memory = aligned_alloc(LINE, (size / LINE + 1) * LINE);
    if (!memory)
        fail("no memory");
    return memory;
}

static void take(void *to, size_t size)
{
    if (fread(to, 1, size, stdin) != size)
        fail("a request ends early");
}

static void give(const void *from, size_t size)
{
    if (fwrite(from, 1, size, stdout) != size)
        fail("a reply cannot be written");
}

static void *function(const char *name)
{
    void *const address = dlsym(library, name);
    if (!address)
        fail(dlerror());
    return address;
}

static nybble_pool *pool_of(int64_t num_threads)
{
    static nybble_pool *pools[MAX_THREADS + 1];
    if (num_threads < 0 || num_threads > MAX_THREADS)
        fail("too many threads");
    if (num_threads && !pools[num_threads])
        pools[num_threads] = ((pool_create *)function("nybble_pool_create"))((int)num_threads, NYBBLE_PORTABLE, NULL);
    return pools[num_threads];
}

static void answer(const struct request *request)
{
    const size_t num_areas = (size_t)request->num_areas, num_pointers = (size_t)request->num_pointers;
    struct area *const areas = allocate(num_areas * sizeof *areas);
    struct pointer *const pointers = allocate(num_pointers * sizeof *pointers);
    char **const memory = allocate(num_areas * sizeof *memory), **const bases = allocate(num_areas * sizeof *bases);
    take(areas, num_areas * sizeof *areas);
    take(pointers, num_pointers * sizeof *pointers);
    for (size_t i = 0; i < num_areas; i++) {
        bases[i] = allocate((size_t)(areas[i].size + areas[i].misalignment));
        memory[i] = bases[i] + areas[i].misalignment;
        take(memory[i], (size_t)areas[i].size);
    }
    for (const struct pointer *p = pointers; p < pointers + num_pointers; p++) {
        const char *const address = memory[p->other_area] + p->other_at;
        memcpy(memory[p->area] + p->at, &address, sizeof address);
    }
    operation *const called = (operation *)function(request->operation);
    const int64_t status = called(pool_of(request->num_threads), memory[0]);
    give(&status, sizeof status);
    for (size_t i = 0; i < num_areas; i++) {
        give(memory[i], (size_t)areas[i].size);
        free(bases[i]);
    }
    free(bases);
    free(memory);
    free(pointers);
    free(areas);
}

int main(int count, char **words)
{
    struct request request;
    if (count != 2)
        fail("it takes the path of a library");
    library = dlopen(words[1], RTLD_NOW);
    if (!library)
        fail(dlerror());
    give(((sources_digest *)function("nybble_sources_digest"))(), 64);
    fflush(stdout);
    while (fread(&request, sizeof request, 1, stdin) == 1) {
        answer(&request);
        fflush(stdout);
    }
}
