"""From tokens to deltas: whole characters, and stop strings however tokens cut them, special tokens among them."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from utf8_tails import unfinished

from core.batching.output import Gathered, RequestHandle, RequestWriter
from core.batching.sequence import Request, Sequence, SequenceUpdate
from core.models.token_pieces import byte_of_character
from core.models.tokenizer import Tokenizer
from core.request import RequestOutput, SamplingParams

END, OTHER = 256, 257


def _byte_level() -> Tokenizer:
    """One token per byte, `<|end|>`, `<|other|>`, and a few whole words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = sorted(alphabet, key=byte_of_character().__getitem__)
    backend = tokenizers.Tokenizer(models.BPE({character: number for number, character in enumerate(order)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_words(backend)


def _byte_fallback() -> Tokenizer:
    """The same ids in a vocabulary of the sentencepiece kind."""
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_words(backend)


def _with_words(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens(["<|end|>", "<|other|>"])
    backend.add_tokens(["abab", "a<|", "é你"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


TOKENIZER = _byte_level()
FALLBACK = _byte_fallback()
PIECES = [*b"ab<|end>", *"é你😀".encode(), END, OTHER, 258, 259, 260]


def run(token_ids, *, prompt=(97,), eos=(), tokenizer=TOKENIZER, **params):
    """The completion and its deltas, as the publisher writes them."""
    request = Request("r", list(prompt), SamplingParams(**params), len(token_ids))
    sequence = Sequence(request, 0, 0, list(prompt))
    request.sequences = [sequence]
    handle = RequestHandle("r", request.params, lambda request_id: None)
    writer, deltas = RequestWriter(request, handle, tokenizer), []
    for token_id in token_ids:
        sequence.append(token_id)
        if token_id in eos:
            sequence.finish_reason = "stop"
        delta, matched = writer.token(SequenceUpdate(sequence, token_id))
        deltas.append(delta)
        if matched is not None and sequence.finish_reason is None:
            sequence.finish_reason, sequence.stop_reason = "stop", matched
        if sequence.finish_reason is not None:
            break
    else:
        sequence.finish_reason = "length"
    deltas.append(writer.ended(sequence))
    gathered = Gathered(request.params)
    gathered.add(RequestOutput("r", tuple(deltas), len(prompt), finished=True))
    return gathered.result().completions[0], deltas


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_answer_that_ends_within_a_character_has_no_part_of_it(size):
    completion, deltas = run([*ids("ok "), *"😀".encode()[:size]])
    assert (completion.text, completion.finish_reason) == ("ok ", "length")
    assert "".join(delta.text for delta in deltas) == "ok "
    assert b"".join(map(TOKENIZER.token_bytes, completion.token_ids)) == b"ok " + "😀".encode()[:size]


@pytest.mark.parametrize("params", [{"stop": ("#",)}, {"stop": ("<|end|>",)}, {}])
def test_an_answer_that_stops_within_a_character_has_no_part_of_it(params):
    completion, _ = run([*ids("ok "), 0xF0, 0x9F, END], eos=(END,), **params)
    assert (completion.text, completion.finish_reason) == ("ok ", "stop")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    "stop", [("<|end|>",), ("zzz", "<|end|>", "<|other|>"), ("d<|end|>",), ("d<|end|>", "nd<|end|>")]
)
@pytest.mark.parametrize("eos", [(), (END,)])
def test_a_special_token_stops_as_text_does(skip, include, stop, eos):
    """It did not match where special tokens are left out of the text before stop strings are looked for."""
    answer = [*ids("the end"), END, *ids("more")]
    completion, _ = run(
        answer, eos=eos, stop=stop, skip_special_tokens=skip, include_stop_str_in_output=include, ignore_eos=not eos
    )
    matched = max((item for item in stop if "the end<|end|>".endswith(item)), key=len)
    text = "the end<|end|>".removesuffix(matched) + matched * include
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", matched)
    assert completion.token_ids[-1] == END


def test_a_hidden_token_does_not_break_a_stop_string_of_the_text_that_is_shown():
    completion, _ = run([*ids("xa"), OTHER, *ids("bc")], stop=("ab", "<|end|>"))
    assert (completion.text, completion.stop_reason) == ("x", "ab")
    completion, _ = run([*ids("xa"), OTHER, *ids("bc")], stop=("ab",), skip_special_tokens=False)
    assert (completion.text, completion.stop_reason) == ("xa<|other|>bc", None)


@pytest.mark.parametrize("stop", [(), ("zzz",), ("<|end|>",)])
def test_a_kept_special_token_is_text_once(stop):
    answer = [*ids("a"), OTHER, *ids("b"), END, *ids("c")]
    completion, _ = run(answer, stop=stop, kept_special_tokens=(OTHER,))
    assert completion.text == ("a<|other|>b" if "<|end|>" in stop else "a<|other|>bc")
    completion, _ = run(answer, stop=("<|other|>b",), kept_special_tokens=(OTHER,))
    assert (completion.text, completion.stop_reason) == ("a", "<|other|>b")


def test_a_stop_token_keeps_its_id_as_the_reason():
    request = Request("r", [97], SamplingParams(stop=("<|end|>",), stop_token_ids=(END,)), 9)
    sequence = Sequence(request, 0, 0, [97])
    request.sequences = [sequence]
    writer = RequestWriter(request, RequestHandle("r", request.params, lambda request_id: None), TOKENIZER)
    sequence.append(END)
    sequence.finish_reason, sequence.stop_reason = "stop", END
    writer.token(SequenceUpdate(sequence, END))
    assert writer.ended(sequence).stop_reason == END


def whole_text(token_ids, skip):
    """All of it, but for the beginning of a character at the end."""
    special = TOKENIZER.special_tokens if skip else {}
    joined = b"".join(TOKENIZER.token_bytes(token_id) for token_id in token_ids if token_id not in special)
    return joined[: len(joined) - unfinished(joined)].decode(errors="replace")


STOPS = st.lists(st.text(alphabet="ab<|end>é你", min_size=1, max_size=3) | st.just("<|end|>"), max_size=3)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, FALLBACK], ids=["byte_level", "byte_fallback"])
@given(st.lists(st.sampled_from(PIECES), max_size=40), STOPS, st.booleans(), st.booleans())
@settings(deadline=None)
def test_deltas_are_the_text_up_to_the_first_stop(tokenizer, token_ids, stops, skip, include):
    """However tokens cut characters and stop strings."""
    params = {"stop": tuple(stops), "skip_special_tokens": skip, "include_stop_str_in_output": include}
    completion, deltas = run(token_ids, prompt=(), tokenizer=tokenizer, **params)
    assert "".join(delta.text for delta in deltas) == completion.text
    full, shown = whole_text(token_ids, False), whole_text(token_ids, skip)
    if completion.finish_reason == "length":
        assert completion.text == shown
        named = [stop for stop in stops if not skip or "<|end|>" in stop]
        assert not any(stop in full for stop in named)
        assert not any(stop in shown for stop in stops)
        return
    stop = completion.stop_reason
    assert stop in stops
    seen = full if "<|end|>" in stop else shown
    before = completion.text.removesuffix(stop) if include else completion.text
    assert stop in seen
    assert shown.startswith(before)
    generated = whole_text(completion.token_ids[:-1], False if "<|end|>" in stop else skip)
    assert stop not in generated, "the token that completes it is the last"
