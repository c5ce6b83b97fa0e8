"""JanusFlow on a mesh, in bfloat16 and with adapters."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.windows import Window
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.devices.mesh import batch_sharding, make_mesh, param_shardings
from corl_jax.models.lora import Lora
from corl_jax.params import leaf_paths, partition
from corl_jax.policies.family import Denoising, LogprobOptions, SamplingOptions
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import layout, network, sampling
from corl_jax.policies.janus_flow.family import FAMILY
from corl_jax.policies.janus_flow.logprobs import make_velocity
from corl_jax.policies.janus_flow.sampling import make_cached_velocity
from corl_jax.policies.llama_adapters import add_adapters, remove_adapters
from corl_jax.train import step
from corl_jax.train.agreement import RATIO_SHARES
from corl_jax.types import EncodedPrompts
from tests.parity import torch_janus_flow
from tests.support.tolerances import NETWORK

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
PROMPTS, GROUP = 8, 2


@pytest.fixture(scope="module")
def config():
    return torch_janus_flow.jax_config(torch_janus_flow.tiny_flow())


@pytest.fixture(scope="module")
def params():
    return torch_janus_flow.flow_params(torch_janus_flow.tiny_flow())


def make_batch(config) -> tuple[EncodedPrompts, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 10, PROMPTS)
    mask = np.arange(10) >= 10 - lengths[:, None]
    ids = np.where(mask, rng.integers(3, 80, (PROMPTS, 10)), 0).astype(np.int32)
    rows = PROMPTS * GROUP
    latents = rng.normal(size=(rows, *config.latent_shape)).astype(np.float32)
    times = rng.uniform(size=rows).astype(np.float32)
    return EncodedPrompts(ids, mask), jnp.asarray(latents), jnp.asarray(times)


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes(config, params):
    """Velocities with guidance, and the gradient of everything that is trained."""
    mesh = make_mesh(2, 2, 2)

    def loss(trained, params, prompts, latents, times):
        model = network.bind(config, params | trained)
        velocity = make_velocity(model, prompts, LogprobOptions(SPECIAL, cfg_scale=2.0))
        values = velocity(latents, times)
        return jnp.square(values).mean(), values

    def arguments(params):
        trained, _ = partition(params, layout.TRAINABLE)
        return trained, params

    step, batch = jax.value_and_grad(loss, has_aux=True), make_batch(config)
    (expected, expected_values), expected_gradients = jax.jit(step)(*arguments(params), *batch)

    shardings = param_shardings(params, mesh, layout.RULES)
    placed = jax.device_put(params, shardings)
    kernel = placed["generation_decoder"]["layers"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    spread = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        sharded = jax.jit(step, out_shardings=(None, arguments(shardings)[0]))
        (found, values), gradients = sharded(*arguments(placed), *spread)

    np.testing.assert_allclose(found, expected, rtol=NETWORK)
    np.testing.assert_allclose(values, expected_values, atol=NETWORK)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradients))
    for (path, leaf), other in zip(
        leaf_paths(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=NETWORK * scale, err_msg=path)


# ---- a rollout and its update: pieces and devices change nothing

DENOISING = Denoising(3, sde=Sde("flow", guard="ratio_per_dt"), window=Window(2, (0, 1)))
SAMPLING = SamplingOptions(SPECIAL, cfg_scale=2.0, dtype=jnp.float32, denoising=DENOISING)
UPDATE = step.UpdateOptions(
    CLIPPED_POLICY_LOSS, LossConstants(kl_coef=0.1, clip_low=1e-4, clip_high=1e-4),
    LogprobOptions(SPECIAL, cfg_scale=2.0, denoising=DENOISING, remat="none"), (("t2i", 1.0),),
    dtype=jnp.float32,
)  # fmt: skip
MESHES = ((8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow))


def draw(config, params, prompts, keys):
    return sampling.sample_latents(config, params, prompts, keys, SAMPLING)[0]


def compute_gradients(config, params, task, pieces=1):
    options = dataclasses.replace(UPDATE, micro_batches=pieces)

    @jax.jit
    def compute(params, task):
        trained, frozen = partition(params, layout.TRAINABLE)
        return step.gradients(FAMILY, config, options, trained, frozen, {"t2i": task})

    return jax.device_get(compute(params, task))


@pytest.fixture(scope="module")
def rollout(config, params):
    """(keys, images of one device, the inputs of an update, its gradients and metrics)."""
    prompts, *_ = make_batch(config)
    keys = jax.random.split(jax.random.key(4), PROMPTS * GROUP)
    drawn = jax.device_get(draw(config, params, prompts, keys))
    rng = np.random.default_rng(5)
    shape, size = drawn.mask.shape, drawn.values.shape[2:]
    task = step.TaskBatch(
        prompts, (drawn,), rng.normal(size=len(keys)).astype(np.float32),
        old_logprobs=((1e-4 * rng.normal(size=shape)).astype(np.float32),),
        ref_velocities=(rng.normal(size=(*shape, *size)).astype(np.float32),),
    )  # fmt: skip
    return keys, drawn, task, compute_gradients(config, params, task)


def assert_same_update(found, expected):
    (gradients, metrics), (expected_gradients, expected_metrics) = found, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        if name.endswith(RATIO_SHARES):
            continue  # 1 is the edge between two bins
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    leaves = dict(leaf_paths(expected_gradients))
    for path, leaf in leaf_paths(gradients):
        # The first layers' gradients are sums of many cancelling terms.
        np.testing.assert_allclose(
            leaf, leaves[path], atol=10 * NETWORK * np.abs(leaves[path]).max(), err_msg=path
        )


def test_the_update_is_worth_comparing(rollout):
    _, drawn, _, (gradients, metrics) = rollout
    assert len(np.unique(drawn.replay["steps"][:, 0])) == 2, "windows begin at different steps"
    assert 0.05 < metrics["t2i/clip_ratio/region_mean"] < 0.9 and metrics["t2i/kl"] > 0
    drawing = [x for path, x in leaf_paths(gradients) if path.startswith("generation_")]
    assert drawing and all(np.abs(leaf).max() > 0 for leaf in drawing)


@pytest.mark.parametrize("pieces", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_micro_batches_change_no_update(config, params, rollout, pieces):
    _, _, task, expected = rollout
    assert_same_update(compute_gradients(config, params, task, pieces), expected)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_devices_change_no_image_and_no_update(config, params, rollout, axes):
    keys, drawn, task, expected = rollout
    mesh = make_mesh(*axes)
    placed = jax.device_put(params, param_shardings(params, mesh, layout.RULES))
    spread = jax.device_put((task, keys), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.device_get(draw(config, placed, spread[0].prompts, spread[1]))
        updated = compute_gradients(config, placed, spread[0], pieces=1 if axes[0] == 8 else 2)
    np.testing.assert_array_equal(found.replay["steps"], drawn.replay["steps"])
    np.testing.assert_allclose(found.values, drawn.values, rtol=1e-4, atol=1e-4)
    assert_same_update(updated, expected)


def test_a_batch_in_parts_is_the_same_batch(config, params, rollout):
    keys, drawn, task, _ = rollout
    for rows in (slice(0, 2), slice(2, 8)):
        prompts = jax.tree.map(lambda x: x[rows], task.prompts)  # noqa: B023
        of_rows = slice(GROUP * rows.start, GROUP * rows.stop)
        part = jax.device_get(draw(config, params, prompts, keys[of_rows]))
        np.testing.assert_array_equal(part.replay["steps"], drawn.replay["steps"][of_rows])
        np.testing.assert_allclose(part.values, drawn.values[of_rows], rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float32(config, params):
    prompts, latents, times = make_batch(config)

    @jax.jit
    def compute(params):
        model = network.bind(config, params)
        prefix = model.make_prefix(prompts, SPECIAL)
        velocity = make_cached_velocity(model, prefix, SPECIAL, None, "xla")
        skip, condition = model.generation_encoder(latents, times)
        return velocity(latents, times), skip, condition

    exact, rounded = compute(params), compute(network.cast(params, jnp.bfloat16))
    # Latents and velocities are float32 in any compute dtype; the network inside is not.
    assert [x.dtype for x in rounded] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for found, expected in zip(rounded, exact, strict=True):
        difference = np.abs(np.asarray(found, np.float32) - expected).mean()
        assert difference < 0.05 * np.abs(expected).mean()


def test_no_rule_is_shadowed_or_unused():
    """Each path belongs to the first rule that matches; each rule is first for some path."""
    lora = Lora(2, 2.0, layout.ADAPTER_TARGETS)
    config = add_adapters(network.PRESETS["janusflow-1.3b"], lora)
    first = {
        next(rule for rule, _ in layout.RULES if re.fullmatch(rule, path))
        for path, _ in leaf_paths(network.abstract(config))
    }
    assert {rule for rule, _ in layout.RULES} == first


def test_adapters_are_the_paths_that_the_table_names():
    lora = Lora(2, 2.0, layout.ADAPTER_TARGETS)
    sizes = network.PRESETS["janusflow-1.3b"]
    config = add_adapters(sizes, lora)
    base = {path for path, _ in leaf_paths(network.abstract(sizes))}
    added = {path for path, _ in leaf_paths(network.abstract(config))} - base
    assert len(added) == 2 * len(layout.ADAPTER_TARGETS)
    assert all(re.fullmatch(layout.ADAPTER_PATHS, path) for path in added)
    assert remove_adapters(config) == sizes
