"""How does a build of the engine come beside the one there is, whole or not at all?

Wheel → a hidden folder → checked → unpacked by pip → loaded in a process of its own and asked for its
devices → renamed in one step.  Whatever fails on the way leaves what was there before.
"""

import asyncio
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from arriero.agent import engine_builds, engine_memory, engine_wheel, pip
from arriero.agent.engine_builds import BuildFile, FoundBuild
from arriero.agent.engine_uploads import Uploads
from arriero.agent.engine_wheel import CheckedWheel
from arriero.agent.machine import Machine
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import EngineBuild
from arriero.contracts.requests import EngineInstallBody
from arriero.domain import engine_builds as choice
from arriero.engines.llamacpp_backends import ask, missing_library
from arriero.runtime import logs, state_dir
from arriero.runtime.clock import Clock
from arriero.runtime.settings import Settings

#: Told while it goes on: what is done, the bytes so far, and those there are in all (0: not known).
Tell = Callable[[str, int, int], None]
_URL: Final = re.compile(r"(https?|file)://[\x21-\x7e]+")
_NO_HINT: Final = "Get the wheel on another machine and give it with --wheel FILE."
#: What pip writes when an index does not answer, and when it answers and has nothing that fits.
_NO_ANSWER: Final = (
    "Retrying (",
    "Could not fetch URL",
    "connection error",
    "There was a problem confirming",
)
_NOTHING: Final = ("No matching distribution", "Could not find a version")
_BAD_HASH: Final = ("DO NOT MATCH THE HASHES",)


