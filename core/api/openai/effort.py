"""`reasoning_effort`, as the model's chat template takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from core.errors import UnsupportedParameterError

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
SWITCHES = ("enable_thinking", "thinking")
"""Names that templates give to whether the model thinks at all."""


def effort_kwargs(effort: Effort, model: LoadedModel) -> dict[str, Any]:
    """What a template is given for it: the effort itself, or a switch that is off for `none`.

    Raises `UnsupportedParameterError` if the template takes neither.
    """
    variables = model.tokenizer.template_variables
    if "reasoning_effort" in variables:
        return {"reasoning_effort": effort}
    switch = next((name for name in SWITCHES if name in variables), None)
    if effort == "none" and switch is not None:
        return {switch: False}
    if effort == "none" and model.output_format.reasoning_parser is None:
        return {}  # it does not think anyway
    takes = "none alone" if switch is not None or model.output_format.reasoning_parser is None else "none of its values"
    raise UnsupportedParameterError(
        f"reasoning_effort {effort} would do nothing: the chat template of {model.name} takes {takes}.",
        param="reasoning_effort",
    )
