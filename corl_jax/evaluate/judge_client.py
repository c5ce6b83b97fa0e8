"""Asks a language model behind an OpenAI-compatible server, by the standard library alone.

    --judge http://host:8000 --judge-model Qwen/Qwen2.5-7B-Instruct-1M

A request that fails for a passing reason (no connection, time out, 408, 429, 5xx) is sent again.
A key, if the server wants one, is the environment variable JUDGE_API_KEY.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from corl_jax.errors import ConnectionFailure, InputError
from corl_jax.evaluation.same_answer import (
    JUDGE_MODEL,
    MAX_NEW_TOKENS,
    is_same,
    write_messages,
)

KEY_VARIABLE = "JUDGE_API_KEY"
PATH = "/chat/completions"
TRIES = 6
FIRST_WAIT_S = 1.0  # doubled after each try: 31 s in all
TIMEOUT_S = 120.0
WORKERS = 8
PASSING_STATUSES = (408, 409, 425, 429)  # and all from 500 on


@dataclasses.dataclass(frozen=True)
class Judge:
    """A language model of a server.

    `temperature` None leaves decoding to the server, as the original does: its replies can differ
    from call to call.
    """

    url: str  # of the request
    model: str
    temperature: float | None = None
    timeout_s: float = TIMEOUT_S
    sleep: Callable[[float], None] = time.sleep

    def ask(self, messages: Sequence[dict[str, str]], max_tokens: int = MAX_NEW_TOKENS) -> str:
        """Returns the reply to a chat.

        Raises:
            InputError: the server refuses the request, or answers in another form.
            ConnectionFailure: no answer after TRIES tries.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        failure = ""
        for number in range(TRIES):
            if number:
                self.sleep(FIRST_WAIT_S * 2 ** (number - 1))
            try:
                return _read_reply(self.url, self._post(body))
            except urllib.error.HTTPError as error:
                with error:  # it holds the connection
                    failure = f"status {error.code} {error.reason}"
                    if error.code not in PASSING_STATUSES and error.code < 500:
                        raise InputError(_describe_refusal(self, error)) from None
            # A URLError is an OSError, as are time outs and broken connections.
            except (OSError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionFailure(
            f"--judge {self.url}: no answer after {TRIES} tries ({failure}); start the server, or "
            "correct the address, and run the same command again"
        )

    def _post(self, body: dict) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            return response.read()

    def judge_answers(
        self, questions: Sequence[str], truths: Sequence[str], outputs: Sequence[str]
    ) -> list[bool]:
        """Returns whether each output says the same as the true answer, in their order."""
        chats = list(map(write_messages, questions, truths, outputs))
        with ThreadPoolExecutor(WORKERS) as pool:
            return [is_same(reply) for reply in pool.map(self.ask, chats)]


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --judge and --judge-model."""
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge", metavar="URL",
        help="an OpenAI-compatible server whose model judges answers (default: rules)",
    )  # fmt: skip
    group.add_argument("--judge-model", metavar="NAME", help=f"default {JUDGE_MODEL}")


def read_judge(args: argparse.Namespace) -> Judge | None:
    """Returns the judge of the arguments, None without --judge.

    Raises: InputError for an address that is none, and for --judge-model without --judge.
    """
    if args.judge is None:
        if args.judge_model is not None:
            raise InputError("--judge-model: has an effect with --judge only; give both or none")
        return None
    return Judge(complete_url(args.judge), args.judge_model or JUDGE_MODEL)


def complete_url(text: str) -> str:
    """Returns the address of chat requests, as http://host:8000 -> http://host:8000/v1/chat/..

    Raises: InputError for what is no address of a server.
    """
    expected = f"--judge: found {text!r}; expected an address as http://host:8000"
    try:
        parts = urllib.parse.urlsplit(text)
        # Reading the port checks it.
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise InputError(expected) from None
    if not valid:
        raise InputError(expected)
    path = parts.path.rstrip("/")
    if not path.endswith(PATH):
        path = f"{path or '/v1'}{PATH}"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _read_reply(url: str, content: bytes) -> str:
    try:
        reply = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        reply = None
    if not isinstance(reply, str):
        raise InputError(
            f"--judge {url}: found {content[:120]!r}; expected the answer of an OpenAI-compatible "
            "server, {choices: [{message: {content: TEXT}}]}"
        )
    return reply


def _describe_refusal(judge: Judge, error: urllib.error.HTTPError) -> str:
    remedy = {
        401: f"set {KEY_VARIABLE}", 403: f"set {KEY_VARIABLE}",
        404: f"check the address, and that the server has the model {judge.model} (--judge-model)",
    }.get(error.code, "see the server's log")  # fmt: skip
    said = error.read(300).decode("utf-8", "replace").strip()
    return f"--judge {judge.url}: status {error.code} {error.reason} ({said}); {remedy}"
