"""Attention over pages that are not all in one place: computed where they are, merged by log-sum-exp.

The owner of a sequence sends its query rows to every device that holds pages of it, computes its own part meanwhile,
and merges what comes back. A borrowed page therefore costs one small query per layer and step, never its own transfer.
GPUs wait for each other through events; no thread waits for a GPU. A device of another machine is asked over the
network; its part comes back the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch

from core.devices import Device
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.merge import Part, combine
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, Site
from core.kv_cache.paged_kv_cache import FarPages, PagedKVCache
from core.transfer import TransferManager

BackendOf = Callable[[Device], AttentionBackend]


class FarSite(FarPages, Protocol):
    """A device of another machine that lends to a stage, and attends there."""

    def attend(self, layer: int, query: torch.Tensor, site: Site, spec: AttentionSpec) -> torch.Tensor:
        """`query` `[R, Hq, D]`, the site's rows, to fp32 `[R, Hq, Dv + 1]`, out and then lse; both in main memory.
        Raises `DeviceLostError`, and what attention there raised."""


class SiteAttention:
    """One stage's. `far` are devices of other machines, by name."""

    def __init__(self, owner: Device, kv: PagedKVCache, backend_of: BackendOf, transfer: TransferManager) -> None:
        self._owner = owner
        self._kv = kv
        self._backend_of = backend_of
        self._transfer = transfer
        self._workers: dict[str, ThreadPoolExecutor] = {}
        self.far: dict[str, FarSite] = {}

    def attend(self, layer: int, query: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec) -> torch.Tensor:
        """`query` `[T, Hq, D]` to `[T, Hq, Dv]`, over all sites of the step; this step's K and V are in the pages."""
        local, *others = metadata.sites
        ready = _recorded(query)
        waiting = [
            self._worker(site.device_name).submit(self._at_site, layer, query, site, spec, ready) for site in others
        ]
        ((region, batch),) = local.regions
        backend = self._backend_of(self._owner)
        parts = [backend.attend_partial(query, *self._kv.layer(layer, region), batch, spec)]
        for part, there in (future.result() for future in waiting):
            _wait_for(there, query.device)
            parts.append(part)
        return backend.merge(parts, spec.sinks, query.dtype)

    def _worker(self, name: str) -> ThreadPoolExecutor:
        worker = self._workers.get(name)
        if worker is None:  # torch's own operations here are small; the kernels bring their own threads
            alone = partial(torch.set_num_threads, 1)
            worker = self._workers[name] = ThreadPoolExecutor(1, f"vrm-site-{name}", initializer=alone)
        return worker

    def _at_site(
        self, layer: int, query: torch.Tensor, site: Site, spec: AttentionSpec, ready: torch.cuda.Event | None
    ) -> tuple[Part, torch.cuda.Event | None]:
        """In the thread of one other device: its part, and the moment when that has come back."""
        _wait_for(ready, query.device)
        part = self._remote(layer, query, site, spec)
        return part, _recorded(part[0])

    def _remote(self, layer: int, query: torch.Tensor, site: Site, spec: AttentionSpec) -> Part:
        """There with the rows, attend, back with out and lse."""
        with torch.inference_mode():
            device = self._kv.region(site.regions[0][0]).device
            there = self._transfer.send(query[site.rows], self._owner, device)
            bare = AttentionSpec(spec.scale, spec.window, spec.softcap)  # sinks are not there: they join at the merge
            if (far := self.far.get(site.device_name)) is not None:
                both = far.attend(layer, there, site, bare)
            else:
                out, lse = self._attend_there(layer, there, site, device, bare)
                both = torch.cat((out, lse[..., None]), dim=-1)
            back = self._transfer.send(both, device, self._owner)
            return _scatter(back, site.rows, query.shape[0])

    def _attend_there(self, layer: int, query: torch.Tensor, site: Site, device: Device, spec: AttentionSpec) -> Part:
        backend = self._backend_of(device)
        kv, parts = self._kv, site.regions
        return combine([backend.attend_partial(query, *kv.layer(layer, at), batch, spec) for at, batch in parts])

    def close(self) -> None:
        """End the threads."""
        for worker in self._workers.values():
            worker.shutdown()
        self._workers.clear()


def _scatter(back: torch.Tensor, rows: torch.Tensor, count: int) -> Part:
    """Out and lse of some rows, for all of them: rows that have nothing there get lse -inf."""
    out, lse = back[..., :-1], back[..., -1]
    if len(rows) == count:
        return out, lse
    all_out = out.new_zeros(count, *out.shape[1:])
    all_lse = lse.new_full((count, lse.shape[1]), float("-inf"))
    return all_out.index_copy_(0, rows, out), all_lse.index_copy_(0, rows, lse)


def _recorded(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """On a GPU, the moment when the tensor is complete."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _wait_for(event: torch.cuda.Event | None, device: torch.device) -> None:
    """What the calling thread gives a GPU to do from now on comes after the event."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
