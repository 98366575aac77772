"""Segments survive a restart, damage costs one block, and the directory never grows beyond its bound."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from memory_helpers import DISK_BYTES, IDENTITY, LAYOUT, Clock, block, get, open_store, payload, put

from core.errors import ConfigError, ConflictError
from core.tiers.disk import LOCK_NAME, LocalFile, LocalFiles
from core.tiers.records import Tier
from core.tiers.segment_store import RETRY_S
from core.tiers.segments import PREFIX_BYTES, SUFFIX, SegmentSizes


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*" + SUFFIX))


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with blocks 1 to 3 in one sealed segment."""
    store = open_store(LocalFiles(tmp_path))
    put(store, 1, 2, 3)
    store.close()
    assert len(segments(tmp_path)) == 1
    return tmp_path


def reopened(directory: Path, **options: object) -> dict[int, bytes | None]:
    """What a new process finds of blocks 1 to 3."""
    store = open_store(LocalFiles(directory), **options)  # type: ignore[arg-type]
    try:
        known = {name for name, _ in store.known()}
        found = {number: get(store, number) for number in (1, 2, 3) if block(number) in known}
        store.check_invariants()
        return found
    finally:
        store.close()


def test_blocks_are_read_from_open_and_sealed_segments(tmp_path: Path) -> None:
    store = open_store(LocalFiles(tmp_path))
    put(store, 1)
    assert get(store, 1) == payload(1) and segments(tmp_path) == []
    store.sync()
    assert get(store, 1) == payload(1) and len(segments(tmp_path)) == 1
    assert get(store, 2) is None
    store.close()


def test_a_restart_finds_blocks_and_their_parents(written: Path) -> None:
    store = open_store(LocalFiles(written))
    assert store.known() == [(block(number), block(number - 1)) for number in (1, 2, 3)]
    store.close()
    assert reopened(written) == {number: payload(number) for number in (1, 2, 3)}


def test_files_are_private(written: Path) -> None:
    assert segments(written)[0].stat().st_mode & 0o077 == 0


def test_the_header_is_json_behind_its_length(written: Path) -> None:
    data = segments(written)[0].read_bytes()
    length = int.from_bytes(data[:PREFIX_BYTES], "little")
    header = json.loads(data[PREFIX_BYTES : PREFIX_BYTES + length])
    assert header["version"] == 1 and header["block_nbytes"] == LAYOUT.nbytes and header["codec"] == "none"
    entry = header["blocks"][1]
    assert bytes.fromhex(entry["block"]) == block(2) and bytes.fromhex(entry["parent"]) == block(1)
    assert data[entry["offset"] : entry["offset"] + entry["length"]] == payload(2)


def test_what_a_crash_left_unsealed_is_removed(tmp_path: Path) -> None:
    store = open_store(LocalFiles(tmp_path))
    put(store, 1)
    (partial,) = tmp_path.glob("*.partial")
    copy = tmp_path / ("crashed-" + partial.name)
    copy.write_bytes(partial.read_bytes())
    store.close()
    assert reopened(tmp_path) == {1: payload(1)}
    assert not list(tmp_path.glob("*.partial"))


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_costs_its_block_alone(written: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = segments(written)
    flip(path, path.read_bytes().index(payload(2)) + 7)
    assert reopened(written) == {1: payload(1), 2: None, 3: payload(3)}
    assert len([record for record in caplog.records if "damaged block" in record.getMessage()]) == 1


def test_a_damaged_block_is_forgotten(written: Path) -> None:
    (path,) = segments(written)
    flip(path, path.read_bytes().index(payload(2)))
    store = open_store(LocalFiles(written))
    assert get(store, 2) is None
    assert block(2) not in {name for name, _ in store.known()}
    put(store, 2)
    assert get(store, 2) == payload(2)
    store.check_invariants()
    store.close()


def test_a_block_under_anothers_name_does_not_pass(written: Path) -> None:
    (path,) = segments(written)
    data = path.read_bytes()
    first, second = block(1).hex().encode(), block(2).hex().encode()
    text = data.replace(b'"block":"' + first, b'"block":"@').replace(b'"block":"' + second, b'"block":"' + first)
    path.write_bytes(text.replace(b'"block":"@', b'"block":"' + second))
    assert reopened(written) == {1: None, 2: None, 3: payload(3)}


def test_a_segment_that_was_cut_off_keeps_its_head(written: Path) -> None:
    (path,) = segments(written)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(payload(3)) + 10])
    assert reopened(written) == {1: payload(1), 2: payload(2)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"offset":', b'"offset":"x",', 1).replace(b"]}", b"]", 1),
        lambda data: data.replace(b'"offset":', b'"0ffset":', 1),
        lambda data: data.replace(b'"checksum":', b'"checksum":1.5,"c":', 1),
        lambda data: data.replace(block(1).hex().encode(), b"z" * 32, 1),
        lambda data: data.replace(b"vramancer-kv", b"something-el", 1),
        lambda data: bytes(len(data)),
    ],
)
def test_an_unreadable_header_costs_the_segment_and_one_log_line(
    written: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = segments(written)
    path.write_bytes(damage(path.read_bytes()))
    assert reopened(written) == {}
    assert len([record for record in caplog.records if "damaged segment" in record.getMessage()]) == 1


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, salt="11"),
        replace(IDENTITY, layout="11"),
        replace(IDENTITY, quantization="int8"),
    ],
)
def test_segments_of_something_else_are_left_alone(written: Path, identity: object) -> None:
    assert reopened(written, identity=identity) == {}
    assert reopened(written) == {number: payload(number) for number in (1, 2, 3)}


