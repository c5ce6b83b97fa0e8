"""`corl-jax push`: what is checked, and what arrives at a server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from corl_jax import push
from corl_jax.weights.folders import ADAPTER_CONFIG

LARGE = ".safetensors"
"""Files that the hub takes by Git LFS; the others are in the commit itself."""


class Hub(http.server.ThreadingHTTPServer):
    """The requests of an upload as huggingface_hub sends them without xet, kept in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict] = []
        self.branches: list[str] = []
        self.objects: dict[str, bytes] = {}  # SHA-256 -> content, of LFS
        self.files: dict[str, bytes] = {}  # of the commits
        self.revisions: list[str] = []
        self.refusal = (0, {})  # status and answer to every request; 0: none


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.server.refusal
        if not status:
            status, answer = 200, self.answer(self.path.partition("?")[0], body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self) -> None:
        length, parts = self.headers.get("Content-Length"), []
        if length is not None:
            parts.append(self.rfile.read(int(length)))
        else:  # chunked
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        self.server.objects[self.path.rpartition("/")[2]] = b"".join(parts)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, path: str, body: bytes) -> dict:
        hub = self.server
        assert self.headers["Authorization"] == "Bearer hf_test"
        if path.endswith("/commit/" + path.rpartition("/")[2]):
            hub.revisions.append(path.rpartition("/")[2])
            for line in map(json.loads, body.splitlines()):
                self.add(line["key"], line["value"])
            return {"commitUrl": f"{hub.address}/someone/model/commit/1", "commitOid": "1" * 40}
        value = json.loads(body)
        if path == "/api/repos/create":
            hub.created.append(value)
            return {"url": f"{hub.address}/{value['organization']}/{value['name']}"}
        if "/branch/" in path:
            hub.branches.append(path.rpartition("/")[2])
            return {}
        if path == "/api/validate-yaml":
            assert value["content"].startswith("# A model")
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in value["files"]]
            modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
            files = zip(names, modes, strict=True)
            return {
                "files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in files]
            }
        assert path.endswith("/info/lfs/objects/batch"), path
        return {
            "transfer": "basic",
            "objects": [
                {
                    **item,
                    "actions": {"upload": {"href": f"{hub.address}/objects/{item['oid']}"}},
                }
                for item in value["objects"]
            ],
        }

    def add(self, key: str, value: dict) -> None:
        if key == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.server.files[value["path"]] = self.server.objects[value["oid"]]

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A tiny model with a card and a hidden file."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "README.md").write_text("# A model\n")
    (folder / ".env").write_text("SECRET=1\n")
    return folder


def refuse(capsys, *arguments: object, code: int = 2) -> str:
    with pytest.raises(SystemExit) as error:
        push.main([str(argument) for argument in arguments])
    assert error.value.code == code
    return capsys.readouterr().err


def test_a_model_arrives_whole(hub, folder, capsys):
    push.main([str(folder), "someone/model", "--private"])
    (created,) = hub.created
    assert created["name"] == "model" and created["organization"] == "someone"
    assert created["visibility"] == "private"
    names = {path.name for path in folder.iterdir()} - {".env"}
    assert {name: hub.files[name] for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    assert hub.files.keys() == names and hub.revisions == ["main"] and not hub.branches
    for digest, content in hub.objects.items():
        assert hashlib.sha256(content).hexdigest() == digest
    assert f"to {hub.address}/someone/model" in capsys.readouterr().out


def test_a_branch_is_made(hub, folder, capsys):
    push.main([str(folder), "someone/model", "--revision", "v2"])
    assert hub.branches == ["v2"] and hub.revisions == ["v2"]
    assert "visibility" not in hub.created[0]  # as the hub has it
    assert "/someone/model/tree/v2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "code", "part"),
    [(403, 2, "that the token may write there"), (500, 1, "the same command uploads")],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, folder, capsys, status, code, part):
    hub.refusal = (status, {"error": "this is why"})
    (line,) = refuse(capsys, folder, "someone/model", code=code).splitlines()
    assert "this is why" in line and part in line and not hub.files


def test_a_hub_that_is_away(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub did not take the upload" in refuse(capsys, folder, "a/b", code=1)


def test_everything_wrong_is_listed_before_the_upload(hub, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (folder / "README.md").unlink()
    said = refuse(capsys, folder, "a model")
    for part in ("README.md: not found", "a model: not the name", "token: found none"):
        assert part in said
    assert "found no owner" in refuse(capsys, folder, "model")
    (tmp_path / "run" / "export").mkdir(parents=True)
    assert f"give {tmp_path / 'run' / 'export'}" in refuse(capsys, tmp_path / "run", "a/b")
    assert not hub.created


def test_a_damaged_model_is_not_uploaded(hub, folder, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refuse(capsys, folder, "someone/model")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refuse(capsys, folder, "someone/model")
    assert not hub.created


def test_an_adapter_names_a_base_that_others_can_find(hub, folder, capsys, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "README.md").write_text("# A model\n")
    settings = {"base_model_name_or_path": str(folder)}
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(settings))
    said = refuse(capsys, adapter, "someone/adapter")
    assert "adapter_model.safetensors" in said and "write the hub id" in said
    shutil.copy(folder / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    push.main([str(adapter), "someone/adapter"])
    assert "adapter_model.safetensors" in hub.files
