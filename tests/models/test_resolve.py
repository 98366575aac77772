"""Names of models that are files, quantized, not on the hub, or no names at all."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import make_settings
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny

from core.engine.preview import preview
from core.errors import (
    CheckpointError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedModelError,
    VRAMancerError,
)
from core.inference_pipeline import InferencePipeline
from core.models import resolve
from core.models.architecture import read_architecture
from core.models.resolve import resolve_model

WEIGHTS, UP = "model.safetensors", "model.layers.2.mlp.up_proj"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    build_tiny("llama", path)
    return path


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("x.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("renamed.bin", b"GGUF\x03\0\0\0", "GGUF"),
        ("x.gguf", b"", "GGUF"),
        ("x.safetensors", struct.pack("<Q", 2) + b"{}", "Give its directory"),
        ("weights", struct.pack("<Q", 2) + b"{}", "Give its directory"),
        ("pytorch_model.bin", b"PK\x03\x04", "pickled"),
        ("notes.txt", b"hello", "Give a directory"),
    ],
)
def test_a_file_is_named_for_what_it_is(tmp_path: Path, name: str, start: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        resolve_model(str(tmp_path / name))
    assert name in caught.value.message and caught.value.param == "model"


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedModelError, match="Give a directory"):
        resolve_model(str(tmp_path / "pipe"))


def test_a_file_that_is_no_gguf_in_spite_of_its_name_is_named(tiny: Path) -> None:
    (tiny / WEIGHTS).rename(tiny / "model-q4.gguf")
    pipeline = InferencePipeline(make_settings(model__name=str(tiny), devices__devices="cpu=64MiB"))
    with pytest.raises(CheckpointError, match=r"model-q4.gguf is damaged or not a GGUF file"):
        pipeline.load()
    pipeline.shutdown()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "auto-round", "bits": 4}}, r"AutoRound, 4 bits"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "brand-new"}}, "brand-new"),
        ({"quantization_config": "int4"}, "method not named"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "packed by MLX, 4 bits"),
    ],
)
def test_a_quantized_config_is_named(tiny: Path, changes: dict[str, Any], said: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UnsupportedModelError, match=rf"quantized \({said}\).*bf16, fp16 or fp32"):
        read_architecture(tiny)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ, 4 bits, groups of 128"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "AWQ, 4 bits, groups of 64"),
        ({"quant_method": "fp8"}, "FP8, scales for tensors"),
        ({"load_in_8bit": True}, "bitsandbytes int8"),
    ],
)
def test_a_config_whose_weights_are_not_quantized_is_named(tiny: Path, settings: dict[str, Any], said: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=rf"quantized \({said}\), but no tensor of tiny is"):
        read_architecture(tiny)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({".qweight": torch.int32, ".g_idx": torch.int32}, "GPTQ"),
        ({".qweight": torch.int32, ".qzeros": torch.int32}, "AWQ"),
        ({".weight_packed": torch.int32, ".weight_scale": torch.float32}, "compressed-tensors"),
        ({".weight": torch.uint8, ".weight.absmax": torch.float32}, "bitsandbytes"),
        ({".weight": torch.float8_e4m3fn}, "FP8"),
        ({".weight": torch.uint32, ".scales": torch.float16, ".biases": torch.float16}, "packed by MLX"),
        ({".weight": torch.int8}, "up_proj.weight holds whole numbers"),
    ],
)
def test_quantized_weights_are_named_though_no_config_says_so(
    tiny: Path, tensors: dict[str, torch.dtype], said: str
) -> None:
    stored = load_file(tiny / WEIGHTS)
    del stored[f"{UP}.weight"]
    stored |= {UP + name: torch.zeros(4, 4).to(dtype) for name, dtype in tensors.items()}
    save_file(stored, tiny / WEIGHTS)
    with pytest.raises(UnsupportedModelError, match=said):
        read_architecture(tiny)


def test_masks_in_whole_numbers_are_no_quantization(tiny: Path) -> None:
    stored = load_file(tiny / WEIGHTS)
    save_file(stored | {"model.layers.0.attn.bias": torch.ones(4, 4, dtype=torch.uint8)}, tiny / WEIGHTS)
    assert read_architecture(tiny).dtype is torch.float32


def test_without_a_network_it_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no connection to the hub") as caught:
        resolve_model("some-owner/some-model")
    assert "give its directory" in caught.value.message and caught.value.status == 404
    assert "local_files_only" not in caught.value.message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (resolve.LocalEntryNotFoundError("Got: ConnectError: refused"), "no connection to the hub"),
        (resolve._TRANSPORT_ERROR("proxy"), "no connection to the hub"),
        (OSError(28, "No space left on device"), "No space left on device. HF_HOME"),
    ],
)
def test_other_ways_in_which_the_hub_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*args: Any, local_files_only: bool = False, **options: Any) -> str:
        raise resolve.LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr(resolve, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=said):
        resolve_model("some-owner/some-model")


@pytest.mark.parametrize(
    "kind", ["GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError", "HfHubHTTPError"]
)
def test_what_the_hub_answers_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Answer:
        status_code = 503
        headers: dict[str, str] = {}
        request = None

    def fail(*args: Any, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise resolve.LocalEntryNotFoundError("not here")
        raise getattr(resolve, kind)("Client Error. (Request ID: Root=1)", response=Answer())

    monkeypatch.setattr(resolve, "snapshot_download", fail)
    said = {
        "GatedRepoError": "accept its terms", "RepositoryNotFoundError": "nor a model of the hub",
        "RevisionNotFoundError": "no revision 'old'", "HfHubHTTPError": "answers 503",
    }[kind]  # fmt: skip
    with pytest.raises(ModelNotFoundError, match=said) as caught:
        resolve_model("some-owner/some-model", "old")
    assert "Request ID" not in caught.value.message


@pytest.mark.parametrize("name", ["~no-such-user-here/x", "a\0b", "models/a\0b", "\ud800", "x" * 5000, "/" + "y" * 300])
def test_what_can_be_no_name_is_a_bad_request(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve_model(name)
    assert caught.value.status == 400 and caught.value.param == "model"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["", "no/such/place/here", "/no/such/place", "bad name", "a/../b"])
def test_what_is_nowhere_is_not_found(name: str) -> None:
    if not name:
        assert resolve_model("").path == Path().resolve()
        return
    with pytest.raises(ModelNotFoundError):
        resolve_model(name)


def test_a_revision_that_can_be_none_is_a_bad_request() -> None:
    with pytest.raises(VRAMancerError, match="no branch, tag or commit") as caught:
        resolve_model("some-owner/some-model", "a\0b")
    assert caught.value.status == 400


@dataclass
class Hub:
    """A hub with one model of two shards, and a cache. `asked` are the patterns of each download from it."""

    snapshot: Path
    asked: list[list[str]] = field(default_factory=list)

    FILES = ("config.json", "tokenizer.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors")

    def download(self, name: str, *, allow_patterns: list[str], local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            if not self.snapshot.exists():
                raise resolve.LocalEntryNotFoundError("not here")
            return str(self.snapshot)
        self.asked.append(allow_patterns)
        self.keep(*(file for file in self.FILES if any(fnmatch(file, pattern) for pattern in allow_patterns)))
        return str(self.snapshot)

    def keep(self, *files: str) -> None:
        self.snapshot.mkdir(exist_ok=True)
        for file in files:
            index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
            (self.snapshot / file).write_text(json.dumps(index if "index" in file else {}))

    @property
    def kept(self) -> set[str]:
        return {file.name for file in self.snapshot.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "snapshot")
    monkeypatch.setattr(resolve, "snapshot_download", found.download)
    return found


def test_a_plan_downloads_no_weights_and_a_load_after_it_does(hub: Hub) -> None:
    assert resolve_model("some/model", config_only=True).path == hub.snapshot
    assert hub.kept == {"config.json"}
    resolve_model("some/model", config_only=True)
    assert len(hub.asked) == 1, "it is there"
    assert resolve_model("some/model").path == hub.snapshot
    assert hub.kept == set(Hub.FILES)
    resolve_model("some/model")
    assert len(hub.asked) == 2, "all of it is there"


def test_the_plan_of_a_hub_model_downloads_its_config_alone(hub: Hub, tiny: Path) -> None:
    hub.keep()
    shutil.copy(tiny / "config.json", hub.snapshot)
    planned = preview(make_settings(model__name="some/model"), ["3090"])
    assert planned.placement.model_name == "some/model" and not hub.asked


@pytest.mark.parametrize("lacking", ["config.json", "a.safetensors", "b.safetensors"])
def test_a_download_that_was_cut_off_goes_on(hub: Hub, lacking: str) -> None:
    hub.keep(*(file for file in Hub.FILES if file != lacking))
    resolve_model("some/model")
    assert hub.asked and hub.kept == set(Hub.FILES)


def test_one_file_of_weights_needs_no_index(hub: Hub) -> None:
    hub.keep("config.json", "model.safetensors")
    resolve_model("some/model")
    assert not hub.asked


@pytest.mark.parametrize(
    ("kept", "said"), [("pytorch_model.bin", None), ("x.gguf", None), ("tokenizer.json", "no connection")]
)
def test_what_is_kept_in_another_format_is_named_for_it_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, kept: str, said: str | None
) -> None:
    hub.keep("config.json", kept)

    def offline(*args: Any, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return str(hub.snapshot)
        raise resolve.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(resolve, "snapshot_download", offline)
    if said is None:
        assert resolve_model("some/model").path == hub.snapshot
    else:
        with pytest.raises(ModelNotFoundError, match=said):
            resolve_model("some/model")


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_a_wrong_index_is_left_to_who_reads_the_checkpoint(hub: Hub, index: str) -> None:
    hub.keep(*Hub.FILES)
    (hub.snapshot / "model.safetensors.index.json").write_text(index)
    resolve_model("some/model")
    assert not hub.asked
