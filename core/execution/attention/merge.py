"""Puts partial attention together: what each site says of its keys, weighed by how much softmax mass they hold.

A part is `(out, lse)` as `AttentionBackend.attend_partial` gives it: fp32 `[R, Hq, Dv]` and fp32 `[R, Hq]`, and for a
row that sees no key 0 and -inf. With m the largest of the lse (and the sink), the whole is

    sum(exp(lse_i - m) * out_i) / (sum(exp(lse_i - m)) + exp(sink - m)),

which is a softmax over the parts: one operation, and the same one for any number of parts. All parts are on one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Part = tuple[torch.Tensor, torch.Tensor]

_LOWEST = torch.finfo(torch.float32).min


def merge_partials(parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Attention over the keys of all `parts` (at least one), `[R, Hq, Dv]` in `dtype`.

    `sinks` `[Hq]` join the softmax once, without a value. A row that no part has a key for is 0.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][0].to(dtype)
    lses = [lse for _, lse in parts]
    if sinks is not None:
        lses.append(sinks.float().expand_as(lses[0]))
    return _weighed(parts, torch.stack(lses)).to(dtype)


def combine(parts: Sequence[Part]) -> Part:
    """Several parts (at least one) as one part, for regions of one site."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    return _weighed(parts, lses), lses.logsumexp(dim=0)


def _weighed(parts: Sequence[Part], lses: torch.Tensor) -> torch.Tensor:
    """The parts' `out`, weighed by the softmax of `lses` `[parts or one more, R, Hq]`, fp32 `[R, Hq, Dv]`.

    -inf becomes the lowest number: beside a real score its weight is 0 all the same, and where every part is empty the
    weights stay finite, and weigh zeros.
    """
    weights = lses.clamp(min=_LOWEST).softmax(dim=0)[..., None]
    output = parts[0][0] * weights[0]
    for index in range(1, len(parts)):
        output.addcmul_(parts[index][0], weights[index])
    return output
