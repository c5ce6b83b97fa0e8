"""The networks by themselves: sizes, parameters, dtypes, remat, decoding, layout on a mesh."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import batch_sharding, constrain, make_mesh, param_shardings, param_spec
from corl_jax.errors import InputError
from corl_jax.models import llama
from corl_jax.models.llama import compute_positions
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths
from corl_jax.policies.janus import network
from corl_jax.policies.janus.layout import ADAPTER_TARGETS, RULES
from corl_jax.policies.janus.network import PRESETS
from corl_jax.policies.llama_adapters import add_adapters
from tests.support.tolerances import NETWORK

# Counts by part as the specification states them: (1.3B and Pro-1B, Pro-7B).
COUNTS = {
    "language_model/": (1_442_940_928, 6_490_935_296),
    "language_model/embed_tokens/": (209_715_200, 419_430_400),
    "language_model/layers/": (24 * 51_384_320, 30 * 202_383_360),
    "language_model/norm/": (2_048, 4_096),
    "lm_head/": (209_715_200, 419_430_400),
    "vision_model/": (303_688_704, 303_688_704),
    "aligner/": (6_295_552, 20_979_712),
    "generation_embeddings/": (131_072, 131_072),
    "generation_aligner/": (4_214_784, 16_818_176),
    "generation_head/": (37_767_168, 83_906_560),
    "vqmodel/encoder/": (29_298_176, 29_298_176),
    "vqmodel/decoder/": (42_449_795, 42_449_795),
    "vqmodel/quantize/": (131_072, 131_072),
    "vqmodel/quant_conv/": (2_056, 2_056),
    "vqmodel/post_quant_conv/": (2_304, 2_304),
    "vqmodel/": (71_883_403, 71_883_403),
    "": (2_076_636_811, 7_407_773_323),
}


def sizes(config) -> dict[str, int]:
    return {path: math.prod(leaf.shape) for path, leaf in leaf_paths(network.abstract(config))}


@pytest.mark.parametrize(
    ("name", "column"), [("janus-1.3b", 0), ("janus-pro-1b", 0), ("janus-pro-7b", 1)]
)
def test_parameter_counts(name, column):
    found = sizes(PRESETS[name])
    by_part = {
        part: sum(size for path, size in found.items() if path.startswith(part)) for part in COUNTS
    }
    assert by_part == {part: counts[column] for part, counts in COUNTS.items()}


@pytest.mark.parametrize(("name", "count"), [("janus-pro-1b", 1_652_656_128),
                                             ("janus-pro-7b", 6_910_365_696)])  # fmt: skip
def test_language_model_and_its_head_are_what_corl_trains(name, count):
    trained = re.compile(r"language_model/|lm_head/")
    assert sum(size for path, size in sizes(PRESETS[name]).items() if trained.match(path)) == count


def test_every_preset_reads_and_draws_576_tokens():
    for config in PRESETS.values():
        assert config.num_image_tokens == 576
        assert config.siglip.image_size == 24 * config.vq.downsample


def test_init_has_the_abstract_shapes_and_draws_every_layer_anew(tiny_config):
    # Compiling one draw for each convolution is slow: as few of them as possible.
    vq = dataclasses.replace(tiny_config.vq, channel_multiplier=(1,))
    config = dataclasses.replace(tiny_config, vq=vq)
    params = network.init(config, jax.random.key(1), jnp.bfloat16)
    abstract = network.abstract(config, jnp.bfloat16)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].astype(np.float32)
    assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
    assert not np.allclose(kernel[0], kernel[1])
    for path, leaf in leaf_paths(params):
        if path.endswith(("/scale", "/bias")):
            assert (leaf == path.endswith("/scale")).all(), path


def test_bind_uses_the_parameters_it_is_given(tiny_config, tiny_params):
    """Every leaf comes back at its own path, so none is dropped or swapped."""
    from flax import nnx

    model = network.bind(tiny_config, tiny_params)
    back = nnx.to_pure_dict(nnx.state(model))
    found = {
        "/".join(str(key.key) for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(back)[0]
    }
    expected = dict(leaf_paths(tiny_params))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_cast_leaves_the_image_tokenizer_in_float32(tiny_config, tiny_params):
    params = network.cast(tiny_params, jnp.bfloat16)
    for path, leaf in leaf_paths(params):
        wanted = jnp.float32 if path.startswith("vqmodel/") else jnp.bfloat16
        assert leaf.dtype == wanted, path


def test_bfloat16_stays_bfloat16_and_near_float32(tiny_config, tiny_params):
    """No layer may quietly compute in float32: it would double memory and time."""
    ids, mask = prompts(3, 9)
    side = tiny_config.siglip.image_size
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    codes = np.arange(tiny_config.num_image_tokens)[None]

    @jax.jit
    def outputs(params):
        model = network.bind(tiny_config, params)
        hidden = model.language_model(model.embed_text(ids), mask)
        return {
            "hidden": hidden,
            "text": model.text_logits(hidden),
            "image": model.image_logits(hidden),
            "features": model.image_features(images),
            "drawn": model.embed_image_tokens(codes),
            "pixels": model.vqmodel.decode(codes),
        }

    exact = outputs(tiny_params)
    rounded = outputs(network.cast(tiny_params, jnp.bfloat16))
    for name, value in rounded.items():
        assert value.dtype == (jnp.float32 if name == "pixels" else jnp.bfloat16), name
        difference = np.abs(np.asarray(value, np.float32) - exact[name]).mean()
        assert difference < 0.05 * np.abs(exact[name]).mean(), name
    np.testing.assert_array_equal(rounded["pixels"], exact["pixels"])


def prompts(rows: int, length: int, vocab: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, row i left-padded by i."""
    ids = np.random.default_rng(0).integers(0, vocab, (rows, length))
    return ids, np.arange(length) >= np.arange(rows)[:, None]


