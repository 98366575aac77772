/* Row-wise work that surrounds a linear layer: scattering K and V into pages, RMS norm, gated SiLU. */
#include "common.h"

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

INLINE float round_to(int dt, float value) {
    char cell[4];
    store_one(dt, cell, value);
    return load_one(dt, cell);
}

INLINE void rms_norm(int dt, int64_t rows, int64_t k, const char *x, int64_t ldx, const char *w, float eps, float offset,
                     int cast_first, char *y) {
    const int64_t es = elem_size(dt);
    for (int64_t r = 0; r < rows; r++) {
        const char *src = x + r * ldx * es;
        char *dst = y + r * k * es;
        v8f squares = splat8(0.0f);
        int64_t i = 0;
        for (; i + 16 <= k; i += 16)
            for (int half = 0; half < 2; half++) {
                v8f part = load_half(dt, src + i * es, half);
                squares = fma8(part, part, squares);
            }
        float sum = lane_sums(squares, squares, squares, squares)[0];
        for (; i < k; i++) sum += load_one(dt, src + i * es) * load_one(dt, src + i * es);
        const float inverse = 1.0f / sqrtf(sum / (float)k + eps);
        for (i = 0; i < k; i++) {
            float value = load_one(dt, src + i * es) * inverse;
            if (cast_first) value = round_to(dt, value);
            store_one(dt, dst + i * es, value * (load_one(dt, w + i * es) + offset));
        }
    }
}

/* y = x / rms(x) * (w + offset), rows contiguous in y. `cast_first` rounds the normalised row to the element type
 * before the product (Llama); otherwise the product is rounded once (Gemma, with offset 1). */
EXPORT void vrm_rms_norm(int dt, int64_t rows, int64_t k, const void *x, int64_t ldx, const void *w, float eps,
                         float offset, int cast_first, void *y) {
    if (dt == DT_BF16) rms_norm(DT_BF16, rows, k, x, ldx, w, eps, offset, cast_first, y);
    else if (dt == DT_FP16) rms_norm(DT_FP16, rows, k, x, ldx, w, eps, offset, cast_first, y);
    else rms_norm(DT_FP32, rows, k, x, ldx, w, eps, offset, cast_first, y);
}
