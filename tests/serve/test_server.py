"""The server with the real `openai` client: equal to `generate`, and clear when it refuses."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import logging
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

import corl_jax
from corl_jax import generate
from corl_jax.assets import SHIPPED
from corl_jax.errors import InputError
from corl_jax.policies import FAMILIES, batched
from corl_jax.serve import __main__ as command
from corl_jax.serve import app as app_module
from corl_jax.serve import command as serve_command
from corl_jax.serve import requests as api
from corl_jax.serve.app import Server
from corl_jax.serve.batcher import Batcher
from corl_jax.serve.engine import Engine, list_batch_sizes, round_up

KEY = "right-key"
PROMPT, QUESTION = "a red circle", "How many shapes are there?"


class Running:
    """A server of the nano Janus in a thread, with its engine."""

    def __init__(self):
        self.model = corl_jax.load("nano", dtype="float32")
        self.engine = Engine(self.model.policy, self.model.dtype, batch_size=4)
        self.sizes: list[int] = []  # rows of each call
        self.batcher = Batcher(self.draw, batch_size=4, max_wait_s=0.05, max_queue=128)
        self.app = Server(self.engine, self.batcher, "nano", KEY, max_requests=128)
        self.listener = serve_command.open_listener("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.app.make_app(), log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.listener],))
        self.thread.start()

    def draw(self, program, rows):
        self.sizes.append(len(rows))
        return self.engine.draw(program, rows)

    def client(self, key=KEY):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key,
                             max_retries=0, timeout=120)  # fmt: skip

    def send(self, path, body, method="POST", **headers):
        """Sends raw bytes; returns status and JSON."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            known = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request(method, path, body, known | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join()
        self.batcher.close()
        self.listener.close()


@pytest.fixture(scope="module")
def server():
    running = Running()
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def picture():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[8:30, 8:30] = (200, 20, 20)
    return Image.fromarray(pixels)


