"""The same segments in an object store or a mounted directory."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest
from broken_store import BrokenStore
from memory_helpers import LAYOUT, block, get, open_store, payload, put

from core.errors import ConfigError
from core.tiers.remote import RemoteFiles


@pytest.fixture(params=["memory", "file", "path"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/kv"
    return f"file://{tmp_path}/kv" if request.param == "file" else str(tmp_path / "kv")


def test_blocks_survive_a_restart(url: str) -> None:
    store = open_store(RemoteFiles(url))
    put(store, 1, 2)
    assert get(store, 1) == payload(1)
    store.close()
    again = open_store(RemoteFiles(url))
    assert again.known() == [(block(1), block(0)), (block(2), block(1))]
    assert [get(again, 1), get(again, 2), get(again, 3)] == [payload(1), payload(2), None]
    again.close()


def test_the_bound_holds_there_too(url: str) -> None:
    files = RemoteFiles(url)
    store = open_store(files)
    live: list[int] = []
    for number in range(1, 150):
        while not store.has_room():
            store.drop(block(live.pop(0)))
        put(store, number)
        live.append(number)
    store.sync()
    assert sum(nbytes for _, nbytes in files.list()) <= store.capacity_bytes
    assert all(get(store, number) == payload(number) for number in live)
    store.check_invariants()
    store.close()


def test_a_file_that_another_process_deleted_is_a_miss(url: str) -> None:
    files = RemoteFiles(url)
    store = open_store(files)
    put(store, 1)
    store.sync()
    ((name, _),) = files.list()
    files.delete(name)
    files.delete(name)
    assert get(store, 1) is None
    store.close()


def test_nothing_half_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RemoteFiles(f"file://{tmp_path}")
    store = open_store(files)
    put(store, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the share is gone")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "mv", fail)
    store.sync()
    assert store.stopped == "the share is gone" and files.list() == []
    assert get(store, 1) is None
    store.close()


@pytest.mark.parametrize(("url", "said"), [("nonsense://x", "nonsense"), ("s3://bucket/kv", "s3fs")])
def test_a_protocol_that_is_not_there_is_named(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RemoteFiles(url)


FAULTS = ["open", "makedirs", "list", "read", "write", "delete"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_drivers_own_error_is_an_os_error(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    place = f"broken://{uuid.uuid4().hex}"
    files, opened = RemoteFiles(place), None
    opened = files.start()
    opened.write_at(0, b"abcd")
    name = opened.seal()
    monkeypatch.setattr(BrokenStore, "fails", frozenset([fault]))

    def use() -> None:
        RemoteFiles(place).list()
        files.read(name, 0, memoryview(bytearray(4)))
        opened.seal()
        files.delete(name)

    with pytest.raises(OSError, match=f"BackendError: cannot {fault}"):
        use()


def test_a_store_that_begins_to_fail_takes_no_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(RemoteFiles(f"broken://{uuid.uuid4().hex}"))
    put(store, 1)
    monkeypatch.setattr(BrokenStore, "fails", frozenset(["write"]))
    store.sync()
    assert store.stopped == "BackendError: cannot write" and not store.accepting
    assert get(store, 1) is None
    monkeypatch.setattr(BrokenStore, "fails", frozenset())
    store.close()


def test_reading_past_the_end_says_how_much_there_was(url: str) -> None:
    files = RemoteFiles(url)
    opened = files.start()
    opened.write_at(4, b"abcd")
    name = opened.seal()
    into = bytearray(LAYOUT.nbytes)
    assert files.read(name, 4, memoryview(into)) == 4 and into[:4] == b"abcd"