class EngineInstaller:
    """Installs builds, one at a time; `on_change` hears of each."""

    def __init__(
        self, *, home: Path, settings: Settings, machine: Machine, uploads: Uploads, clock: Clock,
        on_change: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._home = home
        self._folder = engine_builds.folder_of(home)
        self._settings = settings
        self._machine = machine
        self.uploads = uploads
        self._clock = clock
        self._on_change = on_change
        self._turn = asyncio.Lock()
        self._version = engine_builds.engine_version()
        self._log = logs.get("arriero.agent.engines")

    def plan(self, body: EngineInstallBody) -> str:
        """Return the name of the build that is meant, before anything is done.

        Raises BACKEND_UNAVAILABLE for a machine that no build suits, or without an engine at all;
        INVALID_REQUEST for an address that is none, or an upload that does not fit this machine.
        """
        if not self._version:
            fail(ErrorCode.BACKEND_UNAVAILABLE, f"arriero's environment has no {engine_builds.PACKAGE}")
        wanted = self._machine.wanted_build()
        labelled = self._label_of(body.wheel) if body.wheel is not None else ""
        name = body.build or labelled or wanted.name
        if name == wanted.name and body.build is None and wanted.obstacle:
            fail(
                ErrorCode.BACKEND_UNAVAILABLE,
                f"no build suits {self._machine.node}: {wanted.why}",
                driver_least=wanted.driver_least,
                suggested_action="`arriero engines list` tells more; a BUILD that is named is tried.",
            )
        if not _URL.fullmatch(body.index_url or self._settings.engine_index_url):
            fail(
                ErrorCode.INVALID_REQUEST,
                "index_url is no http://, https:// or file:// address",
                param="index_url",
            )
        return name

    def _label_of(self, wheel: str) -> str:
        """Return the build that a wheel's own label names, as in `2026.10.1+cu128`; empty if none."""
        label = engine_wheel.check_name(wheel, self._machine.platform, self._version).version.partition("+")[
            2
        ]
        return label if choice.backend_of(label) else ""

    async def install(self, body: EngineInstallBody, tell: Tell) -> EngineBuild:
        """Install a build and return it; one that is there already is put in anew.

        The environment's own build is returned as it is.  Raises what `plan` raises,
        PACKAGE_UNAVAILABLE if the index has no such build for this machine, INSTALL_FAILED for
        everything that breaks on the way, BACKEND_UNAVAILABLE if it does not see its card,
        INSUFFICIENT_DISK.
        """
        name = self.plan(body)
        async with self._turn:
            own = next((b for b in self._machine.engine_list().builds if b.is_own and not b.problem), None)
            if own is not None and own.name == name and body.wheel is None:
                return own
            return await self._install(name, body, tell)

    async def _install(self, name: str, body: EngineInstallBody, tell: Tell) -> EngineBuild:
        scratch = await asyncio.to_thread(self._scratch)
        try:
            path = await self._obtain(name, body, scratch, tell)
            tell(f"checking {path.name}", 0, 0)
            wheel = await asyncio.to_thread(
                engine_wheel.check, path, self._machine.platform, self._version, sha256=body.sha256
            )
            made = scratch / "made"
            await self._unpack(wheel, made / engine_builds.SITE, scratch, tell)
            tell(f"loading {name}", 0, 0)
            record = await self._try(name, wheel, made)
            await asyncio.to_thread(self._publish, made, f"{name}-{self._version}")
        finally:
            # Short, and also when cancelled: nothing may stay behind.
            shutil.rmtree(scratch, ignore_errors=True)
            if body.wheel is not None:
                await asyncio.shield(self.uploads.clear())
        await self._look()
        await self._on_change()
        self._log.info("engine_installed", build=name, version=wheel.version, sha256=wheel.sha256)
        return record

    async def look_again(self) -> None:
        """Ask the builds anew: a driver, or a card, may have changed since the agent before asked them."""
        async with self._turn:
            if await self._look():
                self._log.info("engines_changed")
                await self._on_change()

    async def _look(self) -> bool:
        def look() -> tuple[FoundBuild, ...]:
            builds = engine_builds.look(self._home)
            engine_memory.remember(self._home, builds)
            return builds

        return self._machine.take(await asyncio.to_thread(look))

    def _scratch(self) -> Path:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=engine_builds.NEW_PREFIX, dir=self._folder))
        except OSError as error:
            raise ArrieroError(
                ErrorCode.STATE_DIR_UNUSABLE, f"the folder of the engines cannot be written: {error.strerror}"
            ) from error

    # --- The wheel ----------------------------------------------------------------------------

    async def _obtain(self, name: str, body: EngineInstallBody, scratch: Path, tell: Tell) -> Path:
        """Return the wheel, in the hidden folder: uploaded, the settings' file, or from the index."""
        if body.wheel is not None:
            target = scratch / body.wheel
            await self.uploads.take(body.wheel, target)
            return target
        is_suitable = name == self._machine.wanted_build().name
        if self._settings.engine_wheel and is_suitable and body.index_url is None:
            return await asyncio.to_thread(self._copied, Path(self._settings.engine_wheel), scratch, tell)
        if body.build is None and body.index_url is None:
            await self._check_libraries(name)
        return await self._fetch(name, body.index_url or self._settings.engine_index_url, scratch, tell)

    async def _check_libraries(self, name: str) -> None:
        """Know that a build's libraries are there, before some hundred megabytes come for nothing.

        A build that is named, or of an index that is named, is tried: it may bring them along.
        """
        problem = await asyncio.to_thread(missing_library, choice.needed_libraries(name))
        if problem:
            fail(
                ErrorCode.INSTALL_FAILED,
                f"the build {name} could not be loaded: {problem}",
                build=name,
                reason=problem,
                suggested_action=_what_to_do(problem),
            )

    def _copied(self, given: Path, scratch: Path, tell: Tell) -> Path:
        source = given.expanduser()
        engine_wheel.check_name(source.name, self._machine.platform, self._version)
        target = scratch / source.name
        engine_wheel.copy(source, target, lambda done, total: tell(f"copying {source.name}", done, total))
        return target

    async def _fetch(self, name: str, index_url: str, scratch: Path, tell: Tell) -> Path:
        url = f"{index_url.rstrip('/')}/{name}"
        configuration = scratch / "pip.conf"
        await asyncio.to_thread(configuration.write_text, pip.index_configuration(url), "utf-8")
        await asyncio.to_thread(configuration.chmod, 0o600)
        target = scratch / "wheel"
        arguments = (
            "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off",
            "--retries", "2", "--timeout", "15", "--dest", str(target),
            f"{engine_builds.PACKAGE}=={self._version}",
        )  # fmt: skip
        tell(f"fetching {name}", 0, 0)
        done = await pip.run(
            arguments, scratch=scratch, configuration=configuration, clock=self._clock,
            tell=lambda size: tell(f"fetching {name}", size, 0),
        )  # fmt: skip
        found = await asyncio.to_thread(lambda: sorted(target.glob("*.whl")))
        if done.code == 0 and len(found) == 1:
            return found[0]
        raise self._not_fetched(name, shown_url(url), done)

    def _not_fetched(self, name: str, url: str, done: pip.PipDone) -> ArrieroError:
        this = self._machine.platform
        where = f"{this.os} {this.arch}, Python {this.python[0]}.{this.python[1]}"
        if done.has(*_BAD_HASH):
            what = f"the wheel that {url} gave has another checksum than the index names"
        elif done.has(*_NO_ANSWER):
            what = f"the index {url} does not answer"
        elif done.has(*_NOTHING):
            return ArrieroError(
                ErrorCode.PACKAGE_UNAVAILABLE,
                f"{url} has no {engine_builds.PACKAGE} {self._version} for {where}",
                build=name, log_tail=list(done.lines), suggested_action=_NO_HINT,
            )  # fmt: skip
        else:
            what = f"pip could not fetch {name} from {url}"
        return ArrieroError(
            ErrorCode.INSTALL_FAILED, what, build=name, log_tail=list(done.lines),
            suggested_action=f"Check the network and the setting engine_index_url. {_NO_HINT}",
        )  # fmt: skip

    # --- The build ----------------------------------------------------------------------------

    async def _unpack(self, wheel: CheckedWheel, site: Path, scratch: Path, tell: Tell) -> None:
        tell("unpacking", 0, wheel.unpacked_bytes)
        before = wheel.path.stat().st_size
        arguments = (
            "install",
            "--no-deps",
            "--no-index",
            "--no-compile",
            "--target",
            str(site),
            str(wheel.path),
        )
        done = await pip.run(
            arguments, scratch=scratch, configuration=None, clock=self._clock,
            tell=lambda size: tell(
                "unpacking", min(max(0, size - before), wheel.unpacked_bytes), wheel.unpacked_bytes
            ),
        )  # fmt: skip
        if done.code != 0:
            fail(
                ErrorCode.INSTALL_FAILED,
                f"pip could not install {wheel.path.name}",
                log_tail=list(done.lines),
                suggested_action="The last lines of pip say why; is pip there (`python -m ensurepip`)?",
            )

    async def _try(self, name: str, wheel: CheckedWheel, made: Path) -> EngineBuild:
        """Load the build and return its record, which is written beside it."""
        answer = await asyncio.to_thread(ask, made / engine_builds.SITE)
        if answer.problem:
            fail(
                ErrorCode.INSTALL_FAILED,
                f"{wheel.path.name} cannot be loaded: {answer.problem}",
                build=name,
                reason=answer.problem,
                suggested_action=_what_to_do(answer.problem),
            )
        known = BuildFile(
            name=name, version=wheel.version, sha256=wheel.sha256, wheel=wheel.path.name,
            installed_unix=self._clock.wall_s(),
        )  # fmt: skip
        record = engine_builds.described(
            name, wheel.version, answer, sha256=wheel.sha256, installed_unix=known.installed_unix
        )
        engine_builds.refuse_unusable(record, answer, self._machine.devices)
        await asyncio.to_thread(state_dir.write, made / engine_builds.RECORD_NAME, known)
        return record

    def _publish(self, made: Path, name: str) -> None:
        """Put the build in its place; one that was there is replaced, and stays if that fails."""
        place, old = self._folder / name, self._folder / f"{engine_builds.OLD_PREFIX}{name}"
        has_old = place.exists()
        if has_old:
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        try:
            made.rename(place)
        except OSError as error:
            if has_old:
                old.rename(place)
            raise ArrieroError(
                ErrorCode.INSTALL_FAILED, f"the build cannot be put in its place: {error.strerror}"
            ) from error
        # What a worker has loaded of it stays in memory until the worker ends.
        shutil.rmtree(old, ignore_errors=True)


def shown_url(url: str) -> str:
    """Return an address without the name and password that it may hold."""
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()


def _what_to_do(problem: str) -> str:
    if "libcudart" in problem or "libcublas" in problem:
        return (
            "Install NVIDIA's CUDA runtime of the same version there (libcudart and libcublas: the "
            "distribution's or NVIDIA's packages), then the same command again."
        )
    if "libcuda.so" in problem:
        return "Install NVIDIA's driver there, then the same command again."
    return "Take the wheel that is made for that machine, or get it again."
