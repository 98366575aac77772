"""How much memory a step takes beside weights and KV: the model's own forward pass, on `meta`, where nothing is
computed and every tensor is counted for as long as it lives.

Attention gives back its output and keeps nothing: kernels read the pages where they are. Plain torch, which does it
where there are no kernels, gathers them first, a bounded number at one time; see `planned_gathering`.
Routed experts, whose loops need real numbers, are counted as one product over all pairs of a token and its experts.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.costs import Experts, Workspace
from core.costs.model import ALLOCATOR_MARGIN
from core.errors import UnsupportedModelError
from core.execution.attention.interface import ATTENTION_NAME, bind
from core.execution.attention.metadata import AttentionSpec
from core.execution.rotary import token_ropes
from core.execution.sampler import Sampler, SamplingRow
from core.logs import get_logger
from core.models.architecture import Architecture
from core.models.blank import BUILDING
from core.models.stage_model import PassThrough, find_decoder
from core.quantization.swap import swap_in, tie_heads
from core.request import SamplingParams

logger = get_logger(__name__)

_STEPS_OF_GATES = 5
"""Tensors that are made on the way from gate and up to what goes down: clamped, halves, sigmoid, products."""

_NOT_ON_META = (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What forward passes end with that look at numbers, or at fields of a config that are not what they should be."""

_VOCAB, _ROWS = 512, 4
_EVERYTHING = SamplingParams(
    temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, frequency_penalty=0.1, repetition_penalty=1.1, logprobs=5
)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on: `peak` is the most bytes that tensors made since then held at one time."""

    def __init__(self, known: tuple[torch.Tensor, ...] = ()) -> None:
        """`known` tensors were there before, and so were those that share their memory."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if not self._users[key]:
            self._live += nbytes
            self.peak = max(self.peak, self._live)
        self._users[key] += 1
        weakref.finalize(tensor, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._live -= nbytes


class _NoKeys:
    """Stands for `LayerAttention`: an output of the right size."""

    window: int | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


class _AllPairs(nn.Module):
    """Stands for a layer's routed experts."""

    def __init__(self, module: nn.Module, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        weights = sum(each.numel() for name, each in module.named_parameters() if "bias" not in name)
        self._per_token = experts.per_token
        self._inner = -(-weights // (max(experts.number) * 3 * hidden_size))  # gate, up and down
        self._has_bias = any("bias" in name for name, _ in module.named_parameters())

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        width = hidden_states.shape[-1]
        pairs = hidden_states.numel() // width * self._per_token
        result, gathered = torch.empty_like(hidden_states), hidden_states.new_empty((pairs, width))
        both = gathered.new_empty((pairs, 2 * self._inner))
        biases = both.new_empty((pairs, 2 * self._inner + width)) if self._has_bias else None
        gated = [both.new_empty((pairs, self._inner)) for _ in range(_STEPS_OF_GATES)]
        weighted = [each.new_empty((pairs, width)) for each in gated[:2]]
        del both, biases, gated, gathered, weighted
        return result


def measure_workspace(
    architecture: Architecture, tokens: int, rows: int, experts: Experts | None = None
) -> Workspace | None:
    """For steps of `tokens` tokens of which `rows` are sampled.

    None for models whose forward pass looks at numbers, which `meta` does not have.
    """
    try:
        model = _blank(architecture, experts)
        names = ("input_ids", "position_ids")
        inputs = {name: torch.zeros((1, tokens), dtype=torch.int64, device="meta") for name in names}
        for rope in token_ropes(model):
            rope.lengths = torch.ones(tokens, dtype=torch.int64, device="meta")
        keep = torch.zeros(rows, dtype=torch.int64, device="meta")
        known = (*model.parameters(), *model.buffers())
        layers = peak_of(lambda: model.base_model(use_cache=False, **inputs)[0], known)
        whole = peak_of(lambda: model(use_cache=False, logits_to_keep=keep, **inputs).logits, known)
    except (*_NOT_ON_META, UnsupportedModelError) as error:
        logger.info("workspace is estimated", model=architecture.model_type, reason=str(error).splitlines()[0])
        return None
    sampling = _sampling_bytes() * rows * architecture.vocab_size
    return Workspace(int(ALLOCATOR_MARGIN * layers), int(ALLOCATOR_MARGIN * (max(0, whole - layers) + sampling)))


def peak_of(work: Callable[[], object], known: tuple[torch.Tensor, ...] = ()) -> int:
    """The most bytes that tensors of `work` hold at one time, its result included."""
    live = LiveBytes(known)
    with torch.no_grad(), torch.device("meta"), live:
        work()
    return live.peak


def _blank(architecture: Architecture, experts: Experts | None) -> Any:
    """The model on `meta`, with its first two and its last layer alone: the others are like them."""
    config = copy.deepcopy(architecture.config)
    text = config.get_text_config()
    text.pad_token_id = None  # some look for it among the tokens
    with BUILDING, torch.device("meta"):
        model = architecture.model_class._from_config(
            config, dtype=architecture.dtype, attn_implementation=ATTENTION_NAME
        )
        swap_in(model, architecture.quantization, architecture.dtype)
    tie_heads(model)
    decoder, name = find_decoder(model, architecture.num_layers)
    layers: Any = getattr(decoder, name)
    kept = {0, 1, architecture.num_layers - 1} & set(range(architecture.num_layers))
    for index in set(range(architecture.num_layers)) - kept:
        layers[index] = PassThrough(layers[index])
    for module in list(layers.modules()):
        if experts is not None and isinstance(getattr(module, "experts", None), nn.Module):
            module.experts = _AllPairs(module.experts, architecture.hidden_size, experts)
    no_keys: Any = _NoKeys()
    bind(model, dict.fromkeys(kept, no_keys))
    return model.eval()


def _sampling_bytes() -> float:
    """Per row and token of the vocabulary, with every parameter in use: a small sampling, for real."""
    sampler = Sampler(_VOCAB, torch.device("cpu"))
    logits = torch.zeros((_ROWS, _VOCAB))
    rows = [SamplingRow(index, _EVERYTHING, index, 3, (1, 2), (3,)) for index in range(_ROWS)]
    live = LiveBytes((logits,))
    with live:
        sampler.sample(logits, rows)
    return live.peak / (_ROWS * _VOCAB)
