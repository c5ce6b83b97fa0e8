"""BLIP's layouts: transformers' BlipForConditionalGeneration (`model_type: blip`).

Absent fields of config.json have the defaults of transformers' BlipConfig.

Source: transformers 5.23 `models/blip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.models.blip import Blip, BlipConfig, BlipTextConfig, BlipVisionConfig
from corl_jax.weights.foreign_config import Fields, check_divisible, check_token_ids
from corl_jax.weights.kinds import COLUMN, INNER, OUTER, ROW, WHOLE, NetworkKind, Rules
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import DENSE, DROP_LEADING, SAME, Row, Shape, Table
from corl_jax.weights.table_rows import conv, dense, embedding, norm

_VISION, _SEEN = "vision_model.encoder.layers.{layer}", "vision_model/layers"
_TEXT, _WRITTEN = "text_decoder.bert.encoder.layer.{layer}", "text_decoder/layers"
_EMBEDDINGS, _HEAD = "text_decoder.bert.embeddings", "text_decoder.cls.predictions"


def _make_fused_qkv_rows() -> list[Row]:
    # Vision attention has one fused tensor [3D, D]: the rows of q, then of k, then of v.
    return [
        Row(f"{_VISION}.self_attn.qkv.{leaf}", f"{_SEEN}/attn/{name}/{field}", transform, (i, 3))
        for leaf, field, transform in (("weight", "kernel", DENSE), ("bias", "bias", SAME))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
    ]


def _make_attention_rows(key: str, path: str) -> list[Row]:
    """Returns the rows of an attention of a decoder layer (self or cross), and of its norm."""
    return [
        *dense(f"{_TEXT}.{key}.self.query", f"{_WRITTEN}/{path}/q_proj"),
        *dense(f"{_TEXT}.{key}.self.key", f"{_WRITTEN}/{path}/k_proj"),
        *dense(f"{_TEXT}.{key}.self.value", f"{_WRITTEN}/{path}/v_proj"),
        *dense(f"{_TEXT}.{key}.output.dense", f"{_WRITTEN}/{path}/out_proj"),
        *norm(f"{_TEXT}.{key}.output.LayerNorm", f"{_WRITTEN}/{path}_layernorm"),
    ]


_ROWS = (
    *conv("vision_model.embeddings.patch_embedding", "vision_model/patch_embedding"),
    *embedding(
        "vision_model.embeddings.class_embedding", "vision_model/class_embedding", DROP_LEADING
    ),
    *embedding(
        "vision_model.embeddings.position_embedding",
        "vision_model/position_embedding",
        DROP_LEADING,
    ),
    *norm(f"{_VISION}.layer_norm1", f"{_SEEN}/layer_norm1"),
    *_make_fused_qkv_rows(),
    *dense(f"{_VISION}.self_attn.projection", f"{_SEEN}/attn/out_proj"),
    *norm(f"{_VISION}.layer_norm2", f"{_SEEN}/layer_norm2"),
    *dense(f"{_VISION}.mlp.fc1", f"{_SEEN}/mlp/fc1"),
    *dense(f"{_VISION}.mlp.fc2", f"{_SEEN}/mlp/fc2"),
    *norm("vision_model.post_layernorm", "vision_model/post_layernorm"),
    *embedding(f"{_EMBEDDINGS}.word_embeddings.weight", "text_decoder/word_embeddings"),
    *embedding(f"{_EMBEDDINGS}.position_embeddings.weight", "text_decoder/position_embeddings"),
    *norm(f"{_EMBEDDINGS}.LayerNorm", "text_decoder/embed_layernorm"),
    *_make_attention_rows("attention", "attn"),
    *_make_attention_rows("crossattention", "cross_attn"),
    *dense(f"{_TEXT}.intermediate.dense", f"{_WRITTEN}/mlp/fc1"),
    *dense(f"{_TEXT}.output.dense", f"{_WRITTEN}/mlp/fc2"),
    *norm(f"{_TEXT}.output.LayerNorm", f"{_WRITTEN}/mlp_layernorm"),
    *dense(f"{_HEAD}.transform.dense", "text_decoder/head/dense"),
    *norm(f"{_HEAD}.transform.LayerNorm", "text_decoder/head/layernorm"),
    *dense(f"{_HEAD}.decoder", "text_decoder/head", bias=False),
)
_POSITION_IDS = r"text_decoder\.bert\.embeddings\.position_ids"

# The head's bias has two names that transformers ties: `predictions.bias`, which it saves, and
# `predictions.decoder.bias`, which computes. The published .bin file holds both. The layout is the
# one that knows the most tensors, the first among equals, so `published` must be the first.
# `decoder.weight` may be there or not in either; see `tie_word_embeddings`.
TABLES: dict[str, Table] = {
    "published": Table(
        name="published",
        rows=(*_ROWS, Row(f"{_HEAD}.decoder.bias", "text_decoder/head/bias")),
        dropped=(_POSITION_IDS, r"text_decoder\.cls\.predictions\.bias"),
    ),
    "transformers": Table(
        name="transformers",
        rows=(*_ROWS, Row(f"{_HEAD}.bias", "text_decoder/head/bias")),
        dropped=(_POSITION_IDS,),
    ),
}


HEAD_KERNEL = "text_decoder.cls.predictions.decoder.weight"


def check(config: BlipConfig, where: str) -> list[str]:
    """Lists sizes that do not fit each other."""
    vision, text = config.vision, config.text
    tokens = {"bos_token_id": text.bos_token_id, "sep_token_id": text.sep_token_id}
    return [
        *check_divisible(
            f"{where}.vision",
            ("hidden_size", vision.hidden_size, "num_heads", vision.num_heads),
            ("image_size", vision.image_size, "patch_size", vision.patch_size),
        ),
        *check_divisible(
            f"{where}.text", ("hidden_size", text.hidden_size, "num_heads", text.num_heads)
        ),
        *check_token_ids(f"{where}.text", "vocab_size", text.vocab_size, **tokens),
    ]


def parse(folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems) -> BlipConfig:
    """Returns the sizes of a captioner in either layout; adds its problems to `problems`."""
    file = folder / "config.json"
    top = Fields(str(file), read_json(file), problems)
    top.expect("model_type", ("blip",), "this is not a BLIP checkpoint")
    if any(key.startswith(("text_encoder.", "text_model.")) for key in shapes):
        problems.add(
            f"{folder}: the weights hold a text encoder: they are BLIP's for questions or "
            "retrieval, expected the captioner's (BlipForConditionalGeneration)"
        )
    vision, text = top.section("vision_config"), top.section("text_config")
    # The tensors decide, whatever the config says: the published file holds a kernel for the head.
    tied = HEAD_KERNEL not in shapes
    if tied and not any(part.data.get("tie_word_embeddings", True) for part in (top, text)):
        problems.add(
            f"{file}: tie_word_embeddings is False, expected True: the weights hold no "
            f"{HEAD_KERNEL}"
        )
    return BlipConfig(_parse_vision(vision), _parse_text(text, tied))


def _parse_vision(fields: Fields) -> BlipVisionConfig:
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
        fields.problems.add(
            f"{fields.where}: image_size is {config.image_size}, expected a multiple of "
            f"patch_size, {config.patch_size}"
        )
    _check_heads(fields, config.hidden_size, config.num_heads)
    return config


def _parse_text(fields: Fields, tied: bool) -> BlipTextConfig:
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("is_decoder", (True,), "a captioner's layers attend to the image")
    config = BlipTextConfig(
        vocab_size=fields.size("vocab_size", 30524),
        hidden_size=fields.size("hidden_size", 768),
        intermediate_size=fields.size("intermediate_size", 3072),
        num_layers=fields.size("num_hidden_layers", 12, limit=10_000),
        # The default of transformers; the published files state 12.
        num_heads=fields.size("num_attention_heads", 8),
        max_position_embeddings=fields.size("max_position_embeddings", 512),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
        bos_token_id=fields.token("bos_token_id", 30522),
        sep_token_id=fields.token("sep_token_id", 102),
        tie_word_embeddings=tied,
    )
    for name in ("bos_token_id", "sep_token_id"):
        if getattr(config, name) >= config.vocab_size:
            fields.problems.add(
                f"{fields.where}: {name} is {getattr(config, name)}, expected less than "
                f"vocab_size, {config.vocab_size}"
            )
    _check_heads(fields, config.hidden_size, config.num_heads)
    return config


def _check_heads(fields: Fields, width: int, heads: int) -> None:
    if width % heads:
        fields.problems.add(
            f"{fields.where}: hidden_size is {width}, expected a multiple of "
            f"num_attention_heads, {heads}"
        )


RULES: Rules = (
    (r".*/layers/(cross_)?attn/[qkv]_proj/kernel", COLUMN),
    (r".*/layers/(cross_)?attn/out_proj/kernel", ROW),
    (r".*/layers/mlp/fc1/kernel", COLUMN),
    (r".*/layers/mlp/fc2/kernel", ROW),
    (r"text_decoder/word_embeddings/embedding", OUTER),
    (r"text_decoder/head(/dense)?/kernel", INNER),
    (r"vision_model/(patch|position|class)_embedding/.*", WHOLE),
    (r"text_decoder/position_embeddings/embedding", WHOLE),
    (r".*layer_?norm[12]?/scale", WHOLE),
    (r".*/bias", WHOLE),
)

KIND = NetworkKind(
    name="blip",
    module=Blip,
    config=BlipConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
    model_types={"blip": None},
)
