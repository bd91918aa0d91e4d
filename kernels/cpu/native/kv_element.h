/* Numbers of the KV cache: float32, bfloat16 or float8 (E4M3), and vectors of them as floats. */
#ifndef NYBBLE_KV_ELEMENT_H
#define NYBBLE_KV_ELEMENT_H

#include "attention.h"
#include "lanes.h"

INLINE size_t kv_bytes(enum nybble_kv_dtype dtype)
{
    return dtype == NYBBLE_KV_FP32 ? 4 : dtype == NYBBLE_KV_BF16 ? 2 : 1;
}

/* E4M3 as float32. A normal number has the same fields with another bias, 120 less. The smallest exponent
 * stands for m * 2^-9; read as a normal number it is 2^-7 + m * 2^-10. Code 0x7f is NaN. */
INLINE lanes lanes_of_fp8(byte_lanes codes)
{
    const bit_lanes wide = __builtin_convertvector(codes, bit_lanes);
    const bit_lanes magnitude = wide & 0x7f;
    const lanes as_normal = from_bits((magnitude << 20) + (120u << 23));
    const lanes as_subnormal = 2.0f * as_normal - 0.015625f;
    lanes x = choose((int_lanes)(magnitude < 8), as_subnormal, as_normal);
    x = choose((int_lanes)(magnitude == 0x7f), splat(NAN), x);
    return from_bits(to_bits(x) | (wide & 0x80) << 24);
}

/* The first `count` lanes from element `at` on; the others are 0. */
INLINE lanes load_kv(const void *from, int64_t at, int count, const enum nybble_kv_dtype dtype)
{
    if (dtype == NYBBLE_KV_FP32) {
        lanes x = {0};
        memcpy(&x, (const float *)from + at, count == LANES ? sizeof x : (size_t)count * 4);
        return x;
    }
    if (dtype == NYBBLE_KV_BF16) {
        half_lanes x = {0};
        memcpy(&x, (const uint16_t *)from + at, count == LANES ? sizeof x : (size_t)count * 2);
        return from_bits(__builtin_convertvector(x, bit_lanes) << 16);
    }
    byte_lanes x = {0};
    memcpy(&x, (const uint8_t *)from + at, count == LANES ? sizeof x : (size_t)count);
    return lanes_of_fp8(x);
}

/* To the nearest, ties to even; NaN stays one. */
INLINE uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* To the nearest, ties to even; what is larger than 448 is 448, NaN stays one. */
INLINE uint8_t fp8_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    const float magnitude = fabsf(x);
    if (x != x) return sign | 0x7f;
    if (magnitude >= 448.0f) return sign | 0x7e;
    if (magnitude < 0.015625f) { /* multiples of 2^-9: 2^23 * 2^-9 has them as its last bit */
        const float shifted = magnitude + 16384.0f;
        uint32_t code;
        memcpy(&code, &shifted, sizeof code);
        return sign | (uint8_t)(code & 0xf);
    }
    bits &= 0x7fffffff;
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | (uint8_t)((bits >> 20) - (120u << 3));
}

INLINE void store_kv(void *to, int64_t at, float x, const enum nybble_kv_dtype dtype)
{
    if (dtype == NYBBLE_KV_FP32)
        ((float *)to)[at] = x;
    else if (dtype == NYBBLE_KV_BF16)
        ((uint16_t *)to)[at] = bf16_of(x);
    else
        ((uint8_t *)to)[at] = fp8_of(x);
}

#endif
