"""Builds of the engine beside the one there is: real wheels, real pip, a real agent that loads them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.engine_wheels import BROKEN, TAG, VERSION, index, pack, sha256
from tests.support.home import Home

from arriero.agent import engine_builds
from arriero.client.api import Worker
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import EngineBuild
from arriero.contracts.requests import EngineInstallBody, InferenceBody
from arriero.contracts.states import WorkerState
from arriero.testing.agents import AgentProcess, wait_for


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The engine that is installed here, as a wheel of a build of its own."""
    path = pack(tmp_path_factory.mktemp("wheels"), "cu128")
    yield path
    path.unlink()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def install(agent: AgentProcess, **fields: Any) -> EngineBuild:
    return agent.client.install_engine(EngineInstallBody(**fields)).result()


def refused(agent: AgentProcess, **fields: Any) -> ArrieroError:
    with pytest.raises(ArrieroError) as caught:
        install(agent, **fields)
    assert what_is_there(agent.home) == set(), "a build that fails leaves nothing"
    assert [build.is_own for build in agent.client.engines().builds] == [True]
    return caught.value


def what_is_there(home: Path) -> set[str]:
    folder = engine_builds.folder_of(home)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def upload(agent: AgentProcess, path: Path) -> str:
    return agent.client.upload_engine(path, lambda *_: None)


def engine_files(agent: AgentProcess, worker_id: str) -> str:
    """Return the libraries that a worker's engine has in its memory."""
    record = agent.client.worker(worker_id)
    run = next(run for run in agent.state.worker_runs() if run.record.worker_id == worker_id)
    pid = Worker(record.url, run.token).health().engine_pid
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_build_from_an_index_is_used_and_survives_the_agent(
    home: Path, tmp_path: Path, wheel: Path
) -> None:
    with (
        index(tmp_path / "index", {"cu128": [wheel]}, digests={wheel: sha256(wheel)}) as url,
        AgentProcess(home, {"engine_index_url": url}) as agent,
    ):
        before = agent.spawn(slots=1, context_tokens=256)
        agent.wait_worker(before.worker_id, WorkerState.IDLE)
        told = []
        stream = agent.client.install_engine(EngineInstallBody(build="cu128"))
        with stream:
            told = [frame.what for frame in stream]
            made = stream.result()
        assert (made.name, made.version, made.problem) == ("cu128", f"{VERSION}+cu128", "")
        assert made.sha256 == sha256(wheel) and made.backends == ["cpu"]
        assert told[0] == "fetching cu128" and told[-1] == "loading cu128" and "unpacking" in told
        assert what_is_there(home) == {f"cu128-{VERSION}"}
        site = engine_builds.folder_of(home) / f"cu128-{VERSION}" / "site"
        assert str(site) not in engine_files(agent, before.worker_id)
        answer = agent.client.worker(before.worker_id)
        assert answer.state is WorkerState.IDLE, "what is loaded goes on"
        listed = agent.client.engines()
        assert [(build.name, build.is_own) for build in listed.builds] == [("cpu", True), ("cu128", False)]
        agent.terminate()
        with AgentProcess(home) as second:
            assert second.client.engines().builds[1:] == [made]


def test_an_engine_is_loaded_from_the_build_beside(home: Path, wheel: Path, tmp_path: Path) -> None:
    # The environment's own comes first on the CPU: here the worker is told of the other by hand.
    with AgentProcess(home) as agent:
        install(agent, wheel=upload(agent, wheel), sha256=sha256(wheel))
        site = engine_builds.folder_of(home) / f"cu128-{VERSION}" / "site"
        shim = tmp_path / "worker"
        shim.write_text(
            "import json, os, subprocess, sys\n"
            "spec = json.loads(sys.stdin.readline())\n"
            f"spec['engine_folder'] = {str(site)!r}\n"
            "read, write = os.pipe()\n"
            "os.write(write, (json.dumps(spec) + '\\n').encode()); os.close(write); os.dup2(read, 0)\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'arriero', 'worker'])\n"
        )
        agent.terminate()
    import sys

    with AgentProcess(home, {"worker_command": f"{sys.executable} {shim}"}) as agent:
        record = agent.spawn(slots=1, context_tokens=256)
        idle = agent.wait_worker(record.worker_id, WorkerState.IDLE)
        assert str(site) in engine_files(agent, idle.worker_id)
        run = next(run for run in agent.state.worker_runs() if run.record.worker_id == idle.worker_id)
        answer = Worker(idle.url, run.token).infer(InferenceBody(prompt="Count from 5 to 9.", max_tokens=4))
        assert answer.total_tokens == 4


