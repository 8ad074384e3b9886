"""What does the Hugging Face Hub answer?  A tiny one on loopback, for the real client.

It speaks as much as looking up a repository and fetching its files takes, and sends the bytes, as
the real one does, from another host name with a signed address.  Runs in a test, or by itself (it
prints its address, for HF_ENDPOINT, and serves until stdin ends; `--help` lists what it can do wrong):

    python -m arriero.testing.hub --repo org/repo=FOLDER [--gated org/other=FOLDER] [--token T]
"""

import argparse
import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from aiohttp import web

from arriero.testing.hub_content import BLOCK_BYTES, FAST_BLOCK_BYTES, Stored, part_of, store

#: What the Hub keeps in large file storage; everything else lies in git and has no sha256.
LARGE_SUFFIXES: Final = (".gguf", ".safetensors", ".bin", ".pt", ".ckpt")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class HubRepo:
    """One repository: its files by path."""

    files: dict[str, Stored]
    #: Found, but its files need the token.
    is_gated: bool = False
    #: The account of the token has accepted the licence; otherwise even the token is refused.
    is_accepted: bool = True
    #: Not even found without the token.
    is_private: bool = False
    #: What the look-up says of a file's size, where it lies.
    claimed_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """The commit that `main` names: changes with the content."""
        state = "".join(f"{name}:{file.sha256}" for name, file in sorted(self.files.items()))
        return hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class HubFaults:
    """What the Hub does otherwise than on a good day.  May be changed while it runs."""

    #: So many look-ups, and so many requests for bytes, are answered with `status` first.
    failing_lookups: int = 0
    failing_bytes: int = 0
    status: int = 503
    retry_after: str | None = None
    #: Sent in place of a look-up's answer.
    lookup_answer: bytes | None = None
    tells_sizes: bool = True
    tells_checksums: bool = True
    #: The headers of a redirect that tell size and checksum of what it leads to.
    tells_linked: bool = True
    #: A signed address is refused (403) after so many requests, or so many seconds.
    address_uses_max: int | None = None
    address_life_s: float | None = None


@dataclass(slots=True)
class _Address:
    """A signed address that was given out."""

    given_s: float
    uses: int = 0


class HubServer:
    """Used as `async with HubServer() as hub`; `hub.url` is for HF_ENDPOINT."""

    def __init__(self, *, token: str | None = None, rate_bytes_per_s: float | None = None) -> None:
        self.repos: dict[str, HubRepo] = {}
        #: New names of renamed repositories by their old ones.
        self.moved: dict[str, str] = {}
        self.token = token
        self.faults = HubFaults()
        #: How many bytes of files were sent, and over how many connections at a time at most.
        self.bytes_sent = 0
        self.connections_max = 0
        #: Requests as "GET /path".
        self.requests: list[str] = []
        #: Range headers of requests for bytes.
        self.ranges: list[str | None] = []
        #: Authorization headers that came to the host of the bytes: there must never be one.
        self.leaked: list[str] = []
        self._rate_bytes_per_s = rate_bytes_per_s
        self._by_sha256: dict[str, Stored] = {}
        self._addresses: list[_Address] = []
        self._sending = 0
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The address of the Hub."""
        return f"http://127.0.0.1:{self._port}"

    def add(
        self, name: str, files: Mapping[str, bytes | Path], *, gated: bool = False, private: bool = False
    ) -> HubRepo:
        """Offer a repository; an older one of the same name is replaced.

        What is given as a path is read now, for its checksum, and again whenever it is asked for.
        """
        stored = {path: store(content) for path, content in files.items()}
        self.repos[name] = HubRepo(stored, is_gated=gated, is_private=private)
        self._by_sha256 |= {file.sha256: file for file in stored.values()}
        return self.repos[name]

    def rename(self, old: str, new: str) -> None:
        """Give a repository a new name; the old one redirects."""
        self.repos[new] = self.repos.pop(old)
        self.moved[old] = new

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{repo}", self._moving(self._info))
        app.router.add_get("/api/models/{org}/{repo}/revision/{revision}", self._moving(self._info))
        app.router.add_get("/{org}/{repo}/resolve/{revision}/{path:.+}", self._moving(self._resolve))
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

    def _moving(self, handler: _Handler) -> _Handler:
        """Return a handler that sends askers for an old name to the new one."""

        async def handle(request: web.Request) -> web.StreamResponse:
            old = f"{request.match_info['org']}/{request.match_info['repo']}"
            if old not in self.moved:
                return await handler(request)
            self._note(request)
            location = request.raw_path.replace(f"/{old}", f"/{self.moved[old]}", 1)
            return web.Response(status=307, headers={"Location": location})

        return handle

    def _failure(self) -> web.Response:
        told = {"Retry-After": self.faults.retry_after} if self.faults.retry_after is not None else {}
        return web.Response(status=self.faults.status, headers=told)

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
        if self.faults.failing_lookups > 0:
            self.faults.failing_lookups -= 1
            return self._failure()
        repo = self._find(request)
        if isinstance(repo, web.Response):
            return repo
        if self.faults.lookup_answer is not None:
            return web.Response(body=self.faults.lookup_answer, content_type="application/json")
        name = f"{request.match_info['org']}/{request.match_info['repo']}"
        siblings = [self._sibling(repo, path, "blobs" in request.query) for path in repo.files]
        return web.json_response(
            {"_id": "1", "id": name, "modelId": name, "sha": repo.commit,
             "gated": "auto" if repo.is_gated else False,
             "private": repo.is_private, "tags": [], "downloads": 0, "siblings": siblings}
        )  # fmt: skip

    def _sibling(self, repo: HubRepo, path: str, has_blobs: bool) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": path}
        file = repo.files[path]
        size_bytes = repo.claimed_sizes.get(path, file.size_bytes)
        if has_blobs and self.faults.tells_sizes:
            entry |= {"size": size_bytes, "blobId": file.sha256[:40]}
        if has_blobs and self.faults.tells_checksums and path.endswith(LARGE_SUFFIXES):
            entry["lfs"] = {"sha256": file.sha256, "size": size_bytes, "pointerSize": 135}
        return entry

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        repo = self._find(request)
        if isinstance(repo, web.Response):
            return repo
        if repo.is_gated and "Authorization" not in request.headers:
            return _refusal(401, "GatedRepo", "Access to this repository is restricted")
        if repo.is_gated and not repo.is_accepted:
            return _refusal(403, "GatedRepo", "You are not in the authorized list of this repository")
        path = request.match_info["path"]
        file = repo.files.get(path)
        if file is None:
            return _refusal(404, "EntryNotFound", "Entry not found")
        commit = {"X-Repo-Commit": repo.commit}
        if not path.endswith(LARGE_SUFFIXES):
            return await self._send(request, file, {"ETag": f'"{file.sha256[:40]}"', **commit})
        self._addresses.append(_Address(time.monotonic()))
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size_bytes)}
        signature = f"signature=abc%2Fdef&number={len(self._addresses) - 1}"
        return web.Response(
            status=302,
            headers={
                "Location": f"http://localhost:{self._port}/bytes/{file.sha256}?{signature}",
                **(linked if self.faults.tells_linked else {}),
                **commit,
            },
        )

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        self._note(request)
        if "Authorization" in request.headers:
            self.leaked.append(request.headers["Authorization"])
        self.ranges.append(request.headers.get("Range"))
        if self.faults.failing_bytes > 0:
            self.faults.failing_bytes -= 1
            return self._failure()
        if not self._is_signed(request):
            return web.Response(status=403)
        file = self._by_sha256[request.match_info["sha256"]]
        return await self._send(request, file, {"ETag": f'"{file.sha256}"'})

    def _is_signed(self, request: web.Request) -> bool:
        number = request.query.get("number", "")
        if request.query.get("signature") != "abc/def" or not number.isdigit():
            return False
        address = self._addresses[int(number)]
        address.uses += 1
        uses_max, life_s = self.faults.address_uses_max, self.faults.address_life_s
        is_worn = uses_max is not None and address.uses > uses_max
        is_old = life_s is not None and time.monotonic() - address.given_s > life_s
        return not (is_worn or is_old)

    async def _send(
        self, request: web.Request, file: Stored, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """Send a file, or the part of it that a range asks for."""
        part = part_of(request.headers.get("Range"), file.size_bytes)
        if part is not None and part[0] >= part[1]:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{file.size_bytes}"})
        start, end = part or (0, file.size_bytes)
        sent = {**headers, "Accept-Ranges": "bytes"}
        if part is not None:
            sent["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
        response = web.StreamResponse(status=200 if part is None else 206, headers=sent)
        response.content_length = end - start
        self._sending += 1
        self.connections_max = max(self.connections_max, self._sending)
        try:
            await response.prepare(request)
            await self._send_blocks(response, file, start, end)
            await response.write_eof()
        finally:
            self._sending -= 1
        return response

    async def _send_blocks(self, response: web.StreamResponse, file: Stored, start: int, end: int) -> None:
        size = BLOCK_BYTES if self._rate_bytes_per_s is not None else FAST_BLOCK_BYTES
        with file.opened() as read:
            for offset in range(start, end, size):
                # Read in the loop: it comes from the page cache, and a thread a block would cost more.
                block = read(offset, min(size, end - offset))
                await response.write(block)
                self.bytes_sent += len(block)
                if self._rate_bytes_per_s is not None:
                    await asyncio.sleep(len(block) / self._rate_bytes_per_s)


def _refusal(status: int, code: str | None, message: str) -> web.Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return web.json_response({"error": message}, status=status, headers=headers)


# --- As a process ----------------------------------------------------------------------------


def _files_of(folder: Path) -> dict[str, Path]:
    return {
        str(Path(at, name).relative_to(folder)): Path(at, name)
        for at, _, names in os.walk(folder)
        for name in names
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A tiny Hugging Face Hub.")
    for kind in ("repo", "gated", "unaccepted", "private"):
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="ORG/NAME=FOLDER")
    parser.add_argument("--moved", action="append", default=[], metavar="OLD/NAME=NEW/NAME")
    parser.add_argument("--token", help="the one token that is accepted")
    parser.add_argument("--rate", type=float, help="bytes per second at which each connection is sent to")
    parser.add_argument("--failing-lookups", type=int, default=0, help="so many look-ups fail first")
    parser.add_argument("--failing-bytes", type=int, default=0, help="so many requests for bytes fail first")
    parser.add_argument("--status", type=int, default=503, help="what failing requests are answered with")
    parser.add_argument("--retry-after", help="the Retry-After header of failing requests")
    parser.add_argument("--no-sizes", action="store_true", help="look-ups tell no sizes")
    parser.add_argument("--no-checksums", action="store_true", help="look-ups tell no checksums")
    parser.add_argument("--no-linked", action="store_true", help="redirects tell neither size nor checksum")
    parser.add_argument("--address-uses", type=int, help="a signed address is good for so many requests")
    parser.add_argument("--address-life", type=float, help="a signed address is good for so many seconds")
    return parser


async def _main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    hub = HubServer(token=options.token, rate_bytes_per_s=options.rate)
    for kind in ("repo", "gated", "unaccepted", "private"):
        for given in getattr(options, kind):
            name, _, folder = given.partition("=")
            is_gated = kind in ("gated", "unaccepted")
            repo = hub.add(name, _files_of(Path(folder)), gated=is_gated, private=kind == "private")
            repo.is_accepted = kind != "unaccepted"
    for given in options.moved:
        old, _, new = given.partition("=")
        hub.rename(old, new)
    hub.faults = HubFaults(
        failing_lookups=options.failing_lookups,
        failing_bytes=options.failing_bytes,
        status=options.status,
        retry_after=options.retry_after,
        tells_sizes=not options.no_sizes,
        tells_checksums=not options.no_checksums,
        tells_linked=not options.no_linked,
        address_uses_max=options.address_uses,
        address_life_s=options.address_life,
    )
    async with hub:
        print(hub.url, flush=True)  # noqa: T201  The ready line.
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
