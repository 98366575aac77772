"""A pipeline that answers from a script instead of a model, so that the API's tests need no engine.

Its tokens are bytes (ids 0 to 255) with a begin and an end token, so one character may take several tokens.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from core.batching.intake import Intake, Load
from core.batching.output import RequestHandle
from core.batching.sequence import RawAnswer
from core.batching.stats import BatcherStats
from core.config import Settings
from core.devices import Device, DeviceBudget, MainMemory
from core.embedding.service import Encoders
from core.engine.block_tiers import BlockTiers
from core.engine.submission import LoadedModel, check_length
from core.errors import (
    ChatTemplateError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    ModelNotLoadedError,
    VRAMancerError,
)
from core.grammars.compiler import Grammars
from core.grammars.vocabulary import Vocabulary
from core.metrics import MetricsRegistry
from core.models.resolve import DEMO_PATH
from core.models.tokenizer import Tokenizer
from core.request import RequestOutput, SamplingParams, SequenceDelta, TokenLogprob
from core.upstreams.replica import Reported
from core.upstreams.upstreams import Upstreams
from core.views.state import ServiceState

BOS, EOS, VOCAB = 256, 257, 258
CONTEXT = 512
HIDDEN = 8


class ByteStream:
    def __init__(self, skip_special_tokens: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip = skip_special_tokens

    def push(self, token_id: int) -> str:
        if token_id >= BOS:
            return "" if self._skip else SPECIAL[token_id]
        return self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


SPECIAL = {BOS: "<s>", EOS: "</s>"}


GRAMMARS = Grammars(
    lambda: Vocabulary.of({n: bytes([n]) for n in range(256)} | {EOS: b"</s>"}, VOCAB, SPECIAL, [EOS])
)  # fmt: skip


class ByteTokenizer:
    vocab_size = VOCAB
    bos_token_id = BOS
    eos_token_id = EOS
    template_source = "{{ messages }}"
    added_tokens: frozenset[str] = frozenset()
    template_variables = frozenset({"messages", "tools", "add_generation_prompt"})

    def encode(self, text: str, *, add_special_tokens: bool = True, context: int | None = None) -> list[int]:
        return ([BOS] if add_special_tokens and text else []) + list(text.encode())

    def grammars(self, end_token_ids: Sequence[int]) -> Grammars:
        return GRAMMARS

    def num_in_front(self, text: str, token_ids: Sequence[int]) -> int:
        return int(token_ids[:1] == [BOS])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        stream = ByteStream(skip_special_tokens)
        return "".join(stream.push(token_id) for token_id in token_ids) + stream.flush()

    def token_text(self, token_id: int) -> str:
        return SPECIAL.get(token_id) or bytes([token_id]).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return SPECIAL[token_id].encode() if token_id in SPECIAL else bytes([token_id])

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        context: int | None = None,
    ) -> list[int]:
        if any(message["role"] == "tool" for message in messages):
            raise ChatTemplateError("The template knows no tools.", param="messages")
        text = "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages)
        return self.encode(text + ("a:" if add_generation_prompt else ""))

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, kept: Sequence[int] = ()
    ) -> ByteStream:
        return ByteStream(skip_special_tokens)


def fake_model(name: str = "demo") -> LoadedModel:
    return LoadedModel(
        name=name,
        aliases=("org/demo",),
        path=DEMO_PATH,
        created=1_700_000_000,
        max_model_len=CONTEXT,
        vocab_size=VOCAB,
        dtype="float32",
        num_parameters=1000,
        eos_token_ids=(EOS,),
        generation_defaults={},
        tokenizer=cast(Tokenizer, ByteTokenizer()),
    )


def fake_engine(model: LoadedModel) -> Any:
    """What views read of an engine: one device, no stage, a breaker."""
    device = Device("cpu:0", 0, "cpu", "cpu", 1024)
    budget = DeviceBudget(device)
    budget.reserve("weights", 512)
    breaker = SimpleNamespace(state="closed", consecutive_failures=0, last_error=None)
    placement = SimpleNamespace(strategy="vram", unused_devices=(), stages=())
    return SimpleNamespace(
        model=model,
        plan=SimpleNamespace(
            devices=(device,),
            placement=placement,
            prediction=None,
            notes=(),
            architecture=SimpleNamespace(hidden_size=HIDDEN),
        ),
        budgets={device.name: budget},
        stages=[],
        load_s=0.0,
        kv=SimpleNamespace(block_size=16, capacity_tokens=CONTEXT, pool=SimpleNamespace(num_blocks=CONTEXT // 16)),
        memory=SimpleNamespace(overflow=None, tiers=None, below=BlockTiers()),
        batcher=SimpleNamespace(
            alive=True, error=None, breaker=breaker, stats=BatcherStats(), intake=Intake(Load(320, 1 << 22), "")
        ),
    )


@dataclass(frozen=True)
class FakeStage:
    device: str
    layers: tuple[int, int]


@dataclass(frozen=True)
class FakePlaced:
    """What a placement answers: a record of records."""

    stages: tuple[FakeStage, ...]
    prediction: dict[int, float]
    dry_run: bool


class FakePipeline:
    """Answers `reply` to every prompt; `hold` keeps the answer back, `error` puts one after `tokens_before_error`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = MetricsRegistry()
        self.tracing = None
        self.loading = False
        self.upstreams = Upstreams(settings.backend, self.own_load)
        self.cluster = None
        self.encoders = Encoders(settings, MainMemory(0))
        self.monitor = SimpleNamespace(readings={})
        self.fake_model: LoadedModel | None = fake_model()
        self.reply = "Hello"
        self.hold = False
        self.refusal: VRAMancerError | None = None
        self.failing: dict[int, VRAMancerError] = {}
        self.tokens_before_error = 2
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.priorities: list[int] = []
        self.owners: list[str] = []
        self.running: dict[str, RequestHandle] = {}
        self.aborted: list[str] = []
        self.abort_seen = threading.Event()
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self.placements: list[dict[str, Any]] = []
        self.load_under_way = False
        self.engine = fake_engine(self.model)

    @property
    def model(self) -> LoadedModel:
        if self.fake_model is None:
            raise ModelNotLoadedError("No model is loaded.")
        return self.fake_model

    def own_load(self) -> Reported | None:
        return Reported(0, 0, 0, 4) if self.fake_model is not None else None

    @property
    def loaded(self) -> bool:
        return self.fake_model is not None

    def submit_many(
        self, requests: Any, *, priority: int = 0, request_id: str = "r", sink: Any = None, model: Any = None,
        owner: str = "nobody", trace: Any = None,
    ) -> list[RequestHandle]:  # fmt: skip
        if self.refusal is not None:
            raise self.refusal
        for token_ids, params in requests:
            params.validate(self.model.vocab_size)
            check_length(len(token_ids), self.model)
            room = self.model.max_model_len - len(token_ids)
            if (params.max_tokens or 1) > room:
                raise ContextLengthError(f"The context holds {self.model.max_model_len} tokens.", param="max_tokens")
        handles = []
        for index, (token_ids, params) in enumerate(requests):
            if params.num_sequences > params.n and params.logprobs is None:
                params = replace(params, logprobs=0)
            self.submitted.append((list(token_ids), params))
            self.priorities.append(priority)
            self.owners.append(owner)
            handle = RequestHandle(f"{request_id}-{index}", params, self._abort, sink, index)
            self.running[handle.request_id] = handle
            handles.append(handle)
            if not self.hold:
                self._answer(handle, list(token_ids), params, self.failing.get(index))
        return handles

    def _answer(
        self, handle: RequestHandle, prompt: list[int], params: SamplingParams, error: VRAMancerError | None
    ) -> None:
        tokens = list(self.reply.encode())
        limit = params.max_tokens or CONTEXT
        streams = [ByteStream(True) for _ in range(params.num_sequences)]
        for position, token in enumerate(tokens[:limit]):
            if error is not None and position == self.tokens_before_error:
                handle.put(error)
                return
            deltas = [
                SequenceDelta(index, stream.push(token), (token,), self._logprobs(token, index, params.logprobs))
                for index, stream in enumerate(streams)
            ]
            last = position + 1 == min(limit, len(tokens))
            if last:
                reason = "length" if limit <= len(tokens) else "stop"
                deltas += [SequenceDelta(index, finish_reason=reason) for index in range(len(streams))]
            prompt_logprobs = self._prompt_logprobs(prompt, params) if position == 0 else None
            handle.put(RequestOutput(handle.request_id, tuple(deltas), len(prompt), 1, prompt_logprobs, last))

    @staticmethod
    def _logprobs(token: int, index: int, count: int | None) -> tuple[TokenLogprob, ...] | None:
        """Later sequences are likelier, so that `best_of` has something to choose."""
        if count is None:
            return None
        value = -1.0 / (index + 1)
        return (TokenLogprob(token, value, ((token, value), ((token + 1) % BOS, value - 1), (EOS, -9e99))[:count]),)

    def _prompt_logprobs(self, prompt: list[int], params: SamplingParams) -> Any:
        if params.prompt_logprobs is None:
            return None
        later = [self._logprobs(token, 0, params.prompt_logprobs) for token in prompt[1:]]
        return (None, *(item[0] for item in later if item))

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.abort_seen.set()

    def cancel(self, request_id: str) -> bool:
        matching = [name for name in self.running if name == request_id or name.rpartition("-")[0] == request_id]
        for name in matching:
            handle = self.running.pop(name)
            if handle.finished:
                continue
            closing = SequenceDelta(0, finish_reason="abort")
            handle.put(RequestOutput(name, (closing,), 3, finished=True))
        return bool(matching)

    def submit_raw_many(
        self, asked: Any, *, request_id: str, sink: Any, model: Any, owner: str, trace: Any = None
    ) -> list[RequestHandle]:
        if self.refusal is not None:
            raise self.refusal
        names = [request_id] if len(asked) == 1 else [f"{request_id}-{index}" for index in range(len(asked))]
        return [
            self._submit_raw(*each, index, request_id=name, sink=sink, owner=owner)
            for index, (each, name) in enumerate(zip(asked, names, strict=True))
        ]

    def _submit_raw(
        self, token_ids: Sequence[int], raw: RawAnswer, index: int, *, request_id: str, sink: Any, owner: str
    ) -> RequestHandle:
        self.owners.append(owner)
        handle = RequestHandle(request_id, SamplingParams(), self._abort, sink, index)
        self.running[request_id] = handle
        if not self.hold:
            rows = len(token_ids) if raw.positions == "all" else 1
            values = np.zeros((rows, VOCAB if raw.output == "logits" else HIDDEN), dtype=np.float32)
            values[0, 0] = float("-inf") if raw.output == "logits" else 1.0
            raw.add(len(token_ids) - rows, values)
            handle.put(
                RequestOutput(request_id, (SequenceDelta(0, finish_reason="stop"),), len(token_ids), finished=True)
            )
        return handle

    def load(self, model: str, **options: Any) -> LoadedModel:
        self.loads.append((model, options))
        self.fake_model = fake_model(model)
        return self.fake_model

    def unload(self) -> LoadedModel:
        model, self.fake_model = self.model, None
        return model

    def ready(self) -> tuple[bool, str]:
        return self.loaded, "ready" if self.loaded else "no model is loaded"

    def place(self, **options: Any) -> FakePlaced:
        """As the real one: refused without a model and while a load is under way."""
        name = self.model.name
        if self.load_under_way:
            raise ConflictError(f"A model is being loaded; {name} cannot be placed anew meanwhile.")
        if options["placement"] == "unheard-of":
            raise InvalidRequestError("There is no such strategy.", param="placement")
        self.placements.append(options)
        return FakePlaced((FakeStage("cpu#0", (0, 1)), FakeStage("cpu#1", (2, 3))), {1: 12.5}, options["dry_run"])

    @property
    def current_engine(self) -> Any:
        if self.fake_model is None:
            return None
        self.engine.model = self.fake_model
        return self.engine

    def state(self) -> ServiceState:
        ready, reason = self.ready()
        return ServiceState(
            loading=False, closing=False, ready=ready, reason=reason, settings=self.settings, transfers={},
            latency=self.metrics.latency, readings=self.monitor.readings, upstreams=self.upstreams.views(),
        )  # fmt: skip
