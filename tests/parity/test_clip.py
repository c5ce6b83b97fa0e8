"""CLIP against transformers' PyTorch on tiny random weights; both layouts, also at full size.

The open_clip layout is written here from transformers' weights, by open_clip's names.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from corl_jax.errors import Problems
from corl_jax.models import modules
from corl_jax.models.aesthetic import AestheticConfig, AestheticHead
from corl_jax.models.clip import Clip, ClipConfig, TowerConfig
from corl_jax.params import flatten
from corl_jax.weights.layouts import aesthetic, clip
from tests.parity.from_table import arrays, from_table
from tests.support.tolerances import NETWORK

TOLERANCE = NETWORK
VOCAB, LENGTH, EOS = 97, 12, 96
VARIANTS = {
    "gelu": {"act": "gelu", "eos": EOS},
    # As OpenAI's and old configs have it: the end of text is then the largest id.
    "quick_gelu, legacy end of text": {"act": "quick_gelu", "eos": 2, "eps": 1e-3},
}


def tiny_model(act: str, eos: int, eps: float = 1e-5) -> CLIPModel:
    """No two sizes alike, so that a transposed or swapped tensor cannot fit."""
    shared = {"hidden_act": act, "layer_norm_eps": eps}
    config = CLIPConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "bos_token_id": 1, "pad_token_id": 0,
            "max_position_embeddings": LENGTH, "eos_token_id": eos, **shared,
        },
        vision_config={
            "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2,
            "num_attention_heads": 3, "image_size": 24, "patch_size": 6, **shared,
        },
        projection_dim=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            nn.init.normal_(weight, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


def open_clip_names(state: dict) -> dict:
    """The same tensors as open_clip stores them."""
    out = {}
    for key, tensor in state.items():
        if key.endswith("_projection.weight"):
            new = "visual.proj" if key.startswith("visual") else "text_projection"
            out[new] = tensor.T.contiguous()
        elif ".self_attn." not in key or ".out_proj." in key:
            out[_open_clip_name(key)] = tensor
        elif ".q_proj." in key:
            parts = [state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            name = _open_clip_name(key.replace("q_proj.", "in_proj_"))
            out[name] = torch.cat(parts)
    return out


def _open_clip_name(key: str) -> str:
    """Names word by word."""
    for old, new in {
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding": "token_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn",
        "fc1": "c_fc", "fc2": "c_proj",
    }.items():  # fmt: skip
        key = key.replace(old, new)
    return key


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """One model twice: `torch`, and our config and params from its files."""
    model = tiny_model(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    problems = Problems()
    config = clip.parse(folder, "transformers", {}, problems)
    assert not problems
    state = arrays(model.state_dict())
    params = from_table(clip.TABLES["transformers"], Clip, config, state)
    return SimpleNamespace(torch=model, config=config, params=params)


def ours(pair, method: str, x: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(
            lambda params, x: getattr(modules.bind(Clip, pair.config, params), method)(x)
        )
        return np.asarray(compiled(pair.params, x))


def assert_close(what: str, found: np.ndarray, expected: torch.Tensor) -> None:
    expected = expected.detach().numpy()
    error = np.abs(found - expected).max()
    print(f"parity {what}: largest difference {error:.1e} (std {expected.std():.2f})")
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    assert error <= TOLERANCE * max(1, expected.std())


def pixels(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, 24, 24, 3)).astype(np.float32)


def padded_prompts(padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of prompts of 12, 5 and 2 tokens."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, EOS, (3, LENGTH))
    lengths = np.array([12, 5, 2])
    ids[:, 0] = 1
    ids[np.arange(3), lengths - 1] = EOS
    mask = np.arange(LENGTH) < lengths[:, None]
    return np.where(mask, ids, padding).astype(np.int32), mask


def test_image_features(pair):
    nchw = torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy())
    expected = pair.torch.get_image_features(nchw).pooler_output
    assert_close("image features", ours(pair, "image_features", pixels()), expected)
    unit = expected / expected.norm(dim=-1, keepdim=True)
    assert_close("image embeds", ours(pair, "image_embeds", pixels()), unit)


@pytest.mark.parametrize("padding", [0, EOS], ids=["padded with zeros", "padded with the end"])
def test_text_features(pair, padding):
    ids, mask = padded_prompts(padding)
    arguments = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.tensor(mask)}
    expected = pair.torch.get_text_features(**arguments).pooler_output
    assert_close("text features", ours(pair, "text_features", ids), expected)
    unit = expected / expected.norm(dim=-1, keepdim=True)
    assert_close("text embeds", ours(pair, "text_embeds", ids), unit)


def test_what_stands_behind_the_end_of_text_has_no_effect(pair):
    plain, _ = padded_prompts(0)
    noise, mask = padded_prompts(0)
    noise[~mask] = np.random.default_rng(3).integers(3, EOS, (~mask).sum())
    found = [ours(pair, "text_features", ids) for ids in (plain, noise)]
    assert np.array_equal(*found)


def test_the_open_clip_layout_holds_the_same_parameters(pair):
    state = arrays(open_clip_names(pair.torch.state_dict()))
    state["attn_mask"] = np.zeros((LENGTH, LENGTH), np.float32)
    found = from_table(clip.TABLES["open_clip"], Clip, pair.config, state)
    expected, found = flatten(pair.params), flatten(found)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(leaf, found[path]) for path, leaf in expected.items())


# ---- full sizes

SIZES = {
    "ViT-H-14": {
        "hub": {
            "projection_dim": 1024,
            "text_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                "num_hidden_layers": 24, "hidden_act": "gelu", "eos_token_id": 2,
            },
            "vision_config": {
                "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16,
                "num_hidden_layers": 32, "hidden_act": "gelu", "patch_size": 14,
            },
        },
        "open_clip": {
            "embed_dim": 1024,
            "vision_cfg": {
                "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14,
            },
            "text_cfg": {
                "context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24,
            },
        },
        "parameters": 986_109_441,
        "config": ClipConfig(),
    },
    "ViT-L-14": {
        "hub": {
            "projection_dim": 768,
            "text_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
            },
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                "num_hidden_layers": 24, "patch_size": 14,
            },
        },
        "open_clip": {
            "embed_dim": 768, "quick_gelu": True,
            "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
            "text_cfg": {
                "context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12,
            },
        },
        "parameters": 427_616_513,
        "config": ClipConfig(
            vision=TowerConfig(1024, 4096, 24, 16, "quick_gelu"),
            text=TowerConfig(768, 3072, 12, 12, "quick_gelu"),
            projection_dim=768,
        ),
    },
}  # fmt: skip


def full_shapes(name: str, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the PyTorch class of this size has."""
    with torch.device("meta"):
        state = CLIPModel(CLIPConfig(**SIZES[name]["hub"])).state_dict()
        state = state if layout == "transformers" else open_clip_names(state)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("layout", clip.TABLES)
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_read_and_covered(name, layout, tmp_path):
    size, problems = SIZES[name], Problems()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **size["hub"]}))
    settings = {"model_cfg": size["open_clip"], "preprocess_cfg": {"size": 224}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    shapes = full_shapes(name, layout)
    config = clip.parse(tmp_path, layout, shapes, problems)
    assert config == size["config"] and not problems
    leaves = {k: leaf.shape for k, leaf in flatten(modules.make_abstract(Clip, config)).items()}
    table = clip.TABLES[layout]
    assert not table.find_problems(table.make_slots(leaves), shapes, "x")
    assert sum(math.prod(shape) for shape in leaves.values()) == size["parameters"]


def test_hps_needs_no_settings_and_others_do(tmp_path):
    problems = Problems()
    shapes = full_shapes("ViT-H-14", "open_clip")
    assert clip.parse(tmp_path, "open_clip", shapes, problems) == ClipConfig()
    assert not problems
    clip.parse(tmp_path, "open_clip", full_shapes("ViT-L-14", "open_clip"), problems)
    (problem,) = problems
    assert "open_clip_config.json: is missing" in problem and "found [1024, 768]" in problem


# ---- the aesthetic head


def test_the_aesthetic_head():
    """Against the published chain, dropout and all, at its full size."""
    torch.manual_seed(1)
    chain = nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in chain.parameters():
            weight *= 3
    state = arrays({f"layers.{key}": x for key, x in chain.state_dict().items()})
    shapes, problems = {key: x.shape for key, x in state.items()}, Problems()
    config = aesthetic.parse(None, "published", shapes, problems)
    assert config == AestheticConfig() and not problems
    params = from_table(aesthetic.TABLES["published"], AestheticHead, config, state)
    x = np.random.default_rng(0).standard_normal((5, 768)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda p, x: modules.bind(AestheticHead, config, p)(x))(params, x)
    assert_close("aesthetic head", np.asarray(found), chain(torch.from_numpy(x))[:, 0])
