"""Layers that stream in while a model is served: budgets, errors, unloading, and what is said about it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steering import LONGEST_WAIT_S, until
from streamed_models import CHANGES, ENGINE, build_deep, half_of_it
from tiny_models import build_tiny
from typer.testing import CliRunner

from core.devices import HOST, Device, DeviceBudget, MainMemory
from core.engine import builder
from core.errors import InsufficientMemoryError
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.stage_model import find_decoder, measure_bytes
from core.request import SamplingParams
from core.streaming.stream import StreamManager
from core.transfer import TransferManager
from core.views.render import render
from core.views.status import pipeline_view
from vramancer.cli import app

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, detokenize=False)
PROMPT = [5, 6, 7, 8, 9]
SLOW_LINK = "50MB/s@20us"
FAST = "@100GB/s/10TFLOPS"

OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_deep("llama", path)
    return path


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[int]:
    """Greedy tokens of the whole model."""
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([PROMPT])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    return [int(token) for token in out[0, len(PROMPT) :]]


def tokens(pipeline: InferencePipeline, params: SamplingParams = GREEDY) -> list[int]:
    return list(pipeline.submit(PROMPT, params).result(LONGEST_WAIT_S).completions[0].token_ids)


def streams(pipeline: InferencePipeline) -> list[StreamManager]:
    return [stage.stream for stage in pipeline.engine.stages if stage.stream is not None]


def decoder_layers(pipeline: InferencePipeline, stage: int = 0) -> Any:
    part = pipeline.engine.stages[stage]
    decoder, name = find_decoder(part._model, part.part.num_layers)
    return getattr(decoder, name)


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
def test_devices_are_filled_to_the_byte(
    llama: Path, expected: list[int], stages: int, open_pipeline: OpenPipeline
) -> None:
    roomy = open_pipeline(llama, devices__devices=half_of_it(llama, stages), **ENGINE)
    planned = roomy.engine.plan.placement.stages
    exact = ",".join(f"cpu={stage.limit_bytes - stage.free_bytes}B" for stage in planned)
    cuts = ",".join(str(stage.num_layers) for stage in planned)
    tight = open_pipeline(llama, devices__devices=exact, devices__layers=cuts, **ENGINE)
    assert tokens(tight) == expected
    for stage, plan in zip(tight.engine.stages, tight.engine.plan.placement.stages, strict=True):
        budget = tight.engine.budgets[plan.device_name]
        budget.check_invariants()
        assert budget.used_bytes == budget.device.memory_limit_bytes
        assert plan.free_bytes == 0
        assert stage.stream is not None
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in stage._model.parameters()
        }
        assert stage.weight_bytes + 2 * plan.slot_bytes == plan.weight_bytes
        assert plan.weight_bytes - sum(held.values()) in (0, 32), "32: rotary frequencies, which are no parameters"
        assert sum(master.nbytes for master in stage.stream._masters) == plan.streamed_bytes
    host = tight.engine.budgets[HOST]
    assert host.used_by_purpose() == {"streamed_weights": tight.engine.plan.placement.streamed_bytes}
    fewer = ",".join(f"cpu={stage.limit_bytes - stage.free_bytes - 1}B" for stage in planned)
    one_more = open_pipeline(llama, devices__devices=fewer, devices__layers=cuts, **ENGINE)
    assert one_more.engine.plan.placement.streamed_bytes > roomy.engine.plan.placement.streamed_bytes


def test_what_fits_does_not_stream(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, **ENGINE)
    assert not streams(pipeline)
    assert pipeline.engine.budgets[HOST].used_by_purpose() == {}


def test_streaming_can_be_switched_off(llama: Path, open_pipeline: OpenPipeline) -> None:
    with pytest.raises(InsufficientMemoryError, match="the devices have"):
        open_pipeline(llama, devices__devices=half_of_it(llama, 1), devices__stream_weights="off", **ENGINE)


def test_main_memory_that_is_too_small_is_refused_with_the_bytes_lacking(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Device(HOST, -1, "cpu", "cpu", 1000)
    monkeypatch.setattr("core.engine.keeper.host_for", lambda *given: small)
    with pytest.raises(InsufficientMemoryError, match="host lacks") as caught:
        open_pipeline(llama, devices__devices=half_of_it(llama, 1), **ENGINE)
    assert caught.value.lacking_bytes[HOST] > 0


# -- effects --------------------------------------------------------------------------------------------------------


def slow(llama: Path, open_pipeline: OpenPipeline, stages: int = 1, **settings: Any) -> InferencePipeline:
    """On emulated devices, with a link so slow that every layer is waited for."""
    devices = half_of_it(llama, stages, "sim", FAST)
    return open_pipeline(llama, devices__devices=devices, devices__sim_link=SLOW_LINK, **ENGINE, **settings)


def test_without_the_wait_tokens_are_wrong(
    llama: Path, expected: list[int], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = slow(llama, open_pipeline)
    assert tokens(pipeline) == expected
    before = StreamManager._before

    def no_wait(self: StreamManager, turn: int, index: int, module: object, args: object) -> None:
        if self._slot(turn).turn != turn:
            before(self, turn, index, module, args)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamManager, "_before", no_wait)
    for manager in streams(pipeline):  # hooks were bound when the layers were adopted
        for layer, hook in zip(manager._packed, manager._hooks[::2], strict=True):
            hook.remove()
            turn = manager._packed.index(layer)
            layer.layer.register_forward_pre_hook(
                lambda module, args, m=manager, t=turn: no_wait(m, t, 0, module, args)
            )
    assert tokens(pipeline) != expected


@pytest.mark.parametrize("ahead", [True, False])
def test_layers_are_loaded_while_others_compute(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """A resident layer between two streamed ones waits for a load to begin; only loading ahead begins one."""
    if not ahead:
        monkeypatch.setattr(StreamManager, "_after", lambda *given: None)
    pipeline = open_pipeline(llama, devices__devices=half_of_it(llama, 1), **ENGINE)
    streamed = pipeline.engine.plan.placement.stages[0].streamed_layers
    after = next(layer for layer in range(1, 24) if layer not in streamed and layer - 1 in streamed)
    began, met = threading.Event(), []
    load = TransferManager.load

    def notice(self: TransferManager, *given: Any) -> None:
        began.set()
        load(self, *given)

    monkeypatch.setattr(pipeline.transfer, "load", notice.__get__(pipeline.transfer))
    layers = decoder_layers(pipeline)
    layers[after - 1].register_forward_pre_hook(lambda module, args: began.clear())
    patience_s = LONGEST_WAIT_S if ahead else 0.2
    layers[after].register_forward_pre_hook(lambda module, args: met.append(began.wait(patience_s)))
    tokens(pipeline, replace(GREEDY, max_tokens=2))
    assert all(met) if ahead else not any(met)


def test_only_what_streams_is_loaded_once_per_pass(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, devices__devices=half_of_it(llama, 1), **ENGINE)
    (stage,), (plan,) = pipeline.engine.stages, pipeline.engine.plan.placement.stages
    tokens(pipeline)
    pipeline.unload()
    stats = pipeline.transfer.stats()["stream", HOST, "cpu"]
    ahead = stats.ops - stage.forwards * len(plan.streamed_layers)
    assert 0 <= ahead <= 2 + 1000 * (stage.forwards == 0), "the first two of the pass that did not come"
    assert stats.bytes == stats.ops * plan.slot_bytes


def test_raw_inference_and_long_prompts(llama: Path, open_pipeline: OpenPipeline) -> None:
    whole = open_pipeline(llama, **ENGINE)
    streaming = slow(llama, open_pipeline, 2)
    prompt = [3 + i % 90 for i in range(50)]
    torch.testing.assert_close(streaming.infer(prompt, positions="all"), whole.infer(prompt, positions="all"))


def test_half_precision_streams_the_same_numbers(tmp_path: Path, open_pipeline: OpenPipeline) -> None:
    """Kernels may rearrange weights in bf16 when they take a layer over; what streams is the rearranged ones."""
    build_tiny("qwen3", tmp_path, dtype=torch.bfloat16, **CHANGES["qwen3"])
    whole = open_pipeline(tmp_path, **ENGINE)
    streaming = open_pipeline(tmp_path, devices__devices=half_of_it(tmp_path, 1, room=1.15), **ENGINE)
    (manager,), (plan,) = streams(streaming), streaming.engine.plan.placement.stages
    layer_bytes = measure_bytes(read_architecture(tmp_path)).layers
    streamed_bytes = sum(layer_bytes[layer] for layer in plan.streamed_layers)
    assert sum(master.nbytes for master in manager._masters) >= streamed_bytes, "every tensor of a layer streams"
    torch.testing.assert_close(streaming.infer(PROMPT), whole.infer(PROMPT), rtol=0, atol=0)
    assert tokens(streaming) == tokens(whole)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_a_pass_that_fails_in_the_middle_is_computed_again(
    llama: Path, expected: list[int], open_pipeline: OpenPipeline
) -> None:
    pipeline = slow(llama, open_pipeline, 2, engine__cohorts=2)
    layers = decoder_layers(pipeline)
    for index in pipeline.engine.plan.placement.stages[0].streamed_layers:
        failures = iter([RuntimeError("a kernel broke")])

        def fail_once(module: object, args: object, left: Any = failures) -> None:
            for error in left:
                raise error

        hook = layers[index].register_forward_pre_hook(fail_once)
        assert tokens(pipeline) == expected
        assert next(failures, None) is None, "a pass has failed"
        hook.remove()
        assert tokens(pipeline) == expected


def test_a_load_that_fails_is_tried_again_with_its_pass(
    llama: Path, expected: list[int], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices=half_of_it(llama, 1), **ENGINE)
    load, failures = TransferManager.load, iter([OSError("the bus is gone")])

    def fail_once(self: TransferManager, *given: Any) -> None:
        for error in failures:
            raise error
        load(self, *given)

    monkeypatch.setattr(pipeline.transfer, "load", fail_once.__get__(pipeline.transfer))
    assert tokens(pipeline) == expected
    assert next(failures, None) is None, "a load has failed"
    assert tokens(pipeline) == expected


@pytest.mark.parametrize("where", ["adopt", "_reserve"])
def test_a_load_that_fails_leaves_nothing_behind(
    llama: Path, expected: list[int], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    budgets: list[DeviceBudget] = []

    def noted(device: Device) -> DeviceBudget:
        budgets.append(DeviceBudget(device))
        return budgets[-1]

    open_part = MainMemory.open

    def noted_part(self: MainMemory, devices: Sequence[Device]) -> DeviceBudget:
        budgets.append(open_part(self, devices))
        return budgets[-1]

    original, calls = getattr(StreamManager, where), iter(range(10))

    def fail_second(self: StreamManager, *given: Any) -> None:
        original(self, *given)
        if next(calls) == 1:
            raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(builder, "DeviceBudget", noted)
        patched.setattr(MainMemory, "open", noted_part)
        patched.setattr(StreamManager, where, fail_second)
        with pytest.raises(MemoryError):
            open_pipeline(llama, devices__devices=half_of_it(llama, 2), **ENGINE)
    assert len(budgets) == 3
    assert all(set(budget.used_by_purpose()) <= {"workspace"} for budget in budgets)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vrm-stream")]
    assert tokens(open_pipeline(llama, devices__devices=half_of_it(llama, 2), **ENGINE)) == expected


def test_unloading_ends_threads_and_gives_all_memory_back(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = slow(llama, open_pipeline, 2)
    engine = pipeline.engine
    running = pipeline.submit(PROMPT, replace(GREEDY, max_tokens=60))
    running.get(60)
    memory = [weakref.ref(slot.memory.untyped_storage()) for manager in streams(pipeline) for slot in manager._slots]
    memory += [weakref.ref(manager._masters[0].untyped_storage()) for manager in streams(pipeline)]
    assert sum(thread.name.startswith("vrm-stream") for thread in threading.enumerate()) == 2
    running.abort()
    pipeline.unload()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vrm-stream")]
    assert all(budget.used_bytes == 0 for budget in engine.budgets.values())
    del engine
    gc.collect()
    assert [reference for reference in memory if reference() is not None] == []


def test_a_model_moves_to_where_layers_stream_and_back(
    llama: Path, expected: list[int], open_pipeline: OpenPipeline
) -> None:
    """Weights that stay on the device are shared; those that come to stream are not, for they change their place."""
    pipeline = open_pipeline(llama, devices__devices="cpu=16MiB", **ENGINE)
    for devices, streaming in ((half_of_it(llama, 1), True), ("cpu=16MiB", False)):
        running = pipeline.submit(PROMPT, replace(GREEDY, max_tokens=60))
        until(lambda: pipeline.engine.batcher.stats.running == 1, "it runs")
        pipeline.place(devices=devices)
        assert bool(streams(pipeline)) is streaming
        assert running.result(LONGEST_WAIT_S).completions[0].token_ids[:6] == expected
        assert tokens(pipeline) == expected


def test_models_are_swapped_while_layers_stream(
    llama: Path, expected: list[int], tmp_path: Path, open_pipeline: OpenPipeline
) -> None:
    build_tiny("qwen3", tmp_path)
    pipeline = slow(llama, open_pipeline)
    pipeline.load(str(tmp_path))
    assert not streams(pipeline)
    pipeline.load(str(llama))
    assert streams(pipeline)
    assert tokens(pipeline) == expected


# -- what is said ---------------------------------------------------------------------------------------------------


def test_status_metrics_and_plan_say_what_streams(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = slow(llama, open_pipeline)
    tokens(pipeline)
    (plan,) = pipeline.engine.plan.placement.stages
    status = render(pipeline_view(pipeline.current_engine, pipeline.state()))
    (stage,) = status["stages"]
    assert stage["streamed_layers"] == list(plan.streamed_layers)
    assert stage["streamed_bytes"] == plan.streamed_bytes
    assert stage["stream_wait_seconds"] > 0
    (entry,) = [entry for entry in status["transfers"] if entry["method"] == "stream"]
    assert (entry["src"], entry["dst"]) == (HOST, "sim")
    assert (
        pipeline.metrics.registry.get_sample_value(
            "vramancer_transfer_bytes_total", {"method": "stream", "src": HOST, "dst": "sim"}
        )
        >= plan.streamed_bytes
    )  # type: ignore[operator]
    measured, passes = stage["busy_seconds"], pipeline.engine.stages[0].forwards
    assert measured >= 0.99 * stage["predicted_seconds"] > 0
    assert passes > 0
    arguments = [
        "plan", str(llama), "--devices", half_of_it(llama, 1, "sim", FAST), "--sim-link", SLOW_LINK,
        "--block-size", "4", "--kv-cache-tokens", "96", "--max-num-batched-tokens", "16", "--max-batch-size", "8",
        "--max-model-len", "96", "--log-level", "error",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"sim streams {len(plan.streamed_layers)} of 24 layers from main memory" in result.output
    assert "host -> sim" in result.output, "the bottleneck"
