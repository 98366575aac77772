"""The tokenizer over tiny byte-level, llama-2-like and Metaspace vocabularies made here."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from utf8_tails import unfinished

from core.errors import ChatTemplateError, CheckpointError, InvalidRequestError, UnsupportedModelError
from core.models.tokenizer import Tokenizer, _decode

SENTENCES = ["Hello world, this is a small text.", "The quick brown fox jumps over the lazy dog.", "naïve café 你好 😀"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if style %}[{{ style }}]{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<|user|>"]
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def byte_fallback_vocab():
    words = ["Hello", "world", "this", "the", "cat", "do"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for word in words:
        for start in ("▁", ""):
            spelled = start + word
            for piece in spelled:
                vocab.setdefault(piece, len(vocab))
            for end in range(2, len(spelled) + 1):
                if spelled[:end] not in vocab:
                    merges.append((spelled[: end - 1], spelled[end - 1]))
                    vocab[spelled[:end]] = len(vocab)
    return vocab, merges


def llama2_like():
    vocab, merges = byte_fallback_vocab()
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace():
    pieces = ["▁", "▁Hello", "▁world", "Hello", *"Helowrdthisca."]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    vocab += [(piece, -1.0 - 1 / len(piece)) for piece in dict.fromkeys(pieces)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


KINDS = {"byte_level": byte_level, "llama2": llama2_like, "metaspace": metaspace}


def wrap(backend, **kwargs):
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **kwargs)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    wrap(KINDS[request.param](), chat_template=TEMPLATE).save_pretrained(path)
    return Tokenizer.from_directory(path)


LOADED = {name: Tokenizer(wrap(make())) for name, make in KINDS.items()}


@pytest.fixture
def llama2():
    return Tokenizer(wrap(llama2_like(), chat_template=TEMPLATE))


def stream_text(tokenizer, prompt, output, skip_special_tokens=True):
    stream = tokenizer.stream(prompt, skip_special_tokens=skip_special_tokens)
    pieces = [stream.push(token) for token in output]
    return pieces, "".join(pieces) + stream.flush()


# ---- encoding ----------------------------------------------------------------------------------------------------


def test_attributes(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.encode("</s>", add_special_tokens=False)[-1]
    assert tokenizer.vocab_size > 256


@pytest.mark.parametrize(
    "text", ["", "Hello world", " Hello", "你好 😀 naïve", "a</s>b<|user|><s>", "x" * 3000, "\0\n\t"]
)
@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_hugging_face_does(kind, text, add_special_tokens):
    reference = wrap(KINDS[kind]())
    expected = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert LOADED[kind].encode(text, add_special_tokens=add_special_tokens) == expected
    assert LOADED[kind].decode(expected) == reference.decode(expected, skip_special_tokens=True)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(InvalidRequestError) as error:
        tokenizer.encode_chat([{"role": "user", "content": "\udfff"}])
    assert error.value.param == "messages"


def test_truncation_and_padding_of_the_checkpoint_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    wrap(backend).save_pretrained(tmp_path)
    assert "truncation" in (tmp_path / "tokenizer.json").read_text()
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Hello world, this is long")) == "Hello world, this is long"
    assert len(tokenizer.encode("a")) == 2


def test_many_threads_use_one_tokenizer(llama2):
    texts = ["Hello world " * (1 + i % 50) for i in range(200)]
    expected = [llama2.encode(text) for text in texts]
    chat = llama2.encode_chat([{"role": "user", "content": "Hello"}])

    def work(i):
        assert llama2.encode_chat([{"role": "user", "content": "Hello"}]) == chat
        assert stream_text(llama2, [1], expected[i])[1] == texts[i]
        return llama2.encode(texts[i])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(len(texts)))) == expected


def test_encoding_lets_other_threads_run():
    tokenizer, done = LOADED["byte_level"], threading.Event()

    def encode():
        tokenizer.encode("The quick brown fox " * 50_000)
        done.set()

    thread, ticks = threading.Thread(target=encode), 0
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks >= 3


@pytest.mark.parametrize(
    ("text", "beginnings"), [("Hello", 1), ("<s>Hello", 1), ("<s><s>Hello", 2), (" <s>Hello", 1), ("</s><s>", 1)]
)
@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_a_text_that_begins_with_the_begin_token_gets_no_second(kind, text, beginnings):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode(text)
    (begin,) = [number for number, content in tokenizer.special_tokens.items() if content == "<s>"]
    assert ids[0] == begin
    assert ids[:beginnings] == [begin] * beginnings
    assert ids[beginnings] != begin
    if not text.startswith("<s>"):
        assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    else:
        assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_several_tokens_in_front_are_told_by_all_of_them():
    backend = byte_level()
    front = [("<s>", 0), ("<|user|>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <|user|> $A </s>", special_tokens=[*front, ("</s>", 1)]
    )
    tokenizer = Tokenizer(wrap(backend))
    bare = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == tokenizer.encode("<s><|user|>x") == [0, 2, *bare, 1]
    assert tokenizer.encode("<s>x") == [0, 2, 0, *bare, 1]


def test_a_panic_of_the_tokenizer_is_a_refusal():
    """A regular expression that gives up within very long runs of spaces panics in Rust, which is no `Exception`."""
    backend = byte_level()
    spaces = pre_tokenizers.Split(tokenizers.Regex(r"\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = Tokenizer(wrap(backend, chat_template=TEMPLATE))
    expected = tokenizer.encode("Hello world")
    with pytest.raises(InvalidRequestError, match="cannot take this input") as error:
        tokenizer.encode(" " * 10_000_000 + "a")
    assert error.value.param == "prompt"
    with pytest.raises(InvalidRequestError) as error:
        tokenizer.encode_chat([{"role": "user", "content": " " * 10_000_000 + "a"}])
    assert error.value.param == "messages"
    assert tokenizer.encode("Hello world") == expected, "it goes on working"


class PanicException(BaseException):
    pass


def one_word():
    return tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


@pytest.mark.parametrize(("make", "token"), [(llama2_like, 3 + 0x20), (one_word, 0)])
def test_a_panic_while_decoding_is_a_refusal(make, token, monkeypatch):
    backend = make()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))

    class Backend:
        def decode(self, *args, **kwargs):
            raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizer, "_backend", Backend())
    monkeypatch.setattr(tokenizer._pieces, "_decode", partial(_decode, Backend(), skip_special_tokens=False))
    for call in (tokenizer.decode, lambda ids: tokenizer.stream([], skip_special_tokens=True).push(*ids)):
        with pytest.raises(InvalidRequestError, match="cannot take this input: index out of bounds"):
            call([token])


# ---- single tokens -----------------------------------------------------------------------------------------------


def test_token_bytes_concatenate_to_the_text(tokenizer):
    for text in [*SENTENCES, "Hello\nworld"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(tokenizer.token_bytes(token) for token in ids)
        assert joined.decode().removeprefix(" ") == text


def test_tokens_of_a_byte_level_vocabulary():
    tokenizer = LOADED["byte_level"]
    smiley = tokenizer.encode("😀", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, smiley)) == "😀".encode()
    space = tokenizer.encode(" ", add_special_tokens=False)[0]
    assert (tokenizer.token_text(space), tokenizer.token_bytes(space)) == (" ", b" ")
    assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"


def test_tokens_of_a_sentencepiece_vocabulary(llama2):
    assert llama2.token_text(llama2.encode("Hello", add_special_tokens=False)[0]) == " Hello"
    assert llama2.token_bytes(3 + 0x0A) == b"\n"
    assert llama2.token_bytes(3 + 0xF0) == b"\xf0"
    assert llama2.token_text(3 + 0xF0) == "\N{REPLACEMENT CHARACTER}"
    assert llama2.token_text(1) == "<s>"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([10**6]) == ""
    assert stream_text(tokenizer, [0], [10**6])[1] == ""


def test_other_decoders_give_text_within_a_text():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.token_text(1) == " cat"
    assert tokenizer.token_text(2) == "s"


# ---- streaming ---------------------------------------------------------------------------------------------------

TEXTS = st.text(alphabet="Helo wrd你😀é\n.", max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=TEXTS, cut=st.integers(0, 60), skip=st.booleans(), specials=st.integers(0, 3))
def test_stream_equals_decoding_everything(kind, text, cut, skip, specials):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode(text)
    for _ in range(specials):
        ids.insert(random.Random(text).randrange(len(ids) + 1), tokenizer.eos_token_id)
    prompt, output = ids[:cut], ids[cut:]
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    if before.endswith("\N{REPLACEMENT CHARACTER}"):
        return  # a prompt that ends within a character has its own test
    pieces, streamed = stream_text(tokenizer, prompt, output, skip)
    expected = tokenizer.decode(ids, skip_special_tokens=skip)[len(before) :]
    if kind != "byte_level" and "\N{REPLACEMENT CHARACTER}" in expected:
        return  # byte fallback marks a whole run of bytes as broken, characters that were already sent included
    assert streamed == expected
    if specials == 0:  # a special token may stand inside a character, which then is broken
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("prompt_length", [0, 1, 7, 8, 9, 40, 500])
def test_stream_over_a_long_prompt_of_byte_tokens(llama2, prompt_length):
    """The window must not start within a character, or the whole run of bytes would be broken."""
    for text in ("你好" * 200, "a" + "é😀" * 300, "Hello world " * 100):
        ids = llama2.encode(text)
        before = llama2.decode(ids[:prompt_length])
        if "\N{REPLACEMENT CHARACTER}" not in before:
            assert stream_text(llama2, ids[:prompt_length], ids[prompt_length:])[1] == text[len(before) :]


def test_stream_never_gives_half_a_character(tokenizer):
    ids = tokenizer.encode("😀", add_special_tokens=False)
    stream = tokenizer.stream([], skip_special_tokens=True)
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece.strip()] == ["😀"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_no_text(llama2):
    stream = llama2.stream(llama2.encode("Hello"), skip_special_tokens=True)
    assert stream.push(3 + 0xF0) == ""
    assert stream.push(3 + 0x9F) == ""
    assert stream.flush() == ""


def test_a_token_that_ends_within_a_character_keeps_its_whole_ones():
    """A space and the first of a character's bytes are one token in many vocabularies."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary | {"aä": 256}, [("a", "ä")]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.token_bytes(256) == b"a\xe4"
    assert stream_text(tokenizer, [], [256])[1] == "a"


