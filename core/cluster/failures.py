"""How a step failed on another node, as bytes and back."""

from __future__ import annotations

from typing import Literal

import msgspec

from core.decoding import UNREADABLE
from core.devices import machine_of
from core.devices.exhaustion import is_out_of_memory
from core.errors import DeviceLostError, OutOfDeviceMemoryError, PageMoveError, ProtocolError, StepFailedError

Kind = Literal["failed", "out_of_memory", "pages", "device_lost"]
_LONGEST = 4000


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a step. `device` is the one that has to answer for it."""

    kind: Kind
    message: str
    device: str


def failure_of(error: BaseException, device: str) -> Failure:
    """What to tell other nodes of an error; `device` is where it happened, by the name that the cluster has for it. A
    device of another machine that is lost is told by its own."""
    kind: Kind = "failed"
    if isinstance(error, PageMoveError):
        kind = "pages"
    elif isinstance(error, DeviceLostError):
        kind = "device_lost"
        device = error.device if machine_of(error.device) else device
    elif isinstance(error, OutOfDeviceMemoryError) or is_out_of_memory(error):
        kind = "out_of_memory"
    return Failure(kind, (str(error) or type(error).__name__)[:_LONGEST], device)


def error_of(failure: Failure) -> Exception:
    """The error that the runner would have seen, had the stage been in its process."""
    if failure.kind == "pages":
        return PageMoveError(failure.message)
    if failure.kind == "device_lost":
        return DeviceLostError(failure.message, device=failure.device)
    if failure.kind == "out_of_memory":
        return OutOfDeviceMemoryError(failure.message)
    return StepFailedError(f"{failure.device}: {failure.message}")


def encode_failure(failure: Failure) -> bytes:
    return msgspec.msgpack.encode(failure)


def decode_failure(data: memoryview) -> Failure:
    """Raises `ProtocolError`."""
    try:
        return msgspec.msgpack.decode(data, type=Failure)
    except UNREADABLE as error:
        raise ProtocolError(f"a failure cannot be read: {error}") from error
