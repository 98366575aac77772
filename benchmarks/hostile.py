"""What `benchmarks.fuzz` sends: bodies that are right, nearly right and hostile, heads and bytes that are no HTTP, and
checkpoints whose files are not what they should be. All of it follows from a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.models.resolve import DEMO_PATH

Body = dict[str, Any]
CONTROL = ["<|user|>", "<|end|>", "<|bos|>", "<|im_start|>", "</s>", "<s>[INST]", "<0x0A>", "\x00", "\ufffd", "\u202e"]
TEXTS = [
    "", "a", "Once upon a time", "naïve café 你好 😀", "\n\n\n", " ", "é" * 50, "\U0010ffff", "a" * 5000,
    "word " * 3000, "'\"\\`${}<script>", "../../etc/passwd", "\u0000", "0", "true", "null", "NaN", *CONTROL,
]  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 20, 21, 127, 128, 129, 255, 2047, 2048, 2049, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63),
    2**64, 10**30, 0.0, -0.0, 0.5, 1e-9, 1.0, 2.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
FIELDS = [
    "model", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "logit_bias", "stop", "stop_token_ids", "min_tokens", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "priority", "stream", "stream_options", "max_tokens",
    "logprobs", "echo", "add_special_tokens", "prompt", "prompts", "messages", "max_completion_tokens", "top_logprobs",
    "tools",
    "tool_choice", "response_format", "chat_template", "chat_template_kwargs", "add_generation_prompt",
    "continue_final_message", "guided_json", "prompt_logprobs", "detokenize", "prompt_token_ids", "token_ids", "output",
    "positions", "tokens", "return_token_strs", "user", "suffix", "device", "bytes", "urgency", "devices", "placement",
    "layers", "objective", "dry_run", "num_gpus", "dtype", "max_model_len",
]  # fmt: skip


def _messages(source: random.Random) -> list[Body]:
    roles = ["user", "assistant", "system", "user"]
    talk: list[Body] = [{"role": roles[i % 4], "content": source.choice(TEXTS)} for i in range(source.randint(1, 5))]
    if source.random() < 0.2:
        talk[-1]["content"] = [{"type": "text", "text": source.choice(TEXTS)} for _ in range(source.randint(0, 3))]
    return talk


def _ids(source: random.Random) -> list[int]:
    return [source.randrange(2048) for _ in range(source.choice([1, 3, 20, 200, 2047, 2048, 2049]))]


def _sampling(source: random.Random) -> Body:
    body: Body = {"max_tokens": source.randint(1, 12)}
    choices: dict[str, Callable[[], Any]] = {
        "n": lambda: source.randint(1, 4),
        "temperature": lambda: source.choice([0, 0.7, 1, 2]),
        "top_p": lambda: source.choice([0.1, 0.9, 1]),
        "seed": lambda: source.randint(0, 9),
        "stop": lambda: source.choice(["a", ["b", "\n"], ["x" * 1024] * 64]),
        "stream": lambda: True,
        "logit_bias": lambda: {str(source.randrange(2048)): source.choice([-100, 100, 1])},
        "repetition_penalty": lambda: 1.1,
        "ignore_eos": lambda: True,
        "priority": lambda: source.randint(-3, 3),
    }
    for name, make in choices.items():
        if source.random() < 0.15:
            body[name] = make()
    return body


def _prompt(source: random.Random) -> Any:
    kind = source.randrange(4)
    texts = [source.choice(TEXTS[1:]) for _ in range(source.randint(1, 4))]
    return [texts[0], texts, _ids(source), [_ids(source) for _ in range(2)]][kind]


VALID: dict[str, Callable[[random.Random], Body]] = {
    "/v1/completions": lambda s: {**_sampling(s), "prompt": _prompt(s), "logprobs": s.choice([None, 0, 5])},
    "/v1/chat/completions": lambda s: {**_sampling(s), "messages": _messages(s), "logprobs": s.choice([None, True])},
    "/v1/batch/completions": lambda s: {
        **{name: value for name, value in _sampling(s).items() if name != "stream"},
        "prompts": [s.choice(TEXTS[1:]) for _ in range(s.choice([1, 3, 30]))],
    },
    "/api/generate": lambda s: {**_sampling(s), "prompt_token_ids": _ids(s), "prompt_logprobs": s.choice([None, 3])},
    "/api/infer": lambda s: {
        "token_ids": _ids(s),
        "output": s.choice(["logits", "hidden_states"]),
        "positions": s.choice(["last", "last", "all"]),
    },
    "/tokenize": lambda s: s.choice(
        [{"prompt": s.choice(TEXTS)}, {"messages": _messages(s), "return_token_strs": True}]
    ),
    "/detokenize": lambda s: {"tokens": _ids(s)},
    "/api/memory/reclaim": lambda s: {
        "device": s.choice(["cpu#0", "cpu#1", "cuda:0"]),
        "bytes": s.choice([1, 1 << 20]),
    },
    "/api/memory/lend": lambda s: {"device": s.choice(["cpu#0", "cpu#1", "nowhere"])},
    "/api/pipeline/place": lambda s: {
        "dry_run": True,
        "devices": s.choice(["cpu=1GiB", "cpu=1GiB,cpu=1GiB", "cpu=1KiB"]),
    },
}


def any_value(source: random.Random, depth: int = 0) -> Any:
    """Anything that JSON, or Python's idea of it, can say."""
    kind = source.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return source.choice(NUMBERS)
    if kind < 5:
        return source.choice(TEXTS)
    if kind == 5:
        return source.choice([None, True, False])
    if kind == 6:
        return [any_value(source, depth + 1) for _ in range(source.choice([0, 1, 3, 50]) if depth < 2 else 2)]
    return {source.choice(FIELDS + TEXTS): any_value(source, depth + 1) for _ in range(source.randint(0, 5))}


