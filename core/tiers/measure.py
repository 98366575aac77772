"""How fast each tier is, measured at start in well under a second each and kept nowhere.

Disk reads must not come from the page cache: the file is opened with `O_DIRECT` where the system and file system have
it; else its pages are dropped with `posix_fadvise(DONTNEED)` after a sync. `DiskSpeed.method` says which.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

import torch

from core.tiers.peer import Keeper
from core.tiers.records import TierSpeed
from core.tiers.segments import SegmentFiles

Medium = Literal["ram disk", "nvme", "ssd", "spinning"]
Method = Literal["O_DIRECT", "fadvise", "page cache"]

RAM_DISK_READ_S = 15e-6
NVME_READ_S = 250e-6
NVME_BYTES_S = 0.8e9
SPINNING_READ_S = 2e-3

_PAGE = 4096
_CHUNK_BYTES = 1 << 20
_FILE_BYTES = 32 << 20
_HOST_BYTES = 16 << 20
_REMOTE_BYTES = 1 << 20
_RANDOM_READS = 64
_WRITE_S, _RANDOM_S, _READ_S, _HOST_S = 0.3, 0.2, 0.2, 0.1


def classify(random_read_s: float, read_bytes_s: float) -> Medium:
    """What a disk is, from the median time of a random 4 KiB read and its sequential read speed, both past the cache.

    Under 15 us no device answers: a RAM disk. Seeking takes a head 2 ms and more: spinning. NVMe needs both an answer
    within 250 us and 0.8 GB/s, above what a SATA link carries (0.55 GB/s); everything between is an SSD, and so is a
    network or virtual disk that behaves like one.
    """
    if random_read_s < RAM_DISK_READ_S:
        return "ram disk"
    if random_read_s >= SPINNING_READ_S:
        return "spinning"
    return "nvme" if random_read_s <= NVME_READ_S and read_bytes_s >= NVME_BYTES_S else "ssd"


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """A directory's speed; its latency is the median of single 4 KiB reads."""

    speed: TierSpeed
    method: Method
    medium: Medium


_Result = TypeVar("_Result")


def _timed(work: Callable[[], _Result], timer: Callable[[], float]) -> tuple[_Result, float]:
    """What it gives, and the seconds it took."""
    started_s = timer()
    result = work()
    return result, timer() - started_s


def measure_host(timer: Callable[[], float] = time.perf_counter) -> TierSpeed:
    """Copying within host RAM: bytes read and written per second by one thread, the best of several runs."""
    source = torch.ones(_HOST_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    end_s = timer() + _HOST_S
    fastest_s = float("inf")
    while timer() < end_s or fastest_s == float("inf"):
        _, copy_s = _timed(lambda: target.copy_(source), timer)
        fastest_s = min(fastest_s, max(copy_s, 1e-9))
    return TierSpeed(_HOST_BYTES / fastest_s, _HOST_BYTES / fastest_s)


def measure_directory(directory: Path, timer: Callable[[], float] = time.perf_counter) -> DiskSpeed:
    """Write a file of up to 32 MiB, read it back at random and in order, remove it. Raises `OSError`."""
    path = directory / f".speed-{os.getpid()}"
    try:
        nbytes, write_bytes_s = _measure_writing(path, timer)
        file, method = _open_uncached(path)
        try:
            pages = random.Random(0).sample(range(0, nbytes, _PAGE), min(_RANDOM_READS, nbytes // _PAGE))
            random_read_s = median(_timed_reads(file, pages, _PAGE, _RANDOM_S, timer))
            if method == "fadvise":
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            reads_s = _timed_reads(
                file, range(0, nbytes - _CHUNK_BYTES + 1, _CHUNK_BYTES), _CHUNK_BYTES, _READ_S, timer
            )
            read_bytes_s = len(reads_s) * _CHUNK_BYTES / max(sum(reads_s), 1e-9)
        finally:
            os.close(file)
    finally:
        path.unlink(missing_ok=True)
    speed = TierSpeed(read_bytes_s, write_bytes_s, random_read_s)
    return DiskSpeed(speed, method, classify(random_read_s, read_bytes_s))


def _measure_writing(path: Path, timer: Callable[[], float]) -> tuple[int, float]:
    """Bytes written and bytes per second, with one sync at the end as a segment has."""
    chunk = random.Random(0).randbytes(_CHUNK_BYTES)  # zeros would be compressed by some disks
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o600)
    try:
        started_s, nbytes = timer(), 0
        while nbytes < _FILE_BYTES and (nbytes == 0 or timer() - started_s < _WRITE_S):
            nbytes += os.write(file, chunk)
        os.fsync(file)
        return nbytes // _PAGE * _PAGE, nbytes / max(timer() - started_s, 1e-9)
    finally:
        os.close(file)


def _open_uncached(path: Path) -> tuple[int, Method]:
    direct = getattr(os, "O_DIRECT", None)
    if direct is not None:
        try:
            return os.open(path, os.O_RDONLY | direct), "O_DIRECT"
        except OSError:  # the file system has none
            pass
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    if not hasattr(os, "posix_fadvise"):
        return file, "page cache"
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead of random reads
    return file, "fadvise"


def _timed_reads(
    file: int, offsets: Iterable[int], nbytes: int, most_s: float, timer: Callable[[], float]
) -> list[float]:
    """Seconds that each read takes; when `most_s` are spent, the others are left out."""
    times: list[float] = []
    with mmap.mmap(-1, nbytes) as aligned, FileIO(file, closefd=False) as raw:
        for offset in offsets:
            started_s = timer()
            raw.seek(offset)
            raw.readinto(aligned)
            times.append(timer() - started_s)
            if sum(times) >= most_s:
                break
    return times


def measure_files(files: SegmentFiles, timer: Callable[[], float] = time.perf_counter) -> TierSpeed:
    """Put one MiB into an object store, read a little and all of it, remove it. Raises `OSError`."""
    opened = files.start()
    opened.write_at(0, random.Random(0).randbytes(_REMOTE_BYTES))
    name, write_s = _timed(opened.seal, timer)
    opened.close()
    try:
        _, latency_s = _timed(lambda: files.read(name, 0, memoryview(bytearray(_PAGE))), timer)
        _, read_s = _timed(lambda: files.read(name, 0, memoryview(bytearray(_REMOTE_BYTES))), timer)
    finally:
        files.delete(name)
    moving_s = max(read_s - latency_s, read_s / 10, 1e-9)
    return TierSpeed(_REMOTE_BYTES / moving_s, _REMOTE_BYTES / max(write_s, 1e-9), latency_s)


def measure_peer(peer: Keeper, block_nbytes: int, timer: Callable[[], float] = time.perf_counter) -> TierSpeed:
    """Put one block of random bytes into another node's RAM, read it, drop it. Raises `OSError`, also for a peer that
    does not give it back."""
    data = random.Random(0).randbytes(block_nbytes)
    block = random.Random(1).randbytes(16)
    kept, put_s = _timed(lambda: peer.put(block, memoryview(data)), timer)
    came_back, get_s = _timed(lambda: kept and peer.get(block) == data, timer)
    peer.drop(block)
    if not came_back:
        raise OSError("the peer keeps no block")
    return TierSpeed(block_nbytes / max(get_s, 1e-9), block_nbytes / max(put_s, 1e-9))