def data_url(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def ask_about(url, text=QUESTION, system=None):
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": parts}]


def read_image(item):
    picture = Image.open(io.BytesIO(base64.b64decode(item.b64_json)))
    assert picture.format == "PNG"
    return np.asarray(picture)


# ---- equal to `generate`


def test_images_equal_those_of_generate(server, client, tmp_path):
    generate.main(["image", "--model", "nano", "--prompt", PROMPT, "--images-per-prompt", "3",
                   "--seed", "4294967295", "--out", str(tmp_path / "out")])  # fmt: skip
    made = client.images.generate(
        model="nano", prompt=PROMPT, n=3, size="32x32", response_format="b64_json",
        extra_body={"seed": 4294967295},
    )  # fmt: skip
    assert len(made.data) == 3 and made.seed == 4294967295 and made.size == "32x32"
    for number, item in enumerate(made.data):
        expected = np.asarray(Image.open(tmp_path / "out" / f"00000_{number:02d}.png"))
        np.testing.assert_array_equal(read_image(item), expected)


def test_answers_equal_those_of_generate(server, client, picture, tmp_path, capsys):
    picture.save(tmp_path / "image.png")
    generate.main(["text", "--model", "nano", "--image", str(tmp_path / "image.png"),
                   "--question", QUESTION, "--samples", "3", "--seed", "7", "--top-p", "0.9",
                   "--system-prompt", "Count."])  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    made = client.chat.completions.create(
        model="nano", messages=ask_about(data_url(picture), system="Count."), n=3, seed=7, top_p=0.9
    )
    assert [choice.message.content for choice in made.choices] == [line["text"] for line in lines]
    reasons = ["length" if line["truncated"] else "stop" for line in lines]
    assert [choice.finish_reason for choice in made.choices] == reasons
    assert made.usage.completion_tokens == sum(len(line["tokens"]) for line in lines)
    assert made.usage.prompt_tokens > 16 and made.model == "nano"


def test_options_change_the_samples_as_they_do_in_python(server, client, picture):
    expected = server.model.generate_images(PROMPT, 1, seed=1, cfg_scale=4.0, temperature=0.5)
    made = client.images.generate(
        model="nano", prompt=PROMPT, extra_body={"seed": 1, "cfg_scale": 4.0, "temperature": 0.5}
    )
    np.testing.assert_array_equal(read_image(made.data[0]), np.asarray(expected[0]))
    # Fewer tokens than the program draws, and greedily: 0 is OpenAI's word for it.
    said = server.model.answer(picture, QUESTION, greedy=True, max_new_tokens=16)
    short = client.chat.completions.create(
        model="nano", messages=ask_about(data_url(picture)), temperature=0, top_p=0.5,
        max_completion_tokens=3,
    )  # fmt: skip
    assert 0 < len(short.choices[0].message.content) < len(said)
    assert said.startswith(short.choices[0].message.content)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_requests_without_a_seed_differ_and_say_their_seed(client):
    first, second = (client.images.generate(model="nano", prompt=PROMPT) for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(model="nano", prompt=PROMPT, extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.data[0].b64_json != second.data[0].b64_json


def test_many_clients_get_what_generate_makes(server, picture):
    """Half of them ask, half draw; each with its own seed, all at once."""
    clients = 64
    url, start = data_url(picture), threading.Barrier(clients)

    def run(number: int):
        with server.client() as own:
            start.wait()
            if number % 2:
                made = own.images.generate(model="nano", prompt=PROMPT, extra_body={"seed": number})
                return read_image(made.data[0]).tolist()
            made = own.chat.completions.create(
                model="nano", messages=ask_about(url), seed=number, max_tokens=32
            )
            return made.choices[0].message.content

    before = len(server.sizes)
    with ThreadPoolExecutor(clients) as pool:
        made = list(pool.map(run, range(clients)))
    calls = server.sizes[before:]
    assert sum(calls) == clients and len(calls) <= clients // 2
    for number, sample in enumerate(made):
        if number % 2:
            (expected,) = server.model.generate_images(PROMPT, 1, seed=number)
            assert sample == np.asarray(expected).tolist(), number
        else:
            said = server.model.answer(picture, QUESTION, seed=number, max_new_tokens=32)
            assert sample == said, number


# ---- the forms of OpenAI's API


def test_a_stream_has_the_same_answer(client, picture):
    asked = {
        "model": "nano", "messages": ask_about(data_url(picture)), "seed": 3, "n": 2,
        "max_tokens": 32,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    events = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    texts, reasons = {0: "", 1: ""}, {}
    for event in events[:-1]:
        (choice,) = event.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [*texts.values()] == [choice.message.content for choice in whole.choices]
    assert [*reasons.values()] == [choice.finish_reason for choice in whole.choices]
    assert events[-1].usage == whole.usage


def test_an_answer_ends_before_a_stop(client, picture):
    asked = {"model": "nano", "messages": ask_about(data_url(picture)), "seed": 3, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    stop = text[4:6]
    cut = client.chat.completions.create(**asked, stop=["@@", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_what_evaluation_harnesses_send_is_taken(server, picture):
    """The fields that lmms-eval's and VLMEvalKit's clients send, and an image as JPEG or WebP."""
    for kind in ("JPEG", "WEBP"):
        image = {"url": data_url(picture, kind), "detail": "low"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What?"}]
        body = {
            "model": "nano", "n": 1, "temperature": 0, "max_tokens": 8, "top_p": None, "stop": None,
            "frequency_penalty": 0, "presence_penalty": 0, "stream": False, "user": "me",
            "response_format": {"type": "text"},
            "messages": [{"role": "system", "content": ""}, {"role": "user", "content": content}],
        }  # fmt: skip
        status, answer = server.send("/v1/chat/completions", json.dumps(body))
        assert status == 200, answer
        assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["content"]


def test_the_models_and_the_health_are_told(server, client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").owned_by == "corl-jax"
    status, health = server.send("/health", None, "GET", Authorization="")
    assert (status, health["status"]) == (200, "ok")


# ---- refusals


def test_a_wrong_key_is_refused(server):
    for key in ("wrong", KEY + "x"):
        with server.client(key) as other, pytest.raises(openai.AuthenticationError, match="key"):
            other.images.generate(model="nano", prompt=PROMPT)
    status, answer = server.send("/v1/models", None, "GET", Authorization="")
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'nano' alone") as error:
        client.images.generate(model="gpt-image-1", prompt=PROMPT)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 0}, "n: found 0; expected a whole number at least 1"),
        ({"n": 65}, "n: found 65; expected at most 64"),
        ({"n": "2"}, "n: found '2'"),
        ({"n": True}, "n: found true or false"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**32}, "seed: found 4294967296"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"cfg_scale": -1}, "cfg_scale: found -1"),
        ({"temperature": -0.1}, "temperature: found -0.1"),
        ({"temperature": "hot"}, "temperature: found hot"),
        ({"size": "1024x1024"}, "size: found '1024x1024'; this model makes images of 32x32"),
        ({"response_format": "url"}, "response_format: found 'url', which this server cannot do"),
        ({"prompt": None}, "prompt: found NoneType; expected a text"),
        ({"prompt": " "}, "prompt: found an empty text"),
        ({"prompt": "\ud83d"}, "prompt: holds a lone surrogate"),
        ({"prompt": "circle " * 400}, "tokens; expected at most 240"),
        ({"prompt": "x" * 200_001}, "found 200,001 characters"),
        ({"sede": 1}, "'sede': unknown; did you mean seed?"),
        ({"cfg_scale": 10**400}, "cfg_scale: found 1000"),
        ({"temperature": "\ud83d"}, "temperature: found ?; expected"),
        ({"temperature": "x" * 5000}, "temperature: found xxx"),
    ],
)  # fmt: skip
def test_wrong_options_of_images_are_refused(server, changes, said):
    body = {"model": "nano", "prompt": PROMPT} | changes
    status, answer = server.send("/v1/images/generations", json.dumps(body))
    error = answer["error"]
    assert status == 400 and said in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 2000


def with_url(url):
    return {"messages": ask_about(url)}


def with_parts(*parts):
    return {"messages": [{"role": "user", "content": [*parts]}]}


def bomb():
    return data_url(Image.new("1", (5000, 5000)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": "hi"}, "expected a list of objects"),
        ({"messages": []}, "expected one message of the user"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "found 0 images; expected one"),
        (with_parts({"type": "input_audio"}), "content of type input_audio"),
        ({"messages": [{"role": "user", "content": None}]}, "found content of type None"),
        (with_url("https://example.com/a.png"), "this server fetches nothing"),
        (with_url("file:///etc/passwd"), "this server fetches nothing"),
        (with_url("data:image/gif;base64,R0lGODlh"), "expected data:image/png;base64"),
        (with_url("data:image/png;base64,%%%"), "not valid base64"),
        (with_url("data:image/png;base64,R0lGODlhAQABAAAAACw="), "no PNG, JPEG or WebP"),
        (with_url("data:image/png;base64,iVBORw0KGgo="), "image: found 8 bytes"),
        (with_url(None), "image_url: found NoneType"),
        (lambda: with_url(bomb()), "found 5000x5000 pixels; expected at most 16,777,216"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": 10**400}, "max_tokens: found 1000"),
        (with_parts({"type": "\ud83d"}), "content of type ?; expected"),
        ({"max_tokens": 250}, "max_tokens: found 250 after a prompt of"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens: differs from"),
        ({"top_p": 0}, "top_p: found 0"),
        ({"stop": ["a"] * 5}, "stop: expected a text, or up to 4"),
        ({"stop": ""}, "stop: expected"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"instruction": "essay"}, "instruction: found 'essay'"),
        ({"tools": [{}]}, "tools: found '[{}]', which this server cannot do"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: found '0.5'"),
        ({"text": "long " * 300}, "after a prompt of"),
        ({"text": "\ud83d"}, "holds a lone surrogate"),
        ({"system": "\ud83d"}, "system_prompt: holds a lone surrogate"),
    ],
)  # fmt: skip
def test_wrong_questions_are_refused(server, picture, changes, said):
    changes = dict(changes() if callable(changes) else changes)
    texts = changes.pop("text", QUESTION), changes.pop("system", None)
    body = {"messages": ask_about(data_url(picture), *texts)} | changes
    status, answer = server.send("/v1/chat/completions", json.dumps(body))
    assert status == 400 and said in answer["error"]["message"], answer


def test_earlier_turns_are_refused(server, picture):
    messages = ask_about(data_url(picture))
    body = {"messages": [*messages, {"role": "assistant", "content": "2"}, *messages]}
    status, answer = server.send("/v1/chat/completions", json.dumps(body))
    assert status == 400 and "the model answers single questions" in answer["error"]["message"]


def test_bodies_that_are_no_json_are_refused(server, monkeypatch):
    path = "/v1/images/generations"
    assert server.send(path, b"{", "POST")[0] == 400
    assert server.send(path, b"[" * 100_000)[0] == 400
    assert server.send(path, b"[]")[0] == 400
    status, answer = server.send(path, b"a=b", **{"Content-Type": "text/plain"})
    assert status == 415 and "expected application/json" in answer["error"]["message"]
    monkeypatch.setattr(app_module, "MAX_BODY_BYTES", 1000)
    status, answer = server.send(path, b" " * 2000)
    assert status == 413 and "more than 1,000 bytes" in answer["error"]["message"]
    # Without a length, in chunks: counted while it arrives.
    assert server.send(path, (b" " * 600 for _ in range(3)))[0] == 413
    # A body that never comes must not keep its place.
    monkeypatch.setattr(app_module, "BODY_S", 0.2)
    status, answer = server.send(path, b"", **{"Content-Length": "10"})
    assert status == 408 and "within 0.2 s" in answer["error"]["message"]


def test_unknown_pages_are_not_found(server):
    status, answer = server.send("/v1/embeddings", b"{}")
    assert status == 404 and "POST /v1/embeddings: Not Found" in answer["error"]["message"]
    assert server.send("/v1/images/generations", None, "GET")[0] == 405


def test_too_many_requests_are_told_to_wait(server, client, monkeypatch):
    monkeypatch.setattr(server.batcher, "_max_queue", 0)
    held = threading.Event()
    draw = server.batcher._draw
    monkeypatch.setattr(server.batcher, "_draw", lambda *x: (held.wait(30), draw(*x))[1])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.images.generate, model="nano", prompt=PROMPT)
        wait_until(lambda: server.send("/health", None, "GET")[1]["queued"] == 0)
        time.sleep(0.2)  # the first is drawn now
        second = pool.submit(client.images.generate, model="nano", prompt=PROMPT)
        wait_until(lambda: server.batcher.queued == 1)
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            client.images.generate(model="nano", prompt=PROMPT)
        held.set()
        assert first.result().data and second.result().data


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_request_that_fails_takes_no_other_down(server, client, monkeypatch):
    draw = server.batcher._draw

    def fail_for_seed_13(program, rows):
        if any(row.seed == 13 for row in rows):
            raise RuntimeError("out of memory at 0xdeadbeef")
        return draw(program, rows)

    monkeypatch.setattr(server.batcher, "_draw", fail_for_seed_13)
    monkeypatch.setattr(server.batcher, "_max_wait_s", 0.3)

    def ask(seed):
        return client.images.generate(model="nano", prompt=PROMPT, extra_body={"seed": seed})

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, seed) for seed in (12, 13, 14)]
    with pytest.raises(openai.InternalServerError, match="the server's log says why") as error:
        asked[1].result()
    assert "0xdeadbeef" not in str(error.value)
    assert asked[0].result().data and asked[2].result().data


def test_a_client_that_leaves_frees_its_place(server, client, monkeypatch):
    held, draw = threading.Event(), server.batcher._draw
    monkeypatch.setattr(server.batcher, "_draw", lambda *x: (held.wait(30), draw(*x))[1])
    before = sum(server.sizes)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.images.generate, model="nano", prompt=PROMPT)
        time.sleep(0.3)  # the first is drawn now
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        known = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        body = json.dumps({"prompt": PROMPT, "n": 2})
        connection.request("POST", "/v1/images/generations", body, known)
        wait_until(lambda: server.batcher.queued == 2)
        connection.close()
        wait_until(lambda: all(x.future.cancelled() for x in server.batcher._queue))
        held.set()
        assert first.result().data
    client.images.generate(model="nano", prompt=PROMPT)
    assert sum(server.sizes) - before == 2


def test_a_client_that_leaves_within_its_body_is_no_error(server, client):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as part:
            head = f"Authorization: Bearer {KEY}\r\nContent-Type: application/json"
            part.sendall(
                f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n{head}\r\n"
                "Content-Length: 100\r\n\r\n{".encode()
            )
            wait_until(lambda: server.app._active == 1)
        wait_until(lambda: server.app._active == 0)
        client.models.list()
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert not records


# ---- shapes


def test_images_are_decoded_request_by_request(server, monkeypatch):
    """In other shapes a pixel in some of the images differs by 1, though the codes are equal."""
    shapes, decode = [], batched.decode_segment

    def record(*arguments):
        shapes.append(arguments[-1].values.shape[0])
        return decode(*arguments)

    monkeypatch.setattr(batched, "decode_segment", record)
    jobs = [
        server.engine.prepare_images(api.read_image_request({"prompt": PROMPT, "n": n}, 32))
        for n in (2, 1)
    ]
    rows = [row for job in jobs for row in job.rows]
    samples = server.engine.draw(jobs[0].program, rows)
    assert shapes == [2, 1] and [sample.number for sample in samples] == [0, 1, 0]


def test_programs_are_few(server, monkeypatch):
    assert [list_batch_sizes(size) for size in (1, 3, 4, 16, 20)] == [
        [1], [1, 3], [1, 4], [1, 4, 16], [1, 4, 16, 20],
    ]  # fmt: skip
    assert [round_up(number) for number in (1, 16, 17, 512, 513)] == [16, 16, 32, 512, 1024]
    cleared = []
    monkeypatch.setattr("corl_jax.serve.engine.MAX_PROGRAMS", 1)
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(True))
    engine = Engine(server.model.policy, server.model.dtype, 4)
    programs = [
        engine.prepare_images(api.read_image_request({"prompt": PROMPT, "cfg_scale": scale}, 32))
        for scale in (2.0, 3.0, 1.0)
    ]
    for job in programs[:2]:  # the scale is an argument of one program
        engine._note_program(job.program, 4)
    assert not cleared
    engine._note_program(programs[2].program, 4)  # no guidance: another program
    assert cleared


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port: found 70000"),
        (["--batch-size", "0"], "--batch-size: found 0"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: found -1"),
        (["--max-queue", "0"], "--max-queue: found 0"),
        (["--api-key", ""], "--api-key (or CORL_JAX_API_KEY): found an empty key"),
        (
            ["--api-key", "my key"],
            "--api-key (or CORL_JAX_API_KEY): found an empty key, or one with",
        ),
        (["--name", " "], "--name: found an empty text"),
        (["--model", "nowhere"], "--model: nowhere"),
        (["--host", "a" * 70], f"--host {'a' * 70} --port 8000: cannot listen there ("),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000: cannot"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--model", "nano", *arguments])
    assert error.value.code == 2 and f"error: {said}" in capsys.readouterr().err


