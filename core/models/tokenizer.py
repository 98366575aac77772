"""Text to token ids and back, over a checkpoint's own fast tokenizer.

Transformers reads the files, and renders chat templates (`core.models.chat_template`); encoding and decoding go
straight to the `tokenizers` object. That object is never changed after loading, so any number of threads may use one
`Tokenizer` (transformers' own `__call__` switches truncation and padding on it, which fails with "Already borrowed"
when threads meet).
"""

from __future__ import annotations

import codecs
import inspect
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from transformers import AutoTokenizer

from core.errors import (
    ChatTemplateError,
    CheckpointError,
    ContextLengthError,
    InvalidRequestError,
    UnsupportedModelError,
    UnsupportedParameterError,
)
from core.grammars.compiler import Grammars
from core.grammars.vocabulary import Vocabulary
from core.models import chat_template as templates
from core.models.chat_markup import ChatMarkup
from core.models.template_variables import check_kwargs, no_place_for_tools, template_variables
from core.models.text_bound import text_bound
from core.models.token_pieces import TokenPieces

_SINGLE = frozenset(bytes([byte]) for byte in (0x0A, *range(0x20, 0x7F)))
"""Characters that grammars ask for, JSON's among them."""


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, *, markup_in_messages: bool = False) -> None:
        """`tokenizer` is a transformers tokenizer with a `tokenizers` backend; no one else may change it afterwards.

        With `markup_in_messages`, control tokens that chat messages spell are control tokens.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UnsupportedModelError(
                f"The tokenizer {type(tokenizer).__name__} has no fast version; a tokenizer.json is needed."
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._hf = tokenizer
        self._lock = threading.Lock()
        self._grammars: dict[tuple[int, ...], Grammars] = {}
        self._backend = backend
        self._pieces = TokenPieces(backend, partial(_decode, backend, skip_special_tokens=False))
        self.first_bytes = self._pieces.first_bytes
        added = backend.get_added_tokens_decoder()
        self.special_tokens: Mapping[int, str] = {
            token_id: token.content for token_id, token in added.items() if token.special
        }
        self.added_tokens = frozenset(token.content for token in added.values())
        self._bound = text_bound(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._prefix = _prefix(backend)
        self._templates = templates.by_name(tokenizer.chat_template)
        self.template_source = "\n".join(self._templates.values())
        self.template_variables = frozenset().union(*map(template_variables, self._templates.values()))
        self._markup: dict[str, ChatMarkup] = {}
        if not markup_in_messages:
            self._markup = {name: ChatMarkup(backend, template) for name, template in self._templates.items()}
        self._reserved_kwargs = {*parameters, "messages", "conversations", "self", *tokenizer.special_tokens_map}
        if self._templates:
            templates.warm_up()

    @classmethod
    def from_directory(
        cls, path: str | Path, chat_template: str | None = None, *, markup_in_messages: bool = False
    ) -> Tokenizer:
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
            chat_template = templates.template_file(Path(path) / "chat_template.json")
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        return cls(tokenizer, markup_in_messages=markup_in_messages)

    def encode(self, text: str, *, add_special_tokens: bool = True, context: int | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognised, as in Hugging Face's tokenizers; what
        `add_special_tokens` puts in front is not put in front of a text that begins with it.

        Raises `InvalidRequestError` for text that is not valid Unicode (lone surrogates), and for text that the
        tokenizer cannot take; `ContextLengthError`, before it is read, for text so long that it cannot have at most
        `context` tokens.
        """
        self._check_length(text, context)
        token_ids = _encode(self._backend, text, add_special_tokens=add_special_tokens)
        size = len(self._prefix)
        if add_special_tokens and size and token_ids[size : 2 * size] == self._prefix:
            return token_ids[size:]
        return token_ids

    def encode_pair(self, first: str, second: str, *, context: int | None = None) -> tuple[list[int], list[int]]:
        """Token ids of two texts as the tokenizer joins them, and for each which of the two it belongs to. The rest is
        as for `encode`."""
        for text in (first, second):
            self._check_length(text, context)
        with _panics_refused("prompt"):
            (encoded,) = self._backend.encode_batch([(first, second)], add_special_tokens=True)
        return list(encoded.ids), list(encoded.type_ids)

    def _check_length(self, text: str, context: int | None) -> None:
        num_bytes = len(_utf8(text))
        if context is not None and (least := self.least_tokens(text, num_bytes)) > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens, but the text has {num_bytes} bytes, which "
                f"are at least {least} tokens.",
                param="prompt",
            )

    def grammars(self, end_token_ids: Sequence[int]) -> Grammars:
        """Grammars for answers that end with one of `end_token_ids`, always the same object for the same ids.

        Raises `UnsupportedParameterError` if it is not known which bytes the tokens stand for, if ASCII characters lack
        tokens of their own, of which any text could be made, or if no token ends an answer.
        """
        ends, table = tuple(sorted(end_token_ids)), self._pieces.table
        if table is None or not ends or not _SINGLE.issubset(table.values()):
            raise UnsupportedParameterError(
                "Answers of this model cannot keep to a grammar: its tokenizer does not say which bytes its tokens "
                "stand for, or has no tokens for single characters, or no token ends an answer."
            )
        size = max(table, default=-1) + 1
        with self._lock:
            if ends not in self._grammars:
                self._grammars[ends] = Grammars(partial(Vocabulary.of, table, size, self.special_tokens, ends))
            return self._grammars[ends]

    def num_in_front(self, text: str, token_ids: Sequence[int]) -> int:
        """How many of a text's `token_ids` were put in front of it."""
        prefix = self._prefix
        if list(token_ids[: len(prefix)]) != prefix or text.startswith(self.decode(prefix, skip_special_tokens=False)):
            return 0
        return len(prefix)

    def least_tokens(self, text: str, num_bytes: int) -> int:
        """Fewest tokens that `text`, of so many bytes, can come to; 0 if nothing can be said."""
        if self._bound is None:
            return 0
        if self._bound.drops_space:
            num_bytes = len("".join(text.split()).encode())
        return int(num_bytes / self._bound.bytes_per_token)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids beyond the vocabulary have none. Bytes that are no character become U+FFFD.

        Raises `InvalidRequestError` if the tokenizer cannot decode them.
        """
        table = self._pieces.table
        if table is None:
            return _decode(self._backend, list(token_ids), skip_special_tokens=skip_special_tokens)
        skipped = self.special_tokens if skip_special_tokens else {}
        shown = [token_id for token_id in token_ids if token_id not in skipped and table.get(token_id)]
        text = b"".join([self.first_bytes(shown[0]), *(table[token_id] for token_id in shown[1:])] if shown else [])
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for within a text, its leading space included; empty beyond the vocabulary."""
        return self._pieces.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token's own text; bytes that are no whole character appear as U+FFFD."""
        return self._pieces.token_bytes(token_id).decode("utf-8", errors="replace")

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, kept: Collection[int] = ()
    ) -> TokenStream:
        """Incremental decoder of what follows `prompt_token_ids`; special tokens that are `kept` are not skipped. For
        one thread."""
        table = self._pieces.table
        skipped: Collection[int] = self.special_tokens if skip_special_tokens else ()
        if skipped and kept:
            skipped = self.special_tokens.keys() - set(kept)
        if table is None:
            return _WindowStream(self, prompt_token_ids, skipped)
        return _ByteStream(self, table, prompt_token_ids, skipped)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template; `context` is as for `encode`, `tools` are
        OpenAI's objects.

        What the messages and the tools spell is text, also where it spells control tokens.

        Raises `ChatTemplateError` if there is no template, or it refuses the messages or breaks its limits,
        `UnsupportedParameterError` for tools if it takes none, and `InvalidRequestError` for `chat_template_kwargs`
        that are not plain scalars, that it does not look at, or that would replace what the server sets.
        """
        kwargs = dict(chat_template_kwargs or {})
        if kwargs:
            check_kwargs(kwargs, self.template_variables, self._reserved_kwargs)
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ChatTemplateError("Messages are refused unless they are objects, one at least.", param="messages")
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError("A final message that is continued takes no generation prompt.", param="messages")
        name = templates.choose(self._templates, messages, bool(tools))
        if tools and "tools" not in template_variables(self._templates[name]):
            raise no_place_for_tools()
        options = {
            **self._hf.special_tokens_map, **kwargs, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": list(tools) if tools else [] if name == templates.TOOL_TEMPLATE else None,
        }  # fmt: skip
        text = templates.render(self._templates[name], messages, options)
        markup = self._markup.get(name)
        try:
            if markup is not None and (kwargs or tools or _may_spell(markup, messages)):
                self._check_length(text, context)
                return self._encode_protected(markup, text, messages, kwargs, options)
            return self.encode(text, add_special_tokens=False, context=context)
        except InvalidRequestError as error:
            error.param = "messages"
            raise

    def _encode_protected(
        self,
        markup: ChatMarkup,
        text: str,
        messages: list[dict[str, Any]],
        kwargs: dict[str, Any],
        options: dict[str, Any],
    ) -> list[int]:
        """Token ids of the rendered `text`, none of them a control token that a message spells."""
        masked = {**options, **markup.mask_options(kwargs), "tools": markup.mask(options["tools"])}
        try:
            shadow: str | None = templates.render(markup.template, markup.mask(messages), masked)
        except ChatTemplateError:
            shadow = None
        named = markup.protect(text, shadow, [*messages, kwargs, *(options["tools"] or ())])
        if named is None:
            return self.encode(text, add_special_tokens=False)
        return _encode(markup.backend(), named, add_special_tokens=False)


def _may_spell(markup: ChatMarkup, messages: list[dict[str, Any]]) -> bool:
    """Whether control tokens could be made of what the messages say."""
    if markup.always:
        return True
    for message in messages:
        content = message.get("content")
        if message.keys() - {"role", "content"} or not isinstance(content, str) or markup.ends.search(content):
            return True
        stripped = content.strip()
        if stripped and stripped in markup.joined:
            return True
    return False


@contextmanager
def _panics_refused(param: str) -> Iterator[None]:
    """A panic of the tokenizer's Rust code, which is no `Exception`, becomes an `InvalidRequestError` about `param`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = str(error) or "it panicked"
        raise InvalidRequestError(f"The model's tokenizer cannot take this input: {reason}", param=param) from error


