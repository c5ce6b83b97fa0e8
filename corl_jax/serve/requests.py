"""Reads the JSON of a request and checks it, before anything waits for the device."""

from __future__ import annotations

import argparse
import base64
import binascii
import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from corl_jax.data.images import PNG_SIGNATURE, BadImage, decode_image
from corl_jax.data.questions import find_text_problems
from corl_jax.errors import Problems
from corl_jax.inference import MAX_SEED, check_image_options, check_text_options
from corl_jax.nearest import suggest_name

MAX_SAMPLES = 64  # of one request
# As many as a large image has codes; all other requests wait for the steps of one.
MAX_SERVED_STEPS = 1024
MAX_TEXT = 200_000  # characters of a request's text; more than any model's positions hold
MAX_IMAGE_PIXELS = 2**24  # 50 MB as RGB
MAX_STOPS = 4
DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp);base64,", re.IGNORECASE)

# Fields of OpenAI's API that are not sampled by -> the values that change nothing. null fits each.
CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "num_beams": (1,),
    "min_p": (0,), "parallel_tool_calls": (False, True),
}  # fmt: skip
IMAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",), "output_format": ("png",), "stream": (False,),
    "quality": ("auto", "standard"), "background": ("auto", "opaque"), "moderation": ("auto",),
    "partial_images": (0,), "output_compression": (100,), "style": (),
}  # fmt: skip
LABELS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
"""Fields that label a request; they have no meaning here and are not read."""
CHAT_OPTIONS = (
    "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "n",
    "stop", "stream", "stream_options", "instruction",
)  # fmt: skip
IMAGE_OPTIONS = ("prompt", "n", "size", "seed", "cfg_scale", "temperature", "image_steps")


class ApiError(Exception):
    """A request that gets an error as its answer."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A question about an image. `options` are those of `generate text`; None: not given."""

    question: str
    image: Image
    options: argparse.Namespace
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """A prompt of images. `options` are those of `generate image`; None: not given."""

    prompt: str
    options: argparse.Namespace


def read_chat(body: Any) -> ChatRequest:
    """Reads a request for answers. Raises: ApiError with all problems of its options."""
    body = _read_object(body)
    problems = Problems()
    _check_fields(body, CHAT_OPTIONS, CHAT_FIELDS, problems)
    question, system_prompt, image = _read_messages(body.get("messages"))
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    if None not in limits and limits[0] != limits[1]:
        problems.add("max_tokens: differs from max_completion_tokens; give one of them")
    options = _start_options(
        body, max_new_tokens=limits[0] if limits[0] is not None else limits[1],
        top_p=body.get("top_p"), top_k=body.get("top_k"), instruction=body.get("instruction"),
        system_prompt=system_prompt,
    )  # fmt: skip
    if options.greedy:
        # Clients send top_p with temperature 0, where it changes nothing.
        options.top_p = options.top_k = None
    check_text_options(options, _spell_chat, problems)
    problems.add(find_text_problems("messages: the question", question))
    _check_samples(options, problems)
    stop = _read_stops(body.get("stop"), problems)
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict) or not isinstance(body.get("stream") or False, bool):
        problems.add("stream: expected true or false, and stream_options an object")
        stream_options = {}
    _raise_problems(problems)
    return ChatRequest(
        question, image, options, stop, bool(body.get("stream")),
        bool(stream_options.get("include_usage")),
    )  # fmt: skip


def read_image_request(body: Any, side: int) -> ImageRequest:
    """Reads a request for images of `side` pixels. Raises: ApiError with all problems."""
    body = _read_object(body)
    problems = Problems()
    _check_fields(body, IMAGE_OPTIONS, IMAGE_FIELDS, problems)
    options = _start_options(
        body, cfg_scale=body.get("cfg_scale"), image_steps=body.get("image_steps"), think=False,
        spread_steps=False, top_k=None, top_p=None, max_new_tokens=None,
    )  # fmt: skip
    check_image_options(options, spell_image_field, problems, max_steps=MAX_SERVED_STEPS)
    prompt = body.get("prompt")
    problems.add(find_text_problems("prompt", prompt))
    if isinstance(prompt, str) and len(prompt) > MAX_TEXT:
        problems.add(f"prompt: found {len(prompt):,} characters; expected at most {MAX_TEXT:,}")
    _check_samples(options, problems)
    if body.get("size") not in (None, "auto", f"{side}x{side}"):
        problems.add(
            f"size: found {body['size']!r}; this model makes images of {side}x{side}; leave size "
            "out, or give auto"
        )
    _raise_problems(problems)
    return ImageRequest(str(prompt), options)


def check_model(body: Any, name: str) -> None:
    """Raises: ApiError 404 if a request names another model than `name`."""
    model = _read_object(body).get("model")
    if model is not None and model != name:
        message = f"model: found {str(model)[:200]!r}; this server has {name!r} alone"
        raise ApiError(404, message, code="model_not_found", param="model")


# ---- options


def _read_object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, f"found {type(body).__name__}; expected a JSON object")
    return body


