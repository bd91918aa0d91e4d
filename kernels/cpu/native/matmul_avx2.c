/* Products with AVX2: a vector has 8 rows of a tile, whose halves are done one after the other. Without VNNI, two products
   of bytes are first added in 16 bits, where they saturate: products with FP4 codes (to 24) stay far below that, and
   INT8 codes are taken with their signs (127 * 127 * 2 < 2^15), moved to the activations. */

#define NYBBLE_LEVEL(name) name##_avx2
#include "matmul.h"

#include <immintrin.h>

enum { MAX_TOKENS = 4, ROWS = 8 };

/* The part of a line that has rows 8 half .. 8 half + 7. */
ALWAYS_INLINE __m256i line(const uint8_t *codes, int number, int half)
{
    return _mm256_loadu_si256((const __m256i *)(codes + number * NYBBLE_LINE_BYTES + half * (NYBBLE_LINE_BYTES / 2)));
}

ALWAYS_INLINE __m256i pairs(__m256i weights, const int8_t *values)
{
    return _mm256_maddubs_epi16(weights, _mm256_set1_epi32(four(values)));
}

ALWAYS_INLINE __m256i add_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

/* ---- FP4 ---- */

/* The lines of 16 columns as bytes: lines 2 part and 2 part + 1, of each its low nibbles and then its high ones. */
ALWAYS_INLINE void decode(const uint8_t *codes, int part, int half, __m256i *weights)
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(E2M1_PLUS_12)), low = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
        const __m256i packed = line(codes, 2 * part + i, half);
        weights[2 * i] = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
        weights[2 * i + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
    }
}

/* Four times two products of at most 24 * 127 fit in 16 bits. */
ALWAYS_INLINE __m256i pairs_of_16(const __m256i *weights, const int8_t *values)
{
    const __m256i left = _mm256_add_epi16(pairs(weights[0], values), pairs(weights[1], values + 4));
    const __m256i right = _mm256_add_epi16(pairs(weights[2], values + 8), pairs(weights[3], values + 12));
    return _mm256_add_epi16(left, right);
}

ALWAYS_INLINE __m256i dot_16(const __m256i *weights, const struct nybble_activations *x, int part,
                             const enum nybble_words words)
{
    __m256i sum = add_pairs(pairs_of_16(weights, x->high + 16 * part));
    if (has_low(x, words)) {
        const __m256i low = add_pairs(pairs_of_16(weights, x->low + 16 * part));
        sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 7), low);
    }
    return _mm256_add_epi32(sum, _mm256_set1_epi32(x->start_12[part]));
}

ALWAYS_INLINE __m256 from_e4m3(const uint8_t *scales)
{
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)scales));
    return _mm256_cvtph_ps(_mm_slli_epi16(bytes, 7));
}

ALWAYS_INLINE __m256 from_e8m0(const uint8_t *scales)
{
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)scales));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 23));
}

ALWAYS_INLINE void store(const struct tile *tile, const __m256 *sums, int num_tokens, int half,
                         float (*values)[NYBBLE_TILE_ROWS])
{
    const __m256 row_scales = _mm256_loadu_ps(tile->row_scales + half * ROWS);
    for (int token = 0; token < num_tokens; token++)
        _mm256_store_ps(values[token] + half * ROWS, _mm256_mul_ps(sums[token], row_scales));
}

ALWAYS_INLINE void fp4_by_16_half(ARGUMENTS, const int half)
{
    __m256 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++)
        for (int part = 0; part < 2; part++) {
            __m256i weights[4];
            if (half == 0)
                fetch_ahead(tile->codes + block * 256 + part * 128, 128);
            decode(tile->codes + block * 256, part, half, weights);
            const __m256 scales = from_e4m3(tile->scales + block * 32 + part * 16 + half * ROWS);
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++) {
                const struct nybble_activations *x = activations_at(products + token, block);
                const __m256 factors = _mm256_mul_ps(scales, _mm256_set1_ps(x->scale));
                sums[token] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot_16(weights, x, part, words)), factors, sums[token]);
            }
        }
    store(tile, sums, num_tokens, half, values);
}

/* The sums of both parts are brought to 32 bits one by one. */
ALWAYS_INLINE void fp4_by_32_half(ARGUMENTS, const int half)
{
    __m256 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        __m256i weights[8];
        if (half == 0)
            fetch_ahead(tile->codes + block * 256, 256);
        decode(tile->codes + block * 256, 0, half, weights);
        decode(tile->codes + block * 256, 1, half, weights + 4);
        const __m256 scales = from_e8m0(tile->scales + block * 16 + half * ROWS);
#pragma GCC unroll 4
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            const __m256i sum = _mm256_add_epi32(dot_16(weights, x, 0, words), dot_16(weights + 4, x, 1, words));
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scales);
            sums[token] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(x->scale), sums[token]);
        }
    }
    store(tile, sums, num_tokens, half, values);
}

/* ---- Other kinds ---- */

/* The part of a line of INT8 codes that has rows 8 half .. 8 half + 7, with signs. */
ALWAYS_INLINE __m256i signed_line(const uint8_t *codes, int number, int half)
{
    return _mm256_xor_si256(line(codes, number, half), _mm256_set1_epi8(-128));
}

ALWAYS_INLINE __m256i dot_4(__m256i weights, __m256i magnitudes, const int8_t *values)
{
    return add_pairs(_mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(_mm256_set1_epi32(four(values)), weights)));
}