def _mutate(source: random.Random, body: Body) -> Body:
    body = json.loads(json.dumps(body))
    for _ in range(source.randint(1, 3)):
        container: Any = body
        while True:
            keys: list[Any] = list(container) if isinstance(container, dict) else list(range(len(container)))
            if not keys or source.random() < 0.2:
                break
            key = source.choice(keys)
            if isinstance(container[key], (dict, list)) and source.random() < 0.6:
                container = container[key]
                continue
            if source.random() < 0.25:
                del container[key]
            else:
                container[key] = any_value(source)
            break
        if isinstance(container, dict) and source.random() < 0.5:
            container[source.choice(FIELDS)] = any_value(source)
    return body


def _huge(source: random.Random, valid: Body) -> bytes:
    """Texts, lists and depths that are too much."""
    text = source.choice(["a", " ", "😀", "a b ", "<|user|>", "\\u0000"]) * source.choice([10_000, 300_000, 1_500_000])
    deep = source.choice([60, 100, 3000, 200_000])
    kinds: list[Any] = [
        lambda: {**valid, "prompt": text},
        lambda: {**valid, "prompt": [text[:5000]] * source.choice([255, 256, 257, 2000])},
        lambda: {**valid, "prompts": ["a"] * source.choice([256, 257]), "n": 128, "max_tokens": 4},
        lambda: {**valid, "prompt": ["a"] * 256, "best_of": 128, "max_tokens": 4},
        lambda: {**valid, "messages": [{"role": "user", "content": text}]},
        lambda: {**valid, "messages": [{"role": "user", "content": "a"}] * 20_000},
        lambda: {**valid, "stop": [text[:2000]] * 100},
        lambda: {**valid, "stop": ["a"] * 200_000},
        lambda: {**valid, "logit_bias": {str(i): 1 for i in range(100_000)}},
        lambda: {**valid, "tokens": [5] * 1_000_000, "token_ids": [5] * 1_000_000, "prompt_token_ids": [5] * 1_000_000},
        lambda: {**valid, "n": 128, "max_tokens": 8},
        lambda: {**valid, "x" * 1_000_000: 1},
    ]
    raw = [
        b"[" * deep + b"]" * deep,
        b'{"prompt":' + b'{"a":' * deep + b"1" + b"}" * (deep + 1),
        b'{"n": ' + b"9" * source.choice([100, 5000, 1_000_000]) + b"}",
        b'{"temperature": 1e999999999}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "' + b"\xff\xfe" * 10 + b'"}',
        b"",
        b" " * 100_000,
        b"\x00" * 1000,
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"null",
        b'"text"',
    ]
    if source.random() < 0.5:
        return source.choice(raw)
    return json.dumps(source.choice(kinds)()).encode()


