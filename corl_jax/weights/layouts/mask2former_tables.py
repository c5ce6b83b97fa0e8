"""The tensor names of a Mask2Former with Swin: two layouts of transformers, two of mmdetection.

`transformers` has the names of version 5, `transformers4` those of the published files of the hub.
`mmdet` is mmdetection 2.x, which GenEval uses, and `mmdet3` is mmdetection 3.x.

mmdetection orders the features of a patch merging by feature, then row, then column (`nn.Unfold`),
transformers by column, then row, then feature.

Sources: transformers 5.24 `models/mask2former`, `models/swin`, `conversion_mapping.py`;
mmdetection 2.25 and 3.0 `models/backbones/swin.py`, `models/dense_heads/mask2former_head.py`,
`models/plugins/msdeformattn_pixel_decoder.py`; mmcv 1.7 `cnn/bricks/transformer.py`.
"""

from __future__ import annotations

from corl_jax.weights.table import CONV, DENSE, SAME, Row, Table, Transform
from corl_jax.weights.table_rows import conv, dense, embedding, norm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NUM_STAGES = 4
BLOCKS = "backbone/stages/{stage}"
ENCODER, DECODER = "pixel_decoder/layers", "layers"


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
    return [row for name in names for row in dense(f"{key}.{name}", f"{ENCODER}/attn/{name}")]


def _make_group_norm_rows(key: str, path: str, convolution: str, group_norm: str) -> list[Row]:
    """Returns the rows of a convolution without bias and its norm."""
    return [
        Row(f"{key}.{convolution}.weight", f"{path}_conv/kernel", CONV),
        *norm(f"{key}.{group_norm}", f"{path}_norm"),
    ]


_PIXEL, _HEAD = "model.pixel_level_module", "model.transformer_module"  # of transformers


def _make_transformers_backbone_rows(published: bool) -> tuple[Row, ...]:
    """Returns the rows of Swin; `published`: by the names of the hub's files."""
    backbone = f"{_PIXEL}.encoder" if published else f"{_PIXEL}.encoder.swin"
    block = f"{backbone}.encoder.layers.{{stage}}.blocks.{{layer}}"
    attention = f"{block}.attention.self" if published else f"{block}.attention"
    names = ("query", "key", "value") if published else _PROJECTIONS
    out = f"{block}.attention.output.dense" if published else f"{block}.attention.o_proj"
    bias = attention if published else f"{attention}.relative_position_bias"
    fc1, fc2 = ("intermediate.dense", "output.dense") if published else ("mlp.fc1", "mlp.fc2")
    return (
        *conv(f"{backbone}.embeddings.patch_embeddings.projection", "backbone/patch_embedding"),
        *norm(f"{backbone}.embeddings.norm", "backbone/embed_layernorm"),
        *norm(f"{block}.layernorm_before", f"{BLOCKS}/layer_norm1"),
        *(
            row
            for name, part in zip(names, _PROJECTIONS, strict=True)
            for row in dense(f"{attention}.{name}", f"{BLOCKS}/attn/{part}")
        ),
        *dense(out, f"{BLOCKS}/attn/out_proj"),
        Row(f"{bias}.relative_position_bias_table", f"{BLOCKS}/attn/position_bias"),
        *norm(f"{block}.layernorm_after", f"{BLOCKS}/layer_norm2"),
        *dense(f"{block}.{fc1}", f"{BLOCKS}/mlp/fc1"),
        *dense(f"{block}.{fc2}", f"{BLOCKS}/mlp/fc2"),
        # [column, row, D] -> [row, column, D]
        *_make_merger_rows(
            f"{backbone}.encoder.layers.{{stage}}.downsample", (2, 2, -1), (1, 0, 2)
        ),
        *(
            row
            for stage in range(NUM_STAGES)
            for row in norm(
                f"{_PIXEL}.encoder.hidden_states_norms.stage{stage + 1}",
                f"backbone/out_layernorms/{stage}",
            )
        ),
    )


