/* y[M,N] = x[M,K] W[N,K]^T + bias[N] in bf16, by 16-bit integer multiplications.
 *
 * On a processor without bf16 instructions, `vpmaddwd` does twice as many multiplications at a time as fp32's FMA. So W
 * is kept, and x is brought, in block fixed point: G neighbours along K share a power of two,
 *
 *     v = q 2^(e - t),   e: exponent of the largest |v| of the group,   t in {11 .. 14},   q a 16-bit integer,
 *
 * and a group's product is a sum of integers, which joins the fp32 sum multiplied by both scales.
 *
 * No overflow, whatever the input: t is the largest with sum(q^2) < 2^31 over a group. By Cauchy-Schwarz a sum over any
 * of a group's products is then below sqrt(2^31) sqrt(2^31). At t = 11 it always holds: |v| <= (255/128) 2^e with 8
 * significand bits, so |q| <= 4080 and sum(q^2) <= 128 * 4080^2 < 2^31. The other t are taken if the sum of squares,
 * computed in fp32 before rounding, is 1e-3 below the limit. Rounding adds less to it: a q that is not exact is below
 * 2^7, so 128 of them add less than 128 (2^7 + 1/4), 8e-6 of 2^31. And |q| <= 32640 at t = 14.
 *
 * Error: a unit of q is 2^(e - t). Every bf16 of at least 2^(e - t + 7) is exact; smaller ones are off by at most half
 * a unit, that is by 2^-12 of the group's largest, and by 2^-15 of it where few of them are as large.
 *
 * Range: e is at least -126 for x, and for W between -112 and 106, so that a sum of integers times the scale of W is a
 * normal number (smaller weights are off by at most 2^-127). Its product with the scale of x is rounded as it is added
 * (FMA), and overflows only if it is too large.
 * A group of x with an element that is not finite has scale NaN, and the row of y becomes NaN.
 *
 * Integer sums have no order, and groups are added in order of K: a row of y never depends on its neighbours, on the
 * tile that computed it or on the threads.
 *
 * W in memory: panels of 16 columns (rows of W); in a panel, for each pair of K, the 16 columns' two values, so that 32
 * bytes are an operand for 8 columns. So 16 rows of W take as many bytes as before, and are replaced where they are. The
 * scales are exponents of 2, biased by 127, in an array of bytes: per panel and group, 16 columns. N and K are multiples
 * of 16; the last group of K may be short.
 */
#include "common.h"
#include "kernels.h"
#include "pool.h"

#define G 128           /* elements of K that share a scale */
#define PAIRS (G / 2)   /* in a group */
#define PANEL 16        /* columns */
#define ROW_TILE 6      /* rows x 16 columns: 12 accumulators, 2 weights and 2 products fill 16 registers */
#define BAND 120        /* rows that a panel is multiplied with before the next panel */
#define CHUNK 128       /* pairs of a panel (8 KiB) kept in L1 while a band's tiles pass over them */
#define MOST_BITS 14
#define LEAST_BITS 11
#define LEAST_EXPONENT (-112) /* of a group of W */
#define SMALL (1 << 16) /* multiplications that are not worth waking a second thread */
#define SHARES 8        /* of the panels per thread, so that a late thread holds up little */
#define SHARE_PANELS 8  /* panels of a share where there are several bands */

#if defined(__AVX2__)
#include "integers.h"

INLINE int64_t groups_of(int64_t k) { return (k + G - 1) / G; }

/* Pairs of a group's q: pairs[h][i] holds elements 16 h + 2 i (low half) and 16 h + 2 i + 1. */
typedef struct {
    v8i pairs[G / 16];
    int exponent, bits; /* e and t; e is 128 if an element is not finite, and the pairs mean nothing then */
} Group;

