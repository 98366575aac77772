/* What a panel of W consists of: codes as operands of multiplications, scales, zeros and minima as fp32. For AVX2. */
#pragma once
#include "common.h"
#include "panels.h"
#include "quantized.h"

#define AHEAD 4096 /* bytes of codes that are fetched ahead */
#define SPANS 16   /* whose numbers are read at a time */

/* Where the planes of a panel's codes are, and how codes become numbers: with a codebook by a table, from which its
 * lowest entry was subtracted, so that a missing upper byte is 0 there, too. */
typedef struct {
    const char *plane[3]; /* of 8 or 4 bits, of 2, of 1 */
    __m256i table;
} Codes;

/* Pair `pair` of a block of 32 for rows 8 half .. 8 half + 7 of the panel. */
INLINE __m256i operand(int bits, int book, const Codes *c, int half, int pair) {
    if (bits == 8) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(c->plane[0] + (pair / 2 * 2 + half) * 32));
        return pair % 2 ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(0xff));
    }
    __m256i all = _mm256_setzero_si256();
    int shift = 0;
    if (bits & 4) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(c->plane[0] + (pair / 4 * 2 + half) * 32));
        all = _mm256_srli_epi16(v, pair % 4 * 4);
        if (pair % 4 < 3) all = _mm256_and_si256(all, _mm256_set1_epi16(15));
        shift = 4;
    }
    if (bits & 2) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(c->plane[1] + (pair / 8 * 2 + half) * 32));
        const int right = pair % 8 * 2 - shift;
        const __m256i placed = right >= 0 ? _mm256_srli_epi16(v, right) : _mm256_slli_epi16(v, -right);
        all = _mm256_or_si256(all, _mm256_and_si256(placed, _mm256_set1_epi16((short)(3 << shift))));
        shift += 2;
    }
    if (bits & 1) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(c->plane[2] + half * 32));
        const int right = pair - shift;
        const __m256i placed = right >= 0 ? _mm256_srli_epi16(v, right) : _mm256_slli_epi16(v, -right);
        all = _mm256_or_si256(all, _mm256_and_si256(placed, _mm256_set1_epi16((short)(1 << shift))));
    }
    return book ? _mm256_shuffle_epi8(c->table, all) : all;
}

INLINE Codes codes_of(int bits, const Quantized *q, int64_t panel) {
    Codes c = {.table = _mm256_setzero_si256()};
    const char *at = q->codes + panel * PANEL * q->row_bytes;
    c.plane[0] = at;
    if (bits < 8 && bits & 4) at += PANEL * q->k / 2;
    c.plane[1] = at;
    if (bits < 8 && bits & 2) at += PANEL * q->k / 4;
    c.plane[2] = at;
    if (q->codebook) {
        int8_t table[16];
        for (int i = 0; i < 16; i++) table[i] = (int8_t)(int)(q->codebook[i] - q->codebook[0]);
        c.table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    }
    return c;
}

/* To the next block; what lies ahead is fetched. */
INLINE void next_block(int bits, Codes *c) {
    const int lines[3] = {bits == 8 ? 8 : bits & 4, bits < 8 ? bits & 2 : 0, bits < 8 ? bits & 1 : 0};
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
#pragma GCC unroll 8
        for (int l = 0; l < lines[i]; l++) __builtin_prefetch(c->plane[i] + l * 64 + AHEAD);
        c->plane[i] += lines[i] * 64;
    }
}

INLINE int64_t offset_of(const Quantized *q) { return q->codebook ? -(int64_t)q->codebook[0] : q->offset; }

/* ---- scales, zeros and minima ---- */

/* What a span's sums mean: x . W = scale sum(c q) + base sum(q), and whether base may be other than 0. */
typedef struct {
    v8f scale[2], base[2];
} Numbers;

INLINE int is_based(const Quantized *q) { return q->zero || q->minimum; }

