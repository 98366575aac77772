"""Names that do not work in this version, and what was probably meant by names that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import iter_settings, load_settings
from core.config_names import ABSENT_COMMANDS, ABSENT_SETTINGS, nearest
from core.errors import ConfigError

FLAGS = [info.flag for info in iter_settings() if info.flag]

PROMISED_VARIABLES = [
    "VRM_API_TOKEN",
    "VRM_API_HOST",
    "VRM_API_PORT",
    "VRM_METRICS_PORT",
    "VRM_PRODUCTION",
    "VRM_BACKEND_ALLOW_STUB",
    "VRM_MINIMAL_TEST",
    "VRM_TEST_MODE",
    "VRM_LOG_JSON",
    "VRM_TRACING",
    "VRM_LEND_RATIO",
    "VRM_RECLAIM_THRESHOLD",
    "VRM_SQLITE_PATH",
    "VRM_READ_ONLY",
    "VRM_DISABLE_RATE_LIMIT",
    "VRM_CLUSTER_MASTER",
    "VRM_CLUSTER_PORT",
    "VRM_CLUSTER_TOKEN",
]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    return {"HOME": str(tmp_path / "home")}


def refusal(path: Path | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ)
    return caught.value.message


def test_what_is_absent_is_no_setting() -> None:
    infos = list(iter_settings())
    assert not {setting.env for setting in ABSENT_SETTINGS} & {info.env for info in infos}
    assert not {setting.key for setting in ABSENT_SETTINGS} & {info.key for info in infos}
    assert len({setting.key for setting in ABSENT_SETTINGS}) == len(ABSENT_SETTINGS)


@pytest.mark.parametrize("variable", PROMISED_VARIABLES)
def test_every_promised_variable_is_known_by_name(environ: dict[str, str], variable: str) -> None:
    known = {info.env for info in iter_settings()} | {setting.env for setting in ABSENT_SETTINGS}
    assert variable in known
    load_settings(environ=environ | {variable: ""})


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("VRM_SQLITE_PATH", "/var/lib/vrm.db", "SQLite"),
    ],
)
def test_setting_what_is_absent_says_so(environ: dict[str, str], variable: str, text: str, said: str) -> None:
    message = refusal(**environ, **{variable: text})
    assert message.startswith(f"{variable} (") and said in message and "is not in this version" in message
    assert text not in message or text in ("1", "true"), "a secret may be in it"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("VRM_SQLITE_PATH", "off"),
    ],
)
def test_what_is_absent_may_be_off(environ: dict[str, str], variable: str, text: str) -> None:
    assert load_settings(environ=environ | {variable: text}) == load_settings(environ=environ)


def test_the_same_in_yaml(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sqlite: {path: off}\ndevices:\n")
    assert load_settings(path, environ) == load_settings(environ=environ)
    path.write_text("sqlite: {path: state.db}\n")
    assert refusal(path, **environ).startswith(f"{path}: sqlite.path (keeping state in an SQLite file) is")
    path.write_text("cluster: {colour: red}\n")
    assert "unknown key 'cluster.colour'" in refusal(path, **environ)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--prot", "--port"),
        ("--hots", "--host"),
        ("--modle", "--model"),
        ("--dtpye", "--dtype"),
        ("--PORT", "--port"),
        ("--max_model_len", "--max-model-len"),
        ("--max-model-length", "--max-model-len"),
        ("--max-num-batchd-tokns", "--max-num-batched-tokens"),
        ("--max-batch", "--max-batch-size"),
        ("--enable-prefix-cacheing", "--enable-prefix-caching"),
    ],
)
def test_a_slip_finds_what_was_meant(word: str, meant: str) -> None:
    assert nearest(word, FLAGS, prefix="--") == meant


@pytest.mark.parametrize(
    "word",
    [
        "--temperature",
        "--max-tokens",
        "--quantization",
        "--kv-cache-dtype",
        "--batch-size",
        "--workers",
        "--stream",
        "--block",
        "--gpus",
        "--x",
        "--",
        "--verbose",
        "--tensor-parallel-size",
        "--gpu-memory-utilization",
        "--max-num-seqs",
        "--ctx-size",
    ],
)
def test_what_is_something_else_finds_nothing(word: str) -> None:
    assert nearest(word, FLAGS, prefix="--") is None


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("VRM_API_PRT", "VRM_API_PORT"),
        ("VRM_PORT", "VRM_API_PORT"),  # the flag's name
        ("VRM_MODEL", "VRM_MODEL_NAME"),
        ("VRM_LOG_LEVEL", "VRM_LOGGING_LEVEL"),
        ("VRM_PRODUCTON", "VRM_PRODUCTION"),
    ],
)
def test_variables_that_were_probably_meant(environ: dict[str, str], variable: str, meant: str) -> None:
    assert refusal(**environ, **{variable: "1"}).endswith(f"Did you mean {meant!r}?")


@pytest.mark.parametrize("variable", ["VRM_TEMPERATURE", "VRM_KV_DTYPE", "VRM_X", "VRM_"])
def test_variables_that_mean_nothing_near(environ: dict[str, str], variable: str) -> None:
    message = refusal(**environ, **{variable: "1"})
    assert "Did you mean" not in message
    assert "--help-all" in message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("api: {prot: 1}", "'api.port'"),
        ("engine: {max_model_len: 5}", "'model.max_model_len'"),  # its name, in another section
        ("modle: {}", "'model'"),
    ],
)
def test_keys_that_were_probably_meant(environ: dict[str, str], tmp_path: Path, text: str, meant: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert f"Did you mean {meant}?" in refusal(path, **environ)


def test_keys_that_mean_nothing_near_list_their_section_alone(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("security: {colour: 1}\n")
    message = refusal(path, **environ)
    assert "Did you mean" not in message
    assert "Allowed: security.production," in message and "api.port" not in message
    path.write_text("colours: {}\n")
    assert "Sections: model, devices," in refusal(path, **environ)


def test_every_absent_name_says_what_it_is_for() -> None:
    for purpose in [*ABSENT_COMMANDS.values(), *(each.purpose for each in ABSENT_SETTINGS)]:
        assert len(purpose.split()) >= 2
