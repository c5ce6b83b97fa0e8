"""A stand-in of the Hugging Face hub on this machine: lists, files and ranges; counts bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_LIST = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/[^/]+)?(/tree/[^/]+)?")


class HubServer:
    """Serves folders `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`."""

    def __init__(self, root: Path):
        self.root = root
        self.sent: dict[str, int] = {}  # file -> bytes of its content that were sent
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                server.answer(self, with_content=False)

            def do_GET(self) -> None:
                server.answer(self, with_content=True)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, *, with_content: bool) -> None:
        path = request.path.split("?")[0]
        if match := _FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            file = self.root / kind / match[2] / match[3]
            if file.is_file():
                self._send_file(request, file, with_content)
                return
        elif match := _LIST.fullmatch(path):
            folder = self.root / match[1] / match[2]
            if folder.is_dir():
                self._send(request, json.dumps(self._list(folder, match)).encode(), {})
                return
        self._send(request, b"", {"X-Error-Code": "RepoNotFound"}, status=404)

    def _list(self, folder: Path, match: re.Match[str]) -> Any:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
        if match[4]:
            return [
                {"type": "file", "path": name, "size": size, "oid": "0"}
                for name, size in names.items()
            ]
        siblings = [{"rfilename": name, "size": size} for name, size in names.items()]
        return {"id": match[2], "sha": COMMIT, "siblings": siblings, "private": False}

    def _send_file(self, request: BaseHTTPRequestHandler, file: Path, with_content: bool) -> None:
        start, stop, size, status = 0, file.stat().st_size, file.stat().st_size, 200
        more: dict[str, str] = {}
        if with_content and (text := request.headers.get("Range")):
            first, last = text.removeprefix("bytes=").split("-")
            start, stop, status = int(first), min(int(last) + 1, size) if last else size, 206
            more = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read(stop - start) if with_content else b""
        name = file.relative_to(self.root).as_posix()
        if with_content:
            self.sent[name] = self.sent.get(name, 0) + len(content)
        etag = hashlib.sha256(name.encode()).hexdigest()
        more |= {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(request, content, more, status=status, length=stop - start)

    def _send(
        self, request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str],
        *, status: int = 200, length: int | None = None,
    ) -> None:  # fmt: skip
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        request.wfile.write(content)


@contextlib.contextmanager
def serve_hub(root: Path, cache: Path) -> Iterator[HubServer]:
    """Serves folders in place of the hub to this process, with an own empty cache."""
    server = HubServer(root)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", server.url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()