def _make_transformers_pixel_rows() -> tuple[Row, ...]:
    pixel = f"{_PIXEL}.decoder"
    encoder = f"{pixel}.encoder.layers.{{layer}}"
    return (
        *conv(f"{pixel}.input_projections.{{level}}.0", "pixel_decoder/input_convs/{level}"),
        *norm(f"{pixel}.input_projections.{{level}}.1", "pixel_decoder/input_norms/{level}"),
        *embedding(f"{pixel}.level_embed", "pixel_decoder/level_embedding"),
        *_make_deformable_rows(f"{encoder}.self_attn"),
        *norm(f"{encoder}.self_attn_layer_norm", f"{ENCODER}/attn_layernorm"),
        *dense(f"{encoder}.fc1", f"{ENCODER}/mlp/fc1"),
        *dense(f"{encoder}.fc2", f"{ENCODER}/mlp/fc2"),
        *norm(f"{encoder}.final_layer_norm", f"{ENCODER}/mlp_layernorm"),
        *_make_group_norm_rows(f"{pixel}.adapter_1", "pixel_decoder/lateral", "0", "1"),
        *_make_group_norm_rows(f"{pixel}.layer_1", "pixel_decoder/output", "0", "1"),
        *conv(f"{pixel}.mask_projection", "pixel_decoder/mask_conv"),
    )


def _make_transformers_decoder_rows() -> tuple[Row, ...]:
    decoder = f"{_HEAD}.decoder.layers.{{layer}}"
    return (
        *embedding(f"{_HEAD}.queries_features.weight", "query_features"),
        *embedding(f"{_HEAD}.queries_embedder.weight", "query_positions"),
        *embedding(f"{_HEAD}.level_embed.weight", "level_embedding"),
        *_make_fused_rows(
            f"{decoder}.cross_attn.in_proj_weight",
            f"{decoder}.cross_attn.in_proj_bias",
            f"{DECODER}/cross_attn",
        ),
        *dense(f"{decoder}.cross_attn.out_proj", f"{DECODER}/cross_attn/out_proj"),
        *norm(f"{decoder}.cross_attn_layer_norm", f"{DECODER}/cross_layernorm"),
        *(
            row
            for name in (*_PROJECTIONS, "out_proj")
            for row in dense(f"{decoder}.self_attn.{name}", f"{DECODER}/self_attn/{name}")
        ),
        *norm(f"{decoder}.self_attn_layer_norm", f"{DECODER}/self_layernorm"),
        *dense(f"{decoder}.fc1", f"{DECODER}/mlp/fc1"),
        *dense(f"{decoder}.fc2", f"{DECODER}/mlp/fc2"),
        *norm(f"{decoder}.final_layer_norm", f"{DECODER}/mlp_layernorm"),
        *norm(f"{_HEAD}.decoder.layernorm", "final_layernorm"),
        *dense(f"{_HEAD}.decoder.mask_predictor.mask_embedder.{{number}}.0", "mask_head/{number}"),
        *dense("class_predictor", "class_head"),
    )


def _make_transformers_rows(published: bool) -> tuple[Row, ...]:
    return (
        *_make_transformers_backbone_rows(published),
        *_make_transformers_pixel_rows(),
        *_make_transformers_decoder_rows(),
    )


def _make_mmdet_backbone_rows() -> tuple[Row, ...]:
    block = "backbone.stages.{stage}.blocks.{layer}"
    return (
        *conv("backbone.patch_embed.projection", "backbone/patch_embedding"),
        *norm("backbone.patch_embed.norm", "backbone/embed_layernorm"),
        *norm(f"{block}.norm1", f"{BLOCKS}/layer_norm1"),
        *_make_fused_rows(
            f"{block}.attn.w_msa.qkv.weight", f"{block}.attn.w_msa.qkv.bias", f"{BLOCKS}/attn"
        ),
        *dense(f"{block}.attn.w_msa.proj", f"{BLOCKS}/attn/out_proj"),
        Row(f"{block}.attn.w_msa.relative_position_bias_table", f"{BLOCKS}/attn/position_bias"),
        *norm(f"{block}.norm2", f"{BLOCKS}/layer_norm2"),
        *dense(f"{block}.ffn.layers.0.0", f"{BLOCKS}/mlp/fc1"),
        *dense(f"{block}.ffn.layers.1", f"{BLOCKS}/mlp/fc2"),
        # [D, row, column] -> [row, column, D]
        *_make_merger_rows("backbone.stages.{stage}.downsample", (-1, 2, 2), (1, 2, 0)),
        *(
            row
            for stage in range(NUM_STAGES)
            for row in norm(f"backbone.norm{stage}", f"backbone/out_layernorms/{stage}")
        ),
    )


