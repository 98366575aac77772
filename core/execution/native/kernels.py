"""Calls into the compiled library. Every call releases the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import addressof
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from core.execution.native.build import build_library, is_safe
from core.execution.native.instructions import Instructions, compiler_flags, max_rows
from core.execution.native.structs import DTYPES, Quantized, Weights
from core.logs import get_logger

logger = get_logger(__name__)

MAX_HEAD_DIM = 512
MAX_PARTS = 64  # that one merge takes

_NO_MEMORY = "no scratch memory for a native kernel"

_int, _i64, _ptr, _float = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def load_native(
    cache_dir: Path, threads: int | Callable[[], int] | None = None, instructions: Instructions = "native"
) -> NativeKernels | None:
    """Build (or find under `cache_dir`) and load the kernels; None, with a logged reason, where that is impossible."""
    path = build_library(cache_dir, compiler_flags(instructions))
    if path is None:
        return None
    if not is_safe(path):
        logger.warning("native kernels are off", reason=f"others can write to {path.parent}")
        return None
    try:
        return NativeKernels(path, threads, instructions)
    except (OSError, AttributeError) as error:
        logger.warning("native kernels are off", reason=str(error))
        return None


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _as_int32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    if any(tensor.dtype != torch.int32 for tensor in tensors):
        raise TypeError("block tables, query starts, lengths and bounds are int32")
    return [tensor.contiguous() for tensor in tensors]


def _describe(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, window: int
) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_int64]]:
    """`sizes` and `strides` of `vrm_paged_attention`; refuses what does not fit together."""
    heads, dim = q.shape[1:]
    _, block_size, kv_heads, key_dim = k_cache.shape
    if not (dim <= MAX_HEAD_DIM and key_dim == dim and heads % kv_heads == 0):
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k_cache.shape)}")
    if q.dtype != k_cache.dtype or q.dtype != v_cache.dtype:
        raise TypeError(f"queries, keys and values differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    seqs, max_blocks = block_tables.shape
    sizes = (_i64 * 8)(seqs, heads, kv_heads, dim, v_cache.shape[3], block_size, max_blocks, window)
    return sizes, (_i64 * 8)(q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3])


class NativeKernels:
    """The compiled kernels. Stateless, so any number of threads may share one.

    Each call computes with up to `threads` threads: a number, a function that says so at every call, or None for as
    many as torch uses in the calling thread. `max_rows` are the rows of x up to which they multiply, by dtype; further
    ones are torch's.
    """

    def __init__(
        self, path: Path, threads: int | Callable[[], int] | None = None, instructions: Instructions = "native"
    ) -> None:
        self.instructions = instructions
        self.max_rows = max_rows(instructions)
        self.num_threads: Callable[[], int] = torch.get_num_threads
        if threads is not None:
            self.num_threads = threads if callable(threads) else lambda: threads
        self._library = ctypes.CDLL(str(path))
        if not (self.half_products or self.packs):  # an old compiler
            self.max_rows[torch.bfloat16] = min(self.max_rows[torch.bfloat16], self.max_rows[torch.float16])

        def bind(name: str, *types: Any, status: bool = True) -> Any:
            """One of the library's functions; what it returns is its status, if it has one."""
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, _int if status else None
            return function

        self._linear = bind("vrm_linear", _ptr, _i64, _ptr, _i64, _ptr, _int)
        self._pack = bind("vrm_pack", _i64, _i64, _ptr, _ptr, _int)
        self._arrange = bind("vrm_arrange", _ptr, _i64, _int, _int)
        self._attention = bind("vrm_paged_attention", _int, *[_ptr] * 11, _float, _float, _ptr, _ptr, _int)
        self._merge = bind("vrm_merge_partials", _int, *[_ptr] * 5, _int, status=False)
        self._write_kv = bind("vrm_write_kv", *[_ptr] * 6, status=False)
        self._rms_norm = bind("vrm_rms_norm", _int, _i64, _i64, _ptr, _i64, _ptr, _float, _ptr, status=False)
        self._attention_layer = bind("vrm_attention_layer", _ptr, _ptr, _ptr, _i64, _ptr, _ptr, _ptr, _int)
        self._gated_mlp = bind("vrm_gated_mlp", _ptr, _int, _i64, _ptr, _i64, _ptr, _int)

    @property
    def packs(self) -> bool:
        """Whether the library has the kernels for packed bf16 weights."""
        return bool(self._library.vrm_packs())

    @property
    def has_panels(self) -> bool:
        """Whether panels are what the library multiplies quantized weights from fastest."""
        return bool(self._library.vrm_has_panels()) and not self.half_products

    @property
    def half_products(self) -> int:
        """Whether the library multiplies bf16 by instructions of the processor's own: 0 no, 1 AVX-512, 2 AMX."""
        return int(self._library.vrm_half_products())

    def linear(self, facts: Weights, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., K]`, of the dtype that `facts` name, to `[..., N]`."""
        return _product(self._linear, addressof(facts), x, facts.n, self.num_threads())

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Rearrange a bf16 weight `[N, K]`, in place, as `packed.c` describes; returns the exponents."""
        n, k = weight.shape
        exponents = torch.empty(n, -(-k // 128), dtype=torch.uint8)
        if self._pack(n, k, weight.data_ptr(), exponents.data_ptr(), self.num_threads()):
            raise MemoryError(_NO_MEMORY)
        return exponents

    def arrange(self, weight: Quantized, n: int, *, back: bool = False) -> None:
        """Bring the tensors of a quantized weight of `n` rows into the order of `panels.c`, in place, or `back`."""
        if self._arrange(addressof(weight), n, back, self.num_threads()):
            raise MemoryError(_NO_MEMORY)

    def paged_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
        query_start: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, sliding_window: int = 0,
        softcap: float = 0.0, sinks: torch.Tensor | None = None,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attention of packed queries over paged keys and values, all in one dtype (bf16, fp16 or fp32), on the CPU.

        Args:
            q: `[T, Hq, D]`, any strides over rows and heads.
            k_cache, v_cache: `[num_blocks, block_size, Hkv, D]` and `[..., Dv]`, any strides but the last.
            block_tables: int32 `[S, max_blocks]`. query_start: int32 `[S + 1]`, the rows of `q` of each sequence.
            seq_lens: int32 `[S]`, keys of each sequence, the queries' own (already written) included.
            scale: multiplies the scores.
            sliding_window: a query at position i sees keys j with `i - window < j <= i`; 0: all `j <= i`.
            softcap: scores become `cap * tanh(score / cap)`; 0: they do not.
            sinks: fp32 `[Hq]`, logits that join the softmax's denominator without a value.
            bounds: `(lo, hi)`, int32 `[T]`, ascending with the rows of a sequence, where keys are those that lie at one
                place: row r sees those numbered `lo[r] <= j < hi[r]`, whatever its position and the window.

        Returns:
            `[T, Hq, Dv]` in `q`'s dtype, or with `bounds` in fp32, and fp32 `[T, Hq]`: the natural log of the sum of
            exponentials of the scores, sinks left out, so that partial results merge. A row that sees no key gets zeros
            and -inf.

        Each sequence's result is the same whatever else is in the batch and however many threads there are.
        """
        if q.stride(2) != 1:
            q = q.contiguous()
        block_tables, query_start, seq_lens = _as_int32(block_tables, query_start, seq_lens)
        lo, hi = (None, None) if bounds is None else _as_int32(*bounds)
        if lo is not None and hi is not None and not len(lo) == len(hi) == len(q):
            raise ValueError(f"{len(q)} rows have bounds for {len(lo)} and {len(hi)}")
        sizes, strides = _describe(q, k_cache, v_cache, block_tables, sliding_window)
        sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        out = q.new_empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype if bounds is None else torch.float32)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        status = self._attention(
            DTYPES[q.dtype], sizes, strides, q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            block_tables.data_ptr(), query_start.data_ptr(), seq_lens.data_ptr(), _address(lo), _address(hi),
            _address(sinks), scale, softcap, out.data_ptr(), lse.data_ptr(), self.num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(_NO_MEMORY)
        return out, lse

    def merge_partials(
        self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], sinks: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """`core.execution.attention.merge.merge_partials` for up to `MAX_PARTS` parts on the CPU."""
        outs, lses = [out.contiguous() for out, _ in parts], [lse.contiguous() for _, lse in parts]
        shape = outs[0].shape
        if any(t.dtype != torch.float32 for t in (*outs, *lses)) or len(parts) > MAX_PARTS:
            raise TypeError(f"parts are fp32, and no more than {MAX_PARTS}")
        if any(out.shape != shape for out in outs) or any(lse.shape != shape[:2] for lse in lses):
            raise ValueError(f"parts differ in shape: {[tuple(t.shape) for t in (*outs, *lses)]}")
        sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        merged = outs[0].new_empty(shape, dtype=dtype)
        addresses = _ptr * len(parts)
        self._merge(
            DTYPES[dtype], (_i64 * 4)(len(parts), *shape), addresses(*(out.data_ptr() for out in outs)),
            addresses(*(lse.data_ptr() for lse in lses)), _address(sinks), merged.data_ptr(), self.num_threads(),
        )  # fmt: skip
        return merged

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store rows of `k` `[T, Hkv, D]` and `v` `[T, Hkv, Dv]` at int64 `slot_mapping` `[T]`, but for negative slots.

        Slot s is offset `s % block_size` of block `s // block_size` of caches `[num_blocks, block_size, Hkv, D]`.
        """
        if k.stride(2) != 1 or v.stride(2) != 1:
            k, v = k.contiguous(), v.contiguous()
        sizes = [k.shape[0], k.shape[1], k_cache.shape[1]]
        for rows, cache in ((k, k_cache), (v, v_cache)):
            if rows.dtype != cache.dtype:
                raise TypeError(f"rows are {rows.dtype}, the cache {cache.dtype}")
            width = rows.element_size()
            sizes += (rows.shape[2] * width, rows.stride(0) * width, rows.stride(1) * width)
            block, token, head, _ = cache.stride()
            sizes += (block * width, token * width, head * width)
        self._write_kv(
            (_i64 * 15)(*sizes), k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            slot_mapping.data_ptr(),
        )  # fmt: skip

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x` `[..., K]` over its root mean square, times `weight` `[K]`, as Llama's modules do it: sums in fp32, and
        the normalised row is rounded to `x`'s dtype before the product."""
        k = x.shape[-1]
        if x.dtype is not weight.dtype or x.dtype not in DTYPES or not x.is_cpu or weight.stride(0) != 1:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        rows = x.reshape(-1, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = x.new_empty(x.shape)
        self._rms_norm(
            DTYPES[x.dtype], rows.shape[0], k, rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, out.data_ptr()
        )  # fmt: skip
        return out

    def attention_layer(self, layer: int, step: int, x: int, ldx: int, cos: int, sin: int, out: int) -> None:
        """`vrm_attention_layer` of `layer.c`; all but `ldx` are addresses."""
        if self._attention_layer(layer, step, x, ldx, cos, sin, out, self.num_threads()):
            raise MemoryError(_NO_MEMORY)

    def gated_mlp(self, weights: int, activation: int, rows: int, x: int, ldx: int, out: int) -> None:
        """`vrm_gated_mlp` of `layer.c`; `weights`, `x` and `out` are addresses."""
        if self._gated_mlp(weights, activation, rows, x, ldx, out, self.num_threads()):
            raise MemoryError(_NO_MEMORY)


class PreparedLinear:
    """A weight `[N, K]` (and bias `[N]`) with what the kernel has to know of it worked out once. With `exponents`, the
    weight's memory is packed."""

    __slots__ = (
        "_address", "_call", "_exponents", "_max_rows", "_threads", "bias", "dtype", "facts", "k", "n", "weight",
        "weight_address",
    )  # fmt: skip

    def __init__(
        self,
        kernels: NativeKernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        exponents: torch.Tensor | None = None,
    ) -> None:
        self.weight, self.bias, self.dtype, self._exponents = weight, bias, weight.dtype, exponents
        self.n, self.k = weight.shape
        self.weight_address = weight.data_ptr()
        self.facts = Weights.of(weight, bias, exponents)
        self._address = addressof(self.facts)
        self._call = kernels._linear
        self._threads = kernels.num_threads
        self._max_rows = kernels.max_rows[weight.dtype]

    @staticmethod
    def covers(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the kernel can work with these."""
        return (
            weight.dtype in DTYPES and weight.is_cpu and weight.stride(1) == 1 and weight.numel() > 0
            and (bias is None or (bias.dtype == weight.dtype and bias.is_cpu and bias.stride(0) == 1))
        )  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., K]` to `[..., N]`, by torch where that is faster or where the kernel cannot."""
        shape = x.shape
        if x.dtype is self.dtype and shape[-1] == self.k and x.is_cpu and 0 < x.numel() <= self._max_rows * self.k:
            return self.run(x)
        return F.linear(x, self.weight, self.bias)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., K]`, of the weight's dtype, to `[..., N]`, by the kernel."""
        return _product(self._call, self._address, x, self.n, self._threads())


def _product(call: Callable[..., int], facts: int, x: torch.Tensor, n: int, threads: int) -> torch.Tensor:
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    lead, step = rows.stride()
    if step != 1:
        rows = rows.contiguous()
        lead = shape[-1]
    out = x.new_empty((*shape[:-1], n))
    if call(facts, rows.shape[0], rows.data_ptr(), lead, out.data_ptr(), threads):
        raise MemoryError(_NO_MEMORY)
    return out
