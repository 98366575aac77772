"""Instructor, in its modes for OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
import pydantic
from common import RAIN, Wit, check, served

demo = served("demo")


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Oslo", "Lima", "Rome"]


def client(mode: instructor.Mode) -> Any:
    return instructor.from_openai(
        openai.OpenAI(base_url=demo.v1, api_key=demo.token, max_retries=0, timeout=600), mode=mode
    )


def ask(mode: instructor.Mode, **options: Any) -> Any:
    return client(mode).chat.completions.create(
        model=demo.model, messages=RAIN, response_model=City, max_tokens=1000, temperature=0, max_retries=0, **options
    )


for named in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):

    @check(f"mode {named}", constrained=True)
    def _(named: str = named) -> Any:
        return ask(instructor.Mode[named]).city


@check("mode JSON, held to the schema", constrained=True)
def _() -> Any:
    """The mode itself asks for any object, and tells the schema in words."""
    return ask(instructor.Mode.JSON, extra_body={"guided_json": City.model_json_schema(), "response_format": None}).city


@check("mode TOOLS, streamed partly", constrained=True)
def _() -> Any:
    parts = client(instructor.Mode.TOOLS).chat.completions.create_partial(
        model=demo.model, messages=RAIN, response_model=City, max_tokens=1000, temperature=0
    )
    return list(parts)[-1].city


@check("mode TOOLS, several objects")
def _() -> Any:
    """The schema that it sends requires nothing and allows other keys, so a model may fill in what it likes."""
    parts = client(instructor.Mode.TOOLS).chat.completions.create_iterable(
        model=demo.model, messages=RAIN, response_model=City, max_tokens=1000, temperature=0
    )
    try:
        return len([each.city for each in parts])
    except pydantic.ValidationError as error:
        raise Wit(str(error)) from None
