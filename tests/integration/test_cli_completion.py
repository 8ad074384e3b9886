"""Does a shell complete our commands with the script we print?"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import cli


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str, tmp_path: Path) -> None:
    done = cli.run("completion", shell, env=cli.environment(tmp_path))
    assert done.code == 0 and "_ARRIERO_COMPLETE" in done.out


def test_an_unknown_shell_is_wrong_usage(tmp_path: Path) -> None:
    assert cli.run("completion", "tcl", env=cli.environment(tmp_path)).code == 2


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    script = cli.run("completion", "bash", env=cli.environment(tmp_path)).out
    program = tmp_path / "arriero"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m arriero "$@"\n')
    program.chmod(0o755)
    asked = """
COMPREPLY=(); COMP_WORDS=(arriero {words}); COMP_CWORD={index}
_arriero_completion arriero
echo "${{COMPREPLY[@]}}"
"""
    lines = asked.format(words="inf", index=1) + asked.format(words="infer --mo", index=2)
    env = cli.environment(tmp_path) | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [bash, "--norc", "-c", script + lines],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["infer", "--model"]
