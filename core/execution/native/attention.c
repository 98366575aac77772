/* Attention over paged keys and values.
 *
 * Keys are visited in chunks of CHUNK that begin at absolute multiples of CHUNK, and long contexts in splits that begin
 * at multiples of SPLIT: each split makes a partial (max, sum, out), and partials merge in order. None of it depends on
 * the batch or on the number of threads, and a row's arithmetic never depends on the rows beside it, so a sequence gets
 * the same result whatever runs next to it.
 */
#include "attention_inner.h"
#include "kernels.h"
#include "pool.h"

#define SPLIT 1024  /* keys per partial result, a multiple of CHUNK */
#define MAX_TILE 32 /* query rows (tokens x grouped heads) per pass over the keys */
#define MAX_DIM 512 /* largest head dimension */

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

INLINE size_t partial_size(const Attention *a) {
    return (size_t)round64((int64_t)sizeof(Partial) + MAX_TILE * round16(a->dim_v) * 4);
}

/* What one thread needs: two partials and a chunk of keys and values. */
INLINE size_t work_size(const Attention *a) {
    return 2 * partial_size(a) + (size_t)round64((a->dim + a->dim_v) * CHUNK * elem_size(a->dt));
}

INLINE int64_t group(const Attention *a) { return a->heads / a->kv_heads; }
INLINE int64_t query_len(const Attention *a, int64_t s) { return a->query_start[s + 1] - a->query_start[s]; }

