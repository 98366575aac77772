/* Row-wise work that surrounds a linear layer: scattering K and V into pages, RMS norm. */
#include "common.h"
#include "kernels.h"

/* Row t of k [tokens, heads, dim] goes to slot slots[t] of a cache viewed as [slots, heads, dim]. A cache slot is
 * (block, offset) with separate strides; strides are in bytes, `width` is the bytes of one head. Negative slots are
 * skipped. */
static void scatter(int64_t tokens, int64_t heads, int64_t width, const char *src, int64_t row, int64_t head, char *cache,
                    int64_t block, int64_t token, int64_t cache_head, int64_t block_size, const int64_t *slots) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        char *dst = cache + slots[t] / block_size * block + slots[t] % block_size * token;
        if (head == width && cache_head == width) {
            memcpy(dst, src + t * row, (size_t)(heads * width));
            continue;
        }
        for (int64_t h = 0; h < heads; h++) memcpy(dst + h * cache_head, src + t * row + h * head, (size_t)width);
    }
}

/* `sizes`: tokens, heads, block_size, then for k and for v: bytes per head and byte strides of source row, source
 * head, cache block, cache token, cache head. */
EXPORT void vrm_write_kv(const int64_t *sizes, const void *k, const void *v, void *k_cache, void *v_cache,
                         const int64_t *slots) {
    const int64_t *a = sizes + 3, *b = sizes + 9;
    scatter(sizes[0], sizes[1], a[0], k, a[1], a[2], k_cache, a[3], a[4], a[5], sizes[2], slots);
    scatter(sizes[0], sizes[1], b[0], v, b[1], b[2], v_cache, b[3], b[4], b[5], sizes[2], slots);
}

/* One block of 16: x times `inverse`, rounded, times the weight. */
INLINE void norm_block(int dt, const char *x, const char *w, float inverse, char *y) {
    v8f out[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
        out[half] = round8(dt, load_half(dt, x, half) * splat8(inverse)) * load_half(dt, w, half);
    store_block(dt, y, out[0], out[1]);
}

INLINE void rms_norm(int dt, int64_t rows, int64_t k, const char *x, int64_t ldx, const char *w, float eps, char *y) {
    const int64_t es = elem_size(dt), whole = k / 16 * 16;
    char x_tail[64], w_tail[64], y_tail[64];
    if (whole < k) copy_tail(dt, w_tail, w + whole * es, k - whole);
    for (int64_t r = 0; r < rows; r++) {
        const char *src = x + r * ldx * es;
        char *dst = y + r * k * es;
        v8f squares[2] = {splat8(0.0f), splat8(0.0f)};
        if (whole < k) {
            copy_tail(dt, x_tail, src + whole * es, k - whole);
            for (int half = 0; half < 2; half++) squares[half] = load_half(dt, x_tail, half) * load_half(dt, x_tail, half);
        }
        for (int64_t i = 0; i < whole; i += 16)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const v8f part = load_half(dt, src + i * es, half);
                squares[half] = fma8(part, part, squares[half]);
            }
        const v8f both = squares[0] + squares[1];
        const float inverse = 1.0f / sqrtf(lane_sums(both, both, both, both)[0] / (float)k + eps);
        for (int64_t i = 0; i < whole; i += 16) norm_block(dt, src + i * es, w + i * es, inverse, dst + i * es);
        if (whole < k) {
            norm_block(dt, x_tail, w_tail, inverse, y_tail);
            memcpy(dst + whole * es, y_tail, (size_t)((k - whole) * es));
        }
    }
}

/* y = x / rms(x) * w, rows contiguous in y; the normalised row is rounded to the element type before the product. */
EXPORT void vrm_rms_norm(int dt, int64_t rows, int64_t k, const void *x, int64_t ldx, const void *w, float eps,
                         void *y) {
    if (dt == DT_BF16) rms_norm(DT_BF16, rows, k, x, ldx, w, eps, y);
    else if (dt == DT_FP16) rms_norm(DT_FP16, rows, k, x, ldx, w, eps, y);
    else rms_norm(DT_FP32, rows, k, x, ldx, w, eps, y);
}
