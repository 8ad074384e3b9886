"""A worker that does as its script says: the faults that a real worker cannot be brought to.

Speaks the routes an agent uses.  The script is JSON in a file beside the model, `MODEL.json`:
`ready` (call back), `state_stream`, `sick` (health answers 500), `drain` (end when asked to),
`sigterm` (end by it), `loading` (stay loading), `exit_code` (exit with it after the callback),
`exit` (content of exit.json, written before that), `told_failed` (its health says so), `lines` (printed).
"""

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SPEC: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
_SCRIPT_PATH = Path(SPEC.get("model_path", "") + ".json")
SCRIPT: dict[str, Any] = json.loads(_SCRIPT_PATH.read_text()) if _SCRIPT_PATH.is_file() else {}
STATE: dict[str, Any] = {
    "state": "loading" if SCRIPT.get("loading") else "idle",
    "busy": 0,
    "since": time.monotonic(),
}
LEASES: list[str] = []


def health() -> dict[str, Any]:
    is_idle = STATE["state"] == "idle"
    told = {
        "status": "alive",
        "worker_id": SPEC["worker_id"],
        "model_ref": SPEC["model_ref"],
        "state": STATE["state"],
        "slots_total": SPEC["slots"],
        "slots_busy": STATE["busy"],
        "queued": 0,
        "context_tokens": SPEC["context_tokens"],
        "memory_mb": 7,
        "load_fraction": 1.0,
        "idle_s": time.monotonic() - STATE["since"] if is_idle else 0.0,
    }
    if STATE["state"] == "failed":
        told["exit"] = SCRIPT["told_failed"]
    return told


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {SPEC['token']}":
            self.answer(401, {"error": {"code": "INVALID_API_KEY", "message": ""}})
        elif self.path == "/v1/health" and SCRIPT.get("sick"):
            self.answer(500, {"error": {"code": "INTERNAL_ERROR", "message": "sick"}})
        elif self.path == "/v1/health":
            LEASES.append(self.headers.get("X-Arriero-Lease", ""))
            self.answer(200, health())
        elif self.path == "/leases":
            self.answer(200, LEASES[-1:])
        elif self.path == "/v1/state" and SCRIPT.get("state_stream", True) and not SCRIPT.get("sick"):
            self.stream()
        else:
            self.answer(404, {"error": {"code": "NOT_FOUND", "message": self.path}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/v1/admin/drain":
            self.answer(202, {})
            if SCRIPT.get("drain", True):
                os._exit(0)
        elif self.path.startswith("/become/"):
            STATE["state"] = self.path.removeprefix("/become/")
            STATE["busy"] = int(STATE["state"] == "busy")
            STATE["since"] = time.monotonic()
            self.answer(200, {})

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        last, told_s = "", 0.0
        while True:
            now = dict(health(), idle_s=0)
            if json.dumps(now) != last or time.monotonic() - told_s > 0.3:
                last, told_s = json.dumps(now), time.monotonic()
                try:
                    self.wfile.write(b"data: " + json.dumps(health()).encode() + b"\n\n")
                    self.wfile.flush()
                except OSError:
                    return
            time.sleep(0.01)

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        print(arguments[0] % arguments[1:], flush=True)


def main() -> None:
    if not SPEC:
        sys.exit(3)
    if SCRIPT.get("sigterm", True) is False:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in SCRIPT.get("lines", []):
        print(line, flush=True)
    if "exit_before" in SCRIPT:
        sys.exit(SCRIPT["exit_before"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if SCRIPT.get("ready", True):
        callback = {key: SPEC[key] for key in ("worker_id", "model_ref", "backend", "device")}
        callback["url"] = f"http://127.0.0.1:{server.server_port}"
        request = urllib.request.Request(
            SPEC["callback_url"],
            data=json.dumps(callback).encode(),
            headers={
                "Authorization": f"Bearer {SPEC['callback_token']}",
                "Content-Type": "application/json",
            },
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()
    if "exit" in SCRIPT:
        (Path(SPEC["run_dir"]) / "exit.json").write_text(json.dumps(SCRIPT["exit"]))
    if "exit_code" in SCRIPT:
        os._exit(SCRIPT["exit_code"])
    threading.Event().wait()


if __name__ == "__main__":
    main()
