"""Incremental decoding.

A token's text depends on its neighbours (a character in several byte tokens, a leading space that is dropped at the
start of a text), so a short window of tokens is decoded again at each step, and what goes beyond the window's known
text is new. `tokenizers.decoders.DecodeStream` works alike, but decodes the whole prompt first, holds broken bytes back
without limit, and ends with an error if a later byte makes earlier ones invalid, all of which a client can provoke.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

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
