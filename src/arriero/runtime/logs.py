"""Where do a daemon's logs go, and in which form?  One JSON line an event, to stderr."""

import logging
import sys

import structlog


def configure(*, level: str = "info", role: str) -> None:
    """Send structlog and the standard library's loggers to stderr as JSON lines.

    The supervisor that started the daemon points stderr at its log file.
    """
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for noisy in ("asyncio", "uvicorn.error", "huggingface_hub", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(max(number, logging.WARNING))
    structlog.contextvars.bind_contextvars(role=role)


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a part."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger
