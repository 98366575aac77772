/* Attention over paged keys and values.
 *
 * Keys are visited in chunks of CHUNK that begin at absolute multiples of CHUNK, and long contexts in splits that begin
 * at multiples of SPLIT: each split makes a partial (max, sum, out), and partials merge in order. None of it depends on
 * the batch or on the number of threads, and a row's arithmetic never depends on the rows beside it, so a sequence gets
 * the same result whatever runs next to it.
 */
#include "common.h"

#define CHUNK 64        /* keys per softmax step */
#define SPLIT 1024      /* keys per partial result, a multiple of CHUNK */
#define MAX_TILE 32     /* query rows (tokens x grouped heads) per pass over the keys */
#define MAX_DIM 512     /* largest head dimension */

typedef struct {
    int dt, causal;
    int64_t seqs, heads, kv_heads, dim, dim_v, block_size, max_blocks;
    int64_t q_row, q_head;                     /* strides in elements */
    int64_t k_block, k_token, k_head, v_block, v_token, v_head;
    const char *q, *k, *v;
    const int32_t *tables, *query_start, *seq_lens;
    const float *sinks; /* may be NULL */
    char *out;          /* [T, heads, dim_v], contiguous */
    float *lse;         /* [T, heads] */
    float scale, softcap;
    int64_t window;
} Attention;

/* One tile: `rows` rows = (token, head of the group) pairs of one sequence and one kv head. */
typedef struct {
    int64_t seq, kv_head, first_row, rows; /* rows counted token-major inside (sequence, kv head) */
    int64_t lo, hi;                        /* keys any of its rows can see */
    int64_t split0, splits;                /* its splits are [split0, split0 + splits) */
    int64_t scratch;                       /* index of its first partial, or -1: merge on the spot */
} Tile;

typedef struct {
    float max[MAX_TILE], sum[MAX_TILE];
    float out[]; /* [rows, dim_v rounded up to 16], in load order */
} Partial;

INLINE int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
INLINE size_t partial_size(const Attention *a) {
    return (sizeof(Partial) + (size_t)(MAX_TILE * round16(a->dim_v)) * 4 + 63) / 64 * 64;
}
INLINE int64_t group(const Attention *a) { return a->heads / a->kv_heads; }
INLINE int64_t query_len(const Attention *a, int64_t s) { return a->query_start[s + 1] - a->query_start[s]; }

/* Keys [*lo, *hi) visible to query token `t` of sequence `s`. */
INLINE void visible(const Attention *a, int64_t s, int64_t t, int64_t *lo, int64_t *hi) {
    const int64_t len = a->seq_lens[s], pos = len - query_len(a, s) + t;
    *hi = a->causal ? max64(0, min64(len, pos + 1)) : len;
    *lo = a->window > 0 ? min64(*hi, max64(0, pos - a->window + 1)) : 0;
}

/* acc[r][c] = q[r] . k[c]; q holds `rows` rows of `padded` floats in load order, scaled already. */
INLINE void dot_keys(int dt, int rows, int keys, const float *q, int64_t padded, const char *const *k, int64_t dim,
                     v8f acc[4][2]) {
    const int64_t es = elem_size(dt);
    char tail[2][64];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < keys; c++) acc[r][c] = splat8(0.0f);
    for (int64_t d = 0; d < dim; d += 16) {
        const char *src[2];
#pragma GCC unroll 2
        for (int c = 0; c < keys; c++) {
            src[c] = k[c] + d * es;
            if (dim - d < 16) {
                copy_tail(dt, tail[c], src[c], dim - d);
                src[c] = tail[c];
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            v8f wide[2];
#pragma GCC unroll 2
            for (int c = 0; c < keys; c++) wide[c] = load_half(dt, src[c], half);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                v8f qv = load8(q + r * padded + d + 8 * half);
#pragma GCC unroll 2
                for (int c = 0; c < keys; c++) acc[r][c] = fma8(qv, wide[c], acc[r][c]);
            }
        }
    }
}

