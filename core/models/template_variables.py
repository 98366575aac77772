"""What a chat template looks at, beside messages. Templates are only read here, never run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from core.errors import InvalidRequestError, UnsupportedParameterError

_OF_RENDERER = frozenset({"raise_exception", "strftime_now"})
"""Functions that transformers gives every template."""


class _Generation(Extension):
    """Transformers' own block, which marks what the model wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        number = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=number)


_environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"], autoescape=False)


@lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """Names of the variables that a template may be given. Empty for one that cannot be read; whoever renders it is
    told why."""
    try:
        names = meta.find_undeclared_variables(_environment.parse(source))
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(names) - _environment.globals.keys() - _OF_RENDERER


def no_place_for_tools() -> UnsupportedParameterError:
    """What there is to say of tools for a template that does not look at them."""
    return UnsupportedParameterError(
        "The model's chat template has no place for tools; the setting model.chat_template can replace it.",
        param="tools",
    )


def check_kwargs(kwargs: Mapping[str, Any], variables: Collection[str], reserved: Collection[str]) -> None:
    """Raise `InvalidRequestError` unless all `kwargs` are plain values of `variables` that are not `reserved`."""
    for name, value in kwargs.items():
        if name in reserved:
            raise InvalidRequestError(f"chat_template_kwargs may not set {name}.", param="chat_template_kwargs")
        if name not in variables:
            known = ", ".join(sorted(set(variables) - set(reserved))) or "nothing"
            raise InvalidRequestError(
                f"The model's chat template does not look at {name[:64]}; of chat_template_kwargs it takes {known}.",
                param="chat_template_kwargs",
            )
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise InvalidRequestError(
                f"chat_template_kwargs takes strings, numbers, booleans and null; {name} is a {type(value).__name__}.",
                param="chat_template_kwargs",
            )
