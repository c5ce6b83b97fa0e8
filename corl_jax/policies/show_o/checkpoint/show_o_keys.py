"""The layout of the original files: the language model in one file, MAGVIT-v2 in another.

Source: showlab/Show-o, `models/modeling_showo.py` and `models/modeling_magvitv2.py`.
"""

from __future__ import annotations

import numpy as np

from corl_jax.models.magvit import make_codebook
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.weights.autoencoder_rows import make_vq_half_rows
from corl_jax.weights.kinds import WeightsPart
from corl_jax.weights.layouts.clip import make_vision_rows
from corl_jax.weights.table import Row, Table
from corl_jax.weights.table_rows import conv, dense, embedding, norm

MAGVIT, CLIP = "magvitv2/", "clip/"
"""Prefixes of the tokenizer's and the vision tower's tensors in the table; their files have the
names behind it."""
CLIP_FOLDER, CLIP_HUB_ID = "clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"
PARTS = (
    WeightsPart("", "pytorch_model", "", "showlab/show-o"),
    WeightsPart("magvitv2", "pytorch_model", MAGVIT, "showlab/magvitv2"),
    WeightsPart(
        CLIP_FOLDER,
        "model",
        CLIP,
        CLIP_HUB_ID,
        only_with="mm_projector.0.weight",
        # Versions of transformers differ in it where they write a tower alone.
        inner_prefix="vision_model.",
    ),
)
_LAYER, _LEAF = "showo.model.layers.{layer}", "language_model/layers"
_MID = ("block_1", "attn_1", "block_2")


def _make_phi_rows() -> list[Row]:
    return [
        *embedding("showo.model.embed_tokens.weight", "language_model/embed_tokens"),
        *norm(f"{_LAYER}.input_layernorm", f"{_LEAF}/input_layernorm"),
        *(
            row
            for name in ("q_proj", "k_proj", "v_proj", "dense")
            for row in dense(f"{_LAYER}.self_attn.{name}", f"{_LEAF}/attn/{name}")
        ),
        *(
            row
            for name in ("q_layernorm", "k_layernorm")
            for row in norm(f"{_LAYER}.self_attn.{name}", f"{_LEAF}/attn/{name}")
        ),
        *dense(f"{_LAYER}.mlp.fc1", f"{_LEAF}/mlp/fc1"),
        *dense(f"{_LAYER}.mlp.fc2", f"{_LEAF}/mlp/fc2"),
        *norm("showo.model.final_layernorm", "language_model/norm"),
        *dense("showo.lm_head", "lm_head"),
        *dense("mm_projector.0", "mm_projector/fc1"),
        *dense("mm_projector.2", "mm_projector/fc2"),
    ]


def _make_magvit_rows() -> list[Row]:
    halves = (("encoder", "downsample", "down"), ("decoder", "upsample", "up"))
    return [
        *(
            row
            for half, resample, level in halves
            for row in make_vq_half_rows(
                f"{MAGVIT}{half}", f"vqmodel/{half}", level, "block", _MID, resample, level
            )
        ),
        *conv(f"{MAGVIT}encoder.quant_conv", "vqmodel/encoder/quant_conv"),
        *conv(f"{MAGVIT}decoder.post_quant_conv", "vqmodel/decoder/post_quant_conv"),
    ]


TABLE = Table(
    name="original",
    rows=(
        *_make_phi_rows(),
        *_make_magvit_rows(),
        *make_vision_rows(f"{CLIP}vision_model", "vision_tower"),
    ),
    dropped=(
        rf"{MAGVIT}quantize\.(embedding|power_vals)",
        r".*\.rotary_emb\.inv_freq",
        # The folder of the tower may hold a whole CLIP.
        rf"{CLIP}(text_model\..*|(visual|text)_projection\.weight|logit_scale)",
        rf"{CLIP}vision_model\.embeddings\.position_ids",
    ),
)


def derive(config: ShowOConfig) -> dict[str, np.ndarray]:
    """Returns the tables of the tokenizer's quantiser, which files have and the network has not."""
    channels = config.magvit.z_channels
    powers = 2 ** np.arange(channels - 1, -1, -1, dtype=np.int64)
    return {
        f"{MAGVIT}quantize.embedding": make_codebook(channels),
        f"{MAGVIT}quantize.power_vals": powers,
    }
