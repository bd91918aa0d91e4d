/* Which levels this machine can run. Asked of the processor itself: __builtin_cpu_supports answers 0 in libraries
   that some compilers build. */

#include "nybble_cpu.h"

extern const struct nybble_kernels nybble_kernels_portable;

#if defined(__x86_64__)

#include <cpuid.h>

extern const struct nybble_kernels nybble_kernels_avx2;
extern const struct nybble_kernels nybble_kernels_avx512vnni;

static const struct nybble_kernels *const tables[NYBBLE_NUM_LEVELS] = {
    [NYBBLE_PORTABLE] = &nybble_kernels_portable,
    [NYBBLE_AVX2] = &nybble_kernels_avx2,
    [NYBBLE_AVX512VNNI] = &nybble_kernels_avx512vnni,
};

struct registers {
    unsigned a, b, c, d;
};

static bool has_bits(unsigned word, unsigned bits) { return (word & bits) == bits; }

/* The register sets that the operating system saves: without it, instructions fault or lose their results. */
static uint64_t saved_register_sets(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool has_machine_level(enum nybble_level level)
{
    enum { OSXSAVE = 1u << 27, AVX = 1u << 28, FMA = 1u << 12, F16C = 1u << 29 };           /* leaf 1, ecx */
    enum { AVX2 = 1u << 5, AVX512F = 1u << 16, AVX512DQ = 1u << 17, AVX512BW = 1u << 30 };   /* leaf 7, ebx */
    const unsigned AVX512VL = 1u << 31, AVX512VNNI = 1u << 11;                               /* ebx, ecx */
    const uint64_t ymm = 0x6, zmm = 0xe6;                                                    /* XCR0 */
    struct registers one, seven;

    if (level == NYBBLE_PORTABLE)
        return true;
    if (!__get_cpuid(1, &one.a, &one.b, &one.c, &one.d) || !has_bits(one.c, OSXSAVE | AVX | FMA | F16C))
        return false;
    if (!__get_cpuid_count(7, 0, &seven.a, &seven.b, &seven.c, &seven.d) || !has_bits(seven.b, AVX2))
        return false;
    const uint64_t saved = saved_register_sets();
    if (level == NYBBLE_AVX2)
        return (saved & ymm) == ymm;
    return (saved & zmm) == zmm && has_bits(seven.b, AVX512F | AVX512DQ | AVX512BW | AVX512VL) &&
           has_bits(seven.c, AVX512VNNI);
}

#else

static const struct nybble_kernels *const tables[NYBBLE_NUM_LEVELS] = {
    [NYBBLE_PORTABLE] = &nybble_kernels_portable,
};

static bool has_machine_level(enum nybble_level level) { return level == NYBBLE_PORTABLE; }

#endif

bool nybble_has_level(int level)
{
    return level >= 0 && level < NYBBLE_NUM_LEVELS && tables[level] && has_machine_level((enum nybble_level)level);
}

const struct nybble_kernels *nybble_level_kernels(enum nybble_level level) { return tables[level]; }
