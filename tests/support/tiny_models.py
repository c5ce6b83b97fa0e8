"""Small real inputs for tests: a tokenizer directory, pictures, parquet files."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import ROLES, STRINGS

CORPUS = (
    "a red circle and two blue squares; how many green triangles are there? A. one B. two "
    "Options: think answer left of right above below the yellow shape. <think> </think> <answer>"
)


LAYOUTS = (
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    (1, 8, 1),
    pytest.param((2, 1, 4), marks=pytest.mark.slow),
    (2, 2, 2),
)
"""data, fsdp and tensor over eight devices; those that run always have all of what others have."""


def layout_name(axes: tuple[int, ...]) -> str:
    return "x".join(map(str, axes))


def tiny_tokenizer_dir(
    path: str | Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    adds_bos: bool = True,
    role_tokens: bool = True,
    layout: str = "original",
    sft_format: str | None = "deepseek",
) -> Path:
    """Writes a byte-level BPE tokenizer with Janus's special strings and the processor files.

    `layout`: `original`, or `transformers` (settings nested in processor_config.json). No
    config.json is written. `adds_bos` gives the tokenizer a post-processor that adds BOS.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(adds_bos=adds_bos, role_tokens=role_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    strings = {f"{name}_token": STRINGS[name] for name in ("bos", "eos", "pad")}
    extra = {f"{name}_token": STRINGS[name] for name in ("boi", "eoi", "image")}
    _write_json(folder / "special_tokens_map.json", strings)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **strings}
    _write_json(folder / "tokenizer_config.json", {**settings, "extra_special_tokens": extra})
    processor: dict[str, Any] = {"num_image_tokens": (image_size // patch_size) ** 2}
    pictures: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}
    if layout == "transformers":
        pictures["size"] = {"height": image_size, "width": image_size}
        _write_json(folder / "processor_config.json", {**processor, "image_processor": pictures})
        return folder
    if sft_format:
        processor["sft_format"] = sft_format
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "preprocessor_config.json", {**pictures, "image_size": image_size})
    return folder


def two_layers(config: JanusConfig) -> JanusConfig:
    """Two layers show what more do, and programs that unroll them compile sooner."""
    return dataclasses.replace(config, llama=dataclasses.replace(config.llama, num_layers=2))


def divisible(config: JanusConfig) -> JanusConfig:
    """Heads that four ways of tensor parallelism divide, still with shared keys."""
    llama = dataclasses.replace(config.llama, num_heads=8, num_kv_heads=4)
    siglip = dataclasses.replace(config.siglip, num_heads=4)
    return dataclasses.replace(config, llama=llama, siglip=siglip)


def tiny_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of random blocks, `size` as (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def encode_prompts(processor: Any, prompts: Sequence[str], length: int | None = None) -> Any:
    """Prompts of image generation, as a loader encodes them."""
    ids = [processor.prompt_ids("generate", {"prompt": prompt}) for prompt in prompts]
    return processor.encode("generate", ids, None, length)


def encode_questions(
    processor: Any, questions: Sequence[str], images: Sequence[Image.Image],
    length: int | None = None, system_prompt: str = "",
) -> Any:  # fmt: skip
    """Questions about one image each, as a loader encodes them."""
    rows = [{"qa_problem": question} for question in questions]
    ids = [processor.prompt_ids("question", row, system_prompt) for row in rows]
    return processor.encode("question", ids, images, length)


def tiny_row(i: int, **changes: Any) -> dict[str, Any]:
    """Row `i` in the published layout."""
    row = {
        "prompt": f"a red circle and {i} blue squares",
        "real_image": {"bytes": encode(tiny_image(i)), "path": f"{i}.png"},
        "qa_problem": f"how many squares are there? number {i}",
        "qa_solution": f"<answer>{i}</answer>",
        "qa_type": "OE" if i % 2 else "MC",
    }
    return {**row, **changes}


def tiny_parquet(
    path: str | Path,
    rows: int | Sequence[Mapping[str, Any]],
    *,
    columns: Mapping[str, str] | None = None,
    row_group_size: int = 8,
) -> Path:
    """Writes rows (or the first `rows` of `tiny_row`); `columns` renames them in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [tiny_row(i) for i in range(rows)] if isinstance(rows, int) else list(rows)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    renamed = columns or {}
    arrays = {
        renamed.get(name, name): pa.array(
            [row[name] for row in listed], image if name == "real_image" else None
        )
        for name in listed[0]
    }
    pq.write_table(pa.table(arrays), path, row_group_size=row_group_size)
    return path


def _train_tokenizer(*, adds_bos: bool, role_tokens: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*STRINGS.values(), *(ROLES["deepseek"] if role_tokens else ())]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    if adds_bos:
        bos = STRINGS["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
