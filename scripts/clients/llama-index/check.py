"""LlamaIndex, with its packages for servers that speak OpenAI's API. It reads the annotations of tools as they are."""

import asyncio
from typing import Any, Literal

import pydantic
from common import QUESTION, TOLD, check, hoped, same, served
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

demo, scripted = served("demo"), served("scripted")


def llm(server: Any, **more: Any) -> OpenAILike:
    return OpenAILike(
        model=server.model, api_base=server.v1, api_key=server.token, is_chat_model=True,
        is_function_calling_model=True, context_window=2048, max_tokens=1000, temperature=0, max_retries=0, **more,
    )  # fmt: skip


class City(pydantic.BaseModel):
    """A city."""

    city: Literal["Oslo", "Lima", "Rome"]


def weather(city: Literal["Oslo", "Lima", "Rome"]) -> str:
    """Says what the weather in a city is."""
    return f"rain in {city}"


@check("complete")
def _() -> Any:
    return hoped(llm(demo).complete(QUESTION).text)


@check("stream_chat")
def _() -> Any:
    parts = list(llm(demo).stream_chat([ChatMessage(role="user", content=QUESTION)]))
    return hoped(str(parts[-1].message.content))


@check("tools, required", constrained=True)
def _() -> Any:
    model = llm(demo)
    tool = FunctionTool.from_defaults(weather)
    answer = model.chat_with_tools([tool], user_msg="Weather in Oslo?", tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    return City(**call.tool_kwargs).city


@check("agent, tools, auto, streamed", on="scripted")
def _() -> Any:
    async def run() -> Any:
        return await FunctionAgent(tools=[weather], llm=llm(scripted)).run("Weather in Oslo?")

    return same(str(asyncio.run(run())), TOLD)


@check("structured, by a function", constrained=True)
def _() -> Any:
    program = FunctionCallingProgram.from_defaults(
        output_cls=City, prompt_template_str="Weather in Oslo?", llm=llm(demo), tool_required=True
    )
    return program().city


@check("structured, by a schema", constrained=True)
def _() -> Any:
    model = llm(demo, should_use_structured_outputs=True)
    return model.as_structured_llm(City).complete("Weather in Oslo?").raw.city


@check("embeddings")
def _() -> Any:
    embedder = OpenAILikeEmbedding(model_name=demo.embedding, api_base=demo.v1, api_key=demo.token)
    vectors = embedder.get_text_embedding_batch(["one text", "two texts"])
    return f"{len(vectors)} of {len(vectors[0])} numbers"