/* s[j * rows + r] = score of key j for row r. */
INLINE void scores(const Attention *a, int dt, int rows, const float *q, const char *const *k, int64_t n, float *s) {
    const int64_t padded = round16(a->dim);
    v8f acc[4][2];
    int64_t j = 0;
    for (; j < n; j += 2) {
        const int keys = n - j > 1 ? 2 : 1;
        if (keys == 2) dot_keys(dt, rows, 2, q, padded, k + j, a->dim, acc);
        else dot_keys(dt, rows, 1, q, padded, k + j, a->dim, acc);
        for (int c = 0; c < keys; c++) {
            v4f sum = lane_sums(acc[0][c], acc[rows > 1][c], acc[rows > 2 ? 2 : 0][c], acc[rows > 2 ? 3 : 0][c]);
            for (int r = 0; r < rows; r++) s[(j + c) * rows + r] = sum[r];
        }
    }
}

/* cap * tanh(s / cap) through exp. */
INLINE v8f soft_cap(v8f s, float cap) {
    v8f e = exp8(s * splat8(2.0f / cap));
    return splat8(cap) * (splat8(1.0f) - splat8(2.0f) / (e + splat8(1.0f)));
}

/* out[r] += sum over j of p[j, r] v[j]. */
INLINE void weigh_values(const Attention *a, int dt, int rows, const float *p, const char *const *v, int64_t n,
                         float *out) {
    const int64_t es = elem_size(dt), padded = round16(a->dim_v);
    for (int64_t d = 0; d < padded; d += 16) {
        const int64_t left = a->dim_v - d;
        v8f acc[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) acc[r][h] = load8(out + r * padded + d + 8 * h);
        for (int64_t j = 0; j < n; j++) {
            char tail[64];
            const char *src = v[j] + d * es;
            if (__builtin_expect(left < 16, 0)) {
                copy_tail(dt, tail, src, left);
                src = tail;
            }
            const v8f v0 = load_half(dt, src, 0), v1 = load_half(dt, src, 1);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const v8f w = splat8(p[j * rows + r]);
                acc[r][0] = fma8(w, v0, acc[r][0]);
                acc[r][1] = fma8(w, v1, acc[r][1]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) store8(out + r * padded + d + 8 * h, acc[r][h]);
    }
}

/* One online-softmax step: keys [j0, j0 + n) for `rows` rows; lo and hi bound what each row sees. */
INLINE void step(const Attention *a, int dt, int rows, const float *q, const char *const *k, const char *const *v,
                 int64_t j0, int64_t n, const int64_t *lo, const int64_t *hi, float *max, float *sum, float *out) {
    float s[4 * CHUNK + 8];
    const int64_t count = n * rows, padded = round16(a->dim_v);
    scores(a, dt, rows, q, k, n, s);
    for (int64_t i = count; i % 8; i++) s[i] = -INFINITY;
    if (a->softcap > 0)
        for (int64_t i = 0; i < count; i += 8) store8(s + i, soft_cap(load8(s + i), a->softcap));
    for (int64_t i = count; i % 8; i++) s[i] = -INFINITY;
    for (int r = 0; r < rows; r++) {
        for (int64_t j = 0; j < min64(n, lo[r] - j0); j++) s[j * rows + r] = -INFINITY;
        for (int64_t j = max64(0, hi[r] - j0); j < n; j++) s[j * rows + r] = -INFINITY;
    }
    float top[8], base[8], lanes[8];
    v8f best = load8(s);
    for (int64_t i = 8; i < count; i += 8) {
        v8f next = load8(s + i);
        v8i greater = next > best;
        best = (v8f)((greater & (v8i)next) | (~greater & (v8i)best));
    }
    store8(lanes, best);
    for (int r = 0; r < rows; r++) {
        top[r] = max[r];
        for (int i = r; i < 8; i += rows) top[r] = lanes[i] > top[r] ? lanes[i] : top[r];
    }
    for (int i = 0; i < 8; i++) base[i] = top[i % rows] == -INFINITY ? 0.0f : top[i % rows];
    const v8f shift = load8(base);
    for (int64_t i = 0; i < count; i += 8) store8(s + i, exp8(load8(s + i) - shift));
    for (int r = 0; r < rows; r++) {
        float total = 0;
        for (int64_t j = 0; j < n; j++) total += s[j * rows + r];
        if (top[r] != max[r]) {
            const v8f fade = max[r] == -INFINITY ? splat8(0.0f) : exp8(splat8(max[r] - top[r]));
            for (int64_t d = 0; d < padded; d += 8) store8(out + r * padded + d, load8(out + r * padded + d) * fade);
            sum[r] *= fade[0];
            max[r] = top[r];
        }
        sum[r] += total;
    }
    weigh_values(a, dt, rows, s, v, n, out);
}

/* Adds `from` to `into`, in place: out = sum of out_i e^(max_i - max), likewise sum. */
INLINE void merge(const Attention *a, int64_t rows, Partial *into, const Partial *from) {
    const int64_t padded = round16(a->dim_v);
    for (int64_t r = 0; r < rows; r++) {
        if (from->max[r] == -INFINITY) continue;
        const float top = into->max[r] > from->max[r] ? into->max[r] : from->max[r];
        const v8f wi = into->max[r] == -INFINITY ? splat8(0.0f) : exp8(splat8(into->max[r] - top));
        const v8f wf = exp8(splat8(from->max[r] - top));
        float *o = into->out + r * padded;
        const float *f = from->out + r * padded;
        for (int64_t d = 0; d < padded; d += 8) store8(o + d, fma8(load8(o + d), wi, load8(f + d) * wf));
        into->sum[r] = into->sum[r] * wi[0] + from->sum[r] * wf[0];
        into->max[r] = top;
    }
}

/* Widened, scaled query rows of a tile, and what each may see. */
INLINE void load_queries(const Attention *a, int dt, const Tile *t, float *q, int64_t *lo, int64_t *hi) {
    const int64_t g = group(a), es = elem_size(dt), padded = round16(a->dim);
    const v8f scale = splat8(a->scale);
    for (int64_t r = 0; r < t->rows; r++) {
        const int64_t token = (t->first_row + r) / g, head = t->kv_head * g + (t->first_row + r) % g;
        const char *src = a->q + ((a->query_start[t->seq] + token) * a->q_row + head * a->q_head) * es;
        for (int64_t d = 0; d < padded; d += 16) {
            char tail[64];
            const char *part = src + d * es;
            if (a->dim - d < 16) {
                copy_tail(dt, tail, part, a->dim - d);
                part = tail;
            }
            store8(q + r * padded + d, load_half(dt, part, 0) * scale);
            store8(q + r * padded + d + 8, load_half(dt, part, 1) * scale);
        }
        visible(a, t->seq, token, lo + r, hi + r);
    }
}

/* One split of one tile into `p`. */
INLINE void attend_split(const Attention *a, int dt, const Tile *t, int64_t split, const float *q, const int64_t *lo,
                         const int64_t *hi, Partial *p) {
    const int64_t es = elem_size(dt), pq = round16(a->dim), pv = round16(a->dim_v);
    const int32_t *table = a->tables + t->seq * a->max_blocks;
    const int64_t end = min64(t->hi, (split + 1) * SPLIT);
    for (int64_t r = 0; r < t->rows; r++) {
        p->max[r] = -INFINITY;
        p->sum[r] = 0;
    }
    memset(p->out, 0, (size_t)(t->rows * pv) * 4);
    for (int64_t c = max64(t->lo, split * SPLIT) / CHUNK * CHUNK; c < end; c += CHUNK) {
        const int64_t n = min64(CHUNK, end - c);
        const char *k[CHUNK], *v[CHUNK];
        for (int64_t j = 0; j < n; j++) {
            const int64_t blk = table[(c + j) / a->block_size], slot = (c + j) % a->block_size;
            k[j] = a->k + (blk * a->k_block + slot * a->k_token + t->kv_head * a->k_head) * es;
            v[j] = a->v + (blk * a->v_block + slot * a->v_token + t->kv_head * a->v_head) * es;
            for (int64_t b = 0; b < a->dim_v * es; b += 64) __builtin_prefetch(v[j] + b);
        }
        for (int64_t r = 0; r < t->rows;) {
            const int64_t left = t->rows - r;
            float *out = p->out + r * pv;
            if (left >= 4) {
                step(a, dt, 4, q + r * pq, k, v, c, n, lo + r, hi + r, p->max + r, p->sum + r, out);
                r += 4;
            } else if (left >= 2) {
                step(a, dt, 2, q + r * pq, k, v, c, n, lo + r, hi + r, p->max + r, p->sum + r, out);
                r += 2;
            } else {
                step(a, dt, 1, q + r * pq, k, v, c, n, lo + r, hi + r, p->max + r, p->sum + r, out);
                r += 1;
            }
        }
    }
}

/* Divides by the softmax denominator (sinks included) and writes out and lse (sinks left out). */
INLINE void finish(const Attention *a, int dt, const Tile *t, const Partial *p) {
    const int64_t g = group(a), es = elem_size(dt), padded = round16(a->dim_v);
    for (int64_t r = 0; r < t->rows; r++) {
        const int64_t token = a->query_start[t->seq] + (t->first_row + r) / g;
        const int64_t head = t->kv_head * g + (t->first_row + r) % g;
        const float max = p->max[r], sum = p->sum[r];
        float inverse = max == -INFINITY ? 0.0f : 1.0f / sum;
        if (a->sinks && max != -INFINITY) inverse = 1.0f / (sum + expf(a->sinks[head] - max));
        a->lse[token * a->heads + head] = max == -INFINITY ? -INFINITY : max + logf(sum);
        char *dst = a->out + (token * a->heads + head) * a->dim_v * es;
        for (int64_t d = 0; d < padded; d += 16)
            for (int half = 0; half < 2; half++)
                for (int lane = 0; lane < 8; lane++) {
                    const int64_t i = d + element_index(dt, half, lane);
                    if (i < a->dim_v) store_one(dt, dst + i * es, p->out[r * padded + d + 8 * half + lane] * inverse);
                }
    }
}

/* Splits [first, last) of a tile: merged into one result when `whole`, else left in `scratch`. */
INLINE void attend(const Attention *a, int dt, const Tile *t, int64_t first, int64_t last, int whole, Partial *work,
                   Partial *scratch) {
    _Alignas(64) float q[MAX_TILE * MAX_DIM];
    int64_t lo[MAX_TILE], hi[MAX_TILE];
    load_queries(a, dt, t, q, lo, hi);
    if (!whole) {
        attend_split(a, dt, t, first, q, lo, hi, scratch);
        return;
    }
    Partial *next = (Partial *)((char *)work + partial_size(a));
    attend_split(a, dt, t, first, q, lo, hi, work);
    for (int64_t s = first + 1; s < last; s++) {
        attend_split(a, dt, t, s, q, lo, hi, next);
        merge(a, t->rows, work, next);
    }
    finish(a, dt, t, work);
}

/* Fills `tiles` (NULL: only counts); sets lo, hi and splits of each. */
static int64_t plan(const Attention *a, Tile *tiles) {
    const int64_t g = group(a), step_rows = g >= MAX_TILE ? MAX_TILE : MAX_TILE / g * g;
    int64_t count = 0;
    for (int64_t s = 0; s < a->seqs; s++) {
        const int64_t rows = query_len(a, s) * g;
        for (int64_t r = 0; r < rows; r += step_rows)
            for (int64_t h = 0; h < a->kv_heads; h++, count++) {
                if (!tiles) continue;
                Tile *t = tiles + count;
                int64_t unused;
                *t = (Tile){.seq = s, .kv_head = h, .first_row = r, .rows = min64(step_rows, rows - r), .scratch = -1};
                visible(a, s, r / g, &t->lo, &unused);
                visible(a, s, (r + t->rows - 1) / g, &unused, &t->hi);
                t->split0 = t->lo / SPLIT;
                t->splits = max64(1, (t->hi + SPLIT - 1) / SPLIT - t->split0);
            }
    }
    return count;
}

typedef struct {
    int32_t tile, split; /* split < 0: the whole tile */
} Unit;

/* A tile whose share of the work is large is cut at its splits, so that threads can share it. */
static int64_t cut(Tile *tiles, int64_t count, int threads, Unit *units, int64_t *partials) {
    int64_t total = 0, n = 0;
    *partials = 0;
    for (int64_t i = 0; i < count; i++) total += (tiles[i].hi - tiles[i].lo) * tiles[i].rows;
    for (int64_t i = 0; i < count; i++) {
        Tile *t = tiles + i;
        const int share = threads > 1 && t->splits > 1 && (t->hi - t->lo) * t->rows * 4 * threads > total;
        if (units) {
            if (share)
                for (int64_t s = 0; s < t->splits; s++) units[n + s] = (Unit){(int32_t)i, (int32_t)s};
            else units[n] = (Unit){(int32_t)i, -1};
        }
        if (share) {
            t->scratch = *partials;
            *partials += t->splits;
        }
        n += share ? t->splits : 1;
    }
    return n;
}

INLINE int run(const Attention *a, int dt, int threads) {
    const int64_t count = plan(a, NULL);
    if (count == 0) return 0;
    const size_t size = partial_size(a);
    int64_t partials = 0;
    Tile *tiles = malloc((size_t)count * sizeof(Tile));
    if (!tiles) return 1;
    plan(a, tiles);
    const int64_t n = cut(tiles, count, threads, NULL, &partials);
    Unit *units = malloc((size_t)n * sizeof(Unit));
    char *memory = aligned_alloc(64, size * (size_t)(partials + 2 * threads));
    int status = !units || !memory;
    if (!status) {
        cut(tiles, count, threads, units, &partials);
        char *scratch = memory + 2 * size * (size_t)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Partial *work = (Partial *)(memory + 2 * size * (size_t)thread_index());
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n; i++) {
                const Tile *t = tiles + units[i].tile;
                const int64_t s = units[i].split;
                if (s < 0) attend(a, dt, t, t->split0, t->split0 + t->splits, 1, work, NULL);
                else attend(a, dt, t, t->split0 + s, 0, 0, work, (Partial *)(scratch + size * (size_t)(t->scratch + s)));
            }
            if (partials > 0) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < count; i++) {
                    const Tile *t = tiles + i;
                    if (t->scratch < 0) continue;
                    Partial *first = (Partial *)(scratch + size * (size_t)t->scratch);
                    for (int64_t s = 1; s < t->splits; s++)
                        merge(a, t->rows, first, (Partial *)((char *)first + size * (size_t)s));
                    finish(a, dt, t, first);
                }
            }
        }
    }
    free(memory);
    free(units);
    free(tiles);
    return status;
}

