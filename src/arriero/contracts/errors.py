"""Which errors exist, and what does each mean to HTTP, to the shell and to a person?

One row a code.  HTTP bodies, SSE errors, CLI messages and the page docs/reference/errors.md all
read the row; programs match on the code, never on text.
"""

import enum
import re
import shlex
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import msgspec


class Exit(enum.IntEnum):
    """Exit codes of every command and probe."""

    OK = 0
    ERROR = 1
    USAGE = 2
    TIMEOUT = 124
    INTERRUPTED = 130
    KILLED = 137


class ErrorCode(enum.StrEnum):
    """Every code; its row is in `KINDS`."""

    SSE_CONNECTION_FAILED = "SSE_CONNECTION_FAILED"
    SSE_CONNECTION_ERROR = "SSE_CONNECTION_ERROR"
    SSE_CONNECTION_TIMEOUT = "SSE_CONNECTION_TIMEOUT"
    NO_WORKERS = "NO_WORKERS"
    PROGRESS_STREAM_FAILED = "PROGRESS_STREAM_FAILED"
    PROGRESS_STREAM_ERROR = "PROGRESS_STREAM_ERROR"
    PROGRESS_STREAM_TIMEOUT = "PROGRESS_STREAM_TIMEOUT"
    TOKEN_STREAM_FAILED = "TOKEN_STREAM_FAILED"
    TOKEN_STREAM_ERROR = "TOKEN_STREAM_ERROR"
    TOKEN_STREAM_TIMEOUT = "TOKEN_STREAM_TIMEOUT"
    TOKEN_COUNT_MISMATCH = "TOKEN_COUNT_MISMATCH"
    WORKER_UNHEALTHY = "WORKER_UNHEALTHY"
    HEALTH_CHECK_ERROR = "HEALTH_CHECK_ERROR"
    WORKER_STATE_MISMATCH = "WORKER_STATE_MISMATCH"
    UNKNOWN_WORKER_STATE = "UNKNOWN_WORKER_STATE"
    INVALID_STATE_TRANSITION = "INVALID_STATE_TRANSITION"
    WORKER_START_FAILED = "WORKER_START_FAILED"
    WORKER_BINARY_NOT_FOUND = "WORKER_BINARY_NOT_FOUND"
    WORKER_READY_TIMEOUT = "WORKER_READY_TIMEOUT"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    LOADING_TIMEOUT = "LOADING_TIMEOUT"
    WORKER_ALREADY_REGISTERED = "WORKER_ALREADY_REGISTERED"
    NO_READY_WORKERS = "NO_READY_WORKERS"
    INVALID_MODEL_REFERENCE = "INVALID_MODEL_REFERENCE"
    INVALID_MODEL_PATH = "INVALID_MODEL_PATH"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_ACCESS_DENIED = "MODEL_ACCESS_DENIED"
    MODEL_CORRUPTED = "MODEL_CORRUPTED"
    MODEL_IN_USE = "MODEL_IN_USE"
    DOWNLOAD_FAILED = "DOWNLOAD_FAILED"
    DOWNLOAD_TIMEOUT = "DOWNLOAD_TIMEOUT"
    INSUFFICIENT_DISK = "INSUFFICIENT_DISK"
    INSUFFICIENT_RAM = "INSUFFICIENT_RAM"
    INSUFFICIENT_VRAM = "INSUFFICIENT_VRAM"
    BACKEND_UNAVAILABLE = "BACKEND_UNAVAILABLE"
    DEVICE_NOT_FOUND = "DEVICE_NOT_FOUND"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_NOT_FOUND = "NODE_NOT_FOUND"
    NODE_ALREADY_EXISTS = "NODE_ALREADY_EXISTS"
    NODE_UNREACHABLE = "NODE_UNREACHABLE"
    NODE_DRAINING = "NODE_DRAINING"
    LEASE_SUPERSEDED = "LEASE_SUPERSEDED"
    SSH_KEY_UNUSABLE = "SSH_KEY_UNUSABLE"
    SSH_AUTH_FAILED = "SSH_AUTH_FAILED"
    SSH_HOST_KEY_UNKNOWN = "SSH_HOST_KEY_UNKNOWN"
    SSH_HOST_KEY_CHANGED = "SSH_HOST_KEY_CHANGED"
    SSH_COMMAND_FAILED = "SSH_COMMAND_FAILED"
    PLATFORM_UNSUPPORTED = "PLATFORM_UNSUPPORTED"
    PYTHON_NOT_FOUND = "PYTHON_NOT_FOUND"
    PYTHON_TOO_OLD = "PYTHON_TOO_OLD"
    INSTALL_PATH_UNUSABLE = "INSTALL_PATH_UNUSABLE"
    PACKAGE_UNAVAILABLE = "PACKAGE_UNAVAILABLE"
    INSTALL_FAILED = "INSTALL_FAILED"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    ALL_SLOTS_BUSY = "ALL_SLOTS_BUSY"
    QUEUE_FULL = "QUEUE_FULL"
    NO_CAPACITY = "NO_CAPACITY"
    MODEL_LOADING = "MODEL_LOADING"
    CIRCUIT_OPEN = "CIRCUIT_OPEN"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    REQUEST_CANCELLED = "REQUEST_CANCELLED"
    STREAM_STALLED = "STREAM_STALLED"
    WORKER_LOST = "WORKER_LOST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    MISSING_API_KEY = "MISSING_API_KEY"
    INVALID_API_KEY = "INVALID_API_KEY"
    FORBIDDEN = "FORBIDDEN"
    RATE_LIMITED = "RATE_LIMITED"
    INVALID_REQUEST = "INVALID_REQUEST"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    NOT_FOUND = "NOT_FOUND"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    PORT_IN_USE = "PORT_IN_USE"
    STATE_DIR_UNUSABLE = "STATE_DIR_UNUSABLE"
    INVALID_SETTINGS = "INVALID_SETTINGS"
    ALREADY_RUNNING = "ALREADY_RUNNING"
    NOT_RUNNING = "NOT_RUNNING"
    DAEMON_START_FAILED = "DAEMON_START_FAILED"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """The row of one code."""

    http_status: int
    exit_code: Exit
    #: Whether the same request, sent again later, may succeed without anybody changing anything.
    is_retryable: bool
    meaning: str
    what_to_do: str


