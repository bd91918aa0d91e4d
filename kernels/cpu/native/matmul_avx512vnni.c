/* Products with VNNI: one vector has the 16 rows of a tile, one instruction multiplies 4 columns of them with a token. */

#define NYBBLE_LEVEL(name) name##_avx512vnni
#include "matmul.h"

#include <immintrin.h>

enum { MAX_TOKENS = 8 };

ALWAYS_INLINE __m512i line(const uint8_t *codes, int number)
{
    return _mm512_loadu_si512(codes + number * NYBBLE_LINE_BYTES);
}

/* weights: unsigned bytes; values: four int8, the same for all rows. */
ALWAYS_INLINE __m512i dot(__m512i sum, __m512i weights, const int8_t *values)
{
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four(values)));
}

ALWAYS_INLINE __m512i with_high(__m512i low, __m512i high)
{
    return _mm512_add_epi32(low, _mm512_slli_epi32(high, 7));
}

/* ---- FP4 ---- */

/* The lines of 16 columns as bytes: lines 2 half and 2 half + 1, of each its low nibbles and then its high ones. */
ALWAYS_INLINE void decode(const uint8_t *codes, int half, __m512i *weights)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(E2M1_PLUS_12)), low = _mm512_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
        const __m512i packed = line(codes, 2 * half + i);
        weights[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low));
        weights[2 * i + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low));
    }
}

ALWAYS_INLINE __m512i dot_16(__m512i sum, const __m512i *weights, const int8_t *values)
{
    for (int i = 0; i < 4; i++)
        sum = dot(sum, weights[i], values + 4 * i);
    return sum;
}

/* The sums of the halves of a block. */
ALWAYS_INLINE void dot_halves(const __m512i *weights, const struct nybble_activations *x, const enum nybble_words words,
                              __m512i *sums)
{
    const __m512i first = _mm512_set1_epi32(x->start_12[0]), second = _mm512_set1_epi32(x->start_12[1]);
    if (has_low(x, words)) {
        sums[0] = with_high(dot_16(first, weights, x->low), dot_16(_mm512_setzero_si512(), weights, x->high));
        sums[1] = with_high(dot_16(second, weights + 4, x->low + 16),
                            dot_16(_mm512_setzero_si512(), weights + 4, x->high + 16));
    } else {
        sums[0] = dot_16(first, weights, x->high);
        sums[1] = dot_16(second, weights + 4, x->high + 16);
    }
}

ALWAYS_INLINE __m512 from_e4m3(const uint8_t *scales)
{
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)scales));
    return _mm512_cvtph_ps(_mm256_slli_epi16(bytes, 7));
}

ALWAYS_INLINE __m512 from_e8m0(const uint8_t *scales)
{
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bytes, 23));
}

ALWAYS_INLINE void store(const struct tile *tile, const __m512 *sums, int num_tokens, float (*values)[NYBBLE_TILE_ROWS])
{
    const __m512 row_scales = _mm512_loadu_ps(tile->row_scales);
    for (int token = 0; token < num_tokens; token++)
        _mm512_store_ps(values[token], _mm512_mul_ps(sums[token], row_scales));
}

ALWAYS_INLINE void fp4_by_16(ARGUMENTS)
{
    __m512 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        __m512i weights[8];
        fetch_ahead(tile->codes + block * 256, 256);
        fetch_ahead(tile->scales + block * 32, 32);
        decode(tile->codes + block * 256, 0, weights);
        decode(tile->codes + block * 256, 1, weights + 4);
        const __m512 first = from_e4m3(tile->scales + block * 32), second = from_e4m3(tile->scales + block * 32 + 16);
#pragma GCC unroll 8
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            __m512i dots[2];
            dot_halves(weights, x, words, dots);
            const __m512 left = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[0]), first);
            const __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[1]), second, left);
            sums[token] = _mm512_fmadd_ps(both, _mm512_set1_ps(x->scale), sums[token]);
        }
    }
    store(tile, sums, num_tokens, values);
}