def test_prompt_that_ends_within_a_character(llama2):
    prompt = [*llama2.encode("Hello"), 3 + 0xF0, 3 + 0x9F]
    assert stream_text(llama2, prompt, [3 + 0x98, 3 + 0x80])[0] == ["", "😀"]
    assert stream_text(llama2, prompt, llama2.encode("Hello")[1:])[1] == " Hello", "broken bytes are the prompt's"


@pytest.mark.parametrize("before", [0, 5, 8, 40, 3000])
def test_a_window_may_begin_within_a_character(llama2, before):
    """Bytes far before the end of the prompt do not change what comes after it."""
    prompt = [*llama2.encode("Hello"), *(3 + byte for byte in ("é" * before).encode()), 3 + 0xF0]
    output = [3 + byte for byte in "😀".encode()[1:] + "你".encode()]
    assert stream_text(llama2, prompt, output)[0] == ["", "", "😀", "", "", "你"]


def test_chat_answer_has_no_leading_space(llama2):
    """After a prompt's special token the answer's first space is real; at the start of a text it is not."""
    answer = llama2.encode("Hello", add_special_tokens=False)
    assert stream_text(llama2, [1], answer)[1] == "Hello"
    assert stream_text(llama2, [1, *llama2.encode("do\n", add_special_tokens=False), 2, 1], answer)[1] == " Hello"
    letter = llama2._backend.token_to_id("H")
    assert stream_text(llama2, llama2.encode("do\n"), [letter])[1] == "H"


