"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.config import find_config_file, iter_settings, load_settings, render_config_yaml
from core.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment whose home is empty, in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    return {"HOME": str(tmp_path / "home")}


def write_config(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def refusal(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(**arguments)  # type: ignore[arg-type]
    return caught.value.message


def test_defaults_are_the_contract(environ: dict[str, str]) -> None:
    settings = load_settings(environ=environ)
    assert (settings.api.host, settings.api.port, settings.api.metrics_port) == ("127.0.0.1", 5000, 9108)
    assert settings.model.name is None
    assert settings.lending.enabled
    assert (settings.lending.lend_ratio, settings.lending.reclaim_threshold) == (0.70, 0.80)
    assert not settings.security.production
    assert settings.api.token is None


def test_each_source_wins_over_the_one_before(environ: dict[str, str], tmp_path: Path) -> None:
    path = write_config(tmp_path, "api: {port: 1, host: yaml, threads: 9}\n")
    from_file = load_settings(path, environ)
    assert (from_file.api.port, from_file.api.host, from_file.api.threads) == (1, "yaml", 9)
    environ |= {"VRM_API_PORT": "2", "VRM_API_HOST": "env"}
    both = load_settings(path, environ)
    assert (both.api.port, both.api.host, both.api.threads) == (2, "env", 9)
    everything = load_settings(path, environ, {"api.port": 3})
    assert (everything.api.port, everything.api.host, everything.api.threads) == (3, "env", 9)


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("VRM_API_HOST", "0.0.0.0", "api.host", "0.0.0.0"),
        ("VRM_API_PORT", "5030", "api.port", 5030),
        ("VRM_METRICS_PORT", "0", "api.metrics_port", 0),
        ("VRM_PRODUCTION", "1", "security.production", True),
        ("VRM_LOG_JSON", "true", "logging.json_output", True),
        ("VRM_MINIMAL_TEST", "1", "runtime.minimal_test", True),
        ("VRM_TEST_MODE", "TRUE", "runtime.test_mode", True),
        ("VRM_READ_ONLY", "1", "security.read_only", True),
        ("VRM_DISABLE_RATE_LIMIT", "1", "security.disable_rate_limit", True),
        ("VRM_ENGINE_ENABLE_PREFIX_CACHING", "false", "engine.enable_prefix_caching", False),
        ("VRM_ENGINE_MAX_BATCH_SIZE", "7", "engine.max_batch_size", 7),
        ("VRM_API_CORS_ORIGINS", "http://a, http://b", "api.cors_origins", ("http://a", "http://b")),
        ("VRM_DEVICES_DEVICES", "cpu=1GiB", "devices.devices", "cpu=1GiB"),
        ("VRM_LENDING_ENABLED", "0", "lending.enabled", False),
        ("VRM_LEND_RATIO", "0.5", "lending.lend_ratio", 0.5),
        ("VRM_RECLAIM_THRESHOLD", "0.9", "lending.reclaim_threshold", 0.9),
        ("VRM_MODEL_QUANTIZE_GROUP", "128", "model.quantize_group", 128),
        ("VRM_LENDING_HOST_BYTES", "0", "lending.host_bytes", 0),
    ],
)
def test_environment_names(environ: dict[str, str], variable: str, text: str, key: str, value: object) -> None:
    section, name = key.split(".")
    settings = load_settings(environ={**environ, variable: text})
    assert getattr(getattr(settings, section), name) == value


def test_an_empty_variable_counts_as_not_set(environ: dict[str, str]) -> None:
    settings = load_settings(environ={**environ, "VRM_API_TOKEN": "", "VRM_API_PORT": ""})
    assert settings.api.token is None
    assert settings.api.port == 5000


def test_the_token_is_never_shown(environ: dict[str, str], tmp_path: Path) -> None:
    settings = load_settings(environ={**environ, "VRM_API_TOKEN": "hush-hush"})
    assert settings.api.token is not None and settings.api.token.get_secret_value() == "hush-hush"
    assert "hush" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "[" not in refusal(config_file=write_config(tmp_path, "api: {token: [hush]}\n"), environ=environ)
    assert "hush" not in refusal(config_file=write_config(tmp_path, "api: {token: [hush]}\n"), environ=environ)


def test_unknown_yaml_key_names_file_key_and_the_closest(environ: dict[str, str], tmp_path: Path) -> None:
    path = write_config(tmp_path, "engine:\n  max_bach_size: 3\n")
    message = refusal(config_file=path, environ=environ)
    assert str(path) in message and "engine.max_bach_size" in message and "engine.max_batch_size" in message
    path = write_config(tmp_path, "engin: {}\n")
    assert "'engin'" in refusal(config_file=path, environ=environ) and "'engine'" in refusal(
        config_file=path, environ=environ
    )


