"""Records as bytes, and back: MessagePack by msgspec, checked on the way in. Nothing is ever unpickled.

A message is one byte of version and the record; arrays are extension values: dtype, dimensions, little-endian data.
What does not decode to a record whose parts fit each other raises `RecordError`, before anything of it is used.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import msgspec
import numpy as np

from core.decoding import UNREADABLE
from core.errors import RecordError
from core.execution.records import StepOutput, StepRecord
from core.kv_cache.page_ops import StagePart

VERSION = 1
MAX_BYTES = 1 << 30
"""Of one record. Raw logits are the largest."""

_ARRAY = 1
_DTYPES = tuple(np.dtype(name) for name in ("<i4", "<i8", "u1", "<f4"))
_MAX_DIMENSIONS = 2

Record = TypeVar("Record", StepRecord, StagePart, StepOutput)


def encode(record: StepRecord | StagePart | StepOutput) -> bytes:
    """The record's bytes."""
    return bytes((VERSION,)) + _ENCODER.encode(record)


def decode(data: bytes, kind: type[Record]) -> Record:
    """The record of this kind in `data`, whose arrays are copies of their own. Raises `RecordError`."""
    if len(data) > MAX_BYTES:
        raise RecordError(f"a record has {len(data)} bytes, more than the {MAX_BYTES} allowed")
    if data[:1] != bytes((VERSION,)):
        raise RecordError(f"a record is of version {data[0] if data else None}, this program reads version {VERSION}")
    try:
        record = msgspec.msgpack.decode(data[1:], type=kind, ext_hook=_read_array, dec_hook=_accept_array)
    except (*UNREADABLE, ValueError) as error:
        raise RecordError(f"a {kind.__name__} cannot be read: {error}") from error
    if isinstance(record, StepRecord):
        _check_step(record)
    elif isinstance(record, StagePart):
        _need(record.placed.dtype == np.int32 and record.placed.shape[1:] == (3,), "placed is not int32 [n, 3]")
    return record


def _write_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        shape = np.array(array.shape, dtype="<u4").tobytes()
        return msgspec.msgpack.Ext(_ARRAY, bytes((_DTYPES.index(array.dtype), array.ndim)) + shape + array.tobytes())
    raise TypeError(f"{type(value).__name__} is no part of a record")


def _read_array(code: int, data: memoryview) -> np.ndarray:
    if code != _ARRAY or len(data) < 2 or data[0] >= len(_DTYPES) or data[1] > _MAX_DIMENSIONS:
        raise ValueError("an extension value is no array")
    dtype, first = _DTYPES[data[0]], 2 + 4 * data[1]
    if len(data) < first:
        raise ValueError("an array lacks its dimensions")
    shape = tuple(np.frombuffer(data[2:first], dtype="<u4").tolist())
    if math.prod(shape) * dtype.itemsize != len(data) - first:
        raise ValueError(f"an array of {shape} {dtype} has {len(data) - first} bytes")
    array: np.ndarray = np.frombuffer(data[first:], dtype=dtype).reshape(shape).copy()
    return array


def _accept_array(kind: type, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"expected an array, got {type(value).__name__}")  # noqa: TRY004  msgspec's way to say so
    return value


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_write_array)


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise RecordError(f"a record does not fit together: {what}")


def _check_step(record: StepRecord) -> None:
    """Shapes and dtypes agree, and rows point into the record."""
    count = (len(record.seq_ids),)
    _need(record.seq_ids.dtype == record.ended.dtype == np.int64, "sequence ids are int64")
    for name in ("starts", "counts", "told"):
        array = getattr(record, name)
        _need(array.dtype == np.int32 and array.shape == count, f"{name} is not int32 [{count[0]}]")
        _need(bool((array >= 0).all()), f"{name} has negative entries")
    _need(record.flags.dtype == np.uint8 and record.flags.shape == count, "flags do not fit the rows")
    _need(record.tokens.dtype == np.int32 and record.tokens.shape == (int(record.told.sum(dtype=np.int64)),), "tokens")
    blocks = record.blocks
    _need(blocks.dtype == np.int32 and blocks.shape[1:] == (3,) and bool((blocks >= 0).all()), "blocks")
    _need(bool((blocks[:, 0] < count[0]).all()), "blocks of rows that are not there")
    for new in record.new:
        _need(new.token_ids.dtype == new.blocks.dtype == np.int32, "a new sequence's arrays are int32")
        _need(new.token_ids.ndim == new.blocks.ndim == 1, "a new sequence's arrays have one dimension")
        _need(0 < new.num_prompt_tokens <= len(new.token_ids), "a new sequence's prompt is longer than its tokens")
