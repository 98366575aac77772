/* y[M,N] = x[M,K] W[N,K]^T + bias[N] for a quantized W whose codes are whole numbers, by 16-bit integer multiplications.
 *
 * A code of 2 to 8 bits becomes a 16-bit integer with a shift and a mask, and `vpmaddwd` multiplies 16 of them at a time;
 * making floating-point numbers of codes takes longer than reading them. So x is brought to whole numbers, too: SPAN
 * neighbours along K, which share a scale of W, share a power of two,
 *
 *     v = q 2^(e - 13),   e: exponent of the largest |v| of the span,   |q| <= 2^14.
 *
 * A bf16 number is one such q: exact if it is at least 2^-6 of the largest, else off by at most 2^-14 of that. fp16 and
 * fp32 are two: what the first leaves over, times 2^15, is the second's. Each is a line of its own in the products, and
 * lines of a row are added at the end. A span with an element that is not finite has scale NaN, and so the row of y.
 *
 * Of a span, for codes c: sum(((c - offset - zero) scale + minimum) v) = 2^(e - 13) (scale (sum(c q) - offset sum(q)
 * - zero sum(q)) + minimum sum(q)). Both sums are exact: codes are below 2^8, and a span has at most 128 elements, so
 * sum(c q) < 2^31. Spans are added in order of K in fp32: a row of y never depends on its neighbours, on the tile that
 * computed it or on the threads.
 *
 * W in memory: `vrm_arrange` brings 16 rows of W, a panel, where they are into an order in which 32 bytes are operands for
 * 8 rows. Codes of a row are planes (`core/quantization/__init__.py`), and 32 bits of a plane hold 32 / width neighbours
 * along K. Those with even K go to the lower half of these bits, those with odd K to the upper one, so that one shift and
 * one mask make a pair. The 16 rows' words lie side by side, one plane after another; and so do the 16 rows' numbers of a
 * group. N is a multiple of 16, K of 32.
 */
#include "common.h"
#include "kernels.h"
#include "panels.h"
#include "pool.h"
#include "quantized.h"

#define CHUNK 256       /* elements of K whose operands (8 KiB) are kept in L1 while a band's tiles pass over them */
#define SMALL (1 << 16) /* multiplications that are not worth waking a second thread */
#define SHARES 8        /* of the panels per thread, so that a late thread holds up little */
#define SHARE_PANELS 8  /* panels of a share where there are several bands */

#if defined(__AVX2__)
#include "panel_codes.h"
#include "panel_lines.h"

EXPORT int vrm_has_panels(void) { return 1; }

/* One line and a panel: operands are used where they were made. */
INLINE void direct(int bits, int book, int based, const Lines *p, const Quantized *q, int64_t panel, float *sums) {
    Codes c = codes_of(bits, q, panel);
    const int32_t *x = p->pairs;
    Numbers numbers[SPANS];
    v8f s0 = splat8(0.0f), s1 = s0;
    __m256i a0 = _mm256_set1_epi32(p->starts[0]), a1 = a0;
    for (int64_t k = 0, s = 0; k < p->k; k += BLOCK, x += BLOCK / 2) {
        if (s % SPANS == 0 && k % p->span == 0)
            read_numbers(q, panel, k, p->span, min64(SPANS, p->spans - s), numbers);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
#pragma GCC unroll 8
            for (int i = 8 * part; i < 8 * part + 8; i++) {
                const __m256i pair = _mm256_set1_epi32(x[i]);
                a0 = _mm256_add_epi32(a0, _mm256_madd_epi16(pair, operand(bits, book, &c, 0, i)));
                a1 = _mm256_add_epi32(a1, _mm256_madd_epi16(pair, operand(bits, book, &c, 1, i)));
            }
            const int64_t end = k + 16 * (part + 1);
            if (end & (p->span - 1) && end < p->k) continue;
            const Numbers *n = &numbers[s % SPANS];
            const v8f scale = splat8(p->scales[s]), total = splat8(p->totals[s]);
            s0 = with_span(based, n, 0, s0, a0, scale, total);
            s1 = with_span(based, n, 1, s1, a1, scale, total);
            s++;
            if (s < p->spans) a0 = a1 = _mm256_set1_epi32(p->starts[s]);
        }
        next_block(bits, &c);
    }
    store8(sums, s0);
    store8(sums + 8, s1);
}

/* q of a line for `direct4`: of 8 neighbours the 4 upper bytes h and the 4 lower ones l of those that are in the lower
 * nibbles of a word's bytes, then of the others; q = 256 h + l, both signed. */
