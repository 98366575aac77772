/* y[M,N] = x[M,K] W[N,K]^T + bias[N] in bf16, by the processor's own products of bf16 pairs; W stays as it is.
 *
 * Such an instruction multiplies two neighbours of K at a time and adds both to an fp32 sum, in the order of K. There
 * are two kinds:
 *
 * - AVX-512 (`vdpbf16ps`): 16 lanes along K, whose sums are added at the end.
 * - AMX (`tdpbf16ps`): tiles of 16 rows of 64 bytes. 16 rows of W, as they lie in memory, are one operand; the other is
 *   x, rearranged: for each pair of K, the pair of each of 16 rows of x. The result is [16 of N, 16 of M].
 *
 * Which is used depends on the processor alone. A sum has the same order whatever M, N or the number of threads: a row of
 * y never depends on its neighbours. Where rows, columns or elements of K are missing at an edge there are zeros. Rows of
 * a quantized W become numbers in a thread's own memory just before.
 */
#include "common.h"
#include "kernels.h"
#include "pool.h"
#include "quantized.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

#define LINE 32          /* elements of K in 64 bytes */
#define SIDE 16          /* rows of a tile */
#define TILE_BYTES 1024
#define UNIT 32          /* columns of y that are computed together */
#define BAND 256         /* rows of x that a unit of W is multiplied with before the next unit */
#define DIRECT 32        /* rows of x up to which W is multiplied where it lies */
#define ROWS 4           /* of x and of W in the inner loop of AVX-512 */
#define SHARES 8         /* of the units per thread, so that a late thread holds up little */
#define SMALL (1 << 16)  /* multiplications that are not worth waking a second thread */
#define AHEAD 192        /* bytes of a row of W that are fetched ahead */

static int tiles_allowed;

/* Linux lets a process use tiles once it has asked. */
__attribute__((constructor)) static void ask_for_tiles(void) {
#if HAS_TILES
    const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    tiles_allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
}

typedef struct {
    const Weights *const *w;
    char *const *y;
    int count;
    int64_t m, k, ldx, lines; /* lines: of 32 elements in a row, the last perhaps short */
    const char *x;
    char *tiles;   /* x as tiles: per 16 rows, per line, 1 KiB; NULL without AMX */
    char *scratch; /* per thread */
    int64_t scratch_bytes, units, shares, bands;
} Halves;

/* Bytes from a row of numbers to the next; never a multiple of a page, so that 16 rows are not in each other's way in the
 * cache. */
INLINE int64_t row_step(int64_t lines) { return (lines | 1) * 64; }

INLINE int64_t units_of(const Weights *w) { return (w->n + UNIT - 1) / UNIT; }

/* Lanes from 0 to below `count`, at most 32. */
INLINE __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << count) - 1; }

INLINE __m512 bf16_bias(const Weights *w, int64_t col, __mmask16 lanes) {
    if (!w->bias) return _mm512_setzero_ps();
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, w->bias + col * 2);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Columns [col, col + 16), as far as there are, of a row of y: sums rounded to nearest even, as torch does. */
INLINE void put(const Weights *w, char *y, int64_t row, int64_t col, __m512 sums) {
    const __mmask16 lanes = (__mmask16)first_lanes(min64(SIDE, w->n - col));
    const __m512 v = _mm512_add_ps(sums, bf16_bias(w, col, lanes));
    const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), 0x7fc0);
    _mm256_mask_storeu_epi16(y + (row * w->n + col) * 2, lanes, _mm512_cvtepi32_epi16(rounded));
}

/* A unit of a quantized W as numbers, zeros where there are none, `step` bytes from row to row. */
static void dequantize_unit(const Halves *p, const Weights *w, int64_t col, char *rows, int64_t step) {
    const int64_t count = min64(UNIT, w->n - col), rest = p->k % LINE;
    vrm_dequantize(w->quantized, DT_BF16, col, count, 0, p->k, rows, step);
    if (rest)
        for (int64_t r = 0; r < count; r++) memset(rows + r * step + p->k * 2, 0, (size_t)((LINE - rest) * 2));
    memset(rows + count * step, 0, (size_t)((UNIT - count) * step));
}