def _start_options(body: Mapping[str, Any], **more: Any) -> argparse.Namespace:
    """Returns the options that both kinds of requests have, and `more`."""
    temperature, seed, n = body.get("temperature"), body.get("seed"), body.get("n")
    # OpenAI's API says greedy by a temperature of 0. A bool is an int for Python.
    is_greedy = temperature == 0 and not isinstance(temperature, bool)
    return argparse.Namespace(
        temperature=None if is_greedy else temperature, greedy=True if is_greedy else None,
        # Other seeds by default, because clients that want several samples may repeat a request.
        seed=secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
        samples=1 if n is None else n, batch_size=1, **more,
    )  # fmt: skip


def _spell_chat(name: str) -> str:
    return {"samples": "n", "max_new_tokens": "max_tokens", "greedy": "temperature 0"}.get(
        name, name
    )


def spell_image_field(name: str) -> str:
    """Returns the field of a request that says an option of images."""
    return {"samples": "n", "greedy": "temperature 0"}.get(name, name)


def _check_samples(options: argparse.Namespace, problems: Problems) -> None:
    if isinstance(options.samples, int) and options.samples > MAX_SAMPLES:
        problems.add(f"n: found {options.samples}; expected at most {MAX_SAMPLES}")
    for name, value in vars(options).items():
        if isinstance(value, bool) and name not in ("greedy", "think", "spread_steps"):
            problems.add(f"{_spell_chat(name)}: found true or false; expected a number")


def _check_fields(
    body: Mapping[str, Any], read: Sequence[str], fixed: Mapping[str, tuple], problems: Problems
) -> None:
    """Adds a problem for each field that has no effect here, but would have at OpenAI."""
    known = ("model", *read, *fixed, *LABELS)
    for name, value in body.items():
        if name not in known:
            problems.add(f"{name[:80]!r}: unknown; {suggest_name(name[:80], known)}")
        elif name in fixed and value is not None and value not in fixed[name]:
            shown = str(value)[:80]
            problems.add(
                f"{name}: found {shown!r}, which this server cannot do; leave the field out"
            )


def _read_stops(value: Any, problems: Problems) -> tuple[str, ...]:
    """Returns the texts at which an answer is cut."""
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS or not all(isinstance(x, str) and x for x in stops):
        problems.add(f"stop: expected a text, or up to {MAX_STOPS} of them, none of them empty")
        return ()
    return tuple(stops)


def _raise_problems(problems: Problems) -> None:
    """Raises: ApiError with all problems."""
    if problems:
        param = next(iter(problems)).partition(":")[0]
        raise ApiError(400, "; ".join(problems), code="invalid_value", param=param)


# ---- messages


def _refuse(message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"messages: {message}", code=code, param="messages")


def _read_messages(messages: Any) -> tuple[str, str, Image]:
    """Returns question, system prompt and image. Raises: ApiError."""
    if not isinstance(messages, list) or not all(isinstance(x, dict) for x in messages):
        raise _refuse("expected a list of objects with role and content")
    roles = [message.get("role") for message in messages]
    *before, last = roles or [None]
    if last != "user" or any(role not in ("system", "developer") for role in before):
        raise _refuse(
            f"found the roles {str(roles)[:200]}; expected one message of the user, after those of "
            "the system: the model answers single questions"
        )
    systems = [_read_parts(message.get("content")) for message in messages[:-1]]
    if any(images for _, images in systems):
        raise _refuse("found an image in a system message; expected it in the user's")
    texts, urls = _read_parts(messages[-1].get("content"))
    if len(urls) != 1:
        raise _refuse(f"found {len(urls)} images; expected one image_url part in the user's")
    question = "\n".join(texts)
    system_prompt = "\n".join(text for parts, _ in systems for text in parts)
    if len(question) + len(system_prompt) > MAX_TEXT:
        raise _refuse(f"expected at most {MAX_TEXT:,} characters", "context_length_exceeded")
    return question, system_prompt, decode_data_url(urls[0])


def _read_parts(content: Any) -> tuple[list[str], list[Any]]:
    """Returns the texts and the URLs of images of a message. Raises: ApiError."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts, urls = [], []
    for part in parts if isinstance(parts, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind == "image_url":
            urls.append(value.get("url") if isinstance(value, dict) else value)
        else:
            shown = str(kind)[:80]
            raise _refuse(f"found content of type {shown}; expected parts of type text, image_url")
    return texts, urls


def decode_data_url(url: Any) -> Image:
    """Returns the image of a data: URL. Raises: ApiError."""
    if not isinstance(url, str):
        raise _refuse(f"image_url: found {type(url).__name__}; expected a data: URL")
    head = DATA_URL.match(url)
    if head is None:
        raise _refuse(
            f"image_url: found {url[:60]!r}; expected data:image/png;base64,.. (or jpeg, webp): "
            "this server fetches nothing",
            "invalid_image_url",
        )
    try:
        data = base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refuse(f"image_url: not valid base64 ({error})", "invalid_base64_image") from error
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if not (is_webp or data.startswith((PNG_SIGNATURE, b"\xff\xd8\xff"))):
        raise _refuse("image_url: the data are no PNG, JPEG or WebP", "invalid_image_format")
    try:
        return decode_image(data, max_pixels=MAX_IMAGE_PIXELS)
    except BadImage as error:
        raise _refuse(f"image_url: {error}", "image_parse_error") from error
