"""Builds the JSON of answers and images."""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from corl_jax.policies.batched import Sample
from corl_jax.serve.engine import Job


def describe_answers(
    name: str, job: Job, texts: Sequence[tuple[str, int, bool]], stops: Sequence[str]
) -> dict[str, Any]:
    """Returns a chat completion; `texts` are (text, number of tokens, whether it has ended)."""
    choices = []
    for index, (text, _, has_ended) in enumerate(texts):
        cut, was_cut = cut_at_stop(text, stops)
        choices.append({
            "index": index, "message": {"role": "assistant", "content": cut, "refusal": None},
            "logprobs": None, "finish_reason": "stop" if has_ended or was_cut else "length",
        })  # fmt: skip
    completion = sum(count for _, count, _ in texts)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion",
        "created": int(time.time()), "model": name, "choices": choices,
        "usage": {
            "prompt_tokens": job.prompt_tokens, "completion_tokens": completion,
            "total_tokens": job.prompt_tokens + completion,
        },
        "seed": job.seed,
    }  # fmt: skip


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first stop in it, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def split_in_events(content: dict[str, Any], include_usage: bool) -> Iterator[str]:
    """Yields a chat completion as server-sent events, each answer whole in one of them."""
    shared = {key: content[key] for key in ("id", "created", "model", "seed")}
    shared["object"] = "chat.completion.chunk"
    for choice in content["choices"]:
        delta = {"role": "assistant", "content": choice["message"]["content"]}
        part = {"index": choice["index"], "logprobs": None}
        for delta_of_event, reason in ((delta, None), ({}, choice["finish_reason"])):
            event = part | {"delta": delta_of_event, "finish_reason": reason}
            yield _write_event(shared | {"choices": [event]})
    if include_usage:
        yield _write_event(shared | {"choices": [], "usage": content["usage"]})
    yield "data: [DONE]\n\n"


def _write_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def describe_images(job: Job, samples: Sequence[Sample], side: int) -> dict[str, Any]:
    """Returns a response with each image as a PNG in base64."""
    return {
        "created": int(time.time()), "data": [{"b64_json": _encode_png(x)} for x in samples],
        "size": f"{side}x{side}", "output_format": "png", "seed": job.seed,
    }  # fmt: skip


def _encode_png(sample: Sample) -> str:
    file = io.BytesIO()
    assert sample.pixels is not None
    Image.fromarray(sample.pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