def test_another_version_is_left_alone(written: Path) -> None:
    (path,) = segments(written)
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":9'))
    assert reopened(written) == {}
    assert segments(written) == [path]


def test_a_segment_that_vanishes_costs_its_blocks(written: Path) -> None:
    store = open_store(LocalFiles(written))
    segments(written)[0].unlink()
    assert get(store, 1) is None
    store.close()


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_the_directory_stays_within_its_bound_and_keeps_the_rest(tmp_path: Path) -> None:
    store = open_store(LocalFiles(tmp_path))
    live: list[int] = []
    for number in range(1, 250):
        while not store.has_room():
            store.drop(block(live.pop(number % 3 % len(live))))  # scattered, so that segments have to be cleaned
        put(store, number)
        live.append(number)
        store.check_invariants()
        assert size(tmp_path) <= DISK_BYTES
    assert len(live) * LAYOUT.nbytes > 0.4 * DISK_BYTES
    assert all(get(store, number) == payload(number) for number in live)
    store.close()


@pytest.mark.parametrize("capacity_bytes", [32 * 1024, 50_000, DISK_BYTES])
def test_room_to_clean_a_segment_into_is_always_left(tmp_path: Path, capacity_bytes: int) -> None:
    """Also by who writes without asking for room."""
    store = open_store(LocalFiles(tmp_path), capacity_bytes=capacity_bytes)
    number = 1
    while store.write(block(number), block(number - 1), memoryview(bytearray(payload(number)))):
        number += 1
    reserve = SegmentSizes.of(Tier.L5, capacity_bytes, LAYOUT.nbytes).reserve
    assert store.used_bytes == size(tmp_path)
    assert store.used_bytes + reserve <= capacity_bytes
    assert all(get(store, mine) == payload(mine) for mine in range(1, number))
    store.close()


def test_a_segment_that_is_mostly_dead_is_deleted(tmp_path: Path) -> None:
    store = open_store(LocalFiles(tmp_path), capacity_bytes=256 * 1024)
    put(store, *range(1, 9))
    store.sync()
    (before,) = segments(tmp_path)
    for number in range(1, 7):
        store.drop(block(number))
    assert before not in segments(tmp_path)
    assert [get(store, 7), get(store, 8)] == [payload(7), payload(8)]
    store.close()


def test_other_models_segments_count_and_go_first_oldest_first(tmp_path: Path) -> None:
    other = open_store(LocalFiles(tmp_path), identity=replace(IDENTITY, salt="11"))
    for number in range(1, 5):
        put(other, number)
        other.sync()
    other.close()
    foreign = segments(tmp_path)
    assert len(foreign) == 4
    store = open_store(LocalFiles(tmp_path))
    assert store.used_bytes == sum(path.stat().st_size for path in foreign)
    number = 0
    while foreign[0].exists() and number < 200:
        number += 1
        assert store.has_room(), "own blocks do not go while another model's are there"
        put(store, number)
    assert not foreign[0].exists() and foreign[-1].exists()
    assert all(get(store, mine) == payload(mine) for mine in range(1, number + 1))
    store.close()


