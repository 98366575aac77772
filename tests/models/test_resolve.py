"""Names of models that are files, quantized, not on the hub, or no names at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import make_settings
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny

from core.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError, VRAMancerError
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


def test_a_directory_of_gguf_files_is_named(tiny: Path) -> None:
    (tiny / WEIGHTS).rename(tiny / "model-q4.gguf")
    pipeline = InferencePipeline(make_settings(model__name=str(tiny), devices__devices="cpu=64MiB"))
    with pytest.raises(UnsupportedModelError, match=r"GGUF \(model-q4.gguf\)"):
        pipeline.load()
    pipeline.shutdown()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"GPTQ, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, r"AWQ, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
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
