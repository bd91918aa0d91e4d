/* Products in plain C, for every machine. A block of weights becomes float32 [32 columns][16 rows] once for all tokens, in
   loops that compilers vectorize. Sums of products of codes are whole numbers below 2^24: exact in float32, too. */

#define NYBBLE_LEVEL(name) name##_portable
#include "matmul.h"

#include <math.h>

enum { MAX_TOKENS = 8, ROWS = NYBBLE_TILE_ROWS, COLUMNS = NYBBLE_BLOCK_COLUMNS };

typedef float block_weights[COLUMNS][ROWS];

/* a * b + c, rounded once where that is one instruction: on ARM. */
static inline float multiply_add(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* Byte `byte` of each row's word of a line, as it lies in memory. */
static void read_bytes(const uint8_t *line, int byte, int32_t *bytes)
{
    for (int row = 0; row < ROWS; row++)
        bytes[row] = line[4 * row + byte];
}

/* Twice the value of an E2M1 code: 0 1 2 3 4 6 8 12 and their negatives. */
static inline float doubled_e2m1(int32_t code)
{
    const int32_t m = code & 7;
    const int32_t value = m + (m > 4 ? m - 4 : 0) + (m > 6 ? 2 : 0);
    return (float)(code & 8 ? -value : value);
}

/* In the order of nybble_activations.high. */
static void decode_fp4(const uint8_t *codes, block_weights weights)
{
    for (int i = 0; i < COLUMNS / 2; i++) {
        int32_t bytes[ROWS];
        const int column = i / 4 * 8 + i % 4;
        read_bytes(codes + i / 4 * NYBBLE_LINE_BYTES, i % 4, bytes);
        for (int row = 0; row < ROWS; row++)
            weights[column][row] = doubled_e2m1(bytes[row] & 15);
        for (int row = 0; row < ROWS; row++)
            weights[column + 4][row] = doubled_e2m1(bytes[row] >> 4);
    }
}

static void decode_int8(const uint8_t *codes, block_weights weights)
{
    for (int i = 0; i < COLUMNS; i++) {
        int32_t bytes[ROWS];
        read_bytes(codes + i / 4 * NYBBLE_LINE_BYTES, i % 4, bytes);
        for (int row = 0; row < ROWS; row++)
            weights[i][row] = (float)(bytes[row] - 128);
    }
}

/* Bits times a power of two that makes up for the exponent's bias: right for the smallest numbers, too. */
static void from_bits(const int32_t *bits, float power, float *numbers)
{
    memcpy(numbers, bits, ROWS * sizeof *numbers);
    for (int row = 0; row < ROWS; row++)
        numbers[row] *= power;
}

/* 2^-8 of the values, as everywhere. */
static void from_e4m3(const uint8_t *codes, float *numbers)
{
    int32_t bits[ROWS];
    for (int row = 0; row < ROWS; row++)
        bits[row] = (int32_t)((uint32_t)(codes[row] >> 7) << 31 | (uint32_t)(codes[row] & 0x7f) << 20);
    from_bits(bits, 0x1p112f, numbers);
}

static void from_e8m0(const uint8_t *scales, float *numbers)
{
    int32_t bits[ROWS];
    for (int row = 0; row < ROWS; row++)
        bits[row] = (int32_t)((uint32_t)scales[row] << 23);
    memcpy(numbers, bits, sizeof bits);
}

static void from_float16(const uint8_t *scales, float *numbers)
{
    uint16_t halves[ROWS];
    int32_t bits[ROWS];
    memcpy(halves, scales, sizeof halves);
    for (int row = 0; row < ROWS; row++)
        bits[row] = halves[row] << 13;
    from_bits(bits, 0x1p112f, numbers);
}

/* dots = values[first ..] . weights */
static void dot(const block_weights weights, const int8_t *values, int first, int end, float *dots)
{
    for (int row = 0; row < ROWS; row++)
        dots[row] = 0;
    for (int i = first; i < end; i++)
        for (int row = 0; row < ROWS; row++)
            dots[row] = multiply_add(weights[i][row], values[i], dots[row]);
}

/* sums += scales * (x[first ..] . weights) */
static void add_dots(const block_weights weights, const struct nybble_activations *x, int first, int end,
                     const float *scales, float *sums)
{
    float dots[ROWS], low[ROWS];
    dot(weights, x->high, first, end, dots);
    if (x->has_low) {
        dot(weights, x->low, first, end, low);
        for (int row = 0; row < ROWS; row++)
            dots[row] = 128 * dots[row] + low[row];
    }
    for (int row = 0; row < ROWS; row++)
        sums[row] = multiply_add(dots[row], scales[row] * x->scale, sums[row]);
}

static void clear(float (*values)[ROWS], int num_tokens) { memset(values, 0, (size_t)num_tokens * sizeof *values); }

static void scale_rows(const struct tile *tile, int num_tokens, float (*values)[ROWS])
{
    for (int token = 0; token < num_tokens; token++)
        for (int row = 0; row < ROWS; row++)
            values[token][row] *= tile->row_scales[row];
}

static void fp4_by_16_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        float first[ROWS], second[ROWS];
        decode_fp4(tile->codes + block * 256, weights);
        from_e4m3(tile->scales + block * 32, first);
        from_e4m3(tile->scales + block * 32 + 16, second);
        for (int token = 0; token < num_tokens; token++) {
            const struct nybble_activations *x = activations_at(products + token, block);
            add_dots(weights, x, 0, COLUMNS / 2, first, values[token]);
            add_dots(weights, x, COLUMNS / 2, COLUMNS, second, values[token]);
        }
    }
    scale_rows(tile, num_tokens, values);
}