/* `sizes`: seqs, heads, kv_heads, dim, dim_v, block_size, max_blocks, window, causal. `strides` (elements): q row,
 * q head, then block, token and head of K, then of V. Returns 0, or 1 when scratch memory could not be had. */
EXPORT int vrm_paged_attention(int dt, const int64_t *sizes, const int64_t *strides, const void *q, const void *k,
                               const void *v, const int32_t *tables, const int32_t *query_start,
                               const int32_t *seq_lens, const float *sinks, float scale, float softcap, void *out,
                               float *lse, int threads) {
    Attention a = {.dt = dt, .seqs = sizes[0], .heads = sizes[1], .kv_heads = sizes[2], .dim = sizes[3],
                   .dim_v = sizes[4], .block_size = sizes[5], .max_blocks = sizes[6], .window = sizes[7],
                   .causal = (int)sizes[8], .q_row = strides[0], .q_head = strides[1], .k_block = strides[2],
                   .k_token = strides[3], .k_head = strides[4], .v_block = strides[5], .v_token = strides[6],
                   .v_head = strides[7], .q = q, .k = k, .v = v, .tables = tables, .query_start = query_start,
                   .seq_lens = seq_lens, .sinks = sinks, .scale = scale, .softcap = softcap, .out = out, .lse = lse};
    if (a.dim > MAX_DIM) return 2;
    if (dt == DT_BF16) return run(&a, DT_BF16, threads);
    if (dt == DT_FP16) return run(&a, DT_FP16, threads);
    return run(&a, DT_FP32, threads);
}