def test_a_port_in_use_and_missing_packages_are_refused(server, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as error:
        command.main(["--model", "nano", "--port", str(server.port)])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and "Address already in use" in printed
    assert "pip install 'corl-jax[serve]'" in printed


def test_an_address_that_others_reach_without_a_key_is_warned_of(capsys):
    for host, key, warns in (("0.0.0.0", None, True), ("127.0.0.1", None, False),
                             ("localhost", None, False), ("0.0.0.0", "k", False)):  # fmt: skip
        args = command.build_parser().parse_args(["--model", "nano", "--host", host])
        args.api_key = key
        serve_command._warn_if_open(args)
        assert ("give --api-key" in capsys.readouterr().err) == warns


@pytest.fixture
def handlers():
    """Restores the handlers of signals after the test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_sigterm_ends_the_server_after_its_requests(handlers, monkeypatch, capsys):
    with serve_command.open_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv(command.KEY_VARIABLE, KEY)
    address = f"http://127.0.0.1:{port}"

    def ask_and_stop():
        wait_until(lambda: is_healthy(port))
        own = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        with own, ThreadPoolExecutor(1) as pool:
            # One sample a call: others still wait when the signal comes.
            asked = pool.submit(own.images.generate, model="mine", prompt=PROMPT, n=8)
            wait_until(lambda: json.load(urllib.request.urlopen(f"{address}/health"))["queued"])
            signal.raise_signal(signal.SIGTERM)
            return asked.result()

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(ask_and_stop)
        command.main([
            "--model", "nano", "--port", str(port), "--batch-size", "1", "--no-warm-up",
            "--name", "mine",
        ])  # fmt: skip
    assert len(made.result().data or ()) == 8
    printed = capsys.readouterr()
    assert printed.out == f"serving mine at {address}/v1\n" and "stopped" in printed.err


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except OSError:
        return False


def test_the_warm_up_compiles_what_requests_use(server, client, capsys):
    serve_command.warm_up(server.engine)
    known = {*server.engine._programs}
    client.images.generate(model="nano", prompt=PROMPT)
    assert {*server.engine._programs} == known
    assert "compiled 4 programs in" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_refused_at_the_start(server, monkeypatch):
    def draw(program, rows):
        if len(rows) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")

    monkeypatch.setattr(server.engine, "draw", draw)
    with pytest.raises(InputError, match="--batch-size: 4 samples at once do not fit"):
        serve_command.warm_up(server.engine)


def test_a_broken_generation_config_is_found_at_the_start(tmp_path, capsys):
    folder = shutil.copytree(SHIPPED["nano"], tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    args = command.build_parser().parse_args(["--model", str(folder), "--port", "0"])
    with pytest.raises(InputError, match="temperature"):
        serve_command.run_server(args)


def test_a_model_that_answers_no_questions_draws_images(capsys):
    """A Show-o with CLIP's features may lack the tower that makes them."""
    drawn = []

    def refuse(request):
        raise api.ApiError(400, "messages: too long")

    family = FAMILIES["show_o"]
    model = SimpleNamespace(family=family, sizes=family.presets["show-o-w-clip-vit"])
    engine = SimpleNamespace(
        model=model,
        limits=SimpleNamespace(image_side=16), sizes=[1, 4], prepare_answers=refuse,
        prepare_images=lambda request: SimpleNamespace(program="images", rows=["row"]),
        draw=lambda program, rows: drawn.append((program, len(rows))),
    )  # fmt: skip
    serve_command.warm_up(engine)
    assert drawn == [("images", 1), ("images", 4)]
    said = capsys.readouterr().err
    assert "warning: the model answers no questions: the task asks about images, which" in said
    model.sizes = family.presets["show-o"]
    with pytest.raises(api.ApiError, match="too long"):  # any other refusal is none of the model
        serve_command.warm_up(engine)
