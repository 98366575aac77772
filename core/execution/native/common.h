/* Shared helpers: element types, 8-lane vectors, loads that widen to fp32, rounding stores, exp.
 *
 * Everything is written with GCC/Clang vector extensions, so it compiles to AVX2, AVX-512VL or NEON alike.
 * Functions take the element type as a compile-time constant and are always inlined: one source, three kernels.
 */
#ifndef VRM_COMMON_H
#define VRM_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__

/* Element types; the numbers are shared with the Python side. */
enum { DT_BF16 = 0, DT_FP16 = 1, DT_FP32 = 2 };

typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef float v8f_u __attribute__((vector_size(32), aligned(1), may_alias));
typedef float v4f_u __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t v8u_u __attribute__((vector_size(32), aligned(1), may_alias));

INLINE int64_t elem_size(int dt) { return dt == DT_FP32 ? 4 : 2; }
INLINE v8f load8(const float *p) { return *(const v8f_u *)p; }
INLINE void store8(float *p, v8f v) { *(v8f_u *)p = v; }
INLINE v8f splat8(float x) { return (v8f){x, x, x, x, x, x, x, x}; }

/* a * b + c. Spelt out because compilers may fuse in one loop and not in another, and results must not depend on
 * which loop handled a row. */
INLINE v8f fma8(v8f a, v8f b, v8f c) {
#if defined(__FMA__)
    return (v8f)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FP_FAST_FMAF)
    for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

/* Keeps a loaded vector in a register; compilers would rather load it again for each use, and loads are the limit. */
#if defined(__AVX__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v) (void)0
#endif

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

INLINE float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

INLINE v8f half8(const void *p) {
#if defined(__F16C__)
    return (v8f)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    v8f out;
    _Float16 h[8];
    memcpy(h, p, 16);
    for (int i = 0; i < 8; i++) out[i] = (float)h[i];
    return out;
#endif
}

#if defined(__AVX2__)
static const v8u HIGH_HALVES = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
#endif

/* The upper 16 bits of each lane. The mask stays in memory: in a 4 x 3 micro-kernel it would be the 17th register, and
 * the accumulator spilt for it costs half the speed. */
INLINE v8f high_halves(v8u raw) {
#if defined(__AVX2__)
    __asm__("vpand %1, %0, %0" : "+x"(raw) : "m"(HIGH_HALVES));
    return (v8f)raw;
#else
    return (v8f)(raw & 0xffff0000u);
#endif
}

/* One half (0 or 1) of a block of 16 elements, widened to fp32. bf16 blocks come as their even (0) and odd (1)
 * elements, which needs no shuffle: `element_index` gives the order. Both operands of a product are loaded this way. */
INLINE v8f load_half(int dt, const void *p, int half) {
    if (dt == DT_BF16) {
        v8u raw = *(const v8u_u *)p;
        return half ? high_halves(raw) : (v8f)(raw << 16);
    }
    if (dt == DT_FP16) return half8((const char *)p + 16 * half);
    return load8((const float *)p + 8 * half);
}

/* Position inside a 16-element block of lane `lane` of half `half`. */
INLINE int element_index(int dt, int half, int lane) { return dt == DT_BF16 ? 2 * lane + half : 8 * half + lane; }

INLINE float load_one(int dt, const void *p) {
    if (dt == DT_BF16) {
        uint16_t h;
        memcpy(&h, p, 2);
        return bits_to_float((uint32_t)h << 16);
    }
    if (dt == DT_FP16) {
        _Float16 h;
        memcpy(&h, p, 2);
        return (float)h;
    }
    float f;
    memcpy(&f, p, 4);
    return f;
}

/* Round to nearest even, as torch does. */
INLINE void store_one(int dt, void *p, float value) {
    if (dt == DT_BF16) {
        uint32_t u = float_to_bits(value);
        uint16_t h = value != value ? 0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
        memcpy(p, &h, 2);
    } else if (dt == DT_FP16) {
        _Float16 h = (_Float16)value;
        memcpy(p, &h, 2);
    } else {
        memcpy(p, &value, 4);
    }
}

