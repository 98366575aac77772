"""Random numbers without state: each is a hash of a sequence's seed and a token's position.

A sequence that is preempted, recomputed or moved to another device therefore draws what it would have drawn anyway,
whatever else is in its batch. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). No torch here.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_CHILD_GAMMA = 0xD1B54A32D192ED03
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    values ^= values >> np.uint64(31)
    return values


def fresh_seed() -> int:
    """A seed from the operating system, between 0 and 2**63 - 1, for requests that name none."""
    return secrets.randbits(63)


def derive_seed(seed: int, index: int) -> int:
    """The seed, between 0 and 2**63 - 1, of a request's `index`-th sequence (also of its first, index 0)."""
    return _mix(_mix(seed + _GAMMA) + (index + 1) * _CHILD_GAMMA) >> 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), float64 `[R]`, with 53 random bits."""
    seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    streams = _mix_array(seed + np.uint64(_GAMMA))
    bits = _mix_array(streams + (position + np.uint64(1)) * np.uint64(_GAMMA))
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
