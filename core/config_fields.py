"""What a setting is: its type, bounds, default, description, flag and environment variable.

Sections are frozen groups of them; text (environment, flags) is read as what a field's type says.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

KIB = 1024
MIB = 1024 * KIB

_TRUE = frozenset({"1", "true"})
_FALSE = frozenset({"0", "false"})


def setting(
    default: Any,
    description: str,
    *,
    flag: str | None = None,
    env: str | None = None,
    shown_default: str | None = None,
    common: bool = False,
    holds_secrets: bool = False,
    **bounds: Any,
) -> Any:
    """A pydantic field; `flag` and `env` replace the names that are derived from the field's own.

    `flag=""` means that there is no flag; a callable `default` is a factory, shown as `shown_default` in help texts.
    What is `common` is in a command's `--help`, the rest in `--help-all` alone. Values that may hold secrets are not
    quoted in errors.
    """
    extra = {
        "flag": flag, "env": env, "shown_default": shown_default, "common": common, "holds_secrets": holds_secrets,
    }  # fmt: skip
    keywords: dict[str, Any] = {"description": description, "json_schema_extra": extra, **bounds}
    if callable(default):
        return Field(default_factory=default, **keywords)
    return Field(default=default, **keywords)


class Section(BaseModel):
    """A frozen group of settings. Text values (environment, flags) are read as what the field's type says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = field_kinds(cls.model_fields[info.field_name or ""])
        if bool in kinds:
            return _read_bool(value)
        if value is False and "off" in typing.get_args(cls.model_fields[info.field_name or ""].annotation):
            return "off"  # what YAML reads as false
        if isinstance(value, bool):
            raise ValueError("Input should not be a boolean")  # noqa: TRY004 (pydantic reports ValueError only)
        if isinstance(value, str):
            if tuple in kinds:
                return tuple(part.strip() for part in value.split(",") if part.strip())
            if Path in kinds:
                return Path(value).expanduser()
            return _read_choice(value, cls.model_fields[info.field_name or ""])
        return value


def field_kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The plain types that a field's annotation is made of: `int | None` gives `(int, NoneType)`."""
    return tuple(typing.get_origin(member) or member for member in _members(field))


def _members(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _read_choice(text: str, field: FieldInfo) -> str | int:
    """One of the numbers that a field allows, if the text is one."""
    choices = [each for member in _members(field) for each in typing.get_args(member) if isinstance(each, int)]
    return next((number for number in choices if str(number) == text.strip()), text)


def _read_bool(value: Any) -> bool:
    text = str(value).strip().lower()
    if isinstance(value, (bool, int, str)) and text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError("Input should be 1, 0, true or false")
