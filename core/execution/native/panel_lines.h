/* x as the whole numbers that `panels.c` describes. For AVX2. */
#pragma once
#include "common.h"
#include "integers.h"
#include "panels.h"

typedef struct {
    int dt;
    int64_t m, k, ldx, planes, span, spans, offset; /* planes: lines per row; span: elements, spans: in a row */
    const char *x;
    int32_t *pairs;                  /* per tile of lines, per pair of K, per line */
    float *scales, *totals;          /* per tile of lines, per span, per line; totals: sums of x */
    int32_t *starts;                 /* in the same order: -offset sum(q) */
    char *bytes;                     /* of a line that is alone: q again, upper and lower bytes apart */
} Lines;

/* Lines are dealt out in bands, and a band's lines evenly to its tiles: 7 lines are 3 + 4, not 6 + 1. */
INLINE int64_t lines_of(const Lines *p) { return p->m * p->planes; }
INLINE int64_t band_lines(const Lines *p, int64_t band) { return min64(BAND, lines_of(p) - band * BAND); }
INLINE int64_t band_tiles(const Lines *p, int64_t band) { return (band_lines(p, band) + ROW_TILE - 1) / ROW_TILE; }
INLINE int64_t tile_line(const Lines *p, int64_t band, int64_t i) {
    return band * BAND + band_lines(p, band) * i / band_tiles(p, band);
}

/* `count` elements, a multiple of 16 up to MOST_SPAN, as pairs of whole numbers and what these add up to. Returns the
 * scale. */
INLINE float whole_numbers(int dt, const char *src, int64_t count, int second, v8i *pairs, int32_t *total) {
    v8f v[MOST_SPAN / 8];
    v8i most = {0};
    const int64_t step = 16 * elem_size(dt);
    for (int64_t b = 0; b < count / 16; b++)
        for (int i = 0; i < 2; i++) {
            v[2 * b + i] = load_half(dt, src + b * step, i);
            most = larger(most, (v8i)v[2 * b + i] & 0x7fffffff);
        }
    int exponent = (largest_lane(most) >> 23) - 127;
    const int finite = exponent < 128;
    if (exponent < -100) exponent = -100; /* so that scales stay normal numbers */
    const v8f unit = splat8(finite ? bits_to_float((uint32_t)(BITS - exponent + 127) << 23) : 0.0f);
    v8i sum = {0};
    for (int64_t b = 0; b < count / 16; b++) {
        __m256i q[2];
        for (int i = 0; i < 2; i++) {
            const __m256 scaled = (__m256)(v[2 * b + i] * unit);
            q[i] = _mm256_cvtps_epi32(scaled);
            if (second) { /* what is left over is below 1/2 and exact */
                const __m256 left = _mm256_sub_ps(scaled, _mm256_cvtepi32_ps(q[i]));
                q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(32768.0f)));
            }
            if (!finite) q[i] = _mm256_setzero_si256();
            sum += (v8i)q[i];
        }
        if (dt == DT_BF16) pairs[b] = (v8i)_mm256_blend_epi16(q[0], _mm256_slli_epi32(q[1], 16), 0xaa);
        else pairs[b] = (v8i)_mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    }
    *total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    if (!finite) return NAN;
    return bits_to_float((uint32_t)(exponent - BITS + 127) << 23) * (second ? 1.0f / 32768 : 1.0f);
}

INLINE void convert(const Lines *p, int dt, int64_t line, int64_t s, int32_t *to, int64_t step, float *scale,
                    float *total, int32_t *start) {
    v8i pairs[MOST_SPAN / 16];
    int32_t sum;
    const int64_t row = line / p->planes, from = s * p->span, count = min64(p->span, p->k - from);
    const char *src = p->x + (row * p->ldx + from) * elem_size(dt);
    *scale = whole_numbers(dt, src, count, line % p->planes > 0, pairs, &sum);
    *total = (float)sum * *scale;
    *start = (int32_t)-p->offset * sum;
    for (int64_t i = 0; i < count / 2; i++) to[i * step] = pairs[i / 8][i % 8];
}

static void lines_share(void *context, int64_t i, int thread) {
    const Lines *p = context;
    const int64_t per_band = BAND / ROW_TILE, band = i / per_band, in_band = i % per_band;
    if (in_band >= band_tiles(p, band)) return;
    const int64_t line = tile_line(p, band, in_band), lines = tile_line(p, band, in_band + 1) - line;
    for (int64_t r = 0; r < lines; r++)
        for (int64_t s = 0; s < p->spans; s++) {
            int32_t *to = p->pairs + line * p->k / 2 + s * p->span / 2 * lines + r;
            const int64_t at = line * p->spans + s * lines + r;
            float *scale = p->scales + at, *total = p->totals + at;
            if (p->dt == DT_BF16) convert(p, DT_BF16, line + r, s, to, lines, scale, total, p->starts + at);
            else if (p->dt == DT_FP16) convert(p, DT_FP16, line + r, s, to, lines, scale, total, p->starts + at);
            else convert(p, DT_FP32, line + r, s, to, lines, scale, total, p->starts + at);
        }
}
