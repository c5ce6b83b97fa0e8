"""The layouts of a Mask2Former with Swin: its sizes, and how its parameters are split.

mmdetection's files state no sizes: the tensors' shapes tell them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

from corl_jax.errors import Problems
from corl_jax.models.deformable import NUM_POINTS
from corl_jax.models.mask2former import NORM_GROUPS, NUM_LEVELS, Mask2Former, Mask2FormerConfig
from corl_jax.models.swin import SwinConfig
from corl_jax.weights.foreign_config import Fields, check_divisible
from corl_jax.weights.kinds import COLUMN, ROW, WHOLE, NetworkKind, Rules
from corl_jax.weights.layouts.mask2former_tables import (
    BLOCKS,
    DECODER,
    ENCODER,
    NUM_STAGES,
    TABLES,
)
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape, Table

# Settings that change the network without changing its tensors' names, and what they must be.
_SETTINGS = {
    "pre_norm": False, "enforce_input_projection": False, "common_stride": 4,
    "activation_function": "relu", "feature_strides": [4, 8, 16, 32],
}  # fmt: skip
_BACKBONE_SETTINGS = {
    "model_type": "swin", "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3,
    "use_absolute_embeddings": False,
}  # fmt: skip


def check(config: Mask2FormerConfig, where: str) -> list[str]:
    """Lists sizes that do not fit each other."""
    backbone, problems = config.backbone, []
    for name in ("depths", "num_heads"):
        values = getattr(backbone, name)
        if len(values) != NUM_STAGES:
            problems.append(
                f"{where}.backbone.{name} has {len(values)} numbers, expected {NUM_STAGES}"
            )
    if problems:
        return problems
    for stage, (depth, heads) in enumerate(zip(backbone.depths, backbone.num_heads, strict=True)):
        problems += check_divisible(
            f"{where}.backbone",
            ("width", backbone.width * 2**stage, f"num_heads of stage {stage}", heads),
            (f"depths[{stage}]", depth, "a pair of blocks", 2),
        )
    return problems + check_divisible(
        where,
        ("hidden_size", config.hidden_size, "num_heads", config.num_heads),
        ("hidden_size", config.hidden_size, "the number of groups of a norm", NORM_GROUPS),
        ("decoder_num_layers", config.decoder_num_layers, "the number of levels", NUM_LEVELS),
    )


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> Mask2FormerConfig:
    """Returns the sizes: from config.json for transformers' layouts, else from the shapes."""
    if layout.startswith("transformers"):
        return _parse_transformers(folder / "config.json", shapes, problems)
    return _parse_mmdet(folder, TABLES[layout], shapes, problems)


def _parse_transformers(
    file: Path, shapes: Mapping[str, Shape], problems: Problems
) -> Mask2FormerConfig:
    top = Fields(str(file), read_json(file), problems)
    top.expect("model_type", ("mask2former",), "this is not a Mask2Former")
    for name, value in _SETTINGS.items():
        top.expect(name, (value,), "nothing else is implemented")
    swin = top.section("backbone_config")
    for name, value in _BACKBONE_SETTINGS.items():
        swin.expect(name, (value,), "nothing else is implemented")
    hidden, layers = top.size("hidden_dim", 256), top.size("decoder_layers", 10, limit=10_000)
    top.equal("feature_size", hidden)
    # transformers counts the prediction before the first layer.
    if layers < 2:
        problems.add(f"{file}: decoder_layers is {layers}, expected at least 2")
    class_head = shapes.get("class_predictor.bias", (Mask2FormerConfig().num_classes + 1,))
    usual = SwinConfig()
    return Mask2FormerConfig(
        backbone=SwinConfig(
            width=swin.size("embed_dim", 96),
            depths=swin.sizes("depths", usual.depths),
            num_heads=swin.sizes("num_heads", usual.num_heads),
            window_size=swin.size("window_size", 7),
            patch_size=swin.size("patch_size", 4),
            mlp_ratio=int(swin.number("mlp_ratio", 4.0)),
            layer_norm_eps=swin.number("layer_norm_eps", 1e-5),
        ),
        hidden_size=hidden,
        mask_size=top.size("mask_feature_size", 256),
        encoder_intermediate_size=top.size("encoder_feedforward_dim", 1024),
        decoder_intermediate_size=top.size("dim_feedforward", 2048),
        encoder_num_layers=top.size("encoder_layers", 6, limit=10_000),
        decoder_num_layers=max(1, layers - 1),
        num_heads=top.size("num_attention_heads", 8),
        num_queries=top.size("num_queries", 100),
        # The config has a label for each class, but old files lack them.
        num_classes=max(1, class_head[0] - 1),
    )


