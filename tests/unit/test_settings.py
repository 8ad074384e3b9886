"""Settings: flags over environment over file, every problem at once."""

from pathlib import Path

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.runtime.settings import Settings, load


def env(tmp_path: Path, toml: str = "", **more: str) -> dict[str, str]:
    path = tmp_path / "config.toml"
    path.write_text(toml)
    return {"ARRIERO_CONFIG": str(path), **more}


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    given = env(
        tmp_path,
        "agent_port = 1\nworker_slots = 2\nidle_timeout_s = 9",
        ARRIERO_AGENT_PORT="3",
        ARRIERO_WORKER_SLOTS="5",
    )
    settings = load(given, {"agent_port": 7, "home": None})
    assert (settings.agent_port, settings.worker_slots, settings.idle_timeout_s) == (7, 5, 9.0)


def test_defaults_without_anything(tmp_path: Path) -> None:
    assert load({"HOME": str(tmp_path)}) == Settings()


def test_every_problem_at_once(tmp_path: Path) -> None:
    given = env(
        tmp_path, 'colour = "red"\nworker_slots = 0', ARRIERO_AGENT_PORT="high", ARRIERO_STREAM_STALL_S="nan"
    )
    with pytest.raises(ArrieroError) as refused:
        load(given, {"node_name": "No Name"})
    assert refused.value.code is ErrorCode.INVALID_SETTINGS
    assert refused.value.kind.exit_code is Exit.USAGE
    problems = "\n".join(refused.value.details["problems"])
    for word in ("colour", "worker_slots", "agent_port", "stream_stall_s", "node_name"):
        assert word in problems, word
    assert len(refused.value.details["problems"]) == 5


@pytest.mark.parametrize(
    "toml", ["agent_port = ", "\x00", "agent_port = true", "agent_port = 1.5", "home = 3"]
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, toml: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        load(env(tmp_path, toml))
    assert refused.value.code is ErrorCode.INVALID_SETTINGS


def test_a_missing_named_file_is_an_error_and_variables_that_are_no_settings_are_left_alone() -> None:
    with pytest.raises(ArrieroError):
        load({"ARRIERO_CONFIG": "/nonexistent/config.toml"})
    assert load({"ARRIERO_URL": "http://x", "ARRIERO_API_KEY": "k"}).agent_port == 9200


def test_the_node_name_is_well_formed_whatever_the_host_is_called() -> None:
    assert load({}, {"node_name": "a-1"}).name_of_node() == "a-1"
    assert Settings().name_of_node().replace("-", "a").isalnum()
