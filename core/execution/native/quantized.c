/* Rows of a quantized weight as floating-point numbers, and what they mean: `core/quantization/__init__.py` describes the
 * form. A number is computed in fp32, as there, and rounded to the element type. */
#include "quantized.h"
#include "common.h"

/* A group's part of a row: value = ((code or its entry) - less) * scale + minimum. Of offset and zero, whose sum `less`
 * is, one is 0 or both are whole. */
typedef struct {
    float less, scale, minimum;
} Group;

/* `count` numbers of a type. */
static void numbers(int type, const char *p, int64_t count, float *out) {
    if (type == DT_UINT8)
        for (int64_t i = 0; i < count; i++) out[i] = (float)((const uint8_t *)p)[i];
    else if (type == DT_INT8)
        for (int64_t i = 0; i < count; i++) out[i] = (float)((const int8_t *)p)[i];
    else {
        int64_t i = 0;
        if (type == DT_FP16)
            for (; i + 8 <= count; i += 8) store8(out + i, half8(p + i * 2));
        for (; i < count; i++) out[i] = load_one(type, p + i * elem_size(type));
    }
}

#define RUN 128 /* groups whose numbers are brought to fp32 at a time */

/* Groups [first, first + count) of a row. */
typedef struct {
    float less[RUN], scale[RUN], minimum[RUN];
} Run;

INLINE void multiply_by_supers(const Quantized *q, const char *supers, int64_t row, int64_t first, int64_t count,
                               float *values) {
    const int64_t each = SUPER_GROUP / q->group, size = number_size((int)q->super_type);
    for (int64_t i = 0; i < count;) {
        const int64_t super = (first + i) / each, end = min64(count, (super + 1) * each - first);
        const float factor = load_one((int)q->super_type, supers + (row * q->supers + super) * size);
        for (; i < end; i++) values[i] *= factor;
    }
}

static void read_run(const Quantized *q, int64_t row, int64_t first, int64_t count, Run *run) {
    const int64_t at = (q->rows == 1 ? row : q->rows ? row / q->rows : 0) * q->groups + first;
    numbers((int)q->scale_type, q->scale + at * number_size((int)q->scale_type), count, run->scale);
    if (q->super_scale) multiply_by_supers(q, q->super_scale, row, first, count, run->scale);
    if (q->zero) numbers((int)q->zero_type, q->zero + at * number_size((int)q->zero_type), count, run->less);
    for (int64_t i = 0; i < count; i++) run->less[i] = (q->zero ? run->less[i] : 0.0f) + (float)q->offset;
    if (q->minimum) {
        numbers((int)q->minimum_type, q->minimum + at * number_size((int)q->minimum_type), count, run->minimum);
        if (q->super_minimum) multiply_by_supers(q, q->super_minimum, row, first, count, run->minimum);
    } else memset(run->minimum, 0, (size_t)count * sizeof(float));
}

INLINE Group group_of(const Run *run, int64_t i) { return (Group){run->less[i], run->scale[i], run->minimum[i]}; }

/* Up to 32 codes from column `k` on, a multiple of 8, one a byte. Planes of a row: lowest bits first. */
INLINE void unpack(const Quantized *q, const char *row, int64_t k, int count, uint8_t *out) {
    int shift = 0;
    if (q->bits == 8) {
        memcpy(out, row + k, (size_t)count);
        return;
    }
    memset(out, 0, 32);
    for (int width = 4; width; width /= 2) {
        if (!(q->bits & width)) continue;
        const uint8_t *from = (const uint8_t *)row + k * width / 8;
        const int each = 8 / width, mask = (1 << width) - 1;
        for (int b = 0; b < count / each; b++)
            for (int i = 0; i < each; i++) out[b * each + i] |= (uint8_t)(((from[b] >> (i * width)) & mask) << shift);
        row += q->k * width / 8;
        shift += width;
    }
}

#if defined(__AVX2__)

INLINE __m256i spread4(__m128i bytes) {
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

INLINE __m256i spread2(int64_t bytes) {
    const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                           4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
    const __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), order);
    const __m256i a = _mm256_and_si256(v, _mm256_set1_epi32(0x3));
    const __m256i b = _mm256_and_si256(_mm256_srli_epi32(v, 2), _mm256_set1_epi32(0x300));
    const __m256i c = _mm256_and_si256(_mm256_srli_epi32(v, 4), _mm256_set1_epi32(0x30000));
    const __m256i d = _mm256_and_si256(_mm256_srli_epi32(v, 6), _mm256_set1_epi32(0x3000000));
    return _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
}

INLINE __m256i spread1(int32_t bytes) {
    const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201ull);
    const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), order), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(1));
}