def losses(config, params):
    """A loss for the language model and one for the image tower, each of its own parameters."""
    ids, mask = prompts(3, 9)
    side = config.siglip.image_size
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    target = np.linspace(-1, 1, config.llama.hidden_size)

    def text(part, remat):
        model = network.bind(config, params | {"language_model": part})
        hidden = model.language_model(model.embed_text(ids), mask, remat=remat)
        return jnp.square(hidden * target).mean()

    def image(part, remat):
        model = network.bind(config, params | {"vision_model": part})
        return jnp.square(model.image_features(images, remat=remat)).mean()

    return {"text": (text, params["language_model"]), "image": (image, params["vision_model"])}


@pytest.mark.parametrize("tower", ["text", "image"])
def test_remat_keeps_less_and_changes_no_gradient(tiny_config, tiny_params, tower):
    loss, part = losses(tiny_config, tiny_params)[tower]
    gradients, kept = {}, {}
    for remat in ("none", "dots", "full"):
        gradients[remat] = jax.jit(jax.grad(loss), static_argnums=1)(part, remat)
        residuals = jax.eval_shape(lambda p, r=remat: jax.vjp(lambda q: loss(q, r), p)[1], part)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert kept["full"] < kept["dots"] < kept["none"]
    scale = max(np.abs(x).max() for x in jax.tree.leaves(gradients["none"]))
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=NETWORK * scale),
            gradients[remat], gradients["none"],
        )  # fmt: skip


def test_padding_and_neighbours_change_nothing(tiny_config, tiny_params):
    """A row alone and unpadded gives what it gives left-padded inside a batch."""
    ids, mask = prompts(3, 9)
    model = network.bind(tiny_config, tiny_params)
    forward = jax.jit(lambda ids, mask: model.language_model(model.embed_text(ids), mask))
    batch = forward(ids, mask)
    for row in range(3):
        alone = forward(ids[row : row + 1, row:], np.ones((1, 9 - row), bool))
        np.testing.assert_allclose(alone[0], batch[row, row:], atol=NETWORK)


@pytest.mark.parametrize("first", [4, 3])
def test_odd_lengths_are_padded_for_cudnn_and_change_nothing(
    tiny_config, tiny_params, monkeypatch, first
):
    """cuDNN needs even lengths; here XLA computes in its place."""
    attend, lengths = llama.attend_causally, set()

    def attend_evenly(query, key, value, mask, kernel):
        lengths.update((query.shape[1] % 2, key.shape[1] % 2) if kernel == "cudnn" else ())
        return attend(query, key, value, mask)

    monkeypatch.setattr(llama, "attend_causally", attend_evenly)
    model = network.bind(tiny_config, tiny_params).language_model
    embeds = model.embed_tokens(jnp.arange(3, 3 + 22).reshape(2, 11))
    prompts, behind, last = embeds[:, 4 - first : 4], embeds[:, 4:7], embeds[:, 7:]
    mask = jnp.array([[False, True, True, True], [True, True, True, True]])[:, 4 - first :]
    branches = llama.Branch(behind), llama.Branch(last)  # 3 and 4 tokens, without masks
    _, caches = model.prefill(prompts, mask)

    def read(kernel):
        states = model.read_branches(prompts, mask, branches, attention=kernel)
        after = model.after_caches(caches, mask, branches[0], attention=kernel)
        return [states[0][mask], *states[1:], after]

    for state, right in zip(read("cudnn"), read("xla"), strict=True):
        np.testing.assert_allclose(state, right, atol=NETWORK)
    assert lengths == {0}


