"""smolagents with its model for OpenAI's API. An agent's own instructions are longer than the demo model's context."""

from __future__ import annotations

import json
from typing import Any

from common import QUESTION, check, hoped, same, served
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

demo, scripted = served("demo"), served("scripted")
SEEN: list[str] = []


@tool
def weather(city: str) -> str:
    """Says what the weather in a city is.

    Args:
        city: Its name.
    """
    SEEN.append(city)
    return f"rain in {city}"


def model(server: Any) -> Any:
    return OpenAIServerModel(
        model_id=server.model, api_base=server.v1, api_key=server.token, max_tokens=1000, temperature=0
    )


ASKED: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]


@check("generate")
def _() -> Any:
    return hoped(model(demo).generate(ASKED).content)


@check("generate_stream")
def _() -> Any:
    return hoped("".join(part.content or "" for part in model(demo).generate_stream(ASKED)))


@check("generate, tools, required", constrained=True)
def _() -> Any:
    answer = model(demo).generate(ASKED, tools_to_call_from=[weather])
    arguments = answer.tool_calls[0].function.arguments
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert isinstance(given["city"], str), given  # the schema that it sends allows others beside
    return given


for streamed in (False, True):

    @check(f"ToolCallingAgent{', streamed' if streamed else ''}", on="scripted", constrained=True)
    def _(streamed: bool = streamed) -> Any:
        SEEN.clear()
        agent = ToolCallingAgent(
            tools=[weather], model=model(scripted), max_steps=3, verbosity_level=0, stream_outputs=streamed
        )
        answer = agent.run("Weather in Oslo?")
        same((SEEN, answer), (["Lima"], "It rains in Lima."))
        return answer
