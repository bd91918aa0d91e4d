/* The operations pack and pack_int8: a part is a tile. */

#include "pack.h"

#include <math.h>
#include <string.h>

enum { ROWS = NYBBLE_TILE_ROWS, COLUMNS = NYBBLE_BLOCK_COLUMNS, LINES_AT_ONCE = 64 /* in the first cache */ };

/* Rows of the tile that the matrix has. */
static int64_t rows_of_tile(const struct nybble_matrix *matrix, int64_t tile)
{
    const int64_t left = matrix->num_rows - tile % nybble_num_tiles(matrix->num_rows) * ROWS;
    return left < ROWS ? left : ROWS;
}

/* The number, among the rows of all matrices, of the tile's first one. */
static int64_t first_row_of_tile(const struct nybble_matrix *matrix, int64_t tile)
{
    const int64_t num_tiles = nybble_num_tiles(matrix->num_rows);
    return tile / num_tiles * matrix->num_rows + tile % num_tiles * ROWS;
}

static int run_tiles(nybble_pool *pool, nybble_task *task, const void *arguments, const struct nybble_matrix *matrix)
{
    const int num_tiles = (int)(matrix->num_matrices * nybble_num_tiles(matrix->num_rows));
    if (pool)
        return nybble_run(pool, task, arguments, num_tiles);
    for (int tile = 0; tile < num_tiles; tile++)
        task(arguments, tile, 0);
    return NYBBLE_OK;
}

/* ---- What is stored as it is ---- */

/* codes [words][16 rows]: words first .. end - 1 of a row of num_bytes, with zeros after it. */
static void pack_words(const uint8_t *source, int64_t num_bytes, int64_t first, int64_t end, int row, uint8_t *codes)
{
    const int64_t whole = num_bytes / 4 < end ? num_bytes / 4 : end;
    uint8_t *const column = codes + 4 * row;
    uint32_t word;
    for (int64_t i = first; i < whole; i++) {
        memcpy(&word, source + 4 * i, sizeof word);
        memcpy(column + i * NYBBLE_LINE_BYTES, &word, sizeof word);
    }
    for (int64_t i = whole > first ? whole : first; i < end; i++) {
        word = 0;
        if (4 * i < num_bytes)
            memcpy(&word, source + 4 * i, (size_t)(num_bytes - 4 * i));
        memcpy(column + i * NYBBLE_LINE_BYTES, &word, sizeof word);
    }
}

/* The same of bytes. */
static void pack_bytes(const uint8_t *source, int64_t num_bytes, int64_t first, int64_t end, int row, uint8_t *bytes)
{
    const int64_t whole = num_bytes < end ? num_bytes : end;
    for (int64_t i = first; i < whole; i++)
        bytes[i * ROWS + row] = source[i];
    for (int64_t i = whole > first ? whole : first; i < end; i++)
        bytes[i * ROWS + row] = 0;
}

/* Lines first .. end - 1 of a tile, of a row of num_bytes. */
static void pack_lines(int64_t kind, const uint8_t *source, int64_t num_bytes, int64_t first, int64_t end, int row,
                       uint8_t *codes)
{
    if (kind == NYBBLE_FP8)
        pack_bytes(source, num_bytes, 4 * first, 4 * end, row, codes);
    else
        pack_words(source, num_bytes, first, end, row, codes);
}

static void pack_tile(const void *argument, int part, int thread)
{
    const struct nybble_pack *a = argument;
    const struct nybble_matrix *matrix = a->matrix;
    const int64_t num_blocks = nybble_num_blocks(matrix->num_columns), num_rows = rows_of_tile(matrix, part);
    const int64_t first_row = first_row_of_tile(matrix, part);
    const int64_t code_bytes = num_blocks * nybble_code_bytes(matrix->kind);
    const int64_t scale_bytes = num_blocks * nybble_scale_bytes(matrix->kind);
    const int64_t num_lines = code_bytes / NYBBLE_LINE_BYTES;
    (void)thread;
    for (int64_t first = 0; first < num_lines; first += LINES_AT_ONCE)
        for (int row = 0; row < ROWS; row++)
            pack_lines(matrix->kind, a->source + (row < num_rows ? (first_row + row) * a->row_bytes : 0),
                       row < num_rows ? a->row_bytes : 0, first,
                       first + LINES_AT_ONCE < num_lines ? first + LINES_AT_ONCE : num_lines, row,
                       a->codes + part * code_bytes);
    for (int row = 0; scale_bytes && row < ROWS; row++)
        pack_bytes(a->source_scales + (row < num_rows ? (first_row + row) * a->num_row_scales : 0),
                   row < num_rows ? a->num_row_scales : 0, 0, scale_bytes / ROWS, row, a->scales + part * scale_bytes);
}

