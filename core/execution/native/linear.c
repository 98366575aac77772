/* y[M,N] = x[M,K] W[N,K]^T + bias[N], accumulated in fp32.
 *
 * Rows of x are widened to fp32 once; weights are widened in registers as they stream by. The sum over K runs in
 * fixed chunks of KC, each chunk in eight lanes, whatever M, N or the number of threads: a row of y never depends on
 * its neighbours.
 */
#include "common.h"
#include "kernels.h"
#include "pool.h"
#include "quantized.h"

#define KC 512            /* elements of K per partial sum (a multiple of 16) */
#define BLOCKS (KC / 16)  /* 16-element blocks in it */
#define ROW_TILE 4        /* rows of x per micro-kernel */
#define COL_TILE 3        /* rows of W per micro-kernel: 4 x 3 accumulators fit 16 registers */
#define COL_CHUNK 96      /* rows of W kept in L2 while the rows of x pass over them */
#define NUMBERS 24        /* rows of a quantized W that are numbers at a time */
#define TILE_CHUNK 2      /* row tiles kept in L1 meanwhile */
#define PREFETCH 1024     /* bytes ahead, when W is streamed */
#define SMALL (1 << 16)   /* multiplications that are not worth waking a second thread */
#define SHARES 4         /* of the columns per thread, so that a late thread holds up little */
#define MIN_SHARE 32     /* columns worth a share of their own */
#define MAX_ROWS 64       /* rows of x per pass over the weights */

typedef struct {
    int dt;
    int64_t m, n, k, ldx, ldw, ldy; /* leading dimensions in elements */
    const char *x, *w, *bias;
    char *y;
    float *packed; /* fp32 x: per ROW_TILE rows, per block, per row, 16 values */
    float *sums;   /* per thread, MAX_ROWS x COL_CHUNK */
    int64_t blocks; /* ceil(k / 16) */
    int64_t shares; /* of the columns, when W is streamed */
    int64_t col_chunk;
    const Quantized *quantized; /* then W is made of it, some rows at a time, in `numbers`, which each thread has */
    char *numbers;
} Linear;

INLINE int64_t numbers_bytes(const Linear *p) { return round64(NUMBERS * p->ldw * elem_size(p->dt)); }

/* `p` with columns [c0, c1) of a quantized W as numbers. */
static Linear with_numbers(const Linear *p, int64_t c0, int64_t c1, int thread) {
    Linear there = *p;
    if (!p->quantized) return there;
    char *rows = p->numbers + thread * numbers_bytes(p);
    const int64_t step = p->ldw * elem_size(p->dt);
    vrm_dequantize(p->quantized, p->dt, c0, c1 - c0, 0, p->k, rows, step);
    there.w = rows - c0 * step;
    return there;
}

/* Rows are dealt out in bands of MAX_ROWS, and a band's rows evenly to its tiles: 5 rows are 2 + 3, not 4 + 1. */
INLINE int64_t band_rows(const Linear *p, int64_t band) { return min64(MAX_ROWS, p->m - band * MAX_ROWS); }
INLINE int64_t band_tiles(const Linear *p, int64_t band) { return (band_rows(p, band) + ROW_TILE - 1) / ROW_TILE; }
INLINE int64_t tile_row(const Linear *p, int64_t band, int64_t i) {
    return band * MAX_ROWS + band_rows(p, band) * i / band_tiles(p, band);
}

/* Widens rows [row, row + rows) of x; elements past K become zero. */
INLINE void pack_rows(const Linear *p, int dt, int64_t row, int64_t rows) {
    const int64_t es = elem_size(dt);
    float *dst = p->packed + row * p->blocks * 16;
    for (int64_t r = 0; r < rows; r++) {
        const char *src = p->x + (row + r) * p->ldx * es;
        for (int64_t b = 0; b < p->blocks; b++) {
            char tail[64];
            const char *block = whole_block(dt, src + b * 16 * es, p->k - b * 16, tail);
            float *out = dst + (b * rows + r) * 16;
            store8(out, load_half(dt, block, 0));
            store8(out + 8, load_half(dt, block, 1));
        }
    }
}

/* acc[r][c] += x[r] . w[c] over one half of each of `blocks` blocks of 16. What the next tile needs lies `ahead`. */
INLINE void dot_half(int dt, int half, int rows, int cols, const float *xp, const char *const *w, int64_t blocks,
                     int64_t ahead, v8f acc[ROW_TILE][COL_TILE]) {
    const int64_t step = 16 * elem_size(dt);
    for (int64_t b = 0; b < blocks; b++) {
        v8f wide[COL_TILE];
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) {
            wide[c] = load_half(dt, w[c] + b * step, half);
            if (half == 0) __builtin_prefetch(w[c] + b * step + ahead);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            v8f xv = load8(xp + (b * rows + r) * 16 + 8 * half);
            IN_REGISTER(xv);
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++) acc[r][c] = fma8(xv, wide[c], acc[r][c]);
        }
    }
}

