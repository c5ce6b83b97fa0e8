"""Mask2Former with Swin against transformers' PyTorch, on tiny random weights of every layout.

The layouts of mmdetection are written here from transformers' weights, by mmdetection's names.
"""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Mask2FormerConfig as TheirConfig
from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

from corl_jax.errors import InputError, Problems
from corl_jax.models import modules
from corl_jax.models.deformable import sample_bilinear
from corl_jax.models.mask2former import Mask2Former, Mask2FormerConfig
from corl_jax.models.swin import PatchMerging
from corl_jax.params import flatten
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.layouts.mask2former import KIND, TABLES, parse
from tests.parity.from_table import arrays, from_table

TOLERANCE = 1e-4
CLASSES, QUERIES = 9, 6
# 3 x 3 windows, shifted by 1; 40 x 44: no patch grid here is a multiple of the window.
SIZES = {"square": (1, 48, 48), "odd sides, two images": (2, 40, 67), "one patch": (1, 9, 35)}


@pytest.fixture(scope="module")
def theirs():
    """A model in which no two sizes are alike, so that a swapped tensor cannot fit."""
    backbone = SwinConfig(
        patch_size=4, embed_dim=12, depths=[2, 2, 4, 2], num_heads=[1, 2, 3, 4], window_size=3,
        mlp_ratio=2.0, drop_path_rate=0.0, out_features=[f"stage{n}" for n in range(1, 5)],
    )  # fmt: skip
    config = TheirConfig(
        backbone_config=backbone, feature_size=32, hidden_dim=32, mask_feature_size=20,
        encoder_feedforward_dim=28, dim_feedforward=36, encoder_layers=2, decoder_layers=4,
        num_attention_heads=4, num_queries=QUERIES, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Fields of the GroupNorms are called 0.1 and 1.1 there.
            is_scale = name.endswith("weight") and weight.ndim == 1
            # Offsets reach beyond the borders of the coarse maps.
            std = 1.5 if "sampling_offsets" in name else 0.2
            nn.init.normal_(weight, mean=float(is_scale), std=std)
    return model


@pytest.fixture(scope="module")
def state(theirs):
    """Their tensors that the network uses."""
    unused = ("criterion", "encoder.swin.layernorm")
    return {k: x for k, x in theirs.state_dict().items() if not any(name in k for name in unused)}


@pytest.fixture(scope="module")
def sizes(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    theirs.config.save_pretrained(folder)
    problems, shapes = Problems(), {k: tuple(x.shape) for k, x in theirs.state_dict().items()}
    config = parse(folder, "transformers", shapes, problems)
    problems.add(KIND.check(config, "config"))
    problems.raise_any()
    return config


@pytest.fixture(scope="module")
def ours(state, sizes):
    return from_table(TABLES["transformers"], Mask2Former, sizes, arrays(state))


def draw_pixels(size: tuple[int, int, int]) -> np.ndarray:
    batch, height, width = size
    return np.random.default_rng(3).standard_normal((batch, height, width, 3), np.float32)


@jax.jit
def _compute(params, pixels):
    model = modules.bind(Mask2Former, _compute.sizes, params)
    features = model.backbone(pixels)
    return features, *model.decode(features)


def compute(sizes, params, pixels: np.ndarray):
    _compute.sizes = sizes
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, _compute(params, pixels))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_features_classes_and_masks(theirs, sizes, ours, size):
    pixels = draw_pixels(size)
    with torch.no_grad():
        inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        expected = theirs(inputs, output_hidden_states=True)
    features, classes, masks = compute(sizes, ours, pixels)
    for stage, (found, wanted) in enumerate(
        zip(features, expected.encoder_hidden_states, strict=True)
    ):
        assert found.shape == tuple(wanted.shape[i] for i in (0, 2, 3, 1)), stage
        error = np.abs(found.transpose(0, 3, 1, 2) - wanted.numpy()).max()
        assert error <= TOLERANCE, stage
    for name, found, wanted in (
        ("classes", classes, expected.class_queries_logits),
        ("masks", masks, expected.masks_queries_logits),
    ):
        error = np.abs(found - wanted.numpy()).max()
        print(f"parity Mask2Former: {name} {found.shape}, largest difference {error:.1e} of "
              f"{np.abs(wanted.numpy()).max():.1f}")  # fmt: skip
        assert found.shape == tuple(wanted.shape) and found.std() > 0.1
        assert error <= TOLERANCE
    # Some queries see a part of the image only, else the masks of attention are not tested.
    assert (masks > 0).any() and (masks < 0).any()


# ---- layouts


def name_as_published(state: dict) -> dict:
    """The names of transformers before version 5, as in the hub's files."""
    out = {}
    for key, x in state.items():
        new = key.replace(".encoder.swin.", ".encoder.")
        if ".blocks." in key:
            for old, word in {
                r"attention\.([qkv])_proj": r"attention.self.\1", r"attention\.o_proj":
                "attention.output.dense", r"relative_position_bias\.": "self.",
                r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense",
            }.items():  # fmt: skip
                new = re.sub(old, word, new)
            for letter, word in zip("qkv", ("query", "key", "value"), strict=True):
                new = new.replace(f"self.{letter}.", f"self.{word}.")
        out[new] = x
    return out


HEAD = "model.transformer_module"
MMDET = {
    "model.pixel_level_module.encoder.swin.embeddings.patch_embeddings": "backbone.patch_embed",
    "model.pixel_level_module.encoder.swin.embeddings.norm": "backbone.patch_embed.norm",
    "model.pixel_level_module.encoder.swin.encoder.layers": "backbone.stages",
    "attention.relative_position_bias.": "attn.w_msa.", "attention.o_proj": "attn.w_msa.proj",
    "layernorm_before": "norm1", "layernorm_after": "norm2",
    "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
    "model.pixel_level_module.decoder.level_embed":
    "panoptic_head.pixel_decoder.level_encoding.weight",
    "model.pixel_level_module.decoder": "panoptic_head.pixel_decoder",
    "adapter_1": "lateral_convs.0", "layer_1": "output_convs.0",
    "input_projections": "input_convs", "mask_projection": "mask_feature",
    f"{HEAD}.queries_embedder": "panoptic_head.query_embed",
    f"{HEAD}.queries_features": "panoptic_head.query_feat",
    f"{HEAD}.level_embed": "panoptic_head.level_embed",
    f"{HEAD}.decoder.layernorm": "panoptic_head.transformer_decoder.post_norm",
    f"{HEAD}.decoder.layers": "panoptic_head.transformer_decoder.layers",
    f"{HEAD}.decoder.mask_predictor.mask_embedder.0.0": "panoptic_head.mask_embed.0",
    f"{HEAD}.decoder.mask_predictor.mask_embedder.1.0": "panoptic_head.mask_embed.2",
    f"{HEAD}.decoder.mask_predictor.mask_embedder.2.0": "panoptic_head.mask_embed.4",
    "class_predictor": "panoptic_head.cls_embed",
}  # fmt: skip


def reorder_merged(x: torch.Tensor) -> torch.Tensor:
    """From the column, row, feature of transformers to the feature, row, column of nn.Unfold."""
    split = x.reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)
    return torch.einsum("...crd->...drc", split).reshape(x.shape)


