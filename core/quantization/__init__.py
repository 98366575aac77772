"""Quantized weights: one inner form for all formats, and the modules that compute with it.

A weight `[n, k]` (`out_features`, `in_features`) is kept as the tensors that `WeightForm.tensors(n, k)` lists, all of
them contiguous, buffers of `QuantLinear` by these names::

    codes          uint8 [n, row_bytes]   one code for each column, packed; see below
    scale          [R, G]                 of a group of `group` columns (0: all) and `rows` rows (0: all);
                                          float16, bfloat16 or float32; uint8 or int8 under a super scale
    zero           [R, G]                 if the form has it: float16, float32, or uint8 (whole numbers)
    minimum        [R, G]                 if the form has it: float16 or float32; uint8 under a super minimum
    super_scale    [n, S]                 if the form has them: for each SUPER_GROUP (256) columns, float16 or float32
    super_minimum  [n, S]                 beside `super_scale` where there is a `minimum`
    order          int32 [k]              if the form has it (act-order): column j of the codes is column order[j] of
                                          the weight, so the product takes x[..., order]

with `R = ceil(n / rows)`, `G = ceil(k / group)`, `S = ceil(k / 256)`; the last group may be short. In fp32::

    value  = code - offset                     a whole number, or
             CODEBOOKS[codebook][code]         nf4, iq4_nl, or
             the byte as an FP8 number         fp8: float8_e4m3fn, float8_e5m2 (`bits` is 8)
    weight = (super_scale *) scale * (value - zero) + (super_minimum *) minimum

Codes are unsigned. `bits` of 8 is one byte for each column (xor 0x80 gives the signed number where `offset` is 128).
Others are split into planes of 4, 2 and 1 bits, lowest bits first: 2 = (2), 3 = (2, 1), 4 = (4), 5 = (4, 1),
6 = (4, 2), 7 = (4, 2, 1). A row holds its planes one after another, each of `k * width / 8` bytes. Within a plane,
columns follow each other from the lowest bits of a byte to the highest: in a 4-bit plane byte `b` holds column `2 b`
in its low nibble and column `2 b + 1` in its high one. `k` is a multiple of 8 unless `bits` is 8.

What a format becomes:

    --quantize int8         8 bits, offset 128, group 128, scale float16
    --quantize int4         4 bits, group 64, scale and zero float16
    GPTQ, AWQ               4 bits (GPTQ also 2, 3, 8), scale float16, zero uint8; `order` for act-order
    compressed-tensors      4 or 8 bits, offset 8 or 128, or zero; fp8 by row or tensor
    FP8                     fp8, scale float32 for blocks of 128 x 128, rows or the tensor
    bitsandbytes            nf4: codebook, group 64, scale float32; int8: offset 128, a scale for each row
    HQQ                     2, 3, 4 or 8 bits, scale and zero float16
    GGUF Q8_0, Q4_0, Q5_0   8, 4, 5 bits, offset 128, 8, 16, group 32, scale float16; Q4_1, Q5_1 with minimum
    GGUF Q4_K, Q5_K         4, 5 bits, group 32, scale and minimum uint8 under super ones of float16
    GGUF Q6_K, Q3_K         6, 3 bits, offset 32, 4, group 16, scale int8 under a super scale
    GGUF Q2_K               2 bits, group 16, scale and minimum uint8 under super ones
    GGUF IQ4_NL, IQ4_XS     codebook, group 32; IQ4_XS with scale int8 under a super scale

A kernel that computes with this form implements `core.quantization.kernels.ProductKernel`, and whoever adapts a stage
to its device gives it to `QuantLinear.use`. `core.quantization.weight` is the reference: it dequantizes some rows at a
time and multiplies.
"""
