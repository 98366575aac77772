"""Pages that one machine lends a stage on another, and attention over them: what the frames of a `guests` link hold.

::

    KV_PAGES   borrower -> lender   write these pages                which pages, then their bytes
    KV_WANTED  borrower -> lender   send these pages                 which pages
    KV_ANSWER  lender -> borrower   to either                        as in `block_wire`
    SITE       borrower -> lender   where keys of a step's rows are  once a step, before its first QUERY
    QUERY      borrower -> lender   attend with these rows           how, then the rows `[R, Hq, D]`
    PARTIAL    lender -> borrower   what came of it                  fp32 `[R, Hq, Dv + 1]`: out, then lse
    FAILED     lender -> borrower   to QUERY, KV_PAGES or KV_WANTED  why it could not be done

    which pages   4      number of pages
                  2      region
                  2      number of layers; 0: all
                  4 ...  each page, then each layer

    SITE          4      sequences, S
                  4      rows, R
                  4      regions
                  4      tokens of a page
                  4 ...  first row of each sequence, and R
                  4 ...  position of each row
                         for each region:
                  4      its number
                  4      entries of its tables, M
                  4 ...  keys of each sequence there
                  4 ...  pages [S, M]
                  4 ...  which block of the sequence each of them is [S, M]

    how           4      number of the SITE
                  4      rows
                  4      window; 0: none
                  2      layer
                  2      query heads
                  2      numbers of a head
                  1      dtype of the rows
                  1      1: there is a softcap
                  8      scale, fp64
                  8      softcap, fp64
                  28     0

`layer` of a header is the number of the guest, `step` that of the request, or of the SITE. Integers are unsigned and
little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from core.cluster.tensors import DTYPE_OF, NAME_OF
from core.errors import ProtocolError
from core.execution.attention.metadata import AttentionSpec, SiteBatch
from core.network.frames import DTYPES

_PAGES = struct.Struct("<IHH")
_SITE = struct.Struct("<IIII")
_REGION = struct.Struct("<II")
_HOW = struct.Struct("<IIIHHHBBdd28x")
HOW_BYTES = _HOW.size
_INT = np.dtype("<i4")
_DTYPE_CODES = {code: DTYPE_OF[name] for name, (code, _) in DTYPES.items() if name != "bytes"}


class Pages(NamedTuple):
    """Pages of a region, of some `layers`; none: of all."""

    region: int
    pages: tuple[int, ...]
    layers: tuple[int, ...]


def pages_head(wanted: Pages) -> bytes:
    """Which pages."""
    numbers = np.array((*wanted.pages, *wanted.layers), dtype="<u4")
    return _PAGES.pack(len(wanted.pages), wanted.region, len(wanted.layers)) + numbers.tobytes()


def read_pages(payload: memoryview) -> tuple[Pages, memoryview]:
    """Which pages, and what follows. Raises `ProtocolError`."""
    count, region, layers = _unpack(_PAGES, payload, "pages")
    end = _PAGES.size + 4 * (count + layers)
    if not count or len(payload) < end:
        raise ProtocolError(f"{count} pages of {layers} layers are not named in {len(payload)} bytes")
    numbers = np.frombuffer(payload[_PAGES.size : end], dtype="<u4").tolist()
    return Pages(region, tuple(numbers[:count]), tuple(numbers[count:])), payload[end:]


@dataclass(frozen=True, slots=True)
class RegionTables:
    """What a region has of a step: int32 `seq_lens` `[S]`, `pages` and `block_index` `[S, M]`, as in `SiteBatch`."""

    region: int
    seq_lens: np.ndarray
    pages: np.ndarray
    block_index: np.ndarray


@dataclass(frozen=True, slots=True)
class SiteTables:
    """What a lender has to know of a step: int32 `query_start` `[S + 1]` and `query_at` `[R]`, as in `SiteBatch`."""

    block_size: int
    query_start: np.ndarray
    query_at: np.ndarray
    regions: tuple[RegionTables, ...]


def site_tables(regions: Sequence[tuple[int, SiteBatch]]) -> bytes:
    """A step's tables of all regions on one device, which are in main memory here."""
    first = regions[0][1]
    sequences, rows = len(first.host_seq_lens), len(first.query_at)
    parts = [
        _SITE.pack(sequences, rows, len(regions), first.block_size),
        np.array(first.host_query_start, dtype=_INT).tobytes(),
        first.query_at.astype(_INT).tobytes(),
    ]
    for region, batch in regions:
        parts.append(_REGION.pack(region, batch.block_index.shape[1]))
        parts.append(np.array(batch.host_seq_lens, dtype=_INT).tobytes())
        parts.append(batch.block_tables.numpy().astype(_INT).tobytes())
        parts.append(batch.block_index.astype(_INT).tobytes())
    return b"".join(parts)


