"""From typed records to what JSON knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

JSON_NAME = "json"
"""In a field's metadata: what it is called in JSON where Python keeps that word for itself."""


def render(value: object) -> Any:
    """Records become objects with their fields' names, mappings objects, sequences lists; the rest stays as it is."""
    if is_dataclass(value):
        return {item.metadata.get(JSON_NAME, item.name): render(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): render(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [render(item) for item in value]
    return value
