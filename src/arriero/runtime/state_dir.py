"""Where does a pool keep its state, and who runs in it?  (`ARRIERO_HOME`)"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import RunRecord, WorkerRunRecord
from arriero.runtime.processes import Identity, is_alive

T = TypeVar("T")


class StateDir:
    """Paths below one `ARRIERO_HOME`, and the run files in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run = home / "run"
        self.workers = home / "run" / "workers"
        self.logs = home / "logs"
        self.models = home / "models"
        #: Not among the run files: its number must only rise, also from one agent to the next.
        self.lease_file = home / "lease.json"
        self.catalog_db = home / "catalog.db"
        self.orchestrator_db = home / "orchestrator.db"

    def prepare(self) -> None:
        """Make the folders, private to the user.

        Raises STATE_DIR_UNUSABLE if that is not possible.
        """
        try:
            for folder in (self.home, self.run, self.workers, self.logs, self.models):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe_writable(self.run)
        except OSError as error:
            raise ArrieroError(
                ErrorCode.STATE_DIR_UNUSABLE, f"the state folder cannot be written: {error.strerror}"
            ) from error

    def run_file(self, role: str) -> Path:
        """Return the path of `run/ROLE.json`; roles are `orchestrator` and `agent`."""
        return self.run / f"{role}.json"

    def log_file(self, name: str) -> Path:
        """Return the path of a log."""
        return self.logs / f"{name}.log"

    def running(self, role: str) -> RunRecord | None:
        """Return the record of the daemon that runs here; None if none does (a stale file is ignored)."""
        record = read(self.run_file(role), RunRecord)
        return record if record is not None and is_alive(run_identity(record)) else None

    def recorded(self, role: str) -> RunRecord | None:
        """Return the record of the daemon that ran here last, alive or not."""
        return read(self.run_file(role), RunRecord)

    def worker_files(self) -> list[Path]:
        """Return the paths of all worker run records."""
        return sorted(self.workers.glob("w-*.json"))

    def worker_runs(self) -> list[WorkerRunRecord]:
        """Return the run records of all workers, alive or not; unreadable ones are left out."""
        found = (read(path, WorkerRunRecord) for path in self.worker_files())
        return [record for record in found if record is not None]

    def worker_file(self, worker_id: str) -> Path:
        """Return the path of a worker's run record."""
        return self.workers / f"{worker_id}.json"

    @contextlib.contextmanager
    def lock(self, role: str) -> Iterator[None]:
        """Hold the lock of a daemon's role.  Raises ALREADY_RUNNING if another process holds it."""
        fd = os.open(self.run / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ArrieroError(
                    ErrorCode.ALREADY_RUNNING, f"an {role} runs already with this state folder"
                ) from error
            yield
        finally:
            os.close(fd)


def probe_writable(folder: Path) -> None:
    """Return if files can be made in a folder.  Raises OSError if not."""
    import tempfile

    with tempfile.TemporaryFile(dir=folder):
        pass


def run_identity(record: RunRecord) -> Identity:
    """Return the process that a daemon's record speaks of."""
    return Identity(record.pid, record.pid_start_ticks, record.boot_id)


def worker_identity(run: WorkerRunRecord) -> Identity:
    """Return the process that a worker's record speaks of."""
    return Identity(run.record.pid, run.pid_start_ticks, run.boot_id)


def read(path: Path, kind: type[T]) -> T | None:
    """Return a JSON file's content; None if it is not there or not whole."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write(path: Path, value: object) -> None:
    """Write a JSON file (0600) so that a reader sees the old one or the new one, never a half."""
    # Not needed by those who only read, and 15 ms to import.
    import tempfile

    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(value))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def short_dir() -> Path:
    """Return a short folder of this user's own (0700) for unix sockets: their paths end at 107 bytes.

    Raises STATE_DIR_UNUSABLE if another user's file stands in its place.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if not base.is_absolute() or len(str(base)) > 40 or not os.access(base, os.W_OK):
        base = Path("/tmp")
    folder = base / f"arriero-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ArrieroError(ErrorCode.STATE_DIR_UNUSABLE, "the folder for sockets is not ours alone")
    return folder


def orchestrator_dir(home: Path) -> Path:
    """Return where the orchestrator of a state folder has its ends of SSH connections (not made yet)."""
    import hashlib

    return short_dir() / f"o-{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"


def socket_dir(worker_id: str) -> Path:
    """Return where a worker's engine puts its socket (not made yet)."""
    return short_dir() / worker_id
