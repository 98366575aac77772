"""What the demo model says of VRAMancer is what holds: ports, defaults, commands, flags, paths, names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from demo_corpus import product
from demo_corpus.heldout import CASES
from demo_corpus.reference import ENDPOINTS, VARIABLES

from core.api import BLUEPRINTS
from core.config import Settings, iter_settings, load_settings
from core.config_names import ABSENT_COMMANDS, ABSENT_SETTINGS
from core.costs.card_table import find_card
from core.defaults import DEMO_NAME
from core.devices import parse_devices
from core.lending.score import FREE_WEIGHT, IDLE_WEIGHT, LINK_WEIGHT
from core.models.resolve import DEMO_PATH
from core.security.token import TOKEN_FILE_NAME
from vramancer.cli import app
from vramancer.cli.chat.commands import COMMANDS

ABSENT = "not in this version"
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
ALL = product.FACTS + product.REFERENCE
ANSWERS = [fact.answer for fact in ALL]
EVERYTHING = "\n".join(ANSWERS)


@pytest.fixture
def defaults(tmp_path: Path) -> Settings:
    config_file = tmp_path / "config.yaml"
    config_file.touch()
    return load_settings(config_file, {"HOME": "/home/somebody"})


def commands() -> dict[str, set[str]]:
    """By command: its flags."""
    group: Any = typer.main.get_command(app)
    found = {name: _flags(command) for name, command in group.commands.items()}
    found["cluster"] = set().union(*map(_flags, group.commands["cluster"].commands.values()))
    return found


def _flags(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def answered(question: str) -> str:
    found = {fact.answer for fact in ALL if question in (*fact.questions, *fact.topics, *fact.tasks)}
    assert len(found) == 1, f"{question!r} has {len(found)} answers"
    return found.pop()


def test_variables_have_the_defaults_of_the_configuration() -> None:
    known = {info.env: info.default_text for info in iter_settings()}
    assert {name: default for name, (_, default) in VARIABLES.items()} == {name: known[name] for name in VARIABLES}


def test_variables_that_are_named_exist() -> None:
    known = {info.env for info in iter_settings()}
    absent = {setting.env for setting in ABSENT_SETTINGS}
    for fact in ALL:
        for name in re.findall(r"VRM_[A-Z_]+", " ".join((fact.answer, *fact.questions, *fact.topics))):
            assert name in known or (name in absent and ABSENT in fact.answer), (name, fact.answer)


def test_commands_and_flags_that_are_named_exist() -> None:
    found = commands()
    flags = set().union(*found.values()) | {"--api", "--cluster-worker"}
    for fact in ALL:
        for command in re.findall(r"\bvramancer ([a-z]+)\b", " ".join((fact.answer, *fact.topics))):
            assert command in found or (command in ABSENT_COMMANDS and ABSENT in fact.answer), (command, fact.answer)
        for flag in re.findall(FLAG, " ".join((fact.answer, *fact.questions, *fact.topics))):
            assert flag in flags, (flag, fact.answer)


def test_a_flag_stands_with_a_command_that_takes_it() -> None:
    found = commands()
    used = re.findall(r"vramancer ([a-z]+)([^\n]*)", EVERYTHING)
    pairs = [(command, flag) for command, rest in used for flag in re.findall(FLAG, rest)]
    assert {("serve", "--model"), ("plan", "--gpu"), ("status", "--watch")} <= set(pairs)
    assert not [pair for pair in pairs if pair[1] not in found[pair[0]]]


def test_all_commands_are_listed() -> None:
    listed = answered("the commands").removeprefix("The commands are ").rstrip(".")
    assert set(re.split(", | and ", listed)) == set(commands())


def test_all_commands_of_the_chat_are_listed() -> None:
    listed = answered("the slash commands")
    assert set(re.findall(r"/\w+", listed)) == {name for name, command in COMMANDS.items() if command.meaning}
    alone = [answer for answer in ANSWERS if answer.startswith("/") and not answer.startswith(("/v1", "/api"))]
    for answer in alone:
        assert answer.split()[0] in {*COMMANDS, *ENDPOINTS}
    assert {"/bye", "/exit"} <= set(re.findall(r"/\w+", answered("leave the chat"))) <= set(COMMANDS)


def test_ports_and_addresses_are_the_defaults(defaults: Settings) -> None:
    api = defaults.api
    assert f"on port {api.port}." in answered("the port")
    assert f"on port {api.metrics_port}." in answered("the metrics")
    assert f"{api.host}:{api.port}." in answered("start the server")
    assert f"http://{api.host}:{api.port}/v1 " in answered("the base URL")
    ports = re.findall(r"(?<!--)\bport (\d+)|127\.0\.0\.1:(\d+)", EVERYTHING)
    in_compose = {int(port) for port in re.findall(r"port (\d+)", answered("docker compose"))}
    assert in_compose == {5030, 3000}  # as docker-compose.yml publishes them
    assert {int(one or other) for one, other in ports} == {api.port, api.metrics_port} | in_compose
    assert {*re.findall(r"\d+\.\d+\.\d+\.\d+", EVERYTHING)} == {api.host, "0.0.0.0"}


def test_the_token_is_where_the_model_says(defaults: Settings) -> None:
    home = str(defaults.runtime.state_dir / TOKEN_FILE_NAME).replace("/home/somebody", "~")
    assert f"The token is in {home}." in answered("my token")


def test_shares_are_the_defaults(defaults: Settings) -> None:
    assert f"{100 * defaults.lending.lend_ratio:.0f} percent" in answered("the lend ratio")
    assert f"{100 * defaults.lending.reclaim_threshold:.0f} percent" in answered("the reclaim threshold")
    scored = answered("How are lenders scored?")
    weights = [f"{100 * weight:.0f} percent" for weight in (FREE_WEIGHT, LINK_WEIGHT, IDLE_WEIGHT)]
    assert re.findall(r"\d+ percent", scored) == weights


def test_switches_are_as_the_model_says(defaults: Settings) -> None:
    assert defaults.lending.enabled and "on by default" in answered("turn off lending")
    assert defaults.engine.enable_prefix_caching and "on by default" in answered("the prefix cache")
    assert f"blocks of {defaults.engine.block_size} tokens" in answered("the KV cache")
    assert f"{defaults.devices.placement} is the default" in answered("placement")
    assert defaults.devices.stream_weights == "auto" and "nothing has to be switched on" in answered("weight streaming")


def test_paths_that_are_named_are_served() -> None:
    from flask import Flask

    flask = Flask("paths")
    for blueprint in BLUEPRINTS:
        flask.register_blueprint(blueprint)
    served = {rule.rule for rule in flask.url_map.iter_rules()}
    named = set(re.findall(r"/(?:api|v1)/[a-z/]+[a-z]|/(?:health|ready|live|metrics|tokenize)\b", EVERYTHING))
    assert set(ENDPOINTS) <= named
    assert not named - served


def test_examples_are_understood() -> None:
    devices = re.findall(r"--devices (\S+)", EVERYTHING)
    assert devices and all(len(parse_devices(text)) == 2 for text in devices)
    cards = re.findall(r"--gpu (\w+)", EVERYTHING)
    assert len(cards) == 2 and all(find_card(card) for card in cards)


def test_names_and_versions_hold() -> None:
    project = (DEMO_PATH.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    oldest, licence = re.search(r'requires-python = ">=(.*)"', project), re.search(r'license = "(.*)"', project)
    assert oldest and f"Python {oldest[1]} or newer" in answered("install VRAMancer")
    assert licence and f"{licence[1]} licence" in answered("the licence")
    assert DEMO_NAME in answered("the default model")
    assert re.findall(r'model="(.*?)"', answered("use it from Python")) == [DEMO_NAME]


def test_what_is_there_is_not_said_to_be_absent() -> None:
    assert not [answer for answer in ANSWERS if ABSENT in answer]
    for topic in ("tool calling", "structured output", "tier L4", "embeddings", "upstreams", "the Messages API"):
        assert answered(topic)


def test_every_held_out_question_has_an_answer_in_the_corpus() -> None:
    for case in CASES:
        if case.kind == "using":
            assert any(case.rule.holds(answer) for answer in ANSWERS), case.question