def _row(
    http_status: int, meaning: str, what_to_do: str, *, retry: bool = False, exit_code: Exit = Exit.ERROR
) -> ErrorKind:
    return ErrorKind(http_status, exit_code, retry, meaning, what_to_do)


def _timeout(meaning: str, what_to_do: str) -> ErrorKind:
    return ErrorKind(504, Exit.TIMEOUT, True, meaning, what_to_do)


C = ErrorCode
KINDS: Final[dict[ErrorCode, ErrorKind]] = {
    C.SSE_CONNECTION_FAILED: _row(502, "An event stream answered with a status other than 2xx.", "Check the address; details carry the status.", retry=True),
    C.SSE_CONNECTION_ERROR: _row(502, "An event stream could not be reached, or broke.", "Check that the program behind the address runs: `arriero status`.", retry=True),
    C.SSE_CONNECTION_TIMEOUT: _timeout("An event stream did not answer, or fell silent, within its limit.", "Check the load of the machine, or give a larger --timeout."),
    C.NO_WORKERS: _row(404, "No worker is registered that the question could be about.", "Start one: `arriero infer --model REF`, or `arriero probe worker-spawn --model REF`.", retry=True),
    C.PROGRESS_STREAM_FAILED: _row(502, "A worker's progress stream answered with a status other than 2xx.", "Look at `arriero workers logs ID`.", retry=True),
    C.PROGRESS_STREAM_ERROR: _row(502, "A worker's progress stream could not be reached, or ended before `ready`.", "Look at `arriero workers logs ID`.", retry=True),
    C.PROGRESS_STREAM_TIMEOUT: _timeout("A worker's progress stream did not come to `ready` in time.", "Give a larger --timeout, or look at `arriero workers logs ID`."),
    C.TOKEN_STREAM_FAILED: _row(502, "A token stream answered with a status other than 2xx.", "The message says what the worker answered.", retry=True),
    C.TOKEN_STREAM_ERROR: _row(502, "A token stream could not be reached, or broke before its end.", "Look at `arriero workers logs ID`, then try again.", retry=True),
    C.TOKEN_STREAM_TIMEOUT: _timeout("A token stream did not come to its end in time.", "Give a larger --timeout, or ask for fewer tokens."),
    C.TOKEN_COUNT_MISMATCH: _row(500, "A stream brought another number of tokens than expected.", "Compare `expected` and `actual` in the details."),
    C.WORKER_UNHEALTHY: _row(503, "A worker's health route answered, but not that it is well.", "Look at `arriero workers logs ID`; `arriero workers stop ID` and ask again.", retry=True),
    C.HEALTH_CHECK_ERROR: _row(502, "A worker's health route could not be reached, or did not answer in time.", "Look at `arriero workers list` and `arriero workers logs ID`.", retry=True),
    C.WORKER_STATE_MISMATCH: _row(409, "A worker is in another state than expected.", "Compare `expected` and `actual` in the details."),
    C.UNKNOWN_WORKER_STATE: _row(400, "A worker state was named that does not exist.", "Use one of: starting, loading, idle, busy, draining, stopped, failed."),
    C.INVALID_STATE_TRANSITION: _row(409, "A worker was seen, or asked, to go where no arrow leads.", "The states and their arrows are in docs/reference/states.md."),
    C.WORKER_START_FAILED: _row(500, "A worker's process ended before it was of use, or its model is refused for a while after crashing.", "The details carry its exit code and last log lines."),
    C.WORKER_BINARY_NOT_FOUND: _row(500, "The program that should become a worker does not exist or may not be run.", "Install arriero again, or correct ARRIERO_WORKER_COMMAND."),
    C.WORKER_READY_TIMEOUT: _timeout("A worker's process did not call back in time.", "Look at `arriero workers logs ID` and at the machine's load."),
    C.WORKER_NOT_FOUND: _row(404, "No worker has this id.", "`arriero workers list` shows those there are."),
    C.LOADING_TIMEOUT: _timeout("A model's loading stopped advancing.", "Check the disk and the memory of the machine; `arriero workers logs ID`."),
    C.WORKER_ALREADY_REGISTERED: _row(409, "A worker with this id is registered already.", "A restart is a new worker with a new id."),
    C.NO_READY_WORKERS: _row(503, "There are workers, but none is ready.", "Wait for loading to end: `arriero probe loading-progress`.", retry=True),
    C.INVALID_MODEL_REFERENCE: _row(400, "A model reference has none of the accepted forms.", "Use hf:org/repo[:QUANT][@revision], hf:org/repo/path/file.gguf, file:///abs/path.gguf, https://host/file.gguf, or demo."),
    C.INVALID_MODEL_PATH: _row(400, "A model's path does not exist, is no regular file, or may not be read.", "Check the path and its rights."),
    C.MODEL_NOT_FOUND: _row(404, "The model is not there.", "Check the reference; `arriero models list` shows what this machine has."),
    C.MODEL_ACCESS_DENIED: _row(403, "The source of a model refuses access.", "Set HF_TOKEN, or accept the model's licence on its page."),
    C.MODEL_CORRUPTED: _row(422, "A model's file is not what it should be.", "Fetch it again, or check where it came from."),
    C.MODEL_IN_USE: _row(409, "A worker has the model loaded.", "`arriero workers stop ID` first."),
    C.DOWNLOAD_FAILED: _row(502, "A download ended without the whole file.", "Try again: it goes on where it stopped.", retry=True),
    C.DOWNLOAD_TIMEOUT: _timeout("A download brought no byte for too long, in every attempt.", "Check the network, then try again: it goes on where it stopped."),
    C.INSUFFICIENT_DISK: _row(507, "The disk has too little room.", "Make room (`arriero models prune SIZE`), or move ARRIERO_HOME to a larger disk."),
    C.INSUFFICIENT_RAM: _row(507, "The machine, or its memory limit, has too little memory free for the model.", "Use a smaller quantisation, a smaller context, or stop a worker."),
    C.INSUFFICIENT_VRAM: _row(507, "The device has too little memory free for the model.", "Use a smaller quantisation, or --backend cpu."),
    C.BACKEND_UNAVAILABLE: _row(400, "The backend asked for cannot be used on this machine.", "`arriero doctor` shows which can; nothing falls back to the CPU by itself."),
    C.DEVICE_NOT_FOUND: _row(404, "The device asked for does not exist on this machine.", "`arriero doctor` shows those there are."),
    C.OUT_OF_MEMORY: _row(507, "The kernel killed a worker or its engine for memory.", "Use a smaller quantisation or context, or raise the memory limit.", exit_code=Exit.KILLED),
    C.NODE_NOT_FOUND: _row(404, "No node has this name.", "`arriero nodes list` shows those there are."),
    C.NODE_ALREADY_EXISTS: _row(409, "A node has this name already.", "Use another name, or remove the old node first."),
    C.NODE_UNREACHABLE: _row(503, "The node does not answer.", "`arriero nodes show NAME` tells why and since when; `arriero nodes doctor NAME` looks for the cause.", retry=True),
    C.NODE_DRAINING: _row(503, "The node takes no new work.", "`arriero nodes undrain NAME`, or ask for another node.", retry=True),
    C.LEASE_SUPERSEDED: _row(409, "The work was given away while the node was cut off, or another orchestrator holds the node.", "Nothing: whoever holds the node now has the answer. `arriero nodes show NAME` tells who."),
    C.SSH_KEY_UNUSABLE: _row(400, "A private key's file is not there, is no key, has a passphrase, or can be read by others.", "Check the path; `chmod 600` the file; a key with a passphrase goes into ssh-agent."),
    C.SSH_AUTH_FAILED: _row(502, "The machine refused the login.", "Check the user name and the key."),
    C.SSH_HOST_KEY_UNKNOWN: _row(502, "The machine's host key is not known.", "Compare the fingerprint, then accept it."),
    C.SSH_HOST_KEY_CHANGED: _row(502, "The machine shows another host key than the one that is known.", "If the machine was installed anew, accept its new key: `arriero nodes update NAME --accept-host-key FINGERPRINT`; if not, somebody may stand in between."),
    C.SSH_COMMAND_FAILED: _row(502, "A command on the other machine failed.", "The details carry its exit code and output."),
    C.PLATFORM_UNSUPPORTED: _row(422, "The machine's system or processor is none that arriero runs on.", "Linux or macOS on x86-64 or ARM64."),
    C.PYTHON_NOT_FOUND: _row(422, "The machine has no Python.", "Install Python 3.11 or newer there."),
    C.PYTHON_TOO_OLD: _row(422, "The machine's Python is too old.", "Install Python 3.11 or newer there, beside the old one."),
    C.INSTALL_PATH_UNUSABLE: _row(422, "The folder of the installation on the machine cannot be written.", "Check its rights and the mount, or give another one with --install-path."),
    C.PACKAGE_UNAVAILABLE: _row(502, "A package cannot be had for the machine's system, processor and Python.", "The details name it; put its wheel into ARRIERO_HOME/dist/wheels, or use another Python there."),
    C.INSTALL_FAILED: _row(502, "The installation on the machine did not come to its end.", "The details carry the last lines; the same command goes on where it stopped."),
    C.VERSION_MISMATCH: _row(409, "Two parts speak different versions.", "`arriero nodes upgrade NAME`, or install the same version on both sides."),
    C.ALL_SLOTS_BUSY: _row(503, "All slots compute, and the caller asked not to queue.", "Try again, or allow queueing.", retry=True),
    C.QUEUE_FULL: _row(429, "The queue of a worker is full.", "Try again later, or start a second worker.", retry=True),
    C.NO_CAPACITY: _row(503, "No node can hold this model now.", "Wait, stop a worker, or add a node.", retry=True),
    C.MODEL_LOADING: _row(503, "The model is still loading.", "Wait: `arriero probe loading-progress`.", retry=True),
    C.CIRCUIT_OPEN: _row(503, "A part failed too often in a row and is left alone for a while.", "Wait a minute; look at its logs.", retry=True),
    C.REQUEST_TIMEOUT: _timeout("The request's deadline passed.", "Give a larger --timeout, or ask for fewer tokens."),
    C.REQUEST_CANCELLED: _row(499, "The request was cancelled.", "Nothing: somebody wanted this.", exit_code=Exit.INTERRUPTED),
    C.STREAM_STALLED: _row(504, "A stream brought no token for too long.", "Look at `arriero workers logs ID`.", retry=True),
    C.WORKER_LOST: _row(502, "The worker, or its engine, died in the middle of the answer.", "Ask again: a new worker is started. `arriero workers logs ID` has its last words.", retry=True),
    C.CONTEXT_LENGTH_EXCEEDED: _row(400, "The prompt does not fit into the model's context.", "Shorten the prompt."),
    C.MISSING_API_KEY: _row(401, "The request carries no key.", "Send `Authorization: Bearer KEY`; set ARRIERO_API_KEY for the CLI."),
    C.INVALID_API_KEY: _row(401, "The request's key is not one of ours.", "Check the key."),
    C.FORBIDDEN: _row(403, "The request comes from where none is accepted (Host or Origin).", "Use the loopback address; a web page is not a client."),
    C.RATE_LIMITED: _row(429, "Too many requests with this key.", "Wait as long as Retry-After says.", retry=True),
    C.INVALID_REQUEST: _row(400, "The request is not valid.", "The message names the field, the value and the limit."),
    C.REQUEST_TOO_LARGE: _row(413, "The request's body is larger than 10 MB (64 MB for a backup of the catalog).", "Send less."),
    C.NOT_FOUND: _row(404, "There is no such route or thing.", "docs/reference/http.md lists the routes."),
    C.REQUEST_ID_IN_USE: _row(409, "A request with this id is in flight already.", "Use a new X-Request-Id for each request."),
    C.PORT_IN_USE: _row(500, "The port is taken by another program.", "Choose another port, or 0 for a free one."),
    C.STATE_DIR_UNUSABLE: _row(500, "The state folder cannot be written.", "Check the rights of ARRIERO_HOME, or set it to another folder."),
    C.INVALID_SETTINGS: _row(500, "The settings are not valid.", "The message lists every problem; docs/reference/settings.md lists the settings.", exit_code=Exit.USAGE),
    C.ALREADY_RUNNING: _row(409, "A daemon of this kind runs already with this state folder.", "`arriero status` shows it; `arriero down` stops it."),
    C.NOT_RUNNING: _row(503, "No orchestrator or agent runs with this state folder.", "Start one: `arriero up`.", retry=True),
    C.DAEMON_START_FAILED: _row(500, "A daemon ended before it answered.", "The details carry the last lines of its log."),
    C.INTERNAL_ERROR: _row(500, "A fault in arriero itself.", "Please report it, with the log lines of this request id."),
}  # fmt: skip
del C
assert KINDS.keys() == set(ErrorCode), "every code has a row"


#: What stands in a row's advice for something that an error's details may name.
_PLACES: Final = {"NAME": "node", "ID": "worker_id", "FINGERPRINT": "fingerprint"}
_PLACE: Final = re.compile(rf"\b(?:{'|'.join(_PLACES)})\b")


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong: the same in HTTP bodies, SSE errors, probes and `--json`.

    Never holds tokens, keys, prompts or absolute paths of a server.
    """

    code: str
    message: str
    details: dict[str, Any] = {}
    #: OpenAI's fields, set on the OpenAI routes alone.
    type: str | None = None
    param: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """The envelope `{"error": {…}}`."""

    error: ErrorBody


class ArrieroError(Exception):
    """An expected failure.  `message` names the thing, the value and the limit."""

    def __init__(self, code: ErrorCode, message: str = "", **details: Any) -> None:
        self.code = code
        self.message = message or KINDS[code].meaning
        self.details: dict[str, Any] = details
        super().__init__(f"{code}: {self.message}")

    @property
    def kind(self) -> ErrorKind:
        """The row of its code."""
        return KINDS[self.code]

    @property
    def advice(self) -> str:
        """What its details suggest, else its row: with the names that the details know."""
        given = self.details.get("suggested_action")
        return str(given) if given else _PLACE.sub(self._named, self.kind.what_to_do)

    def _named(self, place: re.Match[str]) -> str:
        known = self.details.get(_PLACES[place[0]])
        return shlex.quote(str(known)) if known else place[0]

    def body(self) -> ErrorBody:
        """Return the wire form, with its advice as `suggested_action`."""
        return ErrorBody(self.code.value, self.message, {**self.details, "suggested_action": self.advice})

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.code, self.message, self.details))


def _rebuild(code: ErrorCode, message: str, details: dict[str, Any]) -> ArrieroError:
    error = ArrieroError(code, message)
    # Not as arguments: what comes from elsewhere may be called as one of ours.
    error.details = dict(details)
    return error


def from_body(body: ErrorBody) -> ArrieroError:
    """Return the error that crossed the wire as `body`; an unknown code becomes INTERNAL_ERROR."""
    try:
        code = ErrorCode(body.code)
    except ValueError:
        return _rebuild(ErrorCode.INTERNAL_ERROR, f"{body.code}: {body.message}", body.details)
    return _rebuild(code, body.message, body.details)


def fail(code: ErrorCode, message: str = "", **details: Any) -> NoReturn:
    """Raise `ArrieroError(code, message, **details)`."""
    raise ArrieroError(code, message, **details)


#: OpenAI's `type` for an HTTP status, so that its SDKs choose the right exception class.
OPENAI_TYPES: Final[dict[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def openai_body(error: ArrieroError, *, param: str | None = None) -> ErrorBody:
    """Return `error` as the OpenAI routes send it: the same object with `type` and `param`."""
    plain = error.body()
    kind = OPENAI_TYPES.get(error.kind.http_status, "server_error")
    named = param if param is not None else error.details.get("param")
    return ErrorBody(plain.code, plain.message, plain.details, type=kind, param=named)
