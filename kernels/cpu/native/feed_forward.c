/* The operation feed_forward. Its parallel regions, of which those with one part run in the caller:

       norm        rows: hidden + update, its norm, and that as activations
       score       rows x experts: logits of the router
       route       rows: each token's experts and weights
       gate_up     expert x 32 neurons: silu(gate) * up of all tokens of the expert, as activations
       down        rows of the output: sums over all experts

   After routing, the pairs of token and expert (`slots`) are sorted by expert, tokens in order: a weight is read once for all
   of an expert's tokens. Each expert that has any, and the MLP that all tokens have, is a `job`. In an output the experts
   are added in the order of their numbers, and the MLP last. */

#include "feed_forward.h"

#include <string.h>

enum {
    NEURONS = NYBBLE_BLOCK_COLUMNS, /* of a part: a block of the activations that `down` takes */
    TILES = NEURONS / NYBBLE_TILE_ROWS + 1,
    FEW_TOKENS = 8,
    ROUTED_IN_A_PART = 16,
    OUTPUT_TILES_IN_A_PART = 4,
    OUTPUT_PARTS_OF_A_THREAD = 2
};

/* Of the activations that gate_up and `down` take. */
static const enum nybble_words INPUT_WORDS = NYBBLE_TWO_WHERE_LARGE, DOWN_WORDS = NYBBLE_TWO_WORDS;

struct slot {
    int32_t token;
    float weight;
};

struct job {
    const struct nybble_mlp *mlp;
    int64_t index; /* in the stacks */
    int64_t first_slot;
    int64_t num_slots;
    int64_t first_part; /* in gate_up */
    char *rows;         /* activations that `down` takes */
    size_t stride;
};

struct work {
    const struct nybble_feed_forward *arguments;
    const struct nybble_layer *layer;
    const struct nybble_kernels *kernels;
    int64_t columns;
    int64_t num_tokens;
    int64_t num_experts; /* that the router knows */
    int64_t num_slots;   /* at most: num_tokens * top_k, and num_tokens of the MLP */

    /* In scratch memory. */
    char *floats;   /* the norm: activations of float kinds [num_tokens] */
    char *integers; /* the same of integer kinds */
    float *logits;  /* [num_tokens, num_experts] */
    int32_t *keys;  /* [num_tokens, num_experts] */
    int32_t *ids;   /* [num_tokens, top_k] */
    float *weights; /* [num_tokens, top_k] */
    struct nybble_product *scored; /* [num_tokens] */
    struct slot *slots;            /* [num_slots], sorted */
    struct nybble_product *inputs;  /* [num_slots] of gate_up */
    struct nybble_product *outputs; /* [num_slots] of down */
    struct job *jobs;              /* [experts + 1] */
    char *rows;                    /* activations of jobs */

    size_t float_stride;
    size_t integer_stride;
    int64_t num_jobs;
    int64_t num_output_parts;
};

static bool has_experts(const struct nybble_layer *layer) { return layer->router.top_k > 0; }

static size_t down_stride(const struct nybble_mlp *mlp)
{
    return nybble_activation_stride(mlp->down->kind, mlp->down->num_columns);
}

/* ---- Memory ---- */

/* Memory for count items at *offset from base, at a multiple of 64; NULL if base is. */
static void *place(char *base, size_t *offset, int64_t count, size_t size)
{
    void *const area = base ? base + *offset : NULL;
    *offset += ((size_t)count * size + NYBBLE_LINE_BYTES - 1) / NYBBLE_LINE_BYTES * NYBBLE_LINE_BYTES;
    return area;
}

/* Divide scratch memory, or count what it takes. */
static size_t lay_out(struct work *work, char *base)
{
    const struct nybble_layer *layer = work->layer;
    const int64_t num_tokens = work->num_tokens, top_k = layer->router.top_k;
    const int64_t num_experts = has_experts(layer) ? layer->experts.gate_up->num_matrices : 0;
    const size_t routed_bytes = has_experts(layer) ? (size_t)(num_tokens * top_k) * down_stride(&layer->experts) : 0;
    size_t offset = 0;
    work->floats = place(base, &offset, num_tokens, work->float_stride);
    work->integers = place(base, &offset, num_tokens, work->integer_stride);
    work->logits = place(base, &offset, num_tokens * work->num_experts, sizeof *work->logits);
    work->keys = place(base, &offset, num_tokens * work->num_experts, sizeof *work->keys);
    work->ids = place(base, &offset, num_tokens * top_k, sizeof *work->ids);
    work->weights = place(base, &offset, num_tokens * top_k, sizeof *work->weights);
    work->scored = place(base, &offset, num_tokens, sizeof *work->scored);
    work->slots = place(base, &offset, work->num_slots, sizeof *work->slots);
    work->inputs = place(base, &offset, work->num_slots, sizeof *work->inputs);
    work->outputs = place(base, &offset, work->num_slots, sizeof *work->outputs);
    work->jobs = place(base, &offset, num_experts + 1, sizeof *work->jobs);
    work->rows = place(base, &offset, 1, routed_bytes + (size_t)num_tokens * down_stride(&layer->mlp));
    return offset;
}

