"""Loading: peak memory, progress, what is refused, and swapping models while serving."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_settings import make_settings
from safetensors.torch import save_file
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from core.engine.preview import preview
from core.errors import (
    CheckpointError,
    InsufficientMemoryError,
    ModelChangedError,
    ModelNotFoundError,
    ModelNotLoadedError,
    UnsupportedModelError,
)
from core.inference_pipeline import InferencePipeline
from core.models.resolve import DEMO_NAME
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
MIB = 1024 * 1024

_LOAD_AND_REPORT = """
import json, sys, threading, time
from pathlib import Path
import psutil
from core.config import load_settings
from core.inference_pipeline import InferencePipeline
reports = []
settings = load_settings(None, environ={}, overrides=json.loads(sys.argv[1]))
pipeline = InferencePipeline(settings, on_progress=lambda done, total: reports.append((done, total)))
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
pipeline.load()
held = [pipeline.engine.budgets[stage.device.name].used_by_purpose() for stage in pipeline.engine.stages]
own = sum(used["weights"] + used["kv_cache"] for used in held)
print(json.dumps({"extra": peak() - before - own, "own": own, "reports": reports}))
pipeline.shutdown()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model of about 200 MB in shards of at most 48 MB."""
    path = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="48MB")
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory counter")
def test_peak_memory_stays_near_the_largest_shard_and_progress_is_reported(sharded: Path, tmp_path: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) >= 4
    largest, total = max(file.stat().st_size for file in shards), sum(file.stat().st_size for file in shards)
    overrides = {
        "model.name": str(sharded), "devices.devices": "cpu=256MiB,cpu=256MiB", "engine.kv_cache_tokens": 64,
        "engine.native_kernels": False, "runtime.cache_dir": str(tmp_path), "devices.placement": "vram",
        "engine.cohorts": 1,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_AND_REPORT, json.dumps(overrides)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["own"] > 0.9 * total
    assert report["extra"] <= 1.3 * largest, f"{report['extra'] / MIB:.0f} MiB beside the model's own"
    read = [bytes_read for bytes_read, _ in report["reports"]]
    assert read == sorted(read)
    assert read[-1] == pytest.approx(total, rel=0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build_tiny("llama", path)
    return path


def copy_model(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refused(path: Path, error: type[Exception], match: str) -> None:
    pipeline = InferencePipeline(make_settings(model__name=str(path), devices__devices="cpu=64MiB"))
    try:
        with pytest.raises(error, match=match):
            pipeline.load()
        assert pipeline.current_engine is None
    finally:
        pipeline.shutdown()


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "pickled")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, UnsupportedModelError, "pickled")


def test_remote_code_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "remote")
    edit_config(path, model_type="home_made", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (path / "modeling.py").write_text("raise SystemExit('this must never run')")
    refused(path, UnsupportedModelError, "remote code")


def test_recurrent_architectures_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "recurrent")
    (path / "config.json").write_text(json.dumps({"model_type": "falcon_h1", "num_hidden_layers": 2}))
    refused(path, UnsupportedModelError, "FalconH1|recurrent")


def test_quantized_checkpoints_are_refused(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "quantized")
    edit_config(path, quantization_config={"quant_method": "mxfp4"})
    refused(path, UnsupportedModelError, "quantized")


def test_a_missing_tensor_is_an_error_not_random_weights(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = copy_model(tiny, tmp_path / "partial")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, CheckpointError, "lacks 1 tensors, such as model.layers.2.mlp.up_proj.weight")


def test_a_tensor_of_the_wrong_shape_is_an_error(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "shape")
    edit_config(path, intermediate_size=40)
    refused(path, CheckpointError, "does not match|wrong shape")


def test_a_damaged_file_is_an_error(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "damaged")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(path, CheckpointError, "damaged")


def test_an_index_may_not_lead_out_of_the_directory(tiny: Path, tmp_path: Path) -> None:
    path = copy_model(tiny, tmp_path / "escape")
    index = {"weight_map": {"x": "../tiny/model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, CheckpointError, "index")


def test_an_unknown_name_is_not_found() -> None:
    pipeline = InferencePipeline(make_settings(model__name="no/such/place/here"))
    with pytest.raises(ModelNotFoundError):
        pipeline.load()
    pipeline.shutdown()


def test_what_does_not_fit_names_the_bytes_each_device_lacks(tiny: Path) -> None:
    settings = make_settings(model__name=str(tiny), devices__devices="cpu=20KiB,cpu=30KiB")
    with pytest.raises(InsufficientMemoryError) as caught:
        preview(settings)
    assert set(caught.value.lacking_bytes) == {"cpu#0", "cpu#1"}
    assert all(lacking > 0 for lacking in caught.value.lacking_bytes.values())


def test_budgets_hold_and_everything_is_given_back(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny, devices__devices="cpu=8MiB,cpu=4MiB")
    engine = pipeline.engine
    for stage in engine.stages:
        budget = engine.budgets[stage.device.name]
        assert 0 < budget.used_bytes <= budget.device.memory_limit_bytes
    assert [s.num_layers for s in engine.plan.placement.stages] == [3, 1]
    pipeline.unload()
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    with pytest.raises(ModelNotLoadedError):
        pipeline.submit([5], GREEDY)


def test_a_swap_serves_the_new_model_and_lets_the_old_one_finish(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny)
    running = pipeline.submit([5, 6], SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True))
    loaded = pipeline.load(DEMO_NAME)
    assert loaded.name == DEMO_NAME
    assert len(running.result(LONGEST_WAIT_S).completions[0].token_ids) == 100
    assert pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids


@pytest.mark.parametrize("room", ["cpu=64MiB", "cpu=17MiB"])
def test_a_failed_swap_leaves_the_old_model_serving(
    tiny: Path, tmp_path: Path, room: str, open_pipeline: OpenPipeline
) -> None:
    """Also where the new model only fits once the old one is gone, and turns out broken after that."""
    pipeline = open_pipeline(tiny, devices__devices=room)
    expected = pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids
    broken = copy_model(Path(str(tiny)), tmp_path / "broken")
    edit_config(broken, intermediate_size=40)
    with pytest.raises(CheckpointError):
        pipeline.load(str(broken))
    with pytest.raises(InsufficientMemoryError):
        pipeline.load(str(tiny), devices="cpu=1KiB")
    assert pipeline.model.name == tiny.name
    assert pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected


def test_a_model_that_only_fits_alone_replaces_the_old_one(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny, devices__devices="cpu=25MiB")
    pipeline.load(DEMO_NAME)
    assert pipeline.model.name == DEMO_NAME
    pipeline.load(str(tiny))
    assert pipeline.model.name == tiny.name


def test_a_request_read_for_the_old_model_never_reaches_the_new_one(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny)
    read_for = pipeline.model
    pipeline.load(DEMO_NAME)
    with pytest.raises(ModelChangedError, match="replaced by vramancer-demo"):
        pipeline.submit_many([([5, 6], GREEDY)], model=read_for)
    pipeline.submit_many([([5, 6], GREEDY)], model=pipeline.model)[0].result(LONGEST_WAIT_S)


def test_generation_config_gives_end_tokens_and_defaults(
    tiny: Path, tmp_path: Path, open_pipeline: OpenPipeline
) -> None:
    path = copy_model(tiny, tmp_path / "configured")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.8, "do_sample": True})
    )
    model = open_pipeline(path).model
    assert {7, 9} <= set(model.eos_token_ids)
    assert model.generation_defaults == {"temperature": 0.6, "top_p": 0.8}


def test_an_emulated_device_takes_at_least_the_rooflines_time(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny, devices__devices="sim=64MiB@0.01GB/s/1TFLOPS")
    (stage,) = pipeline.engine.stages
    forwards, busy_s = stage.forwards, stage.busy_s
    pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S)
    steps = stage.forwards - forwards
    assert steps == 4
    assert stage.busy_s - busy_s >= steps * stage.weight_bytes / 0.01e9


def test_transfers_between_stages_are_counted(tiny: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(tiny, devices__devices="cpu=8MiB,cpu=8MiB")
    pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S)
    (stats,) = pipeline.transfer.stats().values()
    assert stats.ops >= 4
    assert stats.bytes == (1 + 2 + 3) * 32 * 4, "warm-up, prompt and three more tokens, 32 wide, fp32"


def test_the_old_model_comes_back_whatever_stops_the_new_one(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tiny, devices__devices="cpu=25MiB")
    start = pipeline._keeper._warm_up
    calls = iter([MemoryError("no more"), None])

    def fail_once(engine: object) -> None:
        error = next(calls)
        if error is not None:
            raise error
        start(engine)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline._keeper, "_warm_up", fail_once)
    with pytest.raises(MemoryError):
        pipeline.load(DEMO_NAME)
    assert pipeline.model.name == tiny.name
    assert pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids
