"""The grammar that an answer in a chat keeps to: its form, its calls, and the thoughts in front of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from core.api.openai.structured import Form, checked, read_form
from core.grammars import forms
from core.grammars.calls import CallGrammar
from core.parsers.families import HARMONY, parser_class
from core.parsers.harmony import CHANNEL, MESSAGE, START
from core.parsers.reasoning import TAGS, ThinkTags
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.api.openai.answers import AnswerReader
    from core.api.openai.schemas import ChatRequest
    from core.api.openai.tools import Offer
    from core.engine.submission import LoadedModel
    from core.parsers.families import OutputFormat

_HARMONY_TAGS = ThinkTags(f"{CHANNEL}analysis{MESSAGE}", f"<|end|>{START}assistant")


def constrain(
    params: SamplingParams, fields: ChatRequest, model: LoadedModel, reader: AnswerReader | None
) -> SamplingParams:
    """The parameters with the grammar that the request asks for, if it does. `reader` has read the prompt.

    Raises:
        InvalidRequestError: about the field whose grammar cannot be kept to.
        UnavailableError: too many others are being compiled.
    """
    form = read_form(fields)
    offer = reader.offer if reader is not None else None
    calls = offer is not None and (offer.required or bool(offer.strict) or form is not None)
    if form is None and not calls:
        return params
    output_format = model.output_format
    if offer is not None and calls:
        parts = _with_calls(offer, form, output_format)
    else:
        assert form is not None
        parts = _final(form, output_format)
    if reader is not None:
        parts = _behind_thoughts(parts, reader, output_format)
    param = offer.choice if offer is not None and offer.required else "tools" if form is None else form.param
    where = form.where if form is not None else lambda reason: ""
    return replace(params, grammar=checked(forms.compose(*parts), model, param, where))


def constrain_to(params: SamplingParams, form: Form, model: LoadedModel, reader: AnswerReader | None) -> SamplingParams:
    """The parameters with a form's grammar. `reader` has read the prompt; without one the whole text is of the form.

    Raises as `constrain`.
    """
    parts = [form.part]
    if reader is not None:
        parts = _behind_thoughts(_final(form, model.output_format), reader, model.output_format)
    return replace(params, grammar=checked(forms.compose(*parts), model, form.param, form.where))


def _with_calls(offer: Offer, form: Form | None, output_format: OutputFormat) -> list[forms.Part]:
    """Calls alone where one is required, calls or the form, or text with calls in it."""
    parser = parser_class(output_format.tool_parser or "")
    loose = {} if offer.required or parser.shape.arguments != "json" else {
        name: forms.JSON_OBJECT for name in offer.callable if name not in offer.strict
    }  # fmt: skip
    grammar = CallGrammar(parser.shape, {**offer.callable, **loose}, output_format.call_tokens)
    if offer.required:
        return grammar.required(parallel=offer.parallel)
    if form is None:
        return grammar.offered(parser.openings, parallel=offer.parallel)
    calls, *rest = grammar.required(parallel=offer.parallel)
    final, *more = _final(form, output_format)
    return [
        {"lark_grammar": "start: @calls | @form\n"}, forms.named("calls", calls), *rest, forms.named("form", final),
        *more,
    ]  # fmt: skip


def _final(form: Form, output_format: OutputFormat) -> list[forms.Part]:
    """The form as the model writes an answer."""
    if HARMONY not in (output_format.tool_parser, output_format.reasoning_parser):
        return [form.part]
    head = forms.mark(f"{CHANNEL}final{MESSAGE}", output_format.call_tokens)
    return [{"lark_grammar": f"start: {head} @value\n"}, forms.named("value", form.part)]


def _behind_thoughts(
    parts: list[forms.Part], reader: AnswerReader, output_format: OutputFormat
) -> list[forms.Part]:  # fmt: skip
    name = output_format.reasoning_parser or ""
    tags = _HARMONY_TAGS if name == HARMONY else TAGS.get(name)
    if tags is None:
        return parts
    special = {**output_format.call_tokens, **output_format.thought_tokens}
    opening, closing = (forms.mark(text.strip(), special) for text in (tags.open, tags.close))
    answer, *rest = parts
    return [*forms.after_thoughts(reader.thinks_at_start, opening, closing, answer), *rest]
