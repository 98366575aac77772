"""How a model's token vectors become one vector: what the sentence-transformers files beside its weights say.

`modules.json` lists the modules in their order, `1_Pooling/config.json` says how tokens are pooled,
`sentence_bert_config.json` how many tokens count, `config_sentence_transformers.json` what is put in front of texts.
No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from core.errors import CheckpointError, UnsupportedModelError
from core.models.json_files import read_json_object, read_json_value, shown

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which sentence-transformers puts the vectors of several poolings behind each other."""
_MOST_PROMPTS = 256
_MOST_PROMPT_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class Layout:
    """Poolings whose vectors are put behind each other, and what is around them.

    Attributes:
        folder: where config and weights are, below the model's directory.
        normalize: vectors get the length 1.
        include_prompt: the prompt's tokens are pooled with the text's.
        max_seq_length: tokens that count; None: as many as the model takes.
        lower_case: texts are written small first.
        prompts: what is put in front of texts, by name.
        default_prompt: the name of the one for texts that ask for none.
        named: whether the files say how tokens are pooled, or it was assumed.
    """

    poolings: tuple[Pooling, ...]
    normalize: bool
    folder: str = ""
    include_prompt: bool = True
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    named: bool = False

    def prompt(self, name: str | None) -> str:
        """The text of a prompt, or of the default one; empty if there is none. Raises `KeyError`."""
        chosen = self.default_prompt if name is None else name
        return "" if chosen is None else self.prompts[chosen]


def read_layout(path: Path, *, otherwise: Pooling) -> Layout:
    """What the files in `path` say. Where they say nothing, tokens are pooled as `otherwise` says, to the length 1.

    Raises `UnsupportedModelError` for modules that are not known here, and `CheckpointError` for damaged files.
    """
    prompts, default = _prompts(path)
    listed = path / "modules.json"
    if not listed.is_file():
        lone = path / "1_Pooling" / "config.json"
        poolings, whole = _poolings(lone) if lone.is_file() else ((otherwise,), True)
        return Layout(
            poolings, True, include_prompt=whole, max_seq_length=_sequence(path)[0], lower_case=_sequence(path)[1],
            prompts=prompts, default_prompt=default, named=lone.is_file(),
        )  # fmt: skip
    folder, poolings, whole, normalize = "", (otherwise,), True, False
    named = False
    for kind, place in _modules(listed):
        if kind == "Transformer":
            folder = place
        elif kind == "Pooling":
            poolings, whole = _poolings(_inside(path, place) / "config.json")
            named = True
        elif kind == "Normalize":
            normalize = True
        else:
            raise UnsupportedModelError(
                f"{path.name} has a module of type {kind} (modules.json); Transformer, Pooling and Normalize are "
                "supported.",
                param="model",
            )
    length, lower = _sequence(_inside(path, folder))
    return Layout(poolings, normalize, folder, whole, length, lower, prompts, default, named)


def _modules(file: Path) -> list[tuple[str, str]]:
    """Type, without its package, and folder of each module."""
    entries = read_json_value(file)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)
        for entry in entries
    ):
        raise CheckpointError(f"{file.name} of {file.parent.name} must list modules with type and path.", param="model")
    return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in entries]


def _inside(path: Path, folder: str) -> Path:
    if Path(folder).is_absolute() or ".." in Path(folder).parts or "\0" in folder:
        raise CheckpointError(f"modules.json names {folder!r}, which is not inside the directory.", param="model")
    return path / folder


def _poolings(file: Path) -> tuple[tuple[Pooling, ...], bool]:
    """The poolings in their order, and whether the prompt's tokens are among what is pooled."""
    config = read_json_object(file)
    given = config.get("pooling_mode")  # as files of later versions write it, one or several
    if given is not None:
        names = given if isinstance(given, list) else [given]
    else:
        names = [mode for key, mode in _MODES.items() if config.get(key) is True]
    unknown = [name for name in names if name not in _MODES.values()]
    if unknown or not names:
        raise UnsupportedModelError(
            f"{file.parent.name}/config.json pools by {shown(unknown or None)}; allowed: {', '.join(_MODES.values())}.",
            param="model",
        )
    return tuple(cast("list[Pooling]", names)), config.get("include_prompt", True) is not False


def _sequence(path: Path) -> tuple[int | None, bool]:
    """How many tokens count, and whether texts are written small."""
    file = path / "sentence_bert_config.json"
    config = read_json_object(file) if file.is_file() else {}
    length = config.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise CheckpointError(f"{file.name}: max_seq_length is {shown(length)}, but must be above 0.", param="model")
    return length, config.get("do_lower_case") is True


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    file = path / "config_sentence_transformers.json"
    config: dict[str, Any] = read_json_object(file) if file.is_file() else {}
    prompts = config.get("prompts") or {}
    default = config.get("default_prompt_name")
    fits = isinstance(prompts, dict) and len(prompts) <= _MOST_PROMPTS
    if not fits or not all(isinstance(t, str) and len(t) <= _MOST_PROMPT_CHARACTERS for t in prompts.values()):
        raise CheckpointError(f"{file.name}: prompts must give each name its text.", param="model")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{file.name}: default_prompt_name {shown(default)} is none of prompts.", param="model")
    return prompts, default
