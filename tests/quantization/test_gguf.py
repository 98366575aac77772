"""GGUF: types of blocks, architectures, tokenizers and files, compared with the `gguf` package and llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantization.gguf_files import random_blocks, write_gguf
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny
from transformers import AutoTokenizer, LlamaForCausalLM

from core.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.fit import checked_notes
from core.models.gguf.directory import gguf_directory
from core.models.gguf.metadata import _llama3_factor
from core.models.resolve import DEMO_PATH, resolve_model
from core.models.stage_model import StageSlice, load_stage
from core.models.tokenizer import Tokenizer
from core.quantization.form import WeightForm
from core.quantization.linear import QuantEmbedding, QuantLinear, QuantModule
from core.quantization.readers.gguf import BLOCK_TYPES, unpack_blocks
from core.request import SamplingParams

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_mean_what_the_library_says(kind: str) -> None:
    raw = random_blocks(kind, (24, 512), np.random.default_rng(1))
    weight = unpack_blocks(kind, torch.from_numpy(raw))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(weight.dequantize().numpy(), expected.astype(np.float32))
    for name, (shape, dtype) in weight.form.tensors(24, 512).items():
        tensor = getattr(weight, name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, getattr(torch, dtype)), name
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert weight.form.nbytes(24, 512) <= 1.2 * raw.nbytes  # scales of 4 or 6 bits take 8
    assert (BLOCK_TYPES[kind].columns, BLOCK_TYPES[kind].nbytes) == size
    if weight.form.bits <= 4:
        assert weight.form.nbytes(24, 512) <= 0.32 * 2 * 24 * 512


def test_each_type_has_a_form_of_its_own() -> None:
    forms: set[WeightForm] = {kind.form for kind in BLOCK_TYPES.values()}
    assert len(forms) == len(BLOCK_TYPES)


ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # transformers' type, GGUF's architecture, changes to the config, further metadata
    "llama": ("llama", "llama", {}, {}),
    "untied llama": ("llama", "llama",
                     {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
                     {"rope.freq_base": 5e5}),
    "mistral": ("mistral", "llama", {}, {"attention.sliding_window": 7}),
    "qwen2": ("qwen2", "qwen2", {"use_sliding_window": False, "layer_types": None, "sliding_window": None}, {}),
    "qwen3": ("qwen3", "qwen3", {}, {}),
    "gemma": ("gemma", "gemma", {"tie_word_embeddings": True}, {}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 64},
               {"attention.sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", "gemma3", {"query_pre_attn_scalar": 64, "layer_types": ["sliding_attention"] * 4},
               {"attention.sliding_window": 5}),
    "phi3": ("phi3", "phi3", {"head_dim": None}, {"attention.sliding_window": 9}),
}  # fmt: skip


def write_model(name: str, directory: Path, kind: str, **options: Any) -> tuple[Path, Any]:
    """A GGUF file alone in a directory, and the model that it holds."""
    hf_type, architecture, changes, metadata = ARCHITECTURES[name]
    model = build_tiny(hf_type, directory / "hf", **{**SIZES, **changes})
    file = directory / "gguf" / "model.gguf"
    file.parent.mkdir()
    return write_gguf(model, file, architecture, kind, metadata=metadata, **options), model


def load(path: Path) -> Any:
    architecture = read_architecture(path, "float32")
    whole = StageSlice(0, architecture.num_layers, architecture.num_layers)
    return load_stage(architecture, path, whole, torch.device("cpu"), attention="eager")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_computes_what_it_did(name: str, tmp_path: Path) -> None:
    """Names, norms, rotary pairs, and everything that only metadata say."""
    file, expected = write_model(name, tmp_path, "Q8_0", kinds={"attn_output.weight": "Q6_K", "ffn_down.weight": "F16"})
    path = gguf_directory((file,), tmp_path / "cache")
    assert checked_notes(path, "float32") == ()
    model = load(path)
    kinds = {type(module) for module in model.modules() if isinstance(module, QuantModule)}
    assert kinds == {QuantLinear, QuantEmbedding}
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-3, atol=2e-4)
    if expected.config.tie_word_embeddings:
        assert model.lm_head.codes is model.model.embed_tokens.codes


def test_llama3_frequencies_are_recognised(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = build_tiny("llama", tmp_path / "hf", rope_parameters=rope, **SIZES)
    default = 5e5 ** -(np.arange(0, 64, 2) / 64)
    factors = default / model.model.rotary_emb.inv_freq.numpy()
    ours = [_llama3_factor(5e5, 64, index, 8.0, 8192, 1.0, 4.0) for index in range(32)]
    assert np.allclose(ours, factors, rtol=1e-5)
    file = write_gguf(
        model, tmp_path / "model.gguf", "llama", metadata={"rope.freq_base": 5e5},
        more={"rope_freqs.weight": factors.astype(np.float32)},
    )  # fmt: skip
    config = json.loads((gguf_directory((file,), tmp_path / "cache") / "config.json").read_text())
    assert config["rope_parameters"] == rope


def test_a_vocabulary_is_that_of_the_file(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(DEMO_PATH)
    tokenizer = json.loads((DEMO_PATH / "tokenizer.json").read_text(encoding="utf-8"))
    file = write_gguf(model, tmp_path / "demo.gguf", "llama", "Q8_0", tokenizer=tokenizer)
    path = gguf_directory((file,), tmp_path / "cache")
    ours, original = Tokenizer.from_directory(path), AutoTokenizer.from_pretrained(DEMO_PATH)
    for text in (
        "The year 2024 was wet, and 17% more.",
        "  two  spaces\n\nlines",
        "naïve — 日本 🙂",
        "<|user|>hello<|end|>",
    ):
        assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]


LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
file, texts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = Llama(file, n_ctx=256, n_batch=1, n_ubatch=1, n_threads=1, verbose=False)
found = []
for text in texts:
    prompt = model.tokenize(text.encode(), add_bos=True, special=True)
    model.reset()
    stream = model.generate(prompt, temp=0.0, top_k=1)
    found.append((prompt, [next(stream) for _ in range(count)]))
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_tokens_are_those_of_llama_cpp(
    kind: str, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline]
) -> None:
    pytest.importorskip("llama_cpp")
    model = LlamaForCausalLM.from_pretrained(DEMO_PATH)
    tokenizer = json.loads((DEMO_PATH / "tokenizer.json").read_text(encoding="utf-8"))
    file = write_gguf(model, tmp_path / "demo.gguf", "llama", kind, tokenizer=tokenizer)
    texts, count = ["What is the capital of France?", "Tell me about rain.", "2 plus 3 is"], 24
    # In a process of its own, and a token at a time: larger products of Q8_0 crash llama.cpp on some processors.
    command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(texts), str(count)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    pipeline = open_pipeline(file, devices__devices="cpu=64MiB,cpu=64MiB", model__dtype="float32")
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
    for text, (prompt, expected) in zip(texts, found, strict=True):
        assert pipeline.engine.model.tokenizer.encode(text) == prompt
        assert pipeline.submit(prompt, params).result(LONGEST_WAIT_S).completions[0].token_ids == expected


# -- files --------------------------------------------------------------------------------------------------------


def test_files_directories_and_series(tmp_path: Path) -> None:
    file, _ = write_model("qwen3", tmp_path, "Q8_0")
    cache = tmp_path / "cache"
    found = resolve_model(str(file), cache_dir=cache)
    assert found.name == "model"
    assert resolve_model(str(file.parent), cache_dir=cache).path == found.path  # made once
    assert resolve_model(str(found.path), cache_dir=cache).path == found.path
    with pytest.raises(UnsupportedModelError, match="not supported here"):
        resolve_model(str(file))  # where nothing may be made of it
    quantized = len(read_architecture(found.path).quantization.modules)  # type: ignore[union-attr]
    part = file.rename(file.with_name("model-00001-of-00002.gguf"))
    for given in (part, part.parent):
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.gguf is missing"):
            resolve_model(str(given), cache_dir=cache)
    split(part, file.parent)
    whole = resolve_model(str(part), cache_dir=cache)
    assert len(read_architecture(whole.path).quantization.modules) == quantized  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        read_architecture(found.path)  # whose file has another name now
    part.with_name("other.gguf").write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match="name the one that is meant"):
        resolve_model(str(part.parent), cache_dir=cache)


def split(file: Path, directory: Path) -> None:
    """Move half of a file's tensors to a second one."""
    reader = gguf.GGUFReader(file)
    tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
    fields = [(key, field) for key, field in reader.fields.items() if not key.startswith("GGUF.")]
    half = len(tensors) // 2
    for number, part in enumerate((tensors[:half], tensors[half:]), start=1):
        writer = gguf.GGUFWriter(directory / f"new-{number}", "qwen3")
        for key, field in fields if number == 1 else []:
            if key == "general.architecture":
                continue
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub)
        for name, data, tensor_type in part:
            writer.add_tensor(name, data, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for number in (1, 2):
        (directory / f"new-{number}").replace(directory / f"model-{number:05d}-of-00002.gguf")


@pytest.mark.parametrize(
    ("break_it", "error", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-64]), CheckpointError, "damaged"),
        (lambda file: file.write_bytes(b"GGUF" + bytes(40)), CheckpointError, "damaged|has no"),
        (lambda file: patch(file, b"qwen3", b"qwen9"), UnsupportedModelError, "architecture 'qwen9'"),
        (lambda file: patch(file, b"gpt-2", b"gpt-9"), UnsupportedModelError, "splits text as 'gpt-9'"),
    ],
)
def test_files_that_are_not_served_are_named(
    break_it: Callable[[Path], object], error: type[Exception], said: str, tmp_path: Path
) -> None:
    file, _ = write_model("qwen3", tmp_path, "Q8_0")
    break_it(file)
    with pytest.raises(error, match=said):
        resolve_model(str(file), cache_dir=tmp_path / "cache")
    left = list((tmp_path / "cache").rglob("*.part*")) + list((tmp_path / "cache").rglob(".part*"))
    assert not left


