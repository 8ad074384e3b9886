"""Which states do worker, node, download and task have?  The arrows are in `domain`."""

import enum


class WorkerState(enum.StrEnum):
    """States of a worker; STOPPED and FAILED are final, a restart is a new worker."""

    #: The process is spawned; its HTTP server has not called back yet.
    STARTING = "starting"
    #: The HTTP server answers; the engine loads the model.
    LOADING = "loading"
    #: The model is loaded, no slot computes.
    IDLE = "idle"
    #: At least one slot computes.
    BUSY = "busy"
    #: Takes no new request; ends when the running ones have.
    DRAINING = "draining"
    STOPPED = "stopped"
    #: Ended without being asked to, or never became of use.
    FAILED = "failed"


class NodeState(enum.StrEnum):
    """States of a node, as the orchestrator sees it."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    UNREACHABLE = "unreachable"
    REMOVED = "removed"


class DownloadState(enum.StrEnum):
    """States of a download; COMPLETE, FAILED and CANCELLED are final."""

    QUEUED = "queued"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskState(enum.StrEnum):
    """States of a task; DONE, FAILED, CANCELLED and TIMED_OUT are final."""

    ACCEPTED = "accepted"
    QUEUED = "queued"
    PLACING = "placing"
    #: A worker is being made ready: download, spawn, loading.
    PROVISIONING = "provisioning"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
