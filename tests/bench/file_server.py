"""A file server that is never the slow part: threads and sendfile, with ranges.  `python file_server.py FILE`

It prints its port and serves until it is ended.
"""

import os
import re
import socket
import sys
import threading
from pathlib import Path

RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d*)\r\n", re.IGNORECASE)


def serve(client: socket.socket, path: Path) -> None:
    with client, path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        waiting = b""
        while True:
            while b"\r\n\r\n" not in waiting:
                block = client.recv(65_536)
                if not block:
                    return
                waiting += block
            head, _, waiting = waiting.partition(b"\r\n\r\n")
            asked = RANGE.search(head + b"\r\n")
            start = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1 if asked and asked[2] else size, size)
            lines = [f"HTTP/1.1 {'206 Partial Content' if asked else '200 OK'}", 'ETag: "one"']
            lines += ["Accept-Ranges: bytes", f"Content-Length: {end - start}"]
            if asked:
                lines.append(f"Content-Range: bytes {start}-{end - 1}/{size}")
            try:
                client.sendall("\r\n".join([*lines, "", ""]).encode())
                while start < end:
                    start += os.sendfile(client.fileno(), file.fileno(), start, min(end - start, 1 << 22))
            except OSError:
                return  # The client has what it wants.


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(client, Path(sys.argv[1])), daemon=True).start()


if __name__ == "__main__":
    main()