int nybble_pack(nybble_pool *pool, const struct nybble_pack *arguments)
{
    return run_tiles(pool, pack_tile, arguments, arguments->matrix);
}

/* ---- INT8 ---- */

/* Of a number from 0 to 1, rounded to the nearest, ties to even. */
static uint16_t float16_bits(float x)
{
    uint32_t bits;
    if (x < 0x1p-14f)
        return (uint16_t)lrintf(x * 0x1p24f);
    memcpy(&bits, &x, sizeof bits);
    bits -= 112u << 23;
    return (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

static float float16_value(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 13;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x * 0x1p112f;
}

/* A block of a row as float32, with zeros after it. */
static void read_block(const struct nybble_pack_int8 *a, int64_t row, int64_t block, float *x)
{
    const int64_t num_columns = a->matrix->num_columns, left = num_columns - block * COLUMNS;
    const int64_t n = left < COLUMNS ? left : COLUMNS, at = row * num_columns + block * COLUMNS;
    memset(x, 0, COLUMNS * sizeof *x);
    if (!a->is_bfloat16) {
        memcpy(x, (const float *)a->source + at, (size_t)n * sizeof *x);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)((const uint16_t *)a->source)[at + i] << 16;
        memcpy(x + i, &bits, sizeof bits);
    }
}

/* NaN or infinite if one of them is. */
static float largest_of(const float *x)
{
    int32_t bits[COLUMNS], largest = 0;
    float value;
    memcpy(bits, x, sizeof bits);
    for (int i = 0; i < COLUMNS; i++)
        largest = (bits[i] & INT32_MAX) > largest ? bits[i] & INT32_MAX : largest;
    memcpy(&value, &largest, sizeof value);
    return value;
}

static void write_codes(const float *x, float step, int row, uint8_t *codes)
{
    const float inverse = step > 1e-37f ? 1 / step : 0;
    for (int i = 0; i < COLUMNS; i++) {
        const float level = x[i] * inverse, limited = level > 127 ? 127 : level < -127 ? -127 : level;
        const int line = i / 8 * 2 + i % 2, byte = i % 8 / 2;
        codes[line * NYBBLE_LINE_BYTES + 4 * row + byte] = (uint8_t)(lrintf(limited) + 128);
    }
}

/* The row scale: the largest scale of a block. */
static float scale_of_row(const struct nybble_pack_int8 *a, int64_t row, int64_t num_blocks)
{
    float x[COLUMNS], largest = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
        read_block(a, row, block, x);
        const float magnitude = largest_of(x);
        if (!isfinite(magnitude))
            return NAN;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest / 127;
}

static void pack_row(const struct nybble_pack_int8 *a, int64_t at, int row, float row_scale, uint8_t *codes,
                     uint8_t *scales)
{
    const int64_t num_blocks = nybble_num_blocks(a->matrix->num_columns);
    for (int64_t block = 0; block < num_blocks; block++) {
        float x[COLUMNS] = {0};
        uint16_t ratio = 0;
        if (row_scale > 0) {
            read_block(a, at, block, x);
            ratio = float16_bits(largest_of(x) / 127 / row_scale);
        }
        memcpy(scales + block * ROWS * 2 + 2 * row, &ratio, sizeof ratio);
        write_codes(x, float16_value(ratio) * row_scale, row, codes + block * COLUMNS * ROWS);
    }
}

static void pack_int8_tile(const void *argument, int part, int thread)
{
    const struct nybble_pack_int8 *a = argument;
    const int64_t num_blocks = nybble_num_blocks(a->matrix->num_columns), num_rows = rows_of_tile(a->matrix, part);
    (void)thread;
    for (int row = 0; row < ROWS; row++) {
        const int64_t at = first_row_of_tile(a->matrix, part) + row;
        const float row_scale = row < num_rows ? scale_of_row(a, at, num_blocks) : 0;
        a->row_scales[(int64_t)part * ROWS + row] = row_scale;
        pack_row(a, at, row, row_scale, a->codes + part * num_blocks * nybble_code_bytes(NYBBLE_INT8),
                 a->scales + part * num_blocks * nybble_scale_bytes(NYBBLE_INT8));
    }
}

int nybble_pack_int8(nybble_pool *pool, const struct nybble_pack_int8 *arguments)
{
    return run_tiles(pool, pack_int8_tile, arguments, arguments->matrix);
}
