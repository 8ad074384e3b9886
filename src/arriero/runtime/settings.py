"""Which settings are there, and what are they here and now?

Flags over environment over file.  One table: the fields of `Settings`, each with its unit and its
help; docs/reference/settings.md is made from it.
"""

import dataclasses
import os
import socket
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorCode

ENV_PREFIX: Final = "ARRIERO_"
#: Environment variables with our prefix that are no settings.
_NOT_SETTINGS: Final = frozenset({"ARRIERO_CONFIG", "ARRIERO_URL", "ARRIERO_API_KEY"})


def _s(
    default: Any, text: str, *, unit: str = "", low: float | None = None, high: float | None = None
) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of all roles; each role reads its own."""

    home: str = _s(
        "", "Folder of all state: databases, models, logs, run files. Default: the user's data folder."
    )
    node_name: str = _s("", "Name of this machine in the pool. Default: its host name.")
    orchestrator_host: str = _s("127.0.0.1", "Address the orchestrator listens on.")
    orchestrator_port: int = _s(8080, "Port of the orchestrator; 0 takes a free one.", low=0, high=65535)
    agent_port: int = _s(9200, "Port of the agent, on loopback; 0 takes a free one.", low=0, high=65535)
    worker_port_base: int = _s(8001, "First port tried for a worker, on loopback.", low=1, high=65000)
    allowed_hosts: str = _s("", "Host names besides loopback that requests may be addressed to, with commas.")
    default_model: str = _s("demo", "Model of a request that names none.")
    engine: str = _s("llamacpp", "Engine of a worker: llamacpp, or fake (scripted, for tests).")
    engine_options: str = _s("{}", "Options of the engine as a JSON object (the fake engine's knobs).")
    engine_threads: int = _s(
        0,
        "Threads an engine computes with; 0: the machine's physical cores, fewer for a tiny model.",
        low=0,
        high=1024,
    )
    engine_index_url: str = _s(
        "https://xorbitsai.github.io/xllamacpp/whl",
        "Package index of the engine's builds for accelerators; each lies below its name, as in URL/cu128.",
    )
    engine_wheel: str = _s(
        "", "Wheel file of the engine's build that suits this machine: where the index cannot be reached."
    )
    backend: str = _s(
        "",
        "Backend of a request that names none. Default: the best there is; cpu leaves a GPU alone that no "
        "build of the engine computes on.",
    )
    worker_slots: int = _s(4, "Requests a worker computes at a time.", low=1, high=64)
    worker_queue: int = _s(64, "Requests that wait in a worker before it refuses more.", low=0, high=10_000)
    context_tokens_max: int = _s(
        8192, "Context of a slot, where the model's own is larger.", unit="tokens", low=64
    )
    worker_command: str = _s("", "Program that becomes a worker. Default: this installation's own.")
    worker_ready_timeout_s: float = _s(30.0, "Limit for a worker's process to call back.", unit="s", low=0.1)
    loading_stall_s: float = _s(60.0, "Limit for loading without progress.", unit="s", low=0.1)
    stream_stall_s: float = _s(60.0, "Limit for a stream without a token.", unit="s", low=0.1)
    idle_timeout_s: float = _s(
        300.0, "A worker without work for so long is stopped; 0: never.", unit="s", low=0
    )
    orchestrator_idle_s: float = _s(
        600.0, "A background orchestrator without work for so long leaves; 0: never.", unit="s", low=0
    )
    lease_s: float = _s(600.0, "A worker without its agent for so long drains and ends.", unit="s", low=0)
    stop_grace_s: float = _s(30.0, "Time for a graceful stop before SIGKILL.", unit="s", low=0)
    health_interval_s: float = _s(5.0, "Between two health checks of a worker.", unit="s", low=0.05)
    health_failures_max: int = _s(3, "Failed health checks in a row that make a worker unhealthy.", low=1)
    restart_max: int = _s(3, "Crashes of a model within the window before it is refused.", low=1)
    restart_window_s: float = _s(60.0, "The window crashes are counted in.", unit="s", low=0.1)
    connect_timeout_s: float = _s(10.0, "Limit to connect to another part.", unit="s", low=0.1)
    node_timeout_s: float = _s(3.0, "A node that is silent is unreachable within so long.", unit="s", low=0.1)
    starvation_s: float = _s(
        30.0, "A model that waits for another one's place has it after so long.", unit="s", low=0.1
    )
    wake_timeout_s: float = _s(
        120.0, "Limit for a machine that is woken to be in the pool again.", unit="s", low=0.1
    )
    wake_cost_s: float = _s(
        60.0,
        "What waking a machine is reckoned to cost: one waits so long rather than wake it.",
        unit="s",
        low=0,
    )
    wake_address: str = _s(
        "255.255.255.255:9", "Where the packet that wakes a machine is sent: IPv4 address and UDP port."
    )
    download_attempts: int = _s(6, "Attempts of a download without progress in between.", low=1, high=100)
    download_stall_s: float = _s(
        60.0, "A download without a byte for so long is tried again.", unit="s", low=0.1
    )
    download_connections: int = _s(4, "Connections a large file is fetched over at a time.", low=1, high=16)
    download_rate_max_mbps: float = _s(
        0.0, "Limit for all downloads of a machine together; 0: none.", unit="Mbit/s", low=0
    )
    log_level: str = _s("info", "debug, info, warning or error.")
    log_bytes_max: int = _s(
        10_000_000,
        "A log of orchestrator, agent or worker is cut at this size; one older file is kept.",
        unit="bytes",
        low=1000,
    )

    def home_path(self) -> Path:
        """Return the state folder, absolute."""
        if self.home:
            return Path(self.home).expanduser().absolute()
        import platformdirs

        return Path(platformdirs.user_data_dir("arriero"))

    def name_of_node(self) -> str:
        """Return this machine's name in the pool: well formed whatever the host name is."""
        if self.node_name:
            return self.node_name
        host = socket.gethostname().split(".")[0].lower()
        name = "".join(c if c.isalnum() and c.isascii() else "-" for c in host).strip("-")[:63]
        return name or "node"

    def hosts(self) -> frozenset[str]:
        """Return the host names that requests may be addressed to."""
        extra = {name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip()}
        return frozenset({"127.0.0.1", "localhost", "::1", self.orchestrator_host} | extra)


