"""LangChain's package for OpenAI."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from common import QUESTION, TOLD, check, hoped, in_cities, same, served
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

demo, scripted = served("demo"), served("scripted")
model = ChatOpenAI(
    model=demo.model, base_url=demo.v1, api_key=demo.token, temperature=0, max_tokens=1000, max_retries=0
)
other = ChatOpenAI(model=scripted.model, base_url=scripted.v1, api_key=scripted.token, max_retries=0)
RAIN = "What is the weather in Oslo?"


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Oslo", "Lima", "Rome"]


@tool
def weather(city: Literal["Oslo", "Lima", "Rome"]) -> str:
    """Says what the weather in a city is."""
    return f"rain in {city}"


@check("invoke")
def _() -> Any:
    answer = model.invoke(QUESTION)
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 1
    return hoped(answer.text if isinstance(answer.text, str) else answer.text())


@check("stream")
def _() -> Any:
    return hoped("".join(str(part.content) for part in model.stream(QUESTION)))


@check("tools, required", constrained=True)
def _() -> Any:
    answer = model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False).invoke(RAIN)
    return in_cities(answer.tool_calls[0]["args"])


@check("tools, named", constrained=True)
def _() -> Any:
    return in_cities(model.bind_tools([weather], tool_choice="weather").invoke(RAIN).tool_calls[0]["args"])


@check("tools, auto, and their result", on="scripted")
def _() -> Any:
    bound = other.bind_tools([weather])
    asked: list[Any] = [HumanMessage(RAIN)]
    answer = bound.invoke(asked)
    (call,) = answer.tool_calls
    in_cities(call["args"])
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    return same(bound.invoke([*asked, answer, result]).content, TOLD)


@check("tools, auto, streamed", on="scripted")
def _() -> Any:
    parts: Any = AIMessageChunk("")
    for part in other.bind_tools([weather]).stream(RAIN):
        parts += part
    return in_cities(parts.tool_calls[0]["args"])


for method in ("json_schema", "function_calling"):

    @check(f"structured, {method}", constrained=True)
    def _(method: Any = method) -> Any:
        return model.with_structured_output(City, method=method).invoke(RAIN).city


@check("structured, json_mode")
def _() -> Any:
    """The form is any object: which, is for the model."""
    answer = model.with_structured_output(City, method="json_mode", include_raw=True).invoke(RAIN + " As JSON.")
    return type(answer["raw"].content).__name__ + " " + str(answer["parsed"] or answer["raw"].content)[:60]


@check("responses", on="scripted")
def _() -> Any:
    from_responses = ChatOpenAI(
        model=scripted.model, base_url=scripted.v1, api_key=scripted.token, use_responses_api=True, max_retries=0
    )
    return in_cities(from_responses.bind_tools([weather]).invoke(RAIN).tool_calls[0]["args"])


@check("embeddings")
def _() -> Any:
    """As texts, which `check_embedding_ctx_length` false says: else it sends token ids of OpenAI's own tokenizer."""
    embedder = OpenAIEmbeddings(
        model=demo.embedding, base_url=demo.v1, api_key=demo.token, check_embedding_ctx_length=False
    )
    vectors = embedder.embed_documents(["one text", "two texts"])
    return f"{len(vectors)} of {len(vectors[0])} numbers"