def test_unknown_key_with_no_likeness_lists_what_is_allowed(environ: dict[str, str], tmp_path: Path) -> None:
    message = refusal(config_file=write_config(tmp_path, "logging: {zzzzzzzzzzzzzzzzzz: 1}\n"), environ=environ)
    assert "logging.level, logging.json_output" in message


def test_unknown_variable_names_the_closest(environ: dict[str, str]) -> None:
    message = refusal(environ={**environ, "VRM_API_PRT": "1"})
    assert "VRM_API_PRT" in message and "'VRM_API_PORT'" in message
    assert load_settings(environ={**environ, "VRMX": "1", "PATH": "/bin"}).api.port == 5000


def test_unknown_override_is_refused(environ: dict[str, str]) -> None:
    assert "api.port" in refusal(environ=environ, overrides={"api.prt": 1})


@pytest.mark.parametrize(
    ("section", "yaml_text", "said"),
    [
        ("api", "port: 70000", "at most 65535"),
        ("api", "port: true", "boolean"),
        ("api", "port: 80.5", "integer"),
        ("api", "drain_timeout_s: .nan", "finite"),
        ("model", "dtype: int8", "auto, bfloat16, float16, float32"),
        ("model", "quantize_group: 48", "32, 64, 128 or 256"),
        ("security", "production: sure", "1, 0, true or false"),
        ("devices", "memory_fraction: 0", "above 0"),
        ("lending", "lend_ratio: 1.1", "at most 1"),
        ("lending", "reclaim_threshold: 0", "above 0"),
        ("lending", "host_bytes: -1", "at least 0"),
        ("api", "port: null", "integer"),
    ],
)
def test_bad_values_name_file_key_and_what_is_allowed(
    environ: dict[str, str], tmp_path: Path, section: str, yaml_text: str, said: str
) -> None:
    path = write_config(tmp_path, f"{section}:\n  {yaml_text}\n")
    message = refusal(config_file=path, environ=environ)
    assert message.startswith(f"{path}: {section}.{yaml_text.partition(':')[0]}: ")
    assert said in message


def test_bad_values_name_variable_or_flag(environ: dict[str, str]) -> None:
    assert refusal(environ={**environ, "VRM_METRICS_PORT": "many"}).startswith("VRM_METRICS_PORT: api.metrics_port: ")
    assert refusal(environ=environ, overrides={"api.port": -1}).startswith("--port: api.port: ")


def test_every_bad_value_is_reported(environ: dict[str, str]) -> None:
    message = refusal(environ={**environ, "VRM_API_PORT": "x", "VRM_PRODUCTION": "y"})
    assert len(message.splitlines()) == 2


def test_contradicting_settings_name_their_sources(environ: dict[str, str]) -> None:
    message = refusal(environ=environ, overrides={"api.port": 9108})
    assert message.startswith("--port: api.metrics_port must differ from api.port")
    message = refusal(environ={**environ, "VRM_ENGINE_PREFILL_CHUNK_SIZE": "513"})
    assert message.startswith("VRM_ENGINE_PREFILL_CHUNK_SIZE: ")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("VRM_DISABLE_RATE_LIMIT", "1"),
        ("VRM_MINIMAL_TEST", "1"),
        ("VRM_TEST_MODE", "1"),
        ("VRM_API_CORS_ORIGINS", "http://a,*"),
    ],
)
def test_production_refuses_weak_settings(environ: dict[str, str], variable: str, text: str) -> None:
    assert load_settings(environ={**environ, "VRM_PRODUCTION": "1"}).security.production
    message = refusal(environ={**environ, "VRM_PRODUCTION": "1", variable: text})
    assert variable in message and "VRM_PRODUCTION" in message
    load_settings(environ={**environ, variable: text})


@pytest.mark.parametrize("text", ["- a\n- b\n", "api: 3\n", "api: {port: [}\n"])
def test_files_of_the_wrong_shape_are_refused(environ: dict[str, str], tmp_path: Path, text: str) -> None:
    path = write_config(tmp_path, text)
    assert str(path) in refusal(config_file=path, environ=environ)


def test_a_named_file_that_is_missing_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal(config_file=tmp_path / "nowhere.yaml", environ=environ)


def test_lookup_order(environ: dict[str, str], tmp_path: Path) -> None:
    environ |= {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "APPDATA": str(tmp_path / "appdata")}
    assert find_config_file(environ) is None
    here = write_config(tmp_path, "")
    assert find_config_file(environ) == Path(here.name)
    folders = [
        tmp_path / "appdata" / "vramancer",
        tmp_path / "home" / "Library" / "Application Support" / "vramancer",
        tmp_path / "xdg" / "vramancer",
    ]
    for folder in folders:
        path = write_config(folder, "")
        assert find_config_file(environ) == path
    write_config(folders[-1], "api: {port: 1234}\n")
    assert load_settings(environ=environ).api.port == 1234