def test_the_settings_file_is_taken_and_replaces_what_was_there(
    home: Path, wheel: Path, tmp_path: Path
) -> None:
    mine = pack(tmp_path, "mine", content={"xllamacpp/__init__.py": ENOUGH})
    with AgentProcess(home, {"engine_wheel": str(mine)}) as agent:
        # The build that suits this machine is arriero's own: another name is what is asked for.
        own = install(agent)
        assert own.is_own and what_is_there(home) == set()
        first = install(agent, build="vulkan", wheel=upload(agent, mine))
        again = install(agent, build="vulkan", wheel=upload(agent, mine))
        assert first.sha256 == again.sha256 and again.installed_unix >= first.installed_unix
        assert what_is_there(home) == {f"vulkan-{VERSION}"}
        assert again.devices == ["vulkan:0 A card"] and again.backends == ["vulkan"]
        found = agent.client.capabilities()
        assert found.backends == ["vulkan", "cpu"], "the new build's backend is offered at once"
        assert [device.id for device in found.devices] == ["cpu", "vulkan:0"]
        agent.kill()
        # The next agent begins with what this one knew, and finds by itself that the card is gone.
        module = engine_builds.folder_of(home) / f"vulkan-{VERSION}" / "site/xllamacpp/__init__.py"
        module.write_bytes(b"raise ImportError('no card')")
        agent.start()
        wait_for(lambda: agent.client.capabilities().backends == ["cpu"], "the card is missed")
        assert "engines_changed" in agent.log


#: Just so much of the engine that it can be asked for its devices.
ENOUGH = b"""
def get_device_info():
    return [{"name": "Vulkan0", "description": "A card", "memory_total": 8 << 30, "memory_free": 7 << 30}]
"""


@pytest.mark.parametrize(
    ("code", "why", "fields"),
    [
        (ErrorCode.INVALID_REQUEST, "is no wheel of xllamacpp", {"name": "other"}),
        (ErrorCode.INVALID_REQUEST, "is of version 1.0", {"version": "1.0"}),
        (ErrorCode.INVALID_REQUEST, "is for win_amd64", {"tag": "cp310-abi3-win_amd64"}),
        (ErrorCode.INVALID_REQUEST, "is for macosx_13_0_arm64", {"tag": "cp310-abi3-macosx_13_0_arm64"}),
        (ErrorCode.INVALID_REQUEST, "is for Python cp399", {"tag": f"cp399-abi3-{TAG.split('-', 2)[2]}"}),
    ],
)
def test_a_wheel_that_cannot_be_meant_is_refused_before_a_byte_is_kept(
    home: Path, tmp_path: Path, code: ErrorCode, why: str, fields: dict[str, str]
) -> None:
    path = pack(tmp_path, content={"x/__init__.py": b""}, **fields)
    with AgentProcess(home) as agent:
        with pytest.raises(ArrieroError) as caught:
            upload(agent, path)
        assert caught.value.code is code and why in caught.value.message
        told = refused(agent, build="cu128", wheel=path.name)
        assert told.code is code and why in told.message


def test_a_broken_wheel_leaves_nothing(home: Path, tmp_path: Path) -> None:
    broken = pack(tmp_path, "cu128", content=BROKEN)
    with AgentProcess(home) as agent:
        unloadable = refused(agent, wheel=upload(agent, broken))
        assert unloadable.code is ErrorCode.INSTALL_FAILED
        assert "no_such_module_at_all" in unloadable.message
        wrong = refused(agent, wheel=upload(agent, broken), sha256="0" * 64)
        assert wrong.code is ErrorCode.INSTALL_FAILED and wrong.details["actual"] == sha256(broken)
        never = refused(agent, wheel=broken.name)
        assert never.code is ErrorCode.INVALID_REQUEST and "was not uploaded" in never.message
        whole = broken.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"no zip at all" * 100):
            broken.write_bytes(content)
            cut = refused(agent, wheel=upload(agent, broken))
            assert cut.code is ErrorCode.INSTALL_FAILED and "no whole wheel" in cut.message
        lies = pack(tmp_path, "cu132", content=BROKEN)
        lies.rename(broken)
        inside = refused(agent, wheel=upload(agent, broken))
        assert inside.code is ErrorCode.INSTALL_FAILED and "+cu132 within" in inside.message


