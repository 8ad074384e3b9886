"""Does a download end in order, and its agent live on, where addresses, names and texts are odd ones?

Method: real servers that answer what no decent one does, real files and folders; a fault of a
download's task would end the provisioner's group, and with it the test.
"""

import os
from pathlib import Path

import pytest
from tests.integration.model_files import Kit, gguf, kit_in
from tests.support.scripted_http import Connection, Request, ScriptedServer

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import PeerSource
from arriero.contracts.states import DownloadState
from arriero.testing.fault_server import FaultServer
from arriero.testing.hub import HubServer


async def _refused(kit: Kit, ref: str, *peers: PeerSource) -> ArrieroError:
    """Return why a download failed."""
    ticket = kit.provisioner.start(ref, peers=peers)
    with pytest.raises(ArrieroError) as refused:
        await kit.provisioner.wait(ticket.download_id)
    assert kit.provisioner.record(ticket.download_id).state is DownloadState.FAILED
    assert refused.value.code is not ErrorCode.INTERNAL_ERROR
    return refused.value


# --- Addresses and headers ---------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
async def test_a_host_that_no_name_server_could_know(tmp_path: Path, host: str) -> None:
    async with kit_in(tmp_path) as kit:
        error = await _refused(kit, f"https://{host}/m.gguf")
        assert error.code is ErrorCode.DOWNLOAD_FAILED and "an address that is none" in error.message


@pytest.mark.parametrize(
    "location",
    [
        b"/mod\xe8le.gguf",
        "/modèle.gguf".encode(),
        b"http://" + b"a" * 64 + b".example/m.gguf",
        b"http://a..b/m.gguf",
        b"http://127.0.0.1:99999/m",
        b"http://[::1/m",
        b"http://\xe9.example/m",
    ],
)
async def test_a_redirect_to_where_nothing_can_be(tmp_path: Path, location: bytes) -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.send(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")

    with ScriptedServer(script) as server:
        async with kit_in(tmp_path) as kit:
            assert (await _refused(kit, f"{server.url}/m.gguf")).code is ErrorCode.DOWNLOAD_FAILED


async def test_an_etag_in_no_known_encoding_is_none(tmp_path: Path) -> None:
    content = gguf()

    def script(request: Request, connection: Connection) -> None:
        asked = request.headers.get("range", "").removeprefix("bytes=").partition("-")
        start, end = int(asked[0] or 0), min(int(asked[2] or 1e9) + 1, len(content))
        first = b"206 Partial" if asked[1] else b"200 OK"
        connection.send(
            b'HTTP/1.1 %s\r\nETag: "caf\xe9"\r\nConnection: close\r\nContent-Length: %d\r\n'
            b"Content-Range: bytes %d-%d/%d\r\n\r\n" % (first, end - start, start, end - 1, len(content))
        )
        # The first answer is cut: what came is continued only by what can be proved to belong to it.
        connection.send(content[start : 100_000 if len(server.requests) == 1 else end])

    with ScriptedServer(script) as server:
        async with kit_in(tmp_path) as kit:
            _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
            assert path.read_bytes() == content


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://127.0.0.1:1",
        "http://[oops",
        "http://127.0.0.1:99999",
        "127.0.0.1:1",
        "http://" + "a" * 64 + ":1",
        "ftp://x",
    ],
)
async def test_a_proxy_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    async with kit_in(tmp_path) as kit:
        assert (await _refused(kit, "https://models.example/m.gguf")).code is ErrorCode.DOWNLOAD_FAILED


@pytest.mark.parametrize("node", ["", "attic"])
async def test_a_peer_without_an_address(tmp_path: Path, node: str) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        peers = [
            PeerSource(url=url, node=node, token=token)
            for url in ("http://[oops", "http://a:99999", "http://" + "a" * 64, "\ud800", "http://\ud800/")
            for token in ("", "a\nb", "\ud800")
        ]
        ticket = kit.provisioner.start(f"{server.url}/m.gguf", peers=peers)
        await kit.provisioner.wait(ticket.download_id)


# --- The Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://[oops",
        "nonsense",
        "http://127.0.0.1:99999",
        "http://" + "a" * 64,
        "http://a\x00b",
        "",
        "http://\ud800",
    ],
)
async def test_an_endpoint_that_is_no_address(tmp_path: Path, endpoint: str) -> None:
    async with kit_in(tmp_path, hf_endpoint=endpoint) as kit:
        assert (await _refused(kit, "hf:o/r")).code is ErrorCode.DOWNLOAD_FAILED


@pytest.mark.parametrize("name", ["o/na--me", "o/name.git", "o/name-", "o/na..me", "o/name."])
async def test_a_hub_that_calls_a_repository_what_none_is_called(tmp_path: Path, name: str) -> None:
    answer = {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": "m.gguf", "size": 12}], "gated": False}

    def script(_: Request, connection: Connection) -> None:
        connection.answer(200, answer)

    with ScriptedServer(script) as server:
        async with kit_in(tmp_path, hf_endpoint=server.url) as kit:
            await _refused(kit, "hf:o/r")


# --- Folders -------------------------------------------------------------------------------------


def _odd(folder: Path) -> Path:
    """Return a folder whose name is no UTF-8."""
    return Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))


async def test_a_cache_below_a_name_that_is_no_text_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gguf()
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": content})
        snapshot = _odd(tmp_path) / "models--o--r" / "snapshots" / hub.repos["o/r"].commit
        snapshot.mkdir(parents=True)
        (snapshot / "m-Q8_0.gguf").write_bytes(content)
        monkeypatch.setenv("HF_HUB_CACHE", str(_odd(tmp_path)))
        record, path = await kit.provisioner.ensure("hf:o/r")
        assert path.read_bytes() == content and record.source == "hub"


async def test_a_link_to_where_no_text_leads_is_refused(tmp_path: Path) -> None:
    _odd(tmp_path).mkdir()
    (_odd(tmp_path) / "m.gguf").write_bytes(gguf())
    (tmp_path / "link.gguf").symlink_to(_odd(tmp_path) / "m.gguf")
    async with kit_in(tmp_path) as kit:
        assert (await _refused(kit, f"file://{tmp_path}/link.gguf")).code is ErrorCode.INVALID_MODEL_PATH


async def test_a_models_folder_whose_path_is_no_text_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ArrieroError) as refused:
        async with kit_in(tmp_path, models_dir=_odd(tmp_path)):
            pass
    assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
