"""JSON log lines on standard error: a stable event name and bound context, never a text, never a secret.

What libraries log comes out in the same form, with what is bound in their thread and `logger`, who says it.
"""

import logging
import sys

import structlog
from structlog.typing import Processor

#: Of libraries only warnings come through; at debug some would show headers. Celery tells what becomes of its worker.
_LIBRARIES_LEVEL = logging.WARNING
_TALKERS = ("celery",)
#: A line for each message, with nothing in it that says whose: `chunk_ended` does.
_CHATTERERS = ("celery.worker.strategy", "celery.app.trace")


def configure_logs(level: str) -> None:
    """Send this process's lines to standard error, one JSON object a line, from `level` up."""
    number = logging.getLevelNamesMapping()[level.upper()]
    context: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    line: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*context, *line],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*context, _name_logger],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *line],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=max(number, _LIBRARIES_LEVEL), handlers=[handler], force=True)
    for name in _TALKERS:
        logging.getLogger(name).setLevel(number)
    for name in _CHATTERERS:
        logging.getLogger(name).setLevel(max(number, _LIBRARIES_LEVEL))
    logging.captureWarnings(True)


def _name_logger(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["logger"] = event["_record"].name
    return event
