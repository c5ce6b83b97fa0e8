"""Adapters in the network: gradients from the dense ones, samples of the merged model, layouts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.devices.mesh import batch_sharding, param_spec
from corl_jax.models import layers, lora
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths, merge, partition
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.decoding import FusedBlock
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network, sampling
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.layout import ADAPTER_PATHS, RULES
from corl_jax.policies.llama_adapters import add_adapters
from corl_jax.train import step
from corl_jax.weights import adapters
from tests.support import draws
from tests.support.tiny_models import two_layers
from tests.support.tiny_runs import SPECIAL, both_tasks, place_params, random_params
from tests.support.tolerances import LOGPROBS, NETWORK

pytestmark = pytest.mark.usefixtures("exact_products")

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj")
PROMPTS, GROUP = 4, 2
OPTIONS = step.UpdateOptions(
    CLIPPED_POLICY_LOSS,
    LossConstants(),
    LogprobOptions(SPECIAL, remat="none", chunk=10_000),
    (("t2i", 1.0), ("mm2t", 0.7)),
    dtype=jnp.float32,
)


@pytest.fixture(scope="module")
def plain(tiny_config):
    return two_layers(tiny_config)


def adapted(plain, targets=ALL, rank=4):
    """(config with adapters, adapters, base parameters), all random, so that none is idle."""
    config = add_adapters(plain, Lora(rank, 6.0, targets))
    return config, *partition(random_params(config), [ADAPTER_PATHS])


def dense(config, trained, frozen):
    """Parameters of the merged network, float32."""
    dtypes = dict.fromkeys((path for path, _ in leaf_paths(frozen)), np.float32)
    return adapters.merge_adapters(merge(trained, frozen), config.llama.lora, dtypes)[0]


@pytest.fixture(scope="module")
def batch(plain):
    return both_tasks(plain, PROMPTS, GROUP)


@functools.cache
def program(config):
    return jax.jit(lambda *args: step.gradients(FAMILY, config, OPTIONS, *args))


@pytest.fixture(scope="module")
def found(plain, batch):
    """(gradients of adapters, metrics) on one device."""
    config, trained, frozen = adapted(plain)
    return jax.device_get(program(config)(trained, frozen, batch))


# ---- the network


def test_first_values_are_pefts(plain):
    config = add_adapters(plain, Lora(8, 16.0, ALL))
    shapes, _ = partition(network.abstract(config), [ADAPTER_PATHS])
    first, again, other = (lora.init_adapters(shapes, jax.random.key(seed)) for seed in (0, 0, 1))
    flat, others = dict(leaf_paths(first)), dict(leaf_paths(other))
    for path, leaf in leaf_paths(again):
        np.testing.assert_array_equal(leaf, flat[path])
        if path.endswith("lora_b"):
            assert not leaf.any()
            continue
        bound = 1 / np.sqrt(leaf.shape[1])
        assert 0.8 * bound < np.abs(leaf).max() <= bound
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.1)
        assert not np.array_equal(leaf, others[path])
        assert not np.array_equal(leaf[0], leaf[1])
    q, k = (flat[f"language_model/layers/attn/{name}/lora_a"] for name in ("q_proj", "k_proj"))
    assert not np.array_equal(q, k)


def test_fresh_adapters_change_nothing(plain, batch):
    """But rounding: what XLA fuses with the zeros that they add may sum in another order."""
    config = add_adapters(plain, Lora(8, 16.0, ALL))
    shapes, _ = partition(network.abstract(config), [ADAPTER_PATHS])
    frozen, score = random_params(plain), step.make_logprob_step(FAMILY, config, OPTIONS)
    batch = {"mm2t": batch["mm2t"]}
    (with_them,) = score(lora.init_adapters(shapes, jax.random.key(0)), frozen, batch)["mm2t"]
    (alone,) = step.make_logprob_step(FAMILY, plain, OPTIONS)({}, frozen, batch)["mm2t"]
    (reference,) = score({}, frozen, batch)["mm2t"]
    np.testing.assert_allclose(with_them, alone, rtol=0, atol=LOGPROBS)
    np.testing.assert_allclose(reference, alone, rtol=0, atol=LOGPROBS)
    _, trained, _ = adapted(plain)  # adapters that are not fresh
    (changed,) = score(trained, frozen, batch)["mm2t"]
    assert np.abs(np.asarray(changed) - np.asarray(alone)).max() > 10 * LOGPROBS


def test_gradients_are_projections_of_the_dense_ones(plain, batch, found):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, at W + s A B."""
    config, trained, frozen = adapted(plain)
    grads, metrics = found
    kernels, rest = partition(dense(config, trained, frozen), ["language_model/layers/.*/kernel"])
    whole, wanted = jax.device_get(program(plain)(kernels, rest, batch))
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=NETWORK)
    whole, values = (dict(leaf_paths(tree)) for tree in (whole, trained))
    scale, worst = config.llama.lora.scale, 0.0
    for path, grad in leaf_paths(grads):
        name = path.rpartition("/")[0]
        a, b = values[f"{name}/lora_a"], values[f"{name}/lora_b"]
        gradient = whole[f"{name}/kernel"]
        if path.endswith("lora_a"):
            expected = scale * gradient @ b.swapaxes(1, 2)
        else:
            expected = scale * a.swapaxes(1, 2) @ gradient
        worst = max(worst, np.abs(grad - expected).max() / np.abs(expected).max())
    assert len(dict(leaf_paths(grads))) == 2 * len(ALL)
    print(f"largest gradient error {worst:.1e}")
    assert worst < NETWORK