def test_broken_byte_after_good_ones_goes_on(llama2):
    """The llama decoder shows a whole run of bytes as broken; what is out stays, and the rest still comes."""
    hello = llama2.encode("Hello", add_special_tokens=False)
    pieces, text = stream_text(llama2, hello, [3 + 0xC3, 3 + 0xA9, 3 + 0xFF, *hello])
    assert pieces[1] == "é"
    assert text.startswith("é")
    assert text.endswith("Hello")


def test_endless_broken_bytes_are_released(tokenizer):
    ids = tokenizer.encode("é", add_special_tokens=False)
    stream = tokenizer.stream([], skip_special_tokens=True)
    pieces = [stream.push(ids[-1]) for _ in range(500)]
    assert any(pieces)
    longest_wait = max(len(run) for run in "".join("x" if piece else "." for piece in pieces).split("x"))
    assert longest_wait <= 3
    text = "".join(pieces) + stream.flush()
    assert text == tokenizer.decode([ids[-1]] * 500)


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
@given(data=st.data(), cut=st.integers(0, 20), skip=st.booleans())
@settings(deadline=None)
def test_random_tokens(kind, data, cut, skip):
    """What an untrained model says is mostly broken UTF-8: all of it is shown, but for a last character's beginning."""
    tokenizer = LOADED[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=120))
    prompt, output = ids[:cut], ids[cut:]
    special = tokenizer.special_tokens if skip else {}
    joined = b"".join(tokenizer.token_bytes(token) for token in prompt if token not in special)
    if unfinished(joined):
        return  # has tests of its own
    whole = joined + b"".join(tokenizer.token_bytes(token) for token in output if token not in special)
    expected = whole[: len(whole) - unfinished(whole)].decode(errors="replace")
    before = joined.decode(errors="replace")
    assert expected.startswith(before)
    streamed = stream_text(tokenizer, prompt, output, skip)[1]
    stripped = not joined and kind == "llama2" and expected.startswith(" ")
    assert streamed == expected[len(before) + stripped :]
    decoded = tokenizer.decode(ids, skip_special_tokens=skip)
    assert decoded.removesuffix("\N{REPLACEMENT CHARACTER}" * bool(unfinished(whole))).endswith(streamed)


