"""Random spreads of paged batches over sites, and attention put together from the sites' parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from execution.paged_cases import Case

from core.execution.attention.merge import Part
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch, build_site_batch

SPREADS = {
    "decode": Case(((1, 1), (1, 7), (1, 70), (1, 133))),
    "mixed": Case(((1, 9), (1, 64), (3, 20), (33, 90), (40, 40))),
    "seven_heads_per_kv": Case(((1, 9), (6, 20)), heads=7, kv_heads=1),
    "window": Case(((1, 30), (1, 3), (20, 50), (30, 30)), window=6),
    "window_of_pages": Case(((1, 64), (20, 90)), window=16),
    "softcap": Case(((1, 30), (9, 30)), softcap=2.0),
    "sinks": Case(((1, 30), (9, 30)), sinks=True),
    "everything": Case(((1, 30), (9, 80)), window=13, softcap=3.0, sinks=True),
    "other_value_dim": Case(((1, 30), (9, 30)), key_dim=24, value_dim=16),
    "large_pages": Case(((1, 30), (9, 70)), block_size=32),
    "long": Case(((1, 5000), (1, 2500), (40, 3000)), block_size=16),
    "long_window": Case(((1, 5000), (40, 2100)), window=1100, block_size=16),
    "long_prefill": Case(((1, 30), (300, 310)), heads=2, kv_heads=1, window=13, softcap=3.0, sinks=True),
    "bfloat16": Case(((1, 30), (1, 700), (9, 70)), dtype=torch.bfloat16),
    "float16": Case(((1, 30), (1, 700), (9, 70)), dtype=torch.float16),
}


class Backend(Protocol):
    """What these cases need of one."""

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part: ...

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True)
class Site:
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    batch: SiteBatch


def spread(
    k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata, sites: int, seed: int
) -> list[Site]:
    """Each block of each sequence at a random site, in pages of the site's own; garbage in the others."""
    rng = np.random.default_rng(seed)
    block_size = k_pages.shape[1]
    homes = [rng.integers(sites, size=-(-length // block_size)) for length in metadata.host_seq_lens]
    return [_site(k_pages, v_pages, metadata, [np.flatnonzero(home == site) for home in homes], rng)
            for site in range(sites)]  # fmt: skip


def _site(
    k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata, blocks: list[np.ndarray],
    rng: np.random.Generator,
) -> Site:  # fmt: skip
    """The site that holds `blocks` of each sequence."""
    block_size, total = k_pages.shape[1], sum(len(index) for index in blocks)
    order = rng.permutation(total + 2)[:total].astype(np.int32)
    own_k, own_v = (pages.new_full((total + 2, *pages.shape[1:]), 7.0) for pages in (k_pages, v_pages))
    tables, key_counts, query_at, taken = [], [], [], 0
    starts = metadata.host_query_start
    for sequence, (index, length) in enumerate(zip(blocks, metadata.host_seq_lens, strict=True)):
        tables.append(order[taken : taken + len(index)])
        taken += len(index)
        source = metadata.block_tables[sequence, torch.from_numpy(index)].long()
        own_k[torch.from_numpy(tables[-1]).long()] = k_pages[source]
        own_v[torch.from_numpy(tables[-1]).long()] = v_pages[source]
        key_counts.append(int(np.minimum(block_size, length - index * block_size).sum()))
        query_at.append(np.arange(length - (starts[sequence + 1] - starts[sequence]), length))
    batch = build_site_batch(
        tables, blocks, key_counts, np.diff(starts).tolist(), np.concatenate(query_at), block_size, k_pages.device
    )
    return Site(own_k, own_v, batch)


def parts_of(backend: Backend, query: torch.Tensor, sites: list[Site], spec: AttentionSpec) -> list[Part]:
    return [backend.attend_partial(query, site.k_pages, site.v_pages, site.batch, spec) for site in sites]


def merged(backend: Backend, query: torch.Tensor, sites: list[Site], spec: AttentionSpec) -> torch.Tensor:
    """Attention over all the sites, in `query`'s dtype."""
    return backend.merge(parts_of(backend, query, sites, spec), spec.sinks, query.dtype)


def visible_keys(site: Site, length: int, sequence: int, position: int, window: int | None) -> list[int]:
    """The definition of `SiteBatch.bounds`, key by key: numbers of the keys that a row at `position` sees."""
    block_size, numbers, number = site.batch.block_size, [], 0
    for index in site.batch.block_index[sequence, : -(-site.batch.host_seq_lens[sequence] // block_size)].tolist():
        for at in range(index * block_size, min(length, (index + 1) * block_size)):
            if at <= position and (window is None or at > position - window):
                numbers.append(number)
            number += 1
    return numbers


def part_by_definition(
    query: torch.Tensor, site: Site, metadata: AttentionMetadata, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend_partial` promises, row by row, in float64."""
    group = query.shape[1] // site.k_pages.shape[2]
    out = torch.zeros(*query.shape[:2], site.v_pages.shape[-1], dtype=torch.float64)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64)
    for sequence, length in enumerate(metadata.host_seq_lens):
        first, last = metadata.host_query_start[sequence : sequence + 2]
        pages = site.batch.block_tables[sequence].long()
        key, value = (pages_of[pages].flatten(0, 1).double() for pages_of in (site.k_pages, site.v_pages))
        for row in range(first, last):
            seen = visible_keys(site, length, sequence, length - (last - row), spec.window)
            for head in range(query.shape[1] if seen else 0):
                scores = key[seen, head // group] @ query[row, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                lse[row, head] = scores.logsumexp(0)
                out[row, head] = scores.softmax(0) @ value[seen, head // group]
    return out, lse
