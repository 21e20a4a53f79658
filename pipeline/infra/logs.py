"""Structured logs, as JSON lines on standard error: a stable event name and bound context, never a text or a secret.

Libraries' log records are written in the same form, with the context bound in their thread and the name of their
`logger`.
"""

import logging
import sys

import structlog
from structlog.typing import Processor

#: Least level of libraries' log records: at debug, some would show headers.
_LIBRARIES_LEVEL = logging.WARNING
#: Libraries that log at the process' own level: Celery reports the state of its worker.
_TALKERS = ("celery",)
#: Loggers of Celery that write a line per message without its job; `chunk_ended` says more.
_CHATTERERS = ("celery.worker.strategy", "celery.app.trace")


def configure_logs(level: str) -> None:
    """Write this process's logs from `level` up to standard error, as one JSON object per line."""
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
