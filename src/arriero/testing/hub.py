"""What does the Hugging Face Hub answer?  A tiny one on loopback, for the real client.

It speaks as much as looking up a repository and fetching its files takes, and sends the bytes, as
the real one does, from another host name with a signed address.  Runs in a test, or by itself (it
prints its address, for HF_ENDPOINT, and serves until stdin ends):

    python -m arriero.testing.hub --repo org/repo=FOLDER [--gated org/other=FOLDER] [--token T]
"""

import argparse
import asyncio
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from aiohttp import web

_RANGE: Final = re.compile(r"bytes=(\d+)-")
BLOCK_BYTES: Final = 65_536


@dataclass(slots=True)
class HubRepo:
    """One repository: its files by path."""

    files: dict[str, bytes]
    #: Found, but its files need the token.
    is_gated: bool = False
    #: Not even found without the token.
    is_private: bool = False
    #: What the look-up says of a file's size, where it lies.
    claimed_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """The commit that `main` names: changes with the content."""
        state = "".join(f"{name}:{_sha256(content)}" for name, content in sorted(self.files.items()))
        return hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()


class HubServer:
    """Used as `async with HubServer() as hub`; `hub.url` is for HF_ENDPOINT."""

    def __init__(self, *, token: str | None = None, rate_bytes_per_s: float | None = None) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.token = token
        #: How many bytes of files were sent.
        self.bytes_sent = 0
        #: Requests as "GET /path".
        self.requests: list[str] = []
        #: Range headers of requests for bytes.
        self.ranges: list[str | None] = []
        #: Authorization headers that came to the host of the bytes: there must never be one.
        self.leaked: list[str] = []
        self._rate_bytes_per_s = rate_bytes_per_s
        self._by_sha256: dict[str, bytes] = {}
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The address of the Hub."""
        return f"http://127.0.0.1:{self._port}"

    def add(
        self, name: str, files: Mapping[str, bytes], *, gated: bool = False, private: bool = False
    ) -> HubRepo:
        """Offer a repository; an older one of the same name is replaced."""
        self.repos[name] = HubRepo(dict(files), is_gated=gated, is_private=private)
        for content in files.values():
            self._by_sha256[_sha256(content)] = content
        return self.repos[name]

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{repo}", self._info)
        app.router.add_get("/api/models/{org}/{repo}/revision/{revision}", self._info)
        app.router.add_get("/{org}/{repo}/resolve/{revision}/{path:.+}", self._resolve)
        app.router.add_get("/bytes/{sha256}", self._bytes)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def _note(self, request: web.Request) -> None:
        self.requests.append(f"{request.method} {request.path}")

    def _find(self, request: web.Request) -> HubRepo | web.Response:
        """Return the repository, or the refusal that the real Hub would send."""
        authorization = request.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {self.token}":
            return _refusal(401, None, "Invalid credentials in Authorization header")
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and authorization is None):
            # Without a token, what does not exist and what is private look the same.
            return _refusal(401 if authorization is None else 404, "RepoNotFound", "Repository not found")
        revision = request.match_info.get("revision", "main")
        if revision not in ("main", repo.commit):
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    async def _info(self, request: web.Request) -> web.Response:
        self._note(request)
        repo = self._find(request)
        if isinstance(repo, web.Response):
            return repo
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        siblings = [_sibling(repo, path, "blobs" in request.query) for path in repo.files]
        return web.json_response(
            {"_id": "1", "id": name, "modelId": name, "sha": repo.commit, "gated": repo.is_gated,
             "private": repo.is_private, "tags": [], "downloads": 0, "siblings": siblings}
        )  # fmt: skip

    async def _resolve(self, request: web.Request) -> web.Response:
        self._note(request)
        repo = self._find(request)
        if isinstance(repo, web.Response):
            return repo
        if repo.is_gated and "Authorization" not in request.headers:
            return _refusal(401, "GatedRepo", "Access to this repository is restricted")
        content = repo.files.get(request.match_info["path"])
        if content is None:
            return _refusal(404, "EntryNotFound", "Entry not found")
        sha256 = _sha256(content)
        return web.Response(
            status=302,
            headers={
                "Location": f"http://localhost:{self._port}/bytes/{sha256}?signature=abc%2Fdef",
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "X-Repo-Commit": repo.commit,
            },
        )

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if "Authorization" in request.headers:
            self.leaked.append(request.headers["Authorization"])
        self.ranges.append(request.headers.get("Range"))
        if request.query.get("signature") != "abc/def":
            return web.Response(status=403)
        content = self._by_sha256[request.match_info["sha256"]]
        headers = {"ETag": f'"{request.match_info["sha256"]}"', "Accept-Ranges": "bytes"}
        match = _RANGE.fullmatch(request.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if match and start >= len(content):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if match else 200, headers=headers)
        response.content_length = len(content) - start
        await response.prepare(request)
        for offset in range(start, len(content), BLOCK_BYTES):
            block = content[offset : offset + BLOCK_BYTES]
            await response.write(block)
            self.bytes_sent += len(block)
            if self._rate_bytes_per_s is not None:
                await asyncio.sleep(len(block) / self._rate_bytes_per_s)
        await response.write_eof()
        return response


def _sibling(repo: HubRepo, path: str, has_blobs: bool) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path}
    content = repo.files[path]
    size_bytes = repo.claimed_sizes.get(path, len(content))
    if has_blobs:
        entry |= {"size": size_bytes, "blobId": hashlib.sha1(content, usedforsecurity=False).hexdigest()}
        if path.endswith(".gguf"):
            entry["lfs"] = {"sha256": _sha256(content), "size": size_bytes, "pointerSize": 135}
    return entry


def _refusal(status: int, code: str | None, message: str) -> web.Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return web.json_response({"error": message}, status=status, headers=headers)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A tiny Hugging Face Hub.")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--private", action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--token", help="the one token that is accepted")
    parser.add_argument("--rate", type=float, help="bytes per second at which files are sent")
    options = parser.parse_args(arguments)
    hub = HubServer(token=options.token, rate_bytes_per_s=options.rate)
    for kind in ("repo", "gated", "private"):
        for given in getattr(options, kind):
            name, _, folder = given.partition("=")
            hub.add(name, _read_folder(Path(folder)), gated=kind == "gated", private=kind == "private")
    async with hub:
        print(hub.url, flush=True)  # noqa: T201  The ready line.
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
