"""structlog, set up once per process: readable in a terminal, JSON elsewhere, always on standard error."""

import logging
import sys
from typing import Any

import structlog
import structlog.tracebacks
from structlog.typing import EventDict

_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))


def configure_logs(service: str, instance: str, format: str = "auto") -> None:
    """`format` is auto, json or console. Every line carries the service and its instance."""
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    # Tracebacks without local variables: those hold prompts.
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer = plain if console else structlog.processors.JSONRenderer()

    def name(logger: Any, method: str, line: EventDict) -> EventDict:
        """Here, and not in a context variable: threads would not inherit that."""
        return {**line, "service": service, "instance": instance}

    structlog.configure(
        processors=[
            name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [_TRACEBACKS]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
