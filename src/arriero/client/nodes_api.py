"""What can be asked of the orchestrator about the machines of the pool?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import quote, urlencode

import msgspec

from arriero.client.caller import Caller
from arriero.client.connection import FailureCodes
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.contracts.events import NodeDone, NodeProgress, NodeStep
from arriero.contracts.records import CUT_HEADER, Finding, FindingList, NodeList, NodeRecord
from arriero.contracts.requests import NodeAddBody, NodeUpdateBody

#: A person's request: what the orchestrator says is what counts.
NODE_CODES: Final = FailureCodes(ErrorCode.SSE_CONNECTION_ERROR, ErrorCode.SSE_CONNECTION_TIMEOUT)
#: Connecting takes up to three attempts of 10 s.
CONNECTED_S: Final = 60.0
EXAMINED_S: Final = 240.0
_PROGRESS: Final = msgspec.json.Decoder(NodeProgress)

OnStep = Callable[[NodeStep], None]


class NodeCalls(Caller):
    """The orchestrator's routes of nodes."""

    def nodes(self) -> list[NodeRecord]:
        """Return the machines of the pool."""
        return self.call("GET", "/v1/nodes", NodeList).nodes

    def node(self, name: str) -> NodeRecord:
        """Return one machine.  Raises NODE_NOT_FOUND."""
        return self.call("GET", _path(name), NodeRecord)

    def add_node(self, body: NodeAddBody, on_step: OnStep) -> NodeDone:
        """Have a machine join, and hear each step.  Raises what keeps it from that."""
        return self._worked("POST", "/v1/nodes", on_step, body)

    def update_node(self, name: str, body: NodeUpdateBody) -> NodeRecord:
        """Change what is kept of a machine."""
        given = {key: value for key, value in msgspec.to_builtins(body).items() if value is not None}
        return self.call("PATCH", _path(name), NodeRecord, body=given)

    def drain_node(self, name: str, on_step: OnStep, *, wait_s: float | None) -> NodeDone:
        """Give a machine no new work; wait up to `wait_s` for what runs there."""
        query = "" if wait_s is None else "?" + urlencode({"wait_s": wait_s})
        return self._worked("POST", _path(name) + "/drain" + query, on_step)

    def undrain_node(self, name: str) -> NodeRecord:
        """Give a machine work again."""
        return self.call("POST", _path(name) + "/undrain", NodeRecord)

    def upgrade_node(self, name: str, on_step: OnStep, *, carry: bool) -> NodeDone:
        """Bring a machine to the orchestrator's version, and hear each step."""
        return self._worked("POST", _path(name) + "/upgrade" + ("?carry=true" if carry else ""), on_step)

    def remove_node(self, name: str, on_step: OnStep, *, purge: bool, force: bool) -> NodeDone:
        """Stop what was started on a machine and forget it, and hear each step."""
        query = urlencode({"purge": str(purge).lower(), "force": str(force).lower()})
        return self._worked("DELETE", f"{_path(name)}?{query}", on_step)

    def examine_node(self, name: str) -> list[Finding]:
        """Have a machine looked over: every file of its installation is read."""
        return self.call("GET", _path(name) + "/doctor", FindingList, timeout_s=EXAMINED_S).findings

    def node_log(self, name: str, lines: int) -> tuple[bytes, bool]:
        """Return the last lines of the log of a machine's agent; and whether earlier ones are left out."""
        answer = self.raw("GET", f"{_path(name)}/logs?lines={lines}", timeout_s=CONNECTED_S)
        if answer.status >= 400:
            raise from_body(msgspec.json.decode(answer.content, type=ErrorResponse).error)
        return answer.content, CUT_HEADER in answer.headers

    def _worked(self, method: str, path: str, on_step: OnStep, body: object = None) -> NodeDone:
        """Follow a piece of work to its end; closing early takes it back."""
        done: NodeDone | None = None
        with self.stream(method, path, body=body, codes=NODE_CODES) as stream, _told_of_the_end():
            for event in stream:
                if event.comment is not None or not event.data:
                    continue
                if event.event == "error":
                    raise from_body(msgspec.json.decode(event.data, type=ErrorResponse).error)
                found = _PROGRESS.decode(event.data)
                if isinstance(found, NodeStep):
                    on_step(found)
                else:
                    done = found
            if done is None:
                raise ArrieroError(ErrorCode.SSE_CONNECTION_ERROR, "the steps ended before their end")
        return done


@contextlib.contextmanager
def _told_of_the_end() -> Iterator[None]:
    """Have whoever sees an orchestrator die in the middle know what becomes of the work."""
    try:
        yield
    except ArrieroError as error:
        if error.code in (NODE_CODES.unreachable, NODE_CODES.timeout):
            error.details.setdefault(
                "suggested_action", "give the same command again: what was begun is taken up, or taken back"
            )
        raise


def _path(name: str) -> str:
    if not name or "/" in name:
        # It would lead to another route.
        raise ArrieroError(ErrorCode.NODE_NOT_FOUND, f"no node is called {name!r}")
    return f"/v1/nodes/{quote(name, safe='')}"
