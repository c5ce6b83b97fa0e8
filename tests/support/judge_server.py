"""A server with a made-up judge."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer(ThreadingHTTPServer):
    """A server for which texts without the word `cat` are the same."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[tuple[str, dict, str | None]] = []  # path, body, key
        self.failures: list[int] = []  # statuses of the first requests
        self.content: str | None = None  # sent in the place of a reply
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serve_judge() -> Iterator[JudgeServer]:
    """Yields a server that runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.requests.append((self.path, body, self.headers.get("Authorization")))
            status = http.failures.pop(0) if http.failures else 200
            said = "not same" if "cat" in body["messages"][1]["content"] else "Same"
            content = http.content or json.dumps({"choices": [{"message": {"content": said}}]})
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

    http = JudgeServer(Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()