/* G elements in block fixed point; an exponent below `least` is taken as `least`. */
INLINE void quantize(const char *src, int least, Group *out) {
    v8f v[G / 16][2], squares[2] = {splat8(0.0f), splat8(0.0f)};
    v8i most = {0};
#pragma GCC unroll 8
    for (int h = 0; h < G / 16; h++) {
        for (int i = 0; i < 2; i++) v[h][i] = load_half(DT_BF16, src + h * 32, i);
        most = larger(most, larger((v8i)v[h][0] & 0x7fffffff, (v8i)v[h][1] & 0x7fffffff));
    }
    out->exponent = (largest_lane(most) >> 23) - 127;
    out->bits = MOST_BITS;
    if (out->exponent == 128) return;
    if (out->exponent < least) out->exponent = least;
    const v8f inverse = splat8(bits_to_float((uint32_t)(128 - out->exponent) << 23)); /* 2^(1 - e): |v| < 4 */
#pragma GCC unroll 8
    for (int h = 0; h < G / 16; h++)
        for (int i = 0; i < 2; i++) {
            v[h][i] *= inverse;
            squares[i] = fma8(v[h][i], v[h][i], squares[i]);
        }
    const v8f both = squares[0] + squares[1];
    const float sum = lane_sums(both, both, both, both)[0]; /* sum(q^2) = sum 4^(t - 1) */
    for (float limit = 31.968f; sum >= limit && out->bits > LEAST_BITS; limit *= 4) out->bits--;
    const v8f unit = splat8((float)(1 << (out->bits - 1)));
#pragma GCC unroll 8
    for (int h = 0; h < G / 16; h++) {
        const __m256i low = _mm256_cvtps_epi32((__m256)(v[h][0] * unit));
        const __m256i high = _mm256_cvtps_epi32((__m256)(v[h][1] * unit));
        out->pairs[h] = (v8i)_mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
    }
}

/* Group `g` of a row of k elements. Its pairs go `step` apart to `to`. */
INLINE void quantize_group(const char *row, int64_t g, int64_t k, int least, int32_t *to, int64_t step, Group *out) {
    const int64_t count = min64(G, k - g * G);
    const char *src = row + g * G * 2;
    char padded[G * 2] = {0};
    if (count < G) src = memcpy(padded, src, (size_t)(count * 2));
    quantize(src, least, out);
    for (int64_t i = 0; i < count / 2; i++) to[i * step] = out->pairs[i / 8][i % 8];
}

typedef struct {
    int64_t m, k, ldx, groups;
    const char *x;
    int32_t *pairs; /* of x: per tile of rows, per pair of K, per row */
    float *scales;  /* of x: per tile of rows, per group, per row */
} Rows;

/* Rows are dealt out in bands, and a band's rows evenly to its tiles: 7 rows are 3 + 4, not 6 + 1. */
INLINE int64_t band_rows(const Rows *p, int64_t band) { return min64(BAND, p->m - band * BAND); }
INLINE int64_t band_tiles(const Rows *p, int64_t band) { return (band_rows(p, band) + ROW_TILE - 1) / ROW_TILE; }
INLINE int64_t tile_row(const Rows *p, int64_t band, int64_t i) {
    return band * BAND + band_rows(p, band) * i / band_tiles(p, band);
}

static void rows_share(void *context, int64_t i, int thread) {
    const Rows *p = context;
    const int64_t per_band = BAND / ROW_TILE, band = i / per_band, in_band = i % per_band;
    if (in_band >= band_tiles(p, band)) return;
    const int64_t row = tile_row(p, band, in_band), rows = tile_row(p, band, in_band + 1) - row;
    int32_t *pairs = p->pairs + row * p->k / 2;
    float *scales = p->scales + row * p->groups;
    Group group;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < p->groups; g++) {
            quantize_group(p->x + (row + r) * p->ldx * 2, g, p->k, -126, pairs + g * PAIRS * rows + r, rows, &group);
            const float power = bits_to_float((uint32_t)(group.exponent + 127) << 23);
            scales[g * rows + r] = group.exponent == 128 ? NAN : power / (float)(1 << group.bits);
        }
}

