"""Making typed records, and from them what JSON knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

View = TypeVar("View")


def view_of(kind: type[View], source: object, **given: object) -> View:
    """A record with what is `given`; the rest of its fields are the source's of the same names."""
    names = [item.name for item in fields(kind) if item.name not in given]  # type: ignore[arg-type]
    return kind(**{name: getattr(source, name) for name in names}, **given)


def render(value: object) -> Any:
    """Records become objects with their fields' names, mappings objects, sequences lists; the rest stays as it is."""
    if is_dataclass(value):
        return {item.name: render(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): render(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [render(item) for item in value]
    return value
