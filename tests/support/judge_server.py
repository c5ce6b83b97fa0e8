"""A server with a made-up judge."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serve_judge():
    """Yields a server for which texts without the word `cat` are the same.

    It has `url` and `requests` (path, body, key); `failures` are statuses of the first requests,
    and `content` is sent in the place of a reply.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
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

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.failures, http.content = [], [], None
    http.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()