def test_positions_count_kept_tokens():
    mask = jnp.asarray([[1, 1, 1, 1], [0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(compute_positions(mask), [[0, 1, 2, 3], [0, 0, 0, 1]])


def test_image_features_fill_the_placeholders_in_order(tiny_config, tiny_params):
    model = network.bind(tiny_config, tiny_params)
    tokens, width = tiny_config.num_image_tokens, tiny_config.llama.hidden_size
    ids = np.full((2, tokens + 4), 5)
    ids[0, 1 : 1 + tokens] = ids[1, 3 : 3 + tokens] = 90
    features = np.random.default_rng(0).standard_normal((2, tokens, width)).astype(np.float32)
    embeds = np.asarray(model.prompt_embeds(ids, 90, features))
    np.testing.assert_array_equal(embeds[0, 1 : 1 + tokens], features[0])
    np.testing.assert_array_equal(embeds[1, 3 : 3 + tokens], features[1])
    text = np.asarray(model.embed_text(ids))
    np.testing.assert_array_equal(embeds[ids != 90], text[ids != 90])


def test_image_tokenizer_ignores_the_length_of_codebook_rows(tiny_config, tiny_params):
    tokens = tiny_config.num_image_tokens
    codes = np.arange(tokens)[None]
    lengths = np.random.default_rng(0).uniform(0.1, 10, (tiny_config.vq.num_embeddings, 1))

    @jax.jit
    def round_trip(params):
        vqmodel = network.bind(tiny_config, params).vqmodel
        pixels = vqmodel.decode(codes)
        return pixels, vqmodel.encode(pixels)

    pixels, found = round_trip(tiny_params)
    assert pixels.shape == (1, 16, 16, 3)
    assert (found.shape, found.dtype) == ((1, tokens), jnp.int32)
    table = tiny_params["vqmodel"]["quantize"]["embedding"] * lengths.astype(np.float32)
    vqmodel = tiny_params["vqmodel"] | {"quantize": {"embedding": table}}
    scaled_pixels, scaled_codes = round_trip(tiny_params | {"vqmodel": vqmodel})
    np.testing.assert_allclose(scaled_pixels, pixels, atol=1e-4)
    np.testing.assert_array_equal(scaled_codes, found)


# ---- layout on a mesh


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_a_rule_and_large_ones_are_split(name, mesh):
    replicated = ("vision_model/patch_embedding/", "vision_model/position_embedding/", "vqmodel/")
    for path, leaf in leaf_paths(network.abstract(PRESETS[name])):
        spec = param_spec(path, leaf.shape, mesh, RULES)
        large = leaf.ndim >= 2 and math.prod(leaf.shape) > 1e6 and "bias" not in path
        if large and not path.startswith(replicated):
            assert {"fsdp", "tensor"} <= {axis for axis in spec if axis}, (path, spec)
        if "/layers/" in path and spec:
            assert spec[0] is None, f"{path}: the layer axis is scanned, never split"


def test_no_rule_is_shadowed_or_unused():
    """Each path belongs to the first rule that matches; each rule is first for some path."""
    config = add_adapters(PRESETS["janus-pro-7b"], Lora(2, 2.0, ADAPTER_TARGETS))
    paths = [path for path, _ in leaf_paths(network.abstract(config))]
    first = {
        next(i for i, (rule, _) in enumerate(RULES) if re.fullmatch(rule, path)) for path in paths
    }
    unused = [rule for i, (rule, _) in enumerate(RULES) if i not in first]
    assert not unused


def test_a_path_without_a_rule_is_refused(mesh):
    with pytest.raises(InputError, match=r"adapter/kernel.*add one to the rules of its network"):
        param_spec("language_model/layers/adapter/kernel", (2, 8, 8), mesh, RULES)


def test_mesh_axes_must_use_all_devices():
    assert dict(make_mesh(data=-1, fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for axes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 1}):
        with pytest.raises(InputError, match="mesh"):
            make_mesh(**axes)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 3, 4))
    assert constrain(x, "batch", "length", "embed") is x


def test_eight_devices_compute_what_one_computes(tiny_config, tiny_params, mesh):
    """Features, hidden states, and the gradient of what CoRL trains."""
    ids, mask = prompts(8, 12)
    side = tiny_config.siglip.image_size
    images = np.random.default_rng(0).standard_normal((8, side, side, 3)).astype(np.float32)

    def loss(trained, params, ids, mask, images):
        model = network.bind(tiny_config, params | trained)
        features = model.image_features(images)
        embeds = jnp.concatenate([features, model.embed_text(ids)], axis=1)
        kept = jnp.concatenate([jnp.ones(features.shape[:2], bool), mask], axis=1)
        hidden = model.language_model(embeds, kept, remat="dots")
        logits = model.text_logits(hidden)
        return jnp.square(logits * kept[..., None]).mean(), hidden

    def arguments(params):
        return {name: params[name] for name in ("language_model", "lm_head")}, params

    step = jax.value_and_grad(loss, has_aux=True)
    (expected, expected_hidden), expected_gradients = jax.jit(step)(
        *arguments(tiny_params), ids, mask, images
    )

    shardings = param_shardings(tiny_params, mesh, RULES)
    params = jax.device_put(tiny_params, shardings)
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    batch = jax.device_put((ids, mask, images), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, out_shardings=(None, arguments(shardings)[0]))
        (found, hidden), gradients = sharded(*arguments(params), *batch)

    assert hidden.sharding.is_equivalent_to(batch_sharding(mesh), hidden.ndim)
    np.testing.assert_allclose(found, expected, rtol=NETWORK)
    np.testing.assert_allclose(hidden, expected_hidden, atol=NETWORK)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=NETWORK * scale),
        gradients, expected_gradients,
    )  # fmt: skip
