"""The JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a file. Raises `CheckpointError` that names the file."""
    loaded = read_json_value(file)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{file.name} of {file.parent.name} must hold a JSON object, not {shown(loaded)}.", param="model"
        )
    return loaded


def read_json_value(file: Path) -> Any:
    """What is in a file, of whatever kind. Raises `CheckpointError` that names the file."""
    name = f"{file.name} of {file.parent.name}"
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise CheckpointError(f"{name} begins with a byte order mark; save it as UTF-8 without one.", param="model")
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{name} is damaged: line {error.lineno}, column {error.colno} is not JSON.", param="model"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is damaged: byte {error.start} is not UTF-8.", param="model") from error
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be read: {error.strerror or type(error).__name__}.", param="model"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name} is damaged: it nests too deep or has a number without end.", param="model"
        ) from error


def shown(value: object) -> str:
    """A value as JSON writes it, cut short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
