"""A web server with one file, which answers each request as planned: cuts, refuses, lies, or waits."""

import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """Serve `content` at `url`.

    Args:
        content (`bytes`): The file.
        plan (`Iterable[dict]`): Options of `Handler.answer` for each request in turn; afterwards all is served well.
    """

    def __init__(self, content: bytes, plan: Iterable[dict[str, Any]] = ()):
        self.content = content
        self.plan = list(plan)
        self.etag = '"1"'
        self.ranges: list[str | None] = []  # asked for by each request
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """`protocol_version` stays HTTP/1.0: each answer ends its connection."""

    files: FileServer

    def do_GET(self) -> None:
        self.files.ranges.append(self.headers["Range"])
        self.answer(**(self.files.plan.pop(0) if self.files.plan else {}))

    def answer(
        self,
        *,
        cut: int | None = None,
        status: int = 200,
        resume: bool = True,
        length: int | str = "",
        delay: float = 0,
        body: bytes | None = None,
        shift: int = 0,
        **headers: str,
    ) -> None:
        """Send the file or, after `status`, nothing; end the connection after `cut` bytes."""
        body = self.files.content if body is None else body
        start = self.start(len(body)) if resume and status == 200 else 0
        if start:
            status = 206 if start < len(body) else 416
        self.send_response(status)
        content = body[start + shift :] if status in (200, 206) else b""
        if status in (206, 416):
            part = f"{start + shift}-{len(body) - 1}" if status == 206 else "*"
            self.send_header("Content-Range", f"bytes {part}/{len(body)}")
        if length != "none":
            self.send_header("Content-Length", str(length or len(content)))
        for name, value in {"ETag": self.files.etag, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        time.sleep(delay)
        with suppress(ConnectionError):  # the client may have given up
            self.wfile.write(content[:cut])

    def start(self, length: int) -> int:
        same_file = self.headers["If-Range"] in (None, self.files.etag)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        return int(asked[1]) if asked and same_file else 0

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(content: bytes, plan: Iterable[dict[str, Any]] = (), name: str = "model.pth") -> Iterator[FileServer]:
    """Run a server in a thread."""
    files = FileServer(content, plan)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneFileHandler", (Handler,), {"files": files}))
    files.url = f"http://127.0.0.1:{server.server_port}/{name}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