/* One partial sum: chunk `kb` of K for `rows` rows from `row` and `cols` columns from `col`. */
INLINE void dot_chunk(const Linear *p, int dt, int rows, int cols, int64_t row, int64_t col, int64_t kb,
                      v8f acc[2][ROW_TILE][COL_TILE]) {
    const int64_t es = elem_size(dt), first = kb * BLOCKS;
    const int64_t whole = min64(p->k / 16, first + BLOCKS) - first; /* blocks that need no padding */
    const int padded = first + whole < min64(p->blocks, first + BLOCKS);
    const float *xp = p->packed + row * p->blocks * 16 + first * rows * 16;
    const char *w[COL_TILE], *t[COL_TILE];
    char tail[COL_TILE][64];
#pragma GCC unroll 4
    for (int c = 0; c < cols; c++) {
        w[c] = p->w + ((col + c) * p->ldw + first * 16) * es;
        t[c] = tail[c];
        if (padded) copy_tail(dt, tail[c], w[c] + whole * 16 * es, p->k - (first + whole) * 16);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        v8f sum[ROW_TILE][COL_TILE];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++) sum[r][c] = splat8(0.0f);
        dot_half(dt, half, rows, cols, xp, w, whole, cols * p->ldw * es, sum);
        if (padded) dot_half(dt, half, rows, cols, xp + whole * rows * 16, t, 1, 0, sum);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++) acc[half][r][c] = sum[r][c];
    }
}

INLINE void put(const Linear *p, int dt, int64_t row, int64_t col, float sum) {
    const int64_t es = elem_size(dt);
    if (p->bias) sum += load_one(dt, p->bias + col * es);
    store_one(dt, p->y + (row * p->ldy + col) * es, sum);
}

INLINE void put_eight(const Linear *p, int dt, int64_t row, int64_t col, const float *sums, int64_t stride) {
    const int64_t es = elem_size(dt);
    v8f v;
    for (int i = 0; i < 8; i++) v[i] = sums[i * stride];
    if (p->bias)
        for (int i = 0; i < 8; i++) v[i] += load_one(dt, p->bias + (col + i) * es);
    store_eight(dt, p->y + (row * p->ldy + col) * es, v);
}

/* acc[r][half] += x[r] . w over `blocks` blocks: one row of W read in order, the fastest way through memory. */
INLINE void stream_blocks(int dt, int rows, const float *xp, const char *w, int64_t blocks, v8f acc[ROW_TILE][2]) {
    const int64_t step = 16 * elem_size(dt);
#pragma GCC unroll 2
    for (int64_t b = 0; b < blocks; b++) {
        if (dt == DT_FP32 || b % 2 == 0) __builtin_prefetch(w + b * step + PREFETCH);
        const v8f w0 = load_half(dt, w + b * step, 0), w1 = load_half(dt, w + b * step, 1);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            acc[r][0] = fma8(load8(xp + (b * rows + r) * 16), w0, acc[r][0]);
            acc[r][1] = fma8(load8(xp + (b * rows + r) * 16 + 8), w1, acc[r][1]);
        }
    }
}

/* At most ROW_TILE rows of x: columns [c0, c1) one after the other. */
INLINE void stream(const Linear *p, int dt, int rows, int64_t c0, int64_t c1) {
    const int64_t es = elem_size(dt), full = p->k / 16;
    for (int64_t col = c0; col < c1; col++) {
        const char *w = p->w + col * p->ldw * es;
        v4f total = {0, 0, 0, 0};
        for (int64_t first = 0; first < p->blocks; first += BLOCKS) {
            const float *xp = p->packed + first * rows * 16;
            const int64_t whole = min64(full, first + BLOCKS) - first;
            v8f acc[ROW_TILE][2];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = splat8(0.0f);
            stream_blocks(dt, rows, xp, w + first * 16 * es, whole, acc);
            if (first + whole < min64(p->blocks, first + BLOCKS)) {
                char tail[64 + PREFETCH];
                copy_tail(dt, tail, w + full * 16 * es, p->k - full * 16);
                stream_blocks(dt, rows, xp + whole * rows * 16, tail, 1, acc);
            }
            const v8f s0 = acc[0][0] + acc[0][1], s1 = rows > 1 ? acc[1][0] + acc[1][1] : s0;
            const v8f s2 = rows > 2 ? acc[2][0] + acc[2][1] : s0, s3 = rows > 3 ? acc[3][0] + acc[3][1] : s0;
            total += lane_sums(s0, s1, s2, s3);
        }
        for (int r = 0; r < rows; r++) put(p, dt, r, col, total[r]);
    }
}