/* Keys [*lo, *hi) visible to query token `t` of sequence `s`. */
INLINE void visible(const Attention *a, int64_t s, int64_t t, int64_t *lo, int64_t *hi) {
    const int64_t len = a->seq_lens[s], pos = len - query_len(a, s) + t;
    if (a->row_lo) {
        const int64_t row = a->query_start[s] + t;
        *hi = max64(0, min64(len, a->row_hi[row]));
        *lo = max64(0, min64(*hi, a->row_lo[row]));
        return;
    }
    *hi = max64(0, min64(len, pos + 1));
    *lo = a->window > 0 ? min64(*hi, max64(0, pos - a->window + 1)) : 0;
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

/* Rows that are handled together when `left` remain. */
INLINE int64_t rows_at_once(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Widened, scaled query rows of a tile, and what each may see. */
INLINE void load_queries(const Attention *a, int dt, const Tile *t, float *q, int64_t *lo, int64_t *hi) {
    const int64_t g = group(a), es = elem_size(dt), padded = round16(a->dim);
    const v8f scale = splat8(a->scale);
    for (int64_t r = 0, first = 0, rows = 0; r < t->rows; r++) {
        const int64_t token = (t->first_row + r) / g, head = t->kv_head * g + (t->first_row + r) % g;
        if (r == first + rows) {
            first = r;
            rows = rows_at_once(t->rows - r);
        }
        float *dst = q + first * padded + (r - first) * 16;
        const char *src = a->q + ((a->query_start[t->seq] + token) * a->q_row + head * a->q_head) * es;
        for (int64_t d = 0; d < padded; d += 16) {
            char tail[64];
            const char *part = whole_block(dt, src + d * es, a->dim - d, tail);
            store8(dst + d * rows, load_half(dt, part, 0) * scale);
            store8(dst + d * rows + 8, load_half(dt, part, 1) * scale);
        }
        visible(a, t->seq, token, lo + r, hi + r);
    }
}

/* Fills in the chunk that begins at `first` and ends at `end` or sooner. */
INLINE void locate(const Attention *a, const Tile *t, int64_t first, int64_t end, Chunk *c) {
    const int64_t es = elem_size(a->dt);
    const int32_t *table = a->tables + t->seq * a->max_blocks + first / a->block_size;
    int64_t slot = first % a->block_size, j = 0;
    c->first = first;
    c->n = min64(CHUNK, end - first);
    for (; j < c->n; table++, slot = 0) {
        const char *key = a->k + ((int64_t)*table * a->k_block + slot * a->k_token + t->kv_head * a->k_head) * es;
        const char *value = a->v + ((int64_t)*table * a->v_block + slot * a->v_token + t->kv_head * a->v_head) * es;
        for (; slot < a->block_size && j < c->n; slot++, j++, key += a->k_token * es, value += a->v_token * es) {
            c->k[j] = key;
            c->v[j] = value;
        }
    }
    for (; j < CHUNK; j++) {
        c->k[j] = c->k[0];
        c->v[j] = c->v[0];
    }
}

/* Copies a chunk together: rows of one head lie a multiple of a large power of two apart in the pages, where they evict
 * each other from L1 before the next query rows read them again. */
INLINE void copy_chunk(const Attention *a, Chunk *c, char *copy) {
    const int64_t k_size = a->dim * elem_size(a->dt), v_size = a->dim_v * elem_size(a->dt);
    for (int64_t j = 0; j < c->n; j++) {
        memcpy(copy, c->k[j], (size_t)k_size);
        c->k[j] = copy;
        memcpy(copy + k_size, c->v[j], (size_t)v_size);
        c->v[j] = copy + k_size;
        copy += k_size + v_size;
    }
}

/* One split of one tile into `p`. `copy` has room for a chunk of keys and values. */
static void attend_split(const Attention *a, const Tile *t, int64_t split, const float *q, const int64_t *lo,
                         const int64_t *hi, Partial *p, char *copy) {
    const int64_t pq = round16(a->dim), pv = round16(a->dim_v);
    const int64_t end = min64(t->hi, (split + 1) * SPLIT);
    for (int64_t r = 0; r < t->rows; r++) {
        p->max[r] = -INFINITY;
        p->sum[r] = 0;
    }
    memset(p->out, 0, (size_t)(t->rows * pv) * 4);
    const int64_t begin = max64(t->lo, split * SPLIT) / CHUNK * CHUNK;
    if (begin >= end) return;
    Chunk chunks[2], *now = chunks, *next = chunks + 1;
    locate(a, t, begin, end, next);
    for (int64_t c = begin; c < end; c += CHUNK) {
        Chunk *free = now;
        now = next;
        next = free;
        if (c + CHUNK < end) locate(a, t, c + CHUNK, end, next);
        else next = now;
        if (t->rows > 4) copy_chunk(a, now, copy);
        const Chunk *ahead = t->rows > 4 ? now : next;
        for (int64_t r = 0, rows; r < t->rows; r += rows) {
            float *out = p->out + r * pv;
            rows = rows_at_once(t->rows - r);
            if (rows == 4) step(a, 4, q + r * pq, now, ahead, lo + r, hi + r, p->max + r, p->sum + r, out);
            else if (rows == 2) step(a, 2, q + r * pq, now, ahead, lo + r, hi + r, p->max + r, p->sum + r, out);
            else step(a, 1, q + r * pq, now, ahead, lo + r, hi + r, p->max + r, p->sum + r, out);
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
        char *dst = a->out + (token * a->heads + head) * a->dim_v * elem_size(a->out_dt);
        for (int64_t d = 0; d < padded; d += 16)
            for (int half = 0; half < 2; half++)
                for (int lane = 0; lane < 8; lane++) {
                    const int64_t i = d + element_index(dt, half, lane);
                    const float value = p->out[r * padded + d + 8 * half + lane] * inverse;
                    if (i >= a->dim_v) continue;
                    if (a->out_dt == dt) store_one(dt, dst + i * es, value);
                    else memcpy(dst + i * 4, &value, 4);
                }
    }
}

/* Splits [first, last) of a tile: merged into one result when `whole`, else left in `scratch`. */
INLINE void attend(const Attention *a, int dt, const Tile *t, int64_t first, int64_t last, int whole, Partial *work,
                   Partial *scratch) {
    _Alignas(64) float q[MAX_TILE * MAX_DIM];
    int64_t lo[MAX_TILE], hi[MAX_TILE];
    char *copy = (char *)work + 2 * partial_size(a);
    load_queries(a, dt, t, q, lo, hi);
    if (!whole) {
        attend_split(a, t, first, q, lo, hi, scratch, copy);
        return;
    }
    Partial *next = (Partial *)((char *)work + partial_size(a));
    attend_split(a, t, first, q, lo, hi, work, copy);
    for (int64_t s = first + 1; s < last; s++) {
        attend_split(a, t, s, q, lo, hi, next, copy);
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

typedef struct {
    const Attention *a;
    Tile *tiles;
    Unit *units;
    char *memory, *scratch;
} Job;

INLINE Partial *partial_of(const Job *j, const Tile *t, int64_t split) {
    return (Partial *)(j->scratch + partial_size(j->a) * (size_t)(t->scratch + split));
}

/* What threads call: the element type becomes a constant here. */
static void unit_share(void *context, int64_t i, int thread) {
    const Job *j = context;
    const Attention *a = j->a;
    const Tile *t = j->tiles + j->units[i].tile;
    const int64_t split = j->units[i].split, last = t->split0 + t->splits;
    const int whole = split < 0;
    const int64_t first = t->split0 + (whole ? 0 : split);
    Partial *work = (Partial *)(j->memory + work_size(a) * (size_t)thread);
    Partial *into = whole ? NULL : partial_of(j, t, split);
    if (a->dt == DT_BF16) attend(a, DT_BF16, t, first, last, whole, work, into);
    else if (a->dt == DT_FP16) attend(a, DT_FP16, t, first, last, whole, work, into);
    else attend(a, DT_FP32, t, first, last, whole, work, into);
}

static void merge_share(void *context, int64_t i, int thread) {
    const Job *j = context;
    const Tile *t = j->tiles + i;
    if (t->scratch < 0) return;
    for (int64_t s = 1; s < t->splits; s++) merge(j->a, t->rows, partial_of(j, t, 0), partial_of(j, t, s));
    finish(j->a, j->a->dt, t, partial_of(j, t, 0));
}

static int run(const Attention *a, int threads) {
    const int64_t count = plan(a, NULL);
    if (count == 0) return 0;
    const size_t size = partial_size(a);
    int64_t partials = 0;
    Tile *tiles = malloc((size_t)count * sizeof(Tile));
    if (!tiles) return 1;
    plan(a, tiles);
    const int64_t n = cut(tiles, count, threads, NULL, &partials);
    Unit *units = malloc((size_t)n * sizeof(Unit));
    char *memory = aligned_alloc(64, size * (size_t)partials + work_size(a) * (size_t)threads);
    int status = !units || !memory;
    if (!status) {
        cut(tiles, count, threads, units, &partials);
        Job job = {a, tiles, units, memory, memory + work_size(a) * (size_t)threads};
        vrm_parallel(unit_share, &job, n, threads);
        if (partials > 0) vrm_parallel(merge_share, &job, count, threads);
    }
    free(memory);
    free(units);
    free(tiles);
    return status;
}

/* `sizes`: seqs, heads, kv_heads, dim, dim_v, block_size, max_blocks, window. `strides` (elements): q row, q head, then
 * block, token and head of K, then of V. Returns 0, or 1 when scratch memory could not be had.
 *
 * With `row_lo` and `row_hi`, keys are those that lie at one place: row r sees those numbered [row_lo[r], row_hi[r]),
 * whatever `window` and its position say; both ascend with the rows of a sequence. `out` is fp32 then, for a merge. */
EXPORT int vrm_paged_attention(int dt, const int64_t *sizes, const int64_t *strides, const void *q, const void *k,
                               const void *v, const int32_t *tables, const int32_t *query_start,
                               const int32_t *seq_lens, const int32_t *row_lo, const int32_t *row_hi,
                               const float *sinks, float scale, float softcap, void *out, float *lse, int threads) {
    const Attention a = {
        .dt = dt, .seqs = sizes[0], .heads = sizes[1], .kv_heads = sizes[2], .dim = sizes[3], .dim_v = sizes[4],
        .block_size = sizes[5], .max_blocks = sizes[6], .window = sizes[7], .q_row = strides[0], .q_head = strides[1],
        .k_block = strides[2], .k_token = strides[3], .k_head = strides[4], .v_block = strides[5],
        .v_token = strides[6], .v_head = strides[7], .q = q, .k = k, .v = v, .tables = tables,
        .query_start = query_start, .seq_lens = seq_lens, .row_lo = row_lo, .row_hi = row_hi, .sinks = sinks,
        .scale = scale, .softcap = softcap, .out = out, .out_dt = row_lo ? DT_FP32 : dt, .lse = lse,
    };
    return a.dim > MAX_DIM ? 2 : run(&a, threads);
}