static void fp4_by_32_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        float scales[ROWS];
        decode_fp4(tile->codes + block * 256, weights);
        from_e8m0(tile->scales + block * 16, scales);
        for (int token = 0; token < num_tokens; token++)
            add_dots(weights, activations_at(products + token, block), 0, COLUMNS, scales, values[token]);
    }
    scale_rows(tile, num_tokens, values);
}

static void int8_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        float scales[ROWS];
        decode_int8(tile->codes + block * 512, weights);
        from_float16(tile->scales + block * 32, scales);
        for (int token = 0; token < num_tokens; token++)
            add_dots(weights, activations_at(products + token, block), 0, COLUMNS, scales, values[token]);
    }
    scale_rows(tile, num_tokens, values);
}

static void add_columns(const block_weights weights, const float *x, float *sums)
{
    for (int i = 0; i < COLUMNS; i++)
        for (int row = 0; row < ROWS; row++)
            sums[row] = multiply_add(weights[i][row], x[i], sums[row]);
}

static void fp8_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        for (int i = 0; i < COLUMNS; i++)
            from_e4m3(tile->codes + block * 512 + i * ROWS, weights[i]);
        for (int token = 0; token < num_tokens; token++)
            add_columns(weights, (const float *)products[token].activations + block * COLUMNS, values[token]);
    }
    scale_rows(tile, num_tokens, values);
}

static void bfloat16_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        for (int i = 0; i < COLUMNS; i++) {
            int32_t bits[ROWS];
            for (int row = 0; row < ROWS; row++) {
                uint16_t half;
                memcpy(&half, tile->codes + block * 1024 + i / 2 * NYBBLE_LINE_BYTES + 4 * row + i % 2 * 2, sizeof half);
                bits[row] = (int32_t)((uint32_t)half << 16);
            }
            memcpy(weights[i], bits, sizeof bits);
        }
        for (int token = 0; token < num_tokens; token++)
            add_columns(weights, (const float *)products[token].activations + block * COLUMNS, values[token]);
    }
}

static void float32_tile(ARGUMENTS)
{
    clear(values, num_tokens);
    for (int64_t block = 0; block < tile->num_blocks; block++) {
        block_weights weights;
        memcpy(weights, tile->codes + block * 2048, sizeof weights);
        for (int token = 0; token < num_tokens; token++)
            add_columns(weights, (const float *)products[token].activations + block * COLUMNS, values[token]);
    }
}

#include "matmul.inc"
