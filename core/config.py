"""Settings, read once: defaults, then `config.yaml`, then the environment, then flags. The only reader of both.

An unknown key or a bad value is a `ConfigError` that names where it came from, the key, and what is allowed.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from core.config_backend import BackendSettings, UpstreamSettings
from core.config_fields import Section, field_kinds
from core.config_names import ABSENT_SETTINGS, AbsentSetting, absence, nearest
from core.config_schema import DeviceSettings, MemorySettings, Settings
from core.config_service import (
    ApiSettings,
    ClusterSettings,
    DashboardSettings,
    LoggingSettings,
    RuntimeSettings,
    TracingSettings,
)
from core.errors import ConfigError

__all__ = [
    "ApiSettings",
    "BackendSettings",
    "ClusterSettings",
    "DashboardSettings",
    "DeviceSettings",
    "LoggingSettings",
    "MemorySettings",
    "RuntimeSettings",
    "SettingInfo",
    "Settings",
    "TracingSettings",
    "UpstreamSettings",
    "find_config_file",
    "iter_settings",
    "load_settings",
    "number_gpus_by_slot",
    "render_config_yaml",
]

CONFIG_NAME = "config.yaml"
ENV_PREFIX = "VRM_"
MINIMAL_TEST_DEVICES = "cpu=1GiB,cpu=1GiB"
TEST_MODE_SEED = 0


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting as people see it: its `key` in YAML (`api.port`), `env` variable, and `flag` if it has one."""

    key: str
    env: str
    flag: str | None
    field: FieldInfo

    @property
    def kinds(self) -> tuple[Any, ...]:
        return field_kinds(self.field)

    @property
    def secret(self) -> bool:
        return SecretStr in self.kinds

    @property
    def holds_secrets(self) -> bool:
        """Whether a part of its value may be one."""
        return bool(_extra(self.field, "holds_secrets"))

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def summary(self) -> str:
        """The description's first sentence, and what holds if the setting is not set."""
        first, *more = re.split(r"(?<=[.)]) (?=[A-Z])", self.description)
        return " ".join([first, *(sentence for sentence in more if sentence.startswith("Not set:"))])

    @property
    def common(self) -> bool:
        """Whether it belongs to the few that most people look for."""
        return bool(_extra(self.field, "common"))

    @property
    def default_text(self) -> str:
        """The default as it would be written in YAML."""
        shown = _extra(self.field, "shown_default")
        if shown is not None:
            return str(shown)
        default = self.field.default
        if isinstance(default, tuple):
            return "[" + ", ".join(default) + "]"
        text = yaml.safe_dump(default, default_flow_style=True, width=1000)
        return text.removesuffix("\n").removesuffix("\n...")

    @property
    def allowed(self) -> str:
        """The bounds or the choices in words, empty when any value of the type will do."""
        choices = [str(value) for value in _literal_values(self.field)]
        if choices:
            return "one of " + ", ".join(choices)
        bounds = [
            f"{word} {getattr(limit, name)}"
            for limit in self.field.metadata
            for name, word in (("gt", "above"), ("ge", "at least"), ("le", "at most"), ("lt", "below"))
            if hasattr(limit, name)
        ]
        return " and ".join(bounds)