/* 128 * high and the products with low words. */
ALWAYS_INLINE __m256i add_low(__m256i high, const uint8_t *codes, int half, const int8_t *values)
{
    __m256i sum = _mm256_slli_epi32(high, 7);
    for (int i = 0; i < 8; i++) {
        const __m256i weights = signed_line(codes, i, half);
        sum = _mm256_add_epi32(sum, dot_4(weights, _mm256_abs_epi8(weights), values + 4 * i));
    }
    return sum;
}

ALWAYS_INLINE void int8_half(ARGUMENTS, const int half)
{
    __m256 sums[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        sums[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        __m256i totals[MAX_TOKENS];
        for (int token = 0; token < num_tokens; token++)
            totals[token] = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            const __m256i weights = signed_line(tile->codes + block * 512, i, half), magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
            for (int token = 0; token < num_tokens; token++) {
                const int8_t *x = activations_at(products + token, block)->high + 4 * i;
                totals[token] = _mm256_add_epi32(totals[token], dot_4(weights, magnitudes, x));
            }
        }
        const uint8_t *halves = tile->scales + block * 32 + half * ROWS * 2;
        const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            const __m256 factors = _mm256_mul_ps(scales, _mm256_set1_ps(x->scale));
            if (has_low(x, words))
                totals[token] = add_low(totals[token], tile->codes + block * 512, half, x->low);
            sums[token] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(totals[token]), factors, sums[token]);
        }
    }
    store(tile, sums, num_tokens, half, values);
}

/* Even and odd columns have sums of their own, to wait less for the last one. */
ALWAYS_INLINE void add_two_columns(const struct nybble_product *products, int num_tokens, int64_t column, __m256 first,
                                   __m256 second, __m256 *even, __m256 *odd)
{
#pragma GCC unroll 4
    for (int token = 0; token < num_tokens; token++) {
        const float *x = (const float *)products[token].activations + column;
        even[token] = _mm256_fmadd_ps(first, _mm256_set1_ps(x[0]), even[token]);
        odd[token] = _mm256_fmadd_ps(second, _mm256_set1_ps(x[1]), odd[token]);
    }
}

/* E4M3 codes of a column with their signs, which become those of float16. */
ALWAYS_INLINE __m256 fp8_column(const uint8_t *codes, int column, int half)
{
    const uint8_t *const bytes = codes + column * NYBBLE_TILE_ROWS + half * ROWS;
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)bytes));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff)));
}

ALWAYS_INLINE void fp8_half(ARGUMENTS, const int half)
{
    __m256 even[MAX_TOKENS], odd[MAX_TOKENS];
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        const uint8_t *const codes = tile->codes + block * 512;
        for (int i = 0; i < 32; i += 2)
            add_two_columns(products, num_tokens, block * 32 + i, fp8_column(codes, i, half),
                            fp8_column(codes, i + 1, half), even, odd);
    }
    for (int token = 0; token < num_tokens; token++)
        even[token] = _mm256_add_ps(even[token], odd[token]);
    store(tile, even, num_tokens, half, values);
}

ALWAYS_INLINE void bfloat16_half(ARGUMENTS, const int half)
{
    __m256 even[MAX_TOKENS], odd[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++)
        for (int i = 0; i < 16; i++) {
            const __m256i both = line(tile->codes + block * 1024, i, half);
            const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
            add_two_columns(products, num_tokens, block * 32 + 2 * i, first, second, even, odd);
        }
    for (int token = 0; token < num_tokens; token++)
        _mm256_store_ps(values[token] + half * ROWS, _mm256_add_ps(even[token], odd[token]));
}

ALWAYS_INLINE void float32_half(ARGUMENTS, const int half)
{
    __m256 even[MAX_TOKENS], odd[MAX_TOKENS];
#pragma GCC unroll 8
    for (int token = 0; token < num_tokens; token++)
        even[token] = odd[token] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile->num_blocks; block++)
        for (int i = 0; i < 32; i += 2) {
            const __m256 first = _mm256_castsi256_ps(line(tile->codes + block * 2048, i, half));
            const __m256 second = _mm256_castsi256_ps(line(tile->codes + block * 2048, i + 1, half));
            add_two_columns(products, num_tokens, block * 32 + i, first, second, even, odd);
        }
    for (int token = 0; token < num_tokens; token++)
        _mm256_store_ps(values[token] + half * ROWS, _mm256_add_ps(even[token], odd[token]));
}

#define BOTH_HALVES(name)                                                                                              \
    ALWAYS_INLINE void name(ARGUMENTS)                                                                                 \
    {                                                                                                                  \
        name##_half(tile, products, num_tokens, words, values, 0);                                                            \
        name##_half(tile, products, num_tokens, words, values, 1);                                                            \
    }

BOTH_HALVES(fp4_by_16)
BOTH_HALVES(fp4_by_32)
BOTH_HALVES(int8)
BOTH_HALVES(fp8)
BOTH_HALVES(bfloat16)
BOTH_HALVES(float32)

INTEGER_TILE(fp4_by_16, CASES_TO_4)
INTEGER_TILE(fp4_by_32, CASES_TO_4)
INTEGER_TILE(int8, CASES_TO_4)
FLOAT_TILE(fp8, CASES_TO_4)
FLOAT_TILE(bfloat16, CASES_TO_4)
FLOAT_TILE(float32, CASES_TO_4)

#include "matmul.inc"