def test_a_smaller_bound_removes_the_oldest_at_the_start(tmp_path: Path) -> None:
    store = open_store(LocalFiles(tmp_path), capacity_bytes=1 << 20)
    for number in range(1, 41):
        put(store, number)
        if number % 4 == 0:
            store.sync()
    store.close()
    smaller = open_store(LocalFiles(tmp_path))
    assert size(tmp_path) <= DISK_BYTES
    assert get(smaller, 40) == payload(40) and get(smaller, 1) is None
    smaller.check_invariants()
    smaller.close()


def test_a_bound_without_room_for_a_segment_is_refused(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with pytest.raises(ConfigError, match="L5 needs at least"):
        open_store(files, capacity_bytes=1000)
    files.close()


def test_a_segment_that_another_server_removed_does_not_stop_the_tier(tmp_path: Path, clock: Clock) -> None:
    store = open_store(LocalFiles(tmp_path), clock=clock)
    put(store, 1, 2, 3)
    store.sync()
    (gone,) = segments(tmp_path)
    gone.unlink()
    for number in (1, 2, 3):
        store.drop(block(number))  # what is left of the segment would be moved to another one
        assert store.stopped is None and store.accepting
    put(store, 20)
    assert get(store, 20) == payload(20) and get(store, 3) is None
    store.check_invariants()
    store.close()


# -- a full disk -------------------------------------------------------------------------------------------------------


class FailingFile(LocalFile):
    """A file whose writes fail while the disk is full."""

    full = False

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        if FailingFile.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_at(offset, data)


class FailingFiles(LocalFiles):
    def start(self) -> FailingFile:
        return FailingFile(self.directory)


def test_a_full_disk_stops_writing_with_one_log_line_and_goes_on_later(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(FailingFiles(tmp_path), clock=clock)
    put(store, 1)
    monkeypatch.setattr(FailingFile, "full", True)
    for _ in range(2):
        assert not store.write(block(2), block(1), memoryview(bytearray(payload(2))))
        assert len([record for record in caplog.records if "no more blocks" in record.getMessage()]) == 1
    assert not store.accepting and store.stopped == "No space left on device"
    assert get(store, 1) == payload(1), "reading goes on"
    store.check_invariants()
    monkeypatch.setattr(FailingFile, "full", False)
    clock.now_s += RETRY_S
    assert store.accepting
    put(store, 2)
    assert store.stopped is None and get(store, 2) == payload(2)
    store.close()


def test_a_segment_that_cannot_be_sealed_costs_its_blocks_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(FailingFiles(tmp_path))
    put(store, 1)
    monkeypatch.setattr(FailingFile, "full", True)
    store.sync()
    assert get(store, 1) is None and not list(tmp_path.glob("*kvseg*"))
    store.check_invariants()
    store.close()


def test_below_the_floor_of_free_space_nothing_is_written(tmp_path: Path, clock: Clock) -> None:
    store = open_store(LocalFiles(tmp_path), min_free_bytes=1 << 60, clock=clock)
    assert not store.write(block(1), block(0), memoryview(bytearray(payload(1))))
    assert store.stopped is not None and "free space" in store.stopped
    store.close()
    assert not list(tmp_path.glob("*kvseg*"))


# -- two processes -----------------------------------------------------------------------------------------------------


def test_a_second_user_of_the_directory_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = LocalFiles(tmp_path)
    with pytest.raises(ConflictError, match="in use by another process"):
        LocalFiles(tmp_path)
    first.close()
    LocalFiles(tmp_path).close()


def test_another_thread_may_give_the_directory_back(tmp_path: Path) -> None:
    """The model that uses it is loaded by one thread of the server and unloaded by another."""
    files = LocalFiles(tmp_path)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(files.close).result()
        second = thread.submit(LocalFiles, tmp_path).result()
    second.close()
    LocalFiles(tmp_path).close()


def test_the_lock_holds_between_processes_and_ends_with_them(tmp_path: Path) -> None:
    script = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('locked', flush=True); "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script + "sys.stdin.read()", str(tmp_path / LOCK_NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(ConflictError, match="in use by another process"):
            LocalFiles(tmp_path)
        process.kill()  # a crash gives the lock back too
    LocalFiles(tmp_path).close()
