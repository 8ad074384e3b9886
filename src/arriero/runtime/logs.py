"""Where do a daemon's logs go, and in which form?  One JSON line an event, to stderr.

The standard library's logging, with fields: a library for this would be a quarter of what a worker
imports before it can start.
"""

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import msgspec


class Log:
    """The logger of a part: `log.info("worker_spawned", worker_id=…)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        """Note what only a developer wants to know."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Note what happened."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Note what may need somebody's attention."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Note what failed; `exc_info` adds the traceback of an exception."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Note a failure with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, {"exc_info": True, **fields})

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            exc_info = fields.pop("exc_info", None)
            self._logger.log(level, "%s", event, exc_info=exc_info, extra={"fields": fields})


class _JsonLines(logging.Formatter):
    """A record as one JSON line: event, level, role, time, its fields, and a traceback if there is one."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure(*, level: str = "info", role: str) -> None:
    """Send all loggers to stderr as JSON lines.

    The supervisor that started the daemon points stderr at its log file.
    """
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for noisy in ("asyncio", "uvicorn.error", "huggingface_hub", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(max(number, logging.WARNING))


def get(name: str) -> Log:
    """Return the logger of a part."""
    return Log(name)
