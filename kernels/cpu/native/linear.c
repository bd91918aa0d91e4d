/* The operation linear. Rows of x become activations, then parts of rows x tokens are multiplied. */

#include "linear.h"

enum {
    FEW_TOKENS = 8, /* that each part does all of */
    TOKENS_IN_A_PART = 64,
    TILES_IN_A_PART = 4,
    PARTS_OF_A_THREAD = 4 /* so that one which is interrupted leaves some to the others */
};

struct work {
    const struct nybble_kernels *kernels;
    const struct nybble_matrix *matrix;
    const float *x;
    float *y;
    char *rows;
    size_t stride;
    struct nybble_product *products;
    int64_t num_tokens;
    int64_t num_tile_parts;
    int64_t num_token_parts;
};

static size_t products_bytes(int64_t num_tokens)
{
    const size_t bytes = (size_t)num_tokens * sizeof(struct nybble_product);
    return (bytes + NYBBLE_LINE_BYTES - 1) / NYBBLE_LINE_BYTES * NYBBLE_LINE_BYTES;
}

size_t nybble_linear_scratch(const struct nybble_matrix *matrix, int64_t num_tokens)
{
    const size_t stride = nybble_activation_stride(matrix->kind, matrix->num_columns);
    return products_bytes(num_tokens) + (size_t)num_tokens * stride;
}

static void write_rows(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const int64_t columns = work->matrix->num_columns;
    char *const row = work->rows + (size_t)part * work->stride;
    (void)thread;
    work->kernels->write_activations(work->matrix->kind, NYBBLE_TWO_WHERE_LARGE, work->x + part * columns, columns, row);
    work->products[part] = (struct nybble_product){row, work->y + part * work->matrix->num_rows, 1};
}

static void multiply_part(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const int64_t tile_part = part / work->num_token_parts, token_part = part % work->num_token_parts;
    const int64_t num_tiles = nybble_num_tiles(work->matrix->num_rows);
    const int64_t first = nybble_part_start(work->num_tokens, token_part, work->num_token_parts);
    const int64_t end = nybble_part_start(work->num_tokens, token_part + 1, work->num_token_parts);
    (void)thread;
    work->kernels->multiply(&(struct nybble_multiplication){
        .matrix = work->matrix,
        .first_tile = nybble_part_start(num_tiles, tile_part, work->num_tile_parts),
        .end_tile = nybble_part_start(num_tiles, tile_part + 1, work->num_tile_parts),
        .products = work->products + first,
        .num_products = end - first,
        .words = NYBBLE_TWO_WHERE_LARGE,
    });
}

static int64_t num_tile_parts(int64_t num_tiles, int64_t num_tokens, int num_threads)
{
    const int64_t wanted = num_tokens > FEW_TOKENS ? num_tiles / TILES_IN_A_PART : PARTS_OF_A_THREAD * num_threads;
    return wanted < 1 ? 1 : wanted < num_tiles ? wanted : num_tiles;
}

void nybble_linear_within(nybble_pool *pool, const struct nybble_matrix *matrix, const float *x, float *y,
                          int64_t num_tokens, void *scratch)
{
    const int64_t num_tiles = nybble_num_tiles(matrix->num_rows);
    const struct work work = {
        .kernels = nybble_pool_kernels(pool),
        .matrix = matrix,
        .x = x,
        .y = y,
        .rows = (char *)scratch + products_bytes(num_tokens),
        .stride = nybble_activation_stride(matrix->kind, matrix->num_columns),
        .products = scratch,
        .num_tokens = num_tokens,
        .num_tile_parts = num_tile_parts(num_tiles, num_tokens, nybble_num_threads(pool)),
        .num_token_parts = (num_tokens + TOKENS_IN_A_PART - 1) / TOKENS_IN_A_PART,
    };
    nybble_parallel(pool, write_rows, &work, (int)num_tokens);
    nybble_parallel(pool, multiply_part, &work, (int)(work.num_tile_parts * work.num_token_parts));
}

int nybble_linear(nybble_pool *pool, const struct nybble_linear *arguments)
{
    const struct nybble_linear *a = arguments;
    void *scratch;
    const int status = nybble_begin(pool, nybble_linear_scratch(a->matrix, a->num_tokens), &scratch);
    if (status != NYBBLE_OK)
        return status;
    nybble_linear_within(pool, a->matrix, a->x, a->y, a->num_tokens, scratch);
    nybble_end(pool);
    return NYBBLE_OK;
}