def read_site(payload: memoryview) -> SiteTables:
    """Raises `ProtocolError` for tables that do not fit together. Whether the pages are there is the guest's to say."""
    sequences, rows, count, block_size = _unpack(_SITE, payload, "SITE")
    numbers = _Numbers(payload[_SITE.size :])
    query_start, query_at = numbers.take(sequences + 1), numbers.take(rows)
    regions = []
    for _ in range(count):
        region, width = numbers.take(2).tolist()
        seq_lens = numbers.take(sequences)
        pages, index = (numbers.take(sequences * width).reshape(sequences, width) for _ in range(2))
        _need(bool((seq_lens <= width * block_size).all()), "more keys than pages")
        regions.append(RegionTables(region, seq_lens, pages, index))
    _need(numbers.is_over and count > 0, "regions")
    _need(0 < block_size <= 1 << 10, "the size of a page")
    _need(query_start[0] == 0 and query_start[-1] == rows and bool((np.diff(query_start) >= 0).all()), "rows")
    return SiteTables(block_size, query_start, query_at, tuple(regions))


class _Numbers:
    """Int32 numbers, none of them negative, one after the other."""

    def __init__(self, data: memoryview) -> None:
        _need(len(data) % 4 == 0, "half a number")
        self._data = np.frombuffer(data, dtype=_INT)
        _need(bool((self._data >= 0).all()), "negative numbers")
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        _need(count <= len(self._data) - self._at, "numbers are missing")
        self._at += count
        return self._data[self._at - count : self._at]

    @property
    def is_over(self) -> bool:
        return self._at == len(self._data)


class Query(NamedTuple):
    """Rows to attend with: `rows` `[R, Hq, D]`."""

    site: int
    layer: int
    spec: AttentionSpec
    rows: torch.Tensor


def query_head(site: int, layer: int, rows: torch.Tensor, spec: AttentionSpec) -> bytes:
    """How to attend. A window of 0 is none."""
    count, heads, dim = rows.shape
    capped = spec.softcap is not None
    return _HOW.pack(
        site, count, spec.window or 0, layer, heads, dim, DTYPES[NAME_OF[rows.dtype]][0], capped, spec.scale,
        spec.softcap if spec.softcap is not None else 0.0,
    )  # fmt: skip


def read_query(payload: memoryview) -> Query:
    """Raises `ProtocolError`."""
    site, count, window, layer, heads, dim, code, capped, scale, softcap = _unpack(_HOW, payload, "QUERY")
    dtype = _DTYPE_CODES.get(code)
    _need(dtype is not None and dtype.is_floating_point and dtype.itemsize > 1, "rows of no dtype")
    assert dtype is not None
    _need(capped <= 1 and math.isfinite(scale) and math.isfinite(softcap) and (not capped or softcap > 0), "scores")
    data = payload[HOW_BYTES:]
    _need(count * heads * dim > 0 and count * heads * dim * dtype.itemsize == len(data), "rows of other sizes")
    spec = AttentionSpec(scale, window or None, softcap if capped else None)
    return Query(site, layer, spec, torch.frombuffer(data, dtype=dtype).view(count, heads, dim))


def _unpack(form: struct.Struct, payload: memoryview, what: str) -> tuple[int, ...]:
    if len(payload) < form.size:
        raise ProtocolError(f"{what} in {len(payload)} bytes")
    return form.unpack(payload[: form.size])


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ProtocolError(f"a step's tables, or its rows, do not fit together: {what}")
