/* y[M,N] = x[M,K] W[N,K]^T + bias[N], accumulated in fp32.
 *
 * Rows of x are widened to fp32 once; weights are widened in registers as they stream by. The sum over K runs in
 * fixed chunks of KC, each chunk in eight lanes, whatever M, N or the number of threads: a row of y never depends on
 * its neighbours.
 */
#include "common.h"

#define KC 512            /* elements of K per partial sum (a multiple of 16) */
#define BLOCKS (KC / 16)  /* 16-element blocks in it */
#define ROW_TILE 4        /* rows of x per micro-kernel */
#define COL_TILE 3        /* rows of W per micro-kernel: 4 x 3 accumulators fit 16 registers */
#define COL_CHUNK 96      /* rows of W kept in L2 while the rows of x pass over them */
#define ROW_CHUNK 8       /* rows of x kept in L1 meanwhile */
#define MAX_ROWS 64       /* rows of x per pass over the weights */

typedef struct {
    int dt;
    int64_t m, n, k, ldx, ldw, ldy; /* leading dimensions in elements */
    const char *x, *w, *bias;
    char *y;
    float *packed; /* fp32 x: per ROW_TILE rows, per block, per row, 16 values */
    int64_t blocks; /* ceil(k / 16) */
} Linear;

INLINE int64_t linear_tile_rows(const Linear *p, int64_t row) { return min64(ROW_TILE, p->m - row); }

/* Widens rows [row, row + rows) of x; elements past K become zero. */
INLINE void pack_rows(const Linear *p, int dt, int64_t row, int64_t rows) {
    const int64_t es = elem_size(dt), full = p->k / 16;
    float *dst = p->packed + row * p->blocks * 16;
    for (int64_t r = 0; r < rows; r++) {
        const char *src = p->x + (row + r) * p->ldx * es;
        for (int64_t b = 0; b < p->blocks; b++) {
            char tail[64];
            const char *block = src + b * 16 * es;
            if (b >= full) {
                copy_tail(dt, tail, block, p->k - b * 16);
                block = tail;
            }
            float *out = dst + (b * rows + r) * 16;
            store8(out, load_half(dt, block, 0));
            store8(out + 8, load_half(dt, block, 1));
        }
    }
}

/* acc[r][c] += x[r] . w[c] over `blocks` blocks of 16. */
INLINE void dot_blocks(int dt, int rows, int cols, const float *xp, const char *const *w, int64_t blocks,
                       v8f acc[ROW_TILE][4]) {
    const int64_t step = 16 * elem_size(dt);
    for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            v8f wide[4];
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++) wide[c] = load_half(dt, w[c] + b * step, half);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                v8f xv = load8(xp + (b * rows + r) * 16 + 8 * half);
#pragma GCC unroll 4
                for (int c = 0; c < cols; c++) acc[r][c] = fma8(xv, wide[c], acc[r][c]);
            }
        }
    }
}

/* One partial sum: chunk `kb` of K for `rows` rows from `row` and `cols` columns from `col`. */
INLINE void dot_chunk(const Linear *p, int dt, int rows, int cols, int64_t row, int64_t col, int64_t kb,
                      v8f acc[ROW_TILE][4]) {
    const int64_t es = elem_size(dt), first = kb * BLOCKS;
    const int64_t whole = min64(p->k / 16, first + BLOCKS) - first; /* blocks that need no padding */
    const float *xp = p->packed + row * p->blocks * 16 + first * rows * 16;
    const char *w[4];
#pragma GCC unroll 4
    for (int c = 0; c < cols; c++) w[c] = p->w + ((col + c) * p->ldw + first * 16) * es;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) acc[r][c] = splat8(0.0f);
    dot_blocks(dt, rows, cols, xp, w, whole, acc);
    if (first + whole < min64(p->blocks, first + BLOCKS)) {
        char tail[4][64];
        const char *t[4];
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) {
            copy_tail(dt, tail[c], w[c] + whole * 16 * es, p->k - (first + whole) * 16);
            t[c] = tail[c];
        }
        dot_blocks(dt, rows, cols, xp + whole * rows * 16, t, 1, acc);
    }
}

INLINE void put(const Linear *p, int dt, int64_t row, int64_t col, float sum) {
    const int64_t es = elem_size(dt);
    if (p->bias) sum += load_one(dt, p->bias + col * es);
    store_one(dt, p->y + (row * p->ldy + col) * es, sum);
}

/* One row of x: columns [c0, c1), four at a time, streaming each row of W from end to end. */
INLINE void gemv(const Linear *p, int dt, int64_t c0, int64_t c1) {
    const int64_t chunks = (p->blocks + BLOCKS - 1) / BLOCKS;
    v8f acc[ROW_TILE][4];
    int64_t col = c0;
    for (; col + 4 <= c1; col += 4) {
        v4f sum = {0, 0, 0, 0};
        for (int64_t kb = 0; kb < chunks; kb++) {
            dot_chunk(p, dt, 1, 4, 0, col, kb, acc);
            sum += lane_sums(acc[0][0], acc[0][1], acc[0][2], acc[0][3]);
        }
        for (int c = 0; c < 4; c++) put(p, dt, 0, col + c, sum[c]);
    }
    for (; col < c1; col++) {
        float sum = 0;
        for (int64_t kb = 0; kb < chunks; kb++) {
            dot_chunk(p, dt, 1, 1, 0, col, kb, acc);
            sum += lane_sums(acc[0][0], acc[0][0], acc[0][0], acc[0][0])[0];
        }
        put(p, dt, 0, col, sum);
    }
}