@dataclass(frozen=True, slots=True)
class Sent:
    """One request. `raw` is sent as it is; `leaves_s` is when the client hangs up, None if it waits."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    leaves_s: float | None = None
    kind: str = ""


WRONG_TOKENS = ["", "wrong", "Bearer", "é", "\x7f", "a" * 5000, "token, token"]
BROKEN = [
    b"GET / HTTP/1.1\r\n\r\n", b"GET /live HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /live HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
    b"GET /live HTTP/1.1\r\nHost: a\r\nX-\x00: b\r\n\r\n", b"GET /%00%ff%f0 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]  # fmt: skip
BAD_CHUNKS = [
    b"zz\r\nab\r\n0\r\n\r\n",
    b"-5\r\nab\r\n",
    b"ffffffffffffffffff\r\nab",
    b"5\r\nab",
    b"2\r\nabXX0\r\n\r\n",
    b"5;" + b"x" * 70_000,
]


class Requests:
    """Requests to `routes`, pairs of method and rule, one for each number; the same for the same seed."""

    def __init__(self, seed: int, token: str, routes: list[tuple[str, str]]) -> None:
        self._seed = seed
        self._token = token
        self._routes = routes

    def number(self, index: int) -> Sent:
        """The request with this number."""
        source = random.Random(f"{self._seed}:{index}")
        method, rule = source.choice(self._routes)
        if source.random() < 0.5:  # half of it to what computes
            method, rule = "POST", source.choice(list(VALID))
        path = self._path(source, rule)
        kind = source.choices(
            ["valid", "mutated", "any", "huge", "broken", "wrong token", "leaves", "elsewhere"],
            [28, 30, 12, 6, 6, 4, 10, 4],
        )[0]
        if kind == "broken":
            return Sent(method, path, raw=self._broken(source, path), kind=kind)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        if source.random() < 0.1:
            headers |= self._odd_headers(source)
        if kind == "wrong token":
            headers["Authorization"] = f"Bearer {source.choice(WRONG_TOKENS)}"
            headers = {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}
        if kind == "elsewhere":
            method = source.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"])
            path = source.choice(["/", "//", "/v1", "/v1/models/" + "a/" * 100, path + "/x", path + "?" + "a=b&" * 500])
        return Sent(
            method, path, self._body(source, kind, rule), headers,
            leaves_s=source.choice([0.0, 0.01, 0.1, 0.5]) if kind == "leaves" else None, kind=kind,
        )  # fmt: skip

    def _path(self, source: random.Random, rule: str) -> str:
        while "<" in rule:
            start, end = rule.index("<"), rule.index(">")
            rule = (
                rule[:start]
                + source.choice(["a", "demo", "%2e%2e%2f", "0" * 64, "%F0%9F", "a" * 3000])
                + rule[end + 1 :]
            )
        return rule

    def _body(self, source: random.Random, kind: str, rule: str) -> bytes | None:
        valid = VALID[rule](source) if rule in VALID else {}
        if kind in ("valid", "wrong token", "leaves"):
            if kind == "leaves" and "max_tokens" in valid:
                valid |= {"max_tokens": 500, "stream": source.random() < 0.7}
            return json.dumps(valid).encode() if rule in VALID else None
        if kind == "huge":
            return _huge(source, valid)
        body = _mutate(source, valid) if kind == "mutated" else any_value(source)
        data = json.dumps(body).encode()
        if source.random() < 0.1 and data:
            at = source.randrange(len(data))
            data = data[:at] + source.randbytes(source.randint(0, 4)) + data[at + source.randint(0, 3) :]
        return data

    def _odd_headers(self, source: random.Random) -> dict[str, str]:
        return source.choice(
            [
                {"Content-Type": source.choice(["text/plain", "application/json; charset=utf-16", "a" * 1000, ""])},
                {"Content-Encoding": "gzip"},
                {"Accept": source.choice(["application/x-safetensors", "image/png", "*/*;q=0", ";;;", "a" * 5000])},
                {"X-Request-ID": source.choice(["a" * 500, "same", "\t", "{}"])},
                {"Expect": source.choice(["100-continue", "something"])},
                {"X-API-TOKEN": self._token},
                {"Origin": "https://example.com"},
                {"Range": "bytes=0-0", "If-None-Match": "*"},
            ]
        )

    def _broken(self, source: random.Random, path: str) -> bytes:
        if source.random() < 0.5:
            return source.choice(BROKEN)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self._token}\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head.encode() + source.choice(BAD_CHUNKS)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edit


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def _add_token(token_id: int, text: str) -> Callable[[Path], None]:
    def add(tokenizer: Any) -> Any:
        known = tokenizer["added_tokens"]
        return {**tokenizer, "added_tokens": [*known, {**known[0], "id": token_id, "content": text}]}

    return _edit("tokenizer.json", add)


def _set(**values: Any) -> Callable[[Path], None]:
    return _edit("config.json", lambda config: {**config, **values})


DEEP = b"[" * 100_000 + b"]" * 100_000
CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "tokenizer is no json": _write("tokenizer.json", b"{"),
    "tokenizer is bytes": _write("tokenizer.json", bytes(range(256))),
    "tokenizer is deep": _write("tokenizer.json", DEEP),
    "tokenizer is empty": _write("tokenizer.json", b"{}"),
    "tokenizer knows one word": _edit(
        "tokenizer.json",
        lambda t: {**t, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []},
    ),
    "tokenizer has ids beyond": _add_token(10**6, "<|far|>"),
    "tokenizer has a long token": _add_token(2048, "x" * 10**6),
    "tokenizer drops all": _edit(
        "tokenizer.json",
        lambda t: {**t, "normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}},
    ),
    "template times": _write("chat_template.jinja", b"{{ 'a' * 2000000000 }}"),
    "template loops": _write(
        "chat_template.jinja",
        b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ),
    "template doubles": _write(
        "chat_template.jinja",
        b"{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ),
    "template calls itself": _write("chat_template.jinja", b"{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template is broken": _write("chat_template.jinja", b"{% for"),
    "template is bytes": _write("chat_template.jinja", b"\xff\xfe{{ messages }}"),
    "template says much": _write("chat_template.jinja", b"{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}"),
    "config is no json": _write("config.json", b"{"),
    "config is deep": _write("config.json", DEEP),
    "config is a list": _write("config.json", b"[]"),
    "config has no type": _edit("config.json", lambda c: {k: v for k, v in c.items() if k != "model_type"}),
    "config is enormous": _set(hidden_size=10**9),
    "config has many layers": _set(num_hidden_layers=10**6),
    "config has few layers": _set(num_hidden_layers=-1),
    "config has no heads": _set(num_attention_heads=0),
    "config has odd types": _set(hidden_size="192", vocab_size=None),
    "config has a long context": _set(max_position_embeddings=10**12),
    "config has a large vocabulary": _set(vocab_size=2**40),
    "config has odd rope": _set(rope_parameters={"rope_type": "yarn", "factor": float("inf")}),
    "config has its own code": _set(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"),
    "weights are cut off": lambda folder: _cut(folder / "model.safetensors", 0.5),
    "weights are nothing": lambda folder: _cut(folder / "model.safetensors", 0.0),
    "weights have a long head": _write("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
    "generation config is odd": _write("generation_config.json", b'{"temperature": "hot", "eos_token_id": [1e99]}'),
}  # fmt: skip


def _cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def hostile_models(folder: Path) -> list[Path]:
    """The demo model again and again, each time with one thing wrong."""
    made = []
    for name, spoil in CHECKPOINTS.items():
        target = folder / name.replace(" ", "-")
        shutil.copytree(DEMO_PATH, target)
        spoil(target)
        made.append(target)
    return made
