"""Do the servers of `arriero.testing` run by themselves, say their address, and end with stdin?"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["hub", "fault_server"])
def test_a_server_runs_as_a_process(tmp_path: Path, kind: str) -> None:
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"GGUF" * 100)
    arguments, path = {
        "hub": (["--repo", f"o/r={tmp_path}"], "/api/models/o/r?blobs=true"),
        "fault_server": (["--file", str(tmp_path / "m-Q8_0.gguf"), "--answers", '[{"status": 200}]'], "/m"),
    }[kind]
    process = subprocess.Popen(
        [sys.executable, "-m", f"arriero.testing.{kind}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url + path) as answer:
            content = answer.read()
    assert process.returncode == 0
    if kind == "hub":
        (sibling,) = json.loads(content)["siblings"]
        assert (sibling["rfilename"], sibling["size"]) == ("m-Q8_0.gguf", 400)
    else:
        assert content == b"GGUF" * 100
