/* The inner loops of attention: scores of a chunk of keys, the softmax step, the weighted sum of values. */
#ifndef VRM_ATTENTION_INNER_H
#define VRM_ATTENTION_INNER_H

#include "common.h"

#define CHUNK 64 /* keys per softmax step */

typedef struct {
    int dt;
    int64_t seqs, heads, kv_heads, dim, dim_v, block_size, max_blocks;
    int64_t q_row, q_head;                     /* strides in elements */
    int64_t k_block, k_token, k_head, v_block, v_token, v_head;
    const char *q, *k, *v;
    const int32_t *tables, *query_start, *seq_lens;
    const int32_t *row_lo, *row_hi; /* [T] keys that each row sees, ascending in a sequence; NULL: window says */
    const float *sinks;             /* may be NULL */
    int out_dt;                     /* element type of `out` */
    char *out;                      /* [T, heads, dim_v], contiguous */
    float *lse;                     /* [T, heads] */
    float scale, softcap;
    int64_t window;
} Attention;

INLINE int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }

/* acc[r][c] += q[r] . k[c] over one block of 16. */
INLINE void dot_block(int dt, int rows, int keys, const float *q, const char *const *k, v8f acc[4][2]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        v8f wide[2];
#pragma GCC unroll 2
        for (int c = 0; c < keys; c++) wide[c] = load_half(dt, k[c], half);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            v8f qv = load8(q + r * 16 + 8 * half);
            IN_REGISTER(qv);
#pragma GCC unroll 2
            for (int c = 0; c < keys; c++) acc[r][c] = fma8(qv, wide[c], acc[r][c]);
        }
    }
}

/* s[c * rows + r] = q[r] . k[c] for `keys` keys; q holds blocks of 16, row after row in each. */
INLINE void dot_keys(int dt, int rows, int keys, const float *q, int64_t dim, const char *const *k, float *s) {
    const int64_t es = elem_size(dt);
    const char *at[2];
    v8f acc[4][2];
#pragma GCC unroll 2
    for (int c = 0; c < keys; c++) at[c] = k[c];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < keys; c++) acc[r][c] = splat8(0.0f);
    for (; dim >= 16; dim -= 16, q += 16 * rows) {
        dot_block(dt, rows, keys, q, at, acc);
#pragma GCC unroll 2
        for (int c = 0; c < keys; c++) at[c] += 16 * es;
    }
    if (dim > 0) {
        char tail[2][64];
#pragma GCC unroll 2
        for (int c = 0; c < keys; c++) {
            copy_tail(dt, tail[c], at[c], dim);
            at[c] = tail[c];
        }
        dot_block(dt, rows, keys, q, at, acc);
    }
#pragma GCC unroll 2
    for (int c = 0; c < keys; c++) {
        const v4f sum = lane_sums(acc[0][c], acc[rows > 1][c], acc[rows > 2 ? 2 : 0][c], acc[rows > 2 ? 3 : 0][c]);
        memcpy(s + c * rows, &sum, (size_t)rows * 4);
    }
}

/* s[j * rows + r] = score of key j for row r; q holds scaled rows in load order. The `next` keys are fetched ahead. */
INLINE void scores(const Attention *a, int dt, int rows, const float *q, const char *const *k, const char *const *next,
                   int64_t n, float *s) {
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
        for (int64_t b = 0; b < a->dim * elem_size(dt); b += 64) {
            __builtin_prefetch(next[j] + b);
            __builtin_prefetch(next[j + 1] + b);
        }
        dot_keys(dt, rows, 2, q, a->dim, k + j, s + j * rows);
    }
    if (j < n) dot_keys(dt, rows, 1, q, a->dim, k + j, s + j * rows);
}

/* cap * tanh(s / cap) through exp. */
INLINE v8f soft_cap(v8f s, float cap) {
    v8f e = exp8(s * splat8(2.0f / cap));
    return splat8(cap) * (splat8(1.0f) - splat8(2.0f) / (e + splat8(1.0f)));
}

/* acc[r] += p[r] v for one key and 16 of its dimensions. */
INLINE void weigh_block(int dt, int rows, const float *p, const char *v, v8f acc[4][2]) {
    const v8f v0 = load_half(dt, v, 0), v1 = load_half(dt, v, 1);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        v8f w = splat8(p[r]);
        IN_REGISTER(w);
        acc[r][0] = fma8(w, v0, acc[r][0]);
        acc[r][1] = fma8(w, v1, acc[r][1]);
    }
}

/* out[r] += sum over j of p[j, r] v[j]. */
INLINE void weigh_values(const Attention *a, int dt, int rows, const float *p, const char *const *v,
                         const char *const *next, int64_t n, float *out) {
    const int64_t es = elem_size(dt), padded = round16(a->dim_v);
    for (int64_t d = 0; d < padded; d += 16) {
        v8f acc[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            acc[r][0] = load8(out + r * padded + d);
            acc[r][1] = load8(out + r * padded + d + 8);
        }
        if (d + 16 <= a->dim_v) {
            for (int64_t j = 0; j < n; j++) {
                __builtin_prefetch(next[j] + d * es);
                weigh_block(dt, rows, p + j * rows, v[j] + d * es, acc);
            }
        } else {
            for (int64_t j = 0; j < n; j++) {
                char tail[64];
                copy_tail(dt, tail, v[j] + d * es, a->dim_v - d);
                weigh_block(dt, rows, p + j * rows, tail, acc);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            store8(out + r * padded + d, acc[r][0]);
            store8(out + r * padded + d + 8, acc[r][1]);
        }
    }
}

/* The two loops that carry the work, one function per element type and number of rows: inlined into one large function
 * they would lose their registers to each other. */
typedef void (*Inner)(const Attention *, const float *, const char *const *, const char *const *, int64_t, float *);
#define INSTANCE(NAME, DT, ROWS)                                                                                     \
    static __attribute__((noinline)) void scores_##NAME##ROWS(const Attention *a, const float *q,                    \
                                                              const char *const *k, const char *const *next,         \
                                                              int64_t n, float *s) {                                 \
        scores(a, DT, ROWS, q, k, next, n, s);                                                                       \
    }                                                                                                                \
    static __attribute__((noinline)) void weigh_##NAME##ROWS(const Attention *a, const float *p,                     \
                                                             const char *const *v, const char *const *next,          \
                                                             int64_t n, float *out) {                                \
        weigh_values(a, DT, ROWS, p, v, next, n, out);                                                               \
    }
