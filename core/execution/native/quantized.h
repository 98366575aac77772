/* A quantized weight, as `core/quantization/__init__.py` describes it. */
#pragma once
#include "common.h"

#define SUPER_GROUP 256 /* columns that share a super scale */

/* Beside the element types of `common.h`. */
enum { DT_UINT8 = 3, DT_INT8 = 4 };

/* Filled in on the Python side, in this order. A missing tensor is NULL. */
typedef struct {
    int64_t bits, group, rows, offset;           /* group, rows: 0 for all */
    int64_t k, row_bytes, groups, supers;        /* of a row: columns, bytes of codes, groups, super scales */
    int64_t scale_type, zero_type, minimum_type, super_type;
    const char *codes, *scale, *zero, *minimum, *super_scale, *super_minimum;
    const float *codebook; /* what a code means, where that is not itself: 16 entries, or 256 */
    int64_t panels;        /* whether all of it is in the order of `panels.c` */
} Quantized;

INLINE int64_t number_size(int type) { return type >= DT_UINT8 ? 1 : elem_size(type); }

/* Columns [from, to) of rows [row, row + rows) as numbers of type `dt`, `step` bytes from a row to the next. `from` is a
 * multiple of 32 where codes are not bytes. */
void vrm_dequantize(const Quantized *q, int dt, int64_t row, int64_t rows, int64_t from, int64_t to, char *out,
                    int64_t step);
