"""The conversation: what is remembered, what commands do, how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from cli.chat.scripted import Lines, Scripted, hold, interrupted, quiet_screen, roles, says

from core.errors import InvalidRequestError, QueueFullError
from vramancer.cli.chat.answerer import Message, Piece
from vramancer.cli.chat.commands import COMMANDS, as_command, completions
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.sampling import CHOICES, read_choice
from vramancer.cli.chat.talk import talk


def refused(messages: list[Message]) -> Iterable[Piece]:
    raise QueueFullError("The queue is full.")
    yield Piece()


# -- questions ---------------------------------------------------------------------------------------------------------


def test_answers_are_shown_and_remembered() -> None:
    answerer = Scripted(says("Hel", "lo [bold]"), says("Bye"))
    shown, _, _ = hold(answerer, "Hi", "", "And?", "/exit", "not read")
    assert shown == "Hello [bold]\nBye\n"  # the model's text is no markup
    assert roles(answerer.seen[1]) == [("user", "Hi"), ("assistant", "Hello [bold]"), ("user", "And?")]
    assert len(answerer.seen) == 2


def test_a_question_of_several_lines() -> None:
    answerer = Scripted(says("ok"))
    hold(answerer, '"""\nfirst\n\n  second\n"""')
    assert roles(answerer.seen[0]) == [("user", "first\n\n  second")]


def test_a_files_text_goes_before_the_first_question_alone() -> None:
    answerer = Scripted(says("a"), says("b"))
    hold(answerer, "What is it?", "And this?", before="the file")
    assert [content for _, content in roles(answerer.seen[1])] == ["the file\n\nWhat is it?", "a", "And this?"]


def test_an_error_is_shown_and_its_turn_forgotten() -> None:
    answerer = Scripted(refused, says("ok"))
    _, notes, _ = hold(answerer, "Hi", "Once more", before="the file")
    assert "error: The queue is full." in notes
    assert roles(answerer.seen[1]) == [("user", "the file\n\nOnce more")]


# -- speed -------------------------------------------------------------------------------------------------------------


def test_tokens_and_speed_stand_below_an_answer() -> None:
    """The clock ticks once a second: the question at 0, the three tokens at 1, 2 and 3."""
    _, notes, _ = hold(Scripted(says("a", "b", "c")), "Hi")
    assert notes == "3 tokens, 1.0 tok/s, first token after 1.00 s\n"


def test_one_token_has_no_rate() -> None:
    _, notes, _ = hold(Scripted(says("a")), "Hi")
    assert notes == "1 token, first token after 1.00 s\n"


def test_an_answer_that_was_cut_off_says_so() -> None:
    _, notes, _ = hold(Scripted(says("a", finish_reason="length")), "Hi")
    assert "cut off" in notes


# -- Ctrl-C and the end ------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    answerer = Scripted(interrupted, says("ok"))
    shown, notes, _ = hold(answerer, "Hi", "Go on")
    assert shown == "I was say\nok\n"
    assert "3 tokens, first token after 1.00 s, stopped" in notes
    assert roles(answerer.seen[1])[1] == ("assistant", "I was say")
    assert answerer.closed == 2


@pytest.mark.parametrize("last", [KeyboardInterrupt, EOFError])
def test_ctrl_c_at_the_prompt_asks_before_it_leaves(last: type[BaseException]) -> None:
    answerer = Scripted(says("ok"))
    _, notes, _ = hold(answerer, KeyboardInterrupt, "Hi", KeyboardInterrupt, last, "not read")
    assert notes.count("Ctrl-C again, or Ctrl-D, leaves") == 2
    assert len(answerer.seen) == 1


@pytest.mark.parametrize("word", ["/bye", "/exit"])
def test_leaving(word: str) -> None:
    answerer = Scripted()
    hold(answerer, word, "not read")
    assert answerer.seen == []


# -- commands ----------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_the_quotes() -> None:
    _, notes, _ = hold(Scripted(), "/help")
    for name, command in COMMANDS.items():
        assert not command.meaning or f"{name} {command.usage}".strip() in notes
    assert '"""' in notes


def test_an_unknown_command_says_what_there_is() -> None:
    answerer = Scripted()
    _, notes, _ = hold(answerer, "/hepl", "/unheard")
    near, far = notes.splitlines()
    assert "did you mean /help?" in near
    assert "did you mean" not in far
    for name in COMMANDS:
        assert name in far
    assert answerer.seen == []


