"""What frames of a `guests` link hold survives the way, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.cluster.guest_wire import (
    HOW_BYTES,
    Pages,
    pages_head,
    query_head,
    read_pages,
    read_query,
    read_site,
    site_tables,
)
from core.errors import ProtocolError
from core.execution.attention.metadata import AttentionSpec, SiteBatch, build_site_batch

BLOCK = 4


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def batches() -> list[tuple[int, SiteBatch]]:
    """Two sequences of 1 and 2 rows; the first has nothing in the second region."""
    ints = lambda *numbers: np.array(numbers, dtype=np.int32)  # noqa: E731
    here, cpu = ints(9, 30, 31), torch.device("cpu")
    first = build_site_batch([ints(3, 1), ints(0)], [ints(0, 2), ints(5)], [7, 4], [1, 2], here, BLOCK, cpu)
    second = build_site_batch([ints(), ints(6)], [ints(), ints(7)], [0, 2], [1, 2], here, BLOCK, cpu)
    return [(1, first), (4, second)]


@given(
    st.integers(0, 0xFFFF), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9),
    st.lists(st.integers(0, 0xFFFF), max_size=5), st.binary(max_size=20),
)  # fmt: skip
def test_pages_are_named(region: int, pages: list[int], layers: list[int], rest: bytes) -> None:
    wanted = Pages(region, tuple(pages), tuple(layers))
    read, data = read_pages(view(pages_head(wanted) + rest))
    assert (read, bytes(data)) == (wanted, rest)


def test_a_step_is_told() -> None:
    sent = batches()
    read = read_site(view(site_tables(sent)))
    assert read.block_size == BLOCK
    assert read.query_start.tolist() == [0, 1, 3] and read.query_at.tolist() == [9, 30, 31]
    for (region, batch), each in zip(sent, read.regions, strict=True):
        assert each.region == region and each.seq_lens.tolist() == list(batch.host_seq_lens)
        assert (each.pages == batch.block_tables.numpy()).all() and (each.block_index == batch.block_index).all()


@pytest.mark.parametrize("spec", [AttentionSpec(0.25), AttentionSpec(1.0, 7), AttentionSpec(0.5, None, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_told(spec: AttentionSpec, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 4, 8).to(dtype)
    sent = query_head(5, 2, rows, spec) + bytes(rows.view(torch.uint8).numpy().data)
    read = read_query(view(sent))
    assert (read.site, read.layer, read.spec) == (5, 2, spec)
    assert read.rows.dtype == dtype and torch.equal(read.rows, rows)


def changed(data: bytes, at: int, *numbers: int) -> memoryview:
    found = bytearray(data)
    found[at : at + 4 * len(numbers)] = np.array(numbers, dtype="<i4").tobytes()
    return memoryview(found)


@pytest.mark.parametrize(
    ("at", "numbers"),
    [
        (0, (3,)),  # sequences
        (0, (2**31 - 1,)),
        (4, (2,)),  # rows
        (8, (0,)),  # regions
        (8, (3,)),
        (12, (0,)),  # tokens of a page
        (12, (4096,)),
        (12, (3,)),  # so that there are more keys than pages
        (16, (1,)),  # where rows begin
        (16, (0, 4, 3)),
        (28, (-1,)),  # a position
        (44, (2**31 - 1,)),  # entries of a table
        (48, (9,)),  # keys
        (56, (-3,)),  # a page
    ],
)
def test_tables_that_do_not_fit_together_are_refused(at: int, numbers: tuple[int, ...]) -> None:
    data = site_tables(batches())
    read_site(view(data))
    with pytest.raises(ProtocolError):
        read_site(changed(data, at, *numbers))
    with pytest.raises(ProtocolError):
        read_site(view(data + bytes(4)))
    with pytest.raises(ProtocolError):
        read_site(view(data[:-4]))


ROWS = query_head(1, 0, torch.zeros(1, 2, 4), AttentionSpec(1.0)) + bytes(32)


@pytest.mark.parametrize(
    "data",
    [
        ROWS[: HOW_BYTES - 1],
        ROWS[:-1],
        ROWS + bytes(4),
        ROWS[:4] + bytes(4) + ROWS[8:],  # no rows
        ROWS[:18] + b"\0" + ROWS[19:],  # bytes
        ROWS[:18] + b"\3" + ROWS[19:],  # int32
        ROWS[:18] + b"\x63" + ROWS[19:],
        ROWS[:19] + b"\1" + ROWS[20:],  # a softcap of 0
        ROWS[:19] + b"\2" + ROWS[20:],
        ROWS[:20] + b"\xff" * 8 + ROWS[28:],  # a scale that is no number
    ],
)
def test_rows_that_are_not_what_they_say_are_refused(data: bytes) -> None:
    read_query(view(ROWS))
    with pytest.raises(ProtocolError):
        read_query(view(data))


@given(st.binary(max_size=120))
def test_garbage_is_refused(data: bytes) -> None:
    for read in (read_pages, read_site, read_query):
        try:
            read(view(data))
        except ProtocolError:
            continue


@given(st.data())
def test_changed_tables_are_read_or_refused(data: st.DataObject) -> None:
    told = bytearray(site_tables(batches()))
    for _ in range(data.draw(st.integers(1, 4))):
        told[data.draw(st.integers(0, len(told) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = read_site(memoryview(told))
    except ProtocolError:
        return
    for each in read.regions:
        assert each.pages.shape == each.block_index.shape == (len(each.seq_lens), each.pages.shape[1])
        assert (each.seq_lens <= each.pages.shape[1] * read.block_size).all()
