"""Attention over several devices: each computes its part once the rows are there, the owner merges what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from execution.paged_cases import dense, make, tolerance
from execution.partial_cases import SPREADS, spread

from core.devices import Device
from core.execution import site_attention
from core.execution.attention.metadata import Site
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.site_attention import SiteAttention
from core.transfer import TransferManager

OWNER, *LENDERS = (Device(name, index, "cpu", "cpu", 1 << 26) for index, name in enumerate(("own", "b", "c")))
CASE = SPREADS["mixed"]


@pytest.fixture
def attend() -> Iterator[Any]:
    """Attention over three devices' pages, and what plain attention gives."""
    query, k_pages, v_pages, metadata, spec = make(CASE)
    held = spread(k_pages, v_pages, metadata, 3, seed=1)
    devices = (OWNER, *LENDERS)
    kv = SimpleNamespace(
        layer=lambda layer, region: (held[region].k_pages, held[region].v_pages),
        region=lambda region: SimpleNamespace(device=devices[region]),
    )
    rows = torch.arange(query.shape[0])
    names = ("", *(device.name for device in LENDERS))
    sites = tuple(Site(name, rows, ((region, held[region].batch),)) for region, name in enumerate(names))
    backend = TorchPagedAttention()
    attention = SiteAttention(OWNER, kv, lambda device: backend, TransferManager())  # type: ignore[arg-type]
    expected = dense(query, k_pages, v_pages, metadata, spec)
    yield lambda: (attention.attend(0, query, replace(metadata, sites=sites), spec), expected)
    attention.close()


def test_parts_of_three_devices_are_the_whole(attend: Any) -> None:
    got, expected = attend()
    assert (got.double() - expected).abs().max().item() < tolerance(CASE)


def test_devices_wait_for_the_rows_and_the_owner_for_their_parts(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU would: nobody computes with a tensor before waiting for the event that was recorded behind it."""
    events: list[torch.Tensor] = []
    waited: list[int] = []

    def record(tensor: torch.Tensor) -> int:
        events.append(tensor)
        return len(events) - 1

    monkeypatch.setattr(site_attention, "_recorded", record)
    monkeypatch.setattr(site_attention, "_wait_for", lambda event, device: waited.append(event))
    merge = TorchPagedAttention.merge

    def check(self: TorchPagedAttention, parts: Any, *given: Any) -> torch.Tensor:
        for out, _ in parts[1:]:
            assert next(at for at, tensor in enumerate(events) if tensor is out) in waited
        return merge(self, parts, *given)

    monkeypatch.setattr(TorchPagedAttention, "merge", check)
    got, expected = attend()
    assert (got.double() - expected).abs().max().item() < tolerance(CASE)
    assert waited.count(0) == len(LENDERS), "each lender for the query"
    assert sorted(waited) == [0, 0, 1, 2]