static void part_bytes(const Lines *p) {
    const char none = -128;
    const __m128i upper = _mm_setr_epi8(1, 9, 3, 11, none, none, none, none, 5, 13, 7, 15, none, none, none, none);
    const __m128i lower = _mm_setr_epi8(none, none, none, none, 0, 8, 2, 10, none, none, none, none, 4, 12, 6, 14);
    for (int64_t i = 0; i < p->k / 8; i++) {
        const __m128i q = _mm_loadu_si128((const __m128i *)p->pairs + i);
        const __m128i h = _mm_shuffle_epi8(_mm_add_epi16(q, _mm_set1_epi16(128)), upper);
        _mm_storeu_si128((__m128i *)p->bytes + i, _mm_or_si128(h, _mm_shuffle_epi8(q, lower)));
    }
}

/* `direct` for codes of 4 bits. They stay bytes, which takes fewer instructions to make: `vpmaddubsw` multiplies them with
 * the upper and with the lower bytes of q. At most 8 of its sums, each of two products below 15 * 2^7, are added in 16
 * bits. */
INLINE void direct4(int based, const Lines *p, const Quantized *q, int64_t panel, float *sums) {
    const char *w = q->codes + panel * PANEL * q->row_bytes, *x = p->bytes;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), many = _mm256_set1_epi16(256);
    const int64_t step = p->span < BLOCK ? p->span : BLOCK;
    Numbers numbers[SPANS];
    v8f total[2] = {splat8(0.0f), splat8(0.0f)};
    for (int64_t s = 0; s < p->spans; s++) {
        if (s % SPANS == 0) read_numbers(q, panel, s * p->span, p->span, min64(SPANS, p->spans - s), numbers);
        const int64_t end = min64(p->k, (s + 1) * p->span);
        __m256i acc[2] = {_mm256_set1_epi32(p->starts[s]), _mm256_set1_epi32(p->starts[s])};
        for (int64_t k = s * p->span; k < end; k += step) {
            __m256i high[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, low[2] = {high[0], high[0]};
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                if (i == 2 && step < BLOCK) break;
                const __m256i h0 = _mm256_set1_epi32(((const int32_t *)x)[4 * i]);
                const __m256i l0 = _mm256_set1_epi32(((const int32_t *)x)[4 * i + 1]);
                const __m256i h1 = _mm256_set1_epi32(((const int32_t *)x)[4 * i + 2]);
                const __m256i l1 = _mm256_set1_epi32(((const int32_t *)x)[4 * i + 3]);
                __builtin_prefetch(w + i * 64 + AHEAD);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    __m256i v = _mm256_loadu_si256((const __m256i *)(w + i * 64 + half * 32));
                    IN_REGISTER(v);
                    const __m256i first = _mm256_and_si256(v, nibble);
                    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
                    high[half] = _mm256_add_epi16(high[half], _mm256_maddubs_epi16(first, h0));
                    low[half] = _mm256_add_epi16(low[half], _mm256_maddubs_epi16(first, l0));
                    high[half] = _mm256_add_epi16(high[half], _mm256_maddubs_epi16(second, h1));
                    low[half] = _mm256_add_epi16(low[half], _mm256_maddubs_epi16(second, l1));
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(high[half], many));
                acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(low[half], ones));
            }
            w += step * PANEL / 2;
            x += 2 * step;
        }
        const Numbers *n = &numbers[s % SPANS];
        for (int half = 0; half < 2; half++)
            total[half] = with_span(based, n, half, total[half], acc[half], splat8(p->scales[s]), splat8(p->totals[s]));
    }
    store8(sums, total[0]);
    store8(sums + 8, total[1]);
}

/* Operands of a chunk from column `k` on, and the numbers of its spans. */
typedef struct {
    __m256i w[CHUNK / 2][2];
    Numbers numbers[CHUNK / 16];
} Chunk;

INLINE void open_chunk(int bits, int book, const Lines *p, const Quantized *q, int64_t panel, int64_t k, int64_t end,
                       Codes *c, Chunk *chunk) {
    for (int64_t block = 0; block < (end - k) / BLOCK; block++) {
        __m256i(*to)[2] = chunk->w + block * BLOCK / 2;
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK / 2; i++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) to[i][half] = operand(bits, book, c, half, i);
        next_block(bits, c);
    }
    read_numbers(q, panel, k, p->span, (end - k + p->span - 1) / p->span, chunk->numbers);
}

/* A tile's lines from the beginning of a chunk of `count` elements on. */
typedef struct {
    const Chunk *chunk;
    int64_t count, span;
    const int32_t *x, *starts;
    const float *scales, *totals;
    float *sums;
} Tile;