/* sums[rows, 16] += a group's integers times its scales: those of W, 16 exponents, and those of x. */
INLINE void add_group(int rows, __m256i acc[ROW_TILE][2], const uint8_t *exponents, const float *scales, float *sums) {
    const __m128i e = _mm_loadu_si128((const __m128i *)exponents);
    const __m256 s0 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(e), 23));
    const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(e, 8)), 23));
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const __m256 scale = _mm256_set1_ps(scales[r]);
        float *out = sums + r * PANEL;
        const __m256 a0 = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r][0]), s0);
        const __m256 a1 = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r][1]), s1);
        _mm256_store_ps(out, _mm256_fmadd_ps(a0, scale, _mm256_load_ps(out)));
        _mm256_store_ps(out + 8, _mm256_fmadd_ps(a1, scale, _mm256_load_ps(out + 8)));
    }
}

/* A tile's operands, from the beginning of a group on. `lines` cache lines from `next` on are fetched per 8 pairs. */
typedef struct {
    const int32_t *x;
    const float *scales;
    const char *w, *next;
    const uint8_t *exponents;
    int64_t pairs, lines;
    float *sums;
} Tile;

INLINE void tile(int rows, const Tile *t) {
    const int32_t *x = t->x;
    const char *w = t->w, *next = t->next;
    for (int64_t g = 0; g * PAIRS < t->pairs; g++) {
        __m256i acc[ROW_TILE][2];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t left = min64(PAIRS, t->pairs - g * PAIRS); left > 0; left -= 8) {
            for (int64_t i = 0; i < t->lines; i++) __builtin_prefetch(next + i * 64);
            next += t->lines * 64;
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + i * 64));
                const __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + i * 64 + 32));
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) multiply_add(x + i * rows + r, w0, w1, &acc[r][0], &acc[r][1]);
            }
            w += 8 * 64;
            x += 8 * rows;
        }
        add_group(rows, acc, t->exponents + g * PANEL, t->scales + g * rows, t->sums);
    }
}

static void tile1(const Tile *t) { tile(1, t); }
static void tile2(const Tile *t) { tile(2, t); }
static void tile3(const Tile *t) { tile(3, t); }
static void tile4(const Tile *t) { tile(4, t); }
static void tile5(const Tile *t) { tile(5, t); }
static void tile6(const Tile *t) { tile(6, t); }
static void (*const TILES[ROW_TILE])(const Tile *) = {tile1, tile2, tile3, tile4, tile5, tile6};

/* sums[rows of a band, 16] = the band times a panel. */
static void multiply(const Rows *p, const Weights *w, int64_t band, int64_t panel, float *sums) {
    const int64_t tiles = band_tiles(p, band), all_pairs = p->k / 2;
    const char *first = w->weight + panel * PANEL * p->k * 2;
    const uint8_t *exponents = (const uint8_t *)w->exponents + panel * p->groups * PANEL;
    memset(sums, 0, (size_t)(band_rows(p, band) * PANEL) * sizeof(float));
    for (int64_t from = 0; from < all_pairs; from += CHUNK) {
        const int64_t pairs = min64(CHUNK, all_pairs - from), lines = max64(1, 8 / tiles);
        const char *chunk = first + from * PANEL * 4, *next = chunk + CHUNK * PANEL * 4;
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t row = tile_row(p, band, i), rows = tile_row(p, band, i + 1) - row;
            const Tile t = {.x = p->pairs + row * all_pairs + from * rows,
                            .scales = p->scales + row * p->groups + from / PAIRS * rows,
                            .w = chunk, .next = next + i * lines * pairs * 8,
                            .exponents = exponents + from / PAIRS * PANEL, .pairs = pairs, .lines = lines,
                            .sums = sums + (row - band * BAND) * PANEL};
            TILES[rows - 1](&t);
        }
    }
}

/* Columns of a panel of y, bias added. */
static void put(const Rows *p, const Weights *w, int64_t band, int64_t panel, const float *sums, char *y) {
    v8f bias[2] = {splat8(0.0f), splat8(0.0f)};
    if (w->bias)
        for (int c = 0; c < PANEL; c++) bias[c / 8][c % 8] = load_one(DT_BF16, w->bias + (panel * PANEL + c) * 2);
    for (int64_t r = 0; r < band_rows(p, band); r++) {
        char *out = y + ((band * BAND + r) * w->n + panel * PANEL) * 2;
        store_eight(DT_BF16, out, load8(sums + r * PANEL) + bias[0]);
        store_eight(DT_BF16, out + 16, load8(sums + r * PANEL + 8) + bias[1]);
    }
}

