/* Attention put together from what each site says of its keys: outputs weighed by the softmax of their log-sum-exps. */
#include "common.h"
#include "pool.h"

#define MAX_PARTS 64 /* also on the Python side */

typedef struct {
    int dt;
    int64_t count, heads, dim;
    const float *const *outs, *const *lses; /* of each part: [rows, heads, dim] and [rows, heads] */
    const float *sinks;                     /* [heads], or NULL */
    char *out;                              /* [rows, heads, dim] of type dt */
} Merge;

/* What each part weighs in entry `at` = row * heads + head. Parts without a key weigh 0, as all do if none has one. */
INLINE void weights_of(const Merge *m, int64_t at, float *weights) {
    const float sink = m->sinks ? m->sinks[at % m->heads] : -INFINITY;
    float top = sink, total = 0;
    for (int64_t p = 0; p < m->count; p++) top = m->lses[p][at] > top ? m->lses[p][at] : top;
    for (int64_t p = 0; p < m->count; p++) {
        weights[p] = m->lses[p][at] == -INFINITY ? 0.0f : exp8(splat8(m->lses[p][at] - top))[0];
        total += weights[p];
    }
    if (sink != -INFINITY) total += exp8(splat8(sink - top))[0];
    for (int64_t p = 0; p < m->count && total > 0; p++) weights[p] /= total;
}

INLINE void merge_row(const Merge *m, int dt, int64_t row) {
    const int64_t whole = m->dim / 8 * 8, es = elem_size(dt);
    float weights[MAX_PARTS];
    for (int64_t at = row * m->heads; at < (row + 1) * m->heads; at++) {
        char *to = m->out + at * m->dim * es;
        weights_of(m, at, weights);
        for (int64_t d = 0; d < whole; d += 8) {
            v8f sum = splat8(0.0f);
            for (int64_t p = 0; p < m->count; p++)
                sum = fma8(load8(m->outs[p] + at * m->dim + d), splat8(weights[p]), sum);
            store_eight(dt, to + d * es, sum);
        }
        for (int64_t d = whole; d < m->dim; d++) {
            v8f sum = splat8(0.0f);
            for (int64_t p = 0; p < m->count; p++)
                sum = fma8(splat8(m->outs[p][at * m->dim + d]), splat8(weights[p]), sum);
            store_one(dt, to + d * es, sum[0]);
        }
    }
}

static void merge_share(void *context, int64_t row, int thread) {
    const Merge *m = context;
    if (m->dt == DT_BF16) merge_row(m, DT_BF16, row);
    else if (m->dt == DT_FP16) merge_row(m, DT_FP16, row);
    else merge_row(m, DT_FP32, row);
}

/* `sizes`: parts (at most MAX_PARTS), rows, heads, dim. */
EXPORT void vrm_merge_partials(int dt, const int64_t *sizes, const float *const *outs, const float *const *lses,
                               const float *sinks, void *out, int threads) {
    Merge m = {.dt = dt, .count = sizes[0], .heads = sizes[2], .dim = sizes[3], .outs = outs, .lses = lses,
               .sinks = sinks, .out = out};
    vrm_parallel(merge_share, &m, sizes[1], threads);
}