def name_as_mmdet(state: dict, version: int) -> dict:
    """The same network in mmdetection's names, with its fused projections and merging order."""
    state, out = dict(state), {}
    for key in [k for k in state if re.search(r"(attention|decoder.*self_attn)\.q_proj", k)]:
        parts = [state.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        if "swin" in key:
            new = key.replace("attention.q_proj", "attn.w_msa.qkv")
        else:
            new = key.replace("q_proj.", "in_proj_")
        state[new] = torch.cat(parts)
    for key, x in state.items():
        new = key
        for old, word in MMDET.items():
            new = new.replace(old, word)
        new = re.sub(
            r".*hidden_states_norms\.stage(\d)", lambda m: f"backbone.norm{int(m[1]) - 1}", new
        )
        if "convs" in new:
            new = new.replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias")
            new = re.sub(r"\.1\.(weight|bias)$", r".gn.\1", new)
        in_encoder, in_decoder = "pixel_decoder.encoder" in new, "transformer_decoder.layers" in new
        if in_encoder or in_decoder:
            new = name_layer_as_mmdet(new, version, in_encoder)
        out[new] = reorder_merged(x) if ".downsample." in new else x
    return out


def name_layer_as_mmdet(key: str, version: int, in_encoder: bool) -> str:
    norms = ("self_attn_layer_norm", "final_layer_norm")
    norms = norms if in_encoder else ("cross_attn_layer_norm", *norms)
    for number, name in enumerate(norms):
        key = key.replace(f".{name}.", f".norms.{number}.")
    mlp = "ffns.0" if version == 2 else "ffn"
    key = key.replace(".fc1.", f".{mlp}.layers.0.0.").replace(".fc2.", f".{mlp}.layers.1.")
    if in_encoder:
        return key.replace(".self_attn.", ".attentions.0.") if version == 2 else key
    first, second = (
        ("attentions.0", "attentions.1") if version == 2 else ("cross_attn", "self_attn")
    )
    return key.replace(".cross_attn.", f".{first}.attn.").replace(".self_attn.", f".{second}.attn.")


def rename(state: dict, layout: str) -> dict:
    if layout == "transformers4":
        return name_as_published(state)
    return name_as_mmdet(state, 3 if layout == "mmdet3" else 2)


@pytest.mark.parametrize("layout", ["transformers4", "mmdet", "mmdet3"])
def test_every_layout_loads_the_same_parameters(state, sizes, ours, tmp_path, theirs, layout):
    renamed = rename(state, layout)
    assert len(renamed) == len({*renamed}) and renamed.keys() != state.keys()
    if layout == "transformers4":
        theirs.config.save_pretrained(tmp_path)
        index = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self."
        renamed[f"{index}relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
        renamed["criterion.empty_weight"] = torch.ones(CLASSES + 1)
        renamed["model.pixel_level_module.encoder.layernorm.weight"] = torch.ones(96)
        save_file({k: x.contiguous() for k, x in renamed.items()}, tmp_path / "model.safetensors")
        path = tmp_path
    else:
        index = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
        renamed[index] = torch.zeros(9, 9, dtype=torch.int64)
        path = tmp_path / "detector.pth"
        torch.save({"meta": {"epoch": 50, "CLASSES": ["a"]}, "state_dict": renamed}, path)
    with open_checkpoint(path, KIND) as opened:
        assert opened.layout == layout and opened.config == sizes
        found = flatten(opened.load())
    for name, leaf in flatten(ours).items():
        assert np.array_equal(found[name], leaf), name


@pytest.mark.parametrize("layout", TABLES)
def test_tables_are_inverted_exactly(sizes, ours, layout):
    flat, table = flatten(ours), TABLES[layout]
    for slot in table.make_slots({path: leaf.shape for path, leaf in flat.items()}):
        leaf = np.asarray(flat[slot.path])
        leaf = leaf if slot.layer is None else leaf[slot.layer]
        tensor = slot.transform.to_torch(leaf)
        assert np.array_equal(slot.transform.to_leaf(tensor), leaf)
        assert (
            tensor.shape[0] * slot.part[1] == slot.shape[0] and tensor.shape[1:] == slot.shape[1:]
        )


def test_merging_by_hand_in_both_orders():
    """One channel, positions [[a, b], [c, d]]; each weight takes one of them."""
    order = {"transformers": "acbd", "mmdet": "abcd"}  # column by column, and row by row
    for layout, names in order.items():
        rows = {
            row.path.split("/")[-1]: row.transform
            for row in TABLES[layout].rows
            if "mergers" in row.path
        }
        weight = np.float32([["abcd".index(name) + 1 for name in names], [0, 0, 0, 0]])
        kernel = rows["kernel"].to_leaf(weight)
        assert kernel[:, :, 0, 0].tolist() == [[1, 2], [3, 4]], layout
        scale = rows["scale"].to_leaf(np.arange(4.0))
        assert scale[:, :, 0].tolist() == [[names.index(n) for n in pair] for pair in ("ab", "cd")]
    # Two channels: in nn.Unfold's order the four positions of a channel stand together.
    unfolded = nn.Unfold(2, stride=2)(torch.arange(8.0).reshape(1, 2, 2, 2))[0, :, 0]
    leaf = rows["scale"].to_leaf(unfolded.numpy())
    assert leaf.tolist() == [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]


def test_merging_is_a_norm_and_a_product():
    merge = PatchMerging(1, rngs=modules.nnx.Rngs(0))
    x = np.float32([[1, 2], [3, 6]])
    found = merge(x[None, :, :, None])[0, 0, 0]
    normed = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    np.testing.assert_allclose(
        found, np.einsum("ij,ijd->d", normed, merge.kernel[...][:, :, 0]), rtol=1e-5
    )


def test_sampling_is_grid_sample():
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((2, 3, 5 * 4, 6), np.float32)
    places = rng.uniform(-3, 8, (2, 3, 7, 2, 2)).astype(np.float32)  # also outside
    weights = rng.standard_normal((2, 3, 7, 2), np.float32)
    found = sample_bilinear(maps, (5, 4), places, weights)
    image = torch.from_numpy(maps).reshape(6, 5, 4, 6).permute(0, 3, 1, 2)
    grid = torch.from_numpy((places + 0.5) / np.float32([4, 5]) * 2 - 1).reshape(6, 7, 2, 2)
    sampled = nn.functional.grid_sample(image, grid, padding_mode="zeros", align_corners=False)
    wanted = (
        sampled.numpy().transpose(0, 2, 3, 1).reshape(2, 3, 7, 2, 6) * weights[..., None]
    ).sum(3)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# ---- sizes


def test_the_published_size():
    """Swin-S with 80 classes has about 69 million parameters."""
    shapes = KIND.shapes(Mask2FormerConfig())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 68_739_547
    # mmdetection's file tells the same sizes by its shapes alone.
    slots = TABLES["mmdet"].make_slots(shapes)
    stored, problems = {slot.key: slot.shape for slot in slots}, Problems()
    assert parse(None, "mmdet", stored, problems) == Mask2FormerConfig() and not problems


def test_wrong_files_are_refused(theirs, state, tmp_path):
    theirs.config.save_pretrained(tmp_path)
    save_file({k: x.contiguous() for k, x in state.items()}, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    data |= {"pre_norm": True, "decoder_layers": 6}
    data["backbone_config"] |= {"window_size": 7, "depths": [2, 2, 3, 2]}
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="pre_norm is True, expected False"):
        open_checkpoint(tmp_path, KIND)
    file.write_text(json.dumps(data | {"pre_norm": False}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path, KIND)
    text = "\n".join(caught.value.problems)
    assert "depths[2] is 3, expected a multiple of a pair of blocks, 2" in text
    assert "decoder_num_layers is 5, expected a multiple of the number of levels, 3" in text
    torch.save(
        {"state_dict": {"panoptic_head.cls_embed.bias": torch.zeros(81)}}, tmp_path / "x.pth"
    )
    with pytest.raises(InputError, match="Swin backbone are missing"):
        open_checkpoint(tmp_path / "x.pth", KIND)
    assert dataclasses.asdict(Mask2FormerConfig())["backbone"]["depths"] == (2, 2, 18, 2)