typedef struct {
    Rows rows;
    const Weights *const *w;
    char *const *y;
    int count;
    int64_t panels, shares; /* of all W together; every band is cut into the same shares */
    float *sums;            /* per thread, BAND x PANEL */
} Product;

static void product_share(void *context, int64_t i, int thread) {
    const Product *p = context;
    const int64_t band = i / p->shares, share = i % p->shares, last = p->panels * (share + 1) / p->shares;
    float *sums = p->sums + (int64_t)thread * BAND * PANEL;
    int64_t panel = p->panels * share / p->shares, before = 0; /* panels of earlier W */
    for (int which = 0; which < p->count; which++) {
        const int64_t end = before + p->w[which]->n / PANEL;
        for (; panel < min64(last, end); panel++) {
            multiply(&p->rows, p->w[which], band, panel - before, sums);
            put(&p->rows, p->w[which], band, panel - before, sums, p->y[which]);
        }
        before = end;
    }
}

int vrm_packed_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                       int threads) {
    const int64_t k = w[0]->k, groups = groups_of(k), bands = (m + BAND - 1) / BAND;
    const int64_t sums = round64((int64_t)threads * BAND * PANEL * 4), pairs = round64(m * k * 2);
    Product p = {.rows = {.m = m, .k = k, .ldx = ldx, .groups = groups, .x = x}, .w = w, .y = y, .count = count};
    for (int i = 0; i < count; i++) p.panels += w[i]->n / PANEL;
    if (m < 1 || p.panels < 1) return 0;
    char *memory = aligned_alloc(64, (size_t)(sums + pairs + round64(m * groups * 4)));
    if (!memory) return 1;
    p.sums = (float *)memory;
    p.rows.pairs = (int32_t *)(memory + sums);
    p.rows.scales = (float *)(memory + sums + pairs);
    p.shares = bands > 1 ? (p.panels + SHARE_PANELS - 1) / SHARE_PANELS : min64(threads * SHARES, p.panels);
    vrm_parallel(rows_share, &p.rows, bands * (BAND / ROW_TILE), m * k < SMALL ? 1 : threads);
    vrm_parallel(product_share, &p, bands * p.shares, m * p.panels * PANEL * k < SMALL ? 1 : threads);
    free(memory);
    return 0;
}

typedef struct {
    int64_t k;
    char *w, *scratch; /* scratch: a panel per thread */
    uint8_t *exponents;
} Packing;

static void pack_share(void *context, int64_t panel, int thread) {
    const Packing *p = context;
    const int64_t groups = groups_of(p->k), bytes = PANEL * p->k * 2;
    char *rows = p->w + panel * bytes, *packed = p->scratch + thread * bytes;
    uint8_t *exponents = p->exponents + panel * groups * PANEL;
    Group group;
    for (int64_t c = 0; c < PANEL; c++)
        for (int64_t g = 0; g < groups; g++) {
            int32_t *to = (int32_t *)packed + g * PAIRS * PANEL + c;
            quantize_group(rows + c * p->k * 2, g, p->k, LEAST_EXPONENT, to, PANEL, &group);
            exponents[g * PANEL + c] = (uint8_t)(group.exponent - group.bits + 127);
        }
    memcpy(rows, packed, (size_t)bytes);
}

EXPORT int vrm_packs(void) { return 1; }

EXPORT int vrm_pack(int64_t n, int64_t k, void *w, void *exponents, int threads) {
    char *scratch = aligned_alloc(64, (size_t)round64(threads * PANEL * k * 2));
    if (!scratch) return 1;
    Packing p = {.k = k, .w = w, .scratch = scratch, .exponents = exponents};
    vrm_parallel(pack_share, &p, n / PANEL, threads);
    free(scratch);
    return 0;
}

#else

EXPORT int vrm_packs(void) { return 0; }

EXPORT int vrm_pack(int64_t n, int64_t k, void *w, void *exponents, int threads) { return 1; }

int vrm_packed_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                       int threads) {
    return 1;
}

#endif