/* Adds one micro-tile to sums[(col, row)]; the four rows of a column lie together. */
INLINE void tile(const Linear *p, int dt, int rows, int cols, int64_t row, int64_t col, int64_t kb, float *sums,
                 int64_t stride) {
    v8f acc[2][ROW_TILE][COL_TILE];
    dot_chunk(p, dt, rows, cols, row, col, kb, acc);
#pragma GCC unroll 4
    for (int c = 0; c < cols; c++) {
        v8f s[ROW_TILE];
#pragma GCC unroll 4
        for (int r = 0; r < ROW_TILE; r++) s[r] = acc[0][r < rows ? r : 0][c] + acc[1][r < rows ? r : 0][c];
        v4f_u *out = (v4f_u *)(sums + c * stride);
        *out += lane_sums(s[0], s[1], s[2], s[3]);
    }
}

/* Tiles [first, last) of a band against `cols` columns: the weights stay in L1 from tile to tile. */
INLINE void tile_rows(const Linear *p, int dt, int cols, int64_t band, int64_t first, int64_t last, int64_t col,
                      int64_t kb, float *sums, int64_t stride) {
    for (int64_t i = first; i < last; i++) {
        const int64_t row = tile_row(p, band, i);
        float *out = sums + i * ROW_TILE;
        switch (tile_row(p, band, i + 1) - row) {
        case 4: tile(p, dt, 4, cols, row, col, kb, out, stride); break;
        case 3: tile(p, dt, 3, cols, row, col, kb, out, stride); break;
        case 2: tile(p, dt, 2, cols, row, col, kb, out, stride); break;
        default: tile(p, dt, 1, cols, row, col, kb, out, stride);
        }
    }
}

/* Columns [c0, c1), at most COL_CHUNK of them, for the rows of a band. */
INLINE void block(const Linear *p, int dt, int64_t band, int64_t c0, int64_t c1, float *sums) {
    const int64_t chunks = (p->blocks + BLOCKS - 1) / BLOCKS, tiles = band_tiles(p, band), stride = tiles * ROW_TILE;
    memset(sums, 0, (size_t)(stride * (c1 - c0)) * sizeof(float));
    for (int64_t kb = 0; kb < chunks; kb++)
        for (int64_t i = 0; i < tiles; i += TILE_CHUNK) {
            const int64_t end = min64(tiles, i + TILE_CHUNK);
            int64_t col = c0;
            for (; col + COL_TILE <= c1; col += COL_TILE)
                tile_rows(p, dt, COL_TILE, band, i, end, col, kb, sums + (col - c0) * stride, stride);
            for (; col < c1; col++) tile_rows(p, dt, 1, band, i, end, col, kb, sums + (col - c0) * stride, stride);
        }
    for (int64_t i = 0; i < tiles; i++)
        for (int64_t row = tile_row(p, band, i); row < tile_row(p, band, i + 1); row++) {
            const float *in = sums + i * ROW_TILE + row - tile_row(p, band, i);
            int64_t col = c0;
            for (; col + 8 <= c1; col += 8) put_eight(p, dt, row, col, in + (col - c0) * stride, stride);
            for (; col < c1; col++) put(p, dt, row, col, in[(col - c0) * stride]);
        }
}

/* First column of share `i` of `parts`, a multiple of the column tiles. */
INLINE int64_t share(int64_t n, int64_t i, int64_t parts) {
    return i == parts ? n : n * i / parts / COL_TILE * COL_TILE;
}

/* What threads call: the element type becomes a constant here. */
static void pack_any(const Linear *p, int64_t row, int64_t end) {
    if (p->dt == DT_BF16) pack_rows(p, DT_BF16, row, end - row);
    else if (p->dt == DT_FP16) pack_rows(p, DT_FP16, row, end - row);
    else pack_rows(p, DT_FP32, row, end - row);
}

INLINE void stream_rows(const Linear *p, int dt, int64_t c0, int64_t c1) {
    if (p->m == 1) stream(p, dt, 1, c0, c1);
    else if (p->m == 2) stream(p, dt, 2, c0, c1);
    else if (p->m == 3) stream(p, dt, 3, c0, c1);
    else stream(p, dt, 4, c0, c1);
}

static void stream_columns(const Linear *p, int64_t c0, int64_t c1) {
    if (p->dt == DT_BF16) stream_rows(p, DT_BF16, c0, c1);
    else if (p->dt == DT_FP16) stream_rows(p, DT_FP16, c0, c1);
    else stream_rows(p, DT_FP32, c0, c1);
}

