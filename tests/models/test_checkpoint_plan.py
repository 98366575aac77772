"""What is planned is what is loaded: ties, dtypes and files as they are, not as a config would have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny
from transformers import AutoModelForCausalLM

from core.engine import keeper
from core.errors import InsufficientMemoryError
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.checkpoint import INDEX, Checkpoint, weights_digest
from core.models.generation import read_generation
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
WEIGHTS, EMBED, HEAD = "model.safetensors", "model.embed_tokens.weight", "lm_head.weight"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    path = tmp_path / "tied"
    build_tiny("llama", path)
    return path


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def change_config(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


def expected_tokens(path: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("devices", ["cpu=64MiB", "cpu=64MiB,cpu=64MiB"])
def test_a_head_of_its_own_is_planned_and_served_though_the_config_ties_it(
    tied: Path, open_pipeline: OpenPipeline, devices: str
) -> None:
    change_weights(tied, lambda tensors: tensors.update({HEAD: torch.randn(96, 32)}))
    pipeline = open_pipeline(tied, devices__devices=devices)
    plan = pipeline.engine.plan
    assert not plan.architecture.tied and not plan.weights.tied
    assert plan.weights.num_parameters == sum(tensor.numel() for tensor in load_file(tied / WEIGHTS).values())
    for stage, planned in zip(pipeline.engine.stages, plan.placement.stages, strict=True):
        assert stage.weight_bytes == planned.weight_bytes
    assert pipeline.submit(PROMPT, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected_tokens(tied)


def test_a_copy_of_the_embedding_stays_tied(tied: Path, open_pipeline: OpenPipeline) -> None:
    change_weights(tied, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    pipeline = open_pipeline(tied)
    assert pipeline.engine.plan.architecture.tied
    assert pipeline.submit(PROMPT, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected_tokens(tied)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_without_a_dtype_in_the_config_the_files_decide(tied: Path, stored: torch.dtype, field: str) -> None:
    change_weights(tied, lambda tensors: tensors.update({name: each.to(stored) for name, each in tensors.items()}))
    change_config(tied, **{"dtype": ..., field: None})
    assert read_architecture(tied).dtype is stored
    change_config(tied, dtype=..., torch_dtype=...)
    assert read_architecture(tied).dtype is stored
    assert read_architecture(tied, "float32").dtype is torch.float32
    change_config(tied, **{field: "float16"})
    assert read_architecture(tied).dtype is torch.float16


def test_the_dtype_of_most_bytes_decides(tied: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: each.bfloat16() for name, each in tensors.items() if each.ndim > 1})

    change_weights(tied, mix)
    change_config(tied, dtype=...)
    assert read_architecture(tied).dtype is torch.bfloat16


def test_a_stray_file_replaces_no_weights(tied: Path, open_pipeline: OpenPipeline) -> None:
    expected, digest = expected_tokens(tied), weights_digest(tied)
    save_file({EMBED: torch.zeros(96, 32)}, tied / "zz-stray.safetensors")
    assert [file.name for file in Checkpoint(tied).files] == [WEIGHTS]
    assert weights_digest(tied) == digest
    assert open_pipeline(tied).submit(PROMPT, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected


def test_of_a_tensor_in_two_files_the_index_decides(tied: Path) -> None:
    tensors = load_file(tied / WEIGHTS)
    (tied / WEIGHTS).unlink()
    (tied / "sub").mkdir()
    save_file(tensors, tied / "sub" / "right.safetensors")
    save_file({EMBED: torch.zeros(96, 32), "other": torch.ones(1)}, tied / "wrong.safetensors")
    files = dict.fromkeys(tensors, "sub/right.safetensors") | {"other": "wrong.safetensors"}
    (tied / INDEX).write_text(json.dumps({"weight_map": files}))
    with Checkpoint(tied) as checkpoint:
        assert torch.equal(checkpoint.tensors()[EMBED][...], tensors[EMBED])


def test_links_of_the_hubs_cache_to_its_blobs_are_followed(tied: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in tied.iterdir():
        file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with Checkpoint(snapshot) as checkpoint:
        assert EMBED in checkpoint.tensors()


def test_impossible_defaults_are_said_once_and_no_request_is_refused_for_them(
    tied: Path, open_pipeline: OpenPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    given = {
        "temperature": -1,
        "top_p": 5,
        "top_k": -1,
        "min_p": "x",
        "repetition_penalty": 1.1,
        "eos_token_id": [2, 999],
    }
    (tied / "generation_config.json").write_text(json.dumps(given))
    pipeline = open_pipeline(tied)
    said = [record.msg["note"] for record in caplog.records if isinstance(record.msg, dict) and "note" in record.msg]
    for name in ("temperature", "top_p", "min_p", "999"):
        assert sum(name in note for note in said) == 1, said
    assert set(said) <= set(pipeline.engine.plan.notes)
    assert pipeline.model.generation_defaults == {"top_k": 0, "repetition_penalty": 1.1}


def test_do_sample_false_is_greedy(tied: Path) -> None:
    file = tied / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.2}))
    assert read_generation(tied, 96).defaults == {"temperature": 0.0, "repetition_penalty": 1.2}
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    assert read_generation(tied, 96).defaults == {"temperature": 0.6}
    file.write_text(json.dumps({"temperature": 0.6}))
    assert read_generation(tied, 96).defaults == {"temperature": 0.6}
    file.write_text(json.dumps({"do_sample": "no"}))
    assert "do_sample" in read_generation(tied, 96).notes[0]


def test_a_null_end_token_does_not_hide_the_configs_list(tied: Path, open_pipeline: OpenPipeline) -> None:
    change_config(tied, eos_token_id=[7, 9])
    (tied / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert {7, 9} <= set(open_pipeline(tied).model.eos_token_ids)


def test_what_left_tensors_out_is_said(tied: Path, open_pipeline: OpenPipeline) -> None:
    change_weights(tied, lambda tensors: tensors.update(stray=torch.ones(3), inv_freq=torch.ones(4)))
    (note,) = open_pipeline(tied).engine.plan.notes
    assert "1 tensors" in note and "stray" in note


def test_layers_that_only_predict_further_tokens_are_left_out(tied: Path) -> None:
    tensors = load_file(tied / WEIGHTS)
    extra = {name.replace("layers.3", "layers.4"): each.clone() for name, each in tensors.items() if "layers.3" in name}
    save_file(tensors | extra, tied / WEIGHTS)
    change_config(tied, num_nextn_predict_layers=1)
    assert "left out" in keeper.checked_notes(tied)[0]


def test_a_load_that_has_nothing_left_on_a_device_replaces_the_old_model(
    tied: Path, tmp_path: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at start: the old model's memory on the device is there for the new one."""
    pipeline = open_pipeline(tied, devices__devices="cpu=64MiB,cpu=64MiB")
    used = {name: budget.used_bytes for name, budget in pipeline.engine.budgets.items()}
    other = tmp_path / "other"
    build_tiny("qwen3", other)
    devices = f"cpu=64MiB,cpu={used['cpu#1']}B"
    assert used["cpu#1"] > 0
    beside = pipeline._keeper._devices
    refused: list[str] = []

    def watched(*args: Any, **options: Any) -> Any:
        try:
            return beside(*args, **options)
        except InsufficientMemoryError as error:
            refused.append(error.message)
            raise

    monkeypatch.setattr(pipeline._keeper, "_devices", watched)
    assert pipeline.load(str(other), devices=devices).name == "other"
    assert refused == ["cpu#1 has nothing left beside tied."]
    assert pipeline.submit(PROMPT, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected_tokens(other)


def test_a_plan_needs_no_weights(tied: Path) -> None:
    (tied / WEIGHTS).unlink()
    assert read_architecture(tied).num_layers == 4