#define INSTANCES(NAME, DT) INSTANCE(NAME, DT, 1) INSTANCE(NAME, DT, 2) INSTANCE(NAME, DT, 4)
INSTANCES(bf16_, DT_BF16)
INSTANCES(fp16_, DT_FP16)
INSTANCES(fp32_, DT_FP32)
#define ROW_TABLE(KIND, NAME) {NULL, KIND##_##NAME##_1, KIND##_##NAME##_2, NULL, KIND##_##NAME##_4}
static const Inner SCORES[3][5] = {ROW_TABLE(scores, bf16), ROW_TABLE(scores, fp16), ROW_TABLE(scores, fp32)};
static const Inner WEIGH[3][5] = {ROW_TABLE(weigh, bf16), ROW_TABLE(weigh, fp16), ROW_TABLE(weigh, fp32)};

/* The largest score of each row, or `max` if that is larger. s has `count` entries, a multiple of 8. */
INLINE void row_maxima(int rows, const float *s, int64_t count, const float *max, float *top) {
    float lanes[8];
    v8f best = load8(s);
    for (int64_t i = 8; i < count; i += 8) {
        const v8f next = load8(s + i);
        const v8i greater = next > best;
        best = (v8f)((greater & (v8i)next) | (~greater & (v8i)best));
    }
    store8(lanes, best);
    for (int r = 0; r < rows; r++) {
        top[r] = max[r];
        for (int i = r; i < 8; i += rows) top[r] = lanes[i] > top[r] ? lanes[i] : top[r];
    }
}

/* s becomes e^(s - top), `total` its sum per row: eight partial sums by key, so that the order of additions is the same
 * for any number of rows. `keys` is a multiple of 8. */
INLINE void exponentials(int rows, float *s, int64_t keys, const float *top, float *total) {
    float base[8], lanes[32];
    v8f part[4];
    for (int i = 0; i < 8; i++) base[i] = top[i % rows] == -INFINITY ? 0.0f : top[i % rows];
    const v8f shift = load8(base);
    for (int i = 0; i < rows; i++) part[i] = splat8(0.0f);
    for (int64_t j = 0; j < keys; j += 8)
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            const v8f p = exp8(load8(s + j * rows + 8 * i) - shift);
            store8(s + j * rows + 8 * i, p);
            part[i] += p;
        }
    for (int i = 0; i < rows; i++) store8(lanes + 8 * i, part[i]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const float *l = lanes + r;
        total[r] = ((l[0] + l[rows]) + (l[2 * rows] + l[3 * rows])) +
                   ((l[4 * rows] + l[5 * rows]) + (l[6 * rows] + l[7 * rows]));
    }
}

/* Keys [first, first + n) of a chunk, and where they lie. */
typedef struct {
    int64_t first, n;
    const char *k[CHUNK], *v[CHUNK];
} Chunk;

/* One online-softmax step over a chunk for `rows` rows; lo and hi bound what each row sees. */
INLINE void step(const Attention *a, int rows, const float *q, const Chunk *c, const Chunk *next, const int64_t *lo,
                 const int64_t *hi, float *max, float *sum, float *out) {
    float s[4 * CHUNK], top[4], total[4];
    const int64_t j0 = c->first, n = c->n, keys = (n + 7) / 8 * 8, padded = round16(a->dim_v);
    SCORES[a->dt][rows](a, q, c->k, next->k, n, s);
    if (a->softcap > 0)
        for (int64_t i = 0; i < n * rows; i += 8) store8(s + i, soft_cap(load8(s + i), a->softcap));
    for (int64_t i = n * rows; i < keys * rows; i++) s[i] = -INFINITY;
    for (int r = 0; r < rows; r++) {
        for (int64_t j = 0; j < min64(n, lo[r] - j0); j++) s[j * rows + r] = -INFINITY;
        for (int64_t j = max64(0, hi[r] - j0); j < n; j++) s[j * rows + r] = -INFINITY;
    }
    row_maxima(rows, s, keys * rows, max, top);
    exponentials(rows, s, keys, top, total);
    for (int r = 0; r < rows; r++) {
        if (top[r] != max[r]) {
            const v8f fade = max[r] == -INFINITY ? splat8(0.0f) : exp8(splat8(max[r] - top[r]));
            for (int64_t d = 0; d < padded; d += 8) store8(out + r * padded + d, load8(out + r * padded + d) * fade);
            sum[r] *= fade[0];
            max[r] = top[r];
        }
        sum[r] += total[r];
    }
    WEIGH[a->dt][rows](a, s, c->v, next->v, n, out);
}

#endif