/* ---- Norm and router ---- */

static void norm_row(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_feed_forward *a = work->arguments;
    float *const hidden = a->hidden + part * work->columns;
    float *const normed = (float *)(work->floats + (size_t)part * work->float_stride);
    const int64_t padded = nybble_num_blocks(work->columns) * NYBBLE_BLOCK_COLUMNS;
    (void)thread;
    work->kernels->add_rms_norm(hidden, a->update ? a->update + part * work->columns : NULL, work->layer->norm_weight,
                                work->layer->eps, work->columns, a->update ? hidden : NULL, normed);
    memset(normed + work->columns, 0, (size_t)(padded - work->columns) * sizeof *normed);
    work->kernels->write_activations(NYBBLE_INT8, INPUT_WORDS, normed, work->columns,
                                     work->integers + (size_t)part * work->integer_stride);
}

/* A part is some tokens and one tile of experts. */
static void score(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_matrix *matrix = work->layer->router.weight;
    const int64_t num_tiles = nybble_num_tiles(matrix->num_rows);
    const int64_t first = part / num_tiles * FEW_TOKENS, left = work->num_tokens - first;
    (void)thread;
    work->kernels->multiply(&(struct nybble_multiplication){
        .matrix = matrix,
        .first_tile = part % num_tiles,
        .end_tile = part % num_tiles + 1,
        .products = work->scored + first,
        .num_products = left < FEW_TOKENS ? left : FEW_TOKENS,
    });
}

static void route(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct nybble_router *router = &work->layer->router;
    const int64_t first = (int64_t)part * ROUTED_IN_A_PART, after = first + ROUTED_IN_A_PART;
    (void)thread;
    for (int64_t token = first; token < after && token < work->num_tokens; token++)
        nybble_route(work->kernels, router, work->logits + token * work->num_experts,
                     work->keys + token * work->num_experts, work->ids + token * router->top_k,
                     work->weights + token * router->top_k);
}

static void choose_experts(nybble_pool *pool, const struct work *work)
{
    const int64_t num_tiles = nybble_num_tiles(work->num_experts);
    for (int64_t token = 0; token < work->num_tokens; token++)
        work->scored[token] = (struct nybble_product){
            work->floats + (size_t)token * work->float_stride, work->logits + token * work->num_experts, 1};
    nybble_parallel(pool, score, work, (int)((work->num_tokens + FEW_TOKENS - 1) / FEW_TOKENS * num_tiles));
    nybble_parallel(pool, route, work, (int)((work->num_tokens + ROUTED_IN_A_PART - 1) / ROUTED_IN_A_PART));
}

/* ---- Jobs ---- */

/* The stack's index of the expert that a token has at a rank, or -1 if it is held elsewhere. */
static int64_t held_index(const struct work *work, int64_t choice)
{
    const int64_t index = work->ids[choice] - work->layer->first_expert;
    return index >= 0 && index < work->layer->experts.gate_up->num_matrices ? index : -1;
}

/* One job for each expert of the stack, also for those without tokens. */
static int64_t sort_by_expert(struct work *work)
{
    const int64_t num_experts = work->layer->experts.gate_up->num_matrices, top_k = work->layer->router.top_k;
    const int64_t num_choices = work->num_tokens * top_k;
    int64_t num_slots = 0;
    for (int64_t i = 0; i < num_experts; i++)
        work->jobs[i] = (struct job){.mlp = &work->layer->experts, .index = i};
    for (int64_t choice = 0; choice < num_choices; choice++)
        if (held_index(work, choice) >= 0)
            work->jobs[held_index(work, choice)].num_slots++;
    for (int64_t i = 0; i < num_experts; i++) {
        work->jobs[i].first_slot = num_slots;
        num_slots += work->jobs[i].num_slots;
        work->jobs[i].num_slots = 0;
    }
    for (int64_t choice = 0; choice < num_choices; choice++) {
        const int64_t index = held_index(work, choice);
        if (index < 0)
            continue;
        struct job *job = &work->jobs[index];
        work->slots[job->first_slot + job->num_slots++] =
            (struct slot){(int32_t)(choice / top_k), work->weights[choice]};
    }
    return num_slots;
}

