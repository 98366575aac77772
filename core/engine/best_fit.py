"""Which quantization fits the devices with the context that is asked for, the best of them first. Like `preview`,
without torch for known families on cards by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.config import Settings
from core.engine.preview import Preview, preview
from core.errors import InsufficientMemoryError, InvalidRequestError, UnsupportedModelError, VRAMancerError

KINDS = ("none", "int8", "int4")
"""In the order of their quality."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One way to keep the weights: `quantize` as in the settings, and what people call it. `shown` is its plan; there
    is none for the `reason`."""

    quantize: str
    title: str
    shown: Preview | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether all layers are on the devices."""
        return self.shown is not None and self.streamed_layers == 0

    @property
    def streamed_layers(self) -> int:
        """Those that stay in main memory."""
        stages = self.shown.placement.stages if self.shown is not None else ()
        return sum(len(stage.streamed_layers) for stage in stages)

    @property
    def tok_s(self) -> float | None:
        """Predicted for one stream, if it is."""
        prediction = self.shown.prediction if self.shown is not None else None
        return prediction.rates[0].tok_s if prediction is not None else None


def best_fit(settings: Settings, gpus: Sequence[str] = (), *, more: Sequence[str] = ()) -> tuple[Verdict, ...]:
    """A verdict for each kind, the chosen one first: the best that fits, else the fastest whose layers stream in. A
    checkpoint that is quantized already has one kind, its own.

    Raises `InvalidRequestError` where a kind is given, `InsufficientMemoryError` if none can be placed, and what
    `preview` raises for the model as it is.
    """
    if settings.model.quantize != "none":
        raise InvalidRequestError(
            f"--fit tries all ways to quantize, and quantize is {settings.model.quantize}: leave one of them out.",
            param="quantize",
        )
    found: list[Verdict] = []
    refused: InsufficientMemoryError | None = None
    for kind in KINDS:
        model = settings.model.model_copy(update={"quantize": kind})
        try:
            shown = preview(settings.model_copy(update={"model": model}), gpus, more=more)
        except VRAMancerError as error:
            if not isinstance(error, InsufficientMemoryError) and not _is_of(kind, error):
                raise
            refused = error if isinstance(error, InsufficientMemoryError) else refused
            found.append(Verdict(kind, "as it is" if kind == "none" else kind, None, error.message))
            continue
        found.append(Verdict(kind, shown.model.quantization or shown.model.dtype, shown))
        if kind == "none" and shown.model.quantization:
            break
    placed = [verdict for verdict in found if verdict.shown is not None]
    if not placed and refused is not None:
        raise refused
    chosen = next((verdict for verdict in placed if verdict.fits), None)
    if chosen is None:
        chosen = max(placed, key=lambda verdict: (verdict.tok_s or 0.0, -verdict.streamed_layers))
    return chosen, *(verdict for verdict in found if verdict is not chosen)


def _is_of(kind: str, error: VRAMancerError) -> bool:
    """Whether a model is only not to be had in this kind."""
    is_refused = isinstance(error, (InvalidRequestError, UnsupportedModelError))
    return kind != "none" and is_refused and error.param == "quantize"
