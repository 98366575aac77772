/* The order in memory that `panels.c` describes, and back. */
#include "common.h"
#include "kernels.h"
#include "panels.h"
#include "pool.h"
#include "quantized.h"

static const uint32_t KEPT[5] = {0x55555555, 0x33333333, 0x0f0f0f0f, 0x00ff00ff, 0x0000ffff}; /* of width 1, 2, 4, 8, 16 */

INLINE int log_of(int width) { return width == 8 ? 3 : width / 2; }

/* Elements with even numbers to the lower half, the others to the upper one. */
INLINE uint32_t parted(uint32_t v, int width) {
    uint32_t half[2];
    for (int odd = 0; odd < 2; odd++) {
        uint32_t u = (odd ? v >> width : v) & KEPT[log_of(width)];
        for (int w = width; w < 16; w *= 2) u = (u | u >> w) & KEPT[log_of(w) + 1];
        half[odd] = u;
    }
    return half[0] | half[1] << 16;
}

/* The reverse. */
INLINE uint32_t joined(uint32_t v, int width) {
    uint32_t all = 0;
    for (int odd = 0; odd < 2; odd++) {
        uint32_t u = odd ? v >> 16 : v & 0xffff;
        for (int w = 8; w >= width; w /= 2) u = (u | u << w) & KEPT[log_of(w)];
        all |= odd ? u << width : u;
    }
    return all;
}

/* A matrix [rows, columns] of elements of `size` bytes to its transpose. */
static void transpose(const char *from, int64_t rows, int64_t columns, int64_t size, char *to) {
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) memcpy(to + (c * rows + r) * size, from + (r * columns + c) * size, (size_t)size);
}

typedef struct {
    const Quantized *q;
    int back;
    char *scratch; /* per thread */
    int64_t scratch_bytes;
} Arranging;

static void arrange_codes(const Quantized *q, int back, char *panel, char *scratch) {
    memcpy(scratch, panel, (size_t)(PANEL * q->row_bytes));
    int64_t before = 0; /* words of a row in earlier planes */
    const int64_t row_words = q->row_bytes / 4;
    for (int width = q->bits == 8 ? 8 : 4; width; width /= 2) {
        if (!(q->bits & width)) continue;
        const int64_t words = q->k * width / 32;
        for (int64_t r = 0; r < PANEL; r++)
            for (int64_t i = 0; i < words; i++) {
                const int64_t flat = r * row_words + before + i, paneled = (before + i) * PANEL + r;
                uint32_t v;
                memcpy(&v, scratch + (back ? paneled : flat) * 4, 4);
                v = back ? joined(v, width) : parted(v, width);
                memcpy(panel + (back ? flat : paneled) * 4, &v, 4);
            }
        before += words;
    }
}

static void arrange_numbers(const char *numbers, int type, int64_t columns, int64_t panel, int back, char *scratch) {
    if (!numbers) return;
    const int64_t size = number_size(type), bytes = PANEL * columns * size;
    char *there = (char *)numbers + panel * bytes;
    memcpy(scratch, there, (size_t)bytes);
    transpose(scratch, back ? columns : PANEL, back ? PANEL : columns, size, there);
}

static void arrange_share(void *context, int64_t panel, int thread) {
    const Arranging *a = context;
    const Quantized *q = a->q;
    char *scratch = a->scratch + thread * a->scratch_bytes;
    arrange_codes(q, a->back, (char *)q->codes + panel * PANEL * q->row_bytes, scratch);
    if (q->rows == 1) {
        arrange_numbers(q->scale, (int)q->scale_type, q->groups, panel, a->back, scratch);
        arrange_numbers(q->zero, (int)q->zero_type, q->groups, panel, a->back, scratch);
        arrange_numbers(q->minimum, (int)q->minimum_type, q->groups, panel, a->back, scratch);
    }
    arrange_numbers(q->super_scale, (int)q->super_type, q->supers, panel, a->back, scratch);
    arrange_numbers(q->super_minimum, (int)q->super_type, q->supers, panel, a->back, scratch);
}

EXPORT int vrm_arrange(const Quantized *q, int64_t n, int back, int threads) {
    Arranging a = {.q = q, .back = back};
    a.scratch_bytes = round64(max64(PANEL * q->row_bytes, PANEL * 4 * max64(q->groups, q->supers)));
    a.scratch = aligned_alloc(64, (size_t)(threads * a.scratch_bytes));
    if (!a.scratch) return 1;
    vrm_parallel(arrange_share, &a, n / PANEL, threads);
    free(a.scratch);
    return 0;
}
