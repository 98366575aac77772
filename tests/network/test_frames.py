"""Headers survive the way there and back, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ProtocolError
from core.network.frames import (
    DTYPES,
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    VERSION,
    Flag,
    Header,
    Opcode,
    check_payload,
    checksum,
    read_header,
    write_header,
)


def tensor(shape: tuple[int, ...] = (1, 7, 64), dtype: str = "bfloat16", **fields: int) -> Header:
    nbytes = DTYPES[dtype][1]
    for each in shape:
        nbytes *= each
    return Header(Opcode.HIDDEN, Flag.CHECKED, dtype=dtype, shape=shape, nbytes=nbytes, **fields)


@given(
    st.sampled_from(list(Opcode)),
    st.sampled_from([0, 1, 2, 4, 5, 6]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**64 - 1),
    st.data(),
)
def test_a_header_comes_back(opcode: Opcode, flags: int, word: int, node: int, step: int, data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(0, MAX_PAYLOAD_BYTES[opcode]))
    header = Header(
        opcode, flags, word, node, node // 2, step, node, sequence=word // 3, nbytes=nbytes, checksum=word // 5
    )
    written = write_header(header)
    assert len(written) == HEADER_BYTES
    assert read_header(written) == header


@given(st.sampled_from(sorted(set(DTYPES) - {"bytes"})), st.lists(st.integers(0, 9), max_size=4))
def test_a_tensor_s_header_comes_back(dtype: str, shape: list[int]) -> None:
    header = tensor(tuple(shape), dtype)
    assert read_header(write_header(header)) == header


@settings(max_examples=500)
@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_header_with_a_changed_byte_is_refused(at: int, change: int) -> None:
    data = bytearray(write_header(tensor(step=5, layer=3)))
    data[at] ^= change
    with pytest.raises(ProtocolError):
        read_header(data)


@settings(max_examples=500)
@given(st.binary(min_size=0, max_size=80))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_header(data)


def sealed(header: Header, at: int, value: bytes) -> bytes:
    """The header with other bytes, and a checksum that holds."""
    data = bytearray(write_header(header))
    data[at : at + len(value)] = value
    data[60:] = checksum((bytes(data[:60]),)).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (3, bytes((VERSION + 1,)), f"this program speaks version {VERSION}"),
        (4, b"\xff", "no opcode is 255"),
        (5, b"\x80", "bits are set that mean nothing"),
        (5, b"\3", "bits are set that mean nothing"),
        (6, b"\1", "bits are set that mean nothing"),
        (26, b"\x63", "dtype 99"),
        (27, b"\5", "with 5 dimensions"),
        (40, b"\1", "with 3 dimensions"),
        (28, b"\2", "are not bfloat16 \\[2, 7, 64\\]"),
        (28, b"\xff" * 12, "are not bfloat16"),
        (26, b"\0", "bytes have no shape"),
        (48, b"\xff" * 8, "up to 1073741824 are allowed"),
    ],
)
def test_what_a_header_may_not_say(at: int, value: bytes, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        read_header(sealed(tensor(), at, value))


def test_every_opcode_has_a_bound() -> None:
    assert set(MAX_PAYLOAD_BYTES) == set(Opcode)
    for opcode, limit in MAX_PAYLOAD_BYTES.items():
        with pytest.raises(ProtocolError, match=f"{opcode.name} of {limit + 1} bytes"):
            read_header(write_header(Header(opcode, nbytes=limit + 1)))


def test_a_payload_that_was_changed_is_noticed() -> None:
    payload = bytes(range(200))
    header = Header(Opcode.CALL, Flag.CHECKED, nbytes=200, checksum=checksum((payload[:50], payload[50:])))
    check_payload(header, payload)
    with pytest.raises(ProtocolError, match="CALL: the payload's checksum is wrong"):
        check_payload(header, payload[:-1] + b"\0")