/* ---- AVX-512 ---- */

typedef __m512 Sums[ROWS][ROWS];

/* sums[r][c] += x[r] . W[c] over a line of `rows` rows of x and `cols` of W, `lanes` elements of it. */
INLINE void add_line(int rows, int cols, const char *x, int64_t x_step, const char *w, int64_t w_step, __mmask32 lanes,
                     Sums sums) {
    __m512bh line[ROWS];
#pragma GCC unroll 4
    for (int c = 0; c < cols; c++) line[c] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, w + c * w_step);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const __m512bh xs = (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + r * x_step);
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], xs, line[c]);
    }
}

/* sums[r][c] = x[r] . W[c] for `rows` rows of x and `cols` of W. */
INLINE void dot(const Halves *p, const Weights *w, int rows, int cols, int64_t row, int64_t col,
                float sums[ROWS][SIDE], int at) {
    Sums acc;
    const int64_t x_step = p->ldx * 2, w_step = w->ld * 2, whole = p->k / LINE;
    const char *x = p->x + row * x_step, *ws = w->weight + col * w_step;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) acc[r][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i++) {
        if (row == 0)
#pragma GCC unroll 4
            for (int c = 0; c < cols; c++) __builtin_prefetch(ws + c * w_step + i * 64 + AHEAD);
        add_line(rows, cols, x + i * 64, x_step, ws + i * 64, w_step, ~(__mmask32)0, acc);
    }
    if (whole < p->lines)
        add_line(rows, cols, x + whole * 64, x_step, ws + whole * 64, w_step, first_lanes(p->k - whole * LINE), acc);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) sums[r][at + c] = _mm512_reduce_add_ps(acc[r][c]);
}

INLINE void dot_rows(const Halves *p, const Weights *w, int rows, char *y, int64_t row, int64_t col) {
    float sums[ROWS][SIDE] = {{0}};
    const int64_t cols = min64(SIDE, w->n - col);
    int at = 0;
    for (; at + ROWS <= cols; at += ROWS) dot(p, w, rows, ROWS, row, col + at, sums, at);
    for (; at < cols; at++) dot(p, w, rows, 1, row, col + at, sums, at);
    for (int r = 0; r < rows; r++) put(w, y, row + r, col, _mm512_loadu_ps(sums[r]));
}

/* A unit's columns for rows [first, last) of x. */
static void dot_unit(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last) {
    for (int64_t c = col; c < min64(w->n, col + UNIT); c += SIDE) {
        int64_t row = first;
        for (; row + ROWS <= last; row += ROWS) dot_rows(p, w, ROWS, y, row, c);
        switch (last - row) {
        case 3: dot_rows(p, w, 3, y, row, c); break;
        case 2: dot_rows(p, w, 2, y, row, c); break;
        case 1: dot_rows(p, w, 1, y, row, c);
        }
    }
}

/* ---- AMX ---- */

#if HAS_TILES

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

static void begin_tiles(void) {
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = SIDE;
    }
    _tile_loadconfig(&config);
}

/* Line `i` of 16 rows of x, pair by pair: 16 dwords of a row become a column. */
static void tile_of_x(const Halves *p, int64_t row, int64_t i, int32_t *tile) {
    const int64_t rows = min64(SIDE, p->m - row);
    const __mmask32 lanes = first_lanes(p->k - i * LINE);
    const __m512i places = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (int64_t r = 0; r < rows; r++) {
        const __m512i line = _mm512_maskz_loadu_epi16(lanes, p->x + (row + r) * p->ldx * 2 + i * 64);
        _mm512_i32scatter_epi32(tile + r, places, line, 4);
    }
}

static void tiles_share(void *context, int64_t i, int thread) {
    const Halves *p = context;
    char *tiles = p->tiles + i * p->lines * TILE_BYTES;
    if (p->m - i * SIDE < SIDE) memset(tiles, 0, (size_t)(p->lines * TILE_BYTES));
    for (int64_t line = 0; line < p->lines; line++)
        tile_of_x(p, i * SIDE, line, (int32_t *)(tiles + line * TILE_BYTES));
}