def test_no_dense_gradient_is_computed(plain, batch):
    """Else it would cost what training the kernels does, and the adapters besides."""
    config, trained, frozen = adapted(plain, rank=1)
    kernels = partition(dense(config, trained, frozen), ["language_model/layers/.*/kernel"])

    def operations(config, *parts):
        return program(config).lower(*parts, batch).cost_analysis()["flops"]

    assert operations(config, trained, frozen) < 0.9 * operations(plain, *kernels)


# ---- sampling


def rollouts(config, params, batch, **options):
    keys = draw_keys()
    common = {"special": SPECIAL, "dtype": jnp.float32, **options}
    drawn = {}
    if "t2i" in batch:
        drawn["t2i"] = sampling.sample_images(
            config, params, batch["t2i"].prompts, keys, cfg_scale=3.0, **common
        )
    drawn["mm2t"] = sampling.sample_text(
        config, params, batch["mm2t"].prompts, keys, max_new_tokens=4, **common
    )
    return drawn


def draw_keys():
    return sample_keys(3, np.arange(PROMPTS), GROUP)


def full_logits(config, params, prompts, segment):
    """Those that tokens were drawn from, of drawings with the guidance of `rollouts`."""

    def logits(prompts):
        return draws.full_logits(config, params, prompts, segment.values, SPECIAL.image)

    found = logits(prompts)
    if prompts.pixel_values is not None:
        return found
    other = logits(draws.without_prompt(prompts, SPECIAL))
    return other + 3.0 * (found - other)


def test_samples_are_those_of_the_merged_model(plain, batch):
    config, trained, frozen = adapted(plain)
    beside = rollouts(config, merge(trained, frozen), batch)
    folded = rollouts(plain, dense(config, trained, frozen), batch)
    base = rollouts(plain, frozen, batch)
    for task in batch:
        merged = dense(config, trained, frozen)
        logits = full_logits(plain, merged, batch[task].prompts, folded[task])
        assert draws.margins(logits, folded[task], draw_keys()).min() > draws.SAFE
        np.testing.assert_array_equal(beside[task].values, folded[task].values)
        np.testing.assert_allclose(beside[task].logprobs, folded[task].logprobs, atol=LOGPROBS)
        assert not np.array_equal(beside[task].values, base[task].values)


