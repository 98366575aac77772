"""Chat templates in a process of their own: the text that transformers makes, and no way to take more than one may."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_tokenizer import byte_level, wrap

from core.errors import ChatTemplateError, UnavailableError
from core.models import chat_template
from core.models.tokenizer import Tokenizer

DEMO = Path(chat_template.__file__).parent / "demo" / "chat_template.jinja"
FAMILIES = {
    "demo": DEMO.read_text(),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        '{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = "26 Jul 2024" %}\n'
        "{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
        "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n"
        '    {%- set system_message = "" %}\n{%- endif %}\n{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "with everything": (
        "{%- macro show(item, indent=2) %}{{ item | tojson(indent=indent) }}{% endmacro -%}\n"
        "{% set ns = namespace(count=0, last='') %}\n"
        "{% for message in messages %}\n  {% if message.role == 'system' %}{% continue %}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}{% set ns.last = message.content.split('\\n')[-1] %}\n"
        "  {% generation %}{{ show(message) }}{% endgeneration %}\n"
        "  {{ '%-9s|%s' % (message.role, message.content | length) }}{{ '{:>5}'.format(ns.count) }}\n"
        "  {% if ns.count > 3 %}{% break %}{% endif %}\n{% endfor %}\n"
        "{{ ns.count ~ '/' ~ messages | length }} {{ strftime_now('%Y') | length }} {{ range(5) | list }} "
        "{{ dict(a=1, b=[none, true, 2.5]) | tojson }} {{ messages | map(attribute='role') | join(',') }} "
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ '-' * 10 }}"
        "{% if style is defined %}{{ style | upper }}{% endif %}{{ bos_token }}{{ missing }}"
    ),
}
TALKS = {
    "one": [{"role": "user", "content": "Hello"}],
    "long": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " What is 2 < 3 & 'é' \"😀\"? \n"},
        {"role": "assistant", "content": "<|im_end|>\u2028 yes\n"},
        {"role": "user", "content": ""},
    ],
    "to continue": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, "}],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_rendered_is_what_transformers_renders(family: str, talk: str) -> None:
    tokenizer = wrap(byte_level(), chat_template=FAMILIES[family])
    for prompt, resumed in (
        (True, False),
        (False, False),
        (False, talk == "to continue" and family != "with everything"),
    ):
        given = {"add_generation_prompt": prompt, "continue_final_message": resumed}
        expected = tokenizer.apply_chat_template(TALKS[talk], tokenize=False, style="plain", **given)
        variables = {**tokenizer.special_tokens_map, "style": "plain"}
        assert chat_template.render(FAMILIES[family], TALKS[talk], {**variables, **given}) == expected


def render(template: str) -> str:
    talk = [{"role": "user", "content": "Hello"}]
    return chat_template.render(template, talk, {"add_generation_prompt": True, "continue_final_message": False})


GREEDY = {
    "a string times a number": "{{ 'a' * 2000000000 }}",
    "a list times a number": "{{ ([1] * 2000000000) | length }}",
    "a wide format": "{{ '%2000000000d' % 1 }}",
    "a wide format string": "{{ '{:2000000000}'.format(1) }}",
    "a wide filter": "{{ 'a' | center(2000000000) }}",
    "bytes": "{{ (1).to_bytes(2000000000, 'big') | length }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a block that is captured": (
        "{% set x %}{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}{{ x | length }}"
    ),
    "much text": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "brackets": "{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}",
    "the longest loop there is": "{% for i in range(10**9) %}{% endfor %}",
}
SLOW = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}"
    ),
    "a power": "{{ ((10 ** (10 ** 8)) % 7) }}",
}


@pytest.mark.parametrize("kind", GREEDY)
def test_a_template_that_wants_too_much_is_an_error_of_its_request(kind: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        render(GREEDY[kind])
    assert caught.value.status == 400
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 2000
    assert time.monotonic() - started_s < 30
    assert render("{{ messages[0].content }}!") == "Hello!"


@pytest.mark.parametrize("kind", SLOW)
def test_a_template_that_takes_for_ever_is_ended_and_holds_up_nobody(kind: str) -> None:
    render("warm")
    caught: list[ChatTemplateError] = []

    def run() -> None:
        with pytest.raises(ChatTemplateError, match="takes longer than 5 s") as error:
            render(SLOW[kind])
        caught.append(error.value)

    slow = threading.Thread(target=run)
    slow.start()
    time.sleep(0.1)
    others = 0
    while slow.is_alive():
        assert render("{{ messages[0].content }}") == "Hello"
        others += 1
    slow.join()
    assert caught
    assert others > 3


def test_a_worker_that_dies_is_replaced() -> None:
    render("warm")
    worker = chat_template._workers._idle[-1]
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert render("{{ messages[0].content }}") == "Hello"


def test_a_worker_that_dies_of_a_template_is_that_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    render("warm")
    worker = chat_template._workers._idle[-1]
    pid = worker._process.pid
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(ChatTemplateError, match="ended the process"):
        render(SLOW["nested loops"])
    killer.join()


def test_when_all_workers_are_busy_a_request_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "WAIT_S", 0.1)
    for _ in range(chat_template.MAX_WORKERS):
        chat_template._workers._room.acquire()
    try:
        with pytest.raises(UnavailableError) as caught:
            render("a")
    finally:
        for _ in range(chat_template.MAX_WORKERS):
            chat_template._workers._room.release()
    assert caught.value.retry_after_s


def test_workers_are_kept_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [threading.Thread(target=render, args=("a",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    idle = list(chat_template._workers._idle)
    assert 1 <= len(idle) <= chat_template.MAX_WORKERS
    render("a")
    assert chat_template._workers._idle == idle


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = Tokenizer(wrap(byte_level(), chat_template={"tool_use": "a", "rag": "b"}))
    with pytest.raises(ChatTemplateError, match="several chat templates"):
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
