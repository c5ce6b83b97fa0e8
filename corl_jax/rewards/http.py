"""Asks servers for rewards: `http` for generated images, `http_texts` for answers.

The images or answers of a step are sent in batches of JSON to one or several servers, which answer
with a number or null for each. docs/how_to/reward_by_http.md has the format.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import math
import random
import threading
import traceback
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from corl_jax.errors import Problems, RewardError
from corl_jax.rewards.http_client import RequestFailure, find_url_problem, request_json
from corl_jax.rewards.samples import Context, Samples
from corl_jax.rewards.worker import Failure

logger = logging.getLogger(__name__)

PARALLEL = 2  # requests to one server at once: it can read one while it scores the other
HEALTH_S = 10.0  # longest wait for a server's answer before the run
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PNG_COMPRESSION = 1  # sent once: time counts more than size

Urls = str | list[str] | None
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Retries = Annotated[int, Field(ge=0)]


def score_http(
    samples: Samples, context: Context, *, urls: Urls = None, timeout_seconds: Seconds = 60.0,
    retries: Retries = 3, batch_size: Count = 16, max_failures: Count = 5,
) -> np.ndarray:  # fmt: skip
    """Returns the scores that servers give to generated images; NaN where they answer null."""
    options = Options(read_urls(urls), timeout_seconds, retries, batch_size, max_failures)
    return HttpReward("http", options)(samples, context)


def score_http_texts(
    samples: Samples, context: Context, *, urls: Urls = None, timeout_seconds: Seconds = 60.0,
    retries: Retries = 3, batch_size: Count = 16, max_failures: Count = 5,
) -> np.ndarray:  # fmt: skip
    """Returns the scores that servers give to answers; NaN where they answer null."""
    options = Options(read_urls(urls), timeout_seconds, retries, batch_size, max_failures)
    return HttpReward("http_texts", options)(samples, context)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a config, with their defaults."""

    urls: tuple[str, ...]
    timeout_seconds: float
    retries: int
    batch_size: int
    max_failures: int


def read_urls(urls: Urls) -> tuple[str, ...]:
    """Returns the addresses of a list, or of a text with commas."""
    texts = urls.split(",") if isinstance(urls, str) else urls or []
    return tuple(text.strip() for text in texts if text.strip())