@pytest.mark.parametrize("targets", [ALL, SOME, ("k_proj",)], ids=["all", "some", "one"])
def test_a_decode_step_multiplies_as_training_does(plain, targets):
    """In bfloat16 too, where a merged kernel would round most of a small update away."""
    config, trained, frozen = adapted(plain, targets)
    params = network.cast(merge(trained, frozen), jnp.bfloat16)
    block = layers.unstack(network.bind(config, params).language_model.layers, 2)[1]
    fused, attn, mlp = FusedBlock.from_block(block), block.attn, block.mlp
    x = jax.random.normal(jax.random.key(0), (6, config.llama.hidden_size), jnp.bfloat16)
    heads = [layers.split_heads(p(x[:, None]), n)[:, 0] for p, n in (
        (attn.q_proj, config.llama.num_heads), (attn.k_proj, 2), (attn.v_proj, 2),
    )]  # fmt: skip
    heads[0] = heads[0].reshape(6, 2, -1, config.llama.head_dim)
    wanted = jnp.concatenate([heads[0], heads[1][:, :, None], heads[2][:, :, None]], axis=2)
    near = {"rtol": 2**-7, "atol": 2**-8}
    np.testing.assert_allclose(*np.float32([fused.qkv(x), wanted]), **near)
    inner = jnp.stack([mlp.gate_proj(x), mlp.up_proj(x)], axis=1)
    np.testing.assert_allclose(*np.float32([fused.gate_up(x), inner]), **near)


def test_merging_into_bfloat16_tells_what_it_loses(plain):
    config, trained, frozen = adapted(plain)
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), frozen)
    dtypes = {path: leaf.dtype for path, leaf in leaf_paths(half)}

    def gone(factor, dtypes):
        small = jax.tree.map(lambda x: x * factor, trained)
        return adapters.merge_adapters(merge(small, half), config.llama.lora, dtypes)[1]

    assert gone(0.01, dtypes) > 0.9  # smaller than half of a kernel's last place
    assert gone(1, dtypes) < 0.1
    assert gone(0.01, dict.fromkeys(dtypes, np.float32)) == 0


def test_merging_rounds_each_layer_to_its_own_type(plain):
    config, trained, frozen = adapted(plain)
    exact = dict(leaf_paths(dense(config, trained, frozen)))
    path = "language_model/layers/attn/q_proj/kernel"
    merged, gone = adapters.merge_adapters(
        merge(trained, frozen), config.llama.lora, dict.fromkeys(exact, np.float32),
        layer_dtypes={path: ["float16", "bfloat16"]},
    )  # fmt: skip
    found = dict(leaf_paths(merged))[path]
    for layer, kind in enumerate((np.float16, jnp.bfloat16)):
        np.testing.assert_array_equal(found[layer], exact[path][layer].astype(kind))
    assert gone > 0


# ---- devices


def test_devices_change_nothing(plain, batch, found, mesh):
    config, trained, frozen = adapted(plain)
    parts = (place_params(part, mesh, RULES) for part in (trained, frozen))
    spread = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        grads, metrics = jax.device_get(program(config)(*parts, spread))
    assert metrics["loss"] == pytest.approx(found[1]["loss"], rel=NETWORK)
    for (path, leaf), wanted in zip(leaf_paths(grads), jax.tree.leaves(found[0]), strict=True):
        assert np.abs(leaf - wanted).max() < NETWORK * np.abs(wanted).max(), path


def test_samples_do_not_depend_on_devices(plain, batch, mesh):
    config, trained, frozen = adapted(plain)
    batch = {"mm2t": batch["mm2t"]}
    alone = rollouts(config, merge(trained, frozen), batch, greedy=True)
    params = merge(place_params(trained, mesh, RULES), place_params(frozen, mesh, RULES))
    spread = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = rollouts(config, params, spread, greedy=True)
    prompts = batch["mm2t"].prompts
    logits = full_logits(config, merge(trained, frozen), prompts, alone["mm2t"])
    assert draws.margins(logits, alone["mm2t"]).min() > draws.SAFE
    np.testing.assert_array_equal(found["mm2t"].values, alone["mm2t"].values)


def test_adapters_lie_as_their_kernels(plain, mesh):
    """Where a kernel's inputs or outputs are split, so is the adapter's side of them."""
    config = add_adapters(network.PRESETS["janus-pro-7b"], Lora(16, 32.0, ALL))
    specs = {
        path: param_spec(path, leaf.shape, mesh, RULES)
        for path, leaf in leaf_paths(network.abstract(config))
    }
    for path, spec in specs.items():
        if path.endswith("lora_a"):
            kernel = specs[path.replace("lora_a", "kernel")]
            assert (*spec, None)[1] == kernel[1]
        elif path.endswith("lora_b"):
            kernel = specs[path.replace("lora_b", "kernel")]
            assert spec[2] == kernel[2]