def patch(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))


def test_a_type_without_a_reader_is_named(tmp_path: Path) -> None:
    model = build_tiny("qwen3", tmp_path / "hf", **SIZES)
    file = write_gguf(model, tmp_path / "model.gguf", "qwen3", "Q8_0", kinds={"ffn_up.weight": "IQ2_XXS"})
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp.up_proj.weight is IQ2_XXS"):
        read_architecture(resolve_model(str(file), cache_dir=tmp_path / "cache").path)


def test_a_part_of_a_name_chooses_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write_model("qwen3", tmp_path, "Q8_0")
    file.rename(file.with_name("tiny-Q8_0.gguf"))
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(file.parent)

    monkeypatch.setattr("core.models.resolve.snapshot_download", download)
    found = resolve_model("some/tiny-GGUF:q8_0", cache_dir=tmp_path / "cache")
    assert found.name == "some/tiny-GGUF:q8_0" and (found.path / "tiny-Q8_0.gguf").is_file()
    assert asked["name"] == "some/tiny-GGUF" and "*Q8_0*.gguf" in asked["allow_patterns"]
    with pytest.raises(ModelNotFoundError, match="no GGUF file with 'Q4_K'"):
        resolve_model("some/tiny-GGUF:Q4_K", cache_dir=tmp_path / "cache")
    (file.parent / "other-Q8_0.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="in several names"):
        resolve_model("some/tiny-GGUF:Q8_0", cache_dir=tmp_path / "cache")
