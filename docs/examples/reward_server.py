"""A server of rewards for `http` and `http_texts`; copy it and put your own scorer into it.

    python docs/examples/reward_server.py --port 8600

    rewards:
      - {name: http, options: {urls: "http://127.0.0.1:8600/score"}}

It scores in the manner of GenEval: a prompt names a colour ("a red circle"), and the reward of its
image is the share of that colour among all strongly coloured pixels. An answer is compared with the
column `qa_solution`. Where there is nothing to compare, the reward is null: it does not apply.
Python's own modules and Pillow are enough. docs/how_to/reward_by_http.md has the format.
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import http.server
import io
import json
import re
import threading
from typing import Any

from PIL import Image

MAX_BODY_BYTES = 2**28
HUES = {"red": 0, "orange": 30, "yellow": 60, "green": 120, "blue": 240, "purple": 285}  # degrees
WIDTH = 30  # degrees on both sides of a hue

gpu = threading.Lock()  # requests come in threads; a network on a GPU takes one at a time


def score_samples(samples: list[dict[str, Any]]) -> list[float | None]:
    """Returns a number for each sample, or None where the reward does not apply."""
    with gpu:
        return [score_image(x) if "image" in x else score_answer(x) for x in samples]


def score_image(sample: dict[str, Any]) -> float | None:
    """Returns the share of the prompt's first colour among the strongly coloured pixels."""
    names = re.findall("|".join(HUES), (sample["prompt"] or "").lower())
    if not names:
        return None
    image = Image.open(io.BytesIO(base64.b64decode(sample["image"])), formats=["PNG"])
    image = image.convert("RGB").resize((32, 32))
    hits = total = 0
    for red, green, blue in zip(*[iter(image.tobytes())] * 3, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        if saturation > 0.5 and value > 0.3:
            distance = abs(hue * 360 - HUES[names[0]])
            hits += min(distance, 360 - distance) <= WIDTH
            total += 1
    return hits / total if total else 0.0


def score_answer(sample: dict[str, Any]) -> float | None:
    """Returns 1 if the answer holds the words of the column `qa_solution`, else 0."""
    solution = sample["row"].get("qa_solution")
    if not solution:
        return None
    words = re.sub(r"<[^>]*>", " ", solution).lower().split()
    return float(" ".join(words) in " ".join(sample["completion"].lower().split()))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET /health and POST of {"samples": [..]} to any other path."""

    timeout = 60  # seconds that a client may be silent

    def do_GET(self) -> None:
        """Says that the server is ready; called once before a run."""
        self.answer(*((200, {"status": "ok"}) if self.path == "/health" else (404, {})))

    def do_POST(self) -> None:
        """Scores a batch."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MAX_BODY_BYTES:
            self.answer(413, {"error": f"expected 1 to {MAX_BODY_BYTES} bytes"})
            return
        try:
            rewards = score_samples(json.loads(self.rfile.read(length))["samples"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            # 4xx: the same request would fail again, so the run does not repeat it.
            self.answer(400, {"error": f"{type(error).__name__}: {error}"})
            return
        self.answer(200, {"rewards": rewards})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        """Sends JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8600, help="0: a free one")
    args = parser.parse_args()
    server = http.server.ThreadingHTTPServer((args.host, args.port), Handler)
    print(f"serving rewards at http://{args.host}:{server.server_port}/score", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