def _parse_mmdet(
    folder: Path, table: Table, shapes: Mapping[str, Shape], problems: Problems
) -> Mask2FormerConfig:
    """Returns the sizes that the shapes tell; a missing tensor's size is the published one."""
    keys = {row.path + str(row.part[0]): row.key for row in table.rows}

    def size(path: str, axis: int, usual: int, part: int = 0, **places: int) -> int:
        shape = shapes.get(keys[f"{path}{part}"].format(**places), ())
        return shape[axis] if len(shape) > axis else usual

    usual, heads = Mask2FormerConfig(), []
    bias, mlp = f"{BLOCKS}/attn/position_bias", f"{BLOCKS}/mlp/fc1/kernel"
    for stage, number in enumerate(usual.backbone.num_heads):
        heads.append(size(bias, 1, number, stage=stage, layer=0))
    depths = [_count_layers(shapes, keys[f"{bias}0"], stage=stage) for stage in range(NUM_STAGES)]
    if not any(depths):
        problems.add(
            f"{folder}: the tensors of a Swin backbone are missing (backbone.stages.*); expected "
            "GenEval's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
        )
        return usual
    width = size("backbone/patch_embedding/kernel", 0, usual.backbone.width)
    offsets = size(bias, 0, 13 * 13, stage=0, layer=0)  # (2 * window - 1)^2
    places = size(f"{ENCODER}/attn/attention_weights/kernel", 0, 96, layer=0)
    return Mask2FormerConfig(
        backbone=SwinConfig(
            width=width,
            # A stage without tensors gets the published depth, so that each is named as missing.
            depths=tuple(d or n for d, n in zip(depths, usual.backbone.depths, strict=True)),
            num_heads=tuple(heads),
            window_size=(math.isqrt(offsets) + 1) // 2,
            patch_size=size("backbone/patch_embedding/kernel", 2, 4),
            mlp_ratio=max(1, size(mlp, 0, 4 * width, stage=0, layer=0) // width),
        ),
        hidden_size=size("query_features/embedding", 1, usual.hidden_size),
        mask_size=size("pixel_decoder/mask_conv/kernel", 0, usual.mask_size),
        encoder_intermediate_size=size(f"{ENCODER}/mlp/fc1/kernel", 0, 1024, layer=0),
        decoder_intermediate_size=size(f"{DECODER}/mlp/fc1/kernel", 0, 2048, layer=0),
        encoder_num_layers=_count_layers(shapes, keys[f"{ENCODER}/mlp/fc1/kernel0"]) or 6,
        decoder_num_layers=_count_layers(shapes, keys[f"{DECODER}/mlp/fc1/kernel0"]) or 9,
        # Both transformers have the same number.
        num_heads=max(1, places // (NUM_LEVELS * NUM_POINTS)),
        num_queries=size("query_features/embedding", 0, usual.num_queries),
        num_classes=max(1, size("class_head/bias", 0, usual.num_classes + 1) - 1),
    )


def _count_layers(shapes: Mapping[str, Shape], key: str, **places: int) -> int:
    """Counts the layers 0, 1, ... that have a tensor."""
    return next(n for n in itertools.count() if key.format(layer=n, **places) not in shapes)


RULES: Rules = (
    (r"(.*/)?stages/\d/attn/[qkv]_proj/kernel", COLUMN),
    (r"(.*/)?layers/(cross_attn|self_attn)/[qkv]_proj/kernel", COLUMN),
    (r"(.*/)?layers/(cross_attn|self_attn)/out_proj/kernel", ROW),
    (r"(.*/)?stages/\d/attn/out_proj/kernel", ROW),
    (r".*/mlp/fc1/kernel", COLUMN),
    (r".*/mlp/fc2/kernel", ROW),
    # Small: heads read and write across all of them.
    (r"pixel_decoder/layers/attn/.*/kernel", WHOLE),
    (r"backbone/(mergers/\d|patch_embedding)/.*", WHOLE),
    (r".*_convs?(/\d)?/kernel", WHOLE),
    (r"(class_head|mask_head/\d)/kernel", WHOLE),
    (r".*embedding", WHOLE),
    (r".*/(position_bias|scale|bias)", WHOLE),
)

KIND = NetworkKind(
    name="mask2former",
    module=Mask2Former,
    config=Mask2FormerConfig,
    tables=TABLES,
    parse=parse,
    check=check,
    rules=RULES,
    model_types={"mask2former": None},
)
