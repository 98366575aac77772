"""Which of a checkpoint's chat templates a conversation takes, where they lie, and what they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import word_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.errors import ChatTemplateError, CheckpointError, InvalidRequestError, UnsupportedParameterError
from core.models.template_variables import template_variables
from core.models.tokenizer import Tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.0, None]}}}
USER = {"role": "user", "content": "w3"}
WITH_CALLS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "w4", "tool_call_id": "c1"},
]


def characters(template: Any = None) -> Tokenizer:
    """A tokenizer whose tokens are ASCII characters, so that any text can be read back."""
    vocabulary = {chr(number): number for number in range(32, 127)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))


def shown(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.decode(tokenizer.encode_chat(messages, **options))


# ---- what is null ------------------------------------------------------------------------------------------------

ASKS_FOR_NONE = (
    "{% for m in messages %}[{% if m['content'] is none %}calls{% else %}{{ m['content'] }}{% endif %}]{% endfor %}"
)
NULLS = {
    ASKS_FOR_NONE: "[w3][calls][w4]",
    "{% for m in messages %}[{% if m.content is not none %}{{ m.content }}{% endif %}]{% endfor %}": "[w3][][w4]",
    "{% for m in messages %}[{{ m.content }}]{% endfor %}": "[w3][][w4]",
    "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}": "[w3][][w4]",
    "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}": "[w3][][w4]",
    "{% for m in messages %}[{% if 'x' not in m.content %}{{ m.content }}{% endif %}]{% endfor %}": "[w3][][w4]",
    "{% for m in messages %}[{% if m.content %}{{ m.content }}{% endif %}]{% endfor %}": "[w3][][w4]",
}


@pytest.mark.parametrize("template", NULLS)
def test_a_content_of_null_is_null_where_a_template_can_take_it_and_else_empty(template: str) -> None:
    assert shown(characters(template), WITH_CALLS) == NULLS[template]


def test_none_as_a_word_of_the_conversation_is_text() -> None:
    said = [{"role": "user", "content": "None"}, *WITH_CALLS[1:]]
    assert shown(characters(ASKS_FOR_NONE), said) == "[None][calls][w4]"


def test_a_template_that_fails_either_way_says_why() -> None:
    with pytest.raises(ChatTemplateError, match="no tools here"):
        characters("{{ raise_exception('no tools here') }}").encode_chat(WITH_CALLS)


def test_arguments_are_an_object_for_the_template() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments | items %} {{ k }}={{ v | tojson }}{% endfor %}{% endfor %}{% endfor %}"
    )
    assert shown(characters(template), WITH_CALLS) == "add a=1 b=[2.0, null]"


CONCATENATES = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    "{% endfor %}"
)


def test_arguments_are_json_for_a_template_that_cannot_take_an_object() -> None:
    assert shown(characters(CONCATENATES), WITH_CALLS) == 'add{"a": 1, "b": [2.0, null]}'
    assert shown(characters(CONCATENATES), [USER, {**WITH_CALLS[1], "content": "</s>"}]).startswith("add{")
    with pytest.raises(ChatTemplateError, match="can only concatenate"):
        characters("{{ messages[1].tool_calls[0].function.name + 3 }}").encode_chat(WITH_CALLS)


# ---- tools and other variables -----------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}


def test_a_template_is_given_the_tools() -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }}{% else %}none{% endfor %}"
    assert shown(characters(template), [USER], tools=[TOOL, TOOL]) == "addadd"
    assert shown(characters(template), [USER]) == shown(characters(template), [USER], tools=[]) == "none"
    both = characters({"default": "D", "tool_use": "T{{ tools | length }}"})
    assert (shown(both, [USER]), shown(both, [USER], tools=[TOOL])) == ("D", "T1")


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ 'tools' }}", "{% set tools = [] %}{{ tools }}"])
def test_tools_without_a_place_in_the_template_are_refused(template: str) -> None:
    with pytest.raises(UnsupportedParameterError, match="no place for tools") as refused:
        characters(template).encode_chat([USER], tools=[TOOL])
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{{ messages }}{{ bos_token }}", {"messages", "bos_token"}),
        ("{% if enable_thinking is defined and enable_thinking %}x{% endif %}", {"enable_thinking"}),
        ("{% set thinking = thinking | default(false) %}{{ thinking }}", {"thinking"}),
        ("{% for m in messages %}{% generation %}{{ m.x }}{% endgeneration %}{% continue %}{% endfor %}", {"messages"}),
        ("{{ raise_exception('x') }}{{ strftime_now('%d') }}{{ range(3) }}{{ namespace(a=1) }}", set()),
        ("{% macro f(a) %}{{ a }}{{ b }}{% endmacro %}{{ f(c) }}", {"b", "c"}),
        ("{% for", set()),
        ("{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}", set()),
    ],
)
def test_the_variables_of_a_template(template: str, variables: set[str]) -> None:
    assert template_variables(template) == variables


def test_a_template_is_given_what_it_looks_at_alone() -> None:
    tokenizer = characters("{{ messages[0].content }}{{ style }}{{ level }}")
    assert shown(tokenizer, [USER], chat_template_kwargs={"style": "s", "level": 2}) == "w3s2"
    with pytest.raises(
        InvalidRequestError, match="does not look at other; of chat_template_kwargs it takes level, style"
    ):
        tokenizer.encode_chat([USER], chat_template_kwargs={"other": 1})
    with pytest.raises(InvalidRequestError, match="takes nothing"):
        characters("{{ messages[0].content }}").encode_chat([USER], chat_template_kwargs={"other": 1})


# ---- several templates -------------------------------------------------------------------------------------------

DEFAULT = "D{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
TOOLS = "T{% for t in tools %}{{ t }}{% endfor %}{{ messages[-1].content }}"


def listed(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def checkpoint(path: Path, template: Any) -> Tokenizer:
    """One whose templates are in tokenizer_config.json."""
    word_tokenizer().save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return Tokenizer(Tokenizer.from_directory(path)._hf)


@pytest.mark.parametrize(
    ("templates", "plain", "with_calls"),
    [
        ({"default": DEFAULT}, "Dw3>", "Dw3>"),
        ({"default": DEFAULT, "tool_use": TOOLS}, "Dw3>", "Tw4"),
        ({"tool_use": TOOLS, "rag": "R"}, None, "Tw4"),
        ({"chatml": DEFAULT}, "Dw3>", "Dw3>"),
        ({"chatml": DEFAULT, "tool_use": TOOLS, "rag": "R"}, "Dw3>", "Tw4"),
        ({"tool_use": TOOLS}, "Tw3", "Tw4"),
        ({"one": DEFAULT, "two": DEFAULT}, None, None),
    ],
)
def test_the_template_that_a_conversation_takes(
    tmp_path: Path, templates: dict[str, str], plain: str | None, with_calls: str | None
) -> None:
    source = checkpoint(tmp_path, listed(**templates))._hf.chat_template
    assert source == templates, "transformers reads the list"
    tokenizer = characters(source)
    for messages, expected in (([USER], plain), (WITH_CALLS, with_calls)):
        if expected is None:
            with pytest.raises(ChatTemplateError, match=r"model\.chat_template") as refused:
                tokenizer.encode_chat(messages)
            assert all(name in refused.value.message for name in templates)
        else:
            assert shown(tokenizer, messages) == expected


def test_a_template_by_setting_replaces_all_of_them(tmp_path: Path) -> None:
    checkpoint(tmp_path, listed(one=DEFAULT, two=DEFAULT))
    assert Tokenizer.from_directory(tmp_path, "{{ messages[0].content }}").encode_chat([USER]) == [3]


# ---- files -------------------------------------------------------------------------------------------------------

W = "{{ messages[0].content }}"


def test_chat_template_json_is_read(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": f"{W} w5"}))
    assert Tokenizer.from_directory(tmp_path).encode_chat([USER]) == [3, 5]


def test_chat_template_json_may_hold_a_list(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    file = {"chat_template": listed(default=f"{W} w5", tool_use=f"{W} w6")}
    (tmp_path / "chat_template.json").write_text(json.dumps(file))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.encode_chat([USER]), tokenizer.encode_chat(WITH_CALLS)) == ([3, 5], [3, 6])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"chat_template": 3}', '{"chat_template": [{"name": "default"}]}'])
def test_a_damaged_chat_template_json_is_an_error_of_the_checkpoint(tmp_path: Path, text: str) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"chat_template\.json"):
        Tokenizer.from_directory(tmp_path)


def test_chat_template_jinja_goes_before_the_other_files(tmp_path: Path) -> None:
    checkpoint(tmp_path, f"{W} w6")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": f"{W} w7"}))
    assert Tokenizer.from_directory(tmp_path).encode_chat([USER]) == [3, 6]
    (tmp_path / "chat_template.jinja").write_text(f"{W} w5")
    assert Tokenizer.from_directory(tmp_path).encode_chat([USER]) == [3, 5]


def test_additional_chat_templates_are_read(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(f"{W} w5")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(f"{W} w6")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.encode_chat([USER]), tokenizer.encode_chat(WITH_CALLS)) == ([3, 5], [3, 6])
