"""Checkpoints that are damaged or odd, each in its own way, loaded as clients load them: each serves, or is refused
with file and field while the model before serves on. Nothing is a 5xx, and no library's text is passed on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import CACHE_DIR, make_settings
from safetensors.torch import load_file, save_file
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny

from core.api import create_app
from core.inference_pipeline import InferencePipeline
from core.models.checkpoint import INDEX
from core.request import SamplingParams

TOKEN = "a-token-for-tests"
WEIGHTS = "model.safetensors"
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
FOREIGN = ("ignore_mismatched_sizes", "Transformers", "pip install", "Traceback", "Validation error", "Deserializ")
"""What only a library would say."""

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    build_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def shared_pipelines(whole: Path) -> Iterator[InferencePipeline]:
    settings = make_settings(
        model__name=str(whole), devices__devices="cpu=64MiB", runtime__cache_dir=CACHE_DIR, api__token=TOKEN
    )
    pipeline = InferencePipeline(settings)
    pipeline.load()
    yield pipeline
    pipeline.shutdown()


def text(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def config(**changes: Any) -> Damage:
    return lambda path: edit(path / "config.json", changes)


def edit(file: Path, changes: dict[str, Any]) -> None:
    """A change to None writes null; to `...`, takes the field away."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def generation(**values: Any) -> Damage:
    return text("generation_config.json", json.dumps(values))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], Any], length: int | None = None) -> Damage:
    """Rewrite the file's header; `length` is what it claims to be."""

    def damage(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        fields = json.loads(data[8 : 8 + size])
        change(fields)
        new = json.dumps(fields).encode()
        start = struct.pack("<Q", len(new) if length is None else length)
        (path / WEIGHTS).write_bytes(start + new + data[8 + size :])

    return damage


def index(change: Callable[[dict[str, str]], Any] = lambda files: None, *, folder: str = "") -> Damage:
    """Two shards in a folder, and an index of them."""

    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        (path / folder).mkdir(exist_ok=True)
        names = sorted(tensors)
        files: dict[str, str] = {}
        for number in (0, 1):
            part = {name: tensors[name] for name in names[number::2]}
            label = f"{folder}/part-{number}.safetensors".lstrip("/")
            save_file(part, path / label, metadata={"format": "pt"})
            files |= dict.fromkeys(part, label)
        change(files)
        (path / INDEX).write_text(json.dumps({"weight_map": files}))

    return damage


def unlink(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def linked_shard(path: Path) -> None:
    index(folder="sub")(path)
    outside = path.parent / "outside.safetensors"
    (path / "sub" / "part-0.safetensors").rename(outside)
    (path / "sub" / "part-0.safetensors").symlink_to(outside)


def two_files(path: Path) -> None:
    (path / WEIGHTS).rename(path / "one.safetensors")
    save_file({}, path / "two.safetensors")


def no_dtype(path: Path) -> None:
    weights(lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))(path)
    config(dtype=...)(path)


def with_bom(name: str) -> Damage:
    return lambda path: text(name, b"\xef\xbb\xbf" + (path / name).read_bytes())(path)


def poisoned(value: float) -> Damage:
    return weights(lambda tensors: tensors[UP].view(-1).__setitem__(5, value))


UP = "model.layers.2.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
LOADS: dict[str, Damage] = {
    "shards in a folder": index(folder="sub"),
    "tensors that the index does not name": index(lambda files: files.pop(UP)),
    "a tensor too many": weights(lambda tensors: tensors.update(extra=torch.ones(3))),
    "a stray file beside the model": lambda path: save_file({EMBED: torch.zeros(96, 32)}, path / "a-stray.safetensors"),
    "no dtype beside bf16": no_dtype,
    "fp16 files of an fp32 config": weights(lambda t: t.update({name: value.half() for name, value in t.items()})),
    "an index with a weight map alone": index(),
    "fields that nobody knows": config(made_by="someone", extra={"a": [1]}),
    "generation config without a use": generation(temperature=-1, top_p=5, top_k="many", repetition_penalty=None),
    "generation config with null": generation(eos_token_id=None, temperature=None),
    "tie beside a head of its own": weights(lambda t: t.update({"lm_head.weight": t[EMBED].flip(0).contiguous()})),
    "experts of a model that has none": config(num_local_experts=0, num_experts=None),
}
REFUSED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty config file": (text("config.json", ""), ("config.json", "line 1")),
    "empty config": (text("config.json", "{}"), ("config.json", "model_type")),
    "config that is a list": (text("config.json", "[1]"), ("config.json", "object")),
    "config that is not text": (text("config.json", b"\xff\xfe\x00{"), ("config.json", "UTF-8")),
    "config without end": (text("config.json", "[" * 100_000), ("config.json",)),
    "config with a byte order mark": (with_bom("config.json"), ("config.json", "byte order mark")),
    "no config": (unlink("config.json"), ("config.json",)),
    "unknown model type": (config(model_type="home_made"), ("model_type", "home_made")),
    "model type of another kind": (config(model_type=["llama"]), ("config.json", "model_type")),
    "hidden size as text": (config(hidden_size="64"), ("config.json", "hidden_size", '"64"')),
    "hidden size null": (config(hidden_size=None), ("hidden_size", "null")),
    "hidden size of a fraction": (config(hidden_size=32.5), ("hidden_size", "32.5")),
    "layers zero": (config(num_hidden_layers=0), ("num_hidden_layers", "0")),
    "heads true": (config(num_attention_heads=True), ("num_attention_heads",)),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=...), ("hidden_size", "num_attention_heads")),
    "groups that do not divide": (config(num_key_value_heads=3), ("num_attention_heads", "num_key_value_heads")),
    "groups zero": (config(num_key_value_heads=0), ("num_key_value_heads",)),
    "layers without number": (config(num_hidden_layers=10**9), ("num_hidden_layers", "1000000000")),
    "a few layers too many": (config(num_hidden_layers=6), ("num_hidden_layers", "at most 4")),
    "a few layers too few": (config(num_hidden_layers=3), ("num_hidden_layers", "layers")),
    "vocabulary without number": (config(vocab_size=10**9), ("vocab_size",)),
    "vocabulary larger than its rows": (config(vocab_size=100), ("vocab_size",)),
    "vocabulary smaller than its rows": (config(vocab_size=90), (WEIGHTS, "vocab_size", "[96, 32]", "[90, 32]")),
    "hidden size without number": (config(hidden_size=10**12), ("hidden_size",)),
    "experts without number": (config(model_type="mixtral", num_local_experts=10**9), ("num_local_experts",)),
    "positions without number": (config(max_position_embeddings=10**15), ("max_position_embeddings",)),
    "inner size of another model": (config(intermediate_size=40), (WEIGHTS, "intermediate_size")),
    "padding outside the vocabulary": (config(pad_token_id=4000), ("pad_token_id", "4000")),
    "unknown activation": (config(hidden_act="mishmash"), ("hidden_act", "mishmash", "silu")),
    "epsilon as text": (config(rms_norm_eps="tiny"), ("rms_norm_eps", "tiny")),
    "a number without end": (config(attention_dropout=float("nan")), ("attention_dropout", "NaN")),
    "a number without end inside": (config(extra={"a": [1, float("inf")]}), ("extra.a.1", "Infinity")),
    "a huge number": (config(initializer_range=1e308), ("initializer_range", "1e+308")),
    "experts in all layers": (config(num_hidden_layers=4, num_local_experts=40_000), ("num_local_experts",)),
    "unknown dtype": (config(dtype="int7"), ("dtype", "int7")),
    "tie as text": (config(tie_word_embeddings="perhaps"), ("tie_word_embeddings", "perhaps")),
    "dropout as text": (config(attention_dropout="none"), ("attention_dropout",)),
    "rope as text": (config(rope_parameters="fast"), ("rope_parameters", "fast")),
    "unknown rope": (config(rope_parameters={"rope_type": "spiral"}), ("rope_parameters.rope_type", "spiral")),
    "rope without factor": (config(rope_scaling={"type": "linear"}), ("rope_scaling", "factor")),
    "rope of factor null": (config(rope_scaling={"type": "dynamic", "factor": None}), ("rope_scaling", "factor")),
    "rope of a negative factor": (config(rope_scaling={"type": "yarn", "factor": -4}), ("rope_scaling.factor", "-4")),
    "longrope without lists": (config(rope_scaling={"type": "su"}), ("short_factor",)),
    "longrope of another width": (
        config(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}),
        ("short_factor", "1 numbers of 4"),
    ),
    "layer kinds of another number": (config(layer_types=["full_attention"]), ("layer_types", "1 layers of 4")),
    "layer kinds as text": (config(layer_types="full_attention"), ("layer_types",)),
    "unknown layer kinds": (config(layer_types=["round"] * 4), ("layer_types",)),
    "end token as text": (config(eos_token_id="</s>"), ("config.json: eos_token_id", "</s>")),
    "end token as text in the generation config": (
        generation(eos_token_id="</s>"), ("generation_config.json: eos_token_id", "</s>"),
    ),
    "generation config that is a list": (text("generation_config.json", "[]"), ("generation_config.json",)),
    "damaged generation config": (text("generation_config.json", '{"a": '), ("generation_config.json", "line 1")),
    "file cut off": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100]), (WEIGHTS, "cut off"),
    ),
    "empty weights": (text(WEIGHTS, b""), (WEIGHTS,)),
    "weights that are text": (text(WEIGHTS, "<html>not found, and more text than a header</html>"), (WEIGHTS,)),
    "a pointer to large files": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), (WEIGHTS,)),
    "header without end": (header(lambda fields: None, length=10**18), (WEIGHTS, "header")),
    "header longer than the file": (header(lambda fields: None, length=10**7), (WEIGHTS, "header")),
    "header that is a list": (text(WEIGHTS, struct.pack("<Q", 4) + b"[  ]"), (WEIGHTS, "header")),
    "overlapping tensors": (
        header(lambda fields: fields[EMBED].update(data_offsets=fields[UP]["data_offsets"])), (WEIGHTS,),
    ),
    "shape of other bytes": (header(lambda fields: fields[EMBED].update(shape=[96, 31])), (WEIGHTS,)),
    "shape beyond all bounds": (header(lambda fields: fields[EMBED].update(shape=[2**62, 2**62])), (WEIGHTS,)),
    "unknown dtype in the header": (header(lambda fields: fields[EMBED].update(dtype="Q4")), (WEIGHTS,)),
    "whole numbers as weights": (
        weights(lambda tensors: tensors.update({UP: torch.ones(48, 32, dtype=torch.int8)})), (UP, "I8", "quantized"),
    ),
    "missing tensor": (weights(lambda tensors: tensors.pop(UP)), ("lacks", UP)),
    "missing embedding": (weights(lambda tensors: tensors.pop(EMBED)), ("vocab_size", "files hold no more")),
    "transposed tensor": (
        weights(lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()})),
        (WEIGHTS, UP, "[32, 48]", "[48, 32]"),
    ),
    "tensor without dimensions": (
        weights(lambda tensors: tensors.update({UP: torch.tensor(1.0)})), (WEIGHTS, UP),
    ),
    "no head without a tie": (config(tie_word_embeddings=False), ("lm_head.weight", "tie_word_embeddings")),
    "NaN weights": (poisoned(float("nan")), (WEIGHTS, UP, "NaN")),
    "infinite weights": (poisoned(float("-inf")), (WEIGHTS, UP, "infinite")),
    "index that is a list": (text(INDEX, "[]"), (INDEX, "object")),
    "index without a map": (text(INDEX, "{}"), (INDEX, "weight_map")),
    "index with numbers": (index(lambda files: files.update({UP: 3})), (INDEX, UP)),  # type: ignore[dict-item]
    "index of a missing file": (
        index(lambda files: files.update({UP: "part-9.safetensors"})), ("part-9.safetensors",),
    ),
    "index of a tensor that its file lacks": (
        index(lambda files: files.update({UP: next(file for name, file in files.items() if file != files[UP])})),
        (INDEX, UP),
    ),
    "index that leads out": (
        index(lambda files: files.update({UP: "../whole/model.safetensors"})), (INDEX, "../whole"),
    ),
    "index of an absolute path": (index(lambda files: files.update({UP: "/etc/hostname"})), (INDEX, "/etc/hostname")),
    "index of a name with NUL": (index(lambda files: files.update({UP: "a\0b"})), (INDEX,)),
    "link that leads out": (linked_shard, ("part-0.safetensors", "outside")),
    "two files without an index": (
        two_files,
        ("one.safetensors", "two.safetensors", INDEX),
    ),
    "one file of a series": (
        lambda path: (path / WEIGHTS).rename(path / "model-00001-of-00002.safetensors"), ("00001-of-00002",),
    ),
    "no weights": (unlink(WEIGHTS), ("safetensors",)),
    "no tokenizer": (unlink("tokenizer.json"), ("tokenizer.json",)),
    "damaged tokenizer": (text("tokenizer.json", '{"version": "1.0", '), ("tokenizer.json",)),
    "tokenizer that is a list": (text("tokenizer.json", "[]"), ("tokenizer.json",)),
}  # fmt: skip


