"""Pydantic AI with its model and provider for OpenAI's API."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pydantic
from common import QUESTION, TOLD, check, hoped, same, served
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

demo, scripted = served("demo"), served("scripted")
SETTINGS: Any = {"max_tokens": 1000, "temperature": 0}


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Oslo", "Lima", "Rome"]


def model(server: Any, kind: Any = OpenAIChatModel) -> Any:
    return kind(server.model, provider=OpenAIProvider(base_url=server.v1, api_key=server.token))


def weather(city: Literal["Oslo", "Lima", "Rome"]) -> str:
    """Says what the weather in a city is."""
    return f"rain in {city}"


@check("run")
def _() -> Any:
    return hoped(Agent(model(demo), model_settings=SETTINGS).run_sync(QUESTION).output)


@check("run_stream")
def _() -> Any:
    async def run() -> str:
        async with Agent(model(demo), model_settings=SETTINGS).run_stream(QUESTION) as answer:
            return "".join([part async for part in answer.stream_text(delta=True)])

    return hoped(asyncio.run(run()))


@check("output by a tool", constrained=True)
def _() -> Any:
    agent = Agent(model(demo), output_type=ToolOutput(City), model_settings=SETTINGS, retries=0)
    return agent.run_sync("Weather in Oslo?").output.city


@check("output by a schema", constrained=True)
def _() -> Any:
    agent = Agent(model(demo), output_type=NativeOutput(City), model_settings=SETTINGS, retries=0)
    return agent.run_sync("Weather in Oslo?").output.city


for kind in (OpenAIChatModel, OpenAIResponsesModel):

    @check(f"tools, auto, {kind.__name__}", on="scripted")
    def _(kind: Any = kind) -> Any:
        agent = Agent(model(scripted, kind), tools=[weather])
        return same(agent.run_sync("Weather in Oslo?").output, TOLD)
