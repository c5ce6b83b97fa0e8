"""The judge behind a server: requests, replies, failures that pass and those that do not."""

from __future__ import annotations

import argparse

import pytest

from corl_jax.errors import ConnectionFailure, InputError
from corl_jax.evaluate import judge_client
from corl_jax.evaluate.judge_client import (
    TRIES,
    Judge,
    add_judge_arguments,
    complete_url,
    read_judge,
)
from corl_jax.evaluation.same_answer import (
    JUDGE_MODEL,
    SYSTEM_PROMPT,
    write_judge_prompt,
    write_messages,
)
from tests.support.judge_server import serve_judge


@pytest.fixture
def server():
    with serve_judge() as http:
        yield http


@pytest.fixture
def waits():
    return []


@pytest.fixture
def judge(server, waits):
    return Judge(complete_url(server.url), "qwen", sleep=waits.append)


def test_answers_are_judged_in_their_order(judge, server):
    outputs = ["dog", "cat", "dog", "dog", "cat"]
    judged = judge.judge_answers(["q"] * 5, ["dog"] * 5, outputs)
    assert judged == [True, False, True, True, False]
    path, body, key = server.requests[0]
    assert path == "/v1/chat/completions" and key is None
    assert body["model"] == "qwen" and body["max_tokens"] == 30 and "temperature" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == SYSTEM_PROMPT
    asked = {request[1]["messages"][1]["content"] for request in server.requests}
    assert asked == {write_judge_prompt("q", "dog", output) for output in outputs}


def test_failures_that_pass_are_tried_again(judge, server, waits):
    server.failures += [503, 429]
    assert judge.judge_answers(["q"], ["dog"], ["dog"]) == [True]
    assert waits == [1, 2] and len(server.requests) == 3


def test_failures_that_stay_end_with_the_address(judge, server, waits):
    server.failures += [500] * TRIES
    with pytest.raises(ConnectionFailure, match=rf"{server.url}.*after 6 tries .status 500"):
        judge.ask(write_messages("q", "dog", "dog"))
    assert waits == [1, 2, 4, 8, 16]


def test_no_server_is_said(waits):
    judge = Judge(complete_url("http://127.0.0.1:9"), "qwen", sleep=waits.append)
    with pytest.raises(ConnectionFailure, match=r"refused.*start the server"):
        judge.ask([])


@pytest.mark.parametrize(
    ("status", "part"),
    [(401, "set JUDGE_API_KEY"), (404, "has the model qwen"), (400, "see the server's log")],
)
def test_refusals_are_not_tried_again(judge, server, status, part):
    server.failures += [status]
    with pytest.raises(InputError, match=part):
        judge.judge_answers(["q"], ["dog"], ["dog"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("content", ["<html>", "{}", '{"choices": []}', "[1]"])
def test_another_form_of_reply_is_refused(judge, server, content):
    server.content = content
    with pytest.raises(InputError, match="expected the answer of an OpenAI-compatible server"):
        judge.ask([{"content": ""}, {"content": ""}])


def test_a_key_and_a_temperature_are_sent(server, monkeypatch):
    monkeypatch.setenv(judge_client.KEY_VARIABLE, "k")
    Judge(complete_url(server.url), "m", temperature=0.0).judge_answers(["q"], ["a"], ["a"])
    _, body, key = server.requests[0]
    assert key == "Bearer k" and body["temperature"] == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h/api/v1/", "https://h/api/v1/chat/completions"),
        ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
    ],
)
def test_addresses_are_completed(text, expected):
    assert complete_url(text) == expected


@pytest.mark.parametrize(
    "text", ["", "host:8000", "ftp://h", "http://", "http://h:port", "http://["]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InputError, match="expected an address as http://host:8000"):
        complete_url(text)


def read(*arguments):
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    return read_judge(parser.parse_args(arguments))


def test_the_arguments_name_a_judge():
    assert read() is None
    judge = read("--judge", "http://h:1")
    assert (judge.url, judge.model) == ("http://h:1/v1/chat/completions", JUDGE_MODEL)
    assert read("--judge", "http://h:1", "--judge-model", "m").model == "m"
    with pytest.raises(InputError, match="--judge-model: has an effect with --judge only"):
        read("--judge-model", "m")