/* `unpack` of 32 codes. */
INLINE __m256i codes32(const Quantized *q, const char *row, int64_t k) {
    if (q->bits == 8) return _mm256_loadu_si256((const __m256i *)(row + k));
    __m256i all = _mm256_setzero_si256();
    int shift = 0;
    if (q->bits & 4) {
        all = spread4(_mm_loadu_si128((const __m128i *)(row + k / 2)));
        row += q->k / 2;
        shift = 4;
    }
    if (q->bits & 2) {
        int64_t bytes;
        memcpy(&bytes, row + k / 4, 8);
        all = _mm256_or_si256(all, _mm256_slli_epi16(spread2(bytes), shift));
        row += q->k / 4;
        shift += 2;
    }
    if (q->bits & 1) {
        int32_t bytes;
        memcpy(&bytes, row + k / 8, 4);
        all = _mm256_or_si256(all, _mm256_slli_epi16(spread1(bytes), shift));
    }
    return all;
}

#endif

/* Eight codes as numbers of their group. */
INLINE v8f values8(const Quantized *q, const uint8_t *codes, const Group *g) {
    typedef uint8_t v8b __attribute__((vector_size(8)));
    v8b bytes;
    memcpy(&bytes, codes, 8);
    const v8i wide = __builtin_convertvector(bytes, v8i);
    v8f v;
    if (q->codebook)
#if defined(__AVX2__)
        v = (v8f)_mm256_i32gather_ps(q->codebook, (__m256i)wide, 4);
#else
        for (int i = 0; i < 8; i++) v[i] = q->codebook[wide[i]];
#endif
    else
        v = __builtin_convertvector(wide, v8f);
    return (v - splat8(g->less)) * splat8(g->scale) + splat8(g->minimum);
}

INLINE void store_values(int dt, char *to, v8f v, int count) {
    if (count == 8) store_eight(dt, to, v);
    else
        for (int i = 0; i < count; i++) store_one(dt, to + i * elem_size(dt), v[i]);
}

/* `count` numbers of one group from column `k` on. */
INLINE void fill(const Quantized *q, int dt, const char *row, int64_t k, int64_t count, const Group *g, char *to) {
    uint8_t codes[32];
    for (int64_t i = 0; i < count; i += 32) {
        const int part = (int)min64(32, count - i);
#if defined(__AVX2__)
        if (part == 32) _mm256_storeu_si256((__m256i *)codes, codes32(q, row, k + i));
        else
#endif
            unpack(q, row, k + i, part, codes);
        for (int c = 0; c < part; c += 8)
            store_values(dt, to + (i + c) * elem_size(dt), values8(q, codes + c, g), (int)min64(8, part - c));
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)

INLINE __m512 values16(__m512 v, const Group *g) {
    v = _mm512_mul_ps(_mm512_sub_ps(v, _mm512_set1_ps(g->less)), _mm512_set1_ps(g->scale));
    return _mm512_add_ps(v, _mm512_set1_ps(g->minimum));
}

/* `count` numbers in bf16, of whole lines of 32 in one group: 4-bit codes look them up. */
INLINE void look_up(const Quantized *q, const char *row, int64_t k, int64_t count, const Group *g, char *to) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 v = values16(q->codebook ? _mm512_loadu_ps(q->codebook) : codes, g);
    const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(v)); /* twice: five bits of an index count */
    for (int64_t i = 0; i < count; i += 32) {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + (k + i) / 2)));
        const __m512i places = _mm512_or_si512(b, _mm512_slli_epi32(b, 12)); /* lower half: b; upper: b >> 4 */
        _mm512_storeu_si512(to + i * 2, _mm512_permutexvar_epi16(places, table));
    }
}

/* A line of 32 numbers in bf16, of one group or of two. */
INLINE void compute(const Quantized *q, const char *row, int64_t k, const Group *first, const Group *second, char *to) {
    const __m256i codes = codes32(q, row, k);
    const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
    const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
    __m512 a, b;
    if (q->codebook) {
        a = _mm512_i32gather_ps(low, q->codebook, 4);
        b = _mm512_i32gather_ps(high, q->codebook, 4);
    } else {
        a = _mm512_cvtepi32_ps(low);
        b = _mm512_cvtepi32_ps(high);
    }
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(values16(b, second), values16(a, first)));
}

#elif defined(__AVX2__)

/* `count` numbers in bf16, of whole lines of 32 in one group: 4-bit codes look them up, a byte at a time. */
INLINE void look_up(const Quantized *q, const char *row, int64_t k, int64_t count, const Group *g, char *to) {
    const v8f low_codes = {0, 1, 2, 3, 4, 5, 6, 7}, less = splat8(g->less), scale = splat8(g->scale);
    v8f v[2] = {low_codes, low_codes + splat8(8.0f)};
    for (int i = 0; i < 2; i++) {
        if (q->codebook) v[i] = load8(q->codebook + 8 * i);
        v[i] = (v[i] - less) * scale + splat8(g->minimum);
    }
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packus_epi32((__m256i)(round_bf16(v[0]) >> 16), (__m256i)(round_bf16(v[1]) >> 16)), 0xd8);
    const __m128i w0 = _mm256_castsi256_si128(words), w1 = _mm256_extracti128_si256(words, 1);
    const __m128i byte = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
    const __m128i table0 = _mm_packus_epi16(_mm_and_si128(w0, byte), _mm_and_si128(w1, byte));
    const __m128i table1 = _mm_packus_epi16(_mm_srli_epi16(w0, 8), _mm_srli_epi16(w1, 8));
    for (int64_t i = 0; i < count; i += 32) {
        const __m128i b = _mm_loadu_si128((const __m128i *)(row + (k + i) / 2));
        const __m128i even = _mm_and_si128(b, nibble), odd = _mm_and_si128(_mm_srli_epi16(b, 4), nibble);
        const __m128i e0 = _mm_shuffle_epi8(table0, even), e1 = _mm_shuffle_epi8(table1, even);
        const __m128i o0 = _mm_shuffle_epi8(table0, odd), o1 = _mm_shuffle_epi8(table1, odd);
        const __m128i el = _mm_unpacklo_epi8(e0, e1), eh = _mm_unpackhi_epi8(e0, e1);
        const __m128i ol = _mm_unpacklo_epi8(o0, o1), oh = _mm_unpackhi_epi8(o0, o1);
        __m128i *out = (__m128i *)(to + i * 2);
        _mm_storeu_si128(out, _mm_unpacklo_epi16(el, ol));
        _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(el, ol));
        _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(eh, oh));
        _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(eh, oh));
    }
}