/* Adds one micro-tile to sums[(col, row)]; the four rows of a column lie together. */
INLINE void tile(const Linear *p, int dt, int rows, int cols, int64_t row, int64_t col, int64_t kb, float *sums,
                 int64_t stride) {
    v8f acc[ROW_TILE][4];
    dot_chunk(p, dt, rows, cols, row, col, kb, acc);
#pragma GCC unroll 4
    for (int c = 0; c < cols; c++) {
        v4f s = lane_sums(acc[0][c], acc[rows > 1 ? 1 : 0][c], acc[rows > 2 ? 2 : 0][c], acc[rows > 3 ? 3 : 0][c]);
        v4f_u *out = (v4f_u *)(sums + c * stride);
        *out += s;
    }
}

/* Rows [row, row + rows) of x, at most ROW_CHUNK, against `cols` columns: the weights stay in L1 from tile to tile. */
INLINE void tile_rows(const Linear *p, int dt, int cols, int64_t row, int64_t end, int64_t col, int64_t kb, float *sums,
                      int64_t stride) {
    for (; row < end; row += ROW_TILE, sums += ROW_TILE) {
        switch (linear_tile_rows(p, row)) {
        case 4: tile(p, dt, 4, cols, row, col, kb, sums, stride); break;
        case 3: tile(p, dt, 3, cols, row, col, kb, sums, stride); break;
        case 2: tile(p, dt, 2, cols, row, col, kb, sums, stride); break;
        default: tile(p, dt, 1, cols, row, col, kb, sums, stride);
        }
    }
}

/* Rows [r0, r1) (r0 a multiple of ROW_TILE) and columns [c0, c1), at most COL_CHUNK of them. `sums` holds
 * COL_CHUNK x (r1 - r0, rounded up to ROW_TILE) floats. */
INLINE void block(const Linear *p, int dt, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float *sums) {
    const int64_t chunks = (p->blocks + BLOCKS - 1) / BLOCKS;
    const int64_t stride = (r1 - r0 + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    memset(sums, 0, (size_t)(stride * (c1 - c0)) * sizeof(float));
    for (int64_t kb = 0; kb < chunks; kb++)
        for (int64_t row = r0; row < r1; row += ROW_CHUNK) {
            const int64_t end = min64(r1, row + ROW_CHUNK);
            int64_t col = c0;
            for (; col + COL_TILE <= c1; col += COL_TILE)
                tile_rows(p, dt, COL_TILE, row, end, col, kb, sums + (col - c0) * stride + row - r0, stride);
            for (; col < c1; col++)
                tile_rows(p, dt, 1, row, end, col, kb, sums + (col - c0) * stride + row - r0, stride);
        }
    for (int64_t row = r0; row < r1; row++)
        for (int64_t col = c0; col < c1; col++) put(p, dt, row, col, sums[(col - c0) * stride + row - r0]);
}

/* First column of share `i` of `parts`, a multiple of the column tiles. */
INLINE int64_t share(int64_t n, int64_t i, int64_t parts) {
    return i == parts ? n : n * i / parts / (4 * COL_TILE) * (4 * COL_TILE);
}

INLINE void run(const Linear *p, int dt, int threads) {
    if (p->m == 1) {
        pack_rows(p, dt, 0, 1);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
        for (int t = 0; t < threads; t++) gemv(p, dt, share(p->n, t, threads), share(p->n, t + 1, threads));
        return;
    }
    const int64_t row_tiles = (p->m + ROW_TILE - 1) / ROW_TILE;
    const int64_t height = min64(p->m, MAX_ROWS), bands = (p->m + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t col_chunks = (p->n + COL_CHUNK - 1) / COL_CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *sums = aligned_alloc(64, (size_t)((height + ROW_TILE - 1) / ROW_TILE * ROW_TILE * COL_CHUNK) * 4);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < row_tiles; i++) pack_rows(p, dt, i * ROW_TILE, linear_tile_rows(p, i * ROW_TILE));
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t band = 0; band < bands; band++)
            for (int64_t i = 0; i < col_chunks; i++)
                block(p, dt, band * MAX_ROWS, min64(p->m, (band + 1) * MAX_ROWS), i * COL_CHUNK,
                      min64(p->n, (i + 1) * COL_CHUNK), sums);
        free(sums);
    }
}

/* Returns 0, or 1 when scratch memory could not be had. Leading dimensions are in elements; `bias` may be NULL. */
EXPORT int vrm_linear(int dt, int64_t m, int64_t n, int64_t k, const void *x, int64_t ldx, const void *w, int64_t ldw,
                      const void *bias, void *y, int64_t ldy, int threads) {
    Linear p = {dt, m, n, k, ldx, ldw, ldy, x, w, bias, y, NULL, (k + 15) / 16};
    if (m < 1 || n < 1) return 0;
    p.packed = aligned_alloc(64, (size_t)(m * p.blocks * 64 + 64) / 64 * 64);
    if (!p.packed) return 1;
    if (dt == DT_BF16) run(&p, DT_BF16, threads);
    else if (dt == DT_FP16) run(&p, DT_FP16, threads);
    else run(&p, DT_FP32, threads);
    free(p.packed);
    return 0;
}
