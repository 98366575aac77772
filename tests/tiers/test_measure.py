"""What a disk is follows from two numbers; measuring is bounded and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from memory_helpers import LAYOUT, InProcessPeer

from core.tiers.measure import classify, measure_directory, measure_files, measure_host, measure_peer
from core.tiers.remote import RemoteFiles


@pytest.mark.parametrize(
    ("random_read_s", "read_bytes_s", "medium"),
    [
        (3e-6, 8e9, "ram disk"),
        (14e-6, 0.5e9, "ram disk"),  # a slow machine's memory is still no device
        (20e-6, 7e9, "nvme"),  # Optane
        (80e-6, 3e9, "nvme"),
        (250e-6, 0.8e9, "nvme"),
        (80e-6, 0.55e9, "ssd"),  # SATA
        (400e-6, 3e9, "ssd"),  # a network volume
        (1.9e-3, 0.3e9, "ssd"),
        (2e-3, 0.3e9, "spinning"),
        (12e-3, 0.18e9, "spinning"),
    ],
)
def test_media_are_told_apart(random_read_s: float, read_bytes_s: float, medium: str) -> None:
    assert classify(random_read_s, read_bytes_s) == medium


class Stopwatch:
    """Every look at it takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s


@pytest.mark.parametrize("step_s", [1e-5, 0.1])
def test_a_directory_is_measured_in_bounded_time_and_left_as_it_was(tmp_path: Path, step_s: float) -> None:
    timer = Stopwatch(step_s)
    measured = measure_directory(tmp_path, timer)
    assert measured.speed.latency_s == pytest.approx(step_s)
    assert measured.speed.read_bytes_s == pytest.approx((1 << 20) / step_s)
    assert measured.medium == ("ram disk" if step_s < 1e-4 else "spinning")
    assert timer.now_s < 2.0, "a disk a thousand times slower is measured with fewer reads"
    assert list(tmp_path.iterdir()) == []


def test_writing_counts_what_was_written_and_the_sync_at_its_end(tmp_path: Path) -> None:
    measured = measure_directory(tmp_path, Stopwatch(0.125))
    assert measured.speed.write_bytes_s == (3 << 20) / 0.5, "three MiB before 0.3 s are over, and the sync"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on files")
def test_without_o_direct_advice_keeps_the_whole_file_out_of_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems other than Linux refuse advice on a range that no file has."""
    given: list[tuple[int, int, int]] = []
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *advice: given.append(advice))
    assert measure_directory(tmp_path, Stopwatch(0.125)).method == "fadvise"
    dropped, at_random = (0, 0, os.POSIX_FADV_DONTNEED), (0, 0, os.POSIX_FADV_RANDOM)
    assert given == [dropped, at_random, dropped], "before each kind of reading"


def test_a_directory_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure_directory(tmp_path / "missing")


@pytest.mark.parametrize(
    ("looks_s", "fastest_s"),
    [
        ([0.0, 0.01, 0.01, 0.05, 0.05, 0.05, 0.06, 0.06, 0.06, 0.09, 0.2], 0.01),  # copies of 40, 10 and 30 ms
        ([0.0, 5.0, 5.0, 5.5, 5.5], 0.5),  # the time was over before the first
    ],
)
def test_the_best_of_all_copies_counts_and_there_is_at_least_one(looks_s: list[float], fastest_s: float) -> None:
    looks = iter(looks_s)
    speed = measure_host(lambda: next(looks))
    assert speed.read_bytes_s == speed.write_bytes_s == pytest.approx((16 << 20) / fastest_s)
    assert next(looks, None) is None, "it goes on until the time is over"


def test_host_memory_store_and_peer_are_measured(tmp_path: Path) -> None:
    assert measure_host(Stopwatch(0.01)).read_bytes_s == pytest.approx((16 << 20) / 0.01)
    files = RemoteFiles(str(tmp_path))
    speed = measure_files(files, Stopwatch(0.5))
    assert speed.latency_s == 0.5 and speed.write_bytes_s == (1 << 20) / 0.5
    assert files.list() == []
    peer = InProcessPeer(LAYOUT.nbytes)
    assert measure_peer(peer, LAYOUT.nbytes, Stopwatch(0.5)).read_bytes_s == LAYOUT.nbytes / 0.5
    assert peer.used_bytes == 0
    with pytest.raises(OSError, match="keeps no block"):
        measure_peer(InProcessPeer(1), LAYOUT.nbytes)
