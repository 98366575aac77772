"""Text to token ids and back, over a checkpoint's own fast tokenizer.

Transformers reads the files and renders chat templates; encoding and decoding go straight to the `tokenizers` object.
That object is never changed after loading, so any number of threads may use one `Tokenizer` (transformers' own
`__call__` switches truncation and padding on it, which fails with "Already borrowed" when threads meet).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import ChatTemplateError, CheckpointError, InvalidRequestError, UnsupportedModelError
from core.models.token_pieces import TokenPieces

_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What rendering raises for messages that a template does not expect: Jinja runs the template as Python code."""
DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
SPECIAL_TEMPLATES = frozenset({TOOL_TEMPLATE, "rag"})
"""Names that checkpoints with several chat templates give them."""


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers tokenizer with a `tokenizers` backend; no one else may change it afterwards."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UnsupportedModelError(
                f"The tokenizer {type(tokenizer).__name__} has no fast version; a tokenizer.json is needed."
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._hf = tokenizer
        self._backend = backend
        self._pieces = TokenPieces(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_kwargs = frozenset(parameters) | {"messages", "conversations", "self"}

    @classmethod
    def from_directory(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Load from local files; `chat_template`, Jinja source, replaces the checkpoint's own.

        Code that comes with the checkpoint is never run. Raises `UnsupportedModelError` for tokenizers that need it or
        that have no fast version, and `CheckpointError` for files that are missing or damaged.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust library raises plain Exception for a malformed tokenizer.json
            if "custom code" in str(error):
                raise UnsupportedModelError(f"The tokenizer in {path} needs its own code, which is not run.") from error
            raise CheckpointError(f"Cannot load a tokenizer from {path}: {error}") from error
        if chat_template is None and tokenizer.chat_template is None:
            chat_template = _template_file(Path(path) / "chat_template.json")
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognised, as in Hugging Face's tokenizers.

        Raises `InvalidRequestError` for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text is not valid Unicode: lone surrogate at character {error.start}.", param="prompt"
            ) from error
        # A batch of one, because `encode` would hold the interpreter's lock all the time.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(encoding.ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids beyond the vocabulary have none."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for within a text, its leading space included; empty beyond the vocabulary."""
        return self._pieces.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token's own text; bytes that are no whole character appear as U+FFFD."""
        return self._pieces.token_bytes(token_id).decode("utf-8", errors="replace")

    def stream(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> TokenStream:
        """Incremental decoder of what follows `prompt_token_ids`. For one thread."""
        return TokenStream(self._backend, prompt_token_ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template, rendered in transformers' sandbox.

        Raises `ChatTemplateError` if there is no template or it refuses the messages, and `InvalidRequestError` for
        `chat_template_kwargs` that are not plain scalars or would replace what the server sets.
        """
        kwargs = dict(chat_template_kwargs or {})
        self._check_kwargs(kwargs)
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ChatTemplateError("Messages are refused unless they are objects, one at least.", param="messages")
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError("A final message that is continued takes no generation prompt.", param="messages")
        name, template = self._template_for(messages)
        options = {
            **self._hf.special_tokens_map, **kwargs, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message, "tools": [] if name == TOOL_TEMPLATE else None,
        }  # fmt: skip
        text = _render_nulls(template, messages, options)
        try:
            return self.encode(text, add_special_tokens=False)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message, param="messages") from error

    def _template_for(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Name and source of the template that a conversation takes: the one for tools if it has calls or results."""
        templates = self._hf.chat_template
        if templates is None:
            raise ChatTemplateError("The model has no chat template; use /v1/completions instead.", param="messages")
        if not isinstance(templates, dict):
            return DEFAULT_TEMPLATE, templates
        uses_tools = any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)
        for name in (TOOL_TEMPLATE, DEFAULT_TEMPLATE) if uses_tools else (DEFAULT_TEMPLATE,):
            if name in templates:
                return name, templates[name]
        plain = [name for name in templates if name not in SPECIAL_TEMPLATES] or list(templates)
        if len(plain) == 1:
            return plain[0], templates[plain[0]]
        raise ChatTemplateError(
            f"The model has several chat templates ({', '.join(sorted(templates))}) and none of them is called "
            f"{DEFAULT_TEMPLATE}; the setting model.chat_template can choose one.",
            param="messages",
        )

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        for name, value in kwargs.items():
            if name in self._reserved_kwargs:
                raise InvalidRequestError(f"chat_template_kwargs may not set {name}.", param="chat_template_kwargs")
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise InvalidRequestError(
                    f"chat_template_kwargs takes strings, numbers, booleans and null; {name} is a "
                    f"{type(value).__name__}.",
                    param="chat_template_kwargs",
                )


def _template_file(file: Path) -> Any:
    """The template, or the templates by name, in the file that processors of several media keep it in, if any."""
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        return template if isinstance(template, str) else {item["name"]: item["template"] for item in template}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file.name} of {file.parent.name} is damaged: {error!r}") from error


def _render_nulls(template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """The conversation's text. A content of null is given as null, which many templates look for; to one that fails on
    it, or writes it out, it is given as empty text."""
    filled = [message | {"content": ""} if message.get("content", "") is None else message for message in messages]
    if filled == messages:
        return _render(template, messages, options)
    try:
        text = _render(template, messages, options)
    except ChatTemplateError:
        return _render(template, filled, options)
    try:
        other = _render(template, filled, options)
    except ChatTemplateError:
        return text
    return other if text.count(str(None)) > other.count(str(None)) else text


def _render(template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """In transformers' sandbox; its `apply_chat_template` would leave out what is null."""
    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, **options)
    except _TEMPLATE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"The chat template refused the messages: {reason}", param="messages") from error
    return str(text)


# -- incremental decoding ----------------------------------------------------------------------------------------
#
# A token's text depends on its neighbours (a character in several byte tokens, a leading space that is dropped at the
# start of a text), so a short window of tokens is decoded again at each step, and what goes beyond the window's known
# text is new. `tokenizers.decoders.DecodeStream` works alike, but decodes the whole prompt first, holds broken bytes
# back without limit, and ends with an error if a later byte makes earlier ones invalid: clients can provoke all that.

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8
MAX_PENDING_TOKENS = 32
"""Tokens held back because their text ends in broken bytes. A character has at most 4 bytes, one per token."""


class TokenStream:
    """Text of tokens that follow a prompt, piece by piece.

    All pieces together equal `decode(prompt + tokens)[len(decode(prompt)):]`, as long as the tokens form valid UTF-8 (a
    broken byte can change how a decoder shows bytes before it, which are already out).
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._window, self._known = self._context(prompt_token_ids)
        self._num_known_tokens = len(self._window)

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that became certain: whole characters only."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return self._release_broken(text)
        return self._advance(text)

    def flush(self) -> str:
        """The rest, at the end: an unfinished character appears as replacement characters."""
        if self._num_known_tokens == len(self._window):
            return ""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        """Emit what `text`, the whole window's, adds; the tokens that added it become the new context."""
        new = self._beyond_known(text)
        if new:
            self._window = self._window[self._num_known_tokens :]
            self._num_known_tokens = len(self._window)
            self._known = self._decode(self._window)
        return new

    def _beyond_known(self, text: str) -> str:
        if text.startswith(self._known):
            return text[len(self._known) :]
        whole = self._known.rstrip(REPLACEMENT)  # a character that the context left unfinished is now complete
        if text.startswith(whole):
            return text[len(whole) :]
        return self._decode(self._window[self._num_known_tokens :])

    def _release_broken(self, text: str) -> str:
        """Hold back text that ends in broken bytes, but not for ever: let go of all that cannot change any more."""
        if len(self._window) - self._num_known_tokens < MAX_PENDING_TOKENS:
            return ""
        for end in range(len(self._window) - 4, self._num_known_tokens, -1):
            head, tail = self._decode(self._window[:end]), self._decode(self._window[end:])
            if head + tail == text:
                pending, self._window = self._window[end:], self._window[:end]
                new = self._advance(head)
                self._window += pending
                return new
        return self._advance(text)

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """A tail of the prompt that has text of its own and starts with a whole character, with that text."""
        size = CONTEXT_TOKENS
        while size < len(prompt_token_ids):
            for shift in range(4):
                window = list(prompt_token_ids[-size - shift :])
                text = self._decode(window)
                if text and REPLACEMENT not in text:
                    return window, text
            size *= 2
        window = list(prompt_token_ids)
        return window, self._decode(window)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens))
