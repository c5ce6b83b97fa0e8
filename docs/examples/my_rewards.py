"""Rewards of your own. Copy this file, and name its functions in a config:

rewards:
  - {use: "docs/examples/my_rewards.py:brightness", weight: 0.5}
  - {use: "docs/examples/my_rewards.py:brevity", options: {most_words: 20}}
  - use: "docs/examples/my_rewards.py:judge"
    options: {url: "http://127.0.0.1:8000"}
    timeout_s: 30

`images` makes it a reward of generated images, `texts` one of answers. Other parameters are columns
of the data, a list with one value per sample; those after the `*` are options. The file is imported
once and keeps its state from call to call: one thread, one event loop.
More: docs/how_to/write_a_reward.md.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request

from PIL import Image, ImageStat


def brightness(images: list[Image.Image], *, target: float = 1.0) -> list[float]:
    """1 for an image whose mean brightness is `target` (0 black, 1 white), less away from it."""
    means = [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]
    return [1 - abs(mean - target) for mean in means]


def brevity(texts: list[str], qa_type=None, *, most_words: int = 40) -> list[float | None]:
    """1 for answers of up to `most_words` words, less the longer; open questions only.

    `qa_type` has a default, so data without that column will do: then all answers count.
    """
    kinds = qa_type or ["OE"] * len(texts)
    lengths = [max(len(text.split()), 1) for text in texts]
    return [
        min(1.0, most_words / length) if kind == "OE" else None
        for length, kind in zip(lengths, kinds, strict=True)
    ]


async def judge(
    texts: list[str], qa_problem: list[str], *, url: str, at_once: int = 8
) -> list[float | None]:
    """What a service of yours says: POST {question, answer} gives {score}, a number or null."""
    free = asyncio.Semaphore(at_once)

    def ask(question: str, answer: str) -> float | None:
        body = json.dumps({"question": question, "answer": answer}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)["score"]

    async def one(question: str, answer: str) -> float | None:
        async with free:
            return await asyncio.to_thread(ask, question, answer)

    return await asyncio.gather(*map(one, qa_problem, texts))