@pytest.mark.parametrize(("text", "command"), [
    ("/set top_p 0.5", ("/set", "top_p 0.5")), ("/set", ("/set", "")), ("/", ("/", "")),
    ("/etc/hosts: what is it for?", None), ("set", None), ("what is /set", None),
])  # fmt: skip
def test_what_is_a_command(text: str, command: tuple[str, str] | None) -> None:
    assert as_command(text) == command


def test_what_is_set_reaches_the_model_until_it_is_taken_back() -> None:
    answerer = Scripted(says("a"), says("b"))
    lines = ("/set temperature 0.5", "/set max_tokens 7", "Hi", "/set temperature default", "Again")
    hold(answerer, *lines)
    assert answerer.sampling == [{"temperature": 0.5, "max_tokens": 7}, {"max_tokens": 7}]


def test_set_alone_shows_what_is_set() -> None:
    _, notes, _ = hold(Scripted(), "/set top_k 40", "/set", system="Be brief.")
    rows = {line.split()[0]: line for line in notes.splitlines()[1:]}
    assert rows.keys() >= CHOICES.keys()
    assert " 40 " in rows["top_k"]
    assert "model's own" in rows["seed"]
    assert "system message: Be brief." in notes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temperature hot", "temperature must be a number, not 'hot'."),
        ("/set temperature 3", "temperature must lie between 0.0 and 2.0, got 3.0."),
        ("/set temperature nan", "temperature must lie between"),
        ("/set top_k 1.5", "top_k must be a whole number, not '1.5'."),
        ("/set max_tokens 0", "max_tokens must lie between 1"),
        ("/set temprature 1", "There is no setting temprature; did you mean temperature?"),
        ("/save", "/save takes the name of a file."),
    ],
)
def test_what_is_wrong_is_said_and_nothing_changes(line: str, said: str) -> None:
    _, notes, conversation = hold(Scripted(), line)
    assert f"error: {said}" in notes
    assert conversation.sampling == {}


@pytest.mark.parametrize("name", CHOICES)
def test_every_setting_takes_its_kind(name: str) -> None:
    assert read_choice(name, "1") == 1
    with pytest.raises(InvalidRequestError, match=name):
        read_choice(name, "much")


def test_the_system_message() -> None:
    answerer = Scripted(says("a"), says("b"), says("c"))
    lines = ("/system Be brief.", "One", "/set system Be long.", "Two", "/system default", "Three", "/system")
    _, notes, _ = hold(answerer, *lines)
    assert [messages[0]["content"] for messages in answerer.seen] == ["Be brief.", "Be long.", "One"]
    assert notes.endswith("system message: none\n")


def test_clear_forgets_all_but_the_system_message() -> None:
    answerer = Scripted(says("one"), says("two"))
    hold(answerer, "Hi", "/clear", "Again", system="Be brief.")
    assert roles(answerer.seen[1]) == [("system", "Be brief."), ("user", "Again")]


def test_another_model_here_is_loaded() -> None:
    answerer = Scripted()
    _, notes, _ = hold(answerer, "/model", "/model other")
    assert answerer.loaded == ["other"]
    assert notes.splitlines() == ["tiny", "loading other", "other answers from now on"]


@pytest.mark.parametrize(("said", "loaded"), [("y", ["other"]), ("", []), (EOFError, [])])
def test_a_server_is_asked_for_another_model_only_once_the_user_has_said_so(
    said: str | type[BaseException], loaded: list[str]
) -> None:
    answerer = Scripted(shared_at="http://there:1")
    answerer.known.add("alias")
    screen, _, _ = quiet_screen()
    reader = Lines("/model alias", "/model other", said)
    talk(Conversation(answerer, screen, {}), reader)
    assert answerer.loaded == loaded
    assert reader.prompts[2] == "http://there:1 loads other in place of alias, for all who use it. Go on? [y/N] "


def test_a_saved_conversation_is_a_request(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    lines = ("/set seed 3", "Grüße", f"/save {path}", f"/save {path}", f"/save {tmp_path / 'no' / 'where'}")
    _, notes, _ = hold(Scripted(says("hello")), *lines, system="Be brief.")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße"},
            {"role": "assistant", "content": "hello"},
        ],
        "seed": 3,
    }
    assert f"error: {path} is there already" in notes.replace("\n", "")
    assert "cannot be written: No such file or directory" in notes


def test_tab_offers_commands_and_settings() -> None:
    assert set(completions()) == set(COMMANDS)
    assert set(completions()["/set"]) == {*CHOICES, "system"}