def config_path(env: Mapping[str, str]) -> Path | None:
    """Return the configuration file that counts here; None if there is none."""
    if env.get("ARRIERO_CONFIG"):
        return Path(env["ARRIERO_CONFIG"])
    base = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    for path in (base / "arriero" / "config.toml", Path("/etc/arriero/config.toml")):
        if path.exists():
            return path
    return None


def load(env: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings from file, environment and flags (None among the flags: not given).

    Raises INVALID_SETTINGS with every problem at once.
    """
    env = os.environ if env is None else env
    problems: list[str] = []
    values: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(Settings)}
    types_of = typing.get_type_hints(Settings)
    for source, given in (
        ("file", _from_file(env, problems)),
        ("environment", _from_env(env)),
        ("flag", flags or {}),
    ):
        for name, raw in given.items():
            if raw is None:
                continue
            if name not in known:
                problems.append(f"{source}: there is no setting {name!r}")
                continue
            try:
                values[name] = _convert(raw, types_of[name], known[name].metadata)
            except ValueError as error:
                problems.append(f"{source}: {name}: {error}")
    name = values.get("node_name", "")
    if name and not ids.NODE_NAME.fullmatch(name):
        problems.append(f"node_name: {name!r} is not made of a-z, 0-9 and - alone, 63 at most")
    if problems:
        raise ArrieroError(ErrorCode.INVALID_SETTINGS, "; ".join(problems), problems=problems)
    return Settings(**values)


def _from_file(env: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    path = config_path(env)
    if path is None:
        return {}
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        problems.append(f"file {path}: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"file {path}: {error}")
    return {}


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in sorted(env.items())
        if name.startswith(ENV_PREFIX) and name not in _NOT_SETTINGS and value != ""
    }


def _convert(raw: Any, kind: Any, bounds: types.MappingProxyType[str, Any]) -> Any:
    if kind is str:
        if not isinstance(raw, str):
            raise ValueError(f"{raw!r} is no text")
        return raw
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"{raw!r} is no number")
    try:
        value = kind(raw)
    except ValueError:
        raise ValueError(f"{raw!r} is no {'whole ' if kind is int else ''}number") from None
    if value != value or value in (float("inf"), float("-inf")) or (kind is int and float(raw) != value):
        raise ValueError(f"{raw!r} is no {'whole ' if kind is int else 'finite '}number")
    low, high = bounds["low"], bounds["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{value} is not within {low} … {'∞' if high is None else high}")
    return value
