"""Tools that a client offers, as the model's template and its parser take them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.api.body import to_json
from core.api.openai.tool_schemas import check_schema
from core.errors import InvalidRequestError, UnsupportedParameterError
from core.models.template_variables import no_place_for_tools
from core.parsers.families import TOOL_PARSERS

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel
    from core.parsers.events import ToolSchemas

MAX_TOOLS = 128  # as OpenAI's
MAX_TOOL_BYTES = 512 * 1024
"""Of all tools together, as JSON."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Offer:
    """`shown` goes into the prompt, `callable` is what may be called; an answer has one call at most unless
    `parallel`, and one at least if it is `required`. Calls of `strict` ones match their schemas. `choice` is the field
    that says so."""

    shown: list[dict[str, Any]]
    callable: ToolSchemas
    parallel: bool = True
    required: bool = False
    strict: frozenset[str] = frozenset()
    choice: str = "tool_choice"


def read_offer(
    tools: list[Any] | None, tool_choice: Any, parallel_tool_calls: bool | None, model: LoadedModel
) -> Offer | None:
    """The tools of a request. None: there is none that may be called.

    Raises:
        InvalidRequestError: a tool or the choice is malformed; for a schema it says where, by JSON pointer.
        UnsupportedParameterError: a model whose calls nobody can read.
    """
    functions, strict = read_functions(tools)
    names, required = _choice(tool_choice, [function["function"]["name"] for function in functions])
    if not functions or not names:
        return None
    if "tools" not in model.tokenizer.template_variables:
        raise no_place_for_tools()
    if model.output_format.tool_parser is None:
        raise UnsupportedParameterError(
            f"It is not known how {model.name} writes tool calls; the setting model.tool_parser can name it: "
            f"{', '.join(TOOL_PARSERS)}.",
            param="tools",
        )
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in functions}
    named = isinstance(tool_choice, dict) and tool_choice.get("type") == "function"  # which is one call, with OpenAI
    return Offer(
        functions, {name: schemas[name] for name in names}, parallel_tool_calls is not False and not named, required,
        strict & frozenset(names),
    )  # fmt: skip


def read_functions(tools: list[Any] | None) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """Tools of type function, checked, and the names of strict ones. Others are skipped: it is for the model to call
    them, and it never hears of them."""
    if tools is not None and len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools may have {MAX_TOOLS} entries at most, not {len(tools)}.", param="tools")
    if tools and (size := len(to_json(tools).encode())) > MAX_TOOL_BYTES:
        raise InvalidRequestError(f"tools have {size} bytes as JSON; {MAX_TOOL_BYTES} are allowed.", param="tools")
    functions: list[dict[str, Any]] = []
    seen: set[str] = set()
    strict: set[str] = set()
    for index, tool in enumerate(tools or ()):
        param = f"tools[{index}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type", "function"), str):
            raise InvalidRequestError(f"{param} must be an object with a type.", param=param)
        if tool.get("type", "function") != "function":
            continue
        function = _function(tool.get("function"), f"{param}.function")
        if function["name"] in seen:
            raise InvalidRequestError(f"tools offer {function['name']} twice.", param=f"{param}.function.name")
        seen.add(function["name"])
        if tool["function"].get("strict"):
            strict.add(function["name"])
        functions.append({"type": "function", "function": function})
    return functions, frozenset(strict)


def _function(function: Any, param: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise InvalidRequestError(f"{param} must be an object with a name.", param=param)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{param}.name must have 1 to 64 letters, digits, underscores, hyphens or points.", param=f"{param}.name"
        )
    if description is not None and not isinstance(description, str):
        raise InvalidRequestError(f"{param}.description must be a string.", param=f"{param}.description")
    if function.get("parameters") is not None:
        check_schema(function["parameters"], f"{param}.parameters")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidRequestError(f"{param}.strict must be true or false.", param=f"{param}.strict")
    # Templates concatenate descriptions and look into parameters.
    return {
        "name": name,
        "description": description or "",
        "parameters": function.get("parameters") or {"type": "object", "properties": {}},
    }


def _choice(choice: Any, offered: list[str]) -> tuple[list[str], bool]:
    """Names of the tools that may be called, and whether one has to be."""
    if choice is None or choice == "auto":
        return offered, False
    if choice == "none":
        return [], False
    if choice == "required":
        if not offered:
            raise InvalidRequestError("tool_choice required needs tools.", param="tool_choice")
        return offered, True
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        name = choice["function"].get("name") if isinstance(choice.get("function"), dict) else None
        return [_offered(name, offered, "tool_choice.function.name")], True
    if kind == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), offered)
    raise InvalidRequestError(
        "tool_choice must be none, auto, required, an object of type function with the name of a tool, or one of type "
        "allowed_tools.",
        param="tool_choice",
    )


def _allowed(allowed: Any, offered: list[str]) -> tuple[list[str], bool]:
    param = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
        raise InvalidRequestError(f"{param} must be an object with a mode and tools.", param=param)
    if allowed.get("mode") not in ("auto", "required"):
        raise InvalidRequestError(f"{param}.mode must be auto or required.", param=f"{param}.mode")
    names = []
    for index, tool in enumerate(allowed["tools"]):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        names.append(_offered(name, offered, f"{param}.tools[{index}].function.name"))
    if allowed["mode"] == "required" and not names:
        raise InvalidRequestError(f"{param}.mode required needs tools.", param=f"{param}.tools")
    return names, allowed["mode"] == "required"


def _offered(name: Any, offered: list[str], param: str) -> str:
    if not isinstance(name, str) or name not in offered:
        raise InvalidRequestError(f"{param} must be the name of one of the tools.", param=param)
    return name
