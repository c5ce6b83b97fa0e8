"""Rewards by HTTP: the format, several servers, retries, and all that a server can get wrong."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corl_jax.config import files as config_files
from corl_jax.config.readers import find_unused_options
from corl_jax.errors import InputError, RewardError
from corl_jax.rewards import http as http_rewards
from corl_jax.rewards import http_client, registry
from corl_jax.rewards.samples import Context, Samples
from corl_jax.score import __main__ as score_command
from corl_jax.train import __main__ as train_command
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

NOWHERE = Context(None, None, None, None, None, seed=0, step=0)
ROOT = Path(__file__).resolve().parents[2]
DEAD = "http://127.0.0.1:9/score"  # the discard port, where nothing listens


class ScriptedServer:
    """A server that answers each POST by `reply(number of the POST, samples)`.

    A reply is a JSON value, bytes, or (status, value, headers). It keeps what it was asked.
    """

    def __init__(self, reply, has_health=True, host="127.0.0.1"):
        self.asked: list[list[dict]] = []
        self.paths: list[str] = []
        lock, server = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.paths.append(self.path)
                self.send((200 if has_health else 404, {}, {}))

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                samples = json.loads(self.rfile.read(length))["samples"]
                with lock:
                    number = len(server.asked)
                    server.asked.append(samples)
                answer = reply(number, samples)
                self.send(answer if isinstance(answer, tuple) else (200, answer, {}))

            def send(self, answer):
                status, value, headers = answer
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                with contextlib.suppress(OSError):  # a client that waits no longer
                    self.send_response(status)
                    for key, text in headers.items():
                        self.send_header(key, text)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer((host, 0), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def start(reply, **options):
            server = ScriptedServer(reply, **options)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http_rewards, "FIRST_WAIT_S", 0.01)


def bind(urls, name="http", **options):
    return registry.bind_reward(name, {"urls": urls, **options})


def images(count=2, **columns):
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 50
    return Samples(columns, images=np.broadcast_to(levels, (count, 4, 4, 3)))


def ask(reward, samples):
    return registry.score([reward], samples, NOWHERE)[reward.name].tolist()


def read_level(sample):
    picture = Image.open(io.BytesIO(base64.b64decode(sample["image"])))
    assert picture.format == "PNG" and picture.mode == "RGB"
    return picture.getpixel((0, 0))[0]


def reply_levels(_, samples):
    return {"rewards": [read_level(sample) / 100 for sample in samples]}


def reply_ones(_, samples):
    return {"rewards": [1 for _ in samples]}


# ---- the format


def test_an_image_comes_with_its_prompt_and_its_row(serve):
    server = serve(lambda _, samples: {"rewards": [0.5, None]})
    real = Image.new("RGB", (2, 2), (255, 0, 0))
    columns = {
        "prompt": ["a cat", None], "number": [np.int64(3), 4], "box": [np.array([0.5, np.nan]), []],
        "real_image": [real, np.zeros((2, 2, 3), np.uint8)], "raw": [b"ab", b""],
    }  # fmt: skip
    first, second = ask(bind(server.url), images(**columns))
    assert first == 0.5 and np.isnan(second)
    ((one, other),) = server.asked
    assert one.keys() == {"prompt", "image", "row"} and one["prompt"] == "a cat"
    assert [read_level(one), read_level(other)] == [0, 50]
    assert one["row"]["number"] == 3 and one["row"]["box"] == [0.5, None]
    assert one["row"]["raw"] == {"base64": "YWI="} and other["prompt"] is None
    picture = Image.open(io.BytesIO(base64.b64decode(one["row"]["real_image"]["png"])))
    assert picture.getpixel((0, 0)) == (255, 0, 0) and "png" in other["row"]["real_image"]


def test_an_answer_comes_with_its_question(serve):
    server = serve(reply_ones)
    samples = Samples({"qa_problem": ["what?"], "qa_solution": ["B"]}, texts=["it is B"])
    assert ask(bind(server.url, "http_texts"), samples) == [1.0]
    row = {"qa_problem": "what?", "qa_solution": "B"}
    assert server.asked == [[{"prompt": "what?", "completion": "it is B", "row": row}]]


def test_the_two_rewards_score_their_own_task(serve):
    server = serve(reply_ones)
    by_task = registry.group_by_task(
        [bind(server.url), bind(server.url, "http_texts")], ("t2i", "mm2t")
    )
    assert [[x.name for x in rewards] for rewards in by_task.values()] == [["http"], ["http_texts"]]


def test_no_samples_ask_nobody(serve):
    server = serve(reply_ones)
    assert ask(bind(server.url), images(0)) == [] and server.asked == []


# ---- several servers, batches, retries


def test_batches_go_to_the_servers_in_turn_and_keep_their_order(serve):
    servers = [serve(reply_levels), serve(reply_levels)]
    reward = bind(",".join(server.url for server in servers), batch_size=2)
    assert ask(reward, images(5)) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    assert sorted(len(server.asked) for server in servers) == [1, 2]
    ask(reward, images(2))  # the turn goes on where the last call ended
    assert [len(server.asked) for server in servers] == [2, 2]


def test_requests_run_at_the_same_time(serve):
    together = threading.Barrier(2)

    def reply(_, samples):
        together.wait(10)  # passes only if two requests are open at once
        return reply_ones(_, samples)

    urls = [serve(reply).url, serve(reply).url]
    assert ask(bind(urls, batch_size=1), images(2)) == [1, 1]


def test_an_error_of_the_server_is_tried_again(serve):
    server = serve(lambda n, samples: reply_ones(n, samples) if n > 1 else (500, {}, {}))
    reward = bind(server.url, retries=2)
    assert ask(reward, images()) == [1, 1] and len(server.asked) == 3
    assert reward.function.failures == 0


def test_half_an_answer_is_tried_again(serve):
    """A server that ends within its answer, which then is a text that is not JSON."""
    half = (200, b'{"rewards": [1', {"Content-Length": "18"})
    server = serve(lambda n, samples: half if n == 0 else reply_ones(n, samples))
    assert ask(bind(server.url), images()) == [1, 1] and len(server.asked) == 2


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
def test_an_address_of_version_6_is_reached(monkeypatch):
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "address_family", socket.AF_INET6)
    server = ScriptedServer(reply_ones, host="::1")
    try:
        assert server.url.startswith("http://[::1]:") and ask(bind(server.url), images()) == [1, 1]
    finally:
        server.close()


def test_another_server_stands_in_for_one_that_is_gone(serve):
    broken, whole = serve(lambda *_: (503, {}, {})), serve(reply_ones)
    reward = bind([broken.url, whole.url], batch_size=1, retries=1)
    assert ask(reward, images(3)) == [1, 1, 1]
    broken.close()
    assert ask(reward, images(3)) == [1, 1, 1]


def test_pauses_double_up_to_a_limit(serve, monkeypatch):
    pauses = []

    class Clock:
        def wait(self, seconds):
            pauses.append(seconds)

    monkeypatch.setattr(http_rewards, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(http_rewards, "LONGEST_WAIT_S", 1.5)
    monkeypatch.setattr(http_rewards.random, "uniform", lambda low, high: low)
    server = serve(lambda *_: (500, b"busy", {}))
    options = http_rewards.Options((server.url,), 5.0, 4, 16, max_failures=2)
    reward = http_rewards.HttpReward("http", options)
    with pytest.raises(http_client.RequestFailure, match="status 500: 'busy'"):
        reward._ask_with_retries(images(), range(2), 0, Clock())
    assert pauses == [0.25, 0.5, 0.75, 0.75] and len(server.asked) == 5


# ---- what a server can get wrong


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "found '<html>', which is not JSON"),
        (b"[" * 9000, "found '[[[[[["),  # nested too deeply for the parser
        ([1, 1], "found list; expected {\"rewards\": [..]} with 2 numbers or nulls"),
        ({"scores": [1, 1]}, "found the keys 'scores'; expected"),
        ({"rewards": [1]}, "found 1 rewards; expected"),
        ({"rewards": [1, "2"]}, "reward 1: found '2'; expected"),
        ({"rewards": [True, 1]}, "reward 0: found True; expected"),
        (b'{"rewards": [NaN, 1]}', "reward 0: found nan; expected"),
        (b'{"rewards": [1, -Infinity]}', "reward 1: found -inf; expected"),
        (b'{"rewards": [1, 1' + b"0" * 400 + b"]}", "reward 1: found 1000"),
        ((404, b"no such page", {}), "status 404: 'no such page'"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), "status 302, a redirect, which is refu"),
        ((200, b"x" * 20_000, {}), "an answer of more than 10,000 bytes"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_no_reward_and_is_not_asked_for_again(
    serve, answer, said, caplog, monkeypatch
):
    monkeypatch.setattr(http_client, "MAX_ANSWER_BYTES", 10_000)
    server = serve(lambda *_: answer)
    reward = bind(server.url)
    assert np.isnan(ask(reward, images())).all()
    assert (reward.function.failures, reward.function.failed_samples) == (1, 2)
    assert len(server.asked) == 1
    assert f"{server.url}: {said}" in caplog.text and "2 samples go without" in caplog.text


@pytest.mark.parametrize("kind", ["silent", "slow"])
def test_a_server_that_hangs_is_given_up_in_time(serve, kind, caplog):
    ended = threading.Event()

    def reply(*_):
        ended.wait(10)
        return {}

    # slow: a byte now and then, so that each read ends in time and the answer never does.
    url = serve(reply).url if kind == "silent" else _serve_drops(ended)
    reward = http_rewards.HttpReward("http", http_rewards.Options((url,), 0.3, 0, 16, 5))
    began = time.monotonic()
    assert np.isnan(reward(images(), NOWHERE)).all()
    assert time.monotonic() - began < 5
    assert f"{url}: no answer within 0.3 s" in caplog.text
    ended.set()


def _serve_drops(ended):
    class Drip(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/score"


def test_many_failures_in_a_row_end_the_run(serve):
    answers = iter([(500, {}, {}), None, (500, {}, {}), (500, {}, {})])

    def reply(_, samples):
        return next(answers) or reply_ones(_, samples)

    reward = bind(serve(reply).url, retries=0, max_failures=2)
    assert np.isnan(ask(reward, images())).all()
    assert ask(reward, images()) == [1, 1]  # starts the count again
    assert np.isnan(ask(reward, images())).all()
    with pytest.raises(RewardError, match=r"failed calls in a row: 2 \(max_failures: 2\); 3 have"):
        ask(reward, images())


# ---- before a run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "option urls: missing; expected the addresses of servers"),
        ({"urls": " , "}, "option urls: missing"),
        ({"urls": "file:///etc/passwd"}, "expected http://HOST:PORT/PATH"),
        ({"urls": "ftp://host/x"}, "expected http://HOST:PORT/PATH"),
        ({"urls": "localhost:8000"}, "expected http://HOST:PORT/PATH"),
        ({"urls": "http://host:port/"}, "which is no URL"),
        ({"urls": "http://me:pass1234@host/"}, "found a user or password before host"),
        ({"urls": "http://me:pass1234@host:port/"}, "found 'http://...@host:port/', which is no"),
        ({"urls": "ftp://me:pass1234@host/"}, "found 'ftp://...@host/'; expected http"),
        ({"urls": "me:pass1234@host/"}, "found '...@host/'; expected http"),
        ({"urls": f"http://{'a' * 64}/"}, "label too long"),
        ({"urls": "http://me:pass1234/@x@host/"}, "found 'http://...@host/', which is no URL"),
        ({"urls": "http://a/ b"}, "without # and spaces"),
        ({"urls": ["http://a/", "http://a/"]}, "found an address twice"),
        ({"urls": "http://a/", "timeout_seconds": 0.0}, "option timeout_seconds: found 0.0"),
        ({"urls": "http://a/", "retries": -1}, "option retries: found -1"),
        ({"urls": "http://a/", "batch_size": 0}, "option batch_size: found 0"),
        ({"urls": "http://a/", "url": 1}, "option url: unknown"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(InputError) as error:
        registry.bind_reward("http", options)
    assert said in str(error.value) and "pass1234" not in str(error.value)


def test_a_server_without_a_health_path_scores_an_empty_batch(serve):
    server = serve(reply_ones, has_health=False)
    bind(server.url)
    assert server.paths == ["/health"] and server.asked == [[]]
    with pytest.raises(InputError, match="found 3 rewards"):
        bind(serve(lambda *_: {"rewards": [1, 1, 1]}, has_health=False).url)


def test_every_server_that_does_not_answer_is_named(serve):
    with pytest.raises(InputError) as error:
        bind([DEAD, serve(reply_ones).url, "http://127.0.0.1:7/score"])
    first, second = error.value.problems
    assert first.startswith("reward: http: http://127.0.0.1:9/health: ConnectionRefusedError")
    assert first.endswith("start the server, or correct the option urls") and ":7/" in second


def run_options(model, rows, folder, url, **options):
    return tiny_runs.options(
        model, rows, folder, algorithm={"tasks": "t2i"},
        rewards=[{"name": "http", "options": {"urls": url, **options}}],
    )  # fmt: skip


def test_a_run_refuses_a_dead_server_before_device_work(model, rows, tmp_path, capsys):
    path = write_config(tmp_path / "run.yaml", run_options(model, rows, tmp_path / "run", DEAD))
    with pytest.raises(SystemExit) as error:
        train_command.main(["--config", str(path), "--check"])
    assert error.value.code == 2 and not (tmp_path / "run").exists()
    assert "error: rewards: http: http://127.0.0.1:9/health: " in capsys.readouterr().err


def test_the_guard_of_failed_samples_watches_servers(model, rows, tmp_path):
    tree = run_options(model, rows, tmp_path / "run", DEAD)
    tree["guards"] = {"max_failed_reward_fraction": 0.1}
    config = config_files.validate(tree, "test")
    assert not [x for x in find_unused_options(config) if "max_failed_reward_fraction" in x]


def test_a_run_trains_with_servers_and_bears_one_failure(model, rows, tmp_path, one_device):
    def reply(number, samples):
        if number == 1:
            return {"rewards": "none"}
        return {"rewards": [read_level(x) / 255 if i else None for i, x in enumerate(samples)]}

    server = ScriptedServer(reply)
    try:
        tree = run_options(model, rows, tmp_path / "run", server.url)
        path = write_config(tmp_path / "run.yaml", tree)
        train_command.main(["--config", str(path)])
    finally:
        server.close()
    first, second = metric_lines(tmp_path / "run")[:2]
    sample = server.asked[0][0]
    assert sample["prompt"] == sample["row"]["prompt"] and {"qa_problem"} < sample["row"].keys()
    assert len(server.asked[0]) == 8  # 4 prompts, 2 images of each
    assert 0 <= first["t2i/rewards/http/mean"] <= 1 and first["t2i/rewards/http/failures"] == 0
    assert second["t2i/rewards/http/mean"] is None and second["t2i/rewards/http/failures"] == 1


# ---- the example


@pytest.fixture(scope="module")
def example():
    """The example server in a process of its own; its address."""
    command = [sys.executable, "docs/examples/reward_server.py", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def test_the_example_server_scores_colours_and_answers(example):
    pixels = np.full((3, 8, 8, 3), 255, np.uint8)
    pixels[0, 2:6, 2:6] = (220, 20, 20)
    pixels[1, 2:6, 2:6] = (20, 20, 220)
    prompts = ["a red circle", "a red square", "a circle"]
    red, blue, none = ask(bind(example, batch_size=1), Samples({"prompt": prompts}, images=pixels))
    assert red > 0.9 and blue < 0.1 and np.isnan(none)
    samples = Samples(
        {"qa_solution": ["<answer>red bird</answer>", "a dog", None]},
        texts=["two Red  birds", "a cat", "x"],
    )
    right, wrong, none = ask(bind(example, "http_texts"), samples)
    assert (right, wrong) == (1, 0) and np.isnan(none)


def test_a_file_is_scored_by_the_example_server(example, capsys):
    drawings = ROOT / "docs" / "examples" / "rewards" / "drawings.jsonl"
    score_command.main(["--reward", "http", "--input", str(drawings), f"urls={example}"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 5 and all(0 <= line["reward"] <= 1 for line in lines)


def test_score_shows_the_first_failure(serve, tmp_path, capsys):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"completion": "a"}\n')
    server = serve(lambda *_: {"rewards": []})
    with pytest.raises(SystemExit) as error:
        score_command.main(["--reward", "http_texts", "--input", str(path), f"urls={server.url}"])
    assert error.value.code == 1
    assert re.search("http_texts .*its call failed with", printed := capsys.readouterr().err)
    assert "found 0 rewards" in printed


def test_the_page_shows_the_format():
    text = (ROOT / "docs" / "how_to" / "reward_by_http.md").read_text()
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    images_asked, texts_asked, answer = blocks
    assert images_asked["samples"][0].keys() == {"prompt", "image", "row"}
    assert texts_asked["samples"][0].keys() == {"prompt", "completion", "row"}
    for asked in (images_asked, texts_asked):
        http_rewards.read_rewards("page", answer, len(asked["samples"]))
