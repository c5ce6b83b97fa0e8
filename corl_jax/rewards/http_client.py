"""Sends JSON to a server and reads its JSON answer, with a limit of time and of size.

Only http and https. Redirects are refused, and no proxy of the environment is used: what a server
scores leaves this machine to the address of the config alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from corl_jax.errors import take_first_line

MAX_ANSWER_BYTES = 2**24
SHOWN_CHARACTERS = 200  # of an answer, in a message


class RequestFailure(Exception):
    """A request without a usable answer. `may_retry`: another try may succeed."""

    def __init__(self, url: str, reason: str, *, may_retry: bool = False, status: int = 0):
        super().__init__(f"{url}: {reason}")
        self.may_retry, self.status = may_retry, status


def find_url_problem(url: str) -> str | None:
    """Returns what is wrong with the address of a server, None if nothing is."""
    shown = repr(hide_secrets(url))
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # as connecting does: labels of 1 to 63 letters
    except ValueError as error:
        # Its text may quote a part of a password.
        reason = "" if "@" in url else f" ({error})"
        return f"found {shown}, which is no URL{reason}"
    if parts.scheme not in ("http", "https") or not has_host:
        return f"found {shown}; expected http://HOST:PORT/PATH or https://HOST/PATH"
    if parts.username is not None or parts.password is not None:
        return f"found a user or password before {parts.hostname}; a config is no place for secrets"
    if parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        return f"found {shown}; expected ASCII letters, without # and spaces"
    return None


def hide_secrets(url: str) -> str:
    """Returns an address, even a broken one, with ... for a user and password."""
    # ftp://me:word@host/path -> ftp://...@host/path; a password may hold / and @
    return re.sub(r"^(\w+:/+)?.*@", r"\1...@", url)


def request_json(url: str, content: Any, timeout_s: float, *, method: str = "POST") -> Any:
    """Returns the JSON value that a server answers. `content` is sent as JSON; None: no body.

    Raises:
        RequestFailure: no answer within `timeout_s` seconds, another status than 200, or no JSON.
    """
    body = None if content is None else json.dumps(content, allow_nan=False).encode()
    status, data = _exchange(url, method, body, timeout_s)
    if 300 <= status < 400:
        raise RequestFailure(url, f"status {status}, a redirect, which is refused", status=status)
    if status != 200:
        may_retry = status >= 500 or status in (408, 425, 429)
        reason = f"status {status}: {_shorten(data)}"
        raise RequestFailure(url, reason, may_retry=may_retry, status=status)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestFailure(url, f"found {_shorten(data)}, which is not JSON") from error


def _exchange(url: str, method: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
    """Returns the status and the body of the answer. Raises: RequestFailure."""
    parts = urllib.parse.urlsplit(url)
    is_safe = parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    began = time.monotonic()
    try:
        with contextlib.closing(connection), _limit_time(connection, timeout_s):
            headers = {"Accept": "application/json", "Connection": "close"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request(method, target, body, headers)
            with contextlib.closing(connection.getresponse()) as answer:
                data = answer.read(MAX_ANSWER_BYTES + 1)
                missing = answer.length  # None: the answer did not say how long it is
    except (OSError, http.client.HTTPException) as error:
        # The timer closes the connection, which raises one of several errors.
        if time.monotonic() - began >= timeout_s:
            reason = f"no answer within {timeout_s:g} s"
        else:
            reason = f"{type(error).__name__}: {take_first_line(error)}"
        raise RequestFailure(url, reason, may_retry=True) from error
    if time.monotonic() - began >= timeout_s:  # closed in the middle of an answer without a length
        raise RequestFailure(url, f"no answer within {timeout_s:g} s", may_retry=True)
    if len(data) > MAX_ANSWER_BYTES:
        raise RequestFailure(url, f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    if missing:
        raise RequestFailure(url, "the connection ended within the answer", may_retry=True)
    return answer.status, data


@contextlib.contextmanager
def _limit_time(connection: http.client.HTTPConnection, timeout_s: float) -> Iterator[None]:
    """Closes the connection after `timeout_s` seconds."""

    # The timeout of a socket starts anew with each byte, so a server that sends one byte a second
    # would never reach it.
    def close() -> None:
        # The response may have taken the socket over, whose descriptor only shutdown ends.
        open_socket = connection.sock or taken.get("socket")
        if open_socket is not None:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)

    taken: dict[str, Any] = {}
    connect = connection.connect

    def connect_and_keep() -> None:
        connect()
        taken["socket"] = connection.sock

    connection.connect = connect_and_keep  # type: ignore[method-assign]
    timer = threading.Timer(timeout_s, close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shorten(data: bytes) -> str:
    text = data[: 4 * SHOWN_CHARACTERS].decode("utf-8", "replace")
    return ascii(text[:SHOWN_CHARACTERS]) + (" .." if len(text) > SHOWN_CHARACTERS else "")
