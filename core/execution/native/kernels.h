/* The library's kernels, for the ones that are put together from others. */
#pragma once
#include "quantized.h"
#include <stdint.h>

/* A linear layer: element type, rows, columns and leading dimension of W (in elements), W [n, k], and bias [n] or NULL.
 * With `exponents`, W is in the panels of `packed.c`; with `quantized` there is no `weight`, and `type` is that of x and y.
 * Filled in on the Python side, in this order. */
typedef struct {
    int64_t type, n, k, ld;
    const char *weight, *bias, *exponents;
    const Quantized *quantized;
} Weights;

/* y[i] = x W[i]^T for `count` layers with the same k. x has the weights' element type. Returns 0, or 1 when scratch
 * memory could not be had. */
int vrm_linears(const Weights *const *weights, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                int threads);
int vrm_linear(const Weights *weights, int64_t m, const void *x, int64_t ldx, void *y, int threads);

/* Whether this processor has what packed weights are for. */
int vrm_packs(void);
/* Brings a bf16 W [n, k], contiguous, into panels where it is; `exponents` is n * ceil(k / 128) bytes. n and k are
 * multiples of 16 and every |w| is below 2^107. Returns 0, or 1 when scratch memory could not be had. */
int vrm_pack(int64_t n, int64_t k, void *w, void *exponents, int threads);
/* `vrm_linears` for packed weights. */
int vrm_packed_linears(const Weights *const *weights, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                       int threads);

/* Whether this processor has what panels of quantized weights are for. */
int vrm_has_panels(void);
/* Brings the n rows of a quantized weight, all its tensors, into the order of `panels.c` where they are, or `back`. n is a
 * multiple of 16 and k of 32. Returns 0, or 1 when scratch memory could not be had. */
int vrm_arrange(const Quantized *q, int64_t n, int back, int threads);
/* `vrm_linears` for weights in this order. Groups are of 16, 32, 64 or a multiple of 128 columns. */
int vrm_panel_linears(const Weights *const *weights, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                      int threads);

/* Whether this processor multiplies bf16 itself: 0 no, 1 by AVX-512, 2 by tiles (AMX). */
int vrm_half_products(void);
/* `vrm_linears` for bf16 weights as they are, where it does. */
int vrm_half_linears(const Weights *const *weights, int count, int64_t m, const void *x, int64_t ldx, char *const *y,
                     int threads);

int vrm_paged_attention(int dt, const int64_t *sizes, const int64_t *strides, const void *q, const void *k,
                        const void *v, const int32_t *tables, const int32_t *query_start, const int32_t *seq_lens,
                        const int32_t *row_lo, const int32_t *row_hi, const float *sinks, float scale, float softcap,
                        void *out, float *lse, int threads);
void vrm_write_kv(const int64_t *sizes, const void *k, const void *v, void *k_cache, void *v_cache,
                  const int64_t *slots);
void vrm_rms_norm(int dt, int64_t rows, int64_t k, const void *x, int64_t ldx, const void *w, float eps, void *y);