def _decode(backend: tokenizers.Tokenizer, token_ids: list[int], *, skip_special_tokens: bool) -> str:
    with _panics_refused("tokens"):
        return str(backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text is not valid Unicode: lone surrogate at character {error.start}.", param="prompt"
        ) from error


def _encode(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    _utf8(text)
    with _panics_refused("prompt"):
        # A batch of one, because `encode` would hold the interpreter's lock all the time.
        return list(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """What the tokenizer puts in front of a text, a BOS token mostly."""
    bare, whole = (_encode(backend, "a", add_special_tokens=add) for add in (False, True))
    size = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
    return whole[:size]


# -- incremental decoding ----------------------------------------------------------------------------------------

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8
MAX_PENDING_TOKENS = 4
"""Tokens held back because their text ends in broken bytes. A character has at most 4 bytes."""


class TokenStream(Protocol):
    """Text of tokens that follow a prompt, piece by piece: whole characters only. For one thread.

    All pieces together are what `decode` gives for prompt and tokens beyond what it gives for the prompt, but for the
    bytes of a character that is not finished: those never become text. One that the prompt has begun is text once it
    is whole.
    """

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that became certain."""

    def flush(self) -> str:
        """The rest, at the end."""


class _ByteStream:
    """For vocabularies whose tokens are bytes, each for itself."""

    def __init__(
        self, tokenizer: Tokenizer, table: dict[int, bytes], prompt: Sequence[int], skipped: Collection[int]
    ) -> None:
        self._table = table
        self._first_bytes = tokenizer.first_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt):
            if token_id not in self._skipped:
                tail = table.get(token_id, b"") + tail
                if len(tail) > 3:  # bytes of a character that may not be finished
                    break
        self._at_start = not tail
        self._decoder.decode(tail)
        self._begun = bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._table.get(token_id, b"")
        if self._at_start and piece:
            self._at_start = False
            piece = self._first_bytes(token_id)
        text = self._decoder.decode(piece)
        if self._begun and text:
            self._begun = False
            text = text.removeprefix(REPLACEMENT)  # broken bytes of the prompt's
        return text

    def flush(self) -> str:
        return ""


class _WindowStream:
    """For decoders that look at a token's neighbours: a short window of tokens is decoded again at each step, and what
    goes beyond the window's known text is new. (`tokenizers.decoders.DecodeStream` works alike, but decodes the whole
    prompt first, and ends with an error if a later token changes earlier text: clients can provoke that.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skipped: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window, self._known = self._context(prompt)
        self._num_known_tokens = len(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        shown = [token_id for token_id in token_ids if token_id not in self._skipped]
        return self._tokenizer.decode(shown, skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._num_known_tokens < MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        if self._num_known_tokens == len(self._window):
            return ""
        return self._advance(self._decode(self._window)).rstrip(REPLACEMENT)

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
        return self._decode(self._window[self._num_known_tokens :])

    def _context(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """A tail of the prompt that has text of its own, with that text."""
        size = CONTEXT_TOKENS
        while size < len(prompt):
            window = list(prompt[-size:])
            text = self._decode(window)
            if text:
                return window, text
            size *= 2
        window = list(prompt)
        return window, self._decode(window)
