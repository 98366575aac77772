"""Lossless codecs give back every byte, lossy ones stay within their stated error, the choice follows arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_helpers import LAYOUT, payload

from core.tiers.compress import SAMPLE_BLOCKS, CodecChoice, CodecSample, Compressor, choose_codec
from core.tiers.quantize import dequantize, quantize, quantized_nbytes
from core.tiers.records import BlockLayout, Quantization, TierSpeed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def kv_payload(layout: BlockLayout, seed: int = 0) -> bytearray:
    """Numbers like KV: normal, each row with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    payload = bytearray(layout.nbytes)
    numbers = torch.frombuffer(payload, dtype=DTYPES[layout.dtype])
    start = 0
    for page in layout.pages:
        rows = torch.randn(page.rows, page.dim, generator=generator)
        rows *= torch.exp(torch.randn(page.rows, 1, generator=generator))
        numbers[start : start + rows.numel()] = rows.flatten().to(numbers.dtype)
        start += rows.numel()
    return payload


def round_trip(compressor: Compressor, data: bytearray) -> bytes:
    codec, stored = compressor.encode(memoryview(data))
    into = bytearray(len(data))
    compressor.decode(codec, memoryview(bytes(stored)), memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_lossless_codecs_give_back_every_byte(codec: CodecChoice, dtype: str) -> None:
    layout = BlockLayout.of([(2, 16, 8)] * 3, 4, dtype)
    for data in (kv_payload(layout), bytearray(layout.nbytes), bytearray(payload(1, layout))):
        assert round_trip(Compressor(layout, codec), data) == data


@given(st.binary(min_size=LAYOUT.nbytes, max_size=LAYOUT.nbytes), st.sampled_from(["lz4", "zstd"]))
def test_any_bytes_come_back(data: bytes, codec: CodecChoice) -> None:
    assert round_trip(Compressor(LAYOUT, codec), bytearray(data)) == data


def test_numbers_of_kv_shrink_and_noise_is_stored_as_it_is() -> None:
    layout = BlockLayout.of([(8, 64, 64)] * 2, 16, "bfloat16")
    compressor = Compressor(layout, "zstd")
    codec, stored = compressor.encode(memoryview(kv_payload(layout)))
    assert codec == "zstd" and len(stored) < 0.85 * layout.nbytes
    assert compressor.encode(memoryview(bytearray(payload(1, layout))))[0] == "none"


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none", "brotli"])
def test_damaged_data_is_an_error(codec: str) -> None:
    compressor = Compressor(LAYOUT, "zstd")
    with pytest.raises(ValueError, match=codec):
        compressor.decode(codec, memoryview(b"\xff" * 40), memoryview(bytearray(LAYOUT.nbytes)))


# -- the choice --------------------------------------------------------------------------------------------------------

LZ4 = CodecSample("lz4", 0.9, 1e9, 4e9)
ZSTD = CodecSample("zstd", 0.6, 0.5e9, 1e9)


@pytest.mark.parametrize(
    ("samples", "read_bytes_s", "write_bytes_s", "chosen"),
    [
        ([], 1e8, 1e8, "none"),
        ([LZ4, ZSTD], 1e7, 1e7, "zstd"),  # a slow tier: size is all that counts
        ([LZ4, ZSTD], 5e9, 5e9, "none"),  # a fast one: any work is too slow
        ([LZ4, ZSTD], 3e8, 0.5e8, "zstd"),  # 2.0 + 1 against 3.3 ns a byte
        ([LZ4], 3e8, 0.5e8, "lz4"),
        ([LZ4, ZSTD], 5e8, 1e7, "none"),  # 1.2 + 1 and 1.8 + 0.25 against 2 ns a byte
        ([CodecSample("lz4", 0.8, 1e9, 4e9), ZSTD], 5e8, 1e7, "lz4"),  # 1.6 + 0.25
        ([LZ4, ZSTD], 1e8, 1e9, "none"),  # reading gains, writing does not
        ([CodecSample("zstd", 1.0, 1e12, 1e12)], 1e6, 1e6, "none"),  # nothing shrinks
    ],
)
def test_a_codec_must_beat_the_raw_tier_both_ways(
    samples: list[CodecSample], read_bytes_s: float, write_bytes_s: float, chosen: str
) -> None:
    assert choose_codec(samples, TierSpeed(read_bytes_s, write_bytes_s)) == chosen


def ticking(step_s: float) -> Iterator[float]:
    return (step_s * tick for tick in itertools.count())


@pytest.mark.parametrize(("step_s", "chosen"), [(1e-9, "zstd"), (1.0, "none")])
def test_auto_decides_on_real_blocks(step_s: float, chosen: str) -> None:
    layout = BlockLayout.of([(8, 64, 64)] * 2, 16, "bfloat16")
    ticks = ticking(step_s)
    compressor = Compressor(layout, "auto", speed=TierSpeed(1e9, 1e9), timer=lambda: next(ticks))
    codecs = [compressor.encode(memoryview(kv_payload(layout, seed)))[0] for seed in range(SAMPLE_BLOCKS + 1)]
    assert codecs[: SAMPLE_BLOCKS - 1] == ["none"] * (SAMPLE_BLOCKS - 1) and codecs[-1] == chosen
    assert compressor.name == chosen


@pytest.mark.parametrize(("bytes_s", "said"), [(1.005e9 + 0.5, "1.01"), (1.005e9 - 0.5, "1.00")])
def test_the_choice_is_logged_with_rounded_figures(bytes_s: float, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ticks = ticking(LAYOUT.nbytes / bytes_s)
    compressor = Compressor(LAYOUT, "auto", speed=TierSpeed(3.1416e9, 1e9), timer=lambda: next(ticks))
    for _ in range(SAMPLE_BLOCKS):
        compressor.encode(memoryview(bytearray(payload(1))))
    (line,) = (record.msg for record in caplog.records if isinstance(record.msg, dict) and "codec" in record.msg)
    assert line["codec"] == "none" and line["tier_read_gb_s"] == 3.14
    for codec in ("lz4", "zstd"):
        assert line[codec].startswith("ratio 1.") and line[codec].endswith(f", {said} GB/s in, {said} GB/s out")


def test_auto_never_quantizes_and_needs_a_speed() -> None:
    compressor = Compressor(LAYOUT, "auto")
    assert compressor.name == "none"
    assert round_trip(compressor, kv_payload(LAYOUT)) == kv_payload(LAYOUT)


# -- int8 and fp8 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """Measured: worst error as a share of its row's largest number, and root mean square error over that of the row."""

    worst: float
    rms: float


def measured_error(layout: BlockLayout, kind: Quantization) -> Error:
    data = kv_payload(layout)
    into = bytearray(len(data))
    dequantize(quantize(memoryview(data), layout, kind), layout, kind, memoryview(into))
    worst, squares, total = 0.0, 0.0, 0.0
    dtype, start = DTYPES[layout.dtype], 0
    before, after = (torch.frombuffer(raw, dtype=dtype).double() for raw in (data, into))
    for page in layout.pages:
        rows, restored = (x[start : start + page.rows * page.dim].view(page.rows, page.dim) for x in (before, after))
        error = (restored - rows).abs()
        worst = max(worst, float((error / rows.abs().amax(1, keepdim=True)).max()))
        squares += float((error / rows.square().mean(1, keepdim=True).sqrt()).square().sum())
        total += rows.numel()
        start += page.rows * page.dim
    return Error(worst, (squares / total) ** 0.5)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("kind", "worst", "rms"), [("int8", 0.0080, 0.009), ("fp8", 0.040, 0.030)])
def test_the_error_is_within_what_is_stated(dtype: str, kind: Quantization, worst: float, rms: float) -> None:
    """bf16 itself rounds by up to 1/256 of a number, which is in these bounds."""
    error = measured_error(BlockLayout.of([(4, 128, 64)] * 2, 16, dtype), kind)
    assert error.worst <= worst and error.rms <= rms
    assert error.rms > rms / 3, "the bound says what is measured"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_payloads_are_half_the_size_and_zeros_stay(kind: Quantization) -> None:
    layout = BlockLayout.of([(4, 128, 128)], 16, "bfloat16")
    assert quantized_nbytes(layout) / layout.nbytes == pytest.approx(0.516, abs=0.001)
    assert round_trip(Compressor(layout, "none", kind), bytearray(layout.nbytes)) == bytes(layout.nbytes)
    compressor = Compressor(layout, "zstd", kind)
    assert compressor.name == f"{kind}+zstd"
    data = kv_payload(layout)
    assert round_trip(compressor, data) == round_trip(Compressor(layout, "none", kind), data) != data


def test_a_quantized_payload_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 payload"):
        dequantize(bytearray(3), LAYOUT, "int8", memoryview(bytearray(LAYOUT.nbytes)))
