"""Compression of blocks below host RAM, per tier: none, lz4, zstd, or whichever of them measurement says pays.

Lossless codecs see the numbers' bytes by significance (all first bytes, then all second ones): signs and exponents of
KV repeat, mantissas do not, and side by side neither compressor finds that. int8 and fp8 (`core.tiers.quantize`) come
before it where they are asked for; they are never chosen by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lz4.block
import numpy as np
import zstandard

from core.logs import get_logger
from core.tiers.quantize import dequantize, quantize, quantized_nbytes
from core.tiers.records import BlockLayout, Quantization, TierSpeed

logger = get_logger(__name__)

CodecChoice = Literal["auto", "none", "lz4", "zstd"]
ZSTD_LEVEL = 1
SAMPLE_BLOCKS = 4
"""Real blocks that an automatic choice is measured on."""


@dataclass(frozen=True, slots=True)
class CodecSample:
    """What a codec did with real blocks: bytes out per byte in, and bytes in per second of work in each direction."""

    codec: str
    ratio: float
    compress_bytes_s: float
    decompress_bytes_s: float


def choose_codec(samples: Sequence[CodecSample], tier: TierSpeed) -> str:
    """The codec with the fastest read, `ratio/bw_read + 1/decompress` seconds per byte, among those whose read and
    write (`ratio/bw_write + 1/compress`) both beat the raw tier; "none" if there is none. Work and transfer are counted
    one after the other."""
    best, best_s = "none", 1.0 / tier.read_bytes_s
    for sample in samples:
        read_s = sample.ratio / tier.read_bytes_s + 1.0 / sample.decompress_bytes_s
        write_s = sample.ratio / tier.write_bytes_s + 1.0 / sample.compress_bytes_s
        if read_s < best_s and write_s < 1.0 / tier.write_bytes_s:
            best, best_s = sample.codec, read_s
    return best


class Compressor:
    """Encodes and decodes one tier's payloads. `encode` is for one thread, `decode` for any."""

    def __init__(
        self,
        layout: BlockLayout,
        choice: CodecChoice = "none",
        quantization: Quantization = "none",
        speed: TierSpeed | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`speed` is the raw tier's, for "auto"; without it "auto" is "none"."""
        self._layout = layout
        self._quantization: Quantization = quantization
        self._timer = timer
        self._speed = speed
        self._undecided = choice == "auto" and speed is not None
        self._codec: str = "none" if choice == "auto" else choice
        self._measured: dict[str, list[tuple[int, int, float, float]]] = {"lz4": [], "zstd": []}

    @property
    def name(self) -> str:
        """Such as "zstd" or "int8+lz4"; "auto" until enough blocks were seen."""
        codec = "auto" if self._undecided else self._codec
        return codec if self._quantization == "none" else f"{self._quantization}+{codec}"

    def encode(self, payload: memoryview) -> tuple[str, memoryview]:
        """The lossless codec that was used, and the bytes to store. A block that does not shrink is stored as it is."""
        raw = payload
        if self._quantization != "none":
            raw = memoryview(quantize(payload, self._layout, self._quantization))
        if self._undecided:
            self._measure(raw)
        if self._codec == "none":
            return "none", raw
        packed = compress(self._codec, raw, self._stride)
        return (self._codec, memoryview(packed)) if len(packed) < len(raw) else ("none", raw)

    def decode(self, codec: str, data: memoryview, into: memoryview) -> None:
        """Fill `into`, a whole payload, from what `encode` gave. Raises `ValueError` if the data is not that."""
        lossy = self._quantization != "none"
        nbytes = quantized_nbytes(self._layout) if lossy else self._layout.nbytes
        target = memoryview(bytearray(nbytes)) if lossy else into
        decompress(codec, data, target, self._stride)
        if lossy:
            dequantize(bytearray(target), self._layout, self._quantization, into)

    @property
    def _stride(self) -> int:
        return self._layout.element_bytes if self._quantization == "none" else 1

    def _measure(self, raw: memoryview) -> None:
        """Try every codec on one more block; decide after enough of them."""
        out = memoryview(bytearray(len(raw)))
        for codec, seen in self._measured.items():
            started_s = self._timer()
            packed = compress(codec, raw, self._stride)
            packed_s = self._timer()
            decompress(codec, memoryview(packed), out, self._stride)
            seen.append((len(raw), len(packed), packed_s - started_s, self._timer() - packed_s))
        if len(self._measured["zstd"]) < SAMPLE_BLOCKS or self._speed is None:
            return
        samples = [_summary(codec, seen) for codec, seen in self._measured.items()]
        self._codec = choose_codec(samples, self._speed)
        self._undecided = False
        logger.info(
            "codec chosen by measurement",
            codec=self._codec,
            tier_read_gb_s=round(self._speed.read_bytes_s / 1e9, 2),
            **{
                sample.codec: f"ratio {sample.ratio:.2f}, {sample.compress_bytes_s / 1e9:.2f} GB/s in, "
                f"{sample.decompress_bytes_s / 1e9:.2f} GB/s out"
                for sample in samples
            },
        )


def _summary(codec: str, seen: Sequence[tuple[int, int, float, float]]) -> CodecSample:
    raw, packed, in_s, out_s = (sum(column) for column in zip(*seen, strict=True))
    return CodecSample(codec, packed / raw, raw / max(in_s, 1e-9), raw / max(out_s, 1e-9))


def compress(codec: str, raw: memoryview, stride: int) -> bytes:
    """Compress numbers of `stride` bytes each. Raises `ValueError` for an unknown codec."""
    planes = raw
    if stride > 1:
        planes = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, stride).T).data.cast("B")
    if codec == "lz4":
        packed: bytes = lz4.block.compress(planes, store_size=False)
        return packed
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=False).compress(planes)
    raise ValueError(f"unknown codec {codec!r}")


def decompress(codec: str, data: memoryview, into: memoryview, stride: int) -> None:
    """Undo `compress` into exactly `len(into)` bytes. Raises `ValueError` if that is not what the data holds."""
    try:
        if codec == "none":
            planes: bytes | memoryview = data
        elif codec == "lz4":
            planes = lz4.block.decompress(data, uncompressed_size=len(into))
        elif codec == "zstd":
            planes = zstandard.ZstdDecompressor().decompress(data, max_output_size=len(into))
        else:
            raise ValueError(f"unknown codec {codec!r}")
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        raise ValueError(f"{codec} data is damaged: {error}") from error
    if len(planes) != len(into):
        raise ValueError(f"{codec} data gives {len(planes)} bytes instead of {len(into)}")
    if codec == "none" or stride == 1:
        into[:] = planes
    else:
        target = np.frombuffer(into, np.uint8)
        for place, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(stride, -1)):
            target[place::stride] = plane  # ten times as fast as one transposed copy
