"""transformers' config.json of BLIP's captioner: read.

Fields that are absent mean what transformers' BlipConfig means by it: 8 heads in the decoder,
for one, where the published files state 12.

Source: transformers 5.23 `models/blip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.models.blip import BlipConfig, BlipVisionConfig
from corl_jax.models.blip_text import BlipTextConfig
from corl_jax.weights.foreign_config import Fields, indivisible, not_below
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape

HEAD_KERNEL = "text_decoder.cls.predictions.decoder.weight"


def check(config: BlipConfig, where: str) -> list[str]:
    """Sizes that do not fit each other."""
    vision, text = config.vision, config.text
    tokens = {"bos_token_id": text.bos_token_id, "sep_token_id": text.sep_token_id}
    return [
        *indivisible(
            f"{where}.vision",
            ("hidden_size", vision.hidden_size, "num_heads", vision.num_heads),
            ("image_size", vision.image_size, "patch_size", vision.patch_size),
        ),
        *indivisible(
            f"{where}.text", ("hidden_size", text.hidden_size, "num_heads", text.num_heads)
        ),
        *not_below(f"{where}.text", "vocab_size", text.vocab_size, **tokens),
    ]


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: list[str]
) -> BlipConfig:
    """The sizes of a captioner; problems are appended.

    A head whose kernel is in the file has it for its own, as in the published one, whatever the
    config says of tying. `layout` makes no difference.
    """
    file = folder / "config.json"
    top = Fields(str(file), read_json(file), problems)
    top.expect("model_type", ("blip",), "this is not a BLIP checkpoint")
    if any(key.startswith(("text_encoder.", "text_model.")) for key in shapes):
        problems.append(
            f"{folder}: the weights hold a text encoder: they are BLIP's for questions or "
            "retrieval, expected the captioner's (BlipForConditionalGeneration)"
        )
    vision, text = top.section("vision_config"), top.section("text_config")
    tied = HEAD_KERNEL not in shapes
    if tied and not any(one.data.get("tie_word_embeddings", True) for one in (top, text)):
        problems.append(
            f"{file}: tie_word_embeddings is False, expected True: the weights hold no "
            f"{HEAD_KERNEL}"
        )
    return BlipConfig(_vision(vision), _text(text, tied))


def _vision(fields: Fields) -> BlipVisionConfig:
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("num_channels", (3,), "images are RGB")
    config = BlipVisionConfig(
        image_size=fields.size("image_size", 384),
        patch_size=fields.size("patch_size", 16),
        hidden_size=fields.size("hidden_size", 768),
        intermediate_size=fields.size("intermediate_size", 3072),
        num_layers=fields.size("num_hidden_layers", 12, limit=10_000),
        num_heads=fields.size("num_attention_heads", 12),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5),
    )
    if config.image_size % config.patch_size:
        fields.problems.append(
            f"{fields.where}: image_size is {config.image_size}, expected a multiple of "
            f"patch_size, {config.patch_size}"
        )
    _check_heads(fields, config.hidden_size, config.num_heads)
    return config


def _text(fields: Fields, tied: bool) -> BlipTextConfig:
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("is_decoder", (True,), "a captioner's layers attend to the image")
    config = BlipTextConfig(
        vocab_size=fields.size("vocab_size", 30524),
        hidden_size=fields.size("hidden_size", 768),
        intermediate_size=fields.size("intermediate_size", 3072),
        num_layers=fields.size("num_hidden_layers", 12, limit=10_000),
        num_heads=fields.size("num_attention_heads", 8),
        max_position_embeddings=fields.size("max_position_embeddings", 512),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
        bos_token_id=fields.token("bos_token_id", 30522),
        sep_token_id=fields.token("sep_token_id", 102),
        tie_word_embeddings=tied,
    )
    for name in ("bos_token_id", "sep_token_id"):
        if getattr(config, name) >= config.vocab_size:
            fields.problems.append(
                f"{fields.where}: {name} is {getattr(config, name)}, expected less than "
                f"vocab_size, {config.vocab_size}"
            )
    _check_heads(fields, config.hidden_size, config.num_heads)
    return config


def _check_heads(fields: Fields, width: int, heads: int) -> None:
    if width % heads:
        fields.problems.append(
            f"{fields.where}: hidden_size is {width}, expected a multiple of "
            f"num_attention_heads, {heads}"
        )