/* Line `i` of 16 rows of W, the missing ones as zeros. */
static void copy_line(const Halves *p, const Weights *w, int64_t col, int64_t i, char *tile) {
    const int64_t rows = max64(0, min64(SIDE, w->n - col));
    const __mmask32 lanes = first_lanes(p->k - i * LINE);
    for (int64_t r = 0; r < rows; r++)
        _mm512_store_si512(tile + r * 64, _mm512_maskz_loadu_epi16(lanes, w->weight + ((col + r) * w->ld + i * LINE) * 2));
    if (rows < SIDE) memset(tile + rows * 64, 0, (size_t)((SIDE - rows) * 64));
}

/* 32 columns times 16 (`wide` 0) or 32 rows; sums get [2 of 16 columns][1 or 2 of 16 rows][16, 16]. Lines of W lie
 * `step` bytes apart, its rows `stride`, its second 16 rows `second`. */
INLINE void multiply(int wide, int64_t lines, const char *w, int64_t step, int64_t stride, int64_t second, int64_t ahead,
                     const char *x0, const char *x1, float *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 512, 64);
    if (wide) {
        _tile_loadd(2, sums + 256, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t i = 0; i < lines; i++) {
        const char *line = w + i * step;
        if (ahead)
            for (int r = 0; r < SIDE; r++) {
                __builtin_prefetch(line + r * stride + ahead);
                __builtin_prefetch(line + second + r * stride + ahead);
            }
        _tile_loadd(4, line, stride);
        _tile_loadd(5, line + second, stride);
        _tile_loadd(6, x0 + i * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (wide) {
            _tile_loadd(7, x1 + i * TILE_BYTES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 512, 64);
    if (wide) {
        _tile_stored(2, sums + 256, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

static void put_tiles(const Halves *p, const Weights *w, char *y, int64_t row, int64_t col, const float *sums) {
    const __m512i column = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (int64_t c = 0; c < UNIT && col + c < w->n; c += SIDE)
        for (int64_t r = 0; r < min64(2 * SIDE, p->m - row); r++) {
            const float *tile = sums + (c / SIDE * 2 + r / SIDE) * 256 + r % SIDE;
            put(w, y, row + r, col + c, _mm512_i32gather_ps(column, tile, 4));
        }
}

/* A unit's columns for rows [first, last) of x, `first` a multiple of 32. */
static void tile_unit(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last, char *scratch) {
    float *sums = (float *)scratch;
    char *copy = scratch + 4 * TILE_BYTES;
    const int64_t whole = col + UNIT <= w->n && last - first <= DIRECT ? p->k / LINE : 0; /* lines taken where they lie */
    for (int64_t i = whole; i < p->lines; i++)
        for (int64_t half = 0; half < 2; half++)
            copy_line(p, w, col + half * SIDE, i, copy + ((i - whole) * 2 + half) * TILE_BYTES);
    for (int64_t row = first; row < last; row += 2 * SIDE) {
        const int wide = last - row > SIDE;
        const char *x0 = p->tiles + row / SIDE * p->lines * TILE_BYTES, *x1 = x0 + p->lines * TILE_BYTES;
        const char *lines = w->weight + col * w->ld * 2;
        const int64_t stride = w->ld * 2, rest = p->lines - whole, x = whole * TILE_BYTES;
        memset(sums, 0, 4 * TILE_BYTES);
        if (wide) {
            if (whole) multiply(1, whole, lines, 64, stride, SIDE * stride, AHEAD, x0, x1, sums);
            if (rest) multiply(1, rest, copy, 2 * TILE_BYTES, 64, TILE_BYTES, 0, x0 + x, x1 + x, sums);
        } else {
            if (whole) multiply(0, whole, lines, 64, stride, SIDE * stride, AHEAD, x0, x1, sums);
            if (rest) multiply(0, rest, copy, 2 * TILE_BYTES, 64, TILE_BYTES, 0, x0 + x, x1 + x, sums);
        }
        put_tiles(p, w, y, row, col, sums);
    }
}

/* The same for a quantized W: all of its rows at once, since their codes lie one after the other in memory. */
static void quantized_unit(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last,
                           char *scratch) {
    const int64_t step = row_step(p->lines);
    float *sums = (float *)scratch;
    char *rows = scratch + 4 * TILE_BYTES;
    dequantize_unit(p, w, col, rows, step);
    for (int64_t row = first; row < last; row += 2 * SIDE) {
        const char *x0 = p->tiles + row / SIDE * p->lines * TILE_BYTES, *x1 = x0 + p->lines * TILE_BYTES;
        memset(sums, 0, 4 * TILE_BYTES);
        if (last - row > SIDE) multiply(1, p->lines, rows, 64, step, SIDE * step, 0, x0, x1, sums);
        else multiply(0, p->lines, rows, 64, step, SIDE * step, 0, x0, x1, sums);
        put_tiles(p, w, y, row, col, sums);
    }
}

#else

static void begin_tiles(void) {}
static void tiles_share(void *context, int64_t i, int thread) {}
static void tile_unit(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last, char *scratch) {}
static void quantized_unit(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last,
                           char *scratch) {}

#endif

/* ---- both ---- */

static void unit_of(const Halves *p, const Weights *w, char *y, int64_t col, int64_t first, int64_t last, char *scratch) {
    if (p->tiles && w->quantized) quantized_unit(p, w, y, col, first, last, scratch);
    else if (p->tiles) tile_unit(p, w, y, col, first, last, scratch);
    else if (w->quantized) {
        const int64_t step = row_step(p->lines);
        Weights numbers = *w;
        dequantize_unit(p, w, col, scratch, step);
        numbers.weight = scratch - col * step;
        numbers.ld = step / 2;
        dot_unit(p, &numbers, y, col, first, last);
    } else dot_unit(p, w, y, col, first, last);
}

static void product_share(void *context, int64_t i, int thread) {
    const Halves *p = context;
    const int64_t band = i / p->shares, share = i % p->shares, last = p->units * (share + 1) / p->shares;
    const int64_t row = band * BAND, rows_end = min64(p->m, row + BAND);
    int64_t unit = p->units * share / p->shares, before = 0; /* units of earlier W */
    if (p->tiles) begin_tiles();
    for (int which = 0; which < p->count; which++) {
        const Weights *w = p->w[which];
        const int64_t end = before + units_of(w);
        for (; unit < min64(last, end); unit++) {
            const int64_t col = (unit - before) * UNIT;
            unit_of(p, w, p->y[which], col, row, rows_end, p->scratch + thread * p->scratch_bytes);
        }
        before = end;
    }
#if HAS_TILES
    if (p->tiles) _tile_release();
#endif
}

EXPORT int vrm_half_products(void) { return tiles_allowed ? 2 : 1; }

int vrm_half_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                     int threads) {
    const int64_t k = w[0]->k, lines = (k + LINE - 1) / LINE;
    Halves p = {.w = w, .y = y, .count = count, .m = m, .k = k, .ldx = ldx, .lines = lines, .x = x};
    for (int i = 0; i < count; i++) p.units += units_of(w[i]);
    if (m < 1 || p.units < 1) return 0;
    const int64_t work = m * p.units * UNIT * k;
    if (work < SMALL) threads = 1;
    const int64_t row_tiles = tiles_allowed ? (m + SIDE - 1) / SIDE : 0;
    const int64_t bytes = (row_tiles + 1) / 2 * 2 * lines * TILE_BYTES;
    p.scratch_bytes = 4 * TILE_BYTES + UNIT * row_step(lines);
    char *memory = aligned_alloc(64, (size_t)(bytes + threads * p.scratch_bytes));
    if (!memory) return 1;
    p.scratch = memory + bytes;
    if (tiles_allowed) {
        p.tiles = memory;
        vrm_parallel(tiles_share, &p, row_tiles, threads);
    }
    p.bands = (m + BAND - 1) / BAND;
    p.shares = min64(p.units, threads * SHARES);
    vrm_parallel(product_share, &p, p.bands * p.shares, threads);
    free(memory);
    return 0;
}

#else

EXPORT int vrm_half_products(void) { return 0; }

int vrm_half_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                     int threads) {
    return 1;
}

#endif
