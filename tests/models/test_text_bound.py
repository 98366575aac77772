"""How much text fits into a context: never less than any text that really does."""

from __future__ import annotations

import threading
import time
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, llama2_like, metaspace, wrap
from tiny_models import word_tokenizer
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from core.errors import ContextLengthError
from core.models import text_bound as bounds
from core.models.text_bound import text_bound
from core.models.tokenizer import Tokenizer


def composed(form):
    backend = byte_level()
    backend.normalizer = form
    return backend


def stripping():
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|user|>", lstrip=True, rstrip=True)])
    return backend


BOUNDED = {
    "byte level": byte_level,
    "llama 2": llama2_like,
    "metaspace": metaspace,
    "nfc": lambda: composed(normalizers.NFC()),
    "nfkc and lowercase": lambda: composed(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "a long text made short": lambda: composed(normalizers.Replace("Hello world", "a")),
    "tokens that take the space around them": stripping,
    "strip": lambda: composed(normalizers.Strip()),
}
LOADED = {name: Tokenizer(wrap(make())) for name, make in BOUNDED.items()}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "Hello",
                " ",
                "Hello world",
                "\N{KELVIN SIGN}",
                "가",
                "<|user|>",
                "\n",
                "é",
                "\N{MATHEMATICAL BOLD CAPITAL A}",
                "你",
            ]
        ),
        max_size=30,
    ).map(lambda parts: unicodedata.normalize("NFD", "".join(parts))),
)


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_no_text_has_fewer_tokens_than_the_bound_says(kind: str, text: str) -> None:
    tokenizer = LOADED[kind]
    assert text_bound(BOUNDED[kind]()) is not None
    assert tokenizer.least_tokens(text, len(text.encode())) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_space_that_a_token_swallows_does_not_count() -> None:
    text = "<|user|>" + " " * 100_000
    assert len(stripping().encode(text, add_special_tokens=False).ids) == 1
    tokenizer = Tokenizer(wrap(stripping()))
    assert len(tokenizer.encode(text, add_special_tokens=False, context=1)) == 1


def test_what_normalization_joins_counts_as_it_was_written() -> None:
    syllable = unicodedata.normalize("NFD", "\uac01")  # three letters of three bytes, one of three bytes when joined
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["\uac01"] * 9, trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet))
    tokenizer = Tokenizer(wrap(backend))
    text = syllable * 1000
    assert len(text.encode()) == 9000
    assert len(tokenizer.encode(text, add_special_tokens=False, context=1000)) == 1000


def without_a_byte():
    backend = byte_level()
    state = backend.to_str().replace('"Ā"', '"ĀĀ"')
    return tokenizers.Tokenizer.from_str(state)


UNBOUNDED = {
    "whole words": lambda: word_tokenizer().backend_tokenizer,
    "characters without a token vanish": without_a_byte,
    "accents vanish": lambda: composed(normalizers.StripAccents()),
    "a text vanishes": lambda: composed(normalizers.Replace("a", "")),
    "a pattern vanishes": lambda: composed(normalizers.Replace(tokenizers.Regex("a+"), "b")),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_text_can_vanish_there_is_no_bound(kind: str) -> None:
    assert text_bound(UNBOUNDED[kind]()) is None


def test_separators_that_are_cut_out_leave_no_bound() -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert text_bound(backend) is None


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(wrap(byte_level(), chat_template="{{ messages[0].content }}"))
    bound = text_bound(byte_level())
    assert bound is not None
    fits, text = "a" * int(100 * bound.bytes_per_token), "a" * int(101 * bound.bytes_per_token + 1)
    assert len(tokenizer.encode(fits, context=100)) > 100, "which the pipeline refuses"
    monkeypatch.setattr(tokenizer, "_backend", None)  # whoever used it would fail
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 100 tokens.*at least 101 tokens"
    ) as caught:
        tokenizer.encode(text, context=100)
    assert caught.value.error_code == "context_length_exceeded"
    with pytest.raises(ContextLengthError) as caught:
        tokenizer.encode_chat([{"role": "user", "content": text}], context=100)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_long_texts_do_not_hold_up_other_threads(work: str) -> None:
    tokenizer = Tokenizer(wrap(byte_level()))
    text = "Hello world " * 200_000
    ids = tokenizer.encode(text)[:1_000_000] if work == "decode" else []
    ticks, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(done.is_set())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokenizer.encode(text) if work == "encode" else tokenizer.decode(ids)
    done.set()
    watcher.join()
    assert len(ticks) > 3, "a thread that held the interpreter would have let none through"


def test_what_unicode_normalization_can_do() -> None:
    """The numbers that the bound reckons with, over all characters."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

    def size(text: str) -> int:
        return len(text.encode())

    mapped = max(size(c) / size(unicodedata.normalize("NFKD", c)) for c in every)
    joined = max(size(unicodedata.normalize("NFD", c)) / size(c) for c in every)
    assert mapped * joined <= bounds.COMPOSED
    assert max(size(c) / size(c.lower()) for c in every) <= bounds.LOWERCASED
