"""What a checkpoint's `generation_config.json` says: tokens that end a text, and defaults for sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.defaults import GENERATION_DEFAULTS
from core.errors import InvalidRequestError
from core.models.config_checks import check_token_ids
from core.models.json_files import read_json_object, shown
from core.request import SamplingParams

FILE = "generation_config.json"
_PENALTIES = ("repetition_penalty",)
"""Defaults that hold for greedy decoding too."""


@dataclass(frozen=True, slots=True)
class Generation:
    """`eos_token_ids` is empty where the file names none; `notes` are what of it has no effect, and why."""

    eos_token_ids: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_generation(path: Path, vocab_size: int) -> Generation:
    """Read the file of a model directory, if there is one. Sampling parameters that no request could have are left out,
    with a note. With `do_sample: false` decoding is greedy unless a request says otherwise.

    Raises `CheckpointError` for a file that is damaged, or ends texts by something that is no token.
    """
    if not (path / FILE).is_file():
        return Generation()
    given = read_json_object(path / FILE)
    eos = given.get("eos_token_id")
    check_token_ids("eos_token_id", eos, FILE)
    ids = tuple(token for token in (eos if isinstance(eos, list) else [eos]) if token is not None)
    notes = [f"{FILE}: eos_token_id {token} is not in the vocabulary" for token in ids if not 0 <= token < vocab_size]
    sampled = given.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        notes.append(f"{FILE}: do_sample is {shown(sampled)}, not true or false, and has no effect")
    defaults: dict[str, Any] = {"temperature": 0.0} if sampled is False else {}
    for name in GENERATION_DEFAULTS if sampled is not False else _PENALTIES:
        value = given.get(name)
        if value is None:
            continue
        if name == "top_k" and value == -1:
            value = 0  # off, as some write it
        alone: dict[str, Any] = {name: value}
        try:
            SamplingParams(**alone).validate(vocab_size)
        except InvalidRequestError as error:
            notes.append(f"{FILE}: {name} is {shown(value)} and has no effect: {error.message}")
        else:
            defaults[name] = value
    return Generation(ids, defaults, tuple(notes))


def eos_of(config: Any, vocab_size: int, generation: Generation) -> tuple[int, ...]:
    """Tokens of the vocabulary that end a text: `generation_config.json`'s, or else those of `config.json`."""
    named = getattr(config, "eos_token_id", None)
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    ids = generation.eos_token_ids or (tuple(named) if isinstance(named, (list, tuple)) else (named,))
    return tuple(token for token in ids if token is not None and 0 <= token < vocab_size)