def test_what_an_index_does_not_have_or_gives_wrongly(home: Path, tmp_path: Path) -> None:
    other = pack(tmp_path, "cu128", content=BROKEN, tag="cp310-abi3-win_amd64")
    mine = pack(tmp_path, "cu132", content=BROKEN)
    builds = {"cu128": [other], "cu132": [mine]}
    with (
        index(tmp_path / "index", builds, digests={mine: "1" * 64}) as url,
        AgentProcess(home, {"engine_index_url": url}) as agent,
    ):
        foreign = refused(agent, build="cu128")
        assert (
            foreign.code is ErrorCode.PACKAGE_UNAVAILABLE and f"xllamacpp {VERSION} for " in foreign.message
        )
        assert refused(agent, build="rocm-7.2.4").code is ErrorCode.PACKAGE_UNAVAILABLE
        changed = refused(agent, build="cu132")
        assert changed.code is ErrorCode.INSTALL_FAILED and "another checksum" in changed.message
        assert refused(agent, build="vulkan").code is ErrorCode.PACKAGE_UNAVAILABLE
    # What else pip is configured to look into has the CPU's build of that version, which is not meant.
    (tmp_path / "near").mkdir()
    near = pack(tmp_path / "near", content={"xllamacpp/__init__.py": ENOUGH})
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.conf").write_text(f"[global]\nfind-links = {near.parent}\n")
    other_sources = {"PIP_FIND_LINKS": str(near.parent), "XDG_CONFIG_HOME": str(tmp_path)}
    with (
        index(tmp_path / "empty", {"cu128": []}) as url,
        AgentProcess(home, {"engine_index_url": url, "backend": "vulkan", **other_sources}) as agent,
    ):
        assert refused(agent, build="cu128").code is ErrorCode.PACKAGE_UNAVAILABLE
        with pytest.raises(ArrieroError) as missing:
            agent.spawn()
        assert missing.value.code is ErrorCode.BACKEND_UNAVAILABLE, "the setting's backend is meant"
        assert agent.spawn(device="cpu").backend == "cpu"
    with AgentProcess(home) as agent:
        # Nobody listens there any more; a password of the address is not told.
        secret = url.replace("http://", "http://me:hidden@")
        silent = refused(agent, build="cu128", index_url=secret)
        assert silent.code is ErrorCode.INSTALL_FAILED and "does not answer" in silent.message
        assert "hidden" not in json.dumps(silent.details) + silent.message + agent.log
        wrong = refused(agent, build="cu128", index_url="ftp://example.com/\nextra-index-url = x")
        assert wrong.code is ErrorCode.INVALID_REQUEST


def test_an_installation_that_is_left_or_killed_leaves_nothing(home: Path, wheel: Path) -> None:
    with AgentProcess(home) as agent:
        name = upload(agent, wheel)
        stream = agent.client.install_engine(EngineInstallBody(wheel=name))
        next(iter(stream))
        stream.close()
        wait_for(lambda: what_is_there(home) == set(), "the installation is undone")
        name = upload(agent, wheel)
        stream = agent.client.install_engine(EngineInstallBody(wheel=name))
        next(iter(stream))
        agent.kill()
        stream.close()
        assert what_is_there(home) != set()
        # What pip was doing when its agent died may still write.
        with AgentProcess(home) as second:
            wait_for(lambda: what_is_there(home) == set(), "the next agent tidies up")
            assert len(second.client.engines().builds) == 1


def test_a_build_of_another_version_is_shown_and_not_used(home: Path, tmp_path: Path) -> None:
    with AgentProcess(home) as agent:
        install(
            agent,
            build="vulkan",
            wheel=upload(agent, pack(tmp_path, content={"xllamacpp/__init__.py": ENOUGH})),
        )
        agent.terminate()
    record = engine_builds.folder_of(home) / f"vulkan-{VERSION}" / engine_builds.RECORD_NAME
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"version": "2020.1.1"}))
    with AgentProcess(home) as agent:
        [_, old] = agent.client.engines().builds
        assert "is of version 2020.1.1" in old.problem and old.backends == []
        assert agent.client.capabilities().backends == ["cpu"]


def test_through_the_orchestrator_and_the_command_line(wheel: Path, tmp_path: Path) -> None:
    with Home() as home:
        home.up()
        made = home.run("engines", "install", "--wheel", str(wheel), "--node", "box")
        assert made.code == 0 and made.out == "cu128\n"
        assert "is installed; it computes on cpu" in made.err
        listed: dict[str, Any] = home.run("engines", "list", "--node", "box", "--json").json
        assert [build["name"] for build in listed["builds"]] == ["cpu", "cu128"]
        assert (listed["node"], listed["wanted"]) == ("box", "cpu")
        shown = home.run("engines", "list")
        assert "cu128" in shown.out and "cpu suits it" in shown.err
        card = pack(tmp_path, "vulkan", content={"xllamacpp/__init__.py": ENOUGH})
        assert (
            home.run("engines", "install", "-q", "--wheel", str(card), "--json").json["build"]["name"]
            == "vulkan"
        )
        nodes = home.run("nodes", "list", "--json").json["nodes"]
        assert [node["backends"] for node in nodes] == [["vulkan", "cpu"]], "the pool hears of it at once"
        doctor = home.run("doctor", "--json")
        assert any("cu128 (cpu)" in check["message"] for check in doctor.json["checks"])

        wrong = home.run("engines", "install", "--wheel", str(wheel), "--sha256", "0" * 64)
        assert wrong.code == 1 and "error: INSTALL_FAILED: " in wrong.err
        assert home.run("engines", "install", "--wheel", str(tmp_path / "none.whl")).code == 1
        assert home.run("engines", "install", "--wheel", "a", "--index", "b").code == 2
        unreachable = home.run("engines", "install", "cu132", "--index", "http://127.0.0.1:9")
        assert (
            unreachable.code == 1
            and "does not answer" in unreachable.err
            and "--wheel FILE" in unreachable.err
        )
        assert home.run("down").code == 0
        home.assert_clean()
