"""The parts of a Show-o's language model: decoding, adapters, gradients, places on a mesh."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.mesh import param_spec
from corl_jax.models.clip import ClipVisionConfig
from corl_jax.models.lora import Lora
from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.modules import bind, make_abstract
from corl_jax.models.phi import AdaptedPhiConfig, Phi, PhiConfig
from corl_jax.params import leaf_paths, map_with_path, merge, partition
from corl_jax.policies import decoding
from corl_jax.policies.show_o import layout, network
from corl_jax.policies.show_o.answer_decoding import read_question_prompts
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.weights.adapters import merge_adapters
from tests.support.tolerances import NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

PHI = PhiConfig(
    vocab_size=83, hidden_size=32, intermediate_size=56, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
MAGVIT = MagvitConfig(
    z_channels=5, base_channels=32, encoder_channels=(32, 32), encoder_blocks=(1, 1),
    decoder_channels=(32, 32), decoder_blocks=(1, 1),
)  # fmt: skip
CONFIG = ShowOConfig(phi=PHI, magvit=MAGVIT, num_vq_tokens=16, llm_vocab_size=40)
ALL = layout.ADAPTER_TARGETS
PADDING, PROMPT, GROUP, STEPS = (0, 3, 1), 9, 2, 3


def draw(abstract):
    rng = np.random.default_rng(0)

    def draw_leaf(path, leaf):
        noise = 0.15 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + 1 if path.endswith("/scale") else noise

    return map_with_path(draw_leaf, abstract)


@pytest.fixture(scope="module")
def params():
    return draw(make_abstract(Phi, PHI))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- answers


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("front", [0, 4])
def test_answers_token_by_token_equal_the_full_forward(params, front, copied, monkeypatch):
    """Left-padded prompts whose first tokens see each other, continuations of each."""
    monkeypatch.setattr(decoding, "copies_prompts", lambda *_: copied)
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 83, (len(PADDING), PROMPT))
    tokens = rng.integers(0, 83, (len(PADDING) * GROUP, STEPS))
    real = np.arange(PROMPT) >= np.asarray(PADDING)[:, None]
    pads = np.repeat(PADDING, GROUP)[:, None, None]
    # Row i sees column j: no padding, and what is earlier or in front; padding sees itself.
    i, j = np.ogrid[: PROMPT + STEPS, : PROMPT + STEPS]
    mask = (j >= pads) & ((j <= i) | (j < pads + front)) | (i == j)

    @jax.jit
    def full(params):
        phi = bind(Phi, PHI, params)
        ids = np.concatenate([np.repeat(prompts, GROUP, axis=0), tokens], axis=1)
        return phi(phi.embed_tokens(ids), jnp.asarray(mask))[:, PROMPT - 1 :]

    @jax.jit
    def cached(params):
        phi = bind(Phi, PHI, params)
        decoder, last = read_question_prompts(
            phi,
            phi.embed_tokens(prompts),
            jnp.asarray(real),
            jnp.arange(PROMPT)[None] < front,
            "xla",
        )
        caches = decoder.new_caches(len(tokens), STEPS)
        states = [jnp.repeat(last, GROUP, axis=0)]
        for index in range(STEPS):
            read = phi.embed_tokens(tokens[:, index])
            hidden, caches = decoder(read, jnp.int32(index), caches)
            states.append(hidden)
        return jnp.stack(states, axis=1)

    np.testing.assert_allclose(cached(params), full(params), atol=NETWORK)


# ---- two parts


def read_both(
    params, remat="none", attention="xla", dtype=jnp.float32, orders=("causal", "full"), front=0
):
    phi = bind(Phi, PHI, jax.tree.map(lambda x: x.astype(dtype), params))
    first, second = (jnp.asarray(normal(*shape), dtype) for shape in ((2, 6, 32), (4, 8, 32)))
    return phi.read_parts(
        first, jnp.asarray([6, 4]), second, orders,
        front=front, remat=remat, attention=attention,
    )  # fmt: skip


def test_a_front_sees_itself(params):
    """Two parts with a front equal whole sequences, with the padding in their middle."""
    lengths, front = np.repeat([6, 4], 2)[:, None], 3
    first, second = read_both(params, orders=("causal", "causal"), front=front)
    # Row i of a whole sequence [first, padding, second] sees column j.
    i, j = np.ogrid[:14, :14]
    real = (np.arange(14) < lengths) | (np.arange(14) >= 6)
    mask = ((j <= i) | ((j < front) & (i < 6))) & real[:, None] | (i == j)
    positions = np.concatenate([np.tile(np.arange(6), (4, 1)), lengths + np.arange(8)], axis=1)
    phi = bind(Phi, PHI, params)
    embeds = jnp.concatenate([jnp.repeat(normal(2, 6, 32), 2, axis=0), normal(4, 8, 32)], axis=1)
    whole = np.asarray(phi(embeds, jnp.asarray(mask), jnp.asarray(positions)))
    np.testing.assert_allclose(second, whole[:, 6:], atol=NETWORK)
    for row, length in enumerate((6, 4)):
        np.testing.assert_allclose(first[row, :length], whole[2 * row, :length], atol=NETWORK)
    causal, _ = read_both(params, orders=("causal", "causal"))
    assert np.abs(first - causal).max() > 0.01


def test_gradients_do_not_depend_on_what_is_kept(params):
    def loss(params, remat):
        first, second = read_both(params, remat)
        return jnp.sum(second**2) + jnp.sum(first[0] ** 2)

    expected = jax.jit(jax.grad(lambda p: loss(p, "none")))(params)
    for remat in ("full", "dots"):
        found = jax.jit(jax.grad(lambda p, remat=remat: loss(p, remat)))(params)
        for (path, a), (_, b) in zip(leaf_paths(found), leaf_paths(expected), strict=True):
            scale = max(1.0, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, atol=NETWORK * scale, err_msg=path)


@pytest.mark.parametrize(
    ("orders", "front"), [(("causal", "full"), 0), (("full", "causal"), 0), (("causal",) * 2, 3)]
)
def test_parts_lower_to_cudnn_for_nvidia(params, orders, front, monkeypatch):
    """Four fused calls in the layers' scan, forward and backward."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)

    def loss(params):
        states = read_both(
            params, attention="cudnn", dtype=jnp.bfloat16, orders=orders, front=front
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in states)

    traced = jax.jit(jax.grad(loss)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for direction in ("Softmax(", "SoftmaxBackward("):
        calls = [line for line in text.splitlines() if "__cudnn$fmha" in line and direction in line]
        assert len(calls) == 2, direction


# ---- adapters and places


def test_adapted_equals_merged():
    """Of layers with biases, which have no adapters of their own."""
    lora = Lora(3, 6.0, ALL)
    config = AdaptedPhiConfig(**vars(PHI), lora=lora)
    adapted = {"language_model": draw(make_abstract(Phi, config))}
    trained, frozen = partition(adapted, [layout.ADAPTER_PATHS])
    assert len(list(leaf_paths(trained))) == 2 * len(ALL)
    dtypes = dict.fromkeys((path for path, _ in leaf_paths(frozen)), np.float32)
    merged = merge_adapters(merge(trained, frozen), lora, dtypes)[0]
    embeds, mask = normal(2, 5, 32), np.tril(np.ones((2, 5, 5), bool))
    states = [
        jax.jit(lambda p, c=c: bind(Phi, c, p)(embeds, mask))(p["language_model"])
        for c, p in ((config, adapted), (PHI, merged), (PHI, frozen))
    ]
    np.testing.assert_allclose(states[0], states[1], atol=NETWORK)
    assert np.abs(states[0] - states[2]).max() > 0.01


def test_adapters_leave_the_sizes_of_the_base():
    config = network.add_adapters(CONFIG, Lora(4, 8.0, ("q_proj", "v_proj")))
    paths = [path for path, _ in leaf_paths(network.abstract(config)) if "lora" in path]
    assert sorted(paths) == [
        f"language_model/layers/attn/{name}/lora_{part}"
        for name in ("q_proj", "v_proj")
        for part in "ab"
    ]
    assert network.remove_adapters(config) == CONFIG


def test_every_parameter_has_a_place_on_a_mesh(mesh):
    lora = Lora(4, 8.0, ALL)
    sizes = ShowOConfig(w_clip_vit=True, magvit=MAGVIT, clip=ClipVisionConfig())
    config = network.add_adapters(sizes, lora)
    leaves = dict(leaf_paths(network.abstract(config)))
    specs = {
        path: param_spec(path, leaf.shape, mesh, layout.RULES) for path, leaf in leaves.items()
    }
    assert sum(leaves[path].size for path, spec in specs.items() if any(spec)) > 1_400_000_000
    unused = [rule for rule, _ in layout.RULES if not any(re.fullmatch(rule, p) for p in leaves)]
    assert not unused
