"""Process groups for tensors in main memory: gloo in NCCL's place."""

from __future__ import annotations

import datetime as dt
from typing import Any

import torch
from steering import LONGEST_WAIT_S
from torch import distributed

from core.cluster.group_path import Has, Means

CPU = torch.device("cpu")


def gloo(store: Any, rank: int) -> Any:
    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname="127.0.0.1")]
    options._timeout = dt.timedelta(seconds=LONGEST_WAIT_S)
    return kind(store, rank, 2, options)


def means(gpu: str, host: str = "host") -> Means:
    return Means(Has(host, gpu, "gloo"), CPU, gloo)