ALWAYS_INLINE void fp4_by_32(ARGUMENTS)
{
    __m512 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        __m512i weights[8];
        fetch_ahead(tile->codes + block * 256, 256);
        fetch_ahead(tile->scales + block * 16, 16);
        decode(tile->codes + block * 256, 0, weights);
        decode(tile->codes + block * 256, 1, weights + 4);
        const __m512 scales = from_e8m0(tile->scales + block * 16);
#pragma GCC unroll 8
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            __m512i dots[2];
            dot_halves(weights, x, words, dots);
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(dots[0], dots[1])), scales);
            sums[token] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(x->scale), sums[token]);
        }
    }
    store(tile, sums, num_tokens, values);
}

/* ---- Other kinds ---- */

ALWAYS_INLINE __m512i dot_32(__m512i start, const __m512i *weights, const int8_t *values)
{
    __m512i even = start, odd = _mm512_setzero_si512();
    for (int i = 0; i < 8; i += 2) {
        even = dot(even, weights[i], values + 4 * i);
        odd = dot(odd, weights[i + 1], values + 4 * i + 4);
    }
    return _mm512_add_epi32(even, odd);
}

ALWAYS_INLINE void int8(ARGUMENTS)
{
    __m512 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        __m512i weights[8];
        for (int i = 0; i < 8; i++)
            weights[i] = line(tile->codes + block * 512, i);
        const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(tile->scales + block * 32)));
#pragma GCC unroll 8
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            const __m512i start = _mm512_set1_epi32(x->start_128);
            const __m512i sum = has_low(x, words) ? with_high(dot_32(start, weights, x->low),
                                                       dot_32(_mm512_setzero_si512(), weights, x->high))
                                           : dot_32(start, weights, x->high);
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales);
            sums[token] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(x->scale), sums[token]);
        }
    }
    store(tile, sums, num_tokens, values);
}

/* Even and odd columns have sums of their own, to wait less for the last one. */
ALWAYS_INLINE void add_two_columns(const struct nybble_product *products, int num_tokens, int64_t column, __m512 first,
                                   __m512 second, __m512 *even, __m512 *odd)
{
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++) {
        const float *x = (const float *)products[token].activations + column;
        even[token] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0]), even[token]);
        odd[token] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[1]), odd[token]);
    }
}

/* E4M3 codes of a column with their signs, which become those of float16. */
ALWAYS_INLINE __m512 fp8_column(const uint8_t *codes, int column)
{
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + column * NYBBLE_TILE_ROWS)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbfff)));
}

ALWAYS_INLINE void fp8(ARGUMENTS)
{
    __m512 even[MAX_TOKENS], odd[MAX_TOKENS];
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        const uint8_t *const codes = tile->codes + block * 512;
        for (int i = 0; i < 32; i += 2)
            add_two_columns(products, num_tokens, block * 32 + i, fp8_column(codes, i), fp8_column(codes, i + 1), even,
                            odd);
    }
    for (int token = 0; token < num_tokens; token++)
        even[token] = _mm512_add_ps(even[token], odd[token]);
    store(tile, even, num_tokens, values);
}

ALWAYS_INLINE void bfloat16(ARGUMENTS)
{
    __m512 even[MAX_TOKENS], odd[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++)
        for (int i = 0; i < 16; i++) {
            const __m512i pairs = line(tile->codes + block * 1024, i);
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
            add_two_columns(products, num_tokens, block * 32 + 2 * i, first, second, even, odd);
        }
    for (int token = 0; token < num_tokens; token++)
        _mm512_store_ps(values[token], _mm512_add_ps(even[token], odd[token]));
}

ALWAYS_INLINE void float32(ARGUMENTS)
{
    __m512 even[MAX_TOKENS], odd[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++)
        for (int i = 0; i < 32; i += 2) {
            const __m512 first = _mm512_castsi512_ps(line(tile->codes + block * 2048, i));
            const __m512 second = _mm512_castsi512_ps(line(tile->codes + block * 2048, i + 1));
            add_two_columns(products, num_tokens, block * 32 + i, first, second, even, odd);
        }
    for (int token = 0; token < num_tokens; token++)
        _mm512_store_ps(values[token], _mm512_add_ps(even[token], odd[token]));
}

INTEGER_TILE(fp4_by_16, CASES_TO_8)
INTEGER_TILE(fp4_by_32, CASES_TO_8)
INTEGER_TILE(int8, CASES_TO_8)
FLOAT_TILE(fp8, CASES_TO_8)
FLOAT_TILE(bfloat16, CASES_TO_8)
FLOAT_TILE(float32, CASES_TO_8)

#include "matmul.inc"