def test_without_xdg_the_file_lies_in_dot_config(environ: dict[str, str], tmp_path: Path) -> None:
    path = write_config(tmp_path / "home" / ".config" / "vramancer", "")
    assert find_config_file(environ) == path
    assert find_config_file({**environ, "XDG_CONFIG_HOME": "not/absolute"}) == path


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the directories of Linux")
def test_cache_and_state_directories(environ: dict[str, str], tmp_path: Path) -> None:
    runtime = load_settings(environ=environ).runtime
    assert runtime.cache_dir == tmp_path / "home" / ".cache" / "vramancer"
    assert runtime.state_dir == tmp_path / "home" / ".local" / "state" / "vramancer"
    assert load_settings(environ={**environ, "LOCALAPPDATA": "/elsewhere"}).runtime == runtime, "that is for Windows"
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "c"), "XDG_STATE_HOME": str(tmp_path / "s")}
    runtime = load_settings(environ=environ).runtime
    assert (runtime.cache_dir, runtime.state_dir) == (tmp_path / "c" / "vramancer", tmp_path / "s" / "vramancer")
    assert load_settings(environ=environ, overrides={"runtime.cache_dir": "/x"}).runtime.cache_dir == Path("/x")


def test_minimal_test_sets_devices_unless_they_are_given(environ: dict[str, str]) -> None:
    environ["VRM_MINIMAL_TEST"] = "1"
    assert load_settings(environ=environ).devices.devices == "cpu=1GiB,cpu=1GiB"
    assert load_settings(environ={**environ, "VRM_DEVICES_DEVICES": "cpu"}).devices.devices == "cpu"
    assert load_settings(environ={**environ, "VRM_MINIMAL_TEST": "0"}).devices.devices is None


def test_test_mode_fixes_the_seed_unless_it_is_given(environ: dict[str, str]) -> None:
    assert load_settings(environ=environ).runtime.default_seed is None
    environ["VRM_TEST_MODE"] = "1"
    assert load_settings(environ=environ).runtime.default_seed == 0
    assert load_settings(environ=environ, overrides={"runtime.default_seed": 5}).runtime.default_seed == 5


def test_settings_are_frozen(environ: dict[str, str]) -> None:
    settings = load_settings(environ=environ)
    with pytest.raises(ValueError, match="frozen"):
        settings.api.port = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.api = settings.api  # type: ignore[misc]


def test_the_sample_file_is_generated_from_the_settings() -> None:
    assert (REPOSITORY / "config.yaml").read_text() == render_config_yaml()


def test_the_sample_file_changes_nothing(environ: dict[str, str]) -> None:
    assert load_settings(REPOSITORY / "config.yaml", environ) == load_settings(environ=environ)


def test_the_sample_file_with_every_line_uncommented_is_the_defaults(environ: dict[str, str], tmp_path: Path) -> None:
    keys = {info.key.split(".")[1] for info in iter_settings()}
    lines = [
        line.replace("# ", "", 1) if line.startswith("  # ") and line[4:].split(":")[0] in keys else line
        for line in render_config_yaml().splitlines()
    ]
    path = write_config(tmp_path, "\n".join(lines))
    assert path.read_text().count("\n  port: 5000\n") == 1
    environ["HOME"] = str(Path.home())  # "~" in the file is the process's own home
    assert load_settings(path, environ) == load_settings(environ=environ)


def test_every_setting_is_described_and_reachable() -> None:
    infos = list(iter_settings())
    assert all(info.description.endswith(".") or info.description.endswith(")") for info in infos)
    assert len({info.env for info in infos}) == len(infos)
    flags = [info.flag for info in infos if info.flag]
    assert len(set(flags)) == len(flags) == len(infos) - 3
    assert [info.key for info in infos if info.flag is None] == ["backend.upstream_keys", "api.token", "cluster.token"]


def test_a_section_without_entries_leaves_those_behind_it_in_force(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("devices:\napi: {port: 7}\n")
    assert load_settings(path, {}).api.port == 7


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ('devices: {sim_link: ""}', "devices.sim_link"),
        ('devices: {layers: ""}', "devices.layers"),
        (f"devices: {{layers: '{'1' * 1025}'}}", "devices.layers"),
    ],
)
def test_texts_are_neither_empty_nor_endless(tmp_path: Path, document: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(document)
    with pytest.raises(ConfigError, match=said):
        load_settings(path, {})


def test_a_text_may_be_as_long_as_is_said(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"devices: {{layers: '{'1' * 1024}'}}")
    assert len(load_settings(path, {}).devices.layers or "") == 1024
