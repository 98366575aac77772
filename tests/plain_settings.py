"""Settings for tests, from defaults and overrides alone."""

from __future__ import annotations

from pathlib import Path

from core.config import Settings, load_settings

CACHE_DIR = Path(__file__).parent.parent / ".pytest_cache" / "vramancer"
"""Compiled kernels, kept between test runs: building them takes seconds."""


def make_settings(**overrides: object) -> Settings:
    """Settings from defaults and `section__field=value` overrides alone, whatever the machine's environment says."""
    values = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(config_file=None, environ={"XDG_CONFIG_HOME": "/nonexistent"}, overrides=values)
