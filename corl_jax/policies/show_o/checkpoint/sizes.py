"""Reads the sizes of a Show-o from its config.json, its tensors and phi-1_5's config.json.

config.json states the vocabulary and the number of an image's codes. Most sizes are shapes of
tensors. What no tensor shows is in phi-1_5/config.json, and has the published values without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.models.clip import ClipVisionConfig
from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.policies.show_o.checkpoint.files import PHI_HUB_ID, VERSION, find_clip, find_phi
from corl_jax.policies.show_o.checkpoint.show_o_keys import CLIP, MAGVIT
from corl_jax.policies.show_o.network import NUM_NEW_TOKENS, ShowOConfig
from corl_jax.weights.foreign_config import Fields, check_count, check_divisible
from corl_jax.weights.layouts.clip import check_vision, parse_vision
from corl_jax.weights.own_config import MAX_LAYERS
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape

CLASS_NAME = "Showo"
_VOCABULARIES = ("showo.model.embed_tokens.weight", "showo.lm_head.weight")
_LAYER = "showo.model.layers.{}."
_GROUPS = 32  # of the tokenizer's norms
MAX_BITS = 20  # of an image code


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> ShowOConfig:
    """Reads the sizes of a folder with the tensors `shapes`; adds problems to `problems`."""
    file = folder / "config.json"
    if not file.is_file():
        problems.add(
            f"{file}: not found, but it states how many codes an image has; copy config.json from "
            "the Show-o that the weights come from"
        )
        return ShowOConfig()
    fields = Fields(str(file), read_json(file), problems)
    stated = fields.size("codebook_size", MagvitConfig().num_codes, limit=2**MAX_BITS)
    magvit, phi = _infer_magvit(shapes, stated), _infer_phi(shapes)
    phi = _read_phi_settings(folder, phi, problems)
    codes = magvit.num_codes
    fields.equal("codebook_size", codes)
    if any(key in shapes for key in _VOCABULARIES):  # else the missing tensors are the problem
        fields.equal("vocab_size", phi.vocab_size)
        fields.equal("mask_token_id", phi.vocab_size - 1)
    projector = ["mm_projector.0.weight"]
    has_projector = projector[0] in shapes
    w_clip_vit = fields.data["w_clip_vit"] if fields.has("w_clip_vit") else has_projector
    if not isinstance(w_clip_vit, bool):
        problems.add(f"{file}: w_clip_vit is {w_clip_vit!r}, expected true or false")
    elif has_projector and not w_clip_vit:
        problems.add(
            f"{file}: w_clip_vit is false, expected true: the weights have a projector "
            "mm_projector; copy config.json from the Show-o that the weights come from"
        )
    return ShowOConfig(
        phi=phi,
        magvit=magvit,
        num_vq_tokens=fields.size("num_vq_tokens", 256, limit=2**20),
        llm_vocab_size=fields.size(
            "llm_vocab_size", max(1, phi.vocab_size - NUM_NEW_TOKENS - codes - 1)
        ),
        w_clip_vit=bool(w_clip_vit),
        clip_width=_get_size(shapes, projector, 1, ShowOConfig.clip_width),
        projector_width=_get_size(shapes, projector, 0, ShowOConfig.projector_width),
        clip=_read_clip(folder, shapes, problems),
    )


def check(config: ShowOConfig, where: str) -> list[str]:
    """Lists sizes that do not fit each other."""
    phi, magvit, problems = config.phi, config.magvit, []
    if config.vocab_size != phi.vocab_size:
        problems.append(
            f"{where}: found {phi.vocab_size} tokens in the embedding, expected "
            f"{config.vocab_size}: llm_vocab_size {config.llm_vocab_size}, {NUM_NEW_TOKENS} new "
            f"tokens, {config.num_codes} codes and the mask token; correct llm_vocab_size"
        )
    if math.isqrt(config.num_vq_tokens) ** 2 != config.num_vq_tokens:
        problems.append(
            f"{where}: num_vq_tokens is {config.num_vq_tokens}, expected a square number: images "
            "are as high as wide"
        )
    if phi.rotary_dim % 2 or not 0 < phi.rotary_dim <= phi.head_dim:
        problems.append(
            f"{where}: partial_rotary_factor {phi.partial_rotary_factor:g} rotates "
            f"{phi.rotary_dim} of {phi.head_dim} dimensions, expected an even number of them"
        )
    levels = len(magvit.encoder_channels)
    for name in ("encoder_blocks", "decoder_channels", "decoder_blocks"):
        problems += check_count(f"{where}.magvit", name, getattr(magvit, name), levels)
    groups = "the groups of a norm", _GROUPS
    channels = (*magvit.encoder_channels, *magvit.decoder_channels, magvit.base_channels)
    problems += check_divisible(
        where,
        ("phi.num_heads", phi.num_heads, "phi.num_kv_heads", phi.num_kv_heads),
        *(("magvit's channels", width, *groups) for width in dict.fromkeys(channels)),
    )
    if config.clip is not None:
        problems += _check_clip(config, config.clip, where)
    if magvit.z_channels > MAX_BITS:
        problems.append(
            f"{where}: z_channels is {magvit.z_channels}, expected at most {MAX_BITS} bits"
        )
    return problems


def _check_clip(config: ShowOConfig, clip: ClipVisionConfig, where: str) -> list[str]:
    """Lists sizes of the vision tower and its projector that do not fit each other."""
    problems = check_vision(clip, f"{where}.clip")
    pairs = (
        ("channels of the tower's features", clip.vision.hidden_size, config.clip_width),
        ("channels of the embeddings", config.phi.hidden_size, config.projector_width),
    )
    problems += [
        f"{where}: found {size} {name}, and a projector mm_projector for {expected}; put the "
        "folder there that belongs to this Show-o"
        for name, size, expected in pairs
        if size != expected
    ]
    if not config.w_clip_vit:
        problems.append(f"{where}: has a vision tower, but w_clip_vit is false; set it to true")
    return problems


def check_expressible(layout: str, config: ShowOConfig) -> None:
    """Checks that the original files can express the sizes. Raises: InputError if not."""
    if config.w_clip_vit and (config.clip_width, config.projector_width) != (1024, 2048):
        raise InputError(
            f"w_clip_vit: found a projector of {config.clip_width} to {config.projector_width} "
            "channels; the original code has 1024 to 2048 only: write the layout jax"
        )


def write_config(
    layout: str, config: ShowOConfig, dtype: str, tokenizer: Path | None
) -> dict[str, Any]:
    """Returns the JSON of a new config.json of the original code."""
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": VERSION,
        "codebook_size": config.num_codes,
        "llm_model_path": PHI_HUB_ID,
        "llm_vocab_size": config.llm_vocab_size,
        # Of the code's versions those that read it would else load the weights of phi-1_5 first.
        "load_from_showo": True,
        "mask_token_id": config.mask_token,
        "num_vq_tokens": config.num_vq_tokens,
        "vocab_size": config.vocab_size,
        "w_clip_vit": config.w_clip_vit,
    }


def _read_clip(
    folder: Path, shapes: Mapping[str, Shape], problems: Problems
) -> ClipVisionConfig | None:
    """Returns the sizes of the vision tower; None if its tensors are not among `shapes`."""
    place = find_clip(folder)
    if place is None or not any(key.startswith(CLIP) for key in shapes):
        return None
    return parse_vision(place, problems)


def _infer_phi(shapes: Mapping[str, Shape]) -> PhiConfig:
    """Returns the sizes that the tensors show; a size that none shows has the default."""
    usual, layers = PhiConfig(), _count(shapes, _LAYER)

    def get_size(name: str, axis: int, default: int) -> int:
        # Of any layer: the file may lack a tensor, which is then named as missing.
        keys = [f"{_LAYER.format(layer)}{name}" for layer in range(layers)]
        return _get_size(shapes, keys, axis, default)

    head_dim = get_size("self_attn.q_layernorm.weight", 0, usual.head_dim)
    queries = get_size("self_attn.q_proj.weight", 0, usual.num_heads * head_dim)
    keys = get_size("self_attn.k_proj.weight", 0, queries)
    return dataclasses.replace(
        usual,
        vocab_size=_get_size(shapes, _VOCABULARIES, 0, usual.vocab_size),
        hidden_size=_get_size(shapes, _VOCABULARIES, 1, usual.hidden_size),
        intermediate_size=get_size("mlp.fc1.weight", 0, usual.intermediate_size),
        num_layers=layers or usual.num_layers,
        num_heads=max(1, queries // head_dim),
        num_kv_heads=max(1, keys // head_dim),
        head_dim=head_dim,
    )


def _infer_magvit(shapes: Mapping[str, Shape], num_codes: int) -> MagvitConfig:
    """Returns the sizes that the tensors show; `num_codes` counts if none shows another number."""
    usual = MagvitConfig(z_channels=num_codes.bit_length() - 1)
    levels = {"encoder": "down", "decoder": "up"}
    values: dict[str, Any] = {}
    for half, name in levels.items():
        level = f"{MAGVIT}{half}.{name}.{{}}."
        places = [level.format(i) + "block.{}." for i in range(_count(shapes, level))]
        if not places:
            return usual
        counts = [_count(shapes, place) for place in places]
        values[f"{half}_blocks"] = tuple(counts)
        values[f"{half}_channels"] = tuple(
            _get_size(
                shapes,
                [f"{place.format(i)}conv{n}.weight" for i in range(count) for n in (1, 2)],
                0,
                _GROUPS,
            )
            for place, count in zip(places, counts, strict=True)
        )
    bits = [f"{MAGVIT}encoder.{name}.weight" for name in ("conv_out", "quant_conv")]
    values["z_channels"] = _get_size(shapes, bits, 0, usual.z_channels)
    first = [f"{MAGVIT}encoder.conv_in.weight"]
    values["base_channels"] = _get_size(shapes, first, 0, usual.base_channels)
    return MagvitConfig(**values)


def _read_phi_settings(folder: Path, phi: PhiConfig, problems: Problems) -> PhiConfig:
    """Reads what no tensor shows from phi-1_5's config.json, if there is one."""
    place = find_phi(folder)
    file = place / "config.json" if place else None
    if file is None or not file.is_file():
        return phi
    fields = Fields(str(file), read_json(file), problems)
    fields.expect("hidden_act", ("gelu_new",), "the only activation implemented")
    fields.expect("rope_scaling", (None,), "not implemented")
    # Its sizes are not compared: a small Show-o may have the folder of the large one's tokenizer.
    # transformers 5 writes both rotary settings into a section of their own.
    rope = fields.section("rope_parameters")
    rope.expect("rope_type", ("default",), "not implemented")
    return dataclasses.replace(
        phi,
        partial_rotary_factor=rope.number(
            "partial_rotary_factor",
            fields.number("partial_rotary_factor", phi.partial_rotary_factor),
        ),
        rope_theta=rope.number("rope_theta", fields.number("rope_theta", phi.rope_theta)),
        layer_norm_eps=fields.number("layer_norm_eps", phi.layer_norm_eps),
        max_position_embeddings=fields.size("max_position_embeddings", phi.max_position_embeddings),
    )


def _get_size(shapes: Mapping[str, Shape], keys: Sequence[str], axis: int, default: int) -> int:
    """Returns a size of the first of the tensors that has it, a positive number."""
    sizes = (shapes[key][axis] for key in keys if axis < len(shapes.get(key, ())))
    return next((size for size in sizes if size > 0), default)


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """Returns how many parts the tensors' names number, with those that miss a tensor or all."""
    before, behind = map(re.escape, pattern.split("{}"))
    place = re.compile(rf"{before}(0|[1-9][0-9]*){behind}")
    numbers = {match[1] for match in map(place.match, shapes) if match}
    # A number far from the others is that of an unknown tensor.
    most = min(2 * len(numbers), MAX_LAYERS)
    return max((n for n in range(1, most + 1) if str(n - 1) in numbers), default=0)