static void drop_empty_jobs(struct work *work, int64_t num_jobs)
{
    for (int64_t i = 0; i < num_jobs; i++)
        if (work->jobs[i].num_slots > 0)
            work->jobs[work->num_jobs++] = work->jobs[i];
}

static void add_mlp(struct work *work, int64_t first_slot)
{
    work->jobs[work->num_jobs++] =
        (struct job){.mlp = &work->layer->mlp, .first_slot = first_slot, .num_slots = work->num_tokens};
    for (int64_t token = 0; token < work->num_tokens; token++)
        work->slots[first_slot + token] = (struct slot){(int32_t)token, 1};
}

static const char *normed_row(const struct work *work, const struct nybble_matrix *matrix, int32_t token)
{
    if (nybble_takes_floats(matrix->kind))
        return work->floats + (size_t)token * work->float_stride;
    return work->integers + (size_t)token * work->integer_stride;
}

/* What each slot is multiplied with, and where the result goes. Returns the parts of gate_up. */
static int64_t connect(struct work *work)
{
    char *rows = work->rows;
    int64_t num_parts = 0;
    for (int64_t i = 0; i < work->num_jobs; i++) {
        struct job *job = &work->jobs[i];
        job->rows = rows;
        job->stride = down_stride(job->mlp);
        job->first_part = num_parts;
        num_parts += nybble_num_blocks(job->mlp->down->num_columns);
        for (int64_t at = job->first_slot; at < job->first_slot + job->num_slots; at++) {
            const struct slot slot = work->slots[at];
            work->inputs[at] = (struct nybble_product){normed_row(work, job->mlp->gate_up, slot.token), NULL, 1};
            work->outputs[at] =
                (struct nybble_product){rows, work->arguments->out + slot.token * work->columns, slot.weight};
            rows += job->stride;
        }
    }
    return num_parts;
}

/* ---- Products ---- */

/* values[token] [n] = rows first_row .. first_row + n - 1 of gate_up, for at most FEW_TOKENS slots. Returns where in a
   token's values the first row stands. */
static int64_t multiply_rows(const struct work *work, const struct job *job, int64_t slot, int64_t num_slots,
                             int64_t first_row, int64_t n, float (*values)[TILES * NYBBLE_TILE_ROWS])
{
    struct nybble_product products[FEW_TOKENS];
    const int64_t first_tile = first_row / NYBBLE_TILE_ROWS;
    for (int64_t i = 0; i < num_slots; i++)
        products[i] = (struct nybble_product){work->inputs[slot + i].activations, values[i], 1};
    work->kernels->multiply(&(struct nybble_multiplication){
        .matrix = job->mlp->gate_up,
        .index = job->index,
        .first_tile = first_tile,
        .end_tile = nybble_num_tiles(first_row + n),
        .out_row = first_tile * NYBBLE_TILE_ROWS,
        .products = products,
        .num_products = num_slots,
        .words = INPUT_WORDS,
    });
    return first_row - first_tile * NYBBLE_TILE_ROWS;
}

static void gate_up_few(const struct work *work, const struct job *job, int64_t block, int64_t slot, int64_t num_slots)
{
    float gates[FEW_TOKENS][TILES * NYBBLE_TILE_ROWS], ups[FEW_TOKENS][TILES * NYBBLE_TILE_ROWS];
    const struct nybble_matrix *down = job->mlp->down;
    const int64_t first = block * NEURONS, left = down->num_columns - first, n = left < NEURONS ? left : NEURONS;
    const int64_t gate = multiply_rows(work, job, slot, num_slots, first, n, gates);
    const int64_t up = multiply_rows(work, job, slot, num_slots, down->num_columns + first, n, ups);
    for (int64_t i = 0; i < num_slots; i++) {
        float neurons[NEURONS];
        char *const row = job->rows + (size_t)(slot - job->first_slot + i) * job->stride;
        work->kernels->silu_multiply(gates[i] + gate, ups[i] + up, n, neurons);
        work->kernels->write_activations(down->kind, DOWN_WORDS, neurons, n,
                                         row + (size_t)block * nybble_activation_bytes(down->kind));
    }
}

static const struct job *job_of_part(const struct work *work, int64_t part)
{
    int64_t low = 0, high = work->num_jobs - 1; /* it is one of low .. high */
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (work->jobs[middle].first_part <= part)
            low = middle;
        else
            high = middle - 1;
    }
    return &work->jobs[low];
}

static void gate_up(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const struct job *job = job_of_part(work, part);
    (void)thread;
    for (int64_t done = 0; done < job->num_slots; done += FEW_TOKENS) {
        const int64_t left = job->num_slots - done;
        gate_up_few(work, job, part - job->first_part, job->first_slot + done, left < FEW_TOKENS ? left : FEW_TOKENS);
    }
}

static void down(const void *argument, int part, int thread)
{
    const struct work *work = argument;
    const int64_t num_tiles = nybble_num_tiles(work->columns);
    const int64_t first_tile = nybble_part_start(num_tiles, part, work->num_output_parts);
    const int64_t end_tile = nybble_part_start(num_tiles, part + 1, work->num_output_parts);
    const int64_t first = first_tile * NYBBLE_TILE_ROWS, end = end_tile * NYBBLE_TILE_ROWS;
    const int64_t num_columns = (end < work->columns ? end : work->columns) - first;
    (void)thread;
    for (int64_t token = 0; token < work->num_tokens; token++)
        memset(work->arguments->out + token * work->columns + first, 0, (size_t)num_columns * sizeof(float));
    for (int64_t i = 0; i < work->num_jobs; i++)
        work->kernels->multiply(&(struct nybble_multiplication){
            .matrix = work->jobs[i].mlp->down,
            .index = work->jobs[i].index,
            .first_tile = first_tile,
            .end_tile = end_tile,
            .products = work->outputs + work->jobs[i].first_slot,
            .num_products = work->jobs[i].num_slots,
            .words = DOWN_WORDS,
            .is_added = true,
        });
}

/* ---- The operation ---- */

static void run(nybble_pool *pool, struct work *work)
{
    int64_t num_slots = 0;
    nybble_parallel(pool, norm_row, work, (int)work->num_tokens);
    if (has_experts(work->layer)) {
        choose_experts(pool, work);
        num_slots = sort_by_expert(work);
        drop_empty_jobs(work, work->layer->experts.gate_up->num_matrices);
    }
    add_mlp(work, num_slots);
    nybble_parallel(pool, gate_up, work, (int)connect(work));
    nybble_parallel(pool, down, work, (int)work->num_output_parts);
}

/* For few tokens long stretches of each expert, which memory gives faster; for many what stays in the caches. */
static int64_t num_output_parts(int64_t columns, int64_t num_tokens, int num_threads)
{
    const int64_t num_tiles = nybble_num_tiles(columns);
    const int64_t small = (num_tiles + OUTPUT_TILES_IN_A_PART - 1) / OUTPUT_TILES_IN_A_PART;
    const int64_t large = (int64_t)OUTPUT_PARTS_OF_A_THREAD * num_threads;
    const int64_t wanted = num_tokens > FEW_TOKENS && small > large ? small : large;
    return wanted < num_tiles ? wanted : num_tiles;
}

int nybble_feed_forward(nybble_pool *pool, const struct nybble_feed_forward *arguments)
{
    const struct nybble_layer *layer = arguments->layer;
    const int64_t columns = layer->mlp.gate_up->num_columns;
    struct work work = {
        .arguments = arguments,
        .layer = layer,
        .kernels = nybble_pool_kernels(pool),
        .columns = columns,
        .num_tokens = arguments->num_tokens,
        .num_experts = has_experts(layer) ? layer->router.weight->num_rows : 0,
        .num_slots = arguments->num_tokens * (layer->router.top_k + 1),
        .float_stride = nybble_activation_stride(NYBBLE_FLOAT32, columns),
        .integer_stride = nybble_activation_stride(NYBBLE_INT8, columns),
        .num_output_parts = num_output_parts(columns, arguments->num_tokens, nybble_num_threads(pool)),
    };
    void *scratch;
    const int status = nybble_begin(pool, lay_out(&work, NULL), &scratch);
    if (status != NYBBLE_OK)
        return status;
    lay_out(&work, scratch);
    run(pool, &work);
    nybble_end(pool);
    return NYBBLE_OK;
}
