"""A node's own copy of a checkpoint is used if it is the same one; else the master's is fetched, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from tiny_models import build_tiny

from core.cluster import checkpoints
from core.cluster.checkpoints import FOLDER, CheckpointStore, model_ref, read_chunk
from core.cluster.messages import Chunk, ModelRef, ReadFile
from core.cluster.node import SharedCheckpoints
from core.errors import CheckpointError, NotFoundError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_tiny("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ref(model: Path) -> ModelRef:
    return model_ref("llama", model, None, "float32")


def never(asked: ReadFile) -> Chunk:
    raise AssertionError("nothing has to be fetched")


class Master:
    """Sends files, and counts how often it is asked."""

    def __init__(self, model: Path, ref: ModelRef) -> None:
        self.shared = SharedCheckpoints()
        self.shared.add(ref.digest, model, ref.files)
        self.asked = 0

    def __call__(self, asked: ReadFile) -> Chunk:
        self.asked += 1
        return self.shared.read(asked)


def test_a_reference_lists_what_a_stage_needs(ref: ModelRef, model: Path) -> None:
    assert {file.name for file in ref.files} == {"config.json", "model.safetensors"}
    assert all((model / file.name).stat().st_size == file.nbytes for file in ref.files)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ref), type=ModelRef) == ref


def test_what_is_here_is_used(tmp_path: Path, ref: ModelRef, model: Path) -> None:
    assert CheckpointStore(tmp_path / "cache").find(ref, never) == model


def test_what_is_not_here_is_fetched_once_and_kept(
    tmp_path: Path, ref: ModelRef, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_CHUNK_BYTES", 1000)
    elsewhere, master = msgspec.structs.replace(ref, path="/nowhere"), Master(model, ref)
    path = CheckpointStore(tmp_path / "cache").find(elsewhere, master)
    assert path == tmp_path / "cache" / FOLDER / ref.digest
    assert master.asked == sum(-(-file.nbytes // 1000) for file in ref.files)
    for file in ref.files:
        assert (path / file.name).read_bytes() == (model / file.name).read_bytes()
    assert CheckpointStore(tmp_path / "cache").find(elsewhere, never) == path
    assert [each.name for each in path.parent.iterdir()] == [ref.digest]


def test_another_checkpoint_in_the_same_place_is_not_taken(tmp_path: Path, ref: ModelRef, model: Path) -> None:
    here = tmp_path / "same-path"
    shutil.copytree(model, here)
    config = here / "config.json"
    config.write_text(config.read_text() + " ")
    master = Master(model, ref)
    path = CheckpointStore(tmp_path / "cache").find(msgspec.structs.replace(ref, path=str(here)), master)
    assert path != here and master.asked


def test_a_copy_that_was_damaged_is_fetched_again(tmp_path: Path, ref: ModelRef, model: Path) -> None:
    elsewhere, master = msgspec.structs.replace(ref, path="/nowhere"), Master(model, ref)
    store = CheckpointStore(tmp_path / "cache")
    path = store.find(elsewhere, master)
    (path / "model.safetensors").write_bytes(b"gone")
    before = master.asked
    assert store.find(elsewhere, master) == path
    assert master.asked == 2 * before


@pytest.mark.parametrize("trouble", ["short", "changed", "full"])
def test_what_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, ref: ModelRef, model: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, master = msgspec.structs.replace(ref, path="/nowhere"), Master(model, ref)
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    if trouble == "full":
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    else:
        weights.write_bytes(data[:100] if trouble == "short" else bytes(len(data)))
    with pytest.raises(CheckpointError):
        CheckpointStore(tmp_path / "cache").find(elsewhere, master)
    assert not list((tmp_path / "cache" / FOLDER).iterdir())


def test_no_other_file_is_read(ref: ModelRef, model: Path) -> None:
    (model / "secret.json").write_text("{}")
    with pytest.raises(NotFoundError, match="not part of the checkpoint"):
        read_chunk(model, ref.files, ReadFile(ref.digest, "secret.json", 0, 10))
    with pytest.raises(NotFoundError, match="no checkpoint"):
        SharedCheckpoints().read(ReadFile(ref.digest, "config.json", 0, 10))


@pytest.mark.parametrize("name", ["../config.json", "a/b.json", ".hidden", "", "a" * 300, "/etc/passwd"])
def test_names_that_lead_elsewhere_cannot_be_asked(name: str, ref: ModelRef) -> None:
    data = msgspec.msgpack.encode({"type": "ReadFile", "digest": ref.digest, "name": name, "offset": 0, "nbytes": 1})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=ReadFile)
