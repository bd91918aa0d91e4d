/* Vectors of floats as wide as the level that is being compiled has them, by the compilers' vector extensions.
 *
 * GCC and Clang turn operations on these types into the instructions of any target, NEON included, so that what
 * has no instruction of its own to gain needs to be written only once.
 */
#ifndef NYBBLE_LANES_H
#define NYBBLE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bit_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));
typedef uint8_t byte_lanes __attribute__((vector_size(LANES)));

INLINE lanes splat(float x) { return x - (lanes){0}; }

INLINE bit_lanes to_bits(lanes x)
{
    bit_lanes bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE lanes from_bits(bit_lanes bits)
{
    lanes x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE lanes load_lanes(const float *from)
{
    lanes x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_lanes(float *to, lanes x) { memcpy(to, &x, sizeof x); }

/* a * b + c, rounded once where the level can. */
INLINE lanes multiply_add(lanes a, lanes b, lanes c)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* yes where every bit of `where` is set, no where none is. */
INLINE lanes choose(int_lanes where, lanes yes, lanes no)
{
    const bit_lanes mask = (bit_lanes)where;
    return from_bits((to_bits(yes) & mask) | (to_bits(no) & ~mask));
}

INLINE lanes larger(lanes a, lanes b) { return choose(a > b, a, b); }

/* Bit i: is lane i, of which every bit is set or none, set? */
INLINE uint32_t mask_of_lanes(int_lanes x)
{
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)x);
#elif defined(__x86_64__)
    return (uint32_t)_mm_movemask_ps((__m128)x);
#else
    uint32_t mask = 0;
    for (int lane = 0; lane < LANES; lane++) mask |= (uint32_t)(x[lane] & 1) << lane;
    return mask;
#endif
}

INLINE float sum_of_lanes(lanes x)
{
    float parts[LANES];
    store_lanes(parts, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0];
}

INLINE float largest_of_lanes(lanes x)
{
    float parts[LANES];
    store_lanes(parts, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane)
            parts[lane] = parts[lane] > parts[lane + half] ? parts[lane] : parts[lane + half];
    return parts[0];
}

/* 2^x to two units in the last place; 0 below -126, NaN of NaN. For x up to 127. */
INLINE lanes exp2_of_lanes(lanes x)
{
    const lanes round = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    const int_lanes is_tiny = x < -126.0f;
    const lanes clamped = choose(is_tiny, splat(-126.0f), x);
    const lanes shifted = clamped + round;
    const lanes f = clamped - (shifted - round); /* -0.5 .. 0.5 */
    lanes y = splat(1.5252734e-5f); /* ln(2)^k / k! from k = 7 down */
    y = multiply_add(y, f, splat(1.5403530e-4f));
    y = multiply_add(y, f, splat(1.3333558e-3f));
    y = multiply_add(y, f, splat(9.6181291e-3f));
    y = multiply_add(y, f, splat(5.5504109e-2f));
    y = multiply_add(y, f, splat(2.4022651e-1f));
    y = multiply_add(y, f, splat(6.9314718e-1f));
    y = multiply_add(y, f, splat(1.0f));
    const bit_lanes exponent = (to_bits(shifted) - 0x4B400000u) << 23;
    const lanes power = choose(x == x, from_bits(to_bits(y) + exponent), x);
    return choose(is_tiny, splat(0.0f), power);
}

#endif
