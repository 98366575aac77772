"""Text to token ids and back, over a checkpoint's own fast tokenizer.

Transformers reads the files, and renders chat templates (`core.models.chat_template`); encoding and decoding go
straight to the `tokenizers` object. That object is never changed after loading, so any number of threads may use one
`Tokenizer` (transformers' own `__call__` switches truncation and padding on it, which fails with "Already borrowed"
when threads meet).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from core.errors import (
    ChatTemplateError,
    CheckpointError,
    ContextLengthError,
    InvalidRequestError,
    UnsupportedModelError,
)
from core.models import chat_template as templates
from core.models.text_bound import text_bound
from core.models.token_pieces import TokenPieces


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
        self._bound = text_bound(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_kwargs = frozenset(parameters) | {"messages", "conversations", "self"}
        if tokenizer.chat_template is not None:
            templates.warm_up()

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
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True, context: int | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognised, as in Hugging Face's tokenizers.

        Raises `InvalidRequestError` for text that is not valid Unicode (lone surrogates), and `ContextLengthError` for
        text so long that it cannot have at most `context` tokens, before it is read.
        """
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The text is not valid Unicode: lone surrogate at character {error.start}.", param="prompt"
            ) from error
        if context is not None and (least := self.least_tokens(text, num_bytes)) > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens, but the text has {num_bytes} bytes, which "
                f"are at least {least} tokens.",
                param="prompt",
            )
        # A batch of one, because `encode` would hold the interpreter's lock all the time.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return list(encoding.ids)

    def least_tokens(self, text: str, num_bytes: int) -> int:
        """Fewest tokens that `text`, of so many bytes, can come to; 0 if nothing can be said."""
        if self._bound is None:
            return 0
        if self._bound.drops_space:
            num_bytes = len("".join(text.split()).encode())
        return int(num_bytes / self._bound.bytes_per_token)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids beyond the vocabulary have none."""
        # A batch of one, as in `encode`.
        return str(self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0])

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
        context: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template; `context` is as for `encode`.

        Raises `ChatTemplateError` if there is no template, or it refuses the messages or breaks its limits, and
        `InvalidRequestError` for `chat_template_kwargs` that are not plain scalars or would replace what the server
        sets.
        """
        kwargs = dict(chat_template_kwargs or {})
        self._check_kwargs(kwargs)
        if self._hf.chat_template is None:
            raise ChatTemplateError("The model has no chat template; use /v1/completions instead.", param="messages")
        try:
            template = self._hf.get_chat_template()
        except ValueError as error:  # there are several, none of them the default
            raise ChatTemplateError(f"The model's chat template cannot be used: {error}", param="messages") from error
        text = templates.render(
            template,
            messages,
            {**self._hf.special_tokens_map, **kwargs},
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        try:
            return self.encode(text, add_special_tokens=False, context=context)
        except InvalidRequestError as error:
            error.param = "messages"
            raise

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
