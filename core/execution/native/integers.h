/* What the kernels that multiply 16-bit integers share: `packed.c` and `panels.c`. For AVX2. */
#pragma once
#include "common.h"

INLINE v8i larger(v8i a, v8i b) { return (v8i)_mm256_max_epi32((__m256i)a, (__m256i)b); }

INLINE int largest_lane(v8i v) {
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}

/* a0 += x * w0, a1 += x * w1 for one pair of K. Spelt out because all 16 registers are in use, and compilers would
 * spill accumulators. */
INLINE void multiply_add(const int32_t *x, __m256i w0, __m256i w1, __m256i *a0, __m256i *a1) {
    __m256i p0, p1;
    __asm__("vpbroadcastd %4, %3\n\t"
            "vpmaddwd %5, %3, %2\n\t"
            "vpmaddwd %6, %3, %3\n\t"
            "vpaddd %2, %0, %0\n\t"
            "vpaddd %3, %1, %1"
            : "+x"(*a0), "+x"(*a1), "=&x"(p0), "=&x"(p1)
            : "m"(*x), "x"(w0), "x"(w1));
}