def _extra(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def _literal_values(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _sections() -> dict[str, type[Section]]:
    found: dict[str, type[Section]] = {}
    for name, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        found[name] = field.annotation
    return found


def iter_settings() -> Iterator[SettingInfo]:
    """Every setting, in the order of the sample file."""
    for section, model in _sections().items():
        for name, field in model.model_fields.items():
            flag = _extra(field, "flag")
            env = _extra(field, "env") or f"{ENV_PREFIX}{section}_{name}".upper()
            flag_name = None if flag == "" else "--" + (flag or name.replace("_", "-"))
            yield SettingInfo(key=f"{section}.{name}", env=env, flag=flag_name, field=field)


def load_settings(
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Read all sources and check them together.

    Args:
        config_file: the YAML file to read; None looks in the places of `find_config_file`.
        environ: environment variables; None takes the process's own. Empty values count as not set.
        overrides: flags, keyed like "api.port".

    Raises:
        ConfigError: an unknown key or a bad value; the message names its source, its key and what is allowed.
    """
    environ = os.environ if environ is None else environ
    merged = _Merged()
    merged.add_all(_platform_defaults(environ), "default")
    explicit = _Merged()
    path = config_file if config_file is not None else find_config_file(environ)
    if path is not None:
        explicit.add_all(_read_yaml(path), str(path))
    for key, variable, text in _read_environ(environ):
        explicit.add(key, text, variable)
    for key, value in (overrides or {}).items():
        info = _known(key, "flag")
        explicit.add(key, value, info.flag or key)
    runtime = explicit.validate().runtime
    if runtime.minimal_test:
        merged.add("devices.devices", MINIMAL_TEST_DEVICES, "VRM_MINIMAL_TEST")
    if runtime.test_mode:
        merged.add("runtime.default_seed", TEST_MODE_SEED, "VRM_TEST_MODE")
    merged.update(explicit)
    return merged.validate()


class _Merged:
    """Values by key, each with the source that set it last."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}

    def add(self, key: str, value: Any, source: str) -> None:
        self._values[key] = value
        self._sources[key] = source

    def add_all(self, values: Mapping[str, Any], source: str) -> None:
        for key, value in values.items():
            self.add(key, value, source)

    def update(self, other: _Merged) -> None:
        self._values.update(other._values)
        self._sources.update(other._sources)

    def validate(self) -> Settings:
        tree: dict[str, dict[str, Any]] = {}
        for key, value in self._values.items():
            section, name = key.split(".", 1)
            tree.setdefault(section, {})[name] = value
        try:
            return Settings.model_validate(tree)
        except ValidationError as error:
            problems = [self._describe(detail) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(problems)))

    def _describe(self, detail: ErrorDetails) -> str:
        message = detail["msg"].removeprefix("Value error, ")
        location = detail["loc"]
        if len(location) < 2:  # several settings that contradict each other: the message names them
            sources = {self._sources[key] for key in self._sources if key in message}
            return f"{', '.join(sorted(sources - {'default'})) or 'settings'}: {message}."
        key = f"{location[0]}.{location[1]}"
        info = next(info for info in iter_settings() if info.key == key)
        given = "" if info.secret or info.holds_secrets else f", got {detail['input']!r}"
        allowed = f" Allowed: {info.allowed}." if info.allowed else ""
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[2:])
        return f"{self._sources.get(key, 'default')}: {key}{inner}: {message}{given}.{allowed}"


def _platform_defaults(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "runtime.cache_dir": _base_dir(environ, "XDG_CACHE_HOME", "LOCALAPPDATA", ".cache", "Library/Caches"),
        "runtime.state_dir": _base_dir(
            environ, "XDG_STATE_HOME", "LOCALAPPDATA", ".local/state", "Library/Application Support"
        ),
    }


def number_gpus_by_slot(environ: MutableMapping[str, str] | None = None) -> None:
    """Have CUDA number GPUs as `nvidia-smi` does, not the fastest first, unless the environment says how.

    Called before anything initialises CUDA.
    """
    (os.environ if environ is None else environ).setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def _home(environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME") or environ.get("USERPROFILE")
    return Path(home) if home else Path.home()


def _base_dir(environ: Mapping[str, str], xdg: str, windows: str, unix: str, mac: str) -> Path:
    """`vramancer` below the platform's directory for that purpose; the XDG variable counts everywhere."""
    if Path(environ.get(xdg, "")).is_absolute():
        return Path(environ[xdg]) / "vramancer"
    if sys.platform == "win32" and environ.get(windows):
        return Path(environ[windows]) / "vramancer"
    return _home(environ) / (mac if sys.platform == "darwin" else unix) / "vramancer"


def find_config_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """The first `config.yaml` in `$XDG_CONFIG_HOME`, `~/Library/Application Support` or `%APPDATA%`, each with
    `vramancer` below it, or in the current directory.
    """
    environ = os.environ if environ is None else environ
    home = _home(environ)
    xdg = Path(environ.get("XDG_CONFIG_HOME", ""))
    folders = [xdg if xdg.is_absolute() else home / ".config", home / "Library" / "Application Support"]
    if environ.get("APPDATA"):
        folders.append(Path(environ["APPDATA"]))
    candidates = [folder / "vramancer" / CONFIG_NAME for folder in folders]
    return next((path for path in [*candidates, Path(CONFIG_NAME)] if path.is_file()), None)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's values keyed "section.name"; every section and key is known."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(_sections())}), not a {type(document).__name__}.")
    sections = list(_sections())
    absent = {setting.key: setting for setting in ABSENT_SETTINGS}
    values: dict[str, Any] = {}
    for section, entries in document.items():
        if section not in sections and not any(key.startswith(f"{section}.") for key in absent):
            hint = _hint(nearest(str(section), sections)) or f" Sections: {', '.join(sections)}."
            raise ConfigError(f"{path}: unknown key {section!r}.{hint}")
        if entries is None:
            continue
        if not isinstance(entries, dict):
            raise ConfigError(f"{path}: {section} must hold keys and values, got {entries!r}.")
        for name, value in entries.items():
            key = f"{section}.{name}"
            if key in absent:
                _refuse_absent(absent[key], value, f"{path}: {key}")
            else:
                values[_known(key, str(path)).key] = value
    return values


def _known(key: str, source: str) -> SettingInfo:
    known = {info.key: info for info in iter_settings()}
    if key in known:
        return known[key]
    section, _, name = key.partition(".")
    siblings = [other for other in known if other.startswith(f"{section}.")]
    elsewhere = (other for other in known if other.partition(".")[2] == name)
    meant = nearest(key, siblings, prefix=f"{section}.") or next(elsewhere, None)
    hint = _hint(meant) or (f" Allowed: {', '.join(siblings)}." if siblings else "")
    raise ConfigError(f"{source}: unknown key {key!r}.{hint}")


def _hint(meant: str | None) -> str:
    return f" Did you mean {meant!r}?" if meant else ""


def _refuse_absent(setting: AbsentSetting, value: Any, name: str) -> None:
    if not setting.is_off(value):
        raise ConfigError(f"{absence(name, setting.purpose)}; leave it out.")


def _read_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(key, variable, text) of every `VRM_` variable that is set and not empty."""
    known = {info.env: info.key for info in iter_settings()}
    absent = {setting.env: setting for setting in ABSENT_SETTINGS}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        if variable in absent:
            _refuse_absent(absent[variable], text, variable)
        elif variable not in known:
            hint = _hint(_variable_meant(variable)) or " `vramancer serve --help-all` lists those that there are."
            raise ConfigError(f"environment: unknown variable {variable}.{hint}")
        elif text != "":
            yield known[variable], variable, text


def _variable_meant(variable: str) -> str | None:
    """The variable of the flag that has this name (VRM_PORT for `--port`), or a variable that is written alike."""
    flag = "--" + variable.removeprefix(ENV_PREFIX).lower().replace("_", "-")
    infos = list(iter_settings())
    of_flag = next((info.env for info in infos if info.flag == flag), None)
    return of_flag or nearest(variable, (info.env for info in infos), prefix=ENV_PREFIX)


def render_config_yaml() -> str:
    """The sample `config.yaml`: every setting with its description, commented out at its default."""
    lines = [
        "# VRAMancer's settings. Everything below is commented out at its default: remove the '# ' before a key to",
        "# change it. The environment and flags win over this file. Looked for in $XDG_CONFIG_HOME/vramancer,",
        "# ~/Library/Application Support/vramancer, %APPDATA%\\vramancer and the current directory, or --config PATH.",
        "# Generated by: python -c 'import core.config as c; print(c.render_config_yaml(), end=\"\")' > config.yaml",
    ]
    section = ""
    for info in iter_settings():
        name, key = info.key.split(".", 1)
        if name != section:
            section = name
            lines += [*([""] if lines[-1] else []), f"# {_sections()[name].__doc__}", f"{name}:"]
        notes = info.description + (f" Allowed: {info.allowed}." if info.allowed else "")
        ways = " or ".join(way for way in (info.env, info.flag) if way)
        lines += [f"  # {line}" for line in textwrap.wrap(f"{notes} [{ways}]", 112, break_on_hyphens=False)]
        default = "null" if info.secret else info.default_text
        lines += [f"  # {key}: {default}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"