def _make_mmdet_pixel_rows(attention: str, mlp: str) -> tuple[Row, ...]:
    """Returns the rows of the pixel decoder; its layers' parts are called by these names."""
    pixel = "panoptic_head.pixel_decoder"
    encoder = f"{pixel}.encoder.layers.{{layer}}"
    return (
        *conv(f"{pixel}.input_convs.{{level}}.conv", "pixel_decoder/input_convs/{level}"),
        *norm(f"{pixel}.input_convs.{{level}}.gn", "pixel_decoder/input_norms/{level}"),
        *embedding(f"{pixel}.level_encoding.weight", "pixel_decoder/level_embedding"),
        *_make_deformable_rows(f"{encoder}.{attention}"),
        *norm(f"{encoder}.norms.0", f"{ENCODER}/attn_layernorm"),
        *dense(f"{encoder}.{mlp}.layers.0.0", f"{ENCODER}/mlp/fc1"),
        *dense(f"{encoder}.{mlp}.layers.1", f"{ENCODER}/mlp/fc2"),
        *norm(f"{encoder}.norms.1", f"{ENCODER}/mlp_layernorm"),
        *_make_group_norm_rows(f"{pixel}.lateral_convs.0", "pixel_decoder/lateral", "conv", "gn"),
        *_make_group_norm_rows(f"{pixel}.output_convs.0", "pixel_decoder/output", "conv", "gn"),
        *conv(f"{pixel}.mask_feature", "pixel_decoder/mask_conv"),
    )


def _make_mmdet_decoder_rows(attentions: tuple[str, str], mlp: str) -> tuple[Row, ...]:
    """Returns the rows of the queries; `attentions` are to pixels, and to each other."""
    head = "panoptic_head"
    decoder = f"{head}.transformer_decoder.layers.{{layer}}"
    norms = enumerate(("cross_layernorm", "self_layernorm", "mlp_layernorm"))
    return (
        *embedding(f"{head}.query_feat.weight", "query_features"),
        *embedding(f"{head}.query_embed.weight", "query_positions"),
        *embedding(f"{head}.level_embed.weight", "level_embedding"),
        *(
            row
            for name, key in zip(("cross_attn", "self_attn"), attentions, strict=True)
            for row in (
                *_make_fused_rows(
                    f"{decoder}.{key}.in_proj_weight",
                    f"{decoder}.{key}.in_proj_bias",
                    f"{DECODER}/{name}",
                ),
                *dense(f"{decoder}.{key}.out_proj", f"{DECODER}/{name}/out_proj"),
            )
        ),
        *dense(f"{decoder}.{mlp}.layers.0.0", f"{DECODER}/mlp/fc1"),
        *dense(f"{decoder}.{mlp}.layers.1", f"{DECODER}/mlp/fc2"),
        *(row for i, name in norms for row in norm(f"{decoder}.norms.{i}", f"{DECODER}/{name}")),
        *norm(f"{head}.transformer_decoder.post_norm", "final_layernorm"),
        *(
            row
            for number in range(3)
            # 1 and 3 are activations.
            for row in dense(f"{head}.mask_embed.{2 * number}", f"mask_head/{number}")
        ),
        *dense(f"{head}.cls_embed", "class_head"),
    )


def _make_mmdet_rows(version: int) -> tuple[Row, ...]:
    # Version 2 numbers the attentions of a layer; attention to pixels comes first.
    attention, attentions, mlp = (
        ("attentions.0", ("attentions.0.attn", "attentions.1.attn"), "ffns.0")
        if version == 2
        else ("self_attn", ("cross_attn.attn", "self_attn.attn"), "ffn")
    )
    return (
        *_make_mmdet_backbone_rows(),
        *_make_mmdet_pixel_rows(attention, mlp),
        *_make_mmdet_decoder_rows(attentions, mlp),
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
