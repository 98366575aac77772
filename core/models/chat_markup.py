"""Text is text: a control token that a message spells out is no markup, only what the chat template writes itself is.

A conversation is rendered twice: as it is, and with a stand-in for every character of the messages that a control token
could be made of. What a template does with text (trim, split, replace, slice, join, put into JSON) it does to stand-ins
alike, so that both texts have the same characters in the same places, and what is still a control token in the second
is the template's. In the first, those control tokens get secret names, and the text is encoded by a tokenizer that
knows them by these names alone. All else about it is the model's own tokenizer's, so that nothing changes around them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import tokenizers

from core.errors import ChatTemplateError, CheckpointError

FIRST_STAND_IN = 0xF0000
"""They are characters for private use, which Unicode gives no meaning."""
MAX_NESTED = 100
"""Control tokens of which each begins with the one before."""

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_METHODS = "r?split|startswith|endswith|replace|[lr]?strip|r?find|r?index|count|r?partition|removeprefix|removesuffix"
_CODE = re.compile(r"\{[{%].*?[}%]\}", re.DOTALL)
_STRING = re.compile(_QUOTED, re.DOTALL)
_LETTERS = re.compile(r"\\.|[^\\]", re.DOTALL)
_COMPARED = re.compile(rf"[=!]=\s*{_QUOTED}|{_QUOTED}\s*(?:[=!]=|(?:not\s+)?in\b)", re.DOTALL)
_ARGUMENTS = re.compile(
    rf"(?:\.\s*(?:{_METHODS})|\|\s*(?:replace|trim))\s*[(\s]+{_QUOTED}(?:\s*,\s*{_QUOTED})*", re.DOTALL
)
_SET = re.compile(rf"\{{%[-+]?\s*set\s+(?P<name>\w+)\s*=\s*{_QUOTED}\s*[-+]?%\}}", re.DOTALL)


class ChatMarkup:
    """The control tokens of a tokenizer and its chat template: its special tokens, and those added tokens that the
    template writes. Safe in many threads.

    `template` is the template for messages with stand-ins. What has no letter of `ends` and is no part of `joined` can
    be no part of a control token, unless `always`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        added = [token for token in backend.get_added_tokens_decoder().values() if _is_control(token, template)]
        self._backend = backend
        self._names = {token.content: secrets.token_hex(16) for token in added}
        self._tokens = _finder(set(self._names))
        letters = {letter for token in self._names for letter in token if not letter.isspace()}
        # What JSON writes as two characters must not become one; no control token is made of these alone.
        letters -= {'"', "\\"}
        self._stand_ins = {ord(letter): chr(FIRST_STAND_IN + n) for n, letter in enumerate(sorted(letters))}
        bare = "".join(_STRING.sub("''", code) for code in _CODE.findall(template))
        self.template = _SET.sub(partial(self._mask_variable, bare), _CODE.sub(self._mask_operands, template))
        # Other text may become a control token of these, and only the backend knows which.
        self.always = backend.normalizer is not None and any(token.normalized for token in added)
        ends = sorted({letter for token in self._names for letter in (token[0], token[-1])})
        self.ends = re.compile("|".join(map(re.escape, ends)) or "(?!)")
        self.joined = "\0".join(self._names)
        self._renamed: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()

    def mask(self, value: Any, field: str = "") -> Any:
        """A copy of messages, or of a part of them, with stand-ins.

        Names of fields, roles and types stay what they are, for templates ask for them; but for names that are no
        plain words.
        """
        if isinstance(value, str):
            kept = field in ("role", "type") and value.isidentifier()
            return value if kept else value.translate(self._stand_ins)
        if isinstance(value, dict):
            return {self._mask_name(name): self.mask(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.mask(item, field) for item in value]
        return value

    def mask_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The same for what else a template is given: words stay what they are, for it asks for them."""
        words = {name: value for name, value in options.items() if not isinstance(value, str) or value.isidentifier()}
        return {**self.mask(dict(options)), **words}

    def _mask_name(self, name: str) -> str:
        return name if name.isidentifier() else name.translate(self._stand_ins)

    def _mask_operands(self, code: re.Match[str]) -> str:
        """Stand-ins in the texts that the template looks for in messages, so that it decides as it does without."""
        masked = _COMPARED.sub(lambda found: _STRING.sub(self._mask_compared, found[0]), code[0])
        return _ARGUMENTS.sub(lambda found: _STRING.sub(self._mask_string, found[0]), masked)

    def _mask_variable(self, code: str, found: re.Match[str]) -> str:
        """Likewise in a variable that is only looked for in all the template's `code`."""
        name = found["name"]
        num_uses = len(re.findall(rf"\b{name}\b", code))
        num_set = len(re.findall(rf"\bset\s+{name}\s*=[^=]", code))
        looked_for = (
            rf"[=!]=\s*{name}\b", rf"\b{name}\s*(?:[=!]=|\|\s*length|(?:not\s+)?in\b)",
            rf"\.(?:{_METHODS})\s*\(\s*{name}\b",
        )  # fmt: skip
        num_looked_for = len(re.findall("|".join(looked_for), code))
        if num_uses > num_set + num_looked_for:
            return found[0]
        return _STRING.sub(self._mask_string, found[0])

    def _mask_compared(self, string: re.Match[str]) -> str:
        return string[0] if string[0][1:-1].isidentifier() else self._mask_string(string)

    def _mask_string(self, string: re.Match[str]) -> str:
        quoted = string[0]
        if "\\x" in quoted or "\\u" in quoted:
            return quoted
        letters = _LETTERS.findall(quoted[1:-1])
        masked = (letter if letter[0] == "\\" else letter.translate(self._stand_ins) for letter in letters)
        return quoted[0] + "".join(masked) + quoted[-1]

    def protect(self, text: str, shadow: str | None, messages: list[dict[str, Any]]) -> str | None:
        """`text` with names in the place of the template's control tokens, for `backend`; None if it spells no others.

        `text` is the conversation, `shadow` the same with stand-ins, None if the template refuses them. Raises
        `ChatTemplateError` if a control token that a message spells cannot be told from the template's.
        """
        found = list(self._tokens.finditer(text))
        own = list(self._tokens.finditer(shadow)) if shadow is not None else []
        if shadow is not None and shadow.translate(self._stand_ins) == text.translate(self._stand_ins):
            if not self.always and [match.span() for match in found] == [match.span() for match in own]:
                return None
            return self._with_names(text, own)
        if shadow is not None and [match[0] for match in found] == [match[0] for match in own]:
            return None
        spelled = next((match for string in _strings(messages) for match in self._tokens.finditer(string)), None)
        if spelled is None:
            return None
        raise ChatTemplateError(
            f"The messages spell {spelled[0]}, which this model's chat template cannot keep apart from its own markup; "
            "leave it out.",
            param="messages",
        )

    def _with_names(self, text: str, own: list[re.Match[str]]) -> str:
        pieces, end = [], 0
        for match in own:
            pieces += [text[end : match.start()], self._names[match[0]]]
            end = match.end()
        return "".join([*pieces, text[end:]])

    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer that knows control tokens by their names, with the ids they have."""
        with self._lock:
            if self._renamed is None:
                self._renamed = _sharing(self._backend, self._names) or _renamed(self._backend, self._names)
            return self._renamed


def _is_control(token: tokenizers.AddedToken, template: str) -> bool:
    """Added tokens that are not special are ordinary text (runs of spaces, HTML), unless the template writes them."""
    content = token.content
    if not content or content.isspace() or token.single_word:
        return False
    enclosed = len(content) > 2 and not content[0].isalnum() and not content[-1].isalnum()
    return token.special or (enclosed and content in template)


def _finder(words: set[str]) -> re.Pattern[str]:
    """Finds any of the words, the longest that fits. Raises `CheckpointError` for words upon words that begin with each
    other, which no tokenizer has for a reason, and which would take gigabytes."""
    return re.compile(_any_of(words) or "(?!)")


def _any_of(words: set[str], depth: int = 0) -> str:
    """A regular expression for any of the words, the longest that fits, that reads no character twice."""
    if depth > MAX_NESTED:
        raise CheckpointError(f"The tokenizer has more than {MAX_NESTED} control tokens that begin with each other.")
    groups: dict[str, list[str]] = {}
    for word in words - {""}:
        groups.setdefault(word[0], []).append(word)
    branches = []
    for _, group in sorted(groups.items()):
        common = os.path.commonprefix(group)  # noqa: RUF071  of characters, not of paths
        branches.append(re.escape(common) + _any_of({word[len(common) :] for word in group}, depth + 1))
    if not branches:
        return ""
    if len(branches) == 1 and "" not in words:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + "?" * ("" in words)


def _strings(value: Any) -> Iterator[str]:
    """All texts of a message, with those that are names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(name)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _sharing(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer | None:
    """A tokenizer with the same vocabulary in memory; None if that vocabulary has the control tokens itself."""
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    renamed = tokenizers.Tokenizer(backend.model)
    renamed.normalizer = backend.normalizer
    renamed.pre_tokenizer = backend.pre_tokenizer
    renamed.add_tokens([_named(token, names) for token in added])
    return renamed if _ids(renamed, {}) == _ids(backend, names) else None


def _ids(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> dict[int, str]:
    added = backend.get_added_tokens_decoder()
    return {token_id: names.get(token.content, token.content) for token_id, token in added.items()}


def _named(token: tokenizers.AddedToken, names: Mapping[str, str]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        names.get(token.content, token.content), single_word=token.single_word, lstrip=token.lstrip,
        rstrip=token.rstrip, normalized=token.normalized, special=token.special,
    )  # fmt: skip


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A copy in whose vocabulary control tokens have their names, so that no text is made of them."""
    state = json.loads(backend.to_str())
    state["post_processor"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    renamed = tokenizers.Tokenizer.from_str(json.dumps(state))
    if _ids(renamed, {}) != _ids(backend, names):
        raise ChatTemplateError(
            "The messages spell control tokens, and this model's tokenizer cannot keep them as text; leave them out.",
            param="messages",
        )
    return renamed