INLINE void tile(int lines, int based, const Tile *t) {
    const int32_t *x = t->x;
    const __m256i(*w)[2] = t->chunk->w;
    for (int64_t s = 0; s * t->span < t->count; s++) {
        __m256i acc[ROW_TILE][2];
#pragma GCC unroll 6
        for (int r = 0; r < lines; r++) acc[r][0] = acc[r][1] = _mm256_set1_epi32(t->starts[s * lines + r]);
        for (int64_t left = min64(t->span, t->count - s * t->span); left > 0; left -= 16) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const __m256i w0 = w[i][0], w1 = w[i][1];
#pragma GCC unroll 6
                for (int r = 0; r < lines; r++) multiply_add(x + i * lines + r, w0, w1, &acc[r][0], &acc[r][1]);
            }
            w += 8;
            x += 8 * lines;
        }
        const Numbers *n = &t->chunk->numbers[s];
#pragma GCC unroll 6
        for (int r = 0; r < lines; r++) {
            const v8f scale = splat8(t->scales[s * lines + r]), total = splat8(t->totals[s * lines + r]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                float *out = t->sums + r * PANEL + half * 8;
                store8(out, with_span(based, n, half, load8(out), acc[r][half], scale, total));
            }
        }
    }
}

static void plain1(const Tile *t) { tile(1, 0, t); }
static void plain2(const Tile *t) { tile(2, 0, t); }
static void plain3(const Tile *t) { tile(3, 0, t); }
static void plain4(const Tile *t) { tile(4, 0, t); }
static void plain5(const Tile *t) { tile(5, 0, t); }
static void plain6(const Tile *t) { tile(6, 0, t); }
static void based1(const Tile *t) { tile(1, 1, t); }
static void based2(const Tile *t) { tile(2, 1, t); }
static void based3(const Tile *t) { tile(3, 1, t); }
static void based4(const Tile *t) { tile(4, 1, t); }
static void based5(const Tile *t) { tile(5, 1, t); }
static void based6(const Tile *t) { tile(6, 1, t); }
static void (*const TILES[2][ROW_TILE])(const Tile *) = {{plain1, plain2, plain3, plain4, plain5, plain6},
                                                         {based1, based2, based3, based4, based5, based6}};

/* sums[lines of a band, 16] = the band times a panel. */
INLINE void multiply(int bits, int book, const Lines *p, const Quantized *q, int64_t band, int64_t panel, float *sums) {
    if (lines_of(p) == 1) {
        if (bits == 4 && !book && is_based(q)) direct4(1, p, q, panel, sums);
        else if (bits == 4 && !book) direct4(0, p, q, panel, sums);
        else if (is_based(q)) direct(bits, book, 1, p, q, panel, sums);
        else direct(bits, book, 0, p, q, panel, sums);
        return;
    }
    const int64_t tiles = band_tiles(p, band);
    Codes c = codes_of(bits, q, panel);
    Chunk chunk;
    memset(sums, 0, (size_t)(band_lines(p, band) * PANEL) * sizeof(float));
    for (int64_t k = 0; k < p->k; k += CHUNK) {
        const int64_t end = min64(p->k, k + CHUNK);
        open_chunk(bits, book, p, q, panel, k, end, &c, &chunk);
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t line = tile_line(p, band, i), lines = tile_line(p, band, i + 1) - line;
            const int64_t at = line * p->spans + k / p->span * lines;
            const Tile t = {.chunk = &chunk, .count = end - k, .span = p->span,
                            .x = p->pairs + line * p->k / 2 + k / 2 * lines,
                            .starts = p->starts + at, .scales = p->scales + at, .totals = p->totals + at,
                            .sums = sums + (line - band * BAND) * PANEL};
            TILES[is_based(q)][lines - 1](&t);
        }
    }
}

static void multiply2(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(2, 0, p, q, b, i, to); }
static void multiply3(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(3, 0, p, q, b, i, to); }
static void multiply4(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(4, 0, p, q, b, i, to); }
static void multiply5(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(5, 0, p, q, b, i, to); }
static void multiply6(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(6, 0, p, q, b, i, to); }
static void multiply7(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(7, 0, p, q, b, i, to); }
static void multiply8(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(8, 0, p, q, b, i, to); }
static void look_up4(const Lines *p, const Quantized *q, int64_t b, int64_t i, float *to) { multiply(4, 1, p, q, b, i, to); }
static void (*const MULTIPLY[7])(const Lines *, const Quantized *, int64_t, int64_t, float *) = {
    multiply2, multiply3, multiply4, multiply5, multiply6, multiply7, multiply8};

/* Columns of a panel of y: a row's lines together, and bias. */
INLINE void put(int dt, const Lines *p, const Weights *w, int64_t band, int64_t panel, const float *sums, char *y) {
    const int64_t es = elem_size(dt);
    v8f bias[2] = {splat8(0.0f), splat8(0.0f)};
    if (w->bias)
        for (int c = 0; c < PANEL; c++) bias[c / 8][c % 8] = load_one(dt, w->bias + (panel * PANEL + c) * es);
    for (int64_t r = 0; r < band_lines(p, band) / p->planes; r++)
        for (int half = 0; half < 2; half++) {
            const float *line = sums + r * p->planes * PANEL + half * 8;
            v8f v = load8(line);
            if (p->planes > 1) v += load8(line + PANEL);
            char *out = y + ((band * BAND / p->planes + r) * w->n + panel * PANEL + half * 8) * es;
            store_eight(dt, out, v + bias[half]);
        }
}

typedef struct {
    Lines lines;
    const Weights *const *w;
    char *const *y;
    int count;
    int64_t panels, shares; /* of all W together; every band is cut into the same shares */
    float *sums;            /* per thread, BAND x PANEL */
} Product;

static void product_share(void *context, int64_t i, int thread) {
    const Product *p = context;
    const Lines *l = &p->lines;
    const int64_t band = i / p->shares, share = i % p->shares, last = p->panels * (share + 1) / p->shares;
    float *sums = p->sums + (int64_t)thread * BAND * PANEL;
    int64_t panel = p->panels * share / p->shares, before = 0; /* panels of earlier W */
    for (int which = 0; which < p->count; which++) {
        const Weights *w = p->w[which];
        const int64_t end = before + w->n / PANEL;
        for (; panel < min64(last, end); panel++) {
            const Quantized *q = w->quantized;
            (q->codebook ? look_up4 : MULTIPLY[q->bits - 2])(l, q, band, panel - before, sums);
            if (l->dt == DT_BF16) put(DT_BF16, l, w, band, panel - before, sums, p->y[which]);
            else if (l->dt == DT_FP16) put(DT_FP16, l, w, band, panel - before, sums, p->y[which]);
            else put(DT_FP32, l, w, band, panel - before, sums, p->y[which]);
        }
        before = end;
    }
}

INLINE int64_t span_of(const Weights *w) {
    const int64_t group = w->quantized->group;
    return group ? min64(group, MOST_SPAN) : MOST_SPAN;
}

INLINE int alike(const Weights *a, const Weights *b) {
    return span_of(a) == span_of(b) && offset_of(a->quantized) == offset_of(b->quantized);
}

/* For W that are alike. */
static int products(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                    int threads) {
    const int64_t k = w[0]->k, span = span_of(w[0]), spans = (k + span - 1) / span, planes = w[0]->type == DT_BF16 ? 1 : 2;
    const int64_t lines = m * planes, bands = (lines + BAND - 1) / BAND;
    const int64_t sums = round64((int64_t)threads * BAND * PANEL * 4), pairs = round64(lines * k * 2);
    const int64_t numbers = round64(lines * spans * 4), bytes = lines == 1 ? 2 * k : 0;
    Product p = {.lines = {.dt = (int)w[0]->type, .m = m, .k = k, .ldx = ldx, .planes = planes, .span = span,
                           .spans = spans, .offset = offset_of(w[0]->quantized), .x = x},
                 .w = w, .y = y, .count = count};
    for (int i = 0; i < count; i++) p.panels += w[i]->n / PANEL;
    if (m < 1 || p.panels < 1) return 0;
    char *memory = aligned_alloc(64, (size_t)round64(sums + pairs + 3 * numbers + bytes));
    if (!memory) return 1;
    p.sums = (float *)memory;
    p.lines.pairs = (int32_t *)(memory + sums);
    p.lines.scales = (float *)(memory + sums + pairs);
    p.lines.totals = (float *)(memory + sums + pairs + numbers);
    p.lines.starts = (int32_t *)(memory + sums + pairs + 2 * numbers);
    p.lines.bytes = memory + sums + pairs + 3 * numbers;
    p.shares = bands > 1 ? (p.panels + SHARE_PANELS - 1) / SHARE_PANELS : min64(threads * SHARES, p.panels);
    vrm_parallel(lines_share, &p.lines, bands * (BAND / ROW_TILE), lines * k < SMALL ? 1 : threads);
    if (lines == 1) part_bytes(&p.lines);
    vrm_parallel(product_share, &p, bands * p.shares, lines * p.panels * PANEL * k < SMALL ? 1 : threads);
    free(memory);
    return 0;
}

int vrm_panel_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                      int threads) {
    int status = 0;
    for (int i = 0, end; i < count && !status; i = end) {
        for (end = i + 1; end < count && alike(w[end], w[i]); end++) continue;
        status = products(w + i, end - i, m, x, ldx, y + i, threads);
    }
    return status;
}

#else

EXPORT int vrm_has_panels(void) { return 0; }

int vrm_panel_linears(const Weights *const *w, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                      int threads) {
    return 1;
}

#endif
