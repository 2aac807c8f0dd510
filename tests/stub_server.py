"""A local server that answers chat completions in the place of a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubServer:
    """Answers chat completions. `answer` makes the text; `failures` are codes that come first.

    With `location` it answers every request with `code`, a redirect.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.answer: Callable[[dict[str, Any]], str] = lambda request: "Hello."
        self.code, self.location = 302, ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.keys.append(self.headers.get("Authorization"))
                if server.location:
                    self.send_response(server.code)
                    self.send_header("Location", server.location)
                    self.end_headers()
                    return
                if server.failures:
                    self.send_error(server.failures.pop(0))
                    return
                server.asked.append({**request, "path": self.path})
                said = {"choices": [{"message": {"content": server.answer(request)}}]}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def do_GET(self) -> None:
                server.keys.append(self.headers.get("Authorization"))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving() -> Iterator[StubServer]:
    made = StubServer()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
