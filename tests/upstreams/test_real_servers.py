"""Real servers behind ours: another VRAMancer with a real engine, and llama.cpp's where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from api.api_client import TOKEN
from front_doors import serving
from steering import LONGEST_WAIT_S, until
from tiny_models import build_tiny
from upstreams.conftest import Ours
from upstreams.servers import NAME, Talk, upstream

from core.api import create_app
from core.inference_pipeline import InferencePipeline

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = {"model": NAME, "prompt": "w5 w6 w7 w8", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def peer(llama: Path, open_pipeline: OpenPipeline) -> Iterator[tuple[InferencePipeline, dict[str, Any]]]:
    """Another VRAMancer, and how it is named in settings."""
    pipeline = open_pipeline(llama, api__token=TOKEN)
    with serving(create_app(pipeline)) as port:
        yield pipeline, {"name": NAME, "url": f"http://127.0.0.1:{port}", "api_key": TOKEN}


def test_another_vramancer_is_found_asked_and_cancelled(
    ours: Callable[..., Ours], peer: tuple[InferencePipeline, dict[str, Any]]
) -> None:
    theirs, named = peer
    server = ours(named)
    server.pipeline.upstreams.look()
    (replica,) = server.replicas
    assert (replica.kind, replica.model) == ("vramancer", theirs.model.name)
    assert replica.reported is not None
    assert replica.reported.max_streams == theirs.settings.engine.max_batch_size
    whole = server.client.post("/v1/completions", GREEDY).get_json()
    assert whole["model"] == NAME and whole["usage"]["completion_tokens"] == 12
    events = server.client.events("/v1/completions", {**GREEDY, "stream_options": {"include_usage": True}})
    text = "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"])
    assert text == whole["choices"][0]["text"]
    assert events[-2]["usage"]["completion_tokens"] == 12
    error = server.client.error("/v1/completions", {**GREEDY, "temperature": "x"}, status=400)
    assert error["param"] == "temperature", "their own answer"


def test_a_client_that_leaves_ends_the_generation_there(
    ours: Callable[..., Ours], peer: tuple[InferencePipeline, dict[str, Any]]
) -> None:
    theirs, named = peer
    server = ours(named)
    with serving(server.app) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=LONGEST_WAIT_S)
        body = json.dumps({**GREEDY, "max_tokens": 400, "stream": True})
        headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
        connection.close()
        until(lambda: server.replicas[0].view().in_flight == 0, "our call has ended")
        until(lambda: theirs.engine.batcher.intake.num_unfinished == 0, "their request has ended")


def test_a_stream_goes_on_at_a_real_engine(
    ours: Callable[..., Ours], peer: tuple[InferencePipeline, dict[str, Any]]
) -> None:
    """The first replica passes the engine's stream on and dies in the middle; the second is the engine itself."""
    _, named = peer
    server = ours(named)
    body = {**GREEDY, "temperature": 0.9, "seed": 11}
    right = server.client.events("/v1/completions", body)
    text = "".join(event["choices"][0]["text"] for event in right[:-1])

    def half(talk: Talk) -> None:
        talk.open_stream()
        for event in right[:5]:
            talk.event({**event, "id": "first", "model": "x"})

    with upstream(half) as first:
        first.owner, first.models = "vramancer", ["x"]
        both = ours({"name": NAME, "url": first.url, "model": "x"}, named)
        events = both.client.events("/v1/completions", body)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == text
    assert {event["id"] for event in events[:-1]} == {"first"}
    assert both.pipeline.upstreams.groups()[0].moved == 1


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@contextmanager
def llama_cpp_server(model: Path, log: Path) -> Iterator[str]:
    """llama-cpp-python's server as a process of its own, which has ended afterwards."""
    from upstreams.servers import unused_url

    url = unused_url()
    port = url.rpartition(":")[2].removesuffix("/v1")
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", port,
        "--n_ctx", "128", "--n_threads", "1", "--model_alias", "tiny",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
        try:
            until(lambda: process.poll() is not None or answers(int(port)), "llama.cpp's server is there")
            assert process.poll() is None, log.read_text()
            yield url
        finally:
            process.terminate()
            process.wait(LONGEST_WAIT_S)


def answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_llama_cpps_server(ours: Callable[..., Ours], tmp_path: Path) -> None:
    for module in ("llama_cpp", "gguf", "starlette_context"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    model = tmp_path / "tiny.gguf"
    write_gguf(model)
    with llama_cpp_server(model, tmp_path / "log") as url:
        server = ours({"name": NAME, "url": url})
        chat = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
        answer = server.client.post("/v1/chat/completions", chat)
        assert answer.status_code == 200, answer.text
        assert answer.get_json()["model"] == NAME
        assert answer.get_json()["usage"]["completion_tokens"] >= 1
        assert server.replicas[0].model == "tiny"
        events = server.client.events("/v1/chat/completions", chat)
        assert events[-1] == "[DONE]" and {event["model"] for event in events[:-1]} == {NAME}
        assert server.client.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 2}).status_code == 200


def write_gguf(path: Path) -> None:
    """A tiny random model with a vocabulary of bytes."""
    import gguf
    import numpy as np

    vocab, hidden, heads, inner = 262, 32, 2, 64
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), b"a", b"b", b" "]
    kinds = [2, 3, 3, *([6] * 256), 1, 1, 1]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden),
        "blk.0.attn_norm.weight": (hidden,), "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden), "blk.0.attn_k.weight": (hidden, hidden),
        "blk.0.attn_v.weight": (hidden, hidden), "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inner, hidden), "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.2, shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