/* `count` numbers, a multiple of 16. */
INLINE void numbers_of(int type, const char *p, int64_t count, float *out) {
    if (type == DT_UINT8)
        for (int64_t i = 0; i < count; i++) out[i] = (float)((const uint8_t *)p)[i];
    else if (type == DT_INT8)
        for (int64_t i = 0; i < count; i++) out[i] = (float)((const int8_t *)p)[i];
    else if (type == DT_FP16)
        for (int64_t i = 0; i < count; i += 8) store8(out + i, half8(p + i * 2));
    else
        for (int64_t i = 0; i < count; i++) out[i] = load_one(type, p + i * elem_size(type));
}

/* A panel's numbers, of groups of `group` columns, for `count` spans from column `k` on: out[count, 16]. In the row `row`
 * of a tensor if that is not negative, else each row has its own. */
static void spread(const char *numbers, int type, int64_t columns, int64_t row, int64_t panel, int64_t group, int64_t k,
                   int64_t span, int64_t count, float *out) {
    const int64_t size = number_size(type);
    if (row < 0 && group == span) {
        numbers_of(type, numbers + (panel * columns + k / group) * PANEL * size, count * PANEL, out);
        return;
    }
    for (int64_t s = 0; s < count; s++, out += PANEL) {
        const int64_t i = group ? (k + s * span) / group : 0;
        if (row < 0) numbers_of(type, numbers + (panel * columns + i) * PANEL * size, PANEL, out);
        else {
            float one[16];
            char alone[64] = {0};
            memcpy(alone, numbers + (row * columns + i) * size, (size_t)size);
            numbers_of(type, alone, 16, one);
            for (int c = 0; c < PANEL; c++) out[c] = one[0];
        }
    }
}

/* Super scales or minima of a panel at column `k`; 1 where there are none. */
INLINE void read_above(const Quantized *q, const char *supers, int64_t panel, int64_t k, float *out) {
    const int type = (int)q->super_type;
    if (supers) numbers_of(type, supers + (panel * q->supers + k / SUPER_GROUP) * PANEL * number_size(type), PANEL, out);
    else
        for (int i = 0; i < PANEL; i++) out[i] = 1.0f;
}

/* Those of `count` spans from column `k` on. */
static void read_numbers(const Quantized *q, int64_t panel, int64_t k, int64_t span, int64_t count, Numbers *out) {
    const int64_t row = q->rows == 1 ? -1 : q->rows ? panel * PANEL / q->rows : 0;
    float scale[SPANS * PANEL], zero[SPANS * PANEL], minimum[SPANS * PANEL], scales[PANEL], minima[PANEL];
    spread(q->scale, (int)q->scale_type, q->groups, row, panel, q->group, k, span, count, scale);
    if (q->zero) spread(q->zero, (int)q->zero_type, q->groups, row, panel, q->group, k, span, count, zero);
    if (q->minimum) spread(q->minimum, (int)q->minimum_type, q->groups, row, panel, q->group, k, span, count, minimum);
    for (int64_t s = 0; s < count; s++, k += span) {
        if (s == 0 || k % SUPER_GROUP == 0) {
            read_above(q, q->super_scale, panel, k, scales);
            read_above(q, q->super_minimum, panel, k, minima);
        }
        for (int half = 0; half < 2; half++) {
            const int64_t at = s * PANEL + 8 * half;
            const v8f each = load8(scale + at) * load8(scales + 8 * half);
            v8f base = q->minimum ? load8(minimum + at) * load8(minima + 8 * half) : splat8(0.0f);
            if (q->zero) base = fma8(-each, load8(zero + at), base);
            out[s].scale[half] = each;
            out[s].base[half] = base;
        }
    }
}

/* sum + what a span adds to it, for 8 rows of W: `half` of the numbers. */
INLINE v8f with_span(int based, const Numbers *n, int half, v8f sum, __m256i acc, v8f scale, v8f total) {
    sum = fma8((v8f)_mm256_cvtepi32_ps(acc), n->scale[half] * scale, sum);
    return based ? fma8(n->base[half], total, sum) : sum;
}
