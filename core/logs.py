"""Log lines: text for people or JSON for machines, on standard error, with the request id in every line.

Log events are lower-case phrases with values beside them: `get_logger(__name__).info("model loaded", layers=32)`.
Standard-library loggers (of torch, transformers, uvicorn) come out the same way.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from rich.console import Console
from structlog.typing import Processor

from core.config import LoggingSettings

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)
_PROCESSORS: tuple[Processor, ...] = (
    structlog.stdlib.filter_by_level,
    *_SHARED,
    structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger that goes through the standard library's logger `name`, so levels and handlers apply."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name), processors=_PROCESSORS, wrapper_class=structlog.stdlib.BoundLogger
    )
    return logger


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the time: while a progress bar is drawn, it takes lines to put them above."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(settings: LoggingSettings, stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (standard error). Called by the program; again replaces the handler."""
    handler = _StandardError() if stream is None else logging.StreamHandler(stream)
    terminal = Console(file=handler.stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=list(_SHARED),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.json_output, colors=terminal.color_system is not None and not terminal.no_color),
            ],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    structlog.configure(  # for libraries that log through structlog itself
        processors=_PROCESSORS,
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _renderers(json_output: bool, *, colors: bool) -> list[Processor]:
    if json_output:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