def find_url_problems(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with the addresses that a config gives."""
    urls = read_urls(options.get("urls"))
    if not urls:
        return ["option urls: missing; expected the addresses of servers, http://HOST:PORT/PATH"]
    problems = [f"option urls: {text}" for url in urls if (text := find_url_problem(url))]
    if len(set(urls)) < len(urls):
        problems.append("option urls: found an address twice; list each once")
    return problems


def bind_images(options: Mapping[str, Any]) -> HttpReward:
    """Returns the reward `http` of a config; see `_bind`."""
    return _bind("http", options)


def bind_texts(options: Mapping[str, Any]) -> HttpReward:
    """Returns the reward `http_texts` of a config; see `_bind`."""
    return _bind("http_texts", options)


def _bind(name: str, options: Mapping[str, Any]) -> HttpReward:
    """Returns a reward of a config, after each of its servers has answered.

    Raises:
        InputError: a line for each server that does not answer.
    """
    reward = HttpReward(name, Options(**{**options, "urls": read_urls(options["urls"])}))
    reward.check_servers()
    return reward


@dataclasses.dataclass(eq=False)
class HttpReward:
    """A reward that servers compute. It scores the samples of this process only.

    A batch that gets no answer is sent again, to the next server, after a pause that doubles. A
    call fails if a batch gets no usable answer in all its tries. Then all its samples get NaN and a
    warning is logged. After `max_failures` failed calls in a row the run ends.
    """

    name: str
    options: Options
    failures: int = dataclasses.field(default=0, init=False)  # calls that failed so far
    failed_samples: int = dataclasses.field(default=0, init=False)  # of the last call
    last_failure: Failure | None = dataclasses.field(default=None, init=False)
    _in_a_row: int = dataclasses.field(default=0, init=False, repr=False)
    _next_server: int = dataclasses.field(default=0, init=False, repr=False)

    @property
    def use(self) -> str:
        """The addresses, for messages."""
        return ", ".join(self.options.urls)

    def check_servers(self) -> None:
        """Asks each server whether it is ready.

        A server answers GET /health with status 200; one without that path scores an empty batch.

        Raises:
            InputError: a line for each server that is not ready.
        """
        problems, limit = Problems(), min(HEALTH_S, self.options.timeout_seconds)
        for url in self.options.urls:
            try:
                _check_server(url, limit)
            except RequestFailure as failure:
                problems.add(f"{failure}; start the server, or correct the option urls")
        problems.raise_any()

    def __call__(self, samples: Samples, context: Context) -> np.ndarray:
        """Returns the rewards [N] float32; NaN for null, and for a call that failed.

        Raises:
            RewardError: too many calls in a row have failed.
        """
        count = len(samples)
        if not count:
            return np.zeros(0, np.float32)
        try:
            values = self._ask_servers(samples)
        except RequestFailure as failure:
            self.failed_samples = count
            self._count_failure(failure)
            return np.full(count, np.nan, np.float32)
        self._in_a_row = self.failed_samples = 0
        with np.errstate(over="ignore"):  # becomes infinity, which scoring turns into NaN
            return np.array(values, np.float64).astype(np.float32)

    def _ask_servers(self, samples: Samples) -> list[float]:
        """Returns the scores of all samples. Raises: RequestFailure of the first failed batch."""
        size, servers = self.options.batch_size, len(self.options.urls)
        starts = range(0, len(samples), size)
        first, self._next_server = self._next_server, (self._next_server + len(starts)) % servers
        stop, failures = threading.Event(), []

        def ask(number: int, start: int) -> list[float]:
            rows = range(start, min(start + size, len(samples)))
            try:
                return self._ask_with_retries(samples, rows, first + number, stop)
            except RequestFailure as failure:
                failures.append(failure)
                stop.set()
                raise

        pool = ThreadPoolExecutor(min(len(starts), PARALLEL * servers))
        try:
            batches = [pool.submit(ask, number, start) for number, start in enumerate(starts)]
            return [value for batch in batches for value in batch.result()]
        except RequestFailure as failure:
            # Others gave up because of the first one, which has the reason.
            raise failures[0] from failure
        finally:  # also after an interrupt: the batches that wait are no longer needed
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask_with_retries(
        self, samples: Samples, rows: range, server: int, stop: threading.Event
    ) -> list[float]:
        """Returns the scores of some samples. Raises: RequestFailure of the last try."""
        content = {"samples": [describe_sample(samples, row) for row in rows]}
        urls, tries = self.options.urls, self.options.retries + 1
        for number in range(tries):
            url = urls[(server + number) % len(urls)]
            try:
                answer = request_json(url, content, self.options.timeout_seconds)
                return read_rewards(url, answer, len(rows))
            except RequestFailure as failure:
                if number + 1 == tries or not failure.may_retry:
                    raise
                logger.info("reward %s: %s; trying again", self.name, failure)
            # Random, so that processes that failed together do not all come back together.
            pause = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            if stop.wait(pause):
                raise RequestFailure(url, "given up, because another batch has failed")
        raise AssertionError("the last try returns or raises")

    def _count_failure(self, failure: RequestFailure) -> None:
        self.failures += 1
        self._in_a_row += 1
        self.last_failure = Failure(str(failure), "".join(traceback.format_exception(failure)))
        limit = self.options.max_failures
        if self._in_a_row >= limit:
            raise RewardError(
                f"reward {self.name}: failed calls in a row: {self._in_a_row} (max_failures: "
                f"{limit}); {self.failures} have failed in all, the last one with\n{failure}"
            )
        logger.warning(
            "reward %s: its call failed (%d in a row; %d end the run), %d samples go without: %s",
            self.name, self._in_a_row, limit, self.failed_samples, failure,
        )  # fmt: skip


def _check_server(url: str, timeout_s: float) -> None:
    """Raises: RequestFailure if a server is not ready."""
    health = urllib.parse.urlsplit(url)._replace(path="/health").geturl()
    try:
        request_json(health, None, timeout_s, method="GET")
        return
    except RequestFailure as failure:
        if failure.status not in (200, 404, 405, 501):  # 200: ready, though it answers no JSON
            raise
        if failure.status == 200:
            return
    read_rewards(url, request_json(url, {"samples": []}, timeout_s), 0)


# ---- the format


def describe_sample(samples: Samples, row: int) -> dict[str, Any]:
    """Returns what a server gets of a sample: its prompt, its image or answer, and its row."""
    columns = {name: encode_value(values[row]) for name, values in samples.columns.items()}
    if samples.texts is not None:
        prompt, content = columns.get("qa_problem"), {"completion": samples.texts[row]}
    else:
        images: Any = samples.images
        prompt, content = columns.get("prompt"), {"image": encode_png(images[row])}
    return {"prompt": prompt, **content, "row": columns}


def encode_png(image: Any) -> str:
    """Returns an image, a PIL image or uint8 [H, W, 3], as a PNG in base64."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    picture.save(file, "PNG", compress_level=PNG_COMPRESSION)
    return base64.b64encode(file.getvalue()).decode()


def encode_value(value: Any) -> Any:
    """Returns a value of a column as JSON can hold it.

    An image becomes {"png": base64}, bytes {"base64": ..}. NaN and infinity become null.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Image.Image):
        return {"png": encode_png(value)}
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        return {"png": encode_png(value)}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic):
        return encode_value(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): encode_value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [encode_value(item) for item in value]
    return str(value)  # dates and the like


def read_rewards(url: str, answer: Any, count: int) -> list[float]:
    """Returns the scores of an answer {"rewards": [number or null, ..]}; NaN for null.

    Raises:
        RequestFailure: it has another form or length, or a value is no finite number.
    """
    expected = f'; expected {{"rewards": [..]}} with {count} numbers or nulls'
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        shown = f"the keys {', '.join(map(ascii, answer))}" if isinstance(answer, dict) else None
        raise RequestFailure(url, f"found {shown or type(answer).__name__}{expected}")
    values = answer["rewards"]
    if len(values) != count:
        raise RequestFailure(url, f"found {len(values)} rewards{expected}")
    for place, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and _is_finite(value)):
            raise RequestFailure(url, f"reward {place}: found {ascii(value)[:80]}{expected}")
    return [math.nan if value is None else float(value) for value in values]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
