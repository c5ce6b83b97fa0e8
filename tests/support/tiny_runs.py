"""What tests of training share: a tiny Janus, batches of both tasks, a run directory's files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from corl_jax.devices.mesh import Rules, param_shardings
from corl_jax.params import map_with_path
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.prompts import Processor
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.train.step import Batch, TaskBatch
from corl_jax.types import EncodedPrompts, Params, Segment
from corl_jax.weights.export import save_checkpoint
from tests.support import metrics_page
from tests.support.tiny_models import tiny_parquet, tiny_row, tiny_tokenizer_dir

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)

# ---- batches


def image_batch(codes: int, tokens: int, prompts: int, group: int, seed: int = 0) -> TaskBatch:
    """Left-padded drawing prompts [BOS, text, BOI] and random codes."""
    rng = np.random.default_rng([seed, 0])
    ids = rng.integers(3, SPECIAL.image, (prompts, 8)).astype(np.int32)
    start = np.arange(prompts) * 3 % 5  # row 0 has no padding
    mask = np.arange(ids.shape[1]) >= start[:, None]
    ids[~mask] = SPECIAL.pad
    ids[np.arange(prompts), start] = SPECIAL.bos
    ids[:, -1] = SPECIAL.boi
    drawn = rng.integers(0, codes, (prompts * group, tokens)).astype(np.int32)
    return TaskBatch(
        EncodedPrompts(ids, mask), (Segment(CODES, drawn, np.ones(drawn.shape, bool)),),
        advantages=rng.standard_normal(len(drawn)).astype(np.float32),
    )  # fmt: skip


def text_batch(
    side: int, slots: int, prompts: int, group: int, length: int = 6, seed: int = 0
) -> TaskBatch:
    """Left-padded questions about a picture, and answers of every length; one is masked out."""
    rng = np.random.default_rng([seed, 1])
    picture = [SPECIAL.boi, *[SPECIAL.image] * slots, SPECIAL.eoi]
    rows = [
        [SPECIAL.bos, *picture, *rng.integers(3, SPECIAL.image, 2 + i % 4)] for i in range(prompts)
    ]
    width = max(map(len, rows)) + 1  # so that each has padding
    ids = np.full((prompts, width), SPECIAL.pad, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[width - len(values) :] = values
    mask = np.arange(width) >= width - np.array([len(row) for row in rows])[:, None]
    pixels = rng.standard_normal((prompts, side, side, 3)).astype(np.float32)
    answers = rng.integers(3, SPECIAL.image, (prompts * group, length)).astype(np.int32)
    lengths = np.arange(len(answers)) * 5 % (length + 1)  # row 0 is a masked, truncated answer
    kept = np.arange(length) < lengths[:, None]
    return TaskBatch(
        EncodedPrompts(ids, mask, pixels), (Segment(TEXT, answers, kept),),
        advantages=rng.standard_normal(len(answers)).astype(np.float32),
    )  # fmt: skip


def both_tasks(config: JanusConfig, prompts: int, group: int, seed: int = 0) -> Batch:
    slots = config.num_image_tokens
    return {
        "t2i": image_batch(config.vq.num_embeddings, slots, prompts, group, seed),
        "mm2t": text_batch(config.siglip.image_size, slots, prompts, group, seed=seed),
    }


def place_params(params: Params, mesh: jax.sharding.Mesh, rules: Rules) -> Params:
    """Puts host parameters on the mesh, by the sharding rules."""
    return jax.device_put(params, param_shardings(params, mesh, rules))


def random_params(config: JanusConfig, seed: int = 0) -> dict:
    """Float32 arrays large enough for logits to differ."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        noise = 0.15 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + 1 if path.endswith("/scale") else noise

    return map_with_path(draw, network.abstract(config))


# ---- runs


def model_dir(folder: Path, config: JanusConfig) -> Path:
    """A checkpoint of `config`, with room for a tokenizer, whose answers end early or never."""
    llama = dataclasses.replace(
        config.llama, num_layers=2, vocab_size=400, max_position_embeddings=512
    )
    vq = dataclasses.replace(config.vq, channel_multiplier=(1, 1, 1))
    config = dataclasses.replace(config, llama=llama, vq=vq, image_token_embed=32)
    words = tiny_tokenizer_dir(folder.parent / "words", image_size=16, patch_size=4)
    params = random_params(config, seed=1)
    params["lm_head"]["kernel"][:, Processor.from_dir(words).special.eos] *= 12
    save_checkpoint(folder, KIND, config, params, layout="jax")
    shutil.copytree(words, folder, dirs_exist_ok=True)
    return folder


def rows_file(path: Path, rows: int = 12) -> Path:
    """Rows in the published layout, with targets for the supervised stage."""
    extra = {"sft_answer": "<answer>two</answer>", "caption": "a red circle"}
    return tiny_parquet(path, [tiny_row(i) | extra for i in range(rows)])


def options(model: Path, rows: Path, output_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """A config of a run of seconds; `changes` replace options inside of blocks."""
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"path": str(model), "dtype": "float32", "remat": "none"},
        "data": {"path": str(rows), "max_prompt_length": 128},
        "rollout": {"group_size": 2, "max_new_tokens": 8},
        "rewards": [{"name": "format"}, {"name": "qa_accuracy"}, {"name": "t2i_pixel_mse"}],
        "train": {"prompts_per_step": 4, "max_steps": 2},
        "optimizer": {"learning_rate": 1e-3},
        "log": {"images_every": 0, "samples_every": 0},
        "export": {"layout": "jax"},
    }
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def metric_lines(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, whose metrics are all in docs/reference/metrics.md."""
    text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert not metrics_page.missing(name for line in lines for name in line)
    return lines