@given(st.lists(st.integers(0, 401), max_size=60))
@settings(deadline=None)
def test_decoding_is_the_backends(ids):
    tokenizer = LOADED["byte_level"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._backend.decode(ids, skip)


def test_decoders_that_look_at_neighbours_stream_too():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2, "do": 3}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert stream_text(tokenizer, [], [1, 2, 3, 1])[0] == ["cat", "s", " do", " cat"]
    assert stream_text(tokenizer, [3] * 100, [1, 2])[0] == [" cat", "s"]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_special_tokens_are_text_and_others_are_not(kind):
    tokenizer = LOADED[kind]
    ids = tokenizer.encode("Hello</s> world<s> again</s>", add_special_tokens=False)
    stream = tokenizer.stream([], skip_special_tokens=True, kept=(tokenizer.eos_token_id,))
    text = "".join(map(stream.push, ids)) + stream.flush()
    (begin,) = tokenizer.encode("<s>", add_special_tokens=False)
    assert text == tokenizer.decode([token for token in ids if token != begin], skip_special_tokens=False)
    assert (text.count("</s>"), text.count("<s>")) == (2, 0)


# ---- chat --------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_chat_equals_hugging_face(tokenizer):
    for arguments in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"style": "short"}}):
        kwargs = {"add_generation_prompt": True, **arguments}
        kwargs |= kwargs.pop("chat_template_kwargs", {})
        text = tokenizer._hf.apply_chat_template(MESSAGES, tokenize=False, **kwargs)
        assert tokenizer.encode_chat(MESSAGES, **arguments) == tokenizer.encode(text, add_special_tokens=False)
    assert "[short]" in text


def test_chat_continues_the_final_message(llama2):
    messages = [*MESSAGES, {"role": "assistant", "content": "the cat"}]
    ids = llama2.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert llama2.decode(ids, skip_special_tokens=False) == "<|user|>Hello\n<|assistant|>the cat"
    with pytest.raises(ChatTemplateError):
        llama2.encode_chat(messages, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, MESSAGES, "no chat template"),
        ("{{ raise_exception('Roles must alternate') }}", MESSAGES, "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", MESSAGES, "concatenate"),
        ("{{ messages[5].content.x }}", MESSAGES, "no element"),
        ("{% for", MESSAGES, "refused"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "unsafe"),
        ("{{ 1 // 0 }}", MESSAGES, "zero"),
        (TEMPLATE, [], "refused"),
        (TEMPLATE, ["Hello"], "refused"),
    ],
)
def test_template_failures_are_client_errors(template, messages, reason):
    tokenizer = Tokenizer(wrap(byte_level(), chat_template=template))
    with pytest.raises(ChatTemplateError, match=reason) as error:
        tokenizer.encode_chat(messages)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "kwargs",
    [{"chat_template": "x"}, {"tokenize": True}, {"messages": 1}, {"style": ["a"]}, {"style": {"a": 1}},
     {"add_generation_prompt": False}, {"tools": "x"}],
)  # fmt: skip
def test_chat_template_kwargs_are_limited(llama2, kwargs):
    with pytest.raises(InvalidRequestError, match=next(iter(kwargs))) as error:
        llama2.encode_chat(MESSAGES, chat_template_kwargs=kwargs)
    assert error.value.param == "chat_template_kwargs"


# ---- loading -----------------------------------------------------------------------------------------------------


def test_another_chat_template_replaces_the_checkpoints(tmp_path):
    wrap(byte_level(), chat_template=TEMPLATE).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path, chat_template="{{ messages[0].content }}!")
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == "Hello!"


def test_damaged_or_missing_files(tmp_path):
    with pytest.raises(CheckpointError):
        Tokenizer.from_directory(tmp_path)
    wrap(byte_level()).save_pretrained(tmp_path)
    for damage in ("{not json", '{"version": "1.0"}', '{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(CheckpointError, match="Cannot load a tokenizer"):
            Tokenizer.from_directory(tmp_path)


def test_code_of_the_checkpoint_is_not_run(tmp_path):
    wrap(byte_level()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError, match="own code"):
        Tokenizer.from_directory(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_slow_tokenizers_are_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<unk>": 1}))
    (tmp_path / "merges.txt").write_text("#version\n")
    with pytest.raises(UnsupportedModelError, match="no fast version"):
        Tokenizer.from_directory(tmp_path)