/* bf16 rounded to nearest even, in the upper half of each lane. */
INLINE v8u round_bf16(v8f v) {
    const v8u u = (v8u)v, nan = (v8u)(v != v);
    return (nan & 0x7fc00000u) | (~nan & (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

/* Values as they are after a trip through the element type. */
INLINE v8f round8(int dt, v8f v) {
    if (dt == DT_BF16) return (v8f)round_bf16(v);
#if defined(__F16C__)
    /* Not by a cast there and back: where arithmetic is done in fp16 too, compilers leave such a pair out. */
    if (dt == DT_FP16) return (v8f)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
    if (dt == DT_FP16)
        for (int i = 0; i < 8; i++) v[i] = (float)(_Float16)v[i];
    return v;
}

/* store_one for eight consecutive elements. */
INLINE void store_eight(int dt, void *p, v8f v) {
    if (dt == DT_BF16) {
        typedef uint16_t v8h __attribute__((vector_size(16)));
        v8h h = __builtin_convertvector(round_bf16(v) >> 16, v8h);
        memcpy(p, &h, 16);
    } else if (dt == DT_FP16) {
        for (int i = 0; i < 8; i++) store_one(dt, (char *)p + 2 * i, v[i]);
    } else {
        store8(p, v);
    }
}

/* Stores the two halves of a block of 16 as `load_half` reads them. */
INLINE void store_block(int dt, char *p, v8f half0, v8f half1) {
    if (dt == DT_BF16) {
        const v8u both = (round_bf16(half0) >> 16) | round_bf16(half1);
        memcpy(p, &both, 32);
    } else {
        store_eight(dt, p, half0);
        store_eight(dt, p + 8 * elem_size(dt), half1);
    }
}

/* Copies n < 16 elements into a zeroed block of 16. */
INLINE void copy_tail(int dt, void *block, const void *src, int64_t n) {
    memset(block, 0, (size_t)(16 * elem_size(dt)));
    memcpy(block, src, (size_t)(n * elem_size(dt)));
}

/* A block of which `left` elements are there: where it is if those are 16 or more, else copied to `tail`. */
INLINE const char *whole_block(int dt, const char *block, int64_t left, char *tail) {
    if (left >= 16) return block;
    copy_tail(dt, tail, block, left);
    return tail;
}

/* Sums of the lanes of four vectors. Every lane sum in the library goes through here, so the order of additions,
 * ((0+1)+(2+3)) + ((4+5)+(6+7)), never depends on how many rows or columns were handled together. */
INLINE v4f lane_sums(v8f a, v8f b, v8f c, v8f d) {
#if defined(__AVX__)
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    return (v4f)_mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
#else
    const v8f in[4] = {a, b, c, d};
    v4f out;
    for (int i = 0; i < 4; i++)
        out[i] = ((in[i][0] + in[i][1]) + (in[i][2] + in[i][3])) + ((in[i][4] + in[i][5]) + (in[i][6] + in[i][7]));
    return out;
#endif
}

/* exp for eight lanes, relative error about 1e-7; 0 below -87, saturating above 88; NaN stays NaN. */
INLINE v8f exp8(v8f x) {
    const v8f magic = splat8(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    v8i tiny = x < splat8(-87.0f);
    v8i big = x > splat8(88.0f);
    v8f c = (v8f)((big & (v8i)splat8(88.0f)) | (~big & (v8i)x));
    v8f shifted = c * splat8(1.44269504f) + magic;
    v8f n = shifted - magic;
    v8f r = c - n * splat8(0.693359375f);
    r = r + n * splat8(2.12194440e-4f);
    v8f p = splat8(1.9875691500e-4f);
    p = p * r + splat8(1.3981999507e-3f);
    p = p * r + splat8(8.3334519073e-3f);
    p = p * r + splat8(4.1665795894e-2f);
    p = p * r + splat8(1.6666665459e-1f);
    p = p * r + splat8(5.0000001201e-1f);
    p = p * r * r + r + splat8(1.0f);
    v8i scaled = (v8i)p + (((v8i)shifted - (v8i)magic) << 23);
    return (v8f)(scaled & ~tiny);
}

#endif