def load(pipeline: InferencePipeline, path: Path | str, **fields: Any) -> Any:
    client = create_app(pipeline).test_client()
    return client.post(
        "/api/models/load", json={"model": str(path), **fields},
        headers={"X-API-TOKEN": TOKEN},
    )  # fmt: skip


def copy(whole: Path, target: Path) -> Path:
    target.mkdir()
    for file in whole.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", sorted(LOADS))
def test_what_is_merely_odd_serves(name: str, whole: Path, tmp_path: Path, shared_pipelines: InferencePipeline) -> None:
    path = copy(whole, tmp_path / "odd")
    LOADS[name](path)
    response = load(shared_pipelines, path)
    assert response.status_code == 200, response.text
    assert shared_pipelines.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_damaged_is_refused_with_file_and_field(
    name: str, whole: Path, tmp_path: Path, shared_pipelines: InferencePipeline
) -> None:
    path = copy(whole, tmp_path / "odd")
    damage, said = REFUSED[name]
    damage(path)
    served = shared_pipelines.model
    response = load(shared_pipelines, path)
    assert 400 <= response.status_code < 500, response.text
    message = response.get_json()["error"]["message"]
    assert all(part in message for part in said), message
    assert not any(foreign in message for foreign in FOREIGN), message
    assert len(message) < 600 and "\n" not in message
    assert shared_pipelines.model is served


@pytest.mark.parametrize(("name", "field", "value"), [("deepseek_v3", "topk_group", 1000), ("opt", "dropout", 1.5)])
def test_a_model_that_computes_no_token_is_refused(
    name: str, field: str, value: Any, tmp_path: Path, shared_pipelines: InferencePipeline
) -> None:
    """What only shows in the forward pass."""
    build_tiny(name, tmp_path)
    edit(tmp_path / "config.json", {field: value})
    served = shared_pipelines.model
    response = load(shared_pipelines, tmp_path)
    assert response.status_code == 400, response.text
    assert "computes no token" in response.get_json()["error"]["message"]
    assert shared_pipelines.model is served
    assert shared_pipelines.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids
