/* Parts of a decoder layer in one call each: attention with its projections, and the gated MLP.
 *
 * They are put together from the library's own kernels, and round to the element type wherever the model's modules do.
 */
#include "common.h"
#include "kernels.h"
#include "pool.h"

enum { ACT_SILU = 0, ACT_GELU_TANH = 1 };

/* One layer's attention; filled in on the Python side, in this order. Strides in elements. */
typedef struct {
    int64_t type, heads, kv_heads, dim, block_size, window;
    int64_t k_strides[3], v_strides[3]; /* block, token, head */
    void *k_pages, *v_pages;
    const float *sinks;
    const void *q_norm, *k_norm; /* [dim], or NULL */
    Weights q, k, v, o;
    double scale, softcap, norm_eps;
} AttentionLayer;

/* A step's batch; filled in on the Python side, in this order. */
typedef struct {
    int64_t tokens, seqs, max_blocks;
    const int32_t *tables, *query_start, *seq_lens;
    const int64_t *slots;
} Step;

typedef struct {
    int dt;
    int64_t dim, heads[2];
    char *x[2]; /* queries and keys, [tokens, heads, dim] */
    const char *cos, *sin; /* [tokens, dim] */
} Rope;

INLINE v8f rotated(int dt, v8f a, v8f cos, v8f b, v8f sin) {
    return round8(dt, round8(dt, a * cos) + round8(dt, b * sin));
}

/* x = x cos + rotate_half(x) sin for one head; 16 elements of either half at a time, which the halves' lengths allow. */
INLINE void rope_blocks(int dt, int64_t half, char *x, const char *cos, const char *sin) {
    const int64_t es = elem_size(dt);
    for (int64_t i = 0; i < half * es; i += 16 * es) {
        char *low = x + i, *high = low + half * es;
        v8f l[2], h[2];
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const v8f a = load_half(dt, low, p), b = load_half(dt, high, p);
            l[p] = rotated(dt, a, load_half(dt, cos + i, p), -b, load_half(dt, sin + i, p));
            h[p] = rotated(dt, b, load_half(dt, cos + half * es + i, p), a, load_half(dt, sin + half * es + i, p));
        }
        store_block(dt, low, l[0], l[1]);
        store_block(dt, high, h[0], h[1]);
    }
}

/* The same for halves of any length. */
INLINE void rope_elements(int dt, int64_t half, char *x, const char *cos, const char *sin) {
    const int64_t es = elem_size(dt);
    for (int64_t i = 0; i < half; i++) {
        const v8f a = splat8(load_one(dt, x + i * es)), b = splat8(load_one(dt, x + (half + i) * es));
        const int64_t j = half + i;
        store_one(dt, x + i * es,
                  rotated(dt, a, splat8(load_one(dt, cos + i * es)), -b, splat8(load_one(dt, sin + i * es)))[0]);
        store_one(dt, x + j * es,
                  rotated(dt, b, splat8(load_one(dt, cos + j * es)), a, splat8(load_one(dt, sin + j * es)))[0]);
    }
}

INLINE void rope_token(const Rope *r, int dt, int64_t token) {
    const int64_t row = r->dim * elem_size(dt), half = r->dim / 2;
    const char *cos = r->cos + token * row, *sin = r->sin + token * row;
    for (int which = 0; which < 2; which++)
        for (int64_t h = 0; h < r->heads[which]; h++) {
            char *x = r->x[which] + (token * r->heads[which] + h) * row;
            if (half % 16 == 0) rope_blocks(dt, half, x, cos, sin);
            else rope_elements(dt, half, x, cos, sin);
        }
}

static void rope_share(void *context, int64_t token, int thread) {
    const Rope *r = context;
    if (r->dt == DT_BF16) rope_token(r, DT_BF16, token);
    else if (r->dt == DT_FP16) rope_token(r, DT_FP16, token);
    else rope_token(r, DT_FP32, token);
}

static void write_kv(const AttentionLayer *l, const Step *s, const char *k, const char *v) {
    const int64_t es = elem_size((int)l->type), width = l->dim * es, row = l->kv_heads * width;
    const int64_t *ks = l->k_strides, *vs = l->v_strides;
    const int64_t sizes[15] = {s->tokens, l->kv_heads, l->block_size,
                               width, row, width, ks[0] * es, ks[1] * es, ks[2] * es,
                               width, row, width, vs[0] * es, vs[1] * es, vs[2] * es};
    vrm_write_kv(sizes, k, v, l->k_pages, l->v_pages, s->slots);
}

static int attend(const AttentionLayer *l, const Step *s, const char *q, char *out, float *lse, int threads) {
    const int64_t *ks = l->k_strides, *vs = l->v_strides;
    const int64_t sizes[8] = {s->seqs, l->heads, l->kv_heads, l->dim, l->dim, l->block_size, s->max_blocks, l->window};
    const int64_t strides[8] = {l->heads * l->dim, l->dim, ks[0], ks[1], ks[2], vs[0], vs[1], vs[2]};
    return vrm_paged_attention((int)l->type, sizes, strides, q, l->k_pages, l->v_pages, s->tables, s->query_start,
                               s->seq_lens, NULL, NULL, l->sinks, (float)l->scale, (float)l->softcap, out, lse,
                               threads);
}

/* y [tokens, hidden] = attention of x [tokens, hidden], leading dimension ldx; K and V of the tokens go to their slots.
 * `cos`, `sin` [tokens, dim]. Returns 0, or 1 when scratch memory could not be had. */
EXPORT int vrm_attention_layer(const AttentionLayer *l, const Step *s, const void *x, int64_t ldx, const void *cos,
                               const void *sin, void *y, int threads) {
    const int dt = (int)l->type;
    const int64_t tokens = s->tokens, row = l->dim * elem_size(dt);
    const int64_t q_bytes = round64(tokens * l->heads * row), k_bytes = round64(tokens * l->kv_heads * row);
    char *q = aligned_alloc(64, (size_t)(2 * q_bytes + 2 * k_bytes + round64(tokens * l->heads * 4)));
    if (!q) return 1;
    char *k = q + q_bytes, *v = k + k_bytes, *out = v + k_bytes;
    float *lse = (float *)(out + q_bytes);
    const Weights *const projections[3] = {&l->q, &l->k, &l->v};
    char *const to[3] = {q, k, v};
    int status = vrm_linears(projections, 3, tokens, x, ldx, to, threads);
    if (!status) {
        const float eps = (float)l->norm_eps;
        if (l->q_norm) vrm_rms_norm(dt, tokens * l->heads, l->dim, q, l->dim, l->q_norm, eps, q);
        if (l->k_norm) vrm_rms_norm(dt, tokens * l->kv_heads, l->dim, k, l->dim, l->k_norm, eps, k);
        Rope rope = {.dt = dt, .dim = l->dim, .heads = {l->heads, l->kv_heads}, .x = {q, k}, .cos = cos, .sin = sin};
        vrm_parallel(rope_share, &rope, tokens, threads);
        write_kv(l, s, k, v);
        status = attend(l, s, q, out, lse, threads) || vrm_linear(&l->o, tokens, out, l->heads * l->dim, y, threads);
    }
    free(q);
    return status;
}

typedef struct {
    int dt, activation;
    int64_t n;
    char *gate;
    const char *up;
} Gated;

INLINE v8f activate(int activation, v8f x) {
    const v8f one = splat8(1.0f);
    if (activation == ACT_SILU) return x / (one + exp8(-x));
    /* x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) */
    const v8f u = splat8(0.7978845608f) * (x + splat8(0.044715f) * x * x * x);
    return x / (one + exp8(splat8(-2.0f) * u));
}

INLINE void gate_block(int dt, int activation, char *gate, const char *up) {
    v8f out[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
        out[half] = round8(dt, activate(activation, load_half(dt, gate, half))) * load_half(dt, up, half);
    store_block(dt, gate, out[0], out[1]);
}

INLINE void gate_row(const Gated *g, int dt, int64_t row) {
    const int64_t es = elem_size(dt), whole = g->n / 16 * 16, rest = g->n - whole;
    char *gate = g->gate + row * g->n * es, gate_tail[64], up_tail[64];
    const char *up = g->up + row * g->n * es;
    for (int64_t i = 0; i < whole * es; i += 16 * es) gate_block(dt, g->activation, gate + i, up + i);
    if (rest) {
        copy_tail(dt, gate_tail, gate + whole * es, rest);
        copy_tail(dt, up_tail, up + whole * es, rest);
        gate_block(dt, g->activation, gate_tail, up_tail);
        memcpy(gate + whole * es, gate_tail, (size_t)(rest * es));
    }
}

static void gate_share(void *context, int64_t row, int thread) {
    const Gated *g = context;
    if (g->dt == DT_BF16) gate_row(g, DT_BF16, row);
    else if (g->dt == DT_FP16) gate_row(g, DT_FP16, row);
    else gate_row(g, DT_FP32, row);
}

/* y = down(activation(gate(x)) * up(x)); `weights` are gate, up and down. Returns 0, or 1 when scratch memory could not
 * be had. */
EXPORT int vrm_gated_mlp(const Weights *weights, int activation, int64_t m, const void *x, int64_t ldx, void *y,
                         int threads) {
    const int dt = (int)weights->type;
    const int64_t n = weights->n, bytes = round64(m * n * elem_size(dt));
    char *gate = aligned_alloc(64, (size_t)(2 * bytes));
    if (!gate) return 1;
    const Weights *const first[2] = {weights, weights + 1};
    char *const to[2] = {gate, gate + bytes};
    int status = vrm_linears(first, 2, m, x, ldx, to, threads);
    if (!status) {
        Gated g = {.dt = dt, .activation = activation, .n = n, .gate = gate, .up = gate + bytes};
        vrm_parallel(gate_share, &g, m, threads);
        status = vrm_linear(weights + 2, m, gate, n, y, threads);
    }
    free(gate);
    return status;
}