INLINE v8f codes8(const Quantized *q, __m128i bytes, const Group *g) {
    const __m256i wide = _mm256_cvtepu8_epi32(bytes);
    const v8f v = q->codebook ? (v8f)_mm256_i32gather_ps(q->codebook, wide, 4) : (v8f)_mm256_cvtepi32_ps(wide);
    return (v - splat8(g->less)) * splat8(g->scale) + splat8(g->minimum);
}

INLINE void put16(char *to, v8f a, v8f b) {
    const __m256i words = _mm256_packus_epi32((__m256i)(round_bf16(a) >> 16), (__m256i)(round_bf16(b) >> 16));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(words, 0xd8));
}

/* A line of 32 numbers in bf16, of one group or of two. */
INLINE void compute(const Quantized *q, const char *row, int64_t k, const Group *first, const Group *second, char *to) {
    const __m256i codes = codes32(q, row, k);
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    put16(to, codes8(q, low, first), codes8(q, _mm_srli_si128(low, 8), first));
    put16(to + 32, codes8(q, high, second), codes8(q, _mm_srli_si128(high, 8), second));
}

#else

INLINE void look_up(const Quantized *q, const char *row, int64_t k, int64_t count, const Group *g, char *to) {
    fill(q, DT_BF16, row, k, count, g, to);
}

INLINE void compute(const Quantized *q, const char *row, int64_t k, const Group *first, const Group *second, char *to) {
    fill(q, DT_BF16, row, k, 16, first, to);
    fill(q, DT_BF16, row, k + 16, 16, second, to + 32);
}

#endif

/* Columns [from, to), which begin with group `first` and are of `count` groups. */
INLINE void groups_of_row(const Quantized *q, int dt, const char *codes, int64_t from, int64_t to, int64_t first,
                          int64_t count, const Run *run, char *out) {
    const int64_t es = elem_size(dt);
    int64_t k = from;
    if (dt == DT_BF16 && q->group == 16)
        for (; k + 32 <= to; k += 32) {
            const int64_t g = k / 16 - first;
            const Group two[2] = {group_of(run, g), group_of(run, g + 1)};
            compute(q, codes, k, two, two + 1, out + (k - from) * 2);
        }
    for (int64_t i = q->group ? k / q->group - first : 0; i < count; i++) {
        const int64_t end = q->group ? min64(to, (first + i + 1) * q->group) : to;
        const Group g = group_of(run, i);
        if (dt == DT_BF16 && end - k >= 32) {
            const int64_t lines = (end - k) / 32 * 32;
            char *at = out + (k - from) * 2;
            if (q->bits == 4) look_up(q, codes, k, lines, &g, at);
            else
                for (int64_t l = 0; l < lines; l += 32) compute(q, codes, k + l, &g, &g, at + l * 2);
            k += lines;
        }
        if (k < end) fill(q, dt, codes, k, end - k, &g, out + (k - from) * es);
        k = end;
    }
}

INLINE void row_of(const Quantized *q, int dt, int64_t row, int64_t from, int64_t to, char *out) {
    const char *codes = q->codes + row * q->row_bytes;
    const int64_t last = q->group ? (to + q->group - 1) / q->group : 1;
    Run run;
    for (int64_t first = q->group ? from / q->group : 0, k = from; first < last; first += RUN) {
        const int64_t count = min64(RUN, last - first), end = q->group ? min64(to, (first + count) * q->group) : to;
        read_run(q, row, first, count, &run);
        groups_of_row(q, dt, codes, k, end, first, count, &run, out + (k - from) * elem_size(dt));
        k = end;
    }
}

void vrm_dequantize(const Quantized *q, int dt, int64_t row, int64_t rows, int64_t from, int64_t to, char *out,
                    int64_t step) {
    for (int64_t r = 0; r < rows; r++, out += step) {
        if (dt == DT_BF16) row_of(q, DT_BF16, row + r, from, to, out);
        else if (dt == DT_FP16) row_of(q, DT_FP16, row + r, from, to, out);
        else row_of(q, DT_FP32, row + r, from, to, out);
    }
}