static void stream_share(void *context, int64_t i, int thread) {
    const Linear *p = context;
    const int64_t end = share(p->n, i + 1, p->shares);
    for (int64_t c0 = share(p->n, i, p->shares), c1; c0 < end; c0 = c1) {
        c1 = p->quantized ? min64(end, c0 + NUMBERS) : end;
        const Linear there = with_numbers(p, c0, c1, thread);
        stream_columns(&there, c0, c1);
    }
}

static void pack_share(void *context, int64_t i, int thread) {
    const Linear *p = context;
    const int64_t per_band = MAX_ROWS / ROW_TILE + 1, band = i / per_band, tile = i % per_band;
    if (tile < band_tiles(p, band)) pack_any(p, tile_row(p, band, tile), tile_row(p, band, tile + 1));
}

static void block_share(void *context, int64_t i, int thread) {
    const Linear *whole = context;
    const int64_t chunk = whole->col_chunk, col_chunks = (whole->n + chunk - 1) / chunk, band = i / col_chunks;
    const int64_t c0 = i % col_chunks * chunk, c1 = min64(whole->n, c0 + chunk);
    float *sums = whole->sums + (int64_t)thread * MAX_ROWS * COL_CHUNK;
    const Linear there = with_numbers(whole, c0, c1, thread), *p = &there;
    if (p->dt == DT_BF16) block(p, DT_BF16, band, c0, c1, sums);
    else if (p->dt == DT_FP16) block(p, DT_FP16, band, c0, c1, sums);
    else block(p, DT_FP32, band, c0, c1, sums);
}

EXPORT int vrm_linear(const Weights *w, int64_t m, const void *x, int64_t ldx, void *y, int threads) {
    if (w->exponents) {
        char *to = y;
        return vrm_packed_linears(&w, 1, m, x, ldx, &to, threads);
    }
    if (w->quantized && w->quantized->panels) {
        char *to = y;
        return vrm_panel_linears(&w, 1, m, x, ldx, &to, threads);
    }
    if (w->type == DT_BF16 && vrm_half_products()) {
        char *to = y;
        return vrm_half_linears(&w, 1, m, x, ldx, &to, threads);
    }
    const int64_t blocks = (w->k + 15) / 16, packed = m * blocks * 16;
    if (m < 1 || w->n < 1) return 0;
    if (m * w->n * w->k < SMALL) threads = 1;
    const int64_t sums = m > ROW_TILE ? (int64_t)threads * MAX_ROWS * COL_CHUNK : 0;
    const int64_t ld = w->quantized ? blocks * 16 : w->ld;
    const int64_t numbers = w->quantized ? threads * round64(NUMBERS * ld * elem_size((int)w->type)) : 0;
    float *memory = aligned_alloc(64, (size_t)(round64((packed + sums) * 4) + numbers));
    if (!memory) return 1;
    Linear p = {.dt = (int)w->type, .m = m, .n = w->n, .k = w->k, .ldx = ldx, .ldw = ld, .ldy = w->n, .x = x,
                .w = w->weight, .bias = w->bias, .y = y, .packed = memory, .sums = memory + packed, .blocks = blocks,
                .col_chunk = w->quantized ? NUMBERS : COL_CHUNK, .quantized = w->quantized,
                .numbers = (char *)memory + round64((packed + sums) * 4)};
    if (m <= ROW_TILE) {
        pack_any(&p, 0, m);
        p.shares = max64(1, min64(threads * SHARES, p.n / MIN_SHARE));
        vrm_parallel(stream_share, &p, p.shares, threads);
    } else {
        const int64_t bands = (m + MAX_ROWS - 1) / MAX_ROWS, col_chunks = (p.n + p.col_chunk - 1) / p.col_chunk;
        vrm_parallel(pack_share, &p, bands * (MAX_ROWS / ROW_TILE + 1), threads);
        vrm_parallel(block_share, &p, bands * col_chunks, threads);
    }
    free(memory);
    return 0;
}

int vrm_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y, int threads) {
    int packed = 0, halves = 0, panels = 0, status = 0;
    for (int i = 0; i < count; i++) {
        panels += w[i]->quantized && w[i]->quantized->panels;
        packed += w[i]->exponents != NULL;
        halves += w[i]->exponents == NULL && w[i]->type == DT_BF16;
    }
    if (panels == count) return vrm_panel_linears(w, count, m, x, ldx, y, threads);
    if (halves == count && vrm_half_products()) return vrm_half_linears(w, count, m, x, ldx, y, threads);
    if (packed == count) return vrm_packed_linears(w, count, m, x, ldx, y, threads);
    for (int i = 0; i < count && !status; i++) status = vrm_linear(w[i], m, x, ldx, y[i], threads);
    return status;
}
