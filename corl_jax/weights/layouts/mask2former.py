"""Mask2Former's layouts with a Swin backbone: two of transformers and two of mmdetection.

`transformers` has the names of version 5, `transformers4` those of the published files of the hub.
`mmdet` is mmdetection 2.x, which GenEval uses, and `mmdet3` is mmdetection 3.x. Their files state
no sizes: the tensors' shapes tell them.

mmdetection orders the features of a patch merging by feature, then row, then column (`nn.Unfold`),
transformers by column, then row, then feature.

Sources: transformers 5.24 `models/mask2former`, `models/swin`, `conversion_mapping.py`;
mmdetection 2.25 and 3.0 `models/backbones/swin.py`, `models/dense_heads/mask2former_head.py`,
`models/plugins/msdeformattn_pixel_decoder.py`; mmcv 1.7 `cnn/bricks/transformer.py`.
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
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import CONV, DENSE, SAME, Row, Shape, Table, Transform
from corl_jax.weights.table_rows import conv, dense, embedding, norm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NUM_STAGES = 4
_BLOCKS = "backbone/stages/{stage}"
_ENCODER, _DECODER = "pixel_decoder/layers", "layers"


def _make_merger_rows(key: str, merged: tuple[int, ...], axes: tuple[int, ...]) -> list[Row]:
    """Returns the rows of a patch merging; `axes` of the split axis become row, column, feature."""
    path = "backbone/mergers/{stage}"
    # The kernel [out, 4 D] has the split axes after its first one, which becomes the last.
    kernel = Transform((*(axis + 1 for axis in axes), 0), split=merged)
    return [
        Row(f"{key}.norm.weight", f"{path}/scale", Transform(axes, split=merged)),
        Row(f"{key}.norm.bias", f"{path}/bias", Transform(axes, split=merged)),
        Row(f"{key}.reduction.weight", f"{path}/kernel", kernel),
    ]


def _make_fused_rows(weight: str, bias: str, path: str) -> list[Row]:
    """Returns the rows of a tensor that holds the projections of q, k and v."""
    return [
        Row(key, f"{path}/{part}/{field}", transform, (i, 3))
        for key, field, transform in ((weight, "kernel", DENSE), (bias, "bias", SAME))
        for i, part in enumerate(_PROJECTIONS)
    ]


def _make_deformable_rows(key: str) -> list[Row]:
    names = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return [row for name in names for row in dense(f"{key}.{name}", f"{_ENCODER}/attn/{name}")]


def _make_group_norm_rows(key: str, path: str, convolution: str, group_norm: str) -> list[Row]:
    """Returns the rows of a convolution without bias and its norm."""
    return [
        Row(f"{key}.{convolution}.weight", f"{path}_conv/kernel", CONV),
        *norm(f"{key}.{group_norm}", f"{path}_norm"),
    ]


def _make_transformers_rows(published: bool) -> tuple[Row, ...]:
    pixel, head = "model.pixel_level_module", "model.transformer_module"
    backbone = f"{pixel}.encoder" if published else f"{pixel}.encoder.swin"
    block = f"{backbone}.encoder.layers.{{stage}}.blocks.{{layer}}"
    attention = f"{block}.attention.self" if published else f"{block}.attention"
    names = ("query", "key", "value") if published else _PROJECTIONS
    out = f"{block}.attention.output.dense" if published else f"{block}.attention.o_proj"
    bias = attention if published else f"{attention}.relative_position_bias"
    fc1, fc2 = ("intermediate.dense", "output.dense") if published else ("mlp.fc1", "mlp.fc2")
    encoder = f"{pixel}.decoder.encoder.layers.{{layer}}"
    decoder = f"{head}.decoder.layers.{{layer}}"
    return (
        *conv(f"{backbone}.embeddings.patch_embeddings.projection", "backbone/patch_embedding"),
        *norm(f"{backbone}.embeddings.norm", "backbone/embed_layernorm"),
        *norm(f"{block}.layernorm_before", f"{_BLOCKS}/layer_norm1"),
        *(
            row
            for name, part in zip(names, _PROJECTIONS, strict=True)
            for row in dense(f"{attention}.{name}", f"{_BLOCKS}/attn/{part}")
        ),
        *dense(out, f"{_BLOCKS}/attn/out_proj"),
        Row(f"{bias}.relative_position_bias_table", f"{_BLOCKS}/attn/position_bias"),
        *norm(f"{block}.layernorm_after", f"{_BLOCKS}/layer_norm2"),
        *dense(f"{block}.{fc1}", f"{_BLOCKS}/mlp/fc1"),
        *dense(f"{block}.{fc2}", f"{_BLOCKS}/mlp/fc2"),
        # [column, row, D] -> [row, column, D]
        *_make_merger_rows(
            f"{backbone}.encoder.layers.{{stage}}.downsample", (2, 2, -1), (1, 0, 2)
        ),
        *(
            row
            for stage in range(NUM_STAGES)
            for row in norm(
                f"{pixel}.encoder.hidden_states_norms.stage{stage + 1}",
                f"backbone/out_layernorms/{stage}",
            )
        ),
        *conv(
            f"{pixel}.decoder.input_projections.{{level}}.0", "pixel_decoder/input_convs/{level}"
        ),
        *norm(
            f"{pixel}.decoder.input_projections.{{level}}.1", "pixel_decoder/input_norms/{level}"
        ),
        *embedding(f"{pixel}.decoder.level_embed", "pixel_decoder/level_embedding"),
        *_make_deformable_rows(f"{encoder}.self_attn"),
        *norm(f"{encoder}.self_attn_layer_norm", f"{_ENCODER}/attn_layernorm"),
        *dense(f"{encoder}.fc1", f"{_ENCODER}/mlp/fc1"),
        *dense(f"{encoder}.fc2", f"{_ENCODER}/mlp/fc2"),
        *norm(f"{encoder}.final_layer_norm", f"{_ENCODER}/mlp_layernorm"),
        *_make_group_norm_rows(f"{pixel}.decoder.adapter_1", "pixel_decoder/lateral", "0", "1"),
        *_make_group_norm_rows(f"{pixel}.decoder.layer_1", "pixel_decoder/output", "0", "1"),
        *conv(f"{pixel}.decoder.mask_projection", "pixel_decoder/mask_conv"),
        *embedding(f"{head}.queries_features.weight", "query_features"),
        *embedding(f"{head}.queries_embedder.weight", "query_positions"),
        *embedding(f"{head}.level_embed.weight", "level_embedding"),
        *_make_fused_rows(
            f"{decoder}.cross_attn.in_proj_weight",
            f"{decoder}.cross_attn.in_proj_bias",
            f"{_DECODER}/cross_attn",
        ),
        *dense(f"{decoder}.cross_attn.out_proj", f"{_DECODER}/cross_attn/out_proj"),
        *norm(f"{decoder}.cross_attn_layer_norm", f"{_DECODER}/cross_layernorm"),
        *(
            row
            for name in (*_PROJECTIONS, "out_proj")
            for row in dense(f"{decoder}.self_attn.{name}", f"{_DECODER}/self_attn/{name}")
        ),
        *norm(f"{decoder}.self_attn_layer_norm", f"{_DECODER}/self_layernorm"),
        *dense(f"{decoder}.fc1", f"{_DECODER}/mlp/fc1"),
        *dense(f"{decoder}.fc2", f"{_DECODER}/mlp/fc2"),
        *norm(f"{decoder}.final_layer_norm", f"{_DECODER}/mlp_layernorm"),
        *norm(f"{head}.decoder.layernorm", "final_layernorm"),
        *dense(f"{head}.decoder.mask_predictor.mask_embedder.{{number}}.0", "mask_head/{number}"),
        *dense("class_predictor", "class_head"),
    )


def _make_mmdet_rows(version: int) -> tuple[Row, ...]:
    block = "backbone.stages.{stage}.blocks.{layer}"
    head, pixel = "panoptic_head", "panoptic_head.pixel_decoder"
    encoder = f"{pixel}.encoder.layers.{{layer}}"
    decoder = f"{head}.transformer_decoder.layers.{{layer}}"
    # Version 2 numbers the attentions of a layer; attention to pixels comes first.
    deformable, cross, own, mlp = (
        ("attentions.0", "attentions.0.attn", "attentions.1.attn", "ffns.0")
        if version == 2
        else ("self_attn", "cross_attn.attn", "self_attn.attn", "ffn")
    )
    attentions = (("cross_attn", cross), ("self_attn", own))
    norms = enumerate(("cross_layernorm", "self_layernorm", "mlp_layernorm"))
    return (
        *conv("backbone.patch_embed.projection", "backbone/patch_embedding"),
        *norm("backbone.patch_embed.norm", "backbone/embed_layernorm"),
        *norm(f"{block}.norm1", f"{_BLOCKS}/layer_norm1"),
        *_make_fused_rows(
            f"{block}.attn.w_msa.qkv.weight", f"{block}.attn.w_msa.qkv.bias", f"{_BLOCKS}/attn"
        ),
        *dense(f"{block}.attn.w_msa.proj", f"{_BLOCKS}/attn/out_proj"),
        Row(f"{block}.attn.w_msa.relative_position_bias_table", f"{_BLOCKS}/attn/position_bias"),
        *norm(f"{block}.norm2", f"{_BLOCKS}/layer_norm2"),
        *dense(f"{block}.ffn.layers.0.0", f"{_BLOCKS}/mlp/fc1"),
        *dense(f"{block}.ffn.layers.1", f"{_BLOCKS}/mlp/fc2"),
        # [D, row, column] -> [row, column, D]
        *_make_merger_rows("backbone.stages.{stage}.downsample", (-1, 2, 2), (1, 2, 0)),
        *(
            row
            for stage in range(NUM_STAGES)
            for row in norm(f"backbone.norm{stage}", f"backbone/out_layernorms/{stage}")
        ),
        *conv(f"{pixel}.input_convs.{{level}}.conv", "pixel_decoder/input_convs/{level}"),
        *norm(f"{pixel}.input_convs.{{level}}.gn", "pixel_decoder/input_norms/{level}"),
        *embedding(f"{pixel}.level_encoding.weight", "pixel_decoder/level_embedding"),
        *_make_deformable_rows(f"{encoder}.{deformable}"),
        *norm(f"{encoder}.norms.0", f"{_ENCODER}/attn_layernorm"),
        *dense(f"{encoder}.{mlp}.layers.0.0", f"{_ENCODER}/mlp/fc1"),
        *dense(f"{encoder}.{mlp}.layers.1", f"{_ENCODER}/mlp/fc2"),
        *norm(f"{encoder}.norms.1", f"{_ENCODER}/mlp_layernorm"),
        *_make_group_norm_rows(f"{pixel}.lateral_convs.0", "pixel_decoder/lateral", "conv", "gn"),
        *_make_group_norm_rows(f"{pixel}.output_convs.0", "pixel_decoder/output", "conv", "gn"),
        *conv(f"{pixel}.mask_feature", "pixel_decoder/mask_conv"),
        *embedding(f"{head}.query_feat.weight", "query_features"),
        *embedding(f"{head}.query_embed.weight", "query_positions"),
        *embedding(f"{head}.level_embed.weight", "level_embedding"),
        *(
            row
            for name, key in attentions
            for row in (
                *_make_fused_rows(
                    f"{decoder}.{key}.in_proj_weight",
                    f"{decoder}.{key}.in_proj_bias",
                    f"{_DECODER}/{name}",
                ),
                *dense(f"{decoder}.{key}.out_proj", f"{_DECODER}/{name}/out_proj"),
            )
        ),
        *dense(f"{decoder}.{mlp}.layers.0.0", f"{_DECODER}/mlp/fc1"),
        *dense(f"{decoder}.{mlp}.layers.1", f"{_DECODER}/mlp/fc2"),
        *(row for i, name in norms for row in norm(f"{decoder}.norms.{i}", f"{_DECODER}/{name}")),
        *norm(f"{head}.transformer_decoder.post_norm", "final_layernorm"),
        *(
            row
            for number in range(3)
            # 1 and 3 are activations.
            for row in dense(f"{head}.mask_embed.{2 * number}", f"mask_head/{number}")
        ),
        *dense(f"{head}.cls_embed", "class_head"),
    )


_INDEX = r".+\.relative_position_index"
# The loss's weights of classes, and a norm that transformers' backbone does not use.
_UNUSED = (r"criterion\.empty_weight", r".+\.encoder\.(swin\.)?layernorm\.(weight|bias)", _INDEX)

TABLES: dict[str, Table] = {
    "transformers": Table("transformers", _make_transformers_rows(False), dropped=_UNUSED),
    "transformers4": Table("transformers4", _make_transformers_rows(True), dropped=_UNUSED),
    "mmdet": Table("mmdet", _make_mmdet_rows(2), dropped=(_INDEX, r"data_preprocessor\..+")),
    "mmdet3": Table("mmdet3", _make_mmdet_rows(3), dropped=(_INDEX, r"data_preprocessor\..+")),
}

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
    bias, mlp = f"{_BLOCKS}/attn/position_bias", f"{_BLOCKS}/mlp/fc1/kernel"
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
    places = size(f"{_ENCODER}/attn/attention_weights/kernel", 0, 96, layer=0)
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
        encoder_intermediate_size=size(f"{_ENCODER}/mlp/fc1/kernel", 0, 1024, layer=0),
        decoder_intermediate_size=size(f"{_DECODER}/mlp/fc1/kernel", 0, 2048, layer=0),
        encoder_num_layers=_count_layers(shapes, keys[f"{_ENCODER}/mlp/fc1/kernel0"]) or 6,
        decoder_num_layers=_count_layers(shapes, keys[f"{_DECODER}/mlp/fc1/kernel0"]) or 9,
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
